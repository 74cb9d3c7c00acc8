"""What is true of fine-tuning any latent diffusion model, and nothing of a particular method: noise and
ReNoise inversion, models, data, and training that can be trusted. It speaks of images 0 and 1 of a row; who
wins is the method file's business.

    notation   x0 clean latent | xt noised latent | eps noise | alpha_bar (T,) cumulative product of 1 - beta
               N images, B rows of a micro-batch; tensors (N, C, h, w), all images 0, then all images 1
"""

import copy
import dataclasses
import glob
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

TINY = Path(__file__).parent / "tests" / "tiny"


class InputError(Exception):
    """Something the user gave is wrong: `launch` prints the message as one line and exits with code 2."""


class Stopped(Exception):
    """Someone asked the run to stop, and everything is saved: `launch` exits with code 130, as for Ctrl-C."""


# ---------------------------------------------------------------------------------------- noise and inversion
def _at(alpha_bar, t, like):
    """alpha_bar at the timesteps t (N,), shaped (N, 1, 1, 1) to multiply `like`. alpha_bar stays in fp32: in
    half precision 1 - alpha_bar is 15 % off at t = 0."""
    return alpha_bar.to(t.device)[t].to(like.device, torch.float32).view(-1, 1, 1, 1)


def add_noise(x0, eps, t, alpha_bar):
    """sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps (arXiv 2006.11239, Eq. 4); t (N,) long in [0, T)."""
    ab = _at(alpha_bar, t, x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def renoise_invert(eps_fn, x0, t, alpha_bar, steps, renoise=1, landing="t", ask="end"):
    """Find the noise of x0 instead of drawing it: few-step DDIM inversion with ReNoise (arXiv 2403.14602).

    Level by level the latent is carried from clean (alpha_bar = 1) up the grid k T // steps, k = 1, 2, ...,
    as long as that is below t, then once more: exactly to t (landing="t"), or a whole grid step, to the first
    grid level at or above t (landing="grid"; the released code's behaviour, cleaned). Both take
    max(1, ceil(t steps / T)) steps of 1 + renoise network calls. ask: the level that the network is told in a
    step, the one it goes to ("end": ReNoise) or the one it comes from ("start": the released code).

    eps_fn(x (n, C, h, w), t (n,), rows (n,)) -> eps (n, C, h, w); rows tells which samples of the batch these
    are: one that has arrived is not computed further. t: (N,) long, each sample its own, on the CPU to avoid
    a sync. Returns (xt, eps), with the eps that takes x0 to xt if xt were at level t:
    eps = (xt - sqrt(ab_t) x0) / sqrt(1 - ab_t).
    """
    T, t = len(alpha_bar), t.cpu()
    count = torch.clamp(torch.ceil(t * steps / T).long(), min=1)  # inversion steps of each sample
    last = t if landing == "t" else torch.clamp(count * T // steps, max=T - 1)
    levels, at = torch.cat([alpha_bar.cpu(), torch.ones(1)]), torch.full_like(t, -1)  # -1: clean
    x = x0.clone()
    for k in range(1, int(count.max()) + 1):
        rows = (count >= k).nonzero()[:, 0]
        level = torch.where(count[rows] == k, last[rows], k * T // steps)  # the level this step goes up to
        ab_from, ab_to = _at(levels, at[rows], x0), _at(levels, level, x0)
        told = level if ask == "end" else at[rows].clamp(min=0)
        here, told = rows.to(x0.device), told.to(x0.device)
        xs = x[here]
        # DDIM upwards needs eps at the level it has not reached yet. ReNoise: guess it with the latent at
        # hand, step, ask again up there, and take the average.
        eps = eps_fn(xs, told, here)
        for i in range(renoise):
            up = _ddim(xs, eps, ab_from, ab_to)
            guess = eps_fn(up, told, here)
            eps = eps + (guess - eps) / (i + 2)  # the running mean of all guesses
        x[here], at[rows] = _ddim(xs, eps, ab_from, ab_to), level
    ab_t = _at(alpha_bar, t, x0)
    return x, (x - ab_t.sqrt() * x0) / (1 - ab_t).sqrt()


def predicted_x0(xt, eps, t, alpha_bar):
    """The clean latent that eps would have led to xt from: add_noise, solved for x0."""
    ab = _at(alpha_bar, t, xt)
    return (xt - (1 - ab).sqrt() * eps) / ab.sqrt()


def _ddim(x, eps, ab_from, ab_to):
    """A deterministic DDIM step between any two levels (arXiv 2010.02502, Eq. 12 with sigma = 0)."""
    x0 = (x - (1 - ab_from).sqrt() * eps) / ab_from.sqrt()
    return ab_to.sqrt() * x0 + (1 - ab_to).sqrt() * eps


# --------------------------------------------------------------------------------------------- command line
RANGES = {
    ">0": lambda x: 0 < x < math.inf, ">=0": lambda x: 0 <= x < math.inf,
    "0..1": lambda x: 0 <= x <= 1, "0..<1": lambda x: 0 <= x < 1,
}  # fmt: skip


def flag(default, text, range=None):
    """A Config field: its default, the text of --help (% is doubled for argparse), and which of RANGES its
    value has to be in: --help shows that too, and `check` refuses other values."""
    more = {"metavar": range} if range else {}
    return dataclasses.field(default=default, metadata={"help": text.replace("%", "%%"), **more})


@dataclass
class TrainConfig:
    """The flags all method files share. Their own follow in their Config, the recipes in their PRESETS."""

    preset: str = flag("tiny", "recipe to start from: tiny, sd15 or sdxl; any other flag overrides it")
    model: str = flag("", "diffusers folder or hub id of a Stable Diffusion 1.x, 2.x or XL pipeline")
    variant: str | None = flag(None, "weight files to load from it, e.g. fp16")
    revision: str | None = flag(None, "hub revision to load")
    vae: str | None = flag(None, "another VAE, e.g. the fp16 fix for SDXL")
    unet: str | None = flag(None, "start AND reference UNet, if not the model's own (e.g. runs/sft/unet)")
    data: str = flag("", "a parquet file, a folder of them, an image folder with metadata.jsonl, or a hub id")
    out: str = flag("", "folder for everything the run writes")
    steps: int = flag(0, "optimizer steps", ">0")
    batch: int = flag(0, "rows (pairs) per optimizer step, over all GPUs", ">0")
    micro_batch: int = flag(0, "rows per GPU per forward; the gradient accumulation follows from it", ">0")
    optimizer: Literal["adamw", "adafactor"] = flag("adamw", "adafactor: hardly any state to keep")
    lr: float = flag(0.0, "peak learning rate, used as it is: nothing scales it", ">0")
    warmup: int = flag(0, "optimizer steps of linear warm-up, then constant", ">=0")
    clip: float = flag(1.0, "largest gradient norm; 0 does not clip", ">=0")
    weight_decay: float = flag(0.01, "decoupled weight decay", ">=0")
    ema: float = flag(0.0, "decay of averaged weights, which are then what is written; 0: none", "0..<1")
    caption_dropout: float = flag(0.0, "share of rows without their caption (keeps guidance working)", "0..1")
    flip: bool = flag(False, "mirror half of the rows")
    resolution: int = flag(512, "side of the square the images are resized and cropped to, in px", ">0")
    seed: int = flag(0, "fixes every random draw, whatever the number of GPUs")
    precision: str = flag("fp32", "autocast to fp32, bf16 or fp16; the trained weights are fp32 in any case")
    checkpointing: bool = flag(False, "gradient checkpointing: a third more compute for much less memory")
    compile: bool = flag(False, "torch.compile the UNets")
    channels_last: bool = flag(False, "convolutions in channels-last memory order; faster on some GPUs")
    workers: int = flag(0, "processes (cache: threads) that decode images; 0: the main process", ">=0")
    cache: str | None = flag(None, "compute latents and caption embeddings once and keep them in this folder")
    save_every: int = flag(500, "steps between checkpoints for --resume", ">0")
    keep_every: int = flag(0, "steps between UNets to keep, in unet-STEP/; 0 keeps the last alone", ">=0")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    overwrite: bool = flag(False, "start over in an --out that holds a run")
    eval_prompts: int = flag(0, "images a model in the closing report, start against trained; 0: none", ">=0")
    prompts: str = flag("", "text file of the report's prompts, one a line")
    judge: str | None = flag(None, "PATH.py:FUNCTION(images, prompts) -> scores; the report's exact judge")
    eval_steps: int = flag(50, "sampling steps of the report", ">0")
    cfg: float = flag(7.5, "guidance scale of the report", ">=0")


@dataclass
class RewardConfig(TrainConfig):
    """With the flags of the methods that ask a reward model about a set of pairs: see `open_scores`."""

    reward: str = flag("yuvalkirstain/PickScore_v1", "reward model in PickScore's layout: folder or hub id")
    reward_processor: str | None = flag(None, "where its tokenizer and image settings are, if elsewhere")
    scores: str | None = flag(None, "scores file to use instead of --reward (eval.py --scores_out makes one)")


def tiny(name):
    """The tiny world's paths and settings, the first part of every method's tiny preset."""
    return {
        "model": str(TINY / "model"), "data": str(TINY / "pairs" / "train.parquet"), "out": f"runs/{name}",
        "resolution": 64, "cache": "runs/cache", "save_every": 50,
        "eval_prompts": 256, "prompts": str(TINY / "prompts" / "test.txt"), "eval_steps": 20, "cfg": 2.0,
        "judge": f"{TINY / 'world.py'}:gold_score",
    }  # fmt: skip


def parse(Config, presets, argv=None):
    """The command line -> a Config: the preset's values over the defaults, explicit flags over both. An
    unknown flag is argparse's error (exit code 2). --help shows the preset's values."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Config, allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else argv
    preset = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].preset
    if preset not in presets:
        raise InputError(f"--preset {preset} is not one of {', '.join(presets)}")
    parser.set_defaults(**presets[preset])
    return Config(**vars(parser.parse_args(argv)))


def launch(main):
    """Run a script: quiet libraries; one line and exit code 2 for bad input and a disk that refuses; SIGTERM
    as Ctrl-C; the process group closed at the end."""
    from datasets.utils import logging as datasets_log
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    for log in (datasets_log, diffusers_log, transformers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as why:
        print(str(why) or "interrupted: what was finished is kept, --resume goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------- distributed
@dataclass
class Place:
    """Where this process stands among those torchrun started (alone without torchrun)."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self):
        return self.rank == 0


def setup():
    """Join the process group if torchrun started this process (nccl with GPUs, gloo without): a Place."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" not in os.environ:
        return Place(device=device)
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun keeps one store over all restarts, and in it
            # the dead workers' addresses; on several nodes the restart counts may differ
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        # one day: ranks wait for each other where one goes through a set that is larger than memory
        more = {"store": store, "rank": rank, "world_size": world, "timeout": timedelta(days=1)}
        dist.init_process_group("nccl" if cuda else "gloo", **more)
    return Place(dist.get_rank(), dist.get_world_size(), device)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def agree(flag):
    """The main process's answer to a question about the disk, once all have got here."""
    answer = [flag]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def versions():
    """Library versions and the git commit ("+" where files differ from it), for config.json and reports."""
    import diffusers
    import transformers

    def git(*words):
        answer = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    return {
        "commit": commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "python": sys.version.split()[0],
        **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }


def generator(*key):
    """A CPU generator that depends on the key's values alone, e.g. (seed, "sample", index)."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# ---------------------------------------------------------------------------------------------------- models
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Models:
    """A pipeline's parts, frozen but for the UNet, and the few lines that hide which Stable Diffusion it is.

    unet: fp32, trainable. alpha_bar: (T,) fp32 on the CPU. calls: this step's UNet sample-forwards.
    InputError if cfg.model is no Stable Diffusion 1.x, 2.x or XL pipeline, or a part of it cannot be loaded.
    """

    def __init__(self, cfg, device):
        from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        if cfg.precision not in DTYPES:
            raise InputError(f"--precision {cfg.precision} is not one of {', '.join(DTYPES)}")
        self.device, self.dtype, self.calls = device, DTYPES[cfg.precision], 0
        try:
            index = DiffusionPipeline.load_config(cfg.model, revision=cfg.revision)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {cfg.model} is no diffusers pipeline (no model_index.json)") from error
        kind = index["_class_name"]
        if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            raise InputError(f"--model {cfg.model} is a {kind}, not Stable Diffusion 1.x, 2.x or XL")
        xl = kind == "StableDiffusionXLPipeline"

        def part(loader, name, other=None):  # a part of the pipeline, or of another place
            more = {} if loader in (AutoTokenizer, DDPMScheduler) else {"use_safetensors": True}
            if not other:
                more |= {"subfolder": name, "revision": cfg.revision}
                more |= {"variant": cfg.variant} if "use_safetensors" in more else {}
            more |= {"low_cpu_mem_usage": False} if loader in (AutoencoderKL, UNet2DConditionModel) else {}
            try:
                loaded = loader.from_pretrained(other or cfg.model, **more)
            except Exception as error:  # safetensors and the hub raise their own
                raise InputError(f"no {name} in {other or cfg.model}: {first_line(error)}") from error
            weights = loaded.parameters() if isinstance(loaded, torch.nn.Module) else ()
            if not all(p.isfinite().all() for p in weights):
                raise InputError(f"the {name} of {other or cfg.model} has weights that are not finite")
            return loaded

        self.unet = part(UNet2DConditionModel, "unet", cfg.unet).float().to(device)
        if cfg.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        vae = part(AutoencoderKL, "vae", cfg.vae)
        # SDXL's own VAE overflows in half precision, and says so; the fp16 fix (--vae) does not
        self.vae = vae.to(torch.float32 if xl and vae.config.force_upcast else self.dtype).to(device)
        encoders = [(CLIPTextModel, "")] + [(CLIPTextModelWithProjection, "_2")] * xl
        self.encoders = [part(load, "text_encoder" + s).to(self.dtype).to(device) for load, s in encoders]
        self.tokenizers = [part(AutoTokenizer, "tokenizer" + s) for _, s in encoders]
        for frozen in (self.vae, *self.encoders):
            frozen.requires_grad_(False).eval()
        for name, its, ours in (
            ("in_channels", self.unet.config.in_channels, vae.config.latent_channels),
            ("cross_attention_dim", self.unet.config.cross_attention_dim,
             sum(encoder.config.hidden_size for encoder in self.encoders)),
            ("addition_embed_type", self.unet.config.addition_embed_type, "text_time" if xl else None),
        ):  # fmt: skip
            if its != ours:
                where = f"--unet {cfg.unet}" if cfg.unet else f"the unet of {cfg.model}"
                raise InputError(f"{where} does not fit --model: its {name} is {its}, not {ours}")
        scheduler = part(DDPMScheduler, "scheduler")
        self.alpha_bar, self.prediction = scheduler.alphas_cumprod.float(), scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"--model {cfg.model} predicts {self.prediction}, not epsilon or v_prediction")
        # what the pipeline puts in place of an empty prompt when it guides: a dropped caption must look alike
        self.zero_empty = xl and index.get("force_zeros_for_empty_prompt", True)

    @torch.no_grad()
    def encode_images(self, pixels):
        """(N, 3, H, W) in [-1, 1] -> latents (N, 4, H/8, W/8), fp32: the mode of the VAE's posterior. A
        sample would differ by a spread far below that of the noise the latents are trained with."""
        z = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (z - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, captions):
        """n captions -> {"encoder_hidden_states": (n, L, D)}, with SDXL also {"text_embeds": (n, P)}."""
        hidden, xl = [], len(self.encoders) == 2
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = tokenizer(
                captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)  # fmt: skip
            out = encoder(ids, output_hidden_states=xl)
            hidden.append(out.hidden_states[-2] if xl else out.last_hidden_state)
        cond = {"encoder_hidden_states": torch.cat(hidden, -1)} | (
            {"text_embeds": out.text_embeds} if xl else {}
        )
        if self.zero_empty:
            keep = torch.tensor([float(c != "") for c in captions]).to(self.device, self.dtype)
            cond = {k: v * keep.view(-1, *[1] * (v.dim() - 1)) for k, v in cond.items()}
        return cond

    def encode(self, batch):
        """A batch of B rows with K images each -> (x0 (N = K B, 4, h, w): all images 0, then all images 1;
        condition: dict of (N, ...) tensors). What comes from the cache is encoded already."""

        def images_first(x):  # (B, K, ...) -> (K B, ...)
            return x.transpose(0, 1).flatten(0, 1).to(self.device, non_blocking=True)

        cached, x = "encoder_hidden_states" in batch, images_first(batch["image"])
        names = ("encoder_hidden_states", "text_embeds")
        cond = {k: batch[k] for k in names if k in batch} if cached else self.encode_prompts(batch["caption"])
        images = batch["image"].shape[1]
        cond = {k: v.to(self.device).repeat(images, *[1] * (v.dim() - 1)) for k, v in cond.items()}
        if "text_embeds" in cond:  # SDXL is told each image's size and crop
            cond["time_ids"] = images_first(batch["size"])
        return x.float() if cached else self.encode_images(x), cond

    def predict(self, unet, xt, t, cond):
        """The UNet's own output for xt (N, 4, h, w) at t (N,), fp32, under the run's autocast."""
        self.calls += len(xt)
        added = {k: v for k, v in cond.items() if k != "encoder_hidden_states"} or None
        # an autocast region a call: a longer one would reuse weights cast under no_grad, without gradient
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = unet(xt, t.to(xt.device), cond["encoder_hidden_states"], added_cond_kwargs=added)
        return out.sample.float()

    def predict_eps(self, unet, xt, t, cond):
        """`predict` as noise: eps = sqrt(ab) v + sqrt(1 - ab) xt (arXiv 2202.00512)."""
        out = self.predict(unet, xt, t, cond)
        if self.prediction == "epsilon":
            return out
        ab = _at(self.alpha_bar, t.cpu(), xt)
        return ab.sqrt() * out + (1 - ab).sqrt() * xt

    def target(self, x0, eps, t):
        """What `predict` should answer: eps, or v = sqrt(ab) eps - sqrt(1 - ab) x0."""
        if self.prediction == "epsilon":
            return eps
        ab = _at(self.alpha_bar, t.cpu(), x0)
        return ab.sqrt() * eps - (1 - ab).sqrt() * x0


def take(cond, rows):
    """The condition of some of the samples."""
    return {k: v[rows] for k, v in cond.items()}


def reference_unet(models, cfg):
    """A frozen copy of the start UNet, made before a checkpoint is loaded. It computes exactly what the
    trained one does, since beta in the thousands would make a difference in rounding a preference: what
    autocast casts anyway is kept cast, which saves memory; the norms stay fp32."""
    ref = copy.deepcopy(models.unet).requires_grad_(False)
    for module in ref.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(models.dtype)
    if cfg.compile:
        ref.compile()  # in place: its weights keep their names, also in a checkpoint (DRO's policy)
    return ref


@torch.no_grad()
def copy_weights(source, target):
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))


def first_line(error):
    return str(error).strip().split("\n")[0][:200]


def named(error):
    return f"{type(error).__name__}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------ data
PART = 256  # raw rows a file, where a whole set is gone through
PAIR, SINGLE = ("jpg_0", "jpg_1"), ("image",)  # the image columns of a set of pairs, and of a set of images


def open_rows(path, columns, streaming=False):
    """The rows of a parquet file, a folder of them (the train files, where names tell splits apart), an image
    folder with metadata.jsonl, or a hub id, as a datasets.Dataset; streaming: as tidy rows (dicts) in order,
    and nothing is copied. InputError if it cannot be read, is empty or lacks one of the columns."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    place = Path(path)
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place] if place.is_file() else []
    files = [str(f) for f in files if f.name.startswith("train")] or [str(f) for f in files]
    if not files and not place.is_dir() and (place.is_absolute() or path.count("/") != 1 or path[0] == "."):
        raise InputError(f"--data {path} does not exist")
    if not files and place.is_dir() and not (place / "metadata.jsonl").exists():
        raise InputError(f"--data {path} holds neither parquet files nor a metadata.jsonl")
    # all of an image folder: left to itself, `datasets` would take a train.json or test_1.png for a split
    everything = {"data_files": {"train": f"{glob.escape(path)}/**"}}
    what = ("parquet", {"data_files": files}) if files else ("imagefolder", everything)
    what = what if files or place.is_dir() else (path, {})
    try:
        rows = load_dataset(what[0], **what[1], split="train", streaming=streaming)
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, ImageFeature):  # bytes: one that does not decode costs its row alone
                rows = rows.cast_column(name, ImageFeature(decode=False))
        first = next(iter(rows), None)
    except Exception as error:  # datasets raises its own errors, pyarrow's and the hub's
        raise InputError(f"--data {path} cannot be read: {first_line(error)}") from error
    if first is None:
        raise InputError(f"--data {path} has no rows")
    if missing := [c for c in columns if c not in first]:
        raise InputError(f"--data {path} has no column {', '.join(missing)} (it has {', '.join(first)})")
    return stream(rows, path) if streaming else rows


def stream(rows, path):
    """Tidy rows. InputError that names the row where one is no good, or the file breaks off."""
    number = 0
    try:
        for number, row in enumerate(rows):
            yield tidy(row, number)
    except InputError as error:
        raise InputError(f"--data {path}: {error}") from error
    except Exception as error:  # the same as above, but in the middle of the set
        raise InputError(f"--data {path} cannot be read after row {number}: {first_line(error)}") from error


def tidy(row, number):
    """A row with one text as its caption (of a list the first), and label 0.5 where nobody gave one."""
    caption, label = row["caption"], row.get("label_0", 1)
    caption = caption[0] if isinstance(caption, list) and caption else caption
    label = 0.5 if row.get("has_label") is False else label
    if not isinstance(caption, str):
        raise InputError(f"the caption of row {number} (from 0) is no text: {caption!r}")
    if label not in (0, 0.5, 1):
        raise InputError(f"label_0 of row {number} (from 0) is {label!r}, not 0, 0.5 or 1")
    return row | {"caption": caption} | ({"label_0": label} if "label_0" in row else {})


def raw_bytes(cell):
    """An image cell (bytes, or datasets' {"bytes", "path"}) -> the image file's bytes, b"" if none."""
    if isinstance(cell, dict):
        if cell["bytes"] or not cell["path"]:
            return cell["bytes"] or b""
        with fsspec.open(cell["path"], "rb") as file:  # on the disk, or where the hub keeps it
            return file.read()
    return cell or b""


def decode_image(cell):
    """An image cell -> PIL RGB: the first frame, turned as its EXIF says, on white where it is transparent;
    None if it does not decode."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw_bytes(cell))))
        if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8, not scale
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception:  # Pillow's readers raise nearly anything
        return None


def square(image, side):
    """PIL RGB -> (pixels (3, side, side) in [-1, 1], SDXL's six numbers: original height and width, crop top
    and left, target height and width). The shorter side becomes `side` (bicubic), the middle is kept."""
    width, height = (length * side // min(image.size) for length in image.size)  # rounded down, as CLIP's own
    left, top = (width - side) // 2, (height - side) // 2
    small = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, side, side]).float()


def go_through(rows, folder, work, title, place):
    """Call work(up to PART raw rows) -> dict of tensors over a whole set, once, each result a file of
    `folder` with the rows' captions, labels and hash. A part that is there is not made again, and a whole set
    not read again: this can be killed and restarted. The ranks take the parts in turn. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    iterator, files, whole = iter(rows), [], folder / "whole"
    if agree(whole.exists()):
        return sorted(folder.glob("part-*.safetensors"))
    with tqdm(desc=title, unit=" rows", disable=not place.main) as bar:
        while part := list(islice(iterator, PART)):
            files.append(folder / f"part-{len(files):06d}.safetensors")
            bar.update(len(part))
            if (len(files) - 1) % place.world == place.rank and not files[-1].exists():
                result = work(part)
                result["label"] = torch.tensor([float(row.get("label_0", 1)) for row in part])
                captions = json.dumps([row["caption"] for row in part])
                write(files[-1], result, {"captions": captions, "hash": hash_rows(part)})
    barrier()
    if place.main:
        whole.touch()
    return files


def write(path, tensors, metadata=None):
    """save_file, but the name appears only when all of it is on the disk."""
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, f"{path}.new", metadata)
    except Exception as error:  # a full disk, above all: safetensors raises its own error
        Path(f"{path}.new").unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {first_line(error)}") from error
    os.replace(f"{path}.new", path)


