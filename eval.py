"""Fair comparisons of diffusion models: paired images, standard scorers, win rates with confidence intervals.

Image j of prompt i starts from the same noise for every model (common.generator(seed, "image", i, j), drawn
on the CPU in fp32): two models differ by their weights alone, and a win rate compares image with image.

    python eval.py                                        # every runs/*/unet against the tiny start model
    python eval.py --preset sd15 --model M --unet A B --prompts p.txt --scorers pickscore,hpsv2.1,imagereward
    torchrun --nproc_per_node=8 eval.py --preset sdxl --model M --unet A --prompts p.txt --scorers clip
    python eval.py --images DIR_1 DIR_2 --prompts p.txt --scorers aesthetic.v2         # images made elsewhere
    python eval.py --data pairs.parquet --scorers hpsv2.1 --scores_out hps.safetensors # for smpo.py --scores

Written under --out: scores.json (every score, settings, versions), scores.md, samples.png, winrate.png; under
--cache (default: --out) images/HASH/, where HASH covers weights, settings and prompts: never stale.
"""

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import common
from common import DTYPES, TINY, InputError, first_line, flag, named


def win_rate(a, b, seed=0):
    """How often A beats B on the same prompt and seed. a, b: scores (P,) or (P prompts, N images).

    Fractions of the comparisons: win (a tie counts half), win_strict (a > b), tie; low, high: win's 95 %
    bootstrap interval, by whole prompts (N images of one prompt are no independent evidence). ValueError for
    tables that are empty, not finite or of different shapes.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.size or not np.isfinite([a, b]).all():
        raise ValueError(f"win_rate wants two finite tables (P,) or (P, N), not {a.shape} and {b.shape}")
    points = ((a > b) + 0.5 * (a == b)).reshape(len(a), -1).mean(1)  # each prompt's share of wins, (P,)
    # Drawing P prompts with replacement is drawing how often each distinct share occurs: same law, cheaper
    shares, counts = np.unique(points, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=10_000) @ shares / len(a)
    low, high = (float(x) for x in np.quantile(drawn, [0.025, 0.975]))
    win, strict, tie = (float(x.mean()) for x in (points, a > b, a == b))
    return {"win": win, "win_strict": strict, "tie": tie, "low": low, "high": high}


# ------------------------------------------------- scorers: published weights in transformers' modules
OPEN_CLIP = (  # open_clip's names -> CLIPModel's
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"), (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"^transformer\.resblocks", "text_model.encoder.layers"), (r"\.attn\.", ".self_attn."),
    (r"^visual\.(positional|class)_embedding", r"vision_model.embeddings.\1_embedding"),
    (r"^(token|positional)_embedding", r"text_model.embeddings.\1_embedding"), (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"positional_embedding", "position_embedding.weight"), (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"), (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"), (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
)  # fmt: skip
BLIP = (  # BLIP's image encoder -> BlipVisionModel; the text encoder has the same names in both
    (r"^cls_token", "embeddings.class_embedding"), (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"), (r"^blocks", "encoder.layers"),
    (r"^norm", "post_layernorm"), (r"\.norm(\d)\.", r".layer_norm\1."), (r"\.attn\.", ".self_attn."),
    (r"\.proj\.", ".projection."),
)  # fmt: skip


def part(weights, prefix="", names=()):
    """What stands under PREFIX in a state dict, in fp32, its keys rewritten by (regular expression, text)."""
    found = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    for old, new in names:
        found = {re.sub(old, new, k): v for k, v in found.items()}
    return found


def sizes(weights, heads, layers="encoder.layers.", mlp="mlp.fc1.weight"):
    """What shapes tell of a transformer's configuration. The number of heads is not in them."""
    depth = 1 + max(int(k.removeprefix(layers).split(".")[0]) for k in weights if k.startswith(layers))
    inner = len(weights[f"{layers}0.{mlp}"])
    found = {"num_attention_heads": heads, "num_hidden_layers": depth, "intermediate_size": inner}
    if "embeddings.patch_embedding.weight" in weights:
        width, _, _, patch = weights["embeddings.patch_embedding.weight"].shape
        positions = next(v.shape[-2] for k, v in weights.items() if "position_embedding" in k)
        side = round((positions - 1) ** 0.5)  # in patches; one position is the class token's
        found |= {"hidden_size": width, "patch_size": patch, "image_size": patch * side}
    return found


