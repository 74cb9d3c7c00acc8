# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Fair comparisons of diffusion models: paired images, standard scorers, win rates with intervals.

Image j of prompt i starts from the same noise for every model (common.generator(seed, "image", i, j),
drawn on the CPU in fp32). So two models differ by their weights alone, and a win rate compares image
with image.

    1. win rates            counting, bootstrap
    2. published weights    the scorers' weights in transformers' modules
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

import copy
from contextlib import contextmanager
import dataclasses
from dataclasses import dataclass
import hashlib
import importlib.util
from itertools import combinations
import json
import math
import os
from pathlib import Path
import re
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
import torch
from torch import nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import TINY, InputError, describe_error, first_line, option


# ------------------------------------------------------------------------------- 1. win rates
def win_rate(a, b, seed=0):
    """How often A beats B on the same prompt and seed.

    a, b: scores, (P prompts,) or (P prompts, N images). Returns fractions of the comparisons: win (a
    tie counts half), win_strict (a > b), tie; and low, high: the 95 % bootstrap interval of win.
    Raises ValueError for tables that are empty, not finite or of different shapes.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    fits = a.shape == b.shape and a.ndim in (1, 2) and a.size
    if not fits or not np.isfinite([a, b]).all():
        shapes = f"{a.shape} and {b.shape}"
        raise ValueError(f"win_rate wants two finite tables (P,) or (P, N), not {shapes}")

    # The bootstrap draws whole prompts: N images of one prompt are no independent evidence.
    points = ((a > b) + 0.5 * (a == b)).reshape(len(a), -1).mean(1)  # (P,) in [0, 1]
    # Drawing P prompts with replacement is the same as drawing how often each distinct value of
    # `points` occurs, which is a multinomial and much cheaper.
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
# Several scorers are published as a bare state dict in the layout of their authors' code. They are
# loaded into transformers' modules by renaming the keys, so that no other package is needed.
# Each table holds (regular expression, replacement), applied to a key from top to bottom.
OPEN_CLIP_TO_CLIP = (
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"^visual\.(positional|class)_embedding", r"vision_model.embeddings.\1_embedding"),
    (r"^(token|positional)_embedding", r"text_model.embeddings.\1_embedding"),
    (r"positional_embedding", "position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # transformers' own spelling
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
    """load_state_dict, whose error names the missing and unexpected keys in its first line."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise RuntimeError(" ".join(str(error).split())) from error
    return module.eval()


def transformer_config(weights, heads, layers="encoder.layers.", mlp="mlp.fc1.weight"):
    """What the shapes of its weights tell of a transformer. The number of heads is not in them."""
    numbers = {int(key.split(".")[2]) for key in weights if key.startswith(layers)}
    config = {
        "num_attention_heads": heads,
        "num_hidden_layers": len(numbers),
        "intermediate_size": len(weights[f"{layers}0.{mlp}"]),
    }
    if "embeddings.patch_embedding.weight" in weights:  # a vision transformer
        width, _, _, patch = weights["embeddings.patch_embedding.weight"].shape
        table = next(value for key, value in weights.items() if "position_embedding" in key)
        side = round((table.shape[-2] - 1) ** 0.5)  # in patches; one position is the class token's
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
    for key in [key for key in weights if ".in_proj_" in key]:
        # query, key and value are one tensor in open_clip
        for letter, piece in zip("qkv", weights.pop(key).chunk(3)):
            weights[key.replace("in_proj_", f"{letter}_proj.")] = piece
    for key in ("visual_projection.weight", "text_projection.weight"):
        weights[key] = weights[key].T.contiguous()  # x @ w in open_clip, w @ x in nn.Linear

    text = select_weights(weights, "text_model.")
    vision = select_weights(weights, "vision_model.")
    vocabulary, width = text["embeddings.token_embedding.weight"].shape
    text_config = transformer_config(text, text_heads) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": len(text["embeddings.position_embedding.weight"]),
        "hidden_act": "gelu",  # CLIPConfig's default is OpenAI's quick_gelu
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
    }
    config = CLIPConfig(
        text_config=text_config,
        vision_config=transformer_config(vision, vision_heads) | {"hidden_act": "gelu"},
        projection_dim=len(weights["text_projection.weight"]),
    )
    return load_strict(CLIPModel(config), weights)


def linear_chain(weights):
    """Linear layers without activations -> nn.Sequential: the head of both aesthetic predictors and
    of ImageReward. weights: {"0.weight", "0.bias", "2.weight", ...} or {"weight", "bias"}."""
    names = {key.removesuffix("weight") for key in weights if key.endswith("weight")}
    layers = []
    for name in sorted(names, key=lambda name: int(name[:-1] or 0)):  # by number: 10 after 2
        outputs, inputs = weights[name + "weight"].shape
        layer = nn.Linear(inputs, outputs)
        layers.append(load_strict(layer, {k: weights[name + k] for k in ("weight", "bias")}))
    chain = nn.Sequential(*layers).eval()
    chain.config = {}  # nothing but weights: common.weights_hash asks for it
    return chain


class ImageReward(nn.Module):
    """BLIP reads the caption while it looks at the image; a head on the first token rates the two
    (arXiv 2304.05977)."""

    def __init__(self, vision, text, head):
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, pixel_values, input_ids, attention_mask):
        """(N, 3, H, H), (N, L), (N, L) -> (N,) fp32."""
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        words = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image
        )
        reward = self.head(words.last_hidden_state[:, 0].float())[:, 0]
        # The mean and the standard deviation of the authors' training set
        return (reward - 0.16717362830052426) / 1.0333394966054072


def image_reward_from_state_dict(state_dict, vision_heads, text_heads):
    """ImageReward.pt's tensors -> module(pixel_values, input_ids, attention_mask) -> (N,) rewards.

    The released model has 16 and 12 heads. The module is in fp32 and eval mode; rewards are
    standardised, about -2 to 2. KeyError or RuntimeError where weights are missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    image = select_weights(state_dict, "blip.visual_encoder.", BLIP_TO_TRANSFORMERS)
    config = transformer_config(image, vision_heads)
    vision = BlipVisionModel(BlipVisionConfig(**config, layer_norm_eps=1e-6))
    load_strict(vision, image)

    words = select_weights(state_dict, "blip.text_encoder.")
    words.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight
    vocabulary, width = words["embeddings.word_embeddings.weight"].shape
    config = transformer_config(words, text_heads, "encoder.layer.", "intermediate.dense.weight")
    config |= {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": vision.config.hidden_size,
        "max_position_embeddings": len(words["embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-12,
        "bos_token_id": None,
        "sep_token_id": None,
    }
    text = BlipTextModel(BlipTextConfig(**config), add_pooling_layer=False)
    load_strict(text, words)
    head = linear_chain(select_weights(state_dict, "mlp.layers."))
    return ImageReward(vision, text, head).eval()


def read_weights(path):
    """The state dict in a local file, a https address, or a hub file OWNER/REPOSITORY/FILE.

    .pt and .pth files are pickles, which could run any code. weights_only reads tensors alone.
    """
    from huggingface_hub import hf_hub_download

    path = str(path)
    options = {"map_location": "cpu", "weights_only": True}
    if path.startswith("https:"):
        name = path.rpartition("/")[2]
        weights = torch.hub.load_state_dict_from_url(path, file_name=name, **options)
    else:
        on_hub = re.fullmatch(r"\w[^/]*/[^/]+/[^/]+", path) and not Path(path).exists()
        if on_hub:
            repository, _, name = path.rpartition("/")
            path = hf_hub_download(repository, name)
        weights = torch.load(path, **options)
    weights = weights.get("state_dict", weights)
    infinite = [
        k for k, v in weights.items() if torch.is_floating_point(v) and not v.isfinite().all()
    ]
    if infinite:
        raise ValueError(f"not finite: {', '.join(infinite[:3])}")
    return weights


# --------------------------------------------------------------------------------- 3. scorers
class Scorer:
    """score(images: N PIL, prompts: N texts, batch=32) -> (N,) fp32 on the CPU.

    A subclass has prepare(image), which makes what the model wants of one image and may run in a
    thread, and compute(n prepared images, n prompts) -> n numbers. parts: what the scores depend
    on, for the fingerprint.
    """

    name = ""
    parts = ()

    def __call__(self, images, prompts, batch=32):
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        values = [torch.empty(0)]
        for start in range(0, len(images), batch):
            chunk = images[start : start + batch]
            prepared = [self.prepare(image.convert("RGB")) for image in chunk]
            values.append(self.score_prepared(prepared, prompts[start : start + batch]))
        return torch.cat(values)

    @torch.no_grad()
    def score_prepared(self, prepared, prompts):
        """One batch. InputError where the scorer fails or gives anything but n finite numbers."""
        try:
            with exact_fp32():
                values = torch.as_tensor(self.compute(prepared, list(prompts)))
            values = values.float().cpu().flatten()
        except Exception as error:  # a judge's own, or a full GPU
            raise InputError(f"scorer {self.name} raises {describe_error(error)}") from error
        finite = int(values.isfinite().sum())
        if not len(prepared) == len(values) == finite:
            text = f"{finite} finite values for {len(prepared)} images"
            raise InputError(f"scorer {self.name}: {text}")
        return values

    def fingerprint(self):
        """Changes whenever the scores might: with the weights and the settings of all parts, and
        with the libraries."""
        libraries = library_versions()
        hashes = [common.weights_hash(part) for part in self.parts]
        return hash_of([type(self).__name__, hashes, libraries, str(self.settings())])

    def settings(self):
        return ()


@contextmanager
def exact_fp32():
    """Without TF32, which training allows: its 10 bits would shift a PickScore in the third digit."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def library_versions():
    """Versions that can change a number. Not the commit: it changes with every word of a README."""
    return {name: value for name, value in common.versions().items() if name != "commit"}