def write_text(path, text):
    """The same for a text."""
    Path(f"{path}.new").write_text(text)
    os.replace(f"{path}.new", path)


def read(files, *names):
    """What go_through kept -> ({name: tensor over all raw rows}, captions, hash of all rows)."""
    columns, captions, hashes = {name: [] for name in names}, [], ""
    for file in files:
        with safe_open(file, "pt") as part:
            captions += json.loads(part.metadata()["captions"])
            hashes += part.metadata()["hash"]
            for name in names:
                columns[name].append(part.get_tensor(name))
    return {k: torch.cat(v) for k, v in columns.items()}, captions, sha256(hashes)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def hash_rows(part):
    """What scores belong to: the captions, labels and image byte lengths of some rows."""
    cells = [[r["caption"], r.get("label_0"), *(len(raw_bytes(r[c])) for c in PAIR if c in r)] for r in part]
    return sha256(json.dumps(cells))


def layout(path, *layouts):
    """The first of the layouts (PAIR, SINGLE) whose columns the set has; the first of all if none."""
    first = next(iter(open_rows(path, ("caption",), streaming=True)))
    return next((names for names in layouts if set(names) <= set(first)), layouts[0])


def open_source(cfg, models, place, *layouts):
    """The rows of cfg.data, cached or not, in the first of the layouts whose columns are there."""
    images = layout(cfg.data, *layouts)
    columns = ("caption", *images, *(("label_0",) if images == PAIR else ()))
    return CachedRows(cfg, images, columns, models, place) if cfg.cache else ImageRows(cfg, images, columns)