def clip_from_open_clip(state_dict, vision_heads, text_heads):
    """An open_clip ViT's state dict (HPSv2's layout, arXiv 2306.09341) -> transformers.CLIPModel, fp32, in
    eval mode. ViT-H/14 has 16 and 16 heads. The text feature is taken at the vocabulary's last token, the end
    of text. KeyError or RuntimeError where weights are missing."""
    from transformers import CLIPConfig, CLIPModel

    weights = part(state_dict, names=OPEN_CLIP)
    for key in [k for k in weights if ".in_proj_" in k]:  # query, key and value are one tensor in open_clip
        for letter, piece in zip("qkv", weights.pop(key).chunk(3)):
            weights[key.replace("in_proj_", f"{letter}_proj.")] = piece
    for key in ("visual_projection.weight", "text_projection.weight"):  # x @ w there, a Linear's w @ x here
        weights[key] = weights[key].T.contiguous()
    text, vision = part(weights, "text_model."), part(weights, "vision_model.")
    words, width = text["embeddings.token_embedding.weight"].shape
    text_config = sizes(text, text_heads) | {
        "vocab_size": words, "hidden_size": width, "bos_token_id": None, "eos_token_id": words - 1,
        "max_position_embeddings": len(text["embeddings.position_embedding.weight"]), "hidden_act": "gelu",
    }  # fmt: skip
    vision_config = sizes(vision, vision_heads) | {"hidden_act": "gelu"}
    joint = len(weights["text_projection.weight"])
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=joint))
    model.load_state_dict(weights)
    return model.eval()


def linear_chain(weights):
    """Linear layers without activations, {"0.weight", "0.bias", "2.weight", ...} or {"weight", "bias"} ->
    nn.Sequential. The head of both aesthetic predictors and of ImageReward."""
    chain = nn.Sequential()
    names = {k.removesuffix("weight") for k in weights if k.endswith("weight")}
    for name in sorted(names, key=lambda n: int(n[:-1] or 0)):
        chain.append(nn.Linear(*reversed(weights[name + "weight"].shape)))
        chain[-1].load_state_dict({k: weights[name + k] for k in ("weight", "bias")})
    return chain.eval()


class ImageReward(nn.Module):
    """BLIP reads the caption while looking at the image; a head on the first token (arXiv 2304.05977)."""

    def __init__(self, vision, text, head):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixel_values, input_ids, attention_mask):
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        words = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        reward = self.head(words.last_hidden_state[:, 0].float())[:, 0]
        return (reward - 0.16717362830052426) / 1.0333394966054072  # mean and deviation over the authors' set