def hash_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Judge(Scorer):
    """Any function(images, prompts) -> N numbers in a Python file. It gets whole PIL images."""

    def __init__(self, name):
        self.name = name
        file, _, function = name.rpartition(":")
        if not Path(file).is_file():
            raise InputError(f"judge {name}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"judge_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"judge {name} raises {describe_error(error)}") from error
        self.compute = getattr(module, function, None)
        if not callable(self.compute):
            raise InputError(f"judge {name}: {file} has no function {function}")
        self.content = Path(file).read_bytes()

    def prepare(self, image):
        return image

    def settings(self):
        """Its file's text. What that file imports is not seen: use another --cache after a change."""
        return self.name.rpartition(":")[2], hashlib.sha256(self.content).hexdigest()


class ClipScorer(Scorer):
    """Cosine of CLIP's image and text features (arXiv 2103.00020), times a scale. CLIP score,
    PickScore and HPSv2 are this with different weights, scales and preprocessing."""

    def __init__(self, model, tokenizer, processor, device, dtype, scale, crop=None):
        config = model.config
        require_fitting_tokenizer(tokenizer, config.text_config)
        self.model = model.to(device, dtype)
        self.tokenizer = tokenizer
        self.processor = processor
        self.side = config.vision_config.image_size
        self.crop = crop or crop_strip
        self.scale = scale
        self.parts = (model, tokenizer, processor)

    def settings(self):
        return self.scale, self.crop.__name__

    def prepare(self, image):
        """PIL RGB -> (3, side, side), normalised."""
        return process(self.processor, self.crop(image, self.side), self.side)

    def compute(self, prepared, prompts):
        # Padded to the full length always, as PickScore's own code does
        words = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        pixels = torch.stack(prepared).to(self.model.device, self.model.dtype)
        out = self.model(input_ids=words.input_ids.to(pixels.device), pixel_values=pixels)
        cosine = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return self.scale * cosine


def require_fitting_tokenizer(tokenizer, config):
    """InputError where a CLIP text encoder would read this tokenizer's output wrongly.

    It has to be known beforehand: on a GPU, an id beyond the vocabulary ends the whole process.
    """
    if tokenizer.model_max_length > config.max_position_embeddings:
        # Also where a tokenizer has no length at all: transformers then says 10^30
        text = (
            f"{tokenizer.model_max_length:.4g} tokens, the model {config.max_position_embeddings}"
        )
        raise InputError(f"the tokenizer does not fit the model: it allows {text}")
    if len(tokenizer) > config.vocab_size:
        text = f"{len(tokenizer)} words, the model {config.vocab_size}"
        raise InputError(f"the tokenizer does not fit the model: it has {text}")
    # The text feature is taken at the end of text. Where there is none, it would silently be taken
    # at the first token, which is the same for all texts. (2 is how old configs spell "the largest".)
    ids = tokenizer("a photo").input_ids
    end = max(ids) if config.eos_token_id == 2 else config.eos_token_id
    if end not in ids or tokenizer.eos_token_id != end:
        text = f"it ends a text with id {tokenizer.eos_token_id}, the model expects {end}"
        raise InputError(f"the tokenizer does not fit the model: {text}")


def process(processor, image, side):
    """One image through transformers' image processor -> (3, side, side)."""
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    if pixels.shape != (3, side, side):
        shape = tuple(pixels.shape)
        raise InputError(f"the image processor gives {shape}, the model wants (3, {side}, {side})")
    return pixels


def clip_processor(side):
    """CLIP's own preprocessing: shorter side to `side` (bicubic), centre crop, OpenAI's mean and
    standard deviation. The class that needs no torchvision; both give the same pixels."""
    from transformers import CLIPImageProcessorPil

    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)


