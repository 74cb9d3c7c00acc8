# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Fair comparisons of diffusion models: paired images, standard scorers, win rates with intervals.

Image j of prompt i starts from the same noise for every model: common.generator(seed, "image", i,
j), drawn on the CPU in fp32. So two models differ by their weights alone, and a win rate compares
image with image.

    1. win rates            counting, bootstrap
    2. published weights    the scorers' state dicts in transformers' modules
    3. scorers              from files to score(images, prompts)
    4. scores of pair sets  what smpo.py and dro.py train on
    5. images               drawn from paired noise, kept under a hash of all they depend on
    6. comparison           scores.json, scores.md, samples.png, winrate.png
    7. pictures             with Pillow
    8. training             a run's check before it and evaluation after it
    9. command line

    python eval.py                                     # every run in runs/ against the tiny model
    python eval.py --preset sd15 --model M --unet A B --prompts p.txt --scorers pickscore,hpsv2.1
    torchrun --nproc_per_node=8 eval.py --preset sdxl --model M --unet A --prompts p.txt
    python eval.py --images DIR_1 DIR_2 --prompts p.txt --scorers aesthetic.v2
    python eval.py --data pairs.parquet --scorers hpsv2.1 --scores_out hps.safetensors
"""

import common
from common import TINY, InputError, describe_error, option
from contextlib import contextmanager
import copy
from dataclasses import dataclass
import hashlib
import importlib.util
from itertools import combinations, product
import json
import math
import numpy as np
import os
from pathlib import Path
from PIL import Image, ImageDraw
import re
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import sys
import torch
from torch import nn
import torch.nn.functional as F
from tqdm import tqdm
from typing import Literal


# ------------------------------------------------------------------------------- 1. win rates
# Two models draw the same prompts from the same noise. Of 3 prompts with 2 images each:
#
#     a = [[.9, .4], [.5, .5], [.2, .8]]     b = [[.7, .6], [.5, .1], [.3, .1]]
#     A beats B: 1, 0; 1/2, 1; 0, 1          points 1/2, 3/4, 1/2     win 58 %
#
# The interval says how much of that is the luck of these prompts.
def win_rate(a, b, seed=0):
    """How often A beats B on the same prompt and seed.

    a, b: scores, (P prompts,) or (P prompts, N images). Returns fractions of the comparisons: win
    (a tie counts half), win_strict (a > b), tie; low, high: the 95 % bootstrap interval of win.
    Raises ValueError for tables that are empty, not finite or of different shapes.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    fits = a.shape == b.shape and a.ndim in (1, 2) and a.size
    if not fits or not np.isfinite([a, b]).all():
        shapes = f"{a.shape} and {b.shape}"
        raise ValueError(f"win_rate wants two finite tables (P,) or (P, N), not {shapes}")

    # A comparison gives A one point for a win and half a point for a tie: two models that are the
    # same have 50 %, not 0 %.
    points = ((a > b) + 0.5 * (a == b)).reshape(len(a), -1).mean(1)  # (P,) in [0, 1]

    # The bootstrap resamples whole prompts: N images of one prompt are no independent evidence.
    # Drawing P prompts with replacement is the same as drawing how often each distinct value of
    # `points` occurs. That is a multinomial, and much cheaper.
    distinct, counts = np.unique(points, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(a), counts / len(a), size=10_000)  # (10 000, distinct values)
    low, high = np.quantile(drawn @ distinct / len(a), [0.025, 0.975])
    return {
        "win": float(points.mean()),
        "win_strict": float((a > b).mean()),
        "tie": float((a == b).mean()),
        "low": float(low),
        "high": float(high),
    }