class ImageRows:
    """Rows whose images are decoded anew each time they are met: what --workers are for.

    A source has captions, labels (1 where a set has none) and good (False where an image is known not to
    decode), all over the raw rows, hash() and get(row, caption, flip) -> item, or None if an image does not
    decode."""

    def __init__(self, cfg, images, columns):
        self.rows, self.images, self.side = open_rows(cfg.data, columns), images, cfg.resolution
        self.data = cfg.data
        texts = self.rows.select_columns([c for c in self.rows.column_names if c not in images])
        texts = list(stream(texts, cfg.data))
        self.captions = [row["caption"] for row in texts]
        self.labels = torch.tensor([float(row.get("label_0", 1)) for row in texts])
        self.good = torch.ones(len(texts), dtype=torch.bool)

    def hash(self):
        rows, hashes = stream(self.rows, self.data), ""
        while part := list(islice(rows, PART)):
            hashes += hash_rows(part)
        return sha256(hashes)

    def get(self, row, caption, flip):
        cells = [decode_image(self.rows[row][name]) for name in self.images]
        if None in cells:
            return None
        pixels, sizes = zip(*(square(ImageOps.mirror(c) if flip else c, self.side) for c in cells))
        return {"image": torch.stack(pixels), "size": torch.stack(sizes), "caption": caption}