def image_reward_from_state_dict(state_dict, vision_heads, text_heads):
    """ImageReward.pt's tensors -> module(pixel_values (N, 3, H, H), input_ids (N, L), attention_mask (N, L)):
    (N,) standardised rewards, about -2 to 2; fp32, in eval mode. The released model has 16 and 12 heads.
    KeyError or RuntimeError where weights are missing."""
    from transformers.models.blip.modeling_blip import BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextConfig, BlipTextModel

    image, words = part(state_dict, "blip.visual_encoder.", BLIP), part(state_dict, "blip.text_encoder.")
    words.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    vision = BlipVisionModel(BlipVisionConfig(**sizes(image, vision_heads), layer_norm_eps=1e-6))
    vision.load_state_dict(image)
    vocabulary, width = words["embeddings.word_embeddings.weight"].shape
    config = sizes(words, text_heads, "encoder.layer.", "intermediate.dense.weight") | {
        "vocab_size": vocabulary, "hidden_size": width, "encoder_hidden_size": vision.config.hidden_size,
        "max_position_embeddings": len(words["embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-12, "bos_token_id": None, "sep_token_id": None,
    }  # fmt: skip
    text = BlipTextModel(BlipTextConfig(**config), add_pooling_layer=False)
    text.load_state_dict(words)
    return ImageReward(vision, text, linear_chain(part(state_dict, "mlp.layers."))).eval()


def hps_pixels(images, size=224):
    """HPSv2's preprocessing: longer side to `size` (bicubic), black bars to a square, nothing cropped,
    normalised. PIL images -> (N, 3, size, size)."""
    squares = [Image.new("RGB", (size, size)) for _ in images]
    for canvas, image in zip(squares, images):
        shape = [max(1, round(s * size / max(image.size))) for s in image.size]
        small = image.convert("RGB").resize(shape, Image.Resampling.BICUBIC)
        canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return common.clip_pixels(squares, size)  # already that size: only normalises


# ------------------------------------------------- scorers: from files to compute(images, prompts) -> (N,)
def heads_of(*widths):
    """Attention heads of the layouts below: 64 channels each, but 80 in ViT-H's image encoder."""
    return [16 if width == 1280 else max(1, width // 64) for width in widths]


def load_clip(files, device, dtype, pixels=common.clip_pixels, scale=1):
    from transformers import AutoTokenizer, CLIPModel

    if "model" in files:
        model = CLIPModel.from_pretrained(files["model"])
    else:
        weights = read_weights(files["weights"])
        heads = heads_of(len(weights["visual.ln_pre.bias"]), len(weights["ln_final.bias"]))
        model = clip_from_open_clip(weights, *heads)
    tokenizer = AutoTokenizer.from_pretrained(files["processor"])
    model, config = model.to(dtype).to(device).eval(), model.config
    padded = {"padding": "max_length", "max_length": config.text_config.max_position_embeddings}

    def compute(images, prompts):
        ids = tokenizer(prompts, truncation=True, return_tensors="pt", **padded).input_ids.to(device)
        x = pixels(images, config.vision_config.image_size).to(device, dtype)
        result = model(pixel_values=x, input_ids=ids)
        return scale * F.cosine_similarity(result.image_embeds.float(), result.text_embeds.float())

    return compute


def load_aesthetic(files, device, dtype):
    from transformers import CLIPModel

    head = linear_chain(part(read_weights(files["weights"]), names=[(r"^layers\.", "")])).to(device)
    clip = CLIPModel.from_pretrained(files["clip"]).to(dtype).to(device).eval()

    def compute(images, prompts):
        x = common.clip_pixels(images, clip.config.vision_config.image_size).to(device, dtype)
        return head(F.normalize(clip.get_image_features(x).pooler_output.float(), dim=-1))[:, 0]

    return compute


def load_image_reward(files, device, dtype):
    from transformers import AutoTokenizer

    weights, tokenizer = read_weights(files["weights"]), AutoTokenizer.from_pretrained(files["tokenizer"])
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # as in training; [CLS] stays first
    widths = weights["blip.visual_encoder.cls_token"].shape[-1], weights["mlp.layers.0.weight"].shape[-1]
    model = image_reward_from_state_dict(weights, *heads_of(*widths)).to(device)
    model.vision.to(dtype), model.text.to(dtype)  # the head stays in fp32
    padded = {"padding": "max_length", "max_length": 35}

    def compute(images, prompts):
        words = tokenizer(prompts, truncation=True, return_tensors="pt", **padded).to(device)
        x = common.clip_pixels(images, model.vision.config.image_size).to(device, dtype)
        return model(x, words.input_ids, words.attention_mask)

    return compute


load_hps = partial(load_clip, pixels=hps_pixels, scale=100)
VIT_H, VIT_L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
V1 = "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"
V2 = ("https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"
      "sac+logos+ava1-l14-linearMSE.pth")  # fmt: skip
SCORERS = {  # name: (loader, its files, the unit)
    "pickscore": (lambda files, *where: common.load_reward(files["model"], files["processor"], *where),
                  {"model": "yuvalkirstain/PickScore_v1", "processor": VIT_H}, "exp(logit_scale) cosine"),
    "clip": (load_clip, {"model": VIT_H, "processor": VIT_H}, "cosine"),
    "hpsv2.0": (load_hps, {"weights": "xswu/HPSv2/HPS_v2_compressed.pt", "processor": VIT_H}, "100 cosine"),
    "hpsv2.1": (load_hps, {"weights": "xswu/HPSv2/HPS_v2.1_compressed.pt", "processor": VIT_H}, "100 cosine"),
    "aesthetic.v1": (load_aesthetic, {"weights": V1, "clip": VIT_L}, "about 1 to 10"),
    "aesthetic.v2": (load_aesthetic, {"weights": V2, "clip": VIT_L}, "about 1 to 10"),
    "imagereward": (load_image_reward, {"weights": "THUDM/ImageReward/ImageReward.pt",
                                        "tokenizer": "bert-base-uncased"}, "about -2 to 2"),
}  # fmt: skip


def read_weights(place):
    """A state dict from a local file, a https address or OWNER/REPOSITORY/FILE on the hub; pickles are read
    as tensors, never as code."""
    from huggingface_hub import hf_hub_download

    read = partial(torch.hub.load_state_dict_from_url, file_name=place.rpartition("/")[2])
    if not place.startswith("https:"):
        on_hub = re.fullmatch(r"\w[^/]*/[^/]+/[^/]+", place) and not Path(place).exists()
        read, place = torch.load, hf_hub_download(*place.rsplit("/", 1)) if on_hub else place
    weights = read(place, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def scorer_files(name, path=None):
    """{part: where} of a scorer: the published places, unless `path` says otherwise: its first part's file or
    hub id, a folder that holds all parts (weights under their published name), or a dict of parts."""
    files, first = dict(SCORERS[name][1]), next(iter(SCORERS[name][1]))
    given = dict(path) if isinstance(path, dict) else {first: path} if path else {}
    if unknown := set(given) - set(files):
        raise InputError(f"scorer {name} has no part {', '.join(unknown)}, only {', '.join(files)}")
    if first in given and Path(given[first]).is_dir():
        folder = Path(given.pop(first))
        files = {k: folder / v.rpartition("/")[2] if k == "weights" else folder for k, v in files.items()}
    return {k: shown(v) for k, v in (files | given).items()}


def shown(path):
    """A path as a reader of the report knows it: relative to the working folder where it is inside."""
    path = str(path)
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def load_scorer(name, path=None, device=None, dtype=None):
    """A scorer by its name in SCORERS, or any PATH.py:FUNCTION(images, prompts) -> N numbers. Returns
    score(images: N PIL, prompts: N texts, batch=32) -> (N,) fp32 on the CPU.

    path: see scorer_files. device, dtype: by default the GPU in fp16, or the CPU in fp32. InputError names
    what is unknown, cannot be loaded, raises an error, or gives numbers that are not finite.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        if not Path(file).is_file():
            raise InputError(f"judge {name}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"judge_{Path(file).stem}", file)
        try:
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        except Exception as error:
            raise InputError(f"judge {name} raises {named(error)}") from error
        if not callable(compute := getattr(module, function, None)):
            raise InputError(f"judge {name}: {file} has no function {function}")
    elif name in SCORERS:
        files = scorer_files(name, path)
        try:
            compute = SCORERS[name][0](files, device, dtype)
        except Exception as error:  # pickle, safetensors and the hub raise their own
            where = ", ".join(f"{k} {v}" for k, v in files.items())
            raise InputError(f"scorer {name} cannot be loaded ({where}): {first_line(error)}") from error
    else:
        raise InputError(f"unknown scorer {name}; known: {', '.join(SCORERS)}, PATH.py:FUNCTION")

    @torch.no_grad()
    def score(images, prompts, batch=32):
        values = [torch.empty(0)]
        for i in range(0, len(images), batch):
            some = [image.convert("RGB") for image in images[i : i + batch]]
            try:
                found = torch.as_tensor(compute(some, list(prompts[i : i + batch])))
            except Exception as error:  # a judge's own, or a full GPU
                raise InputError(f"scorer {name} raises {named(error)}") from error
            values.append(found.float().cpu().flatten())
        values, wanted = torch.cat(values), len(images)
        if not wanted == len(prompts) == len(values) or not values.isfinite().all():
            finite, texts = int(values.isfinite().sum()), len(prompts)
            raise InputError(f"scorer {name}: {finite} finite values for {wanted} images and {texts} prompts")
        return values

    return score


# ---------------------------------------------------------------------------------------------- generation
SCHEDULERS = {  # latents are not confined to [-1, 1]: never clip them, whatever a config's default
    "ddim": ("DDIMScheduler", {"clip_sample": False}), "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}  # fmt: skip
SAFE = {"use_safetensors": True, "low_cpu_mem_usage": False}  # True would need the package accelerate


def exchange(value):
    """Every rank's value, as one list that is the same on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values


def load_pipeline(model, scheduler, dtype, variant=None, revision=None, vae=None):
    """A stock Stable Diffusion pipeline on the CPU, all of it in one dtype. InputError if none loads."""
    import diffusers

    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        index = diffusers.DiffusionPipeline.load_config(model, revision=revision)
        more = off if "safety_checker" in index else {}  # it would blacken images that are to be judged
        more |= {"variant": variant, "revision": revision}
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **SAFE, **more)
        if vae:
            pipe.vae = diffusers.AutoencoderKL.from_pretrained(vae, **SAFE)
    except Exception as error:
        raise InputError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    pipe.watermark = None  # SDXL: else the pixels would depend on a package being installed
    kind, settings = SCHEDULERS[scheduler]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def load_unet(path, own):
    """The UNet of a folder, its unet/, or a hub repository's unet/, to stand in for `own`, in its dtype."""
    from diffusers import UNet2DConditionModel

    inside = "unet" if (Path(path) / "unet").is_dir() or not Path(path).exists() else None
    try:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder=inside, **SAFE)
    except Exception as error:
        raise InputError(f"--unet {path} cannot be loaded: {first_line(error)}") from error
    for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
        if (its := unet.config[key]) != (ours := own.config[key]):
            raise InputError(f"--unet {path} does not fit --model: its {key} is {its}, not {ours}")
    return unet.to(own.dtype)


def weights_hash(model):
    """A hash of a model's (or scheduler's) configuration and of every bit of its weights."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    config = {k: v for k, v in config.items() if not k.startswith("_")}  # a copy in another place is the same
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items() if isinstance(model, nn.Module) else ():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def generate(pipe, prompts, folder, place, title, *, images_per_prompt, seed, steps, cfg, batch_size):
    """Draw what is not in `folder` yet; returns the files, (P)(N). The ranks take batches in turn; a batch is
    drawn whole or not at all, so neither the number of GPUs nor a restart changes a bit of it."""
    files = [[folder / f"{i:05d}_{j}.png" for j in range(images_per_prompt)] for i in range(len(prompts))]
    jobs = [(i, j) for i in range(len(prompts)) for j in range(images_per_prompt)]
    batches = [jobs[k : k + batch_size] for k in range(0, len(jobs), batch_size)][place.rank :: place.world]
    missing = [b for b in batches if not all(files[i][j].exists() for i, j in b)]
    side = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, *([side, side] if isinstance(side, int) else side))
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(desc=title, total=sum(map(len, batches)), unit="image", disable=not place.main)
    bar.update(sum(map(len, batches)) - sum(map(len, missing)))
    if missing:
        pipe.to(place.device)
    for batch in missing:
        draws = [common.generator(seed, "image", i, j) for i, j in batch]  # start noise, then DDPM's own
        noise = torch.cat([torch.randn(shape, generator=g) for g in draws]).to(pipe.unet.dtype)
        images = pipe([prompts[i] for i, _ in batch], latents=noise, generator=draws,
                      num_inference_steps=steps, guidance_scale=cfg).images  # fmt: skip
        for (i, j), image in zip(batch, images):
            new = f"{files[i][j]}.{os.getpid()}"  # another process may be drawing the same
            image.save(new, "PNG", compress_level=1)  # a tenth larger, three times faster
            os.replace(new, files[i][j])
        bar.update(len(batch))
    bar.close()
    common.barrier()
    return files


def report(model, unets, prompts, out, *, images_per_prompt=1, seed=0, steps=20, cfg=2.0, scheduler="ddim",
           batch_size=32, judges=(), scorers=None, precision="fp32", variant=None, revision=None, vae=None,
           cache=None, median_by=None):  # fmt: skip
    """Compare UNets of one pipeline from the same noise; every rank calls it. It ends in `compare`.
    unets: {name: folder or hub id, or None for the model's own}; judges: PATH.py:FUNCTION; scorers: {name in
    SCORERS: see scorer_files}. Images are kept under cache/images (default: out/images)."""
    place, files, hashes = common.setup(), {}, {}
    wanted = check(dict.fromkeys(judges) | (scorers or {}), prompts, median_by, scheduler, precision)
    how = {"images_per_prompt": images_per_prompt, "seed": seed, "steps": steps, "cfg": cfg,
           "batch_size": batch_size}  # fmt: skip
    settings = how | {"scheduler": scheduler, "precision": precision, "device": place.device.type}
    libraries = {k: v for k, v in common.versions().items() if k != "commit"}
    pipe = load_pipeline(str(model), scheduler, DTYPES[precision], variant, revision, vae)
    own, shared = pipe.unet, [p for k, p in pipe.components.items() if hasattr(p, "config") and k != "unet"]
    shared = [weights_hash(p) for p in shared] if place.main else None  # rank 0 alone hashes, and these once
    for name, path in unets.items():
        pipe.unet = load_unet(str(path), own) if path else own
        if place.main:
            key = json.dumps([weights_hash(pipe.unet), shared, settings, libraries, prompts], sort_keys=True)
            hashes[name] = hashlib.sha256(key.encode()).hexdigest()[:16]
        hashes[name] = common.agree(hashes.get(name))
        folder = Path(cache or out) / "images" / hashes[name]
        files[name] = generate(pipe, prompts, folder, place, name, **how)
    settings |= {"model": shown(model), "variant": variant, "revision": revision, "vae": vae,
                 "unets": {k: v and shown(v) for k, v in unets.items()}, "images": hashes}  # fmt: skip
    del pipe, own  # the scorers need the memory
    return compare(files, prompts, out, wanted, settings, batch_size, median_by)


# ---------------------------------------------------------------------------------------- scores and pictures
def check(wanted, prompts, median_by=None, scheduler="ddim", precision="fp32"):
    """What can be known before hours of work: unknown names, missing judges, no prompts. Returns `wanted`."""
    if not prompts:
        raise InputError("there are no prompts: --prompts gave none")
    for name, path in wanted.items():
        scorer_files(name, path) if name in SCORERS else load_scorer(name)
    names = [name.rpartition(":")[2] for name in wanted]
    if len(set(names)) < len(names):
        raise InputError(f"two judges have one name: {', '.join(names)}")
    known = {"scheduler": SCHEDULERS, "precision": DTYPES, "median_by": names if median_by else [median_by]}
    for key, value in {"scheduler": scheduler, "precision": precision, "median_by": median_by}.items():
        if value not in known[key]:
            raise InputError(f"--{key} {value} is not one of {', '.join(known[key])}")
    return wanted


def score_files(score, files, prompts, place, title, batch):
    """Scores (P, N) of image files (P)(N), the ranks taking batches in turn."""
    jobs = [(file, prompt) for row, prompt in zip(files, prompts) for file in row]
    starts, mine = range(0, len(jobs), batch), {}
    for start in tqdm(starts[place.rank :: place.world], title, unit="batch", disable=not place.main):
        some, texts = zip(*jobs[start : start + batch])
        images = [common.decode_image(file.read_bytes()) for file in some]
        if None in images:
            raise InputError(f"{some[images.index(None)]} does not decode as an image")
        mine[start] = score(images, texts, batch)
    whole = {k: v for theirs in exchange(mine) for k, v in theirs.items()}
    values = torch.cat([whole[start] for start in starts]).tolist()
    return np.array([float(f"{v:.7g}") for v in values]).reshape(len(prompts), -1)  # fp32's digits


def compare(files, prompts, out, wanted, settings, batch=32, median_by=None):
    """Score images and write scores.json, scores.md, samples.png, winrate.png to `out`; every rank calls it.

    files: {model: image files (P)(N), paired across models}; wanted: {scorer: see scorer_files}; one that
    cannot be loaded is left out, and named. median_by: a scorer; per prompt and model only the image of its
    median score (the lower of two) counts: arXiv 2510.18353's rule. Returns what scores.json holds.
    """
    place, out, about, left_out, scores = common.setup(), Path(out), {}, {}, {}
    for name, path in wanted.items():
        problem, short = None, name.rpartition(":")[2]
        try:
            score = load_scorer(name, path, place.device)
        except InputError as error:
            problem = str(error)
        if problem := next(filter(None, exchange(problem)), None):  # one rank's trouble is everybody's
            left_out[name] = problem
            continue
        about[short] = {"judge": shown(name)}
        if name in SCORERS:
            about[short] = {"unit": SCORERS[name][2], **scorer_files(name, path)}
        scores[short] = {model: score_files(score, table, prompts, place, f"{short}, {model}", batch)
                         for model, table in files.items()}  # fmt: skip
    if wanted and not scores:
        raise InputError("no scorer is left: " + "; ".join(left_out.values()))
    counted = scores
    if median_by:
        if median_by not in scores:
            raise InputError(f"--median_by {median_by} did not run: {left_out[median_by]}")
        middle = {m: np.argsort(s, 1, "stable")[:, (s.shape[1] - 1) // 2, None]
                  for m, s in scores[median_by].items()}  # fmt: skip
        counted = {k: {m: np.take_along_axis(s, middle[m], 1) for m, s in of.items()}
                   for k, of in scores.items()}  # fmt: skip
    result = {
        "settings": settings | {"prompt_count": len(prompts), "median_by": median_by},
        "versions": common.versions(), "scorers": about, "left_out": left_out,
        "summary": {k: {m: summary(s) for m, s in of.items()} for k, of in counted.items()},
        "win_rates": {k: {a: {b: win_rate(of[a], of[b]) for b in of if b != a} for a in of}
                      for k, of in counted.items()},
        "prompts": prompts, "scores": {k: {m: s.tolist() for m, s in of.items()} for k, of in scores.items()},
    }  # fmt: skip
    if place.main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scores.md").write_text(table := markdown(result))
        draw_samples(files, prompts, out / "samples.png", scores=next(iter(scores.items()), None))
        if len(files) > 1 and scores:
            lines = [(f"{k}: {b} over {a}", w[b][a])
                     for k, w in result["win_rates"].items() for a, b in combinations(w, 2)]  # fmt: skip
            draw_win_rates(lines, f"{len(prompts)} prompts", out / "winrate.png")
        (out / "scores.json.new").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(out / "scores.json.new", out / "scores.json")  # last: where it stands, the report is whole
        print(f"\n{table}\nwrote {out}/scores.json, scores.md, samples.png, winrate.png", flush=True)
    common.barrier()
    return result


def summary(scores):
    """Over (P, N) scores; the standard error is that of the mean over prompts."""
    error = scores.mean(1).std(ddof=len(scores) > 1) / len(scores) ** 0.5
    return {"mean": scores.mean(), "standard_error": error, "median": np.median(scores)}


def markdown(result):
    """The report as a Markdown table, what its numbers are, and how they were made."""
    lines = ["| scorer | model | mean ± s.e. | median | against | win rate (95 %) | ties |", "|---" * 7 + "|"]
    for scorer, models in result["summary"].items():
        for i, (model, s) in enumerate(models.items()):
            row = f"| {scorer} | {model} | {s['mean']:.4f} ± {s['standard_error']:.4f} | {s['median']:.4f} |"
            for other in list(models)[:i] or [None]:
                w = result["win_rates"][scorer][model].get(other)
                lines.append(row + (f" {other} | {percents(w)} | {w['tie']:.1%} |" if w else " | | |"))
                row = f"| {scorer} | {model} | | |"
    lines.append("")
    lines += [f"- {k}: {', '.join(dict.fromkeys(about.values()))}" for k, about in result["scorers"].items()]
    lines += [f"- left out: {problem}" for problem in result["left_out"].values()]
    how = (f"{k} {v}" for k, v in result["settings"].items() if v is not None and not isinstance(v, dict))
    return "\n".join([*lines, f"- {', '.join(how)}, commit {result['versions']['commit']}", ""])


def percents(w):
    return f"{w['win']:.1%} ({w['low']:.1%} to {w['high']:.1%})"


def write(draw, xy, text, size=15, width=None, anchor="la"):
    """Text on a picture, cut to `width` px."""
    font = ImageFont.load_default(size)
    while width and draw.textlength(text, font) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…"
    draw.text(xy, text, "black", font, anchor)


def draw_samples(files, prompts, path, rows=5, scores=None):
    """A column a model, the same seeds, the caption below; as many such blocks as fit side by side. scores:
    (scorer, {model: (P, N)}), whose value stands below each image."""
    size = Image.open(next(iter(files.values()))[0][0]).size
    scale = 256 / max(size) if max(size) > 160 else 160 // max(size)  # pixels of small images stay whole
    kind = Image.Resampling.NEAREST if max(size) <= 160 else Image.Resampling.LANCZOS
    w, h = (round(s * scale) for s in size)
    block, line = (w + 6) * len(files) + 18, h + 54
    across = max(1, min(1200 // block, -(-len(prompts) // rows)))
    count = min(len(prompts), across * rows)
    sheet = Image.new("RGB", (across * block + 6, 50 + -(-count // across) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for k in range(count):
        x, y = k % across * block + 12, k // across * line + 30
        for model, table in files.items():
            sheet.paste(Image.open(table[k][0]).convert("RGB").resize((w, h), kind), (x, y))
            if k < across:
                write(draw, (x + w / 2, 15), model, 16, w, "mm")
            if scores:
                write(draw, (x + w / 2, y + h + 3), f"{scores[1][model][k, 0]:.3g}", 13, w, "ma")
            x += w + 6
        write(draw, (k % across * block + 12, y + h + 20), prompts[k], 15, block - 18)
    if scores:
        write(draw, (12, sheet.height - 24), f"Below each image: {scores[0]}, higher is better.", 14)
    sheet.save(path)


def draw_win_rates(rows, over, path):
    """A line for each (title, what win_rate returns): the win rate (dot), its 95 % interval (bar), against
    50 %. over: what was bootstrapped."""
    left, right, top, step = 340, 840, 50, 34
    bottom = top + step * len(rows)
    draw = ImageDraw.Draw(picture := Image.new("RGB", (1110, bottom + 60), "white"))
    for percent in range(0, 101, 25):
        x = left + (right - left) * percent / 100
        draw.line((x, top - 10, x, bottom), *(("black", 2) if percent == 50 else ("#d8d8d8", 1)))
        write(draw, (x, top - 24), f"{percent} %", anchor="mm")
    for i, (title, w) in enumerate(rows):
        y = top + step * (i + 0.5)
        low, dot, high = (left + (right - left) * w[k] for k in ("low", "win", "high"))
        colour = "#1a7f37" if w["low"] > 0.5 else "#c93c37" if w["high"] < 0.5 else "#6e7781"
        draw.line((low, y, high, y), colour, 5)
        draw.ellipse((dot - 7, y - 7, dot + 7, y + 7), colour)
        write(draw, (left - 20, y), title, 16, left - 30, "rm")
        write(draw, (right + 20, y), f"{percents(w)}, ties {w['tie']:.1%}", anchor="lm")
    note = f"Win rate, a tie counts half; 95 % bootstrap interval over {over}. "
    write(draw, (20, bottom + 24), note + "Green: better than 50 %, red: worse, grey: not told apart.")
    picture.save(path)


# -------------------------------------------------------------------------------------------- command line
@dataclass
class Config:
    preset: str = flag("tiny", "settings to start from: tiny, sd15 or sdxl; any other flag overrides them")
    model: str = flag("", "diffusers folder or hub id of a Stable Diffusion pipeline")
    variant: str | None = flag(None, "weight files to load from it, e.g. fp16")
    revision: str | None = flag(None, "hub revision to load")
    vae: str | None = flag(None, "another VAE, e.g. the fp16 fix for SDXL")
    unet: list[str] | None = flag(None, "UNets to compare, (NAME=)FOLDER or hub id; default: all runs/*")
    prompts: list[str] | None = flag(None, ".txt (one a line), .json (a list), .parquet or hub ID(:SPLIT)")
    prompt_column: str = flag("caption", "where the prompt is in a data set's rows or a JSON list's objects")
    max_prompts: int | None = flag(None, "use only the first prompts")
    images: list[str] | None = flag(None, "score these folders' images, numbered in the order of --prompts")
    data: str | None = flag(None, "score this pair set, with one scorer, into --scores_out")
    scores_out: str | None = flag(None, "scores file to write: what smpo.py and dro.py read with --scores")
    scorers: str = flag("pickscore", f"{','.join(SCORERS)},PATH.py:FUNCTION; each as NAME or NAME=PATH")
    scorer_paths: list[str] | None = flag(None, "NAME=PATH or NAME.PART=PATH: files not to take from the hub")
    images_per_prompt: int = flag(1, "images per prompt and model, each from its own noise")
    median_by: str | None = flag(None, "a scorer: per prompt only the image of its median score counts")
    scheduler: str = flag("ddim", "ddim, ddpm or dpm (DPM-Solver++)")
    steps: int = flag(50, "sampling steps")
    cfg: float = flag(7.5, "guidance scale")
    seed: int = flag(0, "fixes, with the prompt's and the image's number, all noise of an image")
    micro_batch: int = flag(16, "images per GPU at once; images are the same to the bit where it is the same")
    precision: str = flag("fp16", "of the pipeline: fp32, bf16 or fp16; scorers use fp16 on a GPU")
    out: str = flag("runs/eval", "folder for the report")
    cache: str | None = flag(None, "folder whose images/ keeps what is drawn; default: --out")
    resume: bool = flag(False, "write into an --out that holds a report; its images are used again")
    overwrite: bool = flag(False, "the same: images cannot be stale, only the report is replaced")


WORLD = common.tiny("")
PRESETS = {
    "tiny": {  # as training's reports: what they have drawn is then not drawn again
        "model": WORLD["model"], "prompts": [WORLD["prompts"]], "images_per_prompt": 2, "micro_batch": 32,
        "scorers": f"{WORLD['judge']},pickscore={TINY / 'reward'}", "steps": WORLD["eval_steps"],
        "cfg": WORLD["cfg"], "precision": "fp32", "cache": WORLD["cache"],
    },
    "sd15": {"images_per_prompt": 5, "scheduler": "ddpm", "median_by": "pickscore"},  # arXiv 2510.18353
    "sdxl": {"cfg": 5.0, "micro_batch": 4, "vae": "madebyollin/sdxl-vae-fp16-fix"},
}  # fmt: skip


def read_prompts(place, column):
    """Prompts of a .txt file, a .json list (of texts, or of objects with `column`), a .parquet file or
    pattern, or a hub id with or without :SPLIT."""
    try:
        if place.endswith(".txt"):
            rows = [line.strip() for line in Path(place).read_text().splitlines() if line.strip()]
        elif place.endswith(".json"):
            rows = json.loads(Path(place).read_text())
        else:
            from datasets import load_dataset

            name, _, split = place.partition(":")
            files = {"path": "parquet", "data_files": place} if place.endswith(".parquet") else {"path": name}
            rows = load_dataset(**files, split=split or "train", streaming=True).select_columns(column)
        prompts = [row if isinstance(row, str) else row[column] for row in rows]
    except Exception as error:  # datasets raises its own errors, pyarrow's and the hub's
        raise InputError(f"--prompts {place} cannot be read ({column}): {first_line(error)}") from error
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"--prompts {place}: not every {column} is text")
    return prompts


def read_images(folder, prompts):
    """A folder's image files, (P)(N), in the order of the numbers in their names: N for each of P prompts."""
    found = [f for f in Path(folder).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    found.sort(key=lambda f: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", f.name)])
    if not found or len(found) % len(prompts):
        raise InputError(f"--images {folder}: {len(found)} images do not divide among {len(prompts)} prompts")
    many = len(found) // len(prompts)
    return [found[i : i + many] for i in range(0, len(found), many)]


def wanted_scorers(names, paths):
    """--scorers and --scorer_paths -> {name: {part: path}}."""
    names = [item.strip() for item in names.split(",")]
    wanted = {name if ".py:" in name else name.partition("=")[0]: {} for name in names}
    for item in [name for name in names if "=" in name and ".py:" not in name] + (paths or []):
        key, _, path = item.partition("=")
        name, part = (key, next(iter(SCORERS[key][1]))) if key in SCORERS else key.rpartition(".")[::2]
        if name not in SCORERS or not path:
            raise InputError(f"{item} is not NAME=PATH or NAME.PART=PATH with a NAME of {', '.join(SCORERS)}")
        wanted.get(name, {})[part] = path
    return wanted


def unet_names(unets):
    """The model's own UNet as "start", then runs/smpo/unet as "smpo"; NAME=FOLDER names one."""
    named = {"start": None}
    for item in unets:
        name, _, path = item.rpartition("=")
        name = name or Path(path.removesuffix("/unet")).name
        named[path if name in named else name] = path
    return named


def runs_of(model):
    """The UNets of the finished runs under runs/ that started from this model."""
    folders = [file.parent for file in sorted(Path("runs").glob("*/config.json"))
               if json.loads(file.read_text()).get("model") == model]  # fmt: skip
    return [str(folder / "unet") for folder in folders if (folder / "unet").is_dir()]


def main(argv=None):
    cfg, place = common.parse(Config, PRESETS, argv), common.setup()
    wanted, out = wanted_scorers(cfg.scorers, cfg.scorer_paths), Path(cfg.out)
    result = Path(cfg.scores_out) if cfg.scores_out else out / "scores.json"
    if result.exists() and not (cfg.resume or cfg.overwrite):
        raise InputError(f"{result} exists: --overwrite replaces it, another name keeps both")
    common.barrier()  # nobody writes before all have looked
    if cfg.data or cfg.scores_out:
        if not (cfg.data and cfg.scores_out and len(wanted) == 1):
            raise InputError("to score a pair set give --data, --scores_out and one of --scorers")
        name, path = next(iter(wanted.items()))
        score = load_scorer(name, path, place.device)
        if place.main:
            result.unlink(missing_ok=True)
            result.parent.mkdir(parents=True, exist_ok=True)
        common.barrier()
        unit = SCORERS[name][2] if name in SCORERS else "the judge's"
        common.score_pairs(cfg.data, score, result, shown(name), unit, cfg.micro_batch, place=place)
        return
    prompts = [p for source in cfg.prompts or () for p in read_prompts(source, cfg.prompt_column)]
    prompts = prompts[: cfg.max_prompts]
    check(wanted, prompts, cfg.median_by, cfg.scheduler, cfg.precision)
    if cfg.images:
        files = {Path(folder).name: read_images(folder, prompts) for folder in cfg.images}
        if len(files) < len(cfg.images) or len({len(f[0]) for f in files.values()}) > 1:
            raise InputError("--images: the folders need different names and equally many images")
        settings = {"images": [shown(folder) for folder in cfg.images]}
        compare(files, prompts, out, wanted, settings, cfg.micro_batch, cfg.median_by)
        return
    if not cfg.model:
        raise InputError("--model is missing")
    unets = unet_names(runs_of(cfg.model) if cfg.unet is None else cfg.unet)
    same = ["images_per_prompt", "seed", "steps", "cfg", "scheduler", "precision", "variant", "revision"]
    more = {name: getattr(cfg, name) for name in [*same, "vae", "median_by", "cache"]}
    report(cfg.model, unets, prompts, out, batch_size=cfg.micro_batch, scorers=wanted, **more)


if __name__ == "__main__":
    common.launch(main)