# ----------------------------------------------------------------------- 2. published weights
# Some scorers are published as a bare state dict in the layout of their authors' code. They are
# loaded into transformers' modules by renaming the keys, so that no other package is needed.
# Each table holds (regular expression, replacement), applied to a key from top to bottom, e.g.
#     visual.transformer.resblocks.0.attn.out_proj.bias
#     -> vision_model.encoder.layers.0.self_attn.out_proj.bias
# What is missing or left over after that is an error: see load_strict.
OPEN_CLIP_TO_CLIP = (
    # transformer layers
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    # embeddings
    (r"^visual\.(positional|class)_embedding", r"vision_model.embeddings.\1_embedding"),
    (r"^(token|positional)_embedding", r"text_model.embeddings.\1_embedding"),
    (r"positional_embedding", "position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    # the norms around the layers, and the projections into the common space
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # so transformers spells it
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
)
# BLIP's image encoder. Its text encoder has the same names in both.
BLIP_TO_TRANSFORMERS = (
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^blocks", "encoder.layers"),
    (r"^norm", "post_layernorm"),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.proj\.", ".projection."),
)


def select_weights(weights, prefix="", renames=()):
    """The tensors under a prefix of a state dict, in fp32, with their keys renamed."""
    found = {}
    for key, value in weights.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            for pattern, replacement in renames:
                key = re.sub(pattern, replacement, key)
            found[key] = value.float()
    return found


def load_strict(module, weights):
    """load_state_dict, but the error names the missing and unexpected keys in its first line."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise RuntimeError(" ".join(str(error).split())) from error
    return module.eval()


def transformer_config(weights, heads, layers="encoder.layers.", mlp="mlp.fc1.weight"):
    """What the shapes of its weights tell of a transformer. The number of heads is not in them."""
    numbers = {key.split(".")[2] for key in weights if key.startswith(layers)}
    config = {
        "num_attention_heads": heads,
        "num_hidden_layers": len(numbers),
        "intermediate_size": len(weights[f"{layers}0.{mlp}"]),
        "hidden_act": "gelu",  # the default of CLIP's configuration is OpenAI's quick_gelu
    }
    patches = weights.get("embeddings.patch_embedding.weight")
    if patches is not None:  # a vision transformer
        width, _, _, patch = patches.shape
        positions = next(v.shape[-2] for k, v in weights.items() if "position_embedding" in k)
        side = round((positions - 1) ** 0.5)  # in patches; one position is the class token's
        config |= {"hidden_size": width, "patch_size": patch, "image_size": patch * side}
    return config


def clip_from_open_clip(state_dict, vision_heads, text_heads):
    """An open_clip ViT's state dict (HPSv2's layout, arXiv 2306.09341) -> transformers.CLIPModel.

    ViT-H/14 has 16 and 16 heads. The model is in fp32 and eval mode; it takes the text feature at
    the last token of the vocabulary, the end of text. KeyError or RuntimeError where weights are
    missing or left over.
    """
    from transformers import CLIPConfig, CLIPModel

    weights = select_weights(state_dict, renames=OPEN_CLIP_TO_CLIP)
    # Query, key and value are one tensor in open_clip.
    for key in [key for key in weights if ".in_proj_" in key]:
        for letter, piece in zip("qkv", weights.pop(key).chunk(3)):
            weights[key.replace("in_proj_", f"{letter}_proj.")] = piece
    # Features are projected by x @ w in open_clip, and by nn.Linear's w @ x here.
    for key in ("visual_projection.weight", "text_projection.weight"):
        weights[key] = weights[key].T.contiguous()

    # The configuration follows from the shapes, all but the heads.
    text = select_weights(weights, "text_model.")
    vision = select_weights(weights, "vision_model.")
    vocabulary, width = text["embeddings.token_embedding.weight"].shape
    text_config = transformer_config(text, text_heads) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": len(text["embeddings.position_embedding.weight"]),
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
    }
    vision_config = transformer_config(vision, vision_heads)
    size = len(weights["text_projection.weight"])
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=size)
    return load_strict(CLIPModel(config), weights)


def linear_chain(weights):
    """Linear layers without activations -> nn.Sequential: the head of both aesthetic predictors
    and of ImageReward. weights: {"0.weight", "0.bias", "2.weight", ...} or {"weight", "bias"}."""
    weights = select_weights(weights, renames=((r"^(weight|bias)$", r"0.\1"),))
    numbers = [key.removesuffix(".weight") for key in weights if re.fullmatch(r"\d+\.weight", key)]
    chain = nn.Sequential()
    for number in sorted(numbers, key=int):  # 10 comes after 2
        outputs, inputs = weights[f"{number}.weight"].shape
        chain.add_module(number, nn.Linear(inputs, outputs))
    chain.config = {}  # common.weights_hash asks for one; all there is to know is in the weights
    return load_strict(chain, weights)


# CLIP sees image and caption apart and compares two vectors. BLIP's text encoder reads the caption
# while it attends to the image in every layer, so its first token can judge how they fit.
class ImageReward(nn.Module):
    """BLIP with a head on the first token of the caption (arXiv 2304.05977)."""

    def __init__(self, vision, text, head):
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head
        self.config = text.config

    def forward(self, pixel_values, input_ids, attention_mask):
        """(N, 3, H, H), (N, L), (N, L) -> (N,) fp32."""
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        words = self.text(input_ids, attention_mask, encoder_hidden_states=image)
        reward = self.head(words.last_hidden_state[:, 0].float())[:, 0]
        # The mean and the standard deviation over the authors' training set
        return (reward - 0.16717362830052426) / 1.0333394966054072


def image_reward_from_state_dict(state_dict, vision_heads, text_heads):
    """ImageReward.pt's tensors -> module(pixel_values, input_ids, attention_mask) -> (N,) rewards.

    The released model has 16 and 12 heads. The module is in fp32 and eval mode; its rewards are
    standardised, about -2 to 2. KeyError or RuntimeError where weights are missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    # The image encoder
    image = select_weights(state_dict, "blip.visual_encoder.", BLIP_TO_TRANSFORMERS)
    config = BlipVisionConfig(**transformer_config(image, vision_heads), layer_norm_eps=1e-6)
    vision = load_strict(BlipVisionModel(config), image)

    # The text encoder, whose layers also attend to the image
    words = select_weights(state_dict, "blip.text_encoder.")
    words.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight
    vocabulary, width = words["embeddings.word_embeddings.weight"].shape
    config = transformer_config(words, text_heads, "encoder.layer.", "intermediate.dense.weight")
    config |= {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": vision.config.hidden_size,
        "max_position_embeddings": len(words["embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-12,  # BERT's; the image encoder has 1e-6
        "bos_token_id": None,
        "eos_token_id": None,
        "sep_token_id": None,
    }
    text = BlipTextModel(BlipTextConfig(**config), add_pooling_layer=False)
    head = linear_chain(select_weights(state_dict, "mlp.layers."))
    return ImageReward(vision, load_strict(text, words), head).eval()


def read_weights(path):
    """The state dict in a local file, a https address, or a hub file OWNER/REPOSITORY/FILE."""
    from huggingface_hub import hf_hub_download

    # .pt and .pth files are pickles, which could run any code: weights_only reads tensors alone.
    options = {"map_location": "cpu", "weights_only": True}
    folder, _, name = path.rpartition("/")
    if path.startswith("https:"):
        weights = torch.hub.load_state_dict_from_url(path, file_name=name, **options)
    else:
        if re.fullmatch(r"\w[^/]*/[^/]+", folder) and not Path(path).exists():
            path = hf_hub_download(folder, name)
        weights = torch.load(path, **options)
    return weights.get("state_dict", weights)


# --------------------------------------------------------------------------------- 3. scorers
# A scorer's class turns its files into score(images, prompts). All of them share the batching, the
# checks of what comes out, and the image preprocessing.
class Scorer:
    """score(images: N PIL, prompts: N texts, batch=32) -> (N,) fp32 on the CPU.

    A scorer has prepare(image), which makes what its model wants of one image and may run in a
    thread, and compute(n prepared images, n prompts) -> n numbers.
    """

    name = ""  # for messages
    unit = ""  # of the scores, for reports
    side = 224  # px, of the square images that the model sees
    mean = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, which all published scorers have
    std = (0.26862954, 0.26130258, 0.27577711)
    parts = ()  # all that the scores depend on: models, tokenizers, texts

    def __call__(self, images, prompts, batch=32):
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        values = [torch.empty(0)]
        for start in range(0, len(images), batch):
            chunk = slice(start, start + batch)
            prepared = [self.prepare(image.convert("RGB")) for image in images[chunk]]
            values.append(self.score_prepared(prepared, prompts[chunk]))
        return torch.cat(values)

    @torch.no_grad()
    def score_prepared(self, prepared, prompts):
        """One batch. InputError where the scorer fails, or gives anything but n finite numbers."""
        try:
            with exact_fp32():
                values = torch.as_tensor(self.compute(prepared, list(prompts)))
            values = values.float().cpu().flatten()
        except Exception as error:  # a judge's own, or a full GPU
            raise InputError(f"{self.name} raises {describe_error(error)}") from error
        finite = int(values.isfinite().sum())
        # Other scores than these must not reach a mean or a loss.
        if not len(prepared) == len(values) == finite:
            raise InputError(f"{self.name} gives {finite} finite values for {len(prepared)} images")
        return values

    def prepare(self, image):
        """PIL RGB -> (3, side, side). CLIP's own preprocessing: shorter side to `side` (bicubic),
        centre crop, normalised."""
        pixels, _ = common.resize_and_crop(image, self.side)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return (pixels / 2 + 0.5 - mean) / std

    def fingerprint(self):
        """A hash that changes whenever the scores may change, also with a library's version."""
        texts = [part for part in self.parts if isinstance(part, str)]
        models = [common.weights_hash(part) for part in self.parts if part not in texts]
        return hash_of([type(self).__name__, texts, models, common.library_versions()])


@contextmanager
def exact_fp32():
    """Without TF32, which common.init_distributed allows for the training."""
    # TF32 keeps 10 bits of each factor, and the two images of a pair may differ by less. Those
    # differences are what SmPO trains on.
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def hash_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Judge(Scorer):
    """PATH.py:FUNCTION(images, prompts) -> N numbers. It gets whole PIL images."""

    unit = "the judge's own unit"

    def __init__(self, name):
        self.name = f"judge {name}"
        file, _, function = name.rpartition(":")
        if not Path(file).is_file():
            raise InputError(f"{self.name}: there is no file {file}")
        # The file is run as a module of its own name; it is the user's, so running it is fine.
        spec = importlib.util.spec_from_file_location(f"judge_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"{self.name} raises {describe_error(error)}") from error
        self.compute = getattr(module, function, None)
        if not callable(self.compute):
            raise InputError(f"{self.name}: {file} has no function {function}")
        # What the file imports is not seen: after a change there, use another --cache.
        self.parts = (function, Path(file).read_text())

    def prepare(self, image):
        return image


class ClipScorer(Scorer):
    """Cosine of CLIP's image and text features (arXiv 2103.00020), times a scale."""

    unit = "cosine"
    scale = 1.0

    def __init__(self, files, device, dtype):
        from transformers import AutoTokenizer

        model = self.load_model(files)
        self.tokenizer = common.load_pretrained(AutoTokenizer, files["processor"], "tokenizer")
        require_fitting_tokenizer(self.tokenizer, model.config.text_config)
        self.side = model.config.vision_config.image_size
        self.model = model.to(device, dtype)
        self.parts = (model, self.tokenizer, f"{self.scale} {self.mean} {self.std}")

    def load_model(self, files):
        # The processor that works without torchvision; only its settings are used here
        from transformers import CLIPImageProcessorPil, CLIPModel

        model = common.load_pretrained(CLIPModel, files["model"], "CLIP model")
        place = files["processor"]
        processor = common.load_pretrained(CLIPImageProcessorPil, place, "image processor")
        side = model.config.vision_config.image_size
        # A processor of another model would feed the right number of other pixels.
        sides = {*dict(processor.size).values(), *dict(processor.crop_size).values()} - {None}
        if sides != {side}:
            text = f"{sorted(sides)} px, not the {side} px of the model"
            raise InputError(f"the image processor of {place} makes images of {text}")
        self.mean = processor.image_mean
        self.std = processor.image_std
        return model

    def compute(self, prepared, prompts):
        # Padded to the full length always, as PickScore's own code does
        words = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        pixels = torch.stack(prepared).to(self.model.device, self.model.dtype)
        out = self.model(input_ids=words.input_ids.to(pixels.device), pixel_values=pixels)
        return self.scale * F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())


def require_fitting_tokenizer(tokenizer, config):
    """InputError where a text encoder would read this tokenizer's output wrongly."""
    # Nothing fails by itself then: all texts would get some score, and a wrong one.
    # CLIP's text feature is taken at the end of text. Where there is none, it would silently be
    # taken at the first token, the same for all texts. (2 is how old configs spell "the largest
    # id".) BLIP's is taken at the first token, and its configuration has no end.
    ids = tokenizer("a photo").input_ids
    end = max(ids) if config.eos_token_id == 2 else config.eos_token_id
    problem = None
    # Known beforehand, since an id beyond the vocabulary would end the whole process on a GPU
    if tokenizer.model_max_length > config.max_position_embeddings:  # 10^30 where it has none
        problem = f"has no length, or more than {config.max_position_embeddings} tokens"
    elif len(tokenizer) > config.vocab_size:
        problem = f"has {len(tokenizer)} words, the model {config.vocab_size}"
    elif end is not None and (end not in ids or tokenizer.eos_token_id != end):
        problem = f"ends a text with {tokenizer.eos_token_id}, the model expects {end}"
    if problem:
        raise InputError(f"the tokenizer does not fit the model: it {problem}")


class PickScorer(ClipScorer):
    """PickScore (arXiv 2305.01569), and any reward model in its layout. Always in fp32: the
    differences of its scores are what SmPO trains on."""

    unit = "exp(logit_scale) * cosine"  # about 20 for PickScore_v1

    def __init__(self, files, device, dtype):
        super().__init__(files, device, torch.float32)

    def load_model(self, files):
        model = super().load_model(files)
        self.scale = model.logit_scale.exp().item()
        return model


class HpsScorer(ClipScorer):
    """HPSv2 (arXiv 2306.09341)."""

    unit = "100 * cosine"
    scale = 100.0

    def load_model(self, files):
        weights = read_weights(files["weights"])
        heads = head_counts(len(weights["visual.ln_pre.bias"]), len(weights["ln_final.bias"]))
        return clip_from_open_clip(weights, *heads)

    def prepare(self, image):
        return super().prepare(hps_square(image, self.side))


def hps_square(image, side):
    """HPSv2's preprocessing up to the normalisation: longer side to `side` (bicubic), black bars
    to a square, nothing cropped."""
    size = [max(1, round(length * side / max(image.size))) for length in image.size]
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    left = (side - small.width) // 2
    top = (side - small.height) // 2
    square.paste(small, (left, top))
    return square


def head_counts(*widths):
    """Attention heads of published models: 64 channels each, but 80 in ViT-H's image encoder."""
    return [16 if width == 1280 else max(1, width // 64) for width in widths]


class AestheticScorer(Scorer):
    """LAION's aesthetic predictors: linear layers on CLIP's normalised image feature. The prompt
    has no say."""

    unit = "about 1 to 10"

    def __init__(self, files, device, dtype):
        from transformers import CLIPModel

        weights = select_weights(read_weights(files["weights"]), renames=((r"^layers\.", ""),))
        self.head = linear_chain(weights).to(device)  # stays in fp32
        clip = common.load_pretrained(CLIPModel, files["clip"], "CLIP model")
        self.clip = clip.to(device, dtype)
        self.side = clip.config.vision_config.image_size
        self.parts = (clip, self.head)

    def compute(self, prepared, prompts):
        pixels = torch.stack(prepared).to(self.clip.device, self.clip.dtype)
        features = self.clip.get_image_features(pixels).pooler_output.float()
        return self.head(F.normalize(features, dim=-1))[:, 0]


class ImageRewardScorer(Scorer):
    """ImageReward (arXiv 2304.05977)."""

    unit = "about -2 to 2"

    def __init__(self, files, device, dtype):
        from transformers import AutoTokenizer

        weights = read_weights(files["weights"])
        image_width = weights["blip.visual_encoder.cls_token"].shape[-1]
        heads = head_counts(image_width, weights["mlp.layers.0.weight"].shape[-1])
        self.model = image_reward_from_state_dict(weights, *heads).to(device)
        self.model.vision.to(dtype)
        self.model.text.to(dtype)  # the head stays in fp32
        self.side = self.model.vision.config.image_size
        self.tokenizer = common.load_pretrained(AutoTokenizer, files["tokenizer"], "tokenizer")
        # BLIP adds two words to BERT's. Texts still begin with [CLS]: so the authors' code does.
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        self.tokenizer.model_max_length = 35  # as in the authors' training
        require_fitting_tokenizer(self.tokenizer, self.model.config)
        self.parts = (self.model, self.tokenizer)

    def compute(self, prepared, prompts):
        words = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        words = words.to(self.model.text.device)
        pixels = torch.stack(prepared).to(words.input_ids.device, self.model.vision.dtype)
        return self.model(pixels, words.input_ids, words.attention_mask)


# Where the published weights are: hub repositories, files OWNER/REPOSITORY/FILE, addresses. Nothing
# is downloaded before it is used.
PICKSCORE = "yuvalkirstain/PickScore_v1"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"
GITHUB = "https://raw.githubusercontent.com"
AESTHETIC_V1 = f"{GITHUB}/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"
AESTHETIC_V2 = f"{GITHUB}/christophschuhmann/improved-aesthetic-predictor/main"
AESTHETIC_V2 += "/sac+logos+ava1-l14-linearMSE.pth"
HPS_V20 = "xswu/HPSv2/HPS_v2_compressed.pt"
HPS_V21 = "xswu/HPSv2/HPS_v2.1_compressed.pt"
IMAGE_REWARD = "THUDM/ImageReward/ImageReward.pt"
# {name: (class, {part: hub repository, hub file or address})}. The first part is the one that
# NAME=PATH replaces.
SCORERS = {
    "pickscore": (PickScorer, {"model": PICKSCORE, "processor": VIT_H}),
    "clip": (ClipScorer, {"model": VIT_H, "processor": VIT_H}),
    "hpsv2.0": (HpsScorer, {"weights": HPS_V20, "processor": VIT_H}),
    "hpsv2.1": (HpsScorer, {"weights": HPS_V21, "processor": VIT_H}),
    "aesthetic.v1": (AestheticScorer, {"weights": AESTHETIC_V1, "clip": VIT_L}),
    "aesthetic.v2": (AestheticScorer, {"weights": AESTHETIC_V2, "clip": VIT_L}),
    "imagereward": (ImageRewardScorer, {"weights": IMAGE_REWARD, "tokenizer": "bert-base-uncased"}),
}


def short_name(name):
    """A judge PATH.py:FUNCTION is called FUNCTION in reports."""
    return name.rpartition(":")[2]


def scorer_files(name, path=None):
    """{part: where it is} of a published scorer.

    path: None for the published places; another place for the first part; a folder that holds all
    parts (weights under their published name); or a dict of parts. InputError for other parts.
    """
    files = dict(SCORERS[name][1])
    first = next(iter(files))
    given = {first: path} if path else {}
    if isinstance(path, dict):
        given = dict(path)
    unknown = ", ".join(set(given) - set(files))
    if unknown:
        raise InputError(f"scorer {name} has no part {unknown}, only {', '.join(files)}")
    # A folder has everything: nothing is taken from the hub then.
    if first in given and Path(given[first]).is_dir():
        folder = Path(given.pop(first))
        for part, published in files.items():
            file = folder / published.rpartition("/")[2]
            files[part] = file if part == "weights" else folder
    return {part: displayed(place) for part, place in (files | given).items()}


def displayed(path):
    """A path as a report shows it: relative where it is inside of the working folder."""
    inside = Path(path).is_relative_to(os.getcwd())
    return os.path.relpath(path) if inside else str(path)


def load_scorer(name, path=None, device=None, dtype=None):
    """A scorer by its name in SCORERS, or the judge PATH.py:FUNCTION -> Scorer.

    path: see scorer_files. device: by default the GPU if there is one. dtype: by default fp16 on a
    GPU and fp32 on the CPU, except for pickscore, which is always in fp32. InputError names what is
    unknown, cannot be loaded, or does not work.
    """
    if ".py:" in name:
        return Judge(name)
    if name not in SCORERS:
        raise InputError(f"unknown scorer {name}; known: {', '.join(SCORERS)}, PATH.py:FUNCTION")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    files = scorer_files(name, path)
    return open_scorer(SCORERS[name][0], f"scorer {name}", files, device, dtype)


def load_reward(path, processor=None, device="cpu"):
    """A reward model in PickScore's layout (folder or hub id) -> Scorer, always in fp32.

    processor: where its tokenizer and image settings are, if elsewhere. InputError if it cannot be
    loaded, weights are missing, or its parts do not fit together.
    """
    files = {"model": path, "processor": processor or (VIT_H if path == PICKSCORE else path)}
    return open_scorer(PickScorer, f"reward {path}", files, device, torch.float32)


def open_scorer(kind, name, files, device, dtype):
    """Load a scorer and score one blank image: what does not fit shows now, not hours later."""
    try:
        score = kind(files, device, dtype)
        score.name = name
        score([Image.new("RGB", (64, 48))], ["a photo"])
    except Exception as error:  # pickle, safetensors and the hub raise their own
        reason = str(error) if isinstance(error, InputError) else describe_error(error)
        places = ", ".join(dict.fromkeys(map(str, files.values())))
        raise InputError(f"{name} ({places}) cannot be used: {reason}") from error
    return score


# ------------------------------------------------------------------- 4. scores of pair sets
# What smpo.py and dro.py need of a reward model is one number for each image of each pair. These
# are computed once, before the training, for every row of the set, and kept in two places: in
# --cache, under the content of each (image, caption) item, and beside the run, by row.
#
#     scores["score_0"][r]   the reward of image 0 of row r; NaN where it does not decode
#     scores["key_0"][r]     its item's key, by which a later run can tell that it is the same image
@dataclass
class RewardConfig(common.TrainConfig):
    """Training's options with those of the methods that ask a reward model: see `pair_scores`."""

    reward: str = option(PICKSCORE, "reward model in PickScore's layout: folder or hub id")
    reward_processor: str | None = option(None, "its tokenizer and image settings, if elsewhere")
    scores: str | None = option(None, "scores file instead of --reward: eval.py --scores_out")


def pair_scores(cfg, table, dist_info):
    """The scores of a run's pair set, as `score_pairs` returns them: from --scores; on --resume
    from the run's own folder; else by --reward, every row, ties too.

    Whether they belong to the rows is for common.RowTable.check_scores to tell.
    """
    kept = Path(cfg.out) / "scores.safetensors"
    if cfg.scores:
        return load_scores(cfg.scores)
    # A run keeps the scores that it began with, even if the reward model has changed since.
    if cfg.resume and kept.exists():
        return load_scores(kept)
    score = load_reward(cfg.reward, cfg.reward_processor, dist_info.device)
    return score_pairs(table, score, cfg.cache, f"scores by {cfg.reward}", dist_info)


def keep_scores(cfg, scores, table, dist_info):
    """Keep a run's scores beside it, once its folder is taken: a resume reads them, and another
    run can be given them with --scores."""
    file = Path(cfg.out) / "scores.safetensors"
    if dist_info.is_main and not cfg.scores and not file.exists():
        write_scores(file, scores, cfg.reward, PickScorer.unit, table.source.path)
    common.barrier()


def score_pairs(table, score, cache, title, dist_info):
    """Score both images of every row of a pair set. The ranks share the work.

    table: common.RowTable with R rows; score: Scorer; cache: folder that keeps each score under the
    content of its (image, caption) item.

    Returns {"score_0", "score_1": (R,) fp32, NaN where an image does not decode; "key_0", "key_1":
    (R,) int64, equal where image and caption are}.
    """

    # An item is scored once, wherever it stands. A killed scoring goes on, and of a changed set
    # only what changed is scored.
    def prepare(item):
        # In a thread, which lets go of the decoded image: only what the model needs of it waits.
        image_bytes, caption = item
        image = common.decode_image(image_bytes)
        return None if image is None else (score.prepare(image), caption)

    def compute(batch):  # always of one size: see common.fill_store
        images, captions = zip(*batch)
        return {"score": score.score_prepared(list(images), captions)}

    # Scores of another model, or by other libraries, lie in another folder.
    name = common.broadcast_from_main(score.fingerprint() if dist_info.is_main else None)
    store = common.TensorStore(Path(cache) / f"scores-{name}")
    # Once, unless a file of the store turns out to be damaged
    for rows in common.rounds(lambda: rows_without_score(table, store), table.source.path):
        mine = table.my_rows(rows)
        items = items_to_score(table, mine)
        common.fill_store(store, items, prepare, compute, title, 2 * len(mine), dist_info)
        table.share_image_keys()
    return read_scores(table, store)


def rows_without_score(table, store):
    """Sorted numbers of the rows with an image that was not read yet or has no score."""
    # A row is known if each of its images was read, and then was scored or does not decode.
    keys = table.item_keys().numpy()
    scored = store.find(keys.ravel()).reshape(keys.shape) >= 0
    known = scored | np.isin(keys, store.undecodable)
    known &= table.image_keys.numpy() != 0
    return (~known.all(1)).nonzero()[0]


def items_to_score(table, rows):
    """The (key, (image bytes, caption)) of all images. Notes their keys in the table."""
    for number, row in table.source.rows(("caption", *common.PAIR_COLUMNS), rows):
        for side, column in enumerate(common.PAIR_COLUMNS):
            image_key = common.image_key(row[column])
            table.image_keys[number, side] = image_key
            key = common.item_key(image_key, common.caption_key(row["caption"]))
            yield key, (row[column], row["caption"])


def read_scores(table, store):
    """What `score_pairs` returns, from a store that has every item."""
    keys = table.item_keys().numpy()
    values = np.full(keys.shape, np.nan, np.float32)  # NaN stays where an image does not decode
    decodable = ~np.isin(keys, store.undecodable)
    if decodable.any():
        values[decodable] = store.read(keys[decodable])["score"].numpy()
    scores = {}
    for side in (0, 1):
        scores[f"score_{side}"] = torch.tensor(values[:, side])
        scores[f"key_{side}"] = torch.tensor(keys[:, side])
    return scores


def write_scores(path, scores, scorer, unit, data):
    """Write a scores file. Its metadata says who scored which set, and in which unit."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with common.atomic(path) as temporary:
        save_file(scores, temporary, {"scorer": scorer, "unit": unit, "data": str(data)})


def load_scores(path):
    """A scores file -> what `score_pairs` returned. InputError if it is none."""
    # Another program may have made it, so nothing about it is taken for granted.
    with common.as_input_error(f"--scores {path} is no scores file"):
        if not Path(path).is_file():
            raise ValueError("it does not exist, or is no regular file")
        names = ("score_0", "score_1", "key_0", "key_1")
        with safe_open(path, "pt") as file:
            scores = {name: file.get_tensor(name) for name in names}
        for name, tensor in scores.items():
            dtype = torch.int64 if name.startswith("key") else torch.float32
            if tensor.dtype != dtype or tensor.shape != (len(scores["score_0"]),):
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}")
    if not (scores["score_0"].isfinite() | scores["score_1"].isfinite()).any():
        raise InputError(f"--scores {path}: not one score is finite")
    return scores


# ---------------------------------------------------------------------------------- 5. images
# Drawing is what an evaluation costs. So images are files under a name that follows from all they
# depend on (weights, prompts, settings, libraries): what is there is never drawn again, and nothing
# that is there can be out of date.
#
# Latents are not confined to [-1, 1]: they are never clipped, whatever a scheduler's config says.
SCHEDULERS = {
    # deterministic; adds noise at every step; a second-order solver that needs about 20 steps
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
LORA_FILE = "pytorch_lora_weights.safetensors"


def open_pipeline(cfg):
    """The stock pipeline of --model with the scheduler to sample with, in --precision, on the
    CPU."""
    import diffusers

    pipe = common.load_pipeline(cfg.model, cfg.variant, cfg.revision, cfg.vae)
    check_sampling_steps("--steps", cfg.steps, pipe.scheduler.config)
    kind, settings = SCHEDULERS[cfg.scheduler]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    return pipe.to(common.DTYPES[cfg.precision])


def check_sampling_steps(name, steps, scheduler_config):
    """A scheduler has no more steps than the timesteps that the model was trained with."""
    limit = scheduler_config.get("num_train_timesteps", 1000)
    if steps > limit:
        raise InputError(f"{name} must be at most the scheduler's {limit}, it is {steps}")


def latent_size(pipe):
    """(height, width) of the latents."""
    size = pipe.unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def load_comparison_unet(pipe, path):
    """The UNet that stands in for the pipeline's own, in its dtype; path None: the pipeline's own.

    path: a run's folder, its unet/ or lora/, or a hub repository. InputError if it cannot be
    loaded, or its sizes differ.
    """
    own = pipe.unet
    if path is None:
        return own
    folders = [Path(path), Path(path) / "lora"]
    lora = next((folder for folder in folders if (folder / LORA_FILE).is_file()), None)
    # A whole UNet
    if lora is None:
        return common.load_unet(path, own).to(own.dtype)
    # A LoRA is merged into a copy of the UNet that it was trained on: the pipeline's, or the run's
    # --unet. diffusers merges into the pipeline that it is given, so that has the copy for as long;
    # in fp32, where a small update is not lost.
    start = (common.read_run_config(lora.parent) or {}).get("unet")
    pipe.unet = common.load_unet(start, own) if start else copy.deepcopy(own).float()
    try:
        pipe.load_lora_weights(lora, weight_name=LORA_FILE)
        require_whole_lora(pipe.unet, lora / LORA_FILE)
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
        return pipe.unet.to(own.dtype)
    except Exception as error:  # the package peft is missing, or sizes differ
        reason = describe_error(error)
        raise InputError(f"--unet {path}: its LoRA cannot be loaded: {reason}") from error
    finally:
        pipe.unet = own


def require_whole_lora(unet, file):
    """ValueError where diffusers took only a part of a LoRA: it passes over layers that the UNet or
    the file lacks, and this code compares UNets, not text encoders."""
    matrices = [value for value in load_file(file).values() if value.ndim > 1]  # no alphas
    finite = sum(bool(value.isfinite().all()) for value in matrices)
    taken = sum(".lora_" in name for name, _ in unet.named_parameters())
    if not len(matrices) == finite == taken:
        text = f"{len(matrices)} matrices, {finite} of them finite, and the UNet takes {taken}"
        raise ValueError(f"the file has {text}")


def image_settings(cfg, dist_info):
    """The batch size is one of them: the last bits of a kernel's result depend on it."""
    names = ("images_per_prompt", "seed", "steps", "cfg", "micro_batch", "scheduler", "precision")
    return {name: getattr(cfg, name) for name in names} | {"device": dist_info.device.type}


def hash_images(pipe, cfg, unets, prompts, dist_info):
    """{name: hash of all that its images depend on}. On the way, each UNet is loaded, so that one
    that does not fit is refused before anything is drawn. Loading takes seconds, drawing hours."""
    # What all models share: settings, prompts, libraries, and the pipeline but for its UNet
    about = [image_settings(cfg, dist_info), prompts, common.library_versions()]
    if dist_info.is_main:  # the main process alone hashes: about 2 s for SD1.5
        about.append(common.weights_hash(pipe, without=("unet",)))
    hashes = {}
    for name, path in unets.items():
        unet = load_comparison_unet(pipe, path)
        value = hash_of([*about, common.weights_hash(unet)]) if dist_info.is_main else None
        hashes[name] = common.broadcast_from_main(value)
    return hashes


def draw_images(pipe, unet_path, prompts, folder, cfg, dist_info, title):
    """Draw the images that a folder lacks; returns all of its files, (P prompts)(N images)."""
    # A batch is drawn completely or not at all: the last bits of an image depend on those it was
    # drawn with, and a restart should not change a bit of it.
    numbers = range(cfg.images_per_prompt)
    files = [[folder / f"{i:05d}_{j}.png" for j in numbers] for i in range(len(prompts))]
    batches = my_batches(files, cfg, dist_info)
    missing = [batch for batch in batches if not all(files[i][j].exists() for i, j in batch)]
    # The UNet is loaded, and the pipeline brought to the GPU, only where there is something to do.
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        own = pipe.unet
        pipe.unet = load_comparison_unet(pipe, unet_path)
        pipe.to(dist_info.device)
        for batch in tqdm(missing, title, unit="batch", disable=not dist_info.is_main):
            images = sample(pipe, [prompts[i] for i, _ in batch], batch, cfg)
            for (i, j), image in zip(batch, images):
                with common.atomic(files[i][j]) as temporary:
                    # Fast compression: a tenth larger, three times faster
                    image.save(temporary, "PNG", compress_level=1)
        pipe.unet = own
    common.barrier()
    return files


def my_batches(files, cfg, dist_info):
    """This rank's batches of a table of images (P prompts)(N images): lists of (number of the
    prompt, number of its image)."""
    # The ranks take batches in turn, so a batch has the same images on 1 GPU and on 8, and what is
    # computed from it the same bits.
    jobs = list(product(range(len(files)), range(len(files[0]))))
    starts = range(0, len(jobs), cfg.micro_batch)[dist_info.rank :: dist_info.world_size]
    return [jobs[start : start + cfg.micro_batch] for start in starts]


def sample(pipe, texts, jobs, cfg):
    """The images of a batch, as PIL. jobs: (number of the prompt, number of its image)."""
    shape = (1, pipe.unet.config.in_channels, *latent_size(pipe))
    # Each image has a generator of its own: for its initial noise, then for the noise that DDPM
    # adds at every step. Drawn on the CPU, it is the same on every GPU.
    generators = [common.generator(cfg.seed, "image", i, j) for i, j in jobs]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(pipe.unet.dtype)
    settings = {"num_inference_steps": cfg.steps, "guidance_scale": cfg.cfg}
    return pipe(texts, latents=latents, generator=generators, **settings).images


def read_images(folder, prompts):
    """The image files of a folder, (P prompts)(N images), in the order of the numbers in their
    names: one number (0, 1, 2, ...; N images of the first prompt come first) or two (prompt and
    image: 00012_3.png). InputError where one is missing, which would shift all that follow."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    files = [file for file in Path(folder).glob("*") if file.suffix.lower() in suffixes]
    many, rest = divmod(len(files), len(prompts))
    if rest or not many:
        text = f"{len(files)} images do not divide among {len(prompts)} prompts"
        raise InputError(f"--images {folder}: {text}")
    numbers = {file: tuple(map(int, re.findall(r"\d+", file.stem))) for file in files}
    different = set(numbers.values())
    # A number that is the same in all names, as in sd15_0001.png, counts nothing. The others run
    # from 0 or 1, so that many different names fill the ranges exactly where none is missing.
    varying = [set(column) for column in zip(*different) if len(set(column)) > 1]
    counts = [1 + max(column) - min(1, *column) for column in varying]
    other_prompts = len(counts) > 1 and counts[0] != len(prompts)
    if not len(files) == len(different) == math.prod(counts) or other_prompts:
        text = "the numbers in the names have gaps, are there twice, or do not fit the prompts"
        raise InputError(f"--images {folder}: {text}")
    files.sort(key=numbers.get)
    return [files[start : start + many] for start in range(0, len(files), many)]


# ------------------------------------------------------------------------------ 6. comparison
# The order of an evaluation: load and try every scorer; load and hash every UNet; draw; score;
# write. What can fail does so in the first minute, not after the hours of drawing.
def usable_scorers(cfg, wanted, image, prompt, dist_info):
    """Load each scorer and try it on one image, before anything is drawn.

    Returns (wanted without those that fail, {name: why it fails}): a published scorer whose files
    are not there is left out of the report, and named in it. It is an error where a judge or the
    scorer of --median_by fails, or none is left.
    """
    # Loading a scorer twice costs seconds; a missing file after a night of drawing costs the night.
    left_out = {}
    for name, path in wanted.items():
        problem = None
        try:
            load_scorer(name, path, dist_info.device)([image, image], [prompt, prompt])
        except InputError as error:
            problem = str(error)
        problem = next(filter(None, common.all_gather_objects(problem)), None)
        if problem:  # one rank's trouble is everybody's
            left_out[name] = problem
    needed = [name for name in left_out if name not in SCORERS or name == cfg.median_by]
    if needed or (wanted and len(left_out) == len(wanted)):
        raise InputError("; ".join(left_out.values()))
    return {name: path for name, path in wanted.items() if name not in left_out}, left_out


def compare_unets(cfg, unets, prompts, wanted):
    """Draw the same prompts with several UNets of one pipeline, and compare. Every rank calls it.

    cfg: Config; unets: {name: place of the UNet (see load_comparison_unet), None for the pipeline's
    own}; wanted: {scorer or judge: see scorer_files}. Images are kept in images/HASH under --cache
    (by default --out). Returns what scores.json holds.
    """
    # Everything is loaded and tried once before the hours of drawing begin.
    dist_info = common.init_distributed()
    pipe = open_pipeline(cfg)
    height, width = (side * pipe.vae_scale_factor for side in latent_size(pipe))
    blank = Image.new("RGB", (width, height))
    usable, left_out = usable_scorers(cfg, wanted, blank, prompts[0], dist_info)
    hashes = hash_images(pipe, cfg, unets, prompts, dist_info)

    # Draw, with one UNet after the other.
    files = {}
    for name, path in unets.items():
        folder = Path(cfg.cache) / "images" / hashes[name]
        files[name] = draw_images(pipe, path, prompts, folder, cfg, dist_info, name)
    del pipe  # the scorers need the memory

    # Score and report.
    settings = image_settings(cfg, dist_info) | {
        "model": displayed(cfg.model),
        "variant": cfg.variant,
        "revision": cfg.revision,
        "vae": cfg.vae,
        "unets": {name: path and displayed(path) for name, path in unets.items()},
        "images": hashes,
    }
    return compare_images(cfg, files, prompts, usable, left_out, settings)


def compare_images(cfg, files, prompts, wanted, left_out, settings):
    """Score images and write the report to --out. Every rank calls it.

    files: {model: image files (P)(N), paired across the models}. Returns what scores.json holds.
    """
    dist_info = common.init_distributed()

    # One scorer after the other: a GPU may not hold two.
    about = {}
    scores = {}
    for name, path in wanted.items():
        score = load_scorer(name, path, dist_info.device)
        short = short_name(name)
        places = scorer_files(name, path) if name in SCORERS else {"judge": displayed(name)}
        about[short] = {"unit": score.unit} | places
        scores[short] = {}
        for model, table in files.items():
            values = score_files(score, table, prompts, cfg, dist_info, f"{short}, {model}")
            scores[short][model] = values

    # "scores" has every score, the statistics only those that count.
    counted = keep_median(scores, cfg.median_by) if cfg.median_by else scores
    result = {
        "settings": settings | {"prompt_count": len(prompts), "median_by": cfg.median_by},
        "versions": common.versions(),
        "scorers": about,
        "left_out": left_out,
        "summary": {name: summarise(table) for name, table in counted.items()},
        "win_rates": {name: all_win_rates(table) for name, table in counted.items()},
        "prompts": prompts,
        "scores": scores,
    }
    if dist_info.is_main:
        write_report(Path(cfg.out), result, files)
    common.barrier()
    return result


def score_files(score, files, prompts, cfg, dist_info, title):
    """Scores (P)(N) of image files (P)(N). The ranks share the work."""
    batches = my_batches(files, cfg, dist_info)
    # Threads decode and prepare the next images while the model scores these.
    to_load = ((None, files[i][j]) for batch in batches for i, j in batch)
    prepared = common.prefetch(to_load, lambda file: score.prepare(open_image(file)), workers=4)
    values = {}
    for batch in tqdm(batches, title, unit="batch", disable=not dist_info.is_main):
        images = [next(prepared)[1] for _ in batch]
        texts = [prompts[i] for i, _ in batch]
        values |= zip(batch, score.score_prepared(images, texts).tolist())
    for others in common.all_gather_objects(values):
        values |= others
    in_order = [values[job] for job in sorted(values)]
    return np.reshape(in_order, (len(prompts), -1)).tolist()


def open_image(file):
    """An image file as PIL RGB. InputError if it does not decode."""
    image = common.decode_image(file.read_bytes())
    if image is None:
        raise InputError(f"{file} does not decode as an image")
    return image


def keep_median(scores, median_by):
    """For each prompt and model, keep only the image of median score by one scorer (the lower one
    of an even number): arXiv 2510.18353's rule. (P, N) tables become (P, 1)."""
    # One scorer chooses, and all scorers rate its choice. E.g. PickScores .1, .9, .4 of a prompt's
    # three images: the third stands for the model, also in the table of aesthetic scores.
    kept = {name: {} for name in scores}
    for model, values in scores[median_by].items():
        order = np.argsort(values, axis=1, kind="stable")
        median = order[:, [(order.shape[1] - 1) // 2]]  # (P, 1): which image
        for name, table in scores.items():
            kept[name][model] = np.take_along_axis(np.array(table[model]), median, axis=1)
    return kept


def summarise(table):
    """{model: (P, N) scores} -> {model: mean, standard error of the mean over prompts, median}."""
    summary = {}
    for model, values in table.items():
        by_prompt = np.mean(values, axis=1)  # images of one prompt are not independent
        deviation = by_prompt.std(ddof=min(1, len(by_prompt) - 1))
        summary[model] = {
            "mean": np.mean(values),
            "standard_error": deviation / len(by_prompt) ** 0.5,
            "median": np.median(values),
        }
    return summary


def all_win_rates(table):
    """{model: (P, N) scores} -> {a: {b: win_rate of a over b}}."""
    return {a: {b: win_rate(table[a], table[b]) for b in table if b != a} for a in table}


def write_report(out, result, files):
    """scores.md, samples.png, winrate.png, then scores.json: where that stands, all is there."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(result)
    common.write_text(out / "scores.md", table)
    save_picture(draw_samples(files, result["prompts"], result["scores"]), out / "samples.png")
    # A win rate for each scorer and pair of models
    rows = []
    for name, rates in result["win_rates"].items():
        for a, b in combinations(rates, 2):
            rows.append((f"{name}: {b} over {a}", rates[b][a]))
    if rows:
        save_picture(draw_win_rates(rows, result["prompts"]), out / "winrate.png")
    common.write_text(out / "scores.json", json.dumps(result, indent=1) + "\n")
    print(f"\n{table}\nwrote {out}/scores.json, scores.md and the pictures", flush=True)


def markdown(result):
    """The report as a Markdown table, then what its numbers are and how they were made."""
    # The means, then the win rates over each model further up
    lines = ["| scorer | model | mean ± s.e. | median | win rate (95 %) | ties |"]
    lines.append("|---|---|---|---|---|---|")
    for scorer, summary in result["summary"].items():
        above = []
        for model, s in summary.items():
            numbers = f"{s['mean']:.4f} ± {s['standard_error']:.4f} | {s['median']:.4f}"
            lines.append(f"| {scorer} | {model} | {numbers} | | |")
            for other in above:
                rate = result["win_rates"][scorer][model][other]
                numbers = f"{in_percent(rate)} | {rate['tie']:.1%}"
                lines.append(f"| {scorer} | {model} over {other} | | | {numbers} |")
            above.append(model)
    lines.append("")
    # A line for each scorer, for each that is missing, and one for the settings
    for scorer, about in result["scorers"].items():
        lines.append(f"- {scorer}: {', '.join(dict.fromkeys(about.values()))}")
    lines += [f"- left out: {problem}" for problem in result["left_out"].values()]
    settings = {"commit": result["versions"]["commit"]} | result["settings"]
    given = [f"{k} {v}" for k, v in settings.items() if not isinstance(v, dict | None)]
    return "\n".join([*lines, f"- {', '.join(given)}", ""])


def in_percent(rate):
    return f"{rate['win']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


# -------------------------------------------------------------------------------- 7. pictures
# With Pillow alone: a plotting library would be one more dependency for three simple pictures.
GREEN = "#1a7f37"
RED = "#c93c37"
GREY = "#6e7781"


def save_picture(picture, path):
    with common.atomic(path) as temporary:
        picture.save(temporary, "PNG")


def write(draw, xy, text, size=15, width=None, anchor="la", colour="black"):
    """Text on a picture, cut to `width` px. anchor: Pillow's, e.g. "mm" for the middle."""
    while width and draw.textlength(text, font_size=size) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…"
    draw.text(xy, text, colour, anchor=anchor, font_size=size)


def draw_samples(files, prompts, scores, rows=5):
    """A sheet of images: a column for each model, the same noise in a row, the caption below. As
    many such blocks as fit stand side by side.

    files: {model: image files (P)(N)}; scores: {scorer: {model: (P)(N)}}, the first's are shown.
    """
    scorer = next(iter(scores), None)
    # The size of an image on the sheet
    width, height = Image.open(next(iter(files.values()))[0][0]).size
    scale = 256 / max(width, height)
    resample = Image.Resampling.LANCZOS
    if max(width, height) <= 160:  # the pixels of small images stay whole
        scale = 160 // max(width, height)
        resample = Image.Resampling.NEAREST
    w = round(width * scale)
    h = round(height * scale)
    # A block has an image of each model; `across` blocks stand side by side.
    block = (w + 6) * len(files) + 18
    line = h + 54
    across = max(1, min(1200 // block, math.ceil(len(prompts) / rows)))
    shown = prompts[: across * rows]
    down = math.ceil(len(shown) / across)
    sheet = Image.new("RGB", (across * block + 6, 50 + down * line), "white")
    draw = ImageDraw.Draw(sheet)
    for k, prompt in enumerate(shown):
        # Caption, images of all models, and their scores; the models' names once, on top
        x = k % across * block + 12
        y = k // across * line + 30
        below = y + h
        write(draw, (x, below + 20), prompt, 15, block - 18)
        for model, table in files.items():
            image = Image.open(table[k][0]).convert("RGB").resize((w, h), resample)
            sheet.paste(image, (x, y))
            middle = x + w / 2
            if k < across:
                write(draw, (middle, 15), model, 16, w, "mm")
            if scorer:
                value = scores[scorer][model][k][0]
                write(draw, (middle, below + 3), f"{value:.3g}", 13, w, "ma")
            x += w + 6
    if scorer:
        write(draw, (12, sheet.height - 24), f"Below each image: {scorer}, higher is better.", 14)
    return sheet


def draw_win_rates(rows, prompts):
    """A line for each (title, what win_rate returns): the win rate as a dot, its 95 % interval as
    a bar, against 50 %. prompts: what the bootstrap resampled."""
    left = 340  # px, where 0 % is
    scale = 500  # px, from 0 to 100 %
    bottom = 50 + 34 * len(rows)
    picture = Image.new("RGB", (1110, bottom + 60), "white")
    draw = ImageDraw.Draw(picture)
    # The axis, with a black line at 50 %
    for percent in range(0, 101, 25):
        x = left + scale * percent / 100
        draw.line((x, 40, x, bottom), "black" if percent == 50 else "#d8d8d8", 2)
        write(draw, (x, 26), f"{percent} %", anchor="mm")
    # A line for each comparison
    for i, (title, rate) in enumerate(rows):
        y = 67 + 34 * i
        low, win, high = (left + scale * rate[name] for name in ("low", "win", "high"))
        colour = GREEN if rate["low"] > 0.5 else RED if rate["high"] < 0.5 else GREY
        draw.line((low, y, high, y), colour, 5)
        draw.ellipse((win - 7, y - 7, win + 7, y + 7), colour)
        write(draw, (left - 20, y), title, 16, left - 30, "rm")
        write(draw, (860, y), f"{in_percent(rate)}, ties {rate['tie']:.1%}", anchor="lm")
    note = f"Win rate, a tie counts half; 95 % bootstrap interval over {len(prompts)} prompts. "
    note += "Green: significantly better, red: worse, grey: no significant difference."
    write(draw, (20, bottom + 24), note)
    return picture


# The panels of curves.png, as far as the log has the values.
PANELS = ("loss", "accuracy", "active", "margin", "gap", "err_winner", "err_expert")
PANELS += ("err_loser", "err_policy", "grad_norm")
# Where a healthy run's values lie, as far as that is the same for all methods: means over 20 steps
# in the tiny world. (The loss is DPO's and SmPO's. DRO's and SFT's lie far below, outside of their
# panels.) README, "Is my run healthy?", has what else is known.
HEALTHY = {
    "loss": (0.45, 0.83),
    "accuracy": (0.49, 0.79),
    "active": (0.83, 0.92),
    "margin": (0, math.inf),
}


def draw_curves(out):
    """curves.png from log.jsonl: each value as logged and its moving average, over a shaded range
    where a healthy one is known. Nothing where there is no log."""
    log = Path(out) / "log.jsonl"
    if not log.exists():
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    # null stands where a value was infinite: fp16's scaler finds its range by such steps.
    table = {name: np.array([line.get(name) for line in lines], dtype=float) for name in PANELS}
    names = [name for name in PANELS if np.isfinite(table[name]).any()]
    if not names:
        return
    down = math.ceil(len(names) / 3)
    picture = Image.new("RGB", (1160, 40 + 250 * down), "white")
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        left = 70 + 380 * (k % 3)
        top = 40 + 250 * (k // 3)
        known = np.isfinite(table[name])
        frame = (left, top, left + 300, top + 175)
        draw_curve(draw, frame, name, steps[known], table[name][known])
    note = "Light: as logged. Dark: moving average, and its last value. Green: a healthy range."
    write(draw, (20, picture.height - 28), note, 14)
    save_picture(picture, Path(out) / "curves.png")


def draw_curve(draw, frame, name, steps, values):
    """A panel: values over steps, in the frame (left, top, right, bottom) px."""
    left, top, right, bottom = frame
    # Moving average over the last tenth of the steps, fewer at the beginning
    window = max(1, len(values) // 10)
    smooth = np.convolve(values, np.ones(window))[: len(values)]
    smooth /= np.minimum(np.arange(len(values)) + 1, window)
    # A few outliers would flatten everything else: they are cut off at the frame.
    low, high = np.quantile(values, [0.01, 0.99])
    pad = max(0.1 * (high - low), 0.01 * abs(high), 1e-6)
    low = max(low - pad, min(values.min(), 0))  # no negative norms
    high += pad

    def y_of(value):
        return np.interp(value, (low, high), (bottom, top))

    # From back to front: healthy range, frame, curves, then the text around
    x = np.interp(steps, (0, max(1, steps[-1])), (left, right))
    if name in HEALTHY:
        smallest, largest = HEALTHY[name]
        draw.rectangle((left, y_of(largest), right, y_of(smallest)), "#e3f3e6")
    draw.rectangle(frame, outline="#b0b0b0")
    draw.line(list(zip(x, y_of(values))), "#a8c7ee", 1)
    draw.line(list(zip(x, y_of(smooth))), "#1f5fb4", 3)
    write(draw, (left, top - 22), f"{name} {smooth[-1]:.4g}")
    for value in (low, high):
        write(draw, (left - 6, y_of(value)), f"{value:.3g}", 13, anchor="rm", colour=GREY)
    write(draw, (left, bottom + 6), "step 0", 13, colour=GREY)
    write(draw, (right, bottom + 6), str(steps[-1]), 13, anchor="ra", colour=GREY)


# -------------------------------------------------------------------------------- 8. training
# A training run ends with an evaluation, so what that needs is tried before the training begins.
def evaluation_prompts(cfg):
    """(prompts, images of each) for a run's --eval_prompts images of each model."""
    # With fewer prompts than images, each prompt gets several: 256 images of 128 prompts are two
    # of each, and 200 images are two of the first 100.
    prompts = common.read_prompts(cfg.prompts)
    each = math.ceil(cfg.eval_prompts / len(prompts))
    return prompts[: cfg.eval_prompts // each], each


def test_run_judge(cfg):
    """Refuse before a training what would stop its final evaluation after it: prompts that cannot
    be read, too many sampling steps, a judge that is missing or does not work."""
    from diffusers import DDIMScheduler

    if not cfg.eval_prompts:
        return
    prompts, _ = evaluation_prompts(cfg)
    # The scheduler's own number of timesteps, without loading the model
    try:
        config = DDIMScheduler.load_config(cfg.model, subfolder="scheduler", revision=cfg.revision)
    except Exception:  # common.Models says what is wrong with --model
        config = {}
    check_sampling_steps("--eval_steps", cfg.eval_steps, config)
    # The judge on blank images of the right size, with a caption that it will meet
    if cfg.judge:
        blank = Image.new("RGB", (cfg.resolution, cfg.resolution))
        load_scorer(cfg.judge)([blank] * 2, prompts[:1] * 2)  # two: it has to give two numbers


def final_evaluation(cfg):
    """The end of a training run: curves.png, and with --eval_prompts the comparison of the initial
    model with the trained one. Every rank calls it."""
    if common.init_distributed().is_main:
        draw_curves(cfg.out)
    if not cfg.eval_prompts:
        return
    prompts, each = evaluation_prompts(cfg)
    # The micro-batch is the preset's here: memory for sampling has nothing to do with training's.
    shared = ("model", "variant", "revision", "vae", "cfg", "seed", "precision", "out", "cache")
    settings = {name: getattr(cfg, name) for name in shared}
    settings["micro_batch"] = PRESETS[cfg.preset].get("micro_batch", Config.micro_batch)
    config = Config(**settings, images_per_prompt=each, steps=cfg.eval_steps)
    trained = Path(cfg.out) / ("lora" if cfg.lora else "unet")
    unets = {"initial": cfg.unet, "trained": trained}
    compare_unets(config, unets, prompts, {cfg.judge: None} if cfg.judge else {})


# ---------------------------------------------------------------------------- 9. command line
# Three uses: draw with several UNets and compare (--model, --unet, --prompts); compare images that
# are there already (--images, --prompts); score a pair set (--data, --scores_out).
@dataclass
class Config:
    # What to draw with
    preset: str = option("tiny", "settings to start from: tiny, sd15 or sdxl; any flag overrides")
    model: str = option("", "folder or hub id of a Stable Diffusion 1.x, 2.x or XL pipeline")
    variant: str | None = option(None, "weight files to load from it, e.g. fp16")
    revision: str | None = option(None, "hub revision to load")
    vae: str | None = option(None, "another VAE, e.g. the fp16 fix for SDXL")
    unet: list[str] | None = option(None, "UNets or LoRAs, (NAME=)FOLDER or hub id; else runs/*")
    # What to draw, or what was drawn elsewhere
    prompts: list[str] | None = option(None, ".txt (one a line), .json, .parquet or hub ID(:SPLIT)")
    prompt_column: str = option("caption", "where the prompt is in .json, .parquet and hub rows")
    max_prompts: int | None = option(None, "use only the first prompts", ">0")
    images: list[str] | None = option(None, "score these folders' images, numbered as --prompts")
    # A pair set to score instead
    data: str | None = option(None, "score this pair set, with one scorer, into --scores_out")
    scores_out: str | None = option(None, "scores file to write, for the methods' --scores")
    # Who judges
    scorers: str = option("pickscore", f"{','.join(SCORERS)},PATH.py:FUNCTION; NAME or NAME=PATH")
    scorer_paths: list[str] | None = option(None, "NAME=PATH or NAME.PART=PATH, not the hub's")
    median_by: str | None = option(None, "a scorer: per prompt only its median image counts")
    # How to draw
    images_per_prompt: int = option(1, "images per prompt and model, each from its own noise", ">0")
    scheduler: Literal["ddim", "ddpm", "dpm"] = option("ddim", "dpm: DPM-Solver++")
    steps: int = option(50, "sampling steps", ">0")
    cfg: float = option(7.5, "guidance scale", ">=0")
    seed: int = option(0, "fixes, with the prompt's and the image's number, an image's noise")
    micro_batch: int = option(16, "images per GPU at once; the same gives the same bits", ">0")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp16", "of the pipeline")
    # Where it goes
    out: str = option("runs/eval", "folder for the report")
    cache: str | None = option(None, "folder that keeps images and scores; default: --out")
    resume: bool = option(False, "go on in an --out that holds a report, with its images")
    overwrite: bool = option(False, "the same: images are never stale, the report is replaced")

    def __post_init__(self):
        self.cache = self.cache or self.out


WORLD = common.tiny_preset("eval")
PRESETS = {
    # As the final evaluation of a training run: what those have drawn is not drawn again.
    "tiny": {
        "model": WORLD["model"],
        "prompts": [WORLD["prompts"]],
        "images_per_prompt": 2,
        "scorers": f"{WORLD['judge']},pickscore={TINY / 'reward'}",
        "steps": WORLD["eval_steps"],
        "cfg": WORLD["cfg"],
        "micro_batch": 32,
        "precision": "fp32",
        "cache": "runs/cache",
    },
    # The protocol of Diffusion-DRO (arXiv 2510.18353)
    "sd15": {"images_per_prompt": 5, "scheduler": "ddpm", "median_by": "pickscore"},
    "sdxl": {"cfg": 5.0, "micro_batch": 4, "vae": "madebyollin/sdxl-vae-fp16-fix"},
}


def wanted_scorers(names, paths):
    """--scorers and --scorer_paths -> {name: {part: place}}. InputError for names that are unknown
    and judges that are missing."""
    # --scorers: NAME, NAME=PATH, or a judge, whose own path may hold a =
    wanted = {}
    paths = list(paths or [])
    for name in map(str.strip, names.split(",")):
        if "=" in name and ".py:" not in name:
            paths.append(name)
            name = name.partition("=")[0]
        wanted[name] = {}
    # NAME=PATH is about the first part, NAME.PART=PATH about any: hpsv2.1=HPS.pt and
    # hpsv2.1.processor=FOLDER.
    for item in paths:
        key, _, path = item.partition("=")
        name, _, part = key.rpartition(".")
        if key in SCORERS:  # names have dots themselves
            name = key
            part = next(iter(SCORERS[key][1]))
        if name not in SCORERS or not path:
            text = f"NAME=PATH or NAME.PART=PATH with a NAME of {', '.join(SCORERS)}"
            raise InputError(f"{item} is not {text}")
        wanted.get(name, {})[part] = path
    # What can be wrong with the names is refused before anything is loaded.
    for name, parts in wanted.items():
        if name in SCORERS:
            scorer_files(name, parts)
        else:
            load_scorer(name)
    short = [short_name(name) for name in wanted]
    if len(set(short)) < len(short):
        raise InputError(f"two judges have one name: {', '.join(short)}")
    return wanted


def named_unets(cfg, dist_info):
    """{name: place} of the UNets to compare. InputError where two have one name."""
    # The model's own is called "initial", runs/smpo/unet "smpo", NAME=FOLDER what it says.
    items = find_runs(cfg.model, dist_info) if cfg.unet is None else cfg.unet
    unets = {"initial": None}
    for item in items:
        name, _, path = item.partition("=")
        if not path or Path(item).exists():  # a path may have a = itself: runs/lr=1e-5
            path = item
            folder = Path(item).resolve()
            name = folder.parent.name if folder.name in ("unet", "lora") else folder.name
        if name in unets:
            raise InputError(f"two UNets are called {name}: give --unet ANOTHER_NAME={path}")
        unets[name] = path
    return unets


def find_runs(model, dist_info):
    """The unet/ or lora/ folders of the finished runs in runs/ that trained this model, however its
    path was spelled then and now."""
    found = []
    for file in sorted(Path("runs").glob("*/config.json")):
        # Other things may lie there too: what is no run is named and passed over.
        try:
            trained = json.loads(file.read_text())["model"]
            if os.path.realpath(trained) == os.path.realpath(model):
                found += [file.parent / "unet", file.parent / "lora"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            if dist_info.is_main:
                print(f"warning: {file} is not a run's: {describe_error(error)}", file=sys.stderr)
    return [str(folder) for folder in found if folder.is_dir()]


def score_data(cfg, wanted, dist_info):
    """Score a pair set into --scores_out, which is replaced only once the scores are complete."""
    if not (cfg.data and cfg.scores_out and len(wanted) == 1):
        raise InputError("to score a pair set give --data, --scores_out and one of --scorers")
    result = Path(cfg.scores_out)
    if result.is_dir():
        raise InputError(f"--scores_out {result} is a folder: name another file")
    # Nothing is touched before the set is open and the scorer has worked once.
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS)
    inside = table.source.folder or Path(cfg.data).resolve()
    if result.resolve().is_relative_to(inside):
        raise InputError(f"--scores_out {result} is --data itself or inside: name another file")
    [(name, path)] = wanted.items()
    score = load_scorer(name, path, dist_info.device)
    title = f"scores by {short_name(name)}"
    scores = score_pairs(table, score, cfg.cache, title, dist_info)
    if dist_info.is_main:
        write_scores(result, scores, displayed(name), score.unit, cfg.data)
        print(f"wrote {result}: {len(scores['score_0'])} rows", flush=True)
    common.barrier()


def compare_folders(cfg, prompts, wanted, dist_info):
    """Compare images that were made elsewhere."""
    files = {Path(folder).resolve().name: read_images(folder, prompts) for folder in cfg.images}
    counts = {len(table[0]) for table in files.values()}
    if len(files) < len(cfg.images) or len(counts) > 1:
        raise InputError("--images: folders need different names and equally many images")
    image = open_image(next(iter(files.values()))[0][0])
    usable, left_out = usable_scorers(cfg, wanted, image, prompts[0], dist_info)
    settings = {"images": [displayed(folder) for folder in cfg.images]}
    compare_images(cfg, files, prompts, usable, left_out, settings)


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    dist_info = common.init_distributed()
    common.check_ranges(cfg)
    wanted = wanted_scorers(cfg.scorers, cfg.scorer_paths)
    # An earlier result is replaced on request only.
    result = Path(cfg.scores_out) if cfg.scores_out else Path(cfg.out) / "scores.json"
    if result.exists() and not (cfg.resume or cfg.overwrite):
        raise InputError(f"{result} exists: --overwrite replaces it, another name keeps both")
    common.barrier()  # nobody writes before all have looked

    # Score a pair set, compare images made elsewhere, or draw and compare.
    if cfg.data or cfg.scores_out:
        return score_data(cfg, wanted, dist_info)
    prompts = []
    for path in cfg.prompts or ():
        prompts += common.read_prompts(path, cfg.prompt_column)
    prompts = prompts[: cfg.max_prompts]
    if not prompts:
        raise InputError("there are no prompts: --prompts gave none")
    names = [short_name(name) for name in wanted]
    if cfg.median_by and cfg.median_by not in names:
        raise InputError(f"--median_by {cfg.median_by} is not one of {', '.join(names)}")
    if cfg.images:
        return compare_folders(cfg, prompts, wanted, dist_info)
    if not cfg.model:
        raise InputError("--model is missing")
    compare_unets(cfg, named_unets(cfg, dist_info), prompts, wanted)


if __name__ == "__main__":
    common.run_script(main)