class CachedRows:
    """A source whose latents and caption embeddings are computed once, into a folder named after all they
    depend on, and read back through memory maps. The set is streamed: it may be larger than the disk."""

    def __init__(self, cfg, images, columns, models, place):
        self.images, self.maps = images, {}
        settings = ("data", "model", "variant", "revision", "vae", "resolution", "flip", "precision")
        about = {name: str(getattr(cfg, name)) for name in settings} | {"images": images}
        parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        for path in (cfg.data, *(f"{cfg.model}/{part}" for part in parts), cfg.vae or "none"):
            for file in [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.*")):
                about[str(file)] = (file.stat().st_size, file.stat().st_mtime_ns)
        folder = Path(cfg.cache) / sha256(json.dumps(about))[:16]
        pool, blank = ThreadPoolExecutor(max(1, cfg.workers)), Image.new("RGB", (cfg.resolution,) * 2)

        def load(cell):
            image = decode_image(cell)
            return *square(image or blank, cfg.resolution), image is not None

        def encode(part):
            found, size = {}, 16 if cfg.flip else 32
            # always 32 images at once: kernels' last bits depend on the batch, a restart should not change
            # them; and no more of them decoded than that: a part of large photographs would fill the memory
            for name, chunk in ((n, part[i : i + size]) for n in images for i in range(0, len(part), size)):
                pixels, sizes, good = zip(*pool.map(load, [row[name] for row in chunk]))
                views = torch.stack(pixels)[:, None]  # (rows, 1 or 2, 3, R, R): as it is, mirrored
                views = torch.cat([views, views.flip(-1)], 1) if cfg.flip else views
                latents = models.encode_images(views.flatten(0, 1)).to(models.dtype)
                found.setdefault(f"{name}.latent", []).append(latents.unflatten(0, views.shape[:2]))
                found.setdefault(f"{name}.size", []).append(torch.stack(sizes))
                found.setdefault(f"{name}.good", []).append(torch.tensor(good))
            return {name: torch.cat(tensors) for name, tensors in found.items()}

        self.files = go_through(
            open_rows(cfg.data, columns, True), folder / "latents", encode, "latents", place
        )
        columns, self.captions, self.rows_hash = read(self.files, "label", *(f"{i}.good" for i in images))
        self.labels, self.good = columns["label"], torch.stack([columns[f"{i}.good"] for i in images]).all(0)
        texts = sorted({"", *self.captions})
        self.index = {caption: i for i, caption in enumerate(texts)}
        self.texts = go_through(
            ({"caption": c} for c in texts), folder / "captions",
            lambda part: models.encode_prompts([row["caption"] for row in part]), "captions", place,
        )  # fmt: skip

        for module in (models.vae, *models.encoders):  # their work is done
            module.to("cpu")

    def hash(self):
        return self.rows_hash

    def read(self, files, row):
        file = files[row // PART]
        if file not in self.maps:  # tensors over memory maps: nothing is read before it is asked for
            with safe_open(file, "pt") as part:
                self.maps[file] = {k: part.get_tensor(k) for k in part.keys() if k != "label"}
        return {k: tensor[row % PART] for k, tensor in self.maps[file].items()}

    def get(self, row, caption, flip):
        cells = self.read(self.files, row)
        image = torch.stack([cells[f"{name}.latent"][int(flip)] for name in self.images])
        size = torch.stack([cells[f"{name}.size"] for name in self.images])
        return self.read(self.texts, self.index[caption]) | {"image": image, "size": size, "caption": caption}


class Samples(torch.utils.data.Dataset):
    """Item k is the k-th sample of the whole run. Which row it is, and each of its random draws, follow from
    the seed and k alone: not from the number of GPUs, of workers or of restarts.

    usable: mask over the source's rows. An item has image (K, C, H, W) pixels or latents, caption, t, noise,
    its index k, and its row's value of each of `extra`, tensors over all rows."""

    def __init__(self, source, usable, cfg, models, **extra):
        if not usable.any():
            raise InputError(f"--data {cfg.data}: no row is left to train on")
        self.source, self.usable, self.cfg, self.extra = source, usable.nonzero()[:, 0], cfg, extra
        side = cfg.resolution // 2 ** (len(models.vae.config.block_out_channels) - 1)
        self.latent, self.T = (models.vae.config.latent_channels, side, side), len(models.alpha_bar)
        self.epoch, self.order = None, None

    def row(self, k):
        epoch, i = divmod(k, len(self.usable))
        if epoch != self.epoch:
            random = generator(self.cfg.seed, "order", epoch)
            self.epoch, self.order = epoch, self.usable[torch.randperm(len(self.usable), generator=random)]
        return int(self.order[i])

    def __getitem__(self, k):
        random = generator(self.cfg.seed, "sample", k)
        t, noise = torch.randint(self.T, (), generator=random), torch.randn(self.latent, generator=random)
        rates = torch.tensor([self.cfg.caption_dropout, 0.5 * self.cfg.flip])
        drop, flip = (torch.rand(2, generator=random) < rates).tolist()
        for bad in range(1000):  # a row with an image that does not decode gives way to the next
            row = self.row(k + bad)
            item = self.source.get(row, "" if drop else self.source.captions[row], flip)
            if item is not None:
                extra = {name: values[row] for name, values in self.extra.items()}
                return item | extra | {"index": k, "t": t, "noise": noise, "bad": bad}
        raise InputError(f"--data {self.cfg.data}: of 1,000 rows one after the other no image decodes")


# ---------------------------------------------------------------------------------------------------- reward
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


def clip_pixels(images, size=224, mean=CLIP_MEAN, std=CLIP_STD):
    """PIL images -> (N, 3, size, size) as CLIP wants them (arXiv 2103.00020): shorter side to `size`,
    bicubic, centre crop, normalised."""
    pixels = torch.stack([square(image.convert("RGB"), size)[0] for image in images]) / 2 + 0.5
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load_reward(path, processor=None, device="cpu", dtype=torch.float32):
    """A reward model in PickScore's layout (a CLIPModel; arXiv 2305.01569): folder or hub id, its tokenizer
    and image settings from `processor` (default: the same place). Returns score(images: N PIL, prompts: N
    texts) -> (N,) fp32 on the CPU: exp(logit_scale) * cosine, about 20 for PickScore_v1. InputError if it
    cannot be loaded."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        model = CLIPModel.from_pretrained(path, use_safetensors=True).to(dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(processor or path)
        settings = CLIPImageProcessorPil.from_pretrained(processor or path)
    except Exception as error:  # safetensors and the hub raise their own
        raise InputError(f"reward model {path} cannot be loaded: {first_line(error)}") from error

    @torch.no_grad()
    def score(images, prompts):
        pixels = clip_pixels(images, settings.crop_size["height"], settings.image_mean, settings.image_std)
        # padded to full length always, as PickScore's own code does
        words = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        out = model(input_ids=words.input_ids.to(device), pixel_values=pixels.to(device, dtype))
        image, text = (F.normalize(e.float(), dim=-1) for e in (out.image_embeds, out.text_embeds))
        return (model.logit_scale.float().exp() * (image * text).sum(-1)).cpu()

    return score


SCORES = ("score_0", "score_1", "key_0", "key_1")


def item_key(row, name):
    """64 bits that tell an (image, caption) item from others."""
    digest = hashlib.blake2b(row["caption"].encode() + b"\0" + raw_bytes(row[name]), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def score_pairs(path, score, out_file, name, unit, batch_size=32, place=None):
    """Score both images of every raw row of a pair set, ties included, into one safetensors file: score_0 and
    score_1 (rows,) fp32, NaN where an image does not decode, and each item's key. Its parts are kept beside
    it until it is whole, so this can be restarted; a whole file is read, not made again. Returns load_scores
    of it."""
    place, out_file = place or setup(), Path(out_file)
    parts, pool = out_file.with_name(f"{out_file.name}.{sha256(name)[:8]}.parts"), ThreadPoolExecutor(4)

    def work(part):
        keys = [[item_key(row, name) for row in part] for name in PAIR]
        items = {key: (row, name) for name, ks in zip(PAIR, keys) for key, row in zip(ks, part)}  # each once
        value = {}
        for chunk in (list(items)[i : i + batch_size] for i in range(0, len(items), batch_size)):
            images = dict(zip(chunk, pool.map(lambda key: decode_image(items[key][0][items[key][1]]), chunk)))
            good = [key for key in chunk if images[key]]  # no more than a batch is decoded at a time
            texts = [items[key][0]["caption"] for key in good]
            value |= zip(good, score([images[key] for key in good], texts).tolist() if good else ())
        scores = {f"score_{k}": torch.tensor([value.get(key, math.nan) for key in keys[k]]) for k in (0, 1)}
        return scores | {f"key_{k}": torch.tensor(keys[k]) for k in (0, 1)}

    if not out_file.exists():
        rows = open_rows(path, ("caption", *PAIR, "label_0"), streaming=True)
        files = go_through(rows, parts, work, f"scores by {name}", place)
        if place.main:
            columns, _, data = read(files, *SCORES)
            write(out_file, columns, {"scorer": name, "unit": unit, "data": data})
            shutil.rmtree(parts)
        barrier()
    return load_scores(out_file)


def load_scores(path, source=None):
    """A scores file -> {"score_0", "score_1"} (rows,) fp32 and {"key_0", "key_1"} (rows,) int64, equal where
    image and caption are. InputError if it is none, or not of the source's rows."""
    try:
        with safe_open(path, "pt") as file:
            scores, data = {k: file.get_tensor(k) for k in SCORES}, file.metadata()["data"]
    except Exception as error:
        raise InputError(f"--scores {path} is no scores file: {first_line(error)}") from error
    if source and data != source.hash():
        raise InputError(f"--scores {path} was made from other rows than --data")
    if not any(scores[k].isfinite().any() for k in SCORES[:2]):
        raise InputError(f"--scores {path}: not one score is finite")
    return scores


def open_scores(cfg, models, place, source=None):
    """Where the pairs of cfg.data have their scores from: --scores, or --reward, which scores each pair once
    into the output folder. What can be wrong is refused here, before that folder is taken; the scoring waits
    in the function that is returned, which gives what load_scores gives."""
    if cfg.scores:
        scores = load_scores(cfg.scores, source)
        return lambda: scores
    score = load_reward(cfg.reward, cfg.reward_processor, place.device, models.dtype)
    kept, unit = Path(cfg.out) / "scores.safetensors", "exp(logit_scale) * cosine"
    return lambda: score_pairs(cfg.data, score, kept, cfg.reward, unit, place=place)


# -------------------------------------------------------------------------------------------------- training
def check(cfg, place):
    """Refuse what can be refused before anything is loaded or written."""
    for field in dataclasses.fields(cfg):
        value, wanted = getattr(cfg, field.name), field.metadata.get("metavar")
        if wanted and not RANGES[wanted](value):
            raise InputError(f"--{field.name} must be {wanted}, it is {value}")
    if cfg.resolution % 8:
        raise InputError(f"--resolution must be a multiple of 8, it is {cfg.resolution}")
    if cfg.batch % (cfg.micro_batch * place.world):
        small = f"--micro_batch {cfg.micro_batch} x {place.world} (processes)"
        raise InputError(f"--batch {cfg.batch} does not divide by {small}")
    for name in ("model", "data"):
        if not getattr(cfg, name):
            raise InputError(f"--{name} is missing")
    if cfg.eval_prompts:
        try_judge(cfg)
    out = Path(cfg.out).absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {cfg.out} cannot be written: {there} is no folder that can be written to")
    # a run that was killed at once left its unfinished config.json at most
    if there != out or not any(file.name != "config.json.new" for file in out.iterdir()):
        return
    if not (cfg.resume or cfg.overwrite):
        way = "--resume goes on, --overwrite starts over, or name another"
        raise InputError(f"--out {cfg.out} exists: {way}")
    try:
        config = json.loads((out / "config.json").read_text())
        assert "preset" in config
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(f"--out {cfg.out} holds something else than a run: nothing is touched") from error
    if cfg.resume:
        given = [name for name, value in what_matters(cfg).items() if value is not None]
        # what is not given may stand there resolved: Run.load sees to that
        refuse_changes(cfg, {name: config[name] for name in given if name in config})


def refuse_changes(cfg, settings):
    """A run goes on with the settings it has, or not at all."""
    now = what_matters(cfg)
    for name, then in settings.items():
        if now.get(name) != then:
            raise InputError(f"--resume goes on with --{name} {then}, not {now.get(name)}: give the same")


def read_prompts(cfg):
    """The closing report's prompts. InputError where there are none."""
    try:
        lines = Path(cfg.prompts).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {cfg.prompts} cannot be read: {first_line(error)}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {cfg.prompts} holds no prompt")
    return prompts


def try_judge(cfg):
    """A judge that is not there or does not work should say so before the training, not after it."""
    import eval as evaluation

    blank, prompts = Image.new("RGB", (cfg.resolution,) * 2), read_prompts(cfg)
    if cfg.judge:
        evaluation.load_scorer(cfg.judge, device="cpu")([blank], prompts[:1])


def claim(cfg, place, usable=None):
    """Take the output folder, now that models and data are known to be good. usable: mask of the rows."""
    if usable is not None and not usable.any():
        raise InputError(f"--data {cfg.data}: its {len(usable)} rows are all ties or have a broken image")
    barrier()
    if place.main:
        out = Path(cfg.out)
        if cfg.overwrite and not cfg.resume and out.exists():
            for old in sorted(out.iterdir(), key=lambda f: f.name == "config.json"):  # that last: it is the
                shutil.rmtree(old) if old.is_dir() else old.unlink()  # proof that the folder is a run
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "config.json").exists():
            write_config(cfg)  # with it the folder is a run; a resume writes it when it is known to fit
        if usable is not None:
            print(f"{int(usable.sum()):,} of {len(usable):,} rows can be used")
    barrier()


# What may differ when a run goes on; everything else decides what is learnt
FREE = ("preset", "out", "steps", "workers", "cache", "save_every", "keep_every", "resume", "overwrite",
        "compile", "checkpointing", "eval_prompts", "prompts", "judge", "eval_steps", "cfg")  # fmt: skip


def what_matters(cfg):
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}