def crop_strip(image, side):
    """Cut a long strip to its middle. The processor's centre crop keeps a square of it, but before
    that it would make 224 x 6,720,000 pixels of a file with 1 x 30,000."""
    limit = 16 * min(image.size)
    if max(image.size) <= limit:
        return image
    left = max(0, (image.width - limit) // 2)
    top = max(0, (image.height - limit) // 2)
    return image.crop((left, top, image.width - left, image.height - top))


def hps_square(image, side):
    """HPSv2's preprocessing up to the normalisation: longer side to `side` (bicubic), black bars to
    a square, nothing cropped."""
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def load_clip_model(path):
    from transformers import CLIPModel

    return common.load_pretrained(CLIPModel, path, "CLIP model")


def load_tokenizer(path):
    from transformers import AutoTokenizer

    return common.load_pretrained(AutoTokenizer, path, "tokenizer")


def load_clip(files, device, dtype, with_logit_scale=False):
    """A CLIPModel with its tokenizer and image processor: CLIP score, or PickScore's layout."""
    from transformers import CLIPImageProcessorPil

    model = load_clip_model(files["model"])
    tokenizer = load_tokenizer(files["processor"])
    processor = common.load_pretrained(CLIPImageProcessorPil, files["processor"], "image processor")
    scale = model.logit_scale.exp().item() if with_logit_scale else 1.0
    return ClipScorer(model, tokenizer, processor, device, dtype, scale)


def load_pickscore(files, device, dtype):
    """Always fp32: the reward's differences are what SmPO trains on, and in fp16 the image with the
    lower score can win."""
    return load_clip(files, device, torch.float32, with_logit_scale=True)


def load_hps(files, device, dtype):
    weights = read_weights(files["weights"])
    heads = head_counts(len(weights["visual.ln_pre.bias"]), len(weights["ln_final.bias"]))
    model = clip_from_open_clip(weights, *heads)
    processor = clip_processor(model.config.vision_config.image_size)
    tokenizer = load_tokenizer(files["processor"])
    return ClipScorer(model, tokenizer, processor, device, dtype, 100.0, hps_square)


def head_counts(*widths):
    """Attention heads of the published models: 64 channels each, but 80 in ViT-H's image encoder."""
    return [16 if width == 1280 else max(1, width // 64) for width in widths]


class AestheticScorer(Scorer):
    """LAION's aesthetic predictors: linear layers on the normalised image feature of CLIP. They do
    not read the prompt."""

    def __init__(self, files, device, dtype):
        weights = select_weights(read_weights(files["weights"]), renames=((r"^layers\.", ""),))
        self.head = linear_chain(weights).to(device)  # stays in fp32
        self.clip = load_clip_model(files["clip"]).to(device, dtype)
        self.side = self.clip.config.vision_config.image_size
        self.processor = clip_processor(self.side)
        self.parts = (self.clip, self.head, self.processor)

    def prepare(self, image):
        return process(self.processor, crop_strip(image, self.side), self.side)

    def compute(self, prepared, prompts):
        pixels = torch.stack(prepared).to(self.clip.device, self.clip.dtype)
        features = self.clip.get_image_features(pixels).pooler_output.float()
        return self.head(F.normalize(features, dim=-1))[:, 0]


class ImageRewardScorer(Scorer):
    LENGTH = 35  # tokens, as in the authors' training

    def __init__(self, files, device, dtype):
        weights = read_weights(files["weights"])
        self.tokenizer = load_tokenizer(files["tokenizer"])
        # Two words that BLIP adds to BERT's vocabulary. Texts do not begin with [ENC] here, but
        # with [CLS], although BLIP was trained otherwise: so the authors' code does.
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        image_width = weights["blip.visual_encoder.cls_token"].shape[-1]
        heads = head_counts(image_width, weights["mlp.layers.0.weight"].shape[-1])
        self.model = image_reward_from_state_dict(weights, *heads).to(device)
        if len(self.tokenizer) > self.model.text.config.vocab_size:
            raise InputError("the tokenizer does not fit the model: it has more words")
        self.model.vision.to(dtype)
        self.model.text.to(dtype)  # the head stays in fp32
        self.side = self.model.vision.config.image_size
        self.processor = clip_processor(self.side)
        self.parts = (self.model.vision, self.model.text, self.model.head)
        self.parts += (self.tokenizer, self.processor)

    def prepare(self, image):
        return process(self.processor, crop_strip(image, self.side), self.side)

    def compute(self, prepared, prompts):
        words = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.LENGTH,
            return_tensors="pt",
        ).to(self.model.text.device)
        pixels = torch.stack(prepared).to(self.model.vision.device, self.model.vision.dtype)
        return self.model(pixels, words.input_ids, words.attention_mask)


@dataclass(frozen=True)
class Published:
    """A published scorer: its loader, its files (local, hub or https), and its unit."""

    load: object
    files: dict
    unit: str


PICKSCORE = "yuvalkirstain/PickScore_v1"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"
GITHUB = "https://raw.githubusercontent.com"
AESTHETIC_V1 = f"{GITHUB}/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"
AESTHETIC_V2 = f"{GITHUB}/christophschuhmann/improved-aesthetic-predictor/main/sac+logos+ava1-l14-linearMSE.pth"
SCORERS = {
    "pickscore": Published(
        load_pickscore, {"model": PICKSCORE, "processor": VIT_H}, "exp(logit_scale) * cosine"
    ),
    "clip": Published(load_clip, {"model": VIT_H, "processor": VIT_H}, "cosine"),
    "hpsv2.0": Published(
        load_hps,
        {"weights": "xswu/HPSv2/HPS_v2_compressed.pt", "processor": VIT_H},
        "100 * cosine",
    ),
    "hpsv2.1": Published(
        load_hps,
        {"weights": "xswu/HPSv2/HPS_v2.1_compressed.pt", "processor": VIT_H},
        "100 * cosine",
    ),
    "aesthetic.v1": Published(
        AestheticScorer, {"weights": AESTHETIC_V1, "clip": VIT_L}, "about 1 to 10"
    ),
    "aesthetic.v2": Published(
        AestheticScorer, {"weights": AESTHETIC_V2, "clip": VIT_L}, "about 1 to 10"
    ),
    "imagereward": Published(
        ImageRewardScorer,
        {"weights": "THUDM/ImageReward/ImageReward.pt", "tokenizer": "bert-base-uncased"},
        "about -2 to 2",
    ),
}


def is_judge(name):
    return ".py:" in name


def short_name(name):
    """PATH.py:FUNCTION is called FUNCTION in reports."""
    return name.rpartition(":")[2] if is_judge(name) else name


def scorer_files(name, path=None):
    """{part: where it is} of a published scorer.

    path: None for the published places; another place for the first part; a folder that holds all
    parts (weights under their published name); or a dict of parts. InputError for other parts.
    """
    files = dict(SCORERS[name].files)
    first = next(iter(files))
    given = dict(path) if isinstance(path, dict) else {first: path} if path else {}
    unknown = set(given) - set(files)
    if unknown:
        text = f"no part {', '.join(sorted(unknown))}, only {', '.join(files)}"
        raise InputError(f"scorer {name} has {text}")
    if first in given and Path(given[first]).is_dir():
        folder = Path(given.pop(first))
        for part, published in files.items():
            inside = folder / published.rpartition("/")[2]
            files[part] = inside if part == "weights" else folder
    return {part: displayed(place) for part, place in (files | given).items()}


def displayed(path):
    """A path as a report shows it: relative where it is inside of the working folder."""
    path = str(path)
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def load_scorer(name, path=None, device=None, dtype=None):
    """A scorer by its name in SCORERS, or the judge PATH.py:FUNCTION -> Scorer.

    path: see scorer_files. device: default the GPU if there is one. dtype: default fp16 on a GPU and
    fp32 on the CPU; pickscore is in fp32 in any case. InputError names what is unknown, cannot be
    loaded, or does not work on a blank image (judges are not tried: they may want real captions).
    """
    if is_judge(name):
        return Judge(name)
    if name not in SCORERS:
        raise InputError(f"unknown scorer {name}; known: {', '.join(SCORERS)}, PATH.py:FUNCTION")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    return open_scorer(
        f"scorer {name}", SCORERS[name].load, scorer_files(name, path), device, dtype
    )


def load_reward(path, processor=None, device="cpu"):
    """A reward model in PickScore's layout (a CLIPModel; arXiv 2305.01569) -> Scorer, in fp32.

    path: folder or hub id; processor: where its tokenizer and image settings are, if elsewhere.
    Scores are exp(logit_scale) * cosine, about 20 for PickScore_v1. InputError if it cannot be
    loaded, weights are missing, or its parts do not fit together.
    """
    if processor is None:
        processor = VIT_H if path == PICKSCORE else path
    files = {"model": path, "processor": processor}
    return open_scorer(f"reward {path}", load_pickscore, files, device, torch.float32)


def open_scorer(name, load, files, device, dtype):
    """Load a scorer and score one blank image: what does not fit shows now, not hours later."""
    try:
        score = load(files, device, dtype)
        score.name = name.removeprefix("scorer ")
        score([Image.new("RGB", (64, 48))], ["a photo"])
    except Exception as error:  # pickle, safetensors and the hub raise their own
        reason = str(error) if isinstance(error, InputError) else describe_error(error)
        places = ", ".join(f"{part} {place}" for part, place in files.items())
        raise InputError(f"{name} cannot be used ({places}): {reason}") from error
    return score


# ------------------------------------------------------------------- 4. scores of pair sets
@dataclass
class RewardConfig(common.TrainConfig):
    """Training's options with those of the methods that ask a reward model: see `pair_scores`."""

    reward: str = option(PICKSCORE, "reward model in PickScore's layout: folder or hub id")
    reward_processor: str | None = option(None, "its tokenizer and image settings, if elsewhere")
    scores: str | None = option(
        None, "scores file instead of --reward: eval.py --scores_out makes it"
    )


def pair_scores(cfg, table, dist_info):
    """The scores of a run's pair set, as `score_pairs` returns them: from --scores; on --resume from
    the run's own folder; else by --reward, every row, ties too.

    Whether they belong to the rows is for common.RowTable.check_scores to tell.
    """
    if cfg.scores:
        return load_scores(cfg.scores)
    kept = Path(cfg.out) / "scores.safetensors"
    if cfg.resume and kept.exists():
        return load_scores(kept)
    score = load_reward(cfg.reward, cfg.reward_processor, dist_info.device)
    return score_pairs(table, score, cfg.cache, f"scores by {cfg.reward}", dist_info)


def keep_scores(cfg, scores, table, dist_info):
    """Keep a run's scores beside it, once its folder is taken: a resume reads them, and they can be
    given to another run with --scores."""
    file = Path(cfg.out) / "scores.safetensors"
    if dist_info.is_main and not cfg.scores and not file.exists():
        unit = SCORERS["pickscore"].unit
        write_scores(file, scores, cfg.reward, unit, table.source.path)
    common.barrier()


def score_pairs(table, score, cache, title, dist_info):
    """Score both images of every row of a pair set.

    table: common.RowTable with R rows; score: Scorer; cache: folder in which each score is kept
    under the content of its (image, caption) item. So an item is scored once, a killed scoring goes
    on, and of a changed set only what changed is scored. The ranks share the work.

    Returns {"score_0", "score_1": (R,) fp32, NaN where an image does not decode; "key_0", "key_1":
    (R,) int64, equal where image and caption are}.
    """
    folder = common.broadcast_from_main(score.fingerprint() if dist_info.is_main else None)
    store = common.TensorStore(Path(cache) / f"scores-{folder}")
    while True:  # once, unless a file of the store turns out to be damaged
        rows = common.broadcast_from_main(rows_without_score(table, store))
        if not len(rows):
            return read_scores(table, store)
        mine = table.my_rows(rows)
        items = items_to_score(table, store, mine)
        total = len(mine) * len(table.image_columns)

        def prepare(item):
            image_bytes, caption = item
            image = common.decode_image(image_bytes)
            # In a thread, so that no more than the prepared image waits for the model
            return None if image is None else (score.prepare(image), caption)

        def compute(batch):  # always of one size: see fill_store
            images, captions = zip(*batch)
            return {"score": score.score_prepared(list(images), captions)}

        common.fill_store(store, items, prepare, compute, title, total, dist_info)
        table.share_image_keys()
        store.refresh()


def item_keys(table):
    """(R, 2) int64: the key of each (image, caption) item, which is wrong where an image is unread."""
    return common.item_key(table.image_keys, table.caption_keys[:, None]).numpy()


def rows_without_score(table, store):
    """Sorted numbers of the rows with an image that was not read yet or has no score."""
    keys = item_keys(table)
    known = (store.find(keys.ravel()) >= 0) | np.isin(keys.ravel(), store.undecodable)
    known = known.reshape(keys.shape) & (table.image_keys.numpy() != 0)
    return (~known.all(1)).nonzero()[0]


def items_to_score(table, store, rows):
    """The (key, (image bytes, caption)) that the store lacks. Notes every image's key in the table."""
    seen = set(store.undecodable.tolist())
    for number, row in table.source.rows(("caption", *table.image_columns), rows):
        for side, column in enumerate(table.image_columns):
            image = common.image_key(row[column])
            table.image_keys[number, side] = image
            key = common.item_key(image, common.caption_key(row["caption"]))
            if key not in seen and store.find(np.array([key]))[0] < 0:
                seen.add(key)
                yield key, (row[column], row["caption"])


def read_scores(table, store):
    """What `score_pairs` returns, from a store that has every item."""
    keys = item_keys(table)
    values = np.full(keys.size, np.nan, np.float32)
    decodable = (~np.isin(keys.ravel(), store.undecodable)).nonzero()[0]
    for part in np.array_split(decodable, max(1, len(decodable) // 4096)):
        if len(part):
            values[part] = store.read(keys.ravel()[part])["score"].numpy()
    values = values.reshape(keys.shape)
    scores = {}
    for side in (0, 1):
        scores[f"score_{side}"] = torch.from_numpy(values[:, side].copy())
        scores[f"key_{side}"] = torch.from_numpy(keys[:, side].copy())
    return scores


SCORE_DTYPES = {
    "score_0": torch.float32,
    "score_1": torch.float32,
    "key_0": torch.int64,
    "key_1": torch.int64,
}


def write_scores(path, scores, scorer, unit, data):
    """Write a scores file. Its metadata says who scored which set, and in which unit."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.atomic(path) as temporary:
        save_file(scores, temporary, {"scorer": scorer, "unit": unit, "data": str(data)})


def load_scores(path):
    """A scores file -> what `score_pairs` returned. InputError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            scores = {name: file.get_tensor(name) for name in SCORE_DTYPES}
    except Exception as error:  # safetensors raises its own
        raise InputError(f"--scores {path} is no scores file: {first_line(error)}") from error
    rows = len(scores["score_0"]) if scores["score_0"].dim() else 0
    for name, dtype in SCORE_DTYPES.items():
        found = scores[name]
        if found.dtype != dtype or found.shape != (rows,):
            text = f"its {name} is {found.dtype} {tuple(found.shape)}, not {dtype} ({rows},)"
            raise InputError(f"--scores {path} is no scores file: {text}")
    if not any(scores[name].isfinite().any() for name in ("score_0", "score_1")):
        raise InputError(f"--scores {path}: not one score is finite")
    return scores


# ---------------------------------------------------------------------------------- 5. images
# Latents are not confined to [-1, 1]: they are never clipped, whatever a scheduler's config says.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
}
LORA_FILE = "pytorch_lora_weights.safetensors"


def open_pipeline(cfg):
    """The stock pipeline of --model with the scheduler to sample with, in --precision on the CPU."""
    import diffusers

    pipe = common.load_pipeline(cfg.model, cfg.variant, cfg.revision, cfg.vae)
    check_sampling_steps("steps", cfg.steps, pipe.scheduler.config)
    class_name, settings = SCHEDULERS[cfg.scheduler]
    scheduler_class = getattr(diffusers, class_name)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    return pipe.to(common.DTYPES[cfg.precision])


def check_sampling_steps(name, steps, scheduler_config):
    """A scheduler has no more steps than the timesteps that the model was trained with."""
    limit = scheduler_config.get("num_train_timesteps", 1000)
    if steps > limit:
        raise InputError(f"--{name} must be at most the scheduler's {limit}, it is {steps}")


def image_size(pipe):
    """(width, height) of the pipeline's images, in px."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def load_comparison_unet(pipe, path):
    """The UNet that stands in for the pipeline's own, in its dtype; None: the pipeline's own.

    path: a run's folder, its unet/, a hub repository, or a folder with a LoRA, which is merged into a
    copy of the pipeline's UNet. InputError if it cannot be loaded, or its sizes differ.
    """
    if path is None:
        return pipe.unet
    folders = (Path(path), Path(path) / "unet")
    lora = next((folder for folder in folders if (folder / LORA_FILE).is_file()), None)
    if lora is None:
        return common.load_unet(path, pipe.unet).to(pipe.unet.dtype)
    own = pipe.unet
    pipe.unet = copy.deepcopy(own).float()  # merged in fp32: a small update would round away
    try:
        with safe_open(lora / LORA_FILE, "pt") as file:
            others = [key for key in file.keys() if not key.startswith("unet.")]
        if others:
            raise ValueError(f"it changes more than the UNet: {', '.join(others[:3])}")
        pipe.load_lora_weights(lora, weight_name=LORA_FILE)
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
        return pipe.unet.to(own.dtype)
    except Exception as error:  # the package peft is missing, or the sizes differ
        reason = describe_error(error)
        raise InputError(f"--unet {path}: its LoRA cannot be loaded: {reason}") from error
    finally:
        pipe.unet = own


def hash_images(pipe, cfg, unets, prompts, dist_info):
    """{name: hash of all that its images depend on}. On the way, each UNet is loaded, so that one
    that does not fit is refused before any image is drawn. Loading takes seconds, drawing hours."""
    settings = image_settings(cfg, dist_info)
    shared = None
    if dist_info.is_main:  # the main process alone hashes: SHA-256 takes 2 s for SD1.5
        shared = common.weights_hash(pipe, without=("unet",))
    hashes = {}
    for name, path in unets.items():
        unet = load_comparison_unet(pipe, path)
        value = None
        if dist_info.is_main:
            about = [common.weights_hash(unet), shared, settings, prompts, library_versions()]
            value = hash_of(about)
        hashes[name] = common.broadcast_from_main(value)
    return hashes


def image_settings(cfg, dist_info):
    """The batch size is one of them: the last bits of a kernel's result depend on it."""
    return {
        "images_per_prompt": cfg.images_per_prompt,
        "seed": cfg.seed,
        "steps": cfg.steps,
        "cfg": cfg.cfg,
        "batch_size": cfg.micro_batch,
        "scheduler": cfg.scheduler,
        "precision": cfg.precision,
        "device": dist_info.device.type,
    }


def draw_images(pipe, unet_path, prompts, folder, cfg, dist_info, title):
    """Draw the images that a folder lacks; returns all of its files, (P prompts)(N images).

    The ranks take batches in turn. A batch is drawn completely or not at all, so that neither the
    number of GPUs nor a restart changes a bit of it.
    """
    files = []
    for i in range(len(prompts)):
        files.append([folder / f"{i:05d}_{j}.png" for j in range(cfg.images_per_prompt)])
    jobs = [(i, j) for i in range(len(prompts)) for j in range(cfg.images_per_prompt)]
    batches = [jobs[k : k + cfg.micro_batch] for k in range(0, len(jobs), cfg.micro_batch)]
    mine = batches[dist_info.rank :: dist_info.world_size]
    missing = [batch for batch in mine if not all(files[i][j].exists() for i, j in batch)]
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


def sample(pipe, texts, numbers, cfg):
    """The images (i, j) of a batch, as PIL. texts: their prompts."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (1, pipe.unet.config.in_channels, height, width)
    # Each image has a generator of its own: for its initial noise, then for what DDPM adds
    generators = [common.generator(cfg.seed, "image", i, j) for i, j in numbers]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pipe(
        texts,
        latents=noise.to(pipe.unet.dtype),
        generator=generators,
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.cfg,
    ).images


def read_images(folder, prompts):
    """The image files of a folder, (P prompts)(N images), in the order of the numbers in their names.

    Names differ in one number (0, 1, 2, ...: N images of the first prompt come first) or in two
    (prompt and image, as 00012_3.png). InputError where a number is missing or there twice, which
    would give a prompt the image of another.
    """
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    files = [file for file in Path(folder).glob("*") if file.suffix.lower() in kinds]
    if not files or len(files) % len(prompts):
        text = f"{len(files)} images do not divide among {len(prompts)} prompts"
        raise InputError(f"--images {folder}: {text}")
    numbers = {file: [int(digits) for digits in re.findall(r"\d+", file.stem)] for file in files}
    if len({len(found) for found in numbers.values()}) > 1:
        raise InputError(f"--images {folder}: the names do not have equally many numbers")
    files.sort(key=numbers.get)
    # A number that is the same in all names, as in sd15_0001.png, counts nothing.
    columns = [sorted(set(column)) for column in zip(*(numbers[file] for file in files))]
    columns = [column for column in columns if len(column) > 1]
    complete = (
        math.prod(map(len, columns)) == len({tuple(n) for n in numbers.values()}) == len(files)
    )
    gaps = [c for c in columns if c[0] > 1 or c != list(range(c[0], c[0] + len(c)))]
    if not complete or gaps:
        text = "numbers from 0 or 1 without gaps, one image each"
        raise InputError(f"--images {folder}: the names need {text}")
    if len(columns) > 1 and len(columns[0]) != len(prompts):
        text = f"{len(columns[0])} prompts in the names, {len(prompts)} in --prompts"
        raise InputError(f"--images {folder}: {text}")
    many = len(files) // len(prompts)
    return [files[start : start + many] for start in range(0, len(files), many)]


# ------------------------------------------------------------------------------ 6. comparison
def check_comparison(cfg, prompts, wanted):
    """Refuse what can be refused before anything is loaded: unknown names, missing judges."""
    if not prompts:
        raise InputError("there are no prompts: --prompts gave none")
    for name, path in wanted.items():
        if is_judge(name):
            Judge(name)
        elif name not in SCORERS:
            load_scorer(name)  # raises: it lists the known ones
        else:
            scorer_files(name, path)
    names = [short_name(name) for name in wanted]
    if len(set(names)) < len(names):
        raise InputError(f"two judges have one name: {', '.join(names)}")
    choices = {"scheduler": SCHEDULERS, "precision": common.DTYPES}
    if cfg.median_by:
        choices["median_by"] = names
    for option_name, known in choices.items():
        value = getattr(cfg, option_name)
        if value not in known:
            raise InputError(f"--{option_name} {value} is not one of {', '.join(known)}")


def usable_scorers(cfg, wanted, image, prompt, dist_info):
    """Load each scorer and try it on one image, before anything is drawn.

    Returns (wanted without those that fail, {name: why it fails}): a published scorer whose files are
    not there is left out of the report, and named in it. A judge that fails is an error, as is a
    --median_by that fails, or when no scorer is left.
    """
    left_out = {}
    for name, path in wanted.items():
        problem = None
        try:
            load_scorer(name, path, dist_info.device)([image], [prompt])
        except InputError as error:
            problem = str(error)
        problems = [text for text in common.all_gather_objects(problem) if text]
        if problems:  # one rank's trouble is everybody's
            left_out[name] = problems[0]
            if is_judge(name) or short_name(name) == cfg.median_by:
                raise InputError(problems[0])
    usable = {name: path for name, path in wanted.items() if name not in left_out}
    if wanted and not usable:
        raise InputError("no scorer is left: " + "; ".join(left_out.values()))
    return usable, left_out


def compare_unets(cfg, unets, prompts, wanted):
    """Draw the same prompts with several UNets of one pipeline, and compare. Every rank calls it.

    cfg: Config; unets: {name: place of the UNet (see load_comparison_unet), or None for the
    pipeline's own}; wanted: {scorer or judge: see scorer_files}. Images are kept in the folder
    images/HASH under --cache (default: --out). Returns what scores.json holds.
    """
    dist_info = common.init_distributed()
    check_comparison(cfg, prompts, wanted)
    pipe = open_pipeline(cfg)
    blank = Image.new("RGB", image_size(pipe))
    usable, left_out = usable_scorers(cfg, wanted, blank, prompts[0], dist_info)
    hashes = hash_images(pipe, cfg, unets, prompts, dist_info)
    files = {}
    for name, path in unets.items():
        folder = Path(cfg.cache or cfg.out) / "images" / hashes[name]
        files[name] = draw_images(pipe, path, prompts, folder, cfg, dist_info, name)
    del pipe  # the scorers need the memory
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
    about = {}
    scores = {}
    for name, path in wanted.items():
        score = load_scorer(name, path, dist_info.device)
        short = short_name(name)
        about[short] = {"judge": displayed(name)}
        if name in SCORERS:
            about[short] = {"unit": SCORERS[name].unit, **scorer_files(name, path)}
        scores[short] = {}
        for model, table in files.items():
            title = f"{short}, {model}"
            found = score_files(score, table, prompts, title, cfg.micro_batch, dist_info)
            scores[short][model] = found
    counted = keep_median(scores, cfg.median_by) if cfg.median_by else scores
    result = {
        "settings": settings | {"prompt_count": len(prompts), "median_by": cfg.median_by},
        "versions": common.versions(),
        "scorers": about,
        "left_out": left_out,
        "summary": {name: summarise(table) for name, table in counted.items()},
        "win_rates": {name: all_win_rates(table) for name, table in counted.items()},
        "prompts": prompts,
        "scores": {
            name: {model: values.tolist() for model, values in table.items()}
            for name, table in scores.items()
        },
    }
    if dist_info.is_main:
        write_report(Path(cfg.out), result, files, scores)
    common.barrier()
    return result


def score_files(score, files, prompts, title, batch_size, dist_info):
    """Scores (P, N) of image files (P)(N), the ranks taking batches in turn."""
    jobs = [(file, prompt) for row, prompt in zip(files, prompts) for file in row]
    starts = range(0, len(jobs), batch_size)
    mine = starts[dist_info.rank :: dist_info.world_size]

    def load(file):
        return score.prepare(open_image(file))

    to_load = ((file, file) for start in mine for file, _ in jobs[start : start + batch_size])
    prepared = common.prefetch(to_load, load, workers=4)
    found = {}
    for start in tqdm(mine, title, unit="batch", disable=not dist_info.is_main):
        texts = [prompt for _, prompt in jobs[start : start + batch_size]]
        images = [next(prepared)[1] for _ in texts]
        found[start] = score.score_prepared(images, texts)
    for others in common.all_gather_objects(found):
        found |= others
    values = torch.cat([found[start] for start in starts]).tolist()
    values = [float(f"{value:.7g}") for value in values]  # fp32 has no more digits
    return np.array(values).reshape(len(prompts), -1)


def open_image(file):
    """An image file as PIL RGB. InputError if it does not decode."""
    image = common.decode_image(file.read_bytes())
    if image is None:
        raise InputError(f"{file} does not decode as an image")
    return image


def keep_median(scores, median_by):
    """For each prompt and model, keep only the image of median score by one scorer (of an even
    number the lower of the two): arXiv 2510.18353's rule. (P, N) tables become (P, 1)."""
    kept = {name: {} for name in scores}
    for model, values in scores[median_by].items():
        order = np.argsort(values, axis=1, kind="stable")
        median = order[:, (values.shape[1] - 1) // 2, None]  # (P, 1): which image
        for name, table in scores.items():
            kept[name][model] = np.take_along_axis(table[model], median, axis=1)
    return kept


def summarise(table):
    """{model: (P, N) scores} -> {model: mean, standard error of the mean over prompts, median}."""
    summary = {}
    for model, values in table.items():
        deviation = values.mean(1).std(ddof=1 if len(values) > 1 else 0)
        summary[model] = {
            "mean": values.mean(),
            "standard_error": deviation / len(values) ** 0.5,
            "median": np.median(values),
        }
    return summary


def all_win_rates(table):
    """{model: (P, N) scores} -> {a: {b: win_rate of a over b}}."""
    rates = {}
    for a in table:
        rates[a] = {b: win_rate(table[a], table[b]) for b in table if b != a}
    return rates


def write_report(out, result, files, scores):
    """scores.md, samples.png, winrate.png, then scores.json: where it stands, the report is whole."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(result)
    common.write_text(out / "scores.md", table)
    written = ["scores.json", "scores.md", "samples.png"]
    first = next(iter(scores.items()), None)
    save_picture(draw_samples(files, result["prompts"], first), out / "samples.png")
    rows = []
    for name, rates in result["win_rates"].items():
        rows += [(f"{name}: {b} over {a}", rates[b][a]) for a, b in combinations(rates, 2)]
    if rows:
        over = f"{len(result['prompts'])} prompts"
        save_picture(draw_win_rates(rows, over), out / "winrate.png")
        written.append("winrate.png")
    common.write_text(out / "scores.json", json.dumps(result, indent=1) + "\n")
    print(f"\n{table}\nwrote {out}/{', '.join(written)}", flush=True)


def markdown(result):
    """The report as a Markdown table, then what its numbers are and how they were made."""
    lines = [
        "| scorer | model | mean ± s.e. | median | against | win rate (95 %) | ties |",
        "|---|---|---|---|---|---|---|",
    ]
    for scorer, summary in result["summary"].items():
        models = list(summary)
        for i, model in enumerate(models):
            s = summary[model]
            start = f"| {scorer} | {model}"
            numbers = f"{s['mean']:.4f} ± {s['standard_error']:.4f} | {s['median']:.4f}"
            if i == 0:
                lines.append(f"{start} | {numbers} | | | |")
            for other in models[:i]:
                rate = result["win_rates"][scorer][model][other]
                against = f"{other} | {in_percent(rate)} | {rate['tie']:.1%}"
                lines.append(f"{start} | {numbers} | {against} |")
                numbers = " | "  # once a model
    lines.append("")
    for scorer, about in result["scorers"].items():
        lines.append(f"- {scorer}: {', '.join(dict.fromkeys(about.values()))}")
    lines += [f"- left out: {problem}" for problem in result["left_out"].values()]
    settings = []
    for name, value in result["settings"].items():
        if value is not None and not isinstance(value, dict):
            settings.append(f"{name} {value}")
    lines.append(f"- {', '.join(settings)}, commit {result['versions']['commit']}")
    return "\n".join(lines) + "\n"


def in_percent(rate):
    return f"{rate['win']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


# -------------------------------------------------------------------------------- 7. pictures
GREEN = "#1a7f37"
RED = "#c93c37"
GREY = "#6e7781"


def save_picture(picture, path):
    with common.atomic(path) as temporary:
        picture.save(temporary, "PNG")


def draw_text(draw, xy, text, size=15, width=None, anchor="la", colour="black"):
    """Text on a picture, cut to `width` px. anchor: Pillow's, e.g. "mm" for the middle."""
    font = ImageFont.load_default(size)
    while width and draw.textlength(text, font) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…"
    draw.text(xy, text, colour, font, anchor)


def draw_samples(files, prompts, scores=None, rows=5):
    """A sheet of images: a column for each model, the same noise in a row, the caption below. As many
    such blocks as fit stand side by side.

    files: {model: image files (P)(N)}; scores: (scorer, {model: (P, N)}), shown below each image.
    """
    first = next(iter(files.values()))[0][0]
    longer = max(Image.open(first).size)
    scale = 256 / longer
    filter = Image.Resampling.LANCZOS
    if longer <= 160:  # the pixels of small images stay whole
        scale = 160 // longer
        filter = Image.Resampling.NEAREST
    w, h = (round(length * scale) for length in Image.open(first).size)
    block = (w + 6) * len(files) + 18
    line = h + 54
    across = max(1, min(1200 // block, math.ceil(len(prompts) / rows)))
    count = min(len(prompts), across * rows)
    height = 50 + math.ceil(count / across) * line
    sheet = Image.new("RGB", (across * block + 6, height), "white")
    draw = ImageDraw.Draw(sheet)
    for k in range(count):
        left = k % across * block + 12
        y = k // across * line + 30
        for column, (model, table) in enumerate(files.items()):
            x = left + column * (w + 6)
            sheet.paste(Image.open(table[k][0]).convert("RGB").resize((w, h), filter), (x, y))
            if k < across:
                draw_text(draw, (x + w / 2, 15), model, 16, w, "mm")
            if scores:
                value = f"{scores[1][model][k, 0]:.3g}"
                draw_text(draw, (x + w / 2, y + h + 3), value, 13, w, "ma")
        draw_text(draw, (left, y + h + 20), prompts[k], 15, block - 18)
    if scores:
        note = f"Below each image: {scores[0]}, higher is better."
        draw_text(draw, (12, height - 24), note, 14)
    return sheet


def draw_win_rates(rows, over):
    """A line for each (title, what win_rate returns): the win rate as a dot, its 95 % interval as a
    bar, against 50 %. over: what the bootstrap resampled, e.g. "128 prompts"."""
    left, right, top, step = 340, 840, 50, 34  # px
    bottom = top + step * len(rows)
    picture = Image.new("RGB", (1110, bottom + 60), "white")
    draw = ImageDraw.Draw(picture)
    for percent in range(0, 101, 25):
        x = left + (right - left) * percent / 100
        is_middle = percent == 50
        colour = "black" if is_middle else "#d8d8d8"
        draw.line((x, top - 10, x, bottom), colour, 2 if is_middle else 1)
        draw_text(draw, (x, top - 24), f"{percent} %", anchor="mm")
    for i, (title, rate) in enumerate(rows):
        y = top + step * (i + 0.5)
        low, dot, high = (left + (right - left) * rate[name] for name in ("low", "win", "high"))
        colour = GREEN if rate["low"] > 0.5 else RED if rate["high"] < 0.5 else GREY
        draw.line((low, y, high, y), colour, 5)
        draw.ellipse((dot - 7, y - 7, dot + 7, y + 7), colour)
        draw_text(draw, (left - 20, y), title, 16, left - 30, "rm")
        text = f"{in_percent(rate)}, ties {rate['tie']:.1%}"
        draw_text(draw, (right + 20, y), text, anchor="lm")
    note = f"Win rate, a tie counts half; 95 % bootstrap interval over {over}. "
    note += "Green: significantly better, red: worse, grey: no significant difference."
    draw_text(draw, (20, bottom + 24), note)
    return picture


# The values to look at, a panel each: those of a panel that a log has are drawn into it.
PANELS = (
    ("loss",),
    ("accuracy", "active"),
    ("margin", "gap"),
    ("err_winner", "err_loser", "err_expert", "err_policy"),
    ("grad_norm",),
)
# Where the values of a healthy run lie, for DPO and SmPO (whose logs have a margin) and for DRO (a
# gap). Means over 20 steps in the tiny world; README, "What the log says", has what else is known.
HEALTHY = {
    "margin": {"loss": (0.49, 0.83), "accuracy": (0.49, 0.79), "margin": (0, math.inf)},
    "gap": {"active": (0.8, 0.95)},
}
COLOURS = (("#a8c7ee", "#1f5fb4"), ("#f1c3a5", "#c2571a"))  # (as logged, moving average)


def draw_curves(out):
    """curves.png from log.jsonl: each value as logged and its moving average, over a shaded range
    where a healthy one is known. Nothing where there is no log."""
    log = Path(out) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        return
    method = next((name for name in HEALTHY if name in lines[0]), None)
    panels = [[name for name in names if name in lines[0]] for names in PANELS]
    panels = [names for names in panels if names]
    width, height = 380, 250  # px, of a panel
    across = min(3, len(panels))
    size = (across * width + 20, math.ceil(len(panels) / across) * height + 40)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for k, names in enumerate(panels):
        corner = (k % across * width, k // across * height)
        healthy = HEALTHY.get(method, {}).get(names[0])
        draw_panel(draw, corner, (width, height), lines, names, healthy)
    note = (
        "Light: as logged. Dark: moving average, whose last value is given. Green: healthy range."
    )
    draw_text(draw, (20, size[1] - 28), note, 14)
    save_picture(picture, Path(out) / "curves.png")


def draw_panel(draw, corner, size, lines, names, healthy=None):
    """One panel of curves.png: the named values over the steps."""
    left = corner[0] + 70
    top = corner[1] + 40
    right = corner[0] + size[0] - 10
    bottom = corner[1] + size[1] - 35
    curves = [read_curve(lines, name) for name in names]
    shown = np.concatenate([values for _, values, _ in curves])
    if not len(shown):
        return
    # A few outliers would flatten everything else: they are cut off at the frame.
    low, high = np.quantile(shown, [0.01, 0.99])
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - pad, high + pad
    first, last = lines[0]["step"], lines[-1]["step"]

    def x_of(step):
        return left + (right - left) * (step - first) / max(1, last - first)

    def y_of(value):
        return bottom - (bottom - top) * (np.clip(value, low, high) - low) / (high - low)

    if healthy:
        draw.rectangle((left, y_of(healthy[1]), right, y_of(healthy[0])), "#e3f3e6")
    draw.rectangle((left, top, right, bottom), outline="#b0b0b0")
    for curve, (light, dark) in enumerate(COLOURS[: len(curves)]):
        steps, values, smooth = curves[curve]
        for y, colour, line_width in ((values, light, 1), (smooth, dark, 3)):
            points = list(zip(x_of(steps).tolist(), y_of(y).tolist()))
            draw.line(points, colour, line_width)
        if len(smooth):
            text = f"{names[curve]} {smooth[-1]:.4g}"
            draw_text(draw, (left + curve * 150, top - 22), text, 15, colour=dark)
    for value in (low, high):
        draw_text(draw, (left - 6, y_of(value)), f"{value:.3g}", 13, anchor="rm", colour=GREY)
    draw_text(draw, (left, bottom + 6), f"step {first}", 13, colour=GREY)
    draw_text(draw, (right, bottom + 6), str(last), 13, anchor="ra", colour=GREY)


def read_curve(lines, name):
    """(steps, values, moving average) of a logged value, without the steps where it is infinite,
    which the log writes as null: fp16's scaler finds its range by such steps."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    known = np.array([pair for pair in known if math.isfinite(pair[1])], float).reshape(-1, 2)
    values = known[:, 1]
    window = max(1, len(values) // 10)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return known[:, 0], values, (sums[ends] - sums[starts]) / (ends - starts)


# -------------------------------------------------------------------------------- 8. training
def evaluation_prompts(cfg):
    """(prompts, images of each) for a run's --eval_prompts images of each model."""
    prompts = common.read_prompts(cfg.prompts)
    if not prompts:
        raise InputError(f"--prompts {cfg.prompts} holds no prompt")
    each = math.ceil(cfg.eval_prompts / len(prompts))
    return prompts[: cfg.eval_prompts // each], each


def test_run_judge(cfg):
    """Refuse before a training what would stop its final evaluation after it: prompts that cannot be
    read, more sampling steps than there are, a judge that is missing or does not work."""
    from diffusers import DDIMScheduler

    if not cfg.eval_prompts:
        return
    prompts, _ = evaluation_prompts(cfg)
    try:
        place = {"subfolder": "scheduler", "revision": cfg.revision}
        scheduler = DDIMScheduler.load_config(cfg.model, **place)
    except Exception:  # common.Models says better what is wrong with --model
        scheduler = {}
    check_sampling_steps("eval_steps", cfg.eval_steps, scheduler)
    if cfg.judge:
        load_scorer(cfg.judge)([Image.new("RGB", (cfg.resolution,) * 2)], prompts[:1])


def final_evaluation(cfg):
    """The end of a training run: curves.png, and with --eval_prompts the comparison of the initial
    model with the trained one. Every rank calls it."""
    dist_info = common.init_distributed()
    if dist_info.is_main:
        draw_curves(cfg.out)
    if not cfg.eval_prompts:
        return
    prompts, each = evaluation_prompts(cfg)
    config = Config(
        model=cfg.model,
        variant=cfg.variant,
        revision=cfg.revision,
        vae=cfg.vae,
        images_per_prompt=each,
        steps=cfg.eval_steps,
        cfg=cfg.cfg,
        seed=cfg.seed,
        micro_batch=PRESETS[cfg.preset].get("micro_batch", Config.micro_batch),
        precision=cfg.precision,
        out=cfg.out,
        cache=cfg.cache,
    )
    unets = {"initial": cfg.unet, "trained": str(Path(cfg.out) / "unet")}
    compare_unets(config, unets, prompts, {cfg.judge: None} if cfg.judge else {})


# ---------------------------------------------------------------------------- 9. command line
@dataclass
class Config:
    preset: str = option(
        "tiny", "settings to start from: tiny, sd15 or sdxl; any flag overrides them"
    )
    model: str = option(
        "", "diffusers folder or hub id of a Stable Diffusion 1.x, 2.x or XL pipeline"
    )
    variant: str | None = option(None, "weight files to load from it, e.g. fp16")
    revision: str | None = option(None, "hub revision to load")
    vae: str | None = option(None, "another VAE, e.g. the fp16 fix for SDXL")
    unet: list[str] | None = option(
        None, "UNets or LoRAs, (NAME=)FOLDER or hub id; default: runs/*"
    )
    prompts: list[str] | None = option(None, ".txt (one a line), .json, .parquet or hub ID(:SPLIT)")
    prompt_column: str = option("caption", "where the prompt is in the rows of .json and .parquet")
    max_prompts: int | None = option(None, "use only the first prompts", ">0")
    images: list[str] | None = option(None, "score these folders' images, numbered as --prompts")
    data: str | None = option(None, "score this pair set, with one scorer, into --scores_out")
    scores_out: str | None = option(None, "scores file to write, for the methods' --scores")
    scorers: str = option("pickscore", f"{','.join(SCORERS)},PATH.py:FUNCTION; NAME or NAME=PATH")
    scorer_paths: list[str] | None = option(None, "NAME=PATH or NAME.PART=PATH, instead of the hub")
    images_per_prompt: int = option(1, "images per prompt and model, each from its own noise", ">0")
    median_by: str | None = option(None, "a scorer: per prompt only its median image counts")
    scheduler: str = option("ddim", "ddim, ddpm or dpm (DPM-Solver++)")
    steps: int = option(50, "sampling steps", ">0")
    cfg: float = option(7.5, "guidance scale", ">=0")
    seed: int = option(0, "fixes, with the prompt's and the image's number, all noise of an image")
    micro_batch: int = option(16, "images per GPU at once; the same gives the same bits", ">0")
    precision: str = option("fp16", "of the pipeline: fp32, bf16 or fp16")
    out: str = option("runs/eval", "folder for the report")
    cache: str | None = option(None, "folder that keeps images and scores; default: --out")
    resume: bool = option(
        False, "write into an --out that holds a report; its images are used again"
    )
    overwrite: bool = option(False, "the same: the images are right, only the report is replaced")


WORLD = common.tiny_preset("eval")
PRESETS = {
    # As the final evaluation of a training run, so that what those have drawn is not drawn again.
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
    """--scorers and --scorer_paths -> {name: {part: place}}."""
    wanted = {}
    given = list(paths or [])
    for item in names.split(","):
        item = item.strip()
        name = item if is_judge(item) else item.partition("=")[0]
        wanted[name] = {}
        if name != item:
            given.append(item)
    for item in given:
        key, _, path = item.partition("=")
        name, _, part = key.rpartition(".")
        if key in SCORERS:  # names have dots themselves: hpsv2.1
            name = key
            part = next(iter(SCORERS[key].files))
        if name not in SCORERS or not path:
            text = f"NAME=PATH or NAME.PART=PATH with a NAME of {', '.join(SCORERS)}"
            raise InputError(f"{item} is not {text}")
        wanted.get(name, {})[part] = path
    return wanted


def named_unets(cfg, dist_info):
    """{name: place} of the UNets to compare: the model's own is "initial", runs/smpo/unet "smpo",
    NAME=FOLDER what it says. InputError where two have one name."""
    if cfg.unet is None:
        found = find_runs(cfg.model, dist_info)
    else:
        found = [split_name(item) for item in cfg.unet]
    unets = {"initial": None}
    for name, path in found:
        if name in unets:
            text = f"name one of them, --unet NAME={path}"
            raise InputError(f"--unet {path}: two UNets are called {name}: {text}")
        unets[name] = path
    return unets


def split_name(item):
    """(name, path) of an --unet. A path may hold a = itself, as in runs/lr=1e-5."""
    name, separator, path = item.partition("=")
    if separator and not Path(item).exists():
        return name, path
    folder = Path(item).resolve()
    return folder.parent.name if folder.name == "unet" else folder.name, item


def find_runs(model, dist_info):
    """(name, folder of the UNet) of the finished runs in runs/ that trained this model, however its
    path was spelled then and now."""
    found = []
    for file in sorted(Path("runs").glob("*/config.json")):
        unet = file.parent / "unet"
        try:
            trained = json.loads(file.read_text())["model"]
            is_same = os.path.realpath(trained) == os.path.realpath(model)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if dist_info.is_main:
                text = f"warning: {file} is skipped, it is no run's ({describe_error(error)})"
                print(text, file=sys.stderr, flush=True)
            continue
        if is_same and unet.is_dir():
            found.append((file.parent.name, str(unet)))
    return found


def score_data(cfg, wanted, dist_info):
    """Score a pair set into --scores_out, which is replaced only when the new scores are complete."""
    if not (cfg.data and cfg.scores_out and len(wanted) == 1):
        raise InputError("to score a pair set give --data, --scores_out and one of --scorers")
    result = Path(cfg.scores_out)
    if result.is_dir() or result.resolve() == Path(cfg.data).resolve():
        raise InputError(f"--scores_out {result} is a folder or --data itself: name another file")
    cfg = dataclasses.replace(cfg, cache=cfg.cache or cfg.out)
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS)
    name, path = next(iter(wanted.items()))
    score = load_scorer(name, path, dist_info.device)
    scores = score_pairs(table, score, cfg.cache, f"scores by {short_name(name)}", dist_info)
    if dist_info.is_main:
        unit = SCORERS[name].unit if name in SCORERS else "the judge's"
        write_scores(result, scores, displayed(name), unit, cfg.data)
        print(f"wrote {result}: {len(scores['score_0'])} rows", flush=True)
    common.barrier()


def compare_folders(cfg, prompts, wanted, dist_info):
    """Compare images that were made elsewhere."""
    check_comparison(cfg, prompts, wanted)
    files = {Path(folder).name: read_images(folder, prompts) for folder in cfg.images}
    counts = {len(table[0]) for table in files.values()}
    if len(files) < len(cfg.images) or len(counts) > 1:
        text = "the folders need different names and equally many images"
        raise InputError(f"--images: {text}")
    image = open_image(next(iter(files.values()))[0][0])
    usable, left_out = usable_scorers(cfg, wanted, image, prompts[0], dist_info)
    settings = {"images": [displayed(folder) for folder in cfg.images]}
    compare_images(cfg, files, prompts, usable, left_out, settings)


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    dist_info = common.init_distributed()
    common.check_ranges(cfg)
    wanted = wanted_scorers(cfg.scorers, cfg.scorer_paths)
    result = Path(cfg.scores_out) if cfg.scores_out else Path(cfg.out) / "scores.json"
    if result.exists() and not (cfg.resume or cfg.overwrite):
        raise InputError(f"{result} exists: --overwrite replaces it, another name keeps both")
    common.barrier()  # nobody writes before all have looked
    if cfg.data or cfg.scores_out:
        score_data(cfg, wanted, dist_info)
        return
    prompts = []
    for path in cfg.prompts or ():
        prompts += common.read_prompts(path, cfg.prompt_column)
    prompts = prompts[: cfg.max_prompts]
    if cfg.images:
        compare_folders(cfg, prompts, wanted, dist_info)
        return
    if not cfg.model:
        raise InputError("--model is missing")
    compare_unets(cfg, named_unets(cfg, dist_info), prompts, wanted)


if __name__ == "__main__":
    common.run_script(main)