def write_config(cfg):
    text = json.dumps(dataclasses.asdict(cfg) | {"versions": versions()}, indent=1)
    write_text(Path(cfg.out) / "config.json", text + "\n")


def leave_signals_to_the_run(worker):
    """Ctrl-C reaches the loader's workers too, but the step that is running still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_optimizer(cfg, weights, world):
    """The optimizer; on several GPUs each keeps the state of its share of the weights (ZeRO, stage 1)."""
    if cfg.optimizer == "adamw":
        kind, more = torch.optim.AdamW, {"fused": True}
    else:  # as Diffusion-DPO's code trains SDXL: the lr is the lr
        from transformers.optimization import Adafactor as kind

        more = {"scale_parameter": False, "relative_step": False}
    more |= {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if world == 1:
        return kind(weights, **more)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(weights, kind, **more)


def tensorboard(folder, step):
    """TensorBoard's writer where it is installed. What it shows from `step` on goes: that is done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step)


class Run:
    """One training run: what lies between the loss and the disk, the same for every method.

    for micro_batches in run.steps():      # from the checkpoint on, with a progress bar
        for batch in micro_batches:        # gradient accumulation
            run.backward(loss, {...})      # run.unet for the gradient; run.bare for other calls,
        run.update()                       # whose number may then differ between the GPUs
    run.finish()

    With --ema an fp32 average of the weights is kept on the CPU; it is then what unet/ holds. keep: {name:
    what has state_dict and load_state_dict}, this rank's own things that a checkpoint must hold too.
    """

    def __init__(self, cfg, place, models, samples, keep=None):
        self.cfg, self.place, self.models, self.samples, self.out = cfg, place, models, samples, Path(cfg.out)
        self.keep = keep or {}
        self.accumulate = cfg.batch // (cfg.micro_batch * place.world)
        self.weights = [p for p in models.unet.parameters() if p.requires_grad]
        self.average = [p.detach().cpu().clone() for p in self.weights] if cfg.ema and place.main else []
        self.optimizer = make_optimizer(cfg, self.weights, place.world)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=cfg.precision == "fp16")
        self.step = self.bad = self.signal = 0
        if cfg.resume:
            try:
                self.load()
            except (KeyError, ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
                where = f"{self.out / 'checkpoint'} cannot be read"
                raise InputError(f"{where} ({named(error)}): --overwrite starts over") from error
        if cfg.checkpointing:
            models.unet.enable_gradient_checkpointing()
        self.unet = self.bare = torch.compile(models.unet) if cfg.compile else models.unet
        if place.world > 1:
            self.unet = torch.nn.parallel.DistributedDataParallel(self.bare)
        self.board = tensorboard(self.out, self.step) if place.main else None
        if place.main:
            write_config(cfg)
            size, epochs = sum(p.numel() for p in self.weights), cfg.steps * cfg.batch / len(samples.usable)
            cut = f"{self.accumulate} x {place.world} x {cfg.micro_batch}"
            print(f"{size:,} trained parameters, {cfg.precision}, {place.world} {place.device.type}")
            print(f"{cfg.steps} steps of {cfg.batch} rows ({cut}), {epochs:.2f} epochs, lr {cfg.lr:g}")

    def steps(self):
        cfg, place, size = self.cfg, self.place, self.cfg.micro_batch
        # every step's batch is cut into micro-batches, which the ranks take in turn
        starts = (s * cfg.batch + m * size for s in range(self.step, cfg.steps)
                  for m in range(place.rank, cfg.batch // size, place.world))  # fmt: skip
        loader = iter(torch.utils.data.DataLoader(
            self.samples, batch_sampler=[range(k, k + size) for k in starts], num_workers=cfg.workers,
            pin_memory=place.device.type == "cuda", worker_init_fn=leave_signals_to_the_run,
        ))  # fmt: skip
        self.bar = tqdm(total=cfg.steps, initial=self.step, desc=self.out.name, disable=not place.main)
        heard = (s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN)
        before = {s: signal.signal(s, self.interrupt) for s in heard}  # a shell's "&" has Ctrl-C ignored
        try:
            while self.step < cfg.steps:
                self.started, self.waited, self.sums = time.perf_counter(), 0.0, {}
                self.models.calls = self.missed = 0
                yield self.micro_batches(loader)
        finally:
            self.bar.close()
            if self.board:
                self.board.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupt(self, number, frame):
        """SIGTERM or Ctrl-C: end this step and save. A second one ends the process at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def micro_batches(self, loader):
        for i in range(self.accumulate):
            before = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - before
            self.missed += int(batch["bad"].sum())
            if self.place.world > 1:  # gradients travel between the GPUs with the last micro-batch alone
                self.unet.require_backward_grad_sync = i + 1 == self.accumulate
            yield batch

    def backward(self, loss, values):
        """Accumulate the gradient of a micro-batch's mean loss, and values for the log (scalar tensors)."""
        self.scaler.scale(loss / self.accumulate).backward()
        for name, value in {"loss": loss, **values}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float() / self.accumulate

    def update(self):
        """Clip, step the optimizer, log; now and then keep a checkpoint."""
        cfg, cuda = self.cfg, self.place.device.type == "cuda"
        lr = cfg.lr * min(1.0, (self.step + 1) / max(1, cfg.warmup))
        self.optimizer.param_groups[0]["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, cfg.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))  # a short memory while there is little
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach().cpu() for p in self.weights], 1 - decay)

        calls = self.models.calls * self.place.world / cfg.batch  # per row, of all ranks
        more = norm.new_tensor([calls, self.signal, self.missed])
        values = torch.stack([*self.sums.values(), norm.float(), *more])
        if self.place.world > 1:
            dist.all_reduce(values)
        values = (values / self.place.world).tolist()  # the step's one wait for the device
        values = dict(zip([*self.sums, "grad_norm", "unet_calls", "signal", "missed"], values))
        stopped = values.pop("signal") > 0  # any rank's: all stop after the same step
        self.bad += round(values.pop("missed") * self.place.world)
        # a gradient that is not finite fp16's scaler passes over
        for name in ("loss",) if self.scaler.is_enabled() else ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                what = f"the {name} is {values[name]} at step {self.step}"
                raise InputError(f"{what}; the last checkpoint is kept")
        seconds, peak = time.perf_counter() - self.started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = {
            "step": self.step, **values, "lr": lr, **({"ema_decay": decay} if cfg.ema else {}),
            "rows_per_s": cfg.batch / seconds, "waiting": self.waited / seconds,
            "memory_gb": (torch.cuda.max_memory_allocated() / 1024 if cuda else peak) / 2**20,
        }  # fmt: skip
        self.step += 1
        if self.place.main:
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            for name in (line.keys() - {"step"}) if self.board else ():
                self.board.add_scalar(name, line[name], line["step"])
            self.bar.set_postfix({k: f"{line[k]:.4g}" for k in list(self.sums)[:3]}, refresh=False)
            self.bar.update()
            if cfg.keep_every and self.step % cfg.keep_every == 0:
                self.save_unet(self.out / f"unet-{self.step}")
        if self.step % cfg.save_every == 0 or self.step == cfg.steps or stopped:
            self.save()
        if stopped:
            raise Stopped(f"stopped after step {self.step} of {cfg.steps}, all saved: --resume goes on")

    def save_unet(self, folder):
        new, trained = folder.with_name(folder.name + ".new"), None
        shutil.rmtree(new, ignore_errors=True)
        if self.average:
            trained = [p.detach().clone() for p in self.weights]
            torch._foreach_copy_([p.data for p in self.weights], self.average)
        try:
            self.models.unet.save_pretrained(new)
        except Exception as error:
            shutil.rmtree(new, ignore_errors=True)
            raise InputError(f"{folder} cannot be written: {first_line(error)}; --resume goes on") from error
        if trained:
            torch._foreach_copy_([p.data for p in self.weights], trained)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)

    def save(self):
        """checkpoint/STEP appears whole or not at all, and only then do older ones go."""
        folder = self.out / "checkpoint" / str(self.step)
        new = folder.with_name("new")
        try:
            if self.place.main:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True)
            barrier()
            if self.place.world > 1:  # the shares of the optimizer's state, brought together
                self.optimizer.consolidate_state_dict(to=0)
            for name, kept in self.keep.items():
                if self.place.main or not isinstance(kept, torch.nn.Module):  # a module is the same on all
                    write(new / f"{name}.safetensors", kept.state_dict())
            if self.place.main:
                moments = self.optimizer.state_dict()["state"]
                moments = {f"{i}.{k}": torch.as_tensor(v) for i, m in moments.items() for k, v in m.items()}
                write(new / "optimizer.safetensors", moments)
                write(new / "unet.safetensors", self.models.unet.state_dict())
                if self.average:
                    write(new / "average.safetensors", {str(i): p for i, p in enumerate(self.average)})
                state = {"step": self.step, "bad": self.bad, "scaler": self.scaler.state_dict()}
                (new / "state.json").write_text(json.dumps(state | {"settings": what_matters(self.cfg)}))
            barrier()
        except Exception as error:  # a full disk, above all: safetensors raises its own error
            shutil.rmtree(new, ignore_errors=True)
            step = f"checkpoint of step {self.step} cannot be written: {first_line(error)}"
            raise InputError(f"{step}; the one before it is whole, and --resume goes on from it") from error
        if self.place.main:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(new, folder)
            for old in folder.parent.iterdir():
                if old != folder:
                    shutil.rmtree(old)

    def load(self):
        """Go on where the newest checkpoint stands; from the beginning where there is none."""
        found = [int(f.name) for f in (self.out / "checkpoint").glob("*") if f.name.isdigit()]
        if found:
            folder, moments = self.out / "checkpoint" / str(max(found)), {}
            state = json.loads((folder / "state.json").read_text())
            refuse_changes(self.cfg, state["settings"])
            self.step, self.bad = state["step"], state["bad"]
            self.scaler.load_state_dict(state["scaler"])
            self.models.unet.load_state_dict(load_file(folder / "unet.safetensors"))
            for name, value in load_file(folder / "optimizer.safetensors").items():
                i, key = name.split(".")
                weight = self.weights[int(i)]
                if value.shape == weight.shape:  # in the weight's memory order, which fused AdamW expects
                    value = torch.empty_like(weight, device="cpu").copy_(value)
                moments.setdefault(int(i), {})[key] = value
            group = self.optimizer.param_groups[0] | {"params": list(range(len(self.weights)))}
            self.optimizer.load_state_dict({"state": moments, "param_groups": [group]})
            if self.place.world > 1:
                # ZeRO leaves a second copy of this rank's share, and step counts on the CPU, where fused
                # AdamW refuses them
                self.optimizer.state.clear()
                for weight, state in self.optimizer.optim.state.items():
                    state.update({k: v.to(weight.device) for k, v in state.items()})
            if self.average:
                average = load_file(folder / "average.safetensors")
                self.average = [average[str(i)] for i in range(len(self.average))]
            for name, kept in self.keep.items():
                kept.load_state_dict(load_file(folder / f"{name}.safetensors"))
        log = self.out / "log.jsonl"
        if self.place.main and log.exists():  # its steps after the checkpoint will be done again
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            write_text(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < self.step))
        barrier()

    def finish(self):
        """Write unet/ for the stock pipeline, and make the closing report where one is wanted."""
        cfg = self.cfg
        if self.place.main:
            self.save_unet(self.out / "unet")
            if self.bad:
                print(f"{self.bad} times a row was passed over: an image of it does not decode")
            print(f"wrote {self.out / 'unet'}", flush=True)
        barrier()
        if cfg.eval_prompts:
            import eval as evaluation

            prompts = read_prompts(cfg)
            each = math.ceil(cfg.eval_prompts / len(prompts))  # images of each prompt
            evaluation.report(
                cfg.model, {"start": cfg.unet, "trained": self.out / "unet"},
                prompts[: cfg.eval_prompts // each], self.out, images_per_prompt=each, seed=cfg.seed,
                steps=cfg.eval_steps, cfg=cfg.cfg, judges=[cfg.judge] if cfg.judge else [], scorers={},
                precision=cfg.precision, variant=cfg.variant, revision=cfg.revision, vae=cfg.vae,
                cache=cfg.cache,
            )  # fmt: skip
