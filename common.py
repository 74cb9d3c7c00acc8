# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What the methods and the evaluation share: all but losses, rollouts and scorers.

1. noise and ReNoise inversion   the mathematics that the methods share
2. command line                  options, presets, errors that cost one line
3. distributed                   torchrun's processes, random draws that do not depend on them
4. files                         written whole or not at all
5. models                        one strict loader; the UNet's prediction in its own target
6. data                          rows, images, and the cache of latents and caption embeddings
7. training                      the output folder, the trainer, checkpoints

To learn a method, read here: section 1; Models.predict, predict_eps and target; SampleStream.draw;
Trainer.iter_micro_batches, backward and optimizer_step. The rest makes sure that nothing is
silently wrong and nothing is lost.

notation   x0 clean latent | xt noised latent | eps noise | t timestep
           alpha_bar (T,) cumulative product of 1 - beta | ab its value at some timestep
           R rows of a set; a row is a pair, or a single image. A sample is a row with its
           timestep, noise and flips; B samples are a micro-batch, with N = 2B images for pairs.
           Tensors (N, C, h, w): all first images, then all second (DPO: winners, then losers)
"""

import os
from pathlib import Path
import signal
import sys

SCRIPTS = ("smpo.py", "dro.py", "dpo_baseline.py", "eval.py")
if Path(sys.argv[0]).name in SCRIPTS:
    # One of our scripts is starting, and the imports below take seconds. Ctrl-C during them should
    # end the process quietly, not with a traceback from the middle of a library.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: os._exit(130))

from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
import copy
import dataclasses
from dataclasses import dataclass
from datetime import timedelta
import fsspec
import hashlib
import importlib
import io
from itertools import chain, islice
import json
import math
import numpy as np
from PIL import Image, ImageOps
import pyarrow.parquet as pq
import re
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import shutil
import subprocess
import time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from typing import Literal
import uuid
import warnings
import zlib

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on the output folder, no peak memory in the log
    fcntl = resource = None

TINY = Path(__file__).parent / "tests" / "tiny"


class InputError(Exception):
    """The user gave something wrong. `run_script` prints the message and exits with code 2."""


class Stopped(Exception):
    """Someone stopped the run, and all of it is saved. `run_script` exits with code 130."""


def first_line(error):
    return str(error).strip().split("\n")[0][:200]


def describe_error(error):
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def as_input_error(text):
    """with as_input_error(text): what a library raises becomes an InputError, `text: its line`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow, json, safetensors, datasets and the hub raise their own
        raise InputError(f"{text}: {first_line(error)}") from error


# ------------------------------------------------------------------ 1. noise and ReNoise inversion
# To copy these functions elsewhere, take this whole section: it needs torch alone.
INVERSION_MODES = ("release", "above", "paper")


def to_device(tensor, device):
    """Copy to the device without waiting for it. On a GPU, `.to` from ordinary memory would wait
    until the GPU has finished all its work; a copy from pinned memory joins the queue instead."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def alpha_bar_at(alpha_bar, t, like):
    """alpha_bar at the timesteps t (N,), as (N, 1, 1, 1) in fp32 on the device of `like`.

    alpha_bar is never in half precision: in fp16, 1 - alpha_bar is 15 % off at t = 0."""
    ab = alpha_bar.to(t.device)[t].float()
    return to_device(ab, like.device).view(-1, 1, 1, 1)


def add_noise(x0, eps, t, alpha_bar):
    """sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (arXiv 2006.11239, Eq. 4); t (N,) long in [0, T)."""
    ab = alpha_bar_at(alpha_bar, t, x0)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def predicted_x0(xt, eps, t, alpha_bar):
    """The x0 for which add_noise(x0, eps, t) is xt."""
    ab = alpha_bar_at(alpha_bar, t, xt)
    return (xt - (1 - ab).sqrt() * eps) / ab.sqrt()


def ddim_step(x, eps, ab_from, ab_to):
    """A deterministic DDIM step, up or down, from alpha_bar = ab_from to ab_to (arXiv 2010.02502,
    Eq. 12 with sigma = 0). x, eps (n, C, h, w); ab_from, ab_to (n, 1, 1, 1)."""
    x0 = (x - (1 - ab_from).sqrt() * eps) / ab_from.sqrt()
    return ab_to.sqrt() * x0 + (1 - ab_to).sqrt() * eps


def inversion_path(t, T, steps, mode):
    """The timesteps that an image visits on its way from clean to t. With t = 450, T = 1000:

    release, steps = 5   [201, 401, 601]             to the first of 1, 201, 401, 601, 801
                                                     at or above t (801 where t is above it)
    above, steps = 5     [200, 400, 600]             to the first of 200, 400, ... at or above t
    paper, steps = 9     [111, 222, 333, 444, 450]   the grid below t, then exactly t
    """
    if mode not in INVERSION_MODES:
        raise ValueError(f"mode must be one of {', '.join(INVERSION_MODES)}, not {mode!r}")
    if mode == "release":
        grid = [1 + k * (T // steps) for k in range(steps)]
    else:
        grid = [min(k * T // steps, T - 1) for k in range(1, steps + 1)]
    if mode == "paper":
        return [timestep for timestep in grid if timestep < t] + [t]
    end = next((timestep for timestep in grid if timestep >= t), grid[-1])
    path = [timestep for timestep in grid if timestep <= end]
    # The released loop stops at 1 on its way, where there is hardly any noise. Without that stop
    # two UNet calls are saved, and eps differs by 5 % on average (tests/test_released.py).
    if mode == "release" and len(path) > 1:
        path = path[1:]
    return path


# An image with fewer steps joins later, so that the batch's last step is the last one of every
# image (paper refines only that one). Two images with t = 450 and t = 150, in mode release with 5
# steps, and in brackets what the UNet is told:
#
#     step of the batch   0                   1                   2
#     image 0             clean -> 201 (0)    201 -> 401 (201)    401 -> 601 (401)
#     image 1                                                     clean -> 201 (0)
#
def inversion_plan(paths, alpha_bar, mode, device):
    """The steps of a whole batch, as a list of (idx, unet_t, ab_from, ab_to), each over the n
    images that take part: idx (n,) long, unet_t (n,) long, ab_from and ab_to (n, 1, 1, 1).

    Everything is made on the CPU and sent in one copy: a copy for each step would make the GPU wait
    each time."""
    longest = max(len(path) for path in paths)
    sizes = []
    table = []
    for step in range(longest):
        active = [i for i, path in enumerate(paths) if step >= longest - len(path)]
        sizes.append(len(active))
        for i in active:
            k = step - longest + len(paths[i])  # which of its own steps this is for image i
            t_from = paths[i][k - 1] if k > 0 else 0
            t_to = paths[i][k]
            ab_from = alpha_bar[t_from].item() if k > 0 else 1.0  # it starts from the clean latent
            unet_t = t_to if mode == "paper" else t_from
            table.append([i, unet_t, ab_from, alpha_bar[t_to].item()])
    table = to_device(torch.tensor(table, dtype=torch.float64), device)
    plan = []
    for part in table.split(sizes):
        idx = part[:, 0].long()
        unet_t = part[:, 1].long()
        ab_from = part[:, 2].float().view(-1, 1, 1, 1)
        ab_to = part[:, 3].float().view(-1, 1, 1, 1)
        plan.append((idx, unet_t, ab_from, ab_to))
    return plan


# Running DDIM upwards, a step from x_from to x_to needs the noise predicted at x_to, which is not
# known yet. Plain inversion takes the prediction at x_from. ReNoise (arXiv 2403.14602) uses it to
# make a first guess of x_to, predicts again there, and steps with the average of the two. For one
# image:
#
#     for t_from, t_to in steps_of_the_path:           # release, t = 450: clean, 201, 401, 601
#         eps_here = eps(x, unet_t)                    # the UNet is told:     0, 201, 401
#         x_guess = ddim(x, eps_here, t_from -> t_to)
#         eps_there = eps(x_guess, unet_t)
#         x = ddim(x, (eps_here + eps_there) / 2, t_from -> t_to)
#
# Why at all: add_noise reaches timestep t with any noise. Inversion finds the latent from which
# this model's sampler would lead back to x0, up to the error of few steps (and, in release, of a
# noise level that is not that of t). The two images of a pair get two noises.
def renoise_invert(eps_fn, x0, t, alpha_bar, steps, mode, renoise=1):
    """Find the noise of each image by few-step DDIM inversion, refined by ReNoise.

    mode   "release"  the released code, less its stop at timestep 1 (see inversion_path): x ends at
                      the first grid timestep at or above t, up to T / steps away from it. Still eps
                      below is formed with t. unet_t is the timestep that a step comes FROM.
           "above"    the same with the grid kT/n.
           "paper"    our reading of the paper: x ends exactly at t, unet_t is the timestep that a
                      step goes TO, and only the last step is refined.

    eps_fn(x (n, C, h, w), unet_t (n,), idx (n,)) -> eps (n, C, h, w), where idx says which images
    of the batch these are. t (N,) long, each image its own, on the CPU: otherwise reading it waits
    for the GPU. Returns (xt, eps), both (N, C, h, w), with eps = (xt - sqrt(ab_t) x0) / sqrt(1 -
    ab_t).

    UNet calls an image: with renoise = 1, 2 for each step of its path in release and above, and
    its steps + 1 in paper; with renoise = 0, 1 for each step.
    ValueError for another mode, steps outside of 1..T, or a renoise other than 0 and 1."""
    if not 1 <= steps <= len(alpha_bar) or renoise not in (0, 1):
        raise ValueError(f"steps must be in 1..T, renoise 0 or 1, not {steps} and {renoise}")
    paths = [inversion_path(each, len(alpha_bar), steps, mode) for each in t.tolist()]
    plan = inversion_plan(paths, alpha_bar, mode, x0.device)
    x = x0.clone()
    for number, (idx, unet_t, ab_from, ab_to) in enumerate(plan, 1):
        x_from = x[idx]
        eps = eps_fn(x_from, unet_t, idx)
        is_last = number == len(plan)  # of every image that takes part
        if renoise and (mode != "paper" or is_last):
            x_guess = ddim_step(x_from, eps, ab_from, ab_to)
            eps_there = eps_fn(x_guess, unet_t, idx)
            eps = (eps + eps_there) / 2
        x[idx] = ddim_step(x_from, eps, ab_from, ab_to)
    ab_t = alpha_bar_at(alpha_bar, t, x0)
    return x, (x - ab_t.sqrt() * x0) / (1 - ab_t).sqrt()


# ----------------------------------------------------------------------------- 2. command line
# A method's Config is a dataclass: one field an option, with its default, help and range. A preset
# is a dict of values that differ from the defaults. What the user types wins over both.
RANGES = {
    ">0": lambda x: 0 < x < math.inf,
    ">=0": lambda x: 0 <= x < math.inf,
    "0..1": lambda x: 0 <= x <= 1,
    "0..<1": lambda x: 0 <= x < 1,
}


def option(default, help, range=None):
    """A Config field: its default, its help text, and which of RANGES its value has to be in.
    `--help` shows the range, and `validate_config` refuses values outside of it."""
    metadata = {"help": help.replace("%", "%%")}  # argparse would read a bare % as a format
    if range:
        metadata["metavar"] = range
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """The options all method files share. Their own follow in their Config, the recipes in
    PRESETS."""

    # What is trained, on what, and where it goes
    preset: str = option("tiny", "recipe to start from: tiny, sd15 or sdxl; any flag overrides it")
    model: str = option("", "Stable Diffusion 1.x, 2.x or XL: diffusers folder or hub id")
    variant: str | None = option(None, "weight files to load from it, e.g. fp16")
    revision: str | None = option(None, "hub revision to load")
    vae: str | None = option(None, "another VAE, e.g. the fp16 fix for SDXL")
    unet: str | None = option(None, "initial AND reference UNet, if not the model's: e.g. runs/sft")
    data: str = option("", "parquet file or folder, folder with metadata.jsonl, or hub ID(:SPLIT)")
    out: str = option("", "folder for everything the run writes")
    # How much: batch = micro_batch x GPUs x accumulation
    steps: int = option(0, "optimizer steps", ">0")
    batch: int = option(0, "rows (pairs or experts) per optimizer step, over all GPUs", ">0")
    micro_batch: int = option(0, "rows per GPU per forward; accumulation follows from it", ">0")
    # How the weights are updated
    optimizer: Literal["adamw", "adafactor"] = option("adamw", "adafactor keeps hardly any state")
    lr: float = option(0.0, "peak learning rate, used as it is: nothing scales it", ">0")
    warmup: int = option(0, "optimizer steps of linear warm-up, then constant", ">=0")
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", ">=0")
    weight_decay: float = option(0.01, "decoupled weight decay", ">=0")
    ema: float = option(0.0, "decay of the EMA weights, which are then written; 0: none", "0..<1")
    # What a sample looks like
    caption_dropout: float = option(0.0, "fraction of rows without caption, for guidance", "0..1")
    flip: bool = option(False, "mirror half of the images, each on its own")
    resolution: int = option(512, "side in px of the square that images are cropped to", ">0")
    seed: int = option(0, "fixes every random draw, whatever the number of GPUs")
    # What it costs
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "autocast; weights stay fp32")
    checkpointing: bool = option(False, "gradient checkpointing: a third more compute, less memory")
    compile: bool = option(False, "torch.compile the UNets")
    lora: int = option(0, "rank of a LoRA to train instead of all weights; 0: all weights", ">=0")
    workers: int = option(4, "threads that decode images while the set is encoded", ">0")
    cache: str = option("runs/cache", "folder of the latents and caption embeddings of all runs")
    # Checkpoints
    save_every: int = option(500, "steps between checkpoints for --resume", ">0")
    keep_every: int = option(0, "also keep the UNet of every so many steps, in unet-STEP/", ">=0")
    resume: bool = option(False, "go on from the checkpoint in --out; start where there is none")
    overwrite: bool = option(False, "start over in an --out that holds a run")
    # The final evaluation
    eval_prompts: int = option(0, "images of each model in the final evaluation; 0: none", ">=0")
    prompts: str = option("", "its prompts: .txt (one a line), .json or .parquet")
    judge: str | None = option(None, "PATH.py:FUNCTION(images, prompts) -> ground-truth scores")
    eval_steps: int = option(50, "sampling steps of the final evaluation", ">0")
    cfg: float = option(7.5, "guidance scale of the final evaluation", ">=0")


def tiny_preset(name):
    """The tiny world's paths and settings: the first part of every method's tiny preset."""
    return {
        "model": str(TINY / "model"),
        "data": str(TINY / "pairs" / "train.parquet"),
        "out": f"runs/{name}",
        "resolution": 64,
        "save_every": 50,
        "eval_prompts": 256,
        "prompts": str(TINY / "prompts" / "test.txt"),
        "eval_steps": 20,
        "cfg": 2.0,
        "judge": f"{TINY / 'world.py'}:gold_score",
    }


def parse(Config, presets, argv=None):
    """The command line -> a Config: the preset's values over the defaults, explicit flags over
    both. An unknown flag is argparse's error (exit code 2). --help shows the preset's values."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Config, allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else argv
    # First find the preset, since --help has to show its values, then read everything.
    without_help = [word for word in argv if word not in ("-h", "--help")]
    preset = parser.parse_known_args(without_help)[0].preset
    if preset not in presets:
        raise InputError(f"--preset {preset} is not one of {', '.join(presets)}")
    parser.set_defaults(**presets[preset])
    return Config(**vars(parser.parse_args(argv)))


def exit_with(code, text):
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def run_script(main):
    """Run a script's main: quiet libraries, one line and exit code 2 for bad input, SIGTERM handled
    like Ctrl-C (exit code 130), the process group closed at the end."""
    from datasets.utils import logging as datasets_log
    from diffusers.utils import logging as diffusers_log
    from logging import CRITICAL
    from transformers.utils import logging as transformers_log

    # Their warnings are about what this code checks itself, and would bury its own lines.
    for log in (datasets_log, diffusers_log, transformers_log):
        log.set_verbosity(CRITICAL)
        log.disable_progress_bar()
    # SIGTERM raises KeyboardInterrupt, as Ctrl-C does. During the training steps, Trainer.steps
    # puts a handler in its place that finishes the step and saves.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A job that a shell runs with "&" has Ctrl-C ignored: then it stays so.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The exit codes: 2 what the user can mend, 130 stopped from outside. Anything else that is
    # raised is a fault of this code and keeps its traceback.
    try:
        main()
    except (InputError, OSError) as error:
        exit_with(2, f"error: {error}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        advice = "try a smaller --micro_batch, --checkpointing or --lora"
        exit_with(2, f"error: out of memory ({first_line(error)}): {advice}")
    except (Stopped, KeyboardInterrupt) as why:
        exit_with(130, str(why) or "interrupted: what was finished is kept, --resume goes on")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------- 3. distributed
# torchrun starts this script once for each GPU. The processes ("ranks") read the same data and hold
# the same weights; they differ in which micro-batches they take. Only the main one, rank 0, writes.
@dataclass
class DistInfo:
    """Which of torchrun's processes this is (the only one without torchrun), and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0


def init_distributed():
    """Join the process group if torchrun started this process (nccl with GPUs, gloo without)."""
    device = torch.device("cpu")
    # TF32 for what autocast leaves in fp32. Where rewards are computed it is switched off again.
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    if "RANK" not in os.environ:
        return DistInfo(device=device)
    if not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store over all restarts, and in it the dead workers' addresses. (On
            # several nodes the restart counts may differ, so the prefix is for one node alone.)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(days=1),  # ranks wait for each other while one reads a large set
        )
    return DistInfo(dist.get_rank(), dist.get_world_size(), device)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_main(value):
    """The main process's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def all_gather_objects(value):
    """Every rank's value, as one list that is the same on all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def generator(*key):
    """A CPU generator that depends on the key's values alone, e.g. (seed, "sample", index)."""
    # Every random draw of a run comes from one of these, and no state is carried along. So sample
    # 1,000 is the same after a resume, on 1 GPU and on 8, and whoever draws it. On the CPU, since
    # GPUs draw other numbers from the same seed.
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def versions():
    """Library versions and the git commit ("+" where files differ from it), for config.json."""
    return {"commit": git_commit(), **library_versions()}


def library_versions():
    """The versions that can change a number. The commit is none: a README changes it too."""
    import diffusers
    import transformers

    libraries = (torch, diffusers, transformers)
    numbers = {library.__name__: library.__version__ for library in libraries}
    return {"python": sys.version.split()[0], **numbers}


def git_commit():
    """The short commit of this folder, with "+" where tracked files differ from it; None where it
    is no repository or git is not installed."""
    # Of tags nothing is said: --exclude leaves out all of them.
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --------------------------------------------------------------------------------------- 4. files
def sync(path):
    """Make sure that a file or folder is on the disk, so that a power cut cannot take it back."""
    if os.name == "nt":  # there it needs a handle that can write, and does not know folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path):
    """Delete a file or a folder, whichever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic(path):
    """with atomic(path) as temporary: write a file or a folder under the temporary name. It gets
    its real name only when all of it is on the disk. InputError if the disk refuses."""
    # So nobody ever sees half a file, and what had the name before is there until then: whoever is
    # killed in the middle leaves the old one. The name is hidden, and in the same folder, because a
    # rename is one step within a file system only. A power cut needs one more thing, `sync`: the
    # content has to reach the disk before its name does.
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():  # safetensors makes files that only their owner can read
                file.chmod(0o666 & ~umask)
            sync(file)
        if path.is_dir():  # a folder cannot be replaced in one step: the old one steps aside first
            aside = temporary.with_suffix(".old")
            path.rename(aside)
            temporary.rename(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
        sync(path.parent)
    except Exception as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}") from error
    finally:
        remove(temporary)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text)


def remove_leftovers(folder, age):
    """Delete temporary files of killed writers, if nobody has touched them for `age` seconds."""
    ours = "[0-9a-f]" * 12  # as `atomic` names them
    for suffix in ("new", "old"):
        for file in Path(folder).glob(f".*.{ours}.{suffix}"):
            with suppress(FileNotFoundError):  # its writer is alive, and has just renamed it
                if time.time() - file.stat().st_mtime >= age:
                    remove(file)


# ------------------------------------------------------------------------------ 5. models
# A diffusers pipeline is a folder with a subfolder for each part and model_index.json, which names
# their classes. Its parts are loaded one by one here, and the stock pipeline is made of them.
#
# What can silently be wrong: weights that a file lacks (both libraries make random ones and warn),
# a tokenizer without its vocabulary, a noise schedule that is not DDPM's, a VAE with statistics of
# its own. Each of these would train, and give a worse model without a word.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The parts of the two supported pipelines and the only class each may have. Other classes would
# either need other code here (other text encoders) or run code from the model's repository.
SD_PARTS = {
    "unet": "diffusers.UNet2DConditionModel",
    "vae": "diffusers.AutoencoderKL",
    "text_encoder": "transformers.CLIPTextModel",
    "tokenizer": "transformers.CLIPTokenizer",
}
SDXL_PARTS = SD_PARTS | {
    "text_encoder_2": "transformers.CLIPTextModelWithProjection",
    "tokenizer_2": "transformers.CLIPTokenizer",
}
PIPELINES = {"StableDiffusionPipeline": SD_PARTS, "StableDiffusionXLPipeline": SDXL_PARTS}
# Never loaded: the safety checker would blacken images that are to be compared.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def load_pretrained(loader, path, what, **kwargs):
    """Load one part of a model with every weight read from its files, on the CPU.

    loader: a class of diffusers or transformers with from_pretrained (model, tokenizer, processor
    or scheduler); path: folder or hub id; what: the part's name for messages, e.g. "vae"; kwargs:
    subfolder, revision, variant. Models are returned in fp32 and eval mode. Raises InputError, in
    one line, where nothing can be loaded, the part is of another class, or a weight is missing,
    unexpected, misshapen or not finite.
    """
    from diffusers import ModelMixin

    is_model = issubclass(loader, torch.nn.Module)
    if is_model:
        # Both libraries fill what a file lacks with random or uninitialised values and merely log
        # a warning. The loading info tells. Mismatched sizes are let through only to be named.
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        kwargs["ignore_mismatched_sizes"] = True
    elif loader.__module__.startswith("transformers"):
        kwargs["trust_remote_code"] = False  # unset, transformers asks on stdin, and a job hangs
    try:
        if issubclass(loader, ModelMixin):
            config = {key: kwargs.get(key) for key in ("subfolder", "revision")}
            found = loader.load_config(path, **config).get("_class_name", loader.__name__)
            if found != loader.__name__:
                raise ValueError(f"its class is {found}, not {loader.__name__}")
            kwargs["low_cpu_mem_usage"] = False  # True needs the package accelerate
        with nan_in_new_memory():
            part = loader.from_pretrained(path, **kwargs)
    except Exception as error:  # safetensors, tokenizers and the hub raise their own
        hint = " (only .safetensors files are read)" if "safetensors" in str(error) else ""
        line = f"the {what} of {path} cannot be loaded: {first_line(error)}{hint}"
        raise InputError(line) from error
    if is_model:
        part, info = part
        part = part.float().eval()  # transformers keeps a file's dtype, diffusers gives fp32
        problems = weight_problems(part, info)
        if problems:
            where = f"the {what} of {path} ({loader.__name__})"
            raise InputError(f"{where} has wrong weights: {'; '.join(problems)}")
    elif hasattr(part, "backend_tokenizer") and not has_vocabulary(part):
        raise InputError(f"the {what} of {path} lacks files: it has no vocabulary or no merges")
    return part


@contextmanager
def nan_in_new_memory():
    """Let torch.empty give NaN, so that a weight which no file gives a value can be found."""
    # Of sharded weights, diffusers (0.42) believes the index: a weight that its shard lacks is not
    # reported as missing. In deterministic mode torch fills new memory with NaN.
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def has_vocabulary(tokenizer):
    """False for what transformers 5 makes, without a word, of a folder that lacks the vocabulary
    or the merges: a tokenizer that knows special tokens or single characters only."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    known = len(model.get("vocab", ())) > len(tokenizer.all_special_tokens)
    return known and model.get("merges") != []


def weight_problems(part, info):
    """What is wrong with a loaded model, e.g. ["missing: conv_out.bias, conv_out.weight"]."""
    misshapen = info["mismatched_keys"]  # [(key, shape in the file, the model's), ...]
    infinite = {key for key, value in part.state_dict().items() if not value.isfinite().all()}
    infinite -= {*info["missing_keys"], *(key for key, _, _ in misshapen)}
    kinds = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": [f"{k} {tuple(a)} instead of {tuple(b)}" for k, a, b in misshapen],
        "not finite": infinite,
    }
    problems = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(sorted(names)[:3])
            problems.append(f"{kind}: {shown}{more}")
    return problems


def load_pipeline(model, variant=None, revision=None, vae=None, unet=None):
    """A stock StableDiffusionPipeline or StableDiffusionXLPipeline in fp32 on the CPU, each part
    loaded by `load_pretrained`; no safety checker, no watermark.

    model: diffusers folder or hub id; variant, revision: which files of it; vae, unet: other
    places for these two parts. Raises InputError for anything else than plain Stable Diffusion
    1.x, 2.x or XL: see `load_index`, `load_scheduler` and `require_supported_parts`.
    """
    import diffusers

    index = load_index(model, revision)
    kind = index["_class_name"]
    parts = {}
    for name, class_path in PIPELINES[kind].items():
        library, class_name = class_path.split(".")
        loader = getattr(importlib.import_module(library), class_name)
        if name == "unet" and unet:
            parts[name] = load_unet(unet)
        elif name == "vae" and vae:
            parts[name] = load_pretrained(loader, vae, "vae")
        else:
            files = {"subfolder": name, "revision": revision}
            if issubclass(loader, torch.nn.Module):
                files["variant"] = variant
            parts[name] = load_pretrained(loader, model, name, **files)
    parts["scheduler"] = load_scheduler(model, index["scheduler"][1], revision)
    require_supported_parts(parts, model, vae, unet)
    settings = dict.fromkeys(("feature_extractor", "image_encoder"))
    if kind == "StableDiffusionXLPipeline":
        settings["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
        settings["add_watermarker"] = False  # else pixels depend on a package being installed
    else:
        settings |= {"safety_checker": None, "requires_safety_checker": False}
    with warnings.catch_warnings():  # old configs, which the constructor mends itself
        warnings.simplefilter("ignore", FutureWarning)
        pipe = getattr(diffusers, kind)(**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_index(model, revision=None):
    """The dict of model_index.json, which names the pipeline's class and those of its parts. Raises
    InputError where a class is not one that is supported."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except Exception as error:
        reason = "" if Path(model).is_dir() else f": {first_line(error)}"
        line = f"--model {model} is no diffusers pipeline (no model_index.json){reason}"
        raise InputError(line) from error
    kind = index.get("_class_name")
    if kind not in tuple(PIPELINES):  # a custom pipeline's kind is a list: [file, class]
        raise InputError(f"--model {model} is a {kind}, not Stable Diffusion 1.x, 2.x or XL")
    listed = {name for name, value in index.items() if isinstance(value, (list, tuple))}
    for name in sorted(listed | {"scheduler", *PIPELINES[kind]}):
        if name in LEFT_OUT:
            continue
        words = [str(word) for word in index.get(name) or () if word]
        found = ".".join(words) or "absent"
        expected = PIPELINES[kind].get(name, "absent")
        fits = found.removesuffix("Fast") == expected  # CLIPTokenizerFast is the same class
        if name == "scheduler":
            expected = "one of diffusers"
            fits = found.startswith("diffusers.") and found.endswith("Scheduler")
        if not fits:
            raise InputError(f"--model {model}: its {name} is {found}, not {expected}")
    return index


def load_scheduler(model, class_name, revision=None):
    """The pipeline's noise scheduler. Raises InputError where its schedule is not one of betas."""
    # Training needs alpha_bar alone, and any scheduler class would give one: what a config does not
    # say, diffusers fills with that class's defaults, which differ between classes. So the raw file
    # has to name the betas, and the class it was written for has to agree with DDPMScheduler on
    # them. EDM, flow matching and shifted schedules (CogVideoX) fail one of the two.
    import diffusers

    with as_input_error(f"the scheduler of {model} cannot be loaded"):
        raw = diffusers.DDPMScheduler.load_config(model, subfolder="scheduler", revision=revision)
    where = f"--model {model}: its scheduler"
    prediction = raw.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{where} predicts {prediction}, not epsilon or v_prediction")
    names_betas = {"beta_start", "beta_end", "beta_schedule"} <= raw.keys()
    other_noise = raw.get("use_flow_sigmas") or raw.get("timestep_type") == "continuous"
    own_class = raw.get("_class_name", class_name)
    if other_noise or not (names_betas or raw.get("trained_betas") is not None):
        raise InputError(f"{where} ({own_class}) has no beta schedule: not supported")
    expected = None
    # The file's class, and the one in model_index.json, which the pipeline gets
    for name in ("DDPMScheduler", own_class, class_name):
        with as_input_error(f"{where} ({name}) cannot be loaded"):  # unknown class or schedule
            try:
                scheduler = getattr(diffusers, name).from_config(raw)
            except ImportError:  # LMS wants scipy: then DDPM stands in, its betas are the same
                continue
        actual = getattr(scheduler, "alphas_cumprod", torch.empty(0)).float()
        expected = actual if expected is None else expected
        # Euler's last value of a zero-SNR schedule is 2^-24 where DDPM's is 0: within atol
        same_length = len(actual) == len(expected)
        if not same_length or not torch.allclose(actual, expected, atol=1e-6):
            raise InputError(f"{where} ({name}) has no plain beta schedule: not supported")
    return scheduler


def require_supported_parts(parts, model, vae=None, unet=None):
    """InputError where a part asks for what this code does not do, or the parts do not fit."""
    config = parts["vae"].config
    if config.latents_mean is not None or config.latents_std is not None:
        # The latents would be normalised by these, not by scaling_factor (Playground v2.5)
        where = f"--vae {vae}" if vae else f"the vae of {model}"
        raise InputError(f"{where} has latents_mean or latents_std: not supported")
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer")]
    for tokenizer, encoder in zip(tokenizers, encoders):
        if getattr(encoder.config, "use_attention_mask", False):
            raise InputError(f"the text encoder of {model} wants an attention mask: not supported")
        if len(tokenizer) > encoder.config.vocab_size:
            counts = f"{len(tokenizer)} tokens, the text encoder {encoder.config.vocab_size}"
            raise InputError(f"the tokenizer of {model} has {counts}")
    expected = {
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "cross_attention_dim": sum(encoder.config.hidden_size for encoder in encoders),
        "addition_embed_type": "text_time" if len(encoders) == 2 else None,
    }
    where = f"--unet {unet}" if unet else f"the unet of {model}"
    require_sizes(parts["unet"], expected, f"{where} with --vae {vae}" if vae else where)


def require_sizes(unet, expected, where):
    for name, value in expected.items():
        actual = unet.config[name]
        if actual != value:
            raise InputError(f"{where} does not fit --model: its {name} is {actual}, not {value}")


def load_unet(path, own=None):
    """A UNet in fp32 on the CPU, from a folder, its unet/ (a run's folder) or a hub repository's
    unet/. own: the UNet that it will stand in for; its sizes, the image's included, have to be the
    same. Raises InputError."""
    from diffusers import UNet2DConditionModel

    path = str(path)
    is_folder = Path(path).is_dir()
    if not is_folder and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):  # no OWNER/NAME of the hub
        raise InputError(f"--unet {path} does not exist")
    inside = "unet" if (Path(path) / "unet").is_dir() or not is_folder else None
    unet = load_pretrained(UNet2DConditionModel, path, "unet", subfolder=inside)
    if own is not None:
        # sample_size is what eval.py takes the images' size from
        names = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type")
        expected = {name: own.config[name] for name in (*names, "sample_size")}
        require_sizes(unet, expected, f"--unet {path}")
    return unet


def weights_hash(part, without=()):
    """A hash of all that determines what a part computes: class, configuration, every bit of the
    weights; not of where it lies. part: module, scheduler, tokenizer, processor or whole pipeline,
    of which `without` names the parts to leave out."""
    # The cache and a checkpoint are bound to it: the same name with other weights is another model.
    # SHA-256 makes 2 GB/s where the CPU has instructions for it, more than BLAKE2b.
    digest = hashlib.sha256(type(part).__name__.encode())
    settings = part_settings(part)
    if hasattr(part, "components"):
        for name, component in part.components.items():
            settings.pop(name, None)  # a pipeline's config names the parts' classes
            if component is not None and name not in without:
                settings[name] = weights_hash(component)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if isinstance(part, torch.nn.Module):
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            value = value.cpu().contiguous().flatten()
            digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


def part_settings(part):
    """The configuration of a part, as a dict that does not depend on its place or its use."""
    if hasattr(part, "backend_tokenizer"):
        settings = json.loads(part.backend_tokenizer.to_str())
        # Every call of the tokenizer leaves its padding and truncation in the backend
        settings |= {"padding": part.padding_side, "truncation": part.truncation_side}
        settings["special_tokens"] = part.special_tokens_map
        settings["model_max_length"] = part.model_max_length
        return settings
    config = getattr(part, "config", part)  # processors are their own configuration
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    if config is part and hasattr(part, "tokenizer"):  # a processor with both, as CLIP's
        settings["tokenizer"] = weights_hash(part.tokenizer)
        settings["image_processor"] = weights_hash(part.image_processor)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


class Models:
    """A pipeline's parts on a device, frozen but for the UNet, and the few methods that hide which
    Stable Diffusion it is.

    pipe: the stock pipeline with these parts; unet: fp32, trainable; vae; alpha_bar: (T,) fp32 on
    the CPU; prediction: "epsilon" or "v_prediction"; dtype: autocast's; calls: UNet sample-forwards
    since the caller last set it to 0. Raises InputError as `load_pipeline` does.
    """

    def __init__(self, cfg, device):
        from diffusers import DDPMScheduler

        if cfg.precision not in DTYPES:
            raise InputError(f"--precision {cfg.precision} is not one of {', '.join(DTYPES)}")
        self.device = torch.device(device)
        self.dtype = DTYPES[cfg.precision]
        self.calls = 0
        self.pipe = load_pipeline(cfg.model, cfg.variant, cfg.revision, cfg.vae, cfg.unet)
        # What the cache and a resume compare: taken before anything is cast or trained.
        self.hashes = {
            "unet": weights_hash(self.pipe.unet),
            "vae": weights_hash(self.pipe.vae),
            "text encoder": weights_hash(self.pipe, without=("vae", "unet", "scheduler")),
            "scheduler": weights_hash(self.pipe.scheduler),
        }
        # The UNet stays in fp32 and autocast chooses for each operation; frozen parts are cast.
        self.unet = self.pipe.unet.to(self.device)
        self.vae = self.pipe.vae
        parts = self.pipe.components
        names = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
        self.encoders = [parts[name].to(self.device, self.dtype) for name in names]
        xl = len(self.encoders) == 2
        # SDXL's own VAE overflows in half precision, and its config says so. The fp16 fix (--vae)
        # does not. Stable Diffusion 1.x and 2.x have the flag too, but not the problem.
        upcast = xl and self.vae.config.force_upcast
        self.vae.to(self.device, torch.float32 if upcast else self.dtype)
        for frozen in (self.vae, *self.encoders):
            frozen.requires_grad_(False)
        # Always by DDPM: Euler and others round the 0 of a zero-SNR schedule up to 2^-24
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.alpha_bar = scheduler.alphas_cumprod.float()
        self.prediction = scheduler.config.prediction_type
        self._device_alpha_bar = self.alpha_bar.to(self.device)
        if cfg.lora:
            freeze_and_add_lora(self, cfg)

    def latent_shape(self, resolution):
        """(C, h, w) of the latent of a square image with sides of `resolution` pixels."""
        side = resolution // self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, side, side

    @torch.no_grad()
    def encode_images(self, pixels):
        """Pixels (N, 3, H, W) in [-1, 1] -> latents (N, C, H/8, W/8), fp32."""
        # The mode of the VAE's posterior: a sample would differ by a spread that is far below that
        # of the noise the latents are trained with. And one latent an image can be kept.
        config = self.vae.config
        pixels = to_device(pixels, self.vae.device).to(self.vae.dtype)
        z = self.vae.encode(pixels).latent_dist.mode().float()
        return (z - (config.shift_factor or 0)) * config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, captions):
        """n captions -> {"encoder_hidden_states": (n, L, D)}, SDXL's {"text_embeds": (n, P)} too,
        in the run's dtype; exactly what the stock pipeline's sampling gives the UNet."""
        device = self.encoders[0].device
        guidance = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        out = self.pipe.encode_prompt(captions, device=device, **guidance)
        cond = {"encoder_hidden_states": out[0]}
        if len(self.encoders) == 2:
            cond["text_embeds"] = out[2]
            # Where the pipeline guides without a prompt it puts zeros for it: a dropped caption
            # has to look the same in training
            if self.pipe.config.force_zeros_for_empty_prompt:
                empty = [i for i, caption in enumerate(captions) if caption == ""]
                for value in cond.values():
                    value[empty] = 0
        return cond

    def free_encoders(self):
        """Move the VAE and the text encoders to the CPU, once all latents and embeddings are made.
        They still work there, slowly."""
        for part in (self.vae, *self.encoders):
            part.to("cpu")

    def predict(self, unet, xt, t, cond):
        """The UNet's own output (N, C, h, w) for xt at timesteps t (N,), in fp32.

        cond: encoder_hidden_states (N, L, D), for SDXL also text_embeds (N, P) and time_ids (N, 6):
        height and width, crop's top and left, target height and width.
        """
        self.calls += len(xt)
        t = to_device(t, xt.device)
        added = {name: value for name, value in cond.items() if name != "encoder_hidden_states"}
        # One autocast region per call. A longer one would cache weights that were cast under
        # no_grad, and a later call would use these and give no gradient.
        in_half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=in_half):
            hidden = cond["encoder_hidden_states"]
            out = unet(xt, t, hidden, added_cond_kwargs=added or None).sample
        return out.float()

    def predict_eps(self, unet, xt, t, cond):
        """`predict` as noise: eps = sqrt(ab) v + sqrt(1 - ab) xt (arXiv 2202.00512, App. D)."""
        out = self.predict(unet, xt, t, cond)
        if self.prediction == "epsilon":
            return out
        # v = sqrt(ab) eps - sqrt(1 - ab) x0 and xt = sqrt(ab) x0 + sqrt(1 - ab) eps, solved for eps
        ab = self._alpha_bar_at(t, xt)
        return ab.sqrt() * out + (1 - ab).sqrt() * xt

    def target(self, x0, eps, t):
        """What `predict` should answer: eps, or v = sqrt(ab) eps - sqrt(1 - ab) x0."""
        if self.prediction == "epsilon":
            return eps
        ab = self._alpha_bar_at(t, x0)
        return ab.sqrt() * eps - (1 - ab).sqrt() * x0

    def _alpha_bar_at(self, t, like):
        # The table lies where t does: neither has to travel, and nothing waits for the GPU
        table = self.alpha_bar if t.device.type == "cpu" else self._device_alpha_bar
        return alpha_bar_at(table, t, like)


def index_condition(cond, idx):
    """The condition of some of the samples; idx: (n,) long or a slice."""
    return {name: value[idx] for name, value in cond.items()}


def freeze(unet, dtype):
    """Make a UNet one that is not trained, with the weights that autocast would cast kept cast."""
    # Autocast casts the weights of all linear and convolutional layers in every call (SD1.5: 5.2 GB
    # of traffic). Here they are kept cast, and the norms stay fp32. So a frozen copy computes bit
    # for bit what the trained UNet does: beta in the thousands would make a difference in rounding
    # a preference.
    for module in unet.requires_grad_(False).modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(dtype)
    return unet


def frozen_copy(models, cfg):
    """A copy of the UNet for calls without gradient: the reference, or the policy of a rollout."""
    frozen = freeze(copy.deepcopy(models.unet), models.dtype)
    if cfg.compile:
        frozen.compile()  # in place: the weights keep their names, also in a checkpoint
    return frozen


def reference_unet(models, cfg):
    """The frozen initial UNet, to be called like a UNet without gradient. To be made before a
    checkpoint is loaded. With --lora it is the trained UNet without its adapter: no second copy."""
    return LoraView(models.unet, []) if cfg.lora else frozen_copy(models, cfg)


def policy_unet(models, cfg):
    """A copy of the trained UNet that `copy_weights` refreshes: DRO's policy. With --lora it is a
    second adapter of the same UNet."""
    if not cfg.lora:
        return frozen_copy(models, cfg)
    add_adapter(models.unet, cfg.lora, cfg.seed, "policy")
    models.unet.set_adapter("default")
    return LoraView(models.unet, "policy")


# --------------------------------------------------------------------------------------- LoRA
# The attention layers, as in diffusers' own scripts
LORA_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]


def freeze_and_add_lora(models, cfg):
    """Train low-rank adapters (arXiv 2106.09685) in place of all weights."""
    # A layer W x becomes W x + B A x, with W frozen in the autocast dtype and A (rank, in), B (out,
    # rank) in fp32. B starts at 0, so nothing changes yet: the margin at step 0 is exactly 0.
    freeze(models.unet, models.dtype)
    add_adapter(models.unet, cfg.lora, cfg.seed, "default")


def add_adapter(unet, rank, seed, name):
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("--lora needs the package peft: pip install peft") from error
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_MODULES
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are two adapters is intended
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=name)
    for weight in LoraView(unet, name).parameters():
        weight.data = weight.data.float()


class LoraView:
    """A UNet with another of its adapters active, or with none (name=[]), for calls without
    gradient."""

    # Gradient checkpointing runs parts of the trained forward again during the backward pass, with
    # whatever adapter is active then. So each call here ends with the trained adapter active again.
    # The layers are switched one by one: the UNet's own methods search all its modules for them,
    # which takes 50 ms a call for SDXL's, in place of 14.
    def __init__(self, unet, name):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.unet = unet
        self.name = name
        self.layers = [part for part in unet.modules() if isinstance(part, BaseTunerLayer)]

    def __call__(self, *args, **kwargs):
        for layer in self.layers:
            layer.set_adapter(self.name)
        try:
            return self.unet(*args, **kwargs)
        finally:
            for layer in self.layers:
                layer.set_adapter("default")

    def parameters(self):
        named = self.unet.named_parameters()
        return [weight for key, weight in named if f".{self.name}." in key]

    def state_dict(self):
        return {str(i): weight for i, weight in enumerate(self.parameters())}

    def load_state_dict(self, state):
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(state[str(i)])


@torch.no_grad()
def copy_weights(source, target):
    """Refresh a frozen copy, or an adapter, from the trained UNet; each weight keeps its dtype."""
    if isinstance(target, LoraView):
        source = LoraView(source, "default")
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))


def save_lora(models, folder):
    """Write the trained adapter twice: as diffusers' pipe.load_lora_weights reads it, and in the
    key layout of kohya's scripts, which other user interfaces read."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(models.unet, adapter_name="default")
    layers = {f"unet.{name}": value.cpu().contiguous() for name, value in layers.items()}
    folder.mkdir()
    save_file(convert_state_dict_to_diffusers(layers), folder / "pytorch_lora_weights.safetensors")
    save_file(convert_state_dict_to_kohya(layers), folder / "kohya.safetensors")


# -------------------------------------------------------------------------------- 6. data
# From the outside in: open_rows (where rows come from), decode_image and resize_and_crop (what an
# image is), TensorStore (what is kept), RowTable (what is known of a set), SampleStream (sample k).
#
# Pick-a-Pic's columns are the standard: caption, jpg_0, jpg_1, label_0.
PAIR_COLUMNS = ("jpg_0", "jpg_1")
IMAGE_COLUMNS = ("image",)

# TRL's names for preference data, where the first image of a row is always the preferred one.
# There is no label to read: the prompt, a small column, is read in its place.
TRL_COLUMNS = {"caption": "prompt", "jpg_0": "chosen", "jpg_1": "rejected", "label_0": "prompt"}

# No other decoder is handed a stranger's bytes: Pillow has 40, and EPS starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def open_rows(path, option="--data"):
    """The rows of a data set, whatever it is stored as.

    path: a parquet file, a folder of them, an image folder with metadata.jsonl, or a hub id.
    FOLDER:SPLIT and ID:SPLIT name a split; without one it is "train". option: for messages.
    Returns a RowSource. InputError if the set does not exist, cannot be read or has no rows.
    """
    path = str(path)
    name = path
    split = "train"
    # A folder may have a colon in its name: what exists is meant literally.
    if not os.path.exists(path) and re.fullmatch(r".+:[\w.-]+", path):
        name, _, split = path.rpartition(":")
    title = f"{option} {path}"
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(".parquet")
    with as_input_error(f"{title} cannot be read"):
        if os.path.isdir(name):
            return open_folder(title, path, Path(name).resolve(), split)
        if os.path.isfile(path):
            return ParquetRows(title, path, None, [Path(path).absolute()])
        if is_id and not os.path.exists(name):
            return HubRows(title, path, name, split)
    problem = "is no regular file" if os.path.exists(path) else "does not exist"
    raise InputError(f"{title} {problem}")


def open_folder(title, path, folder, split):
    """An image folder where there is a metadata.jsonl, parquet files otherwise."""
    files = split_files(title, folder, split)
    # A stray file of the other kind lies beside a metadata.jsonl, or deeper than the set.
    # `top` is the file that lies highest.
    top = min(files, key=lambda file: (len(file.parts), file.suffix != ".jsonl"))
    kind = ImageFolderRows if top.suffix == ".jsonl" else ParquetRows
    same_kind = [file for file in files if file.suffix == top.suffix]
    return kind(title, path, folder, same_kind)


def split_files(title, folder, split):
    """The parquet and metadata.jsonl files of a folder's split, as `datasets` tells splits apart.

    InputError where it cannot be told, or does not exist: test rows are never trained on.
    """
    from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, get_data_patterns

    # `datasets` is shown empty files of the same names in memory. In the folder itself, it would
    # search all images for each of its patterns, and take a picture test_1.png for a split.
    memory = fsspec.filesystem("memory")
    base = f"/{uuid.uuid4().hex}"
    for file in walk_files(folder):
        if file.endswith((".parquet", "/metadata.jsonl")) and os.path.isfile(file):  # no pipe
            name = os.path.relpath(file, folder)
            if "/." not in f"/{name}":  # not hidden, such as a cache
                memory.pipe_file(f"{base}/{name}", b"")
    if not memory.exists(base):
        raise InputError(f"{title} holds neither parquet files nor a metadata.jsonl")
    patterns = get_data_patterns(f"memory:/{base}")
    splits = DataFilesDict.from_patterns(patterns, base_path=f"memory:/{base}")
    memory.rm(base, recursive=True)
    if split not in splits:
        has = ", ".join(map(str, splits))
        raise InputError(f"{title} has no split {split}, only {has}")
    # A name that fits two patterns comes twice.
    names = sorted({found.partition(f"{base}/")[2] for found in splits[split]})
    # `datasets` overlooks Test-0.parquet and split=test/, and puts train/test/ into both splits.
    held_out = {*SPLIT_KEYWORDS["validation"], *SPLIT_KEYWORDS["test"]}
    for name in names if split == "train" else ():
        if held_out & set(re.split("[^a-z]+", name.lower())):
            raise InputError(f"{title} has no clear train split: {name} may be held out")
    return [folder / name for name in names]


def walk_files(folder):
    """Paths (str: there may be 1,000,000) of all files below a folder, sorted."""
    paths = []
    for base, _, names in os.walk(folder):
        paths += [os.path.join(base, name) for name in names]
    return sorted(paths)


def require_columns(source, columns):
    """InputError if the source lacks one of the columns."""
    missing = ", ".join(name for name in columns if name not in source.raw_names)
    if missing:
        has = ", ".join(source.columns)
        raise InputError(f"{source.title} has no column {missing} (it has {has})")


# Rows are streamed, never held: a set may have 300 GB. A row is known by its number in the set's
# order. To read some rows is to pass over the others (parquet skips whole row groups).
class RowSource:
    """The rows of a data set. Each subclass reads one kind of storage: open() returns the names of
    its columns, or None where it has no rows; raw_rows(names, wanted) yields (number, {raw name:
    cell}).
    """

    def __init__(self, title, path, folder, files):
        self.title = title  # how messages begin
        self.path = path
        self.folder = folder  # of a local set, links resolved; None for a single file
        self.files = files
        raw_columns = self.open()
        if raw_columns is None:
            raise InputError(f"{title} has no rows")
        self.columns = tuple(raw_columns)
        self.raw_names = dict(zip(raw_columns, raw_columns))  # {column: its name in the storage}
        trl = set(TRL_COLUMNS.values())
        self.first_won = trl <= set(raw_columns) and "jpg_0" not in raw_columns
        if self.first_won:
            others = [name for name in raw_columns if name not in trl | {*TRL_COLUMNS}]
            self.columns = (*TRL_COLUMNS, *others)
            self.raw_names |= TRL_COLUMNS

    def rows(self, columns, wanted=None):
        """Iterator of (number, row), in the set's order; numbers count all rows of the set from 0.

        wanted: row numbers (n,) int64, None for all; the other rows are skipped. row has exactly
        `columns`: caption str; label_0 0.0, 0.5 or 1.0 (0.5 also where has_label is false); jpg_0,
        jpg_1, image bytes (b"" where the cell is empty); others as they are stored. InputError for
        a missing column at once; for a bad cell, or a file that breaks off, when it is reached.
        """
        require_columns(self, columns)
        names = {self.raw_names[name] for name in columns}
        if "label_0" in columns:
            names.add("has_label")  # read where it exists, which may be in some files only
        wanted = None if wanted is None else np.unique(wanted)
        return self.normalised_rows(columns, names, wanted)

    def normalised_rows(self, columns, names, wanted):
        number = -1
        try:
            for number, raw in self.raw_rows(names, wanted):
                row = {name: raw[self.raw_names[name]] for name in columns}
                self.normalise_row(row, raw.get("has_label"), number)
                yield number, row
        except InputError as error:
            raise InputError(f"{self.title}: {error}") from error
        except Exception as error:  # pyarrow, json, datasets and the hub each raise their own
            after = f" after row {number}" if number >= 0 else ""
            raise InputError(f"{self.title} cannot be read{after}: {first_line(error)}") from error

    def normalise_row(self, row, has_label, number):
        if "caption" in row:
            row["caption"] = normalise_caption(row["caption"], number)
        if "label_0" in row:
            label = 1 if self.first_won else row["label_0"]
            row["label_0"] = normalise_label(label, has_label, number)
        for name in (*PAIR_COLUMNS, *IMAGE_COLUMNS):
            if name in row:
                row[name] = self.image_bytes(row[name], f"{name} of row {number} (from 0)")

    def image_bytes(self, cell, what):
        if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
            # Most cells have both. As in `datasets`, a path counts only where there are no bytes.
            if cell.get("bytes") is None and cell.get("path"):
                return self.read_file(cell["path"], what)
            cell = cell.get("bytes")
        if not isinstance(cell, (bytes, bytearray, memoryview, type(None))):
            kind = "text" if isinstance(cell, str) else f"a {type(cell).__name__}"
            raise InputError(f"{what} is {kind}, not an image's bytes")
        return bytes(cell or b"")

    def read_file(self, file, what):
        """Bytes of an image that a cell only names, relative to the set's folder."""
        if not self.folder:
            raise InputError(f"{what} names a file ({file}): give the folder of the set")
        # Cells are a stranger's: no file from elsewhere, no device or pipe that never ends.
        real = os.path.realpath(os.path.join(self.folder, file))
        if not real.startswith(os.path.join(self.folder, "")):
            raise InputError(f"{what} lies outside the set's folder: {file}")
        if not os.path.isfile(real):
            raise InputError(f"{what} does not exist, or is no regular file: {file}")
        with open(real, "rb") as opened:
            return opened.read()

    def fingerprint(self):
        """A text that changes whenever the set's content may have changed."""
        facts = []
        for file in walk_files(self.folder) if self.folder else self.files:
            if os.path.exists(file):  # a link may lead nowhere
                stat = os.stat(file)
                # A copy may keep the size and mtime, but not ctime and inode.
                times = (stat.st_mtime_ns, stat.st_ctime_ns)
                facts.append((str(file), stat.st_size, *times, stat.st_ino))
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def normalise_caption(caption, number):
    """One text; of a list of texts, the first."""
    if isinstance(caption, list) and caption:
        caption = caption[0]
    # A surrogate is half of an emoji, which JSON can hold and a tokenizer cannot.
    if not isinstance(caption, str) or re.search(r"[\ud800-\udfff]", caption):
        raise InputError(f"the caption of row {number} (from 0) is no text: {ascii(caption)[:80]}")
    return caption


def normalise_label(label, has_label, number):
    """0.0, 0.5 or 1.0; 0.5, a tie, where has_label says in any spelling that nobody judged."""
    judged = str(has_label).strip("b' ").lower()
    if judged in ("false", "0", "0.0", "no", "f", "n"):
        return 0.5
    if judged not in ("true", "1", "1.0", "yes", "t", "y", "none", "nan"):
        raise InputError(
            f"has_label of row {number} (from 0) is {has_label!r:.80}, not true or false"
        )
    try:
        value = float(label)  # an int, a bool, a Decimal or a text
    except (TypeError, ValueError, OverflowError):
        value = None
    if value not in (0, 0.5, 1):
        raise InputError(f"label_0 of row {number} (from 0) is {label!r:.80}, not 0, 0.5 or 1")
    return value


def number_wanted(items, wanted):
    """(number, item) of the wanted items."""
    if wanted is None:
        return enumerate(items)
    goals = set(wanted.tolist())
    # Nothing after the last of them is read: on the hub that would be a download.
    until_last = islice(items, max(goals, default=-1) + 1)
    return (pair for pair in enumerate(until_last) if pair[0] in goals)


class ParquetRows(RowSource):
    """Parquet files. `datasets` would hold several row groups of images in memory."""

    def open(self):
        self.bounds = []  # for each file, the numbers where its row groups begin, and its end
        columns = None
        start = 0
        for file in self.files:
            failed = as_input_error(f"{self.title} cannot be read: {file.name}")
            with failed, pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                groups = range(parquet.num_row_groups)
                sizes = [parquet.metadata.row_group(i).num_rows for i in groups]
            self.bounds.append(start + np.cumsum([0, *sizes]))
            if sum(sizes):  # an empty file may lack columns
                columns = [name for name in columns or names if name in names]
                start += sum(sizes)
        return columns

    def raw_rows(self, names, wanted):
        images = {self.raw_names.get(name) for name in (*PAIR_COLUMNS, *IMAGE_COLUMNS)}
        # Rows of text are small, and large batches are faster: 1,000,000 rows take 2 seconds.
        batch_size = 16 if images & names else 65536
        if wanted is None:
            wanted = np.arange(self.bounds[-1][-1])
        for file, bounds in zip(self.files, self.bounds):
            low, high = np.searchsorted(wanted, bounds[[0, -1]])
            yield from read_parquet(file, bounds, names, wanted[low:high], batch_size)


def read_parquet(file, bounds, names, wanted, batch_size):
    """(number, row) of the wanted rows of a file, sorted numbers. Row groups without such a row are
    skipped. bounds: the numbers where the row groups begin, and the end."""
    # Memory is bounded whatever the size of a row group: pyarrow reads a page as a whole, and
    # writes up to 1,024 rows into one, so 2 x 1,024 images are held for each image column at most.
    ends = np.searchsorted(wanted, bounds)
    groups = np.diff(ends).nonzero()[0].tolist()
    if not groups:
        return
    # iter_batches goes on from row group to row group, so a batch may span several.
    spans = [np.arange(bounds[i], bounds[i + 1]) for i in groups]
    numbers = np.concatenate(spans)
    # Without buffer_size, pyarrow reads a column of a row group as a whole.
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
        columns = [name for name in names if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size, row_groups=groups, columns=columns):
            here = numbers[: len(batch)]
            numbers = numbers[len(batch) :]
            is_wanted = np.isin(here, wanted[: len(here)])
            wanted = wanted[is_wanted.sum() :]
            rows = batch.to_pylist()  # pyarrow's take does not know all types of columns
            for i in is_wanted.nonzero()[0].tolist():
                yield int(here[i]), rows[i]
            if not len(wanted):
                return


class ImageFolderRows(RowSource):
    """Lines of metadata.jsonl, in which NAME_file_name is the file of the image NAME. `datasets`
    takes the first 10 MB's types for all of the file, and so makes a later 0.5 a 0.
    """

    def open(self):
        first = next(text_lines(self.files), None)
        return parse_line(*first) if first else None

    def raw_rows(self, names, wanted):
        for number, (file, line) in number_wanted(text_lines(self.files), wanted):
            row = parse_line(file, line)
            missing = ", ".join(sorted(names - row.keys() - {"has_label"}))
            if missing:
                raise InputError(f"row {number} (from 0) has no {missing}")
            yield number, row


def text_lines(files):
    """(file, line) of all lines that are not blank."""
    for file in files:
        with open(file, encoding="utf-8-sig") as lines:  # with or without a byte order mark
            yield from ((file, line) for line in lines if line.strip())


def parse_line(file, line):
    """A line of metadata.jsonl as {name: cell}."""
    row = {}
    for key, cell in json.loads(line).items():
        name = "image" if key == "file_name" else key.removesuffix("_file_name")
        if name != key:
            # Names are relative to the metadata.jsonl they stand in, as for `datasets`.
            cell = {"bytes": None, "path": cell and str(file.parent / cell)}
        row[name] = cell
    return row


class HubRows(RowSource):
    """A data set of the hub, streamed by `datasets`, at the revision it has when it is opened."""

    def __init__(self, title, path, name, split):
        self.name = name
        self.split = split
        super().__init__(title, path, None, [])

    def open(self):
        from datasets import load_dataset
        from huggingface_hub import HfApi

        # Without a revision, a set that is updated during a run would change under it.
        self.revision = None
        with suppress(Exception):  # load_dataset will say what is wrong
            self.revision = HfApi().dataset_info(self.name).sha
        self.stream = load_dataset(
            self.name, split=self.split, streaming=True, revision=self.revision
        )
        if self.stream.features:  # images stay bytes: a broken one costs its row alone
            self.stream = self.stream.decode(False)
        return next(iter(self.stream), None)

    def fingerprint(self):
        return self.revision or f"unknown {uuid.uuid4()}"

    def read_file(self, file, what):
        """`datasets` gives the hub's address of an image, or its place in a zip file of the hub."""
        if not re.match(r"(zip://[^:]*::)?hf://datasets/", file):
            raise InputError(f"{what} is not kept on the hub: {file}")
        with fsspec.open(file, "rb") as opened:
            return opened.read()

    def raw_rows(self, names, wanted):
        columns = [name for name in names if name in self.raw_names]
        return number_wanted(self.stream.select_columns(columns), wanted)


def read_prompts(path, column="caption"):
    """The prompts of a file or a data set, a list of texts.

    path: .txt, one a line; .jsonl, texts or objects with `column`; .json, a list of these or an
    object with these as values (MJHQ-30K); or whatever open_rows reads.
    InputError if it cannot be read, has no prompts, or one is no text.
    """
    path = str(path)
    suffix = Path(path).suffix.lower()
    with as_input_error(f"--prompts {path} cannot be read"):
        if suffix in (".txt", ".json", ".jsonl") and not Path(path).is_file():
            raise OSError("it does not exist, or is no regular file")
        if suffix == ".txt":
            items = [line.strip() for _, line in text_lines([path])]
        elif suffix == ".jsonl":
            items = [json.loads(line) for _, line in text_lines([path])]
        elif suffix == ".json":
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            items = list(content.values() if isinstance(content, dict) else content)
        else:
            items = [row for _, row in open_rows(path, "--prompts").rows((column,))]
    if not items:
        raise InputError(f"--prompts {path} has no prompts")
    try:
        texts = [item[column] if isinstance(item, dict) else item for item in items]
        return [normalise_caption(text, number) for number, text in enumerate(texts)]
    except KeyError as error:
        raise InputError(f"--prompts {path}: a row has no {error}") from error
    except InputError as error:
        raise InputError(f"--prompts {path}: {error}") from error


# ---------------------------------------------------------------------------------------- images
def decode_image(cell):
    """An image file's bytes, or a cell {"bytes": ...} -> a PIL image in RGB; None if not decodable.

    For animations, the first frame is used. The EXIF rotation is applied, transparency becomes
    white, 16-bit greys are scaled. None also where nothing tells which value is white (32-bit
    integers, floats), and beyond 89 million pixels: a small file could fill the memory.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        pixels = image.width * image.height
        if image.mode in ("I", "F") or pixels > Image.MAX_IMAGE_PIXELS:
            return None
        image.load()  # raises where the file is cut off
        with suppress(Exception):  # damaged EXIF data says nothing about the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except MemoryError:  # that says nothing about the image
        raise
    except Exception:  # Pillow's decoders raise nearly anything
        return None


def resize_and_crop(image, side):
    """A PIL image in RGB -> the square that a model sees.

    The shorter side becomes `side` (bicubic), the middle of the longer one is kept. Returns pixels
    (3, side, side) fp32 in [-1, 1] and SDXL's size conditioning (6,) fp32: original height and
    width, crop top and left, target height and width.
    """
    shorter = min(image.size)
    width = image.width * side // shorter  # rounded down, as in transformers' CLIP processor
    height = image.height * side // shorter
    left = (width - side) // 2
    top = (height - side) // 2
    bicubic = Image.Resampling.BICUBIC
    if max(width, height) <= 16 * side:
        small = image.resize((width, height), bicubic)
        small = small.crop((left, top, left + side, top + side))
    else:
        # 1 x 30,000 pixels would become 512 x 15,360,000, so only the middle is resized. Other
        # images keep CLIP's exact bits: Pillow rounds between its two passes, the box's size
        # decides which of them comes first, and that changes smooth pictures by up to 2 of 255.
        across = image.width / width
        down = image.height / height
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        small = image.resize((side, side), bicubic, box=box)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1
    sizes = [image.height, image.width, top, left, side, side]
    return pixels, torch.tensor(sizes, dtype=torch.float32)


# What a run will see is encoded once, ahead of the training, and kept in --cache. Everything there
# is stored under a key of the content it was made from. So nothing in it can be out of date, an
# image that stands in several pairs is encoded once, and runs share what they have in common.
# Whoever changes how images or captions are prepared has to change this number too.
CACHE_VERSION = 1
ROWS_PER_SHARD = 256  # rows of a cache file: what a killed run loses at the most
ENCODE_BATCH = 16  # images or captions that are encoded at once


def content_key(content):
    """64 bits that tell this content (bytes) from any other, as an int64. Never 0."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def image_key(content, mirrored=False):
    """The key of an image file's bytes. Its mirror image has the key with all bits inverted."""
    key = content_key(content)
    return ~key if mirrored else key


def caption_key(caption):
    return content_key(caption.encode())


def item_key(image_keys, caption_keys):
    """The key of an (image, caption) item, which is what a reward model scores: ints or tensors."""
    return image_keys ^ caption_keys


# A store is a folder, e.g. of latents; a file of it holds up to 256 rows:
#
#     key          (256,) int64             whose row this is
#     latent       (256, 4, 64, 64) fp16    the tensors, one or more
#     checksum     (256,) int64             of each row: damage would not show otherwise
#     undecodable  (n,) int64               keys that were tried and have no row
#
# Runs can fill one folder at the same time, since each writes files of its own. A file that is
# missing is as if it had never been written. One that is damaged is named and removed, and what it
# held is made again. Training reads memory maps: a page is in memory while it is used.
class TensorStore:
    """Rows of tensors under int64 keys, in a folder of safetensors files ("shards")."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, age=24 * 3600)  # younger ones may be another run's
        self.files = []
        self.tensors = {}  # file -> its tensors over a memory map, opened when first read
        self.keys = np.empty(0, np.int64)  # sorted
        # Where each key's row is: file number * 2^32 + row.
        self.places = np.empty(0, np.int64)
        self.undecodable = np.empty(0, np.int64)  # sorted keys of images that no decoder could read
        self.refresh()

    def refresh(self):
        """Take in the files that were written since, by this process or by others."""
        known = set(self.files)
        keys = [self.keys]
        places = [self.places]
        undecodable = [self.undecodable]
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in known:
                continue
            try:
                with safe_open(file, "np") as shard:
                    row_keys = shard.get_tensor("key").reshape(-1).astype(np.int64)
                    bad_keys = shard.get_tensor("undecodable").reshape(-1).astype(np.int64)
            except FileNotFoundError:  # another run found it damaged
                continue
            except (SafetensorError, TypeError) as error:  # TypeError: keys in a type NumPy lacks
                self.discard(file, error)
                continue
            keys.append(row_keys)
            first = len(self.files) << 32
            places.append(first + np.arange(len(row_keys)))
            undecodable.append(bad_keys)
            self.files.append(file)
        keys = np.concatenate(keys)
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.places = np.concatenate(places)[order]
        self.undecodable = np.unique(np.concatenate(undecodable))

    def discard(self, file, error):
        print(f"{file} is damaged ({first_line(error)}): what it held is made again", flush=True)
        file.unlink(missing_ok=True)

    def find(self, keys):
        """Keys (n,) int64 numpy -> where their rows are (n,), -1 where a row is missing."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        order = np.argsort(keys)  # millions of keys are found faster in their order
        last = len(self.keys) - 1
        nearest = np.empty(len(keys), np.int64)
        nearest[order] = np.searchsorted(self.keys, keys[order]).clip(max=last)
        return np.where(self.keys[nearest] == keys, self.places[nearest], -1)

    def read(self, keys):
        """Keys (n,) -> {name: (n, ...) tensor on the CPU}. KeyError where a row is missing,
        InputError where one is damaged: its file is then removed."""
        places = self.find(keys)
        missing = (places < 0).sum()
        if missing:
            raise KeyError(f"{self.folder} lacks {missing} of {len(keys)} rows")
        order = np.argsort(places, kind="stable")
        places = places[order]
        next_file = np.flatnonzero(np.diff(places >> 32)) + 1  # where another file's rows begin
        parts = [self.read_rows(group) for group in np.split(places, next_file)]
        back = torch.from_numpy(np.argsort(order))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def read_rows(self, places):
        """Some rows of one file: {name: (n, ...)}."""
        file = self.files[places[0] >> 32]
        rows = places & (2**32 - 1)
        try:
            if file not in self.tensors:
                with safe_open(file, "pt") as shard:
                    names = set(shard.keys()) - {"key", "undecodable"}
                    self.tensors[file] = {name: shard.get_tensor(name) for name in names}
            tensors = dict(self.tensors[file])
            expected = tensors.pop("checksum")[rows].tolist()
            if [checksum(tensors, row) for row in rows] != expected:
                raise ValueError("a checksum is wrong")
            return {name: tensor[rows] for name, tensor in tensors.items()}
        except (SafetensorError, ValueError, KeyError, IndexError, RuntimeError) as error:
            self.discard(file, error)
            text = f"{file} was damaged and is removed: --resume makes it again"
            raise InputError(text) from error

    def write(self, keys, tensors, undecodable=()):
        """Add rows: keys (n,) list, {name: (n, ...) tensor}; and keys of images without a row."""
        content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        checksums = [checksum(content, row) for row in range(len(keys))]
        content["key"] = torch.tensor(keys, dtype=torch.int64)
        content["undecodable"] = torch.tensor(undecodable, dtype=torch.int64)
        content["checksum"] = torch.tensor(checksums, dtype=torch.int64)
        # The name follows from the content, so two runs that write the same write one file.
        about = str([*keys, *undecodable])
        name = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
        with atomic(self.folder / f"{name}.safetensors") as temporary:
            save_file(content, temporary)


def checksum(tensors, row=...):
    """The CRC-32 of some tensors in the order of their names, or of a row of each."""
    total = 0
    for name in sorted(tensors):
        content = tensors[name][row].reshape(-1).view(torch.uint8)
        total = zlib.crc32(content.numpy(), total)
    return total


def prefetch(items, load, workers):
    """(key, load(content)) of each of the (key, content) items, in their order. Threads load a few
    items ahead, while the caller's model works on those before."""
    with ThreadPoolExecutor(workers) as pool:
        started = ((key, pool.submit(load, content)) for key, content in items)
        ahead = deque(islice(started, ENCODE_BATCH + workers))
        while ahead:
            key, future = ahead.popleft()
            ahead.extend(islice(started, 1))
            yield key, future.result()


def missing_items(store, items):
    """Those of the (key, content) items that a store knows nothing of, each once."""
    seen = set(store.undecodable.tolist())
    for key, content in items:
        if key not in seen and store.find(np.array([key]))[0] < 0:
            seen.add(key)
            yield key, content


def fill_store(store, items, load, encode, title, total, dist_info, workers=4):
    """Compute what a store lacks, over all ranks. This can be killed and started again: finished
    shards are kept.

    items: (key, content) of this rank's rows; what the store has is left out. load(content) ->
    something to encode, or None if it does not decode (in threads); encode(list of ENCODE_BATCH
    loaded) -> {name: (ENCODE_BATCH, ...)}."""
    loaded = prefetch(missing_items(store, items), load, workers)
    with tqdm(desc=title, total=total, unit="row", disable=not dist_info.is_main) as bar:
        while True:
            keys = []  # of the shard that is being made
            encoded = []  # its batches
            undecodable = []
            shard = islice(loaded, ROWS_PER_SHARD)
            while batch := list(islice(shard, ENCODE_BATCH)):
                undecodable += [key for key, content in batch if content is None]
                good = {key: content for key, content in batch if content is not None}
                keys += good
                if good:
                    # A batch always has the same size, by repetition of its last row: the last bits
                    # of a kernel's result depend on the batch size, and a row should not depend on
                    # the rows that came with it.
                    contents = list(good.values())
                    contents += contents[-1:] * (ENCODE_BATCH - len(good))
                    result = encode(contents)
                    encoded.append({name: rows[: len(good)].cpu() for name, rows in result.items()})
                bar.update(len(batch))
            if not keys and not undecodable:
                break
            names = encoded[0] if encoded else ()
            tensors = {name: torch.cat([part[name] for part in encoded]) for name in names}
            store.write(keys, tensors, undecodable)
    barrier()
    store.refresh()


def rounds(find_rows, data):
    """The rows that find_rows() says are still to be read, on all ranks, again and again until
    there are none. InputError if reading them makes no difference."""
    before = None
    while True:
        rows = broadcast_from_main(find_rows())
        if not len(rows):
            return
        if np.array_equal(rows, before):
            raise InputError(f"--data {data} changes while it is read")
        yield rows
        before = rows


class RowTable:
    """What is known of a set's R rows without opening an image, and the keys of the images that
    were read before: labels (R,) fp32, caption_keys (R,) and image_keys (R, K) int64, 0 where not
    read yet."""

    # It is kept in --cache, so that a start does not read the set. Files of the same sizes, times
    # and inodes (or the hub's revision) mean that it still holds; otherwise it is made anew, and
    # the images are read again. What has not changed in them has the same keys as before, and so
    # is still in the store.

    def __init__(self, cfg, dist_info, *layouts):
        """layouts: PAIR_COLUMNS and/or IMAGE_COLUMNS; the first whose columns the set has is
        taken."""
        self.source = open_rows(cfg.data)
        has = set(self.source.columns)
        self.image_columns = next((names for names in layouts if set(names) <= has), layouts[0])
        self.columns = ("caption",)
        if self.image_columns == PAIR_COLUMNS:
            self.columns = ("caption", "label_0")
        require_columns(self.source, (*self.columns, *self.image_columns))
        self.dist_info = dist_info
        place = cfg.data  # a hub id
        if os.path.exists(place):
            place = os.path.abspath(place)
        about = f"{place} {self.image_columns}"
        name = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
        self.file = Path(cfg.cache) / "rows" / f"{name}.safetensors"
        self.fingerprint = broadcast_from_main(dist_info.is_main and self.source.fingerprint())
        if dist_info.is_main and not self.load():
            self.scan()
            self.save()
        barrier()
        if not self.load():
            raise InputError(f"{self.file} cannot be read by every process: is --cache shared?")

    def scan(self):
        """Read captions and labels of all rows."""
        labels = []
        caption_keys = []
        for _, row in self.source.rows(self.columns):
            labels.append(row.get("label_0", 1.0))
            caption_keys.append(caption_key(row["caption"]))
        self.labels = torch.tensor(labels, dtype=torch.float32)
        self.caption_keys = torch.tensor(caption_keys, dtype=torch.int64)
        self.image_keys = torch.zeros(len(labels), len(self.image_columns), dtype=torch.int64)

    def metadata(self, tensors):
        return {"fingerprint": self.fingerprint, "checksum": str(checksum(tensors))}

    def save(self):
        tensors = {name: getattr(self, name) for name in ("labels", "caption_keys", "image_keys")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.file) as temporary:
            save_file(tensors, temporary, self.metadata(tensors))

    def load(self):
        """Whether the kept table is there, whole, and of the set as it is now."""
        try:
            with safe_open(self.file, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (OSError, SafetensorError):
            return False
        if metadata != self.metadata(tensors):
            return False
        vars(self).update(tensors)  # labels, caption_keys, image_keys
        return True

    def share_image_keys(self):
        """Bring together what the ranks have read, and keep it."""
        for keys in all_gather_objects(self.image_keys):
            self.image_keys = torch.where(keys != 0, keys, self.image_keys)
        if self.dist_info.is_main:
            self.save()
        barrier()

    def my_rows(self, rows):
        """This rank's part of some sorted rows: the ranks take blocks of 64 in turn."""
        block = np.arange(len(rows)) // 64
        return rows[block % self.dist_info.world_size == self.dist_info.rank]

    def check_scores(self, scores, cfg):
        """Refuse scores of other rows: the key of each item that was read is compared."""
        name = f"--scores {cfg.scores}" if cfg.scores else f"the scores in {cfg.out}"
        keys = torch.stack([scores["key_0"], scores["key_1"]], 1)
        if len(keys) != len(self.labels):
            text = f"have {len(keys)} rows, --data {cfg.data} has {len(self.labels)}"
            raise InputError(f"{name} {text}")
        is_read = self.image_keys != 0
        other = (is_read & (keys != self.item_keys())).any(1).nonzero()
        if len(other):
            text = f"were made from other rows than --data {cfg.data}: see row {int(other[0])}"
            raise InputError(f"{name} {text}")

    def item_keys(self):
        """(R, K): the key of each image with its caption; wrong where the image was not read."""
        return item_key(self.image_keys, self.caption_keys[:, None])


# How a sample comes about. With 3 rows to train on, batch 2 and 4 steps there are 8 samples:
#
#     k                 0  1  2 | 3  4  5 | 6  7      three epochs, each a new order of the rows
#     rows[k]           2  0  5 | 0  5  2 | 5  2      row numbers in the set (the others are ties)
#     sides[rows[k]]    (1, 0) ...                    e.g. the winner is image 1, the loser image 0
#     flips[k]          (False, True) ...             which of the two is mirrored
#     draw(k)           t, noise, dropped             from a generator of its own
#
# All of this is known before the first step. So what will be used can be encoded ahead, and
# everything else can be left alone: SmPO's sd15 recipe uses a quarter of Pick-a-Pic.
class SampleStream:
    """Sample k of the whole run, for every k. Its row and all its random draws follow from the seed
    and k alone: not from the number of GPUs or of restarts.

    table: the set; train_mask (R,) bool: its rows to train on; sides (R, K) long: which K images of
    a row a sample has, in this order (e.g. the winner, then the loser); extra: further values of
    the rows, (R,), which `batch` hands on.

    The constructor encodes what the run is going to meet and the cache lacks. A row with an image
    that does not decode gives its place to the next row of the epoch's order."""

    def __init__(self, cfg, dist_info, models, table, train_mask, sides, **extra):
        self.cfg = cfg
        self.dist_info = dist_info
        self.models = models
        self.table = table
        self.sides = np.asarray(sides)
        self.extra = extra
        self.train_rows = train_mask.nonzero()[:, 0].numpy()
        if not len(self.train_rows):
            raise InputError(
                f"--data {cfg.data}: its {len(train_mask)} rows are all ties or broken"
            )
        self.latent_shape = models.latent_shape(cfg.resolution)
        settings = f"{cfg.precision}-v{CACHE_VERSION}"
        vae = models.hashes["vae"][:16]
        self.latents = TensorStore(Path(cfg.cache) / f"latents-{vae}-{cfg.resolution}-{settings}")
        encoder = models.hashes["text encoder"][:16]
        self.embeddings = TensorStore(Path(cfg.cache) / f"captions-{encoder}-{settings}")
        self.flips = self.draw_flips()
        for to_read in rounds(self.rows_to_read, cfg.data):
            self.encode_images(to_read)
        self.encode_captions()
        models.free_encoders()  # their work is done: the memory is for the training
        if dist_info.is_main:
            usable = len(self.train_rows) - self.skipped
            print(f"{usable:,} of {len(train_mask):,} rows can be used{self.skipped_text()}")

    def skipped_text(self):
        if not self.skipped:
            return ""
        return f" ({self.skipped:,} were skipped: an image of them does not decode)"

    def draw_flips(self):
        """(samples, K) bool: which images are mirrored. Drawn ahead, since the cache needs to
        know."""
        shape = (self.cfg.batch, self.sides.shape[1])
        if not self.cfg.flip:
            return np.zeros((self.cfg.steps * shape[0], shape[1]), bool)
        draws = []
        for step in range(self.cfg.steps):
            random = generator(self.cfg.seed, "flip", step)
            draws.append(torch.rand(shape, generator=random) < 0.5)
        return torch.cat(draws).numpy()

    def choose_rows(self):
        """The row of each sample, as far as is known: each epoch is a new order of the training
        rows, in which the next decodable row takes the place of one that is not."""
        count = self.cfg.steps * self.cfg.batch
        size = len(self.train_rows)
        keys = self.keys_of(self.train_rows)
        undecodable = self.latents.undecodable  # as they are or mirrored
        broken = np.isin(keys, undecodable) | np.isin(~keys, undecodable)
        decodable = ~broken.any(1)
        if not decodable.any():
            raise InputError(f"--data {self.cfg.data}: no image of its training rows decodes")
        # E.g. order = [4, 0, 3, 1, 2] where 0 is broken: good = [0, 2, 3, 4], following = [0, 1, 1,
        # 2, 3], rows 4, 3, 3, 1, 2. (After the last good one comes the first again.)
        rows = []
        for epoch in range(math.ceil(count / size)):
            random = generator(self.cfg.seed, "order", epoch)
            order = torch.randperm(size, generator=random).numpy()
            good = decodable[order].nonzero()[0]  # positions in this order
            following = np.searchsorted(good, np.arange(size)) % len(good)
            rows.append(self.train_rows[order[good[following]]])
        self.skipped = int((~decodable).sum())
        return np.concatenate(rows)[:count]

    def keys_of(self, rows):
        """(n, K) int64: the keys of the images that samples of these rows have, in their order."""
        return self.table.image_keys.numpy()[rows[:, None], self.sides[rows]]

    def shown_views(self):
        """(R, K, 2) bool: which images samples show, as they are and mirrored."""
        shown = np.zeros((*self.table.image_keys.shape, 2), bool)
        shown[self.rows[:, None], self.sides[self.rows], self.flips.astype(int)] = True
        return shown

    def rows_to_read(self):
        """Sorted rows with an image that was not read yet or is not in the cache; of those that
        samples have as far as is known, self.rows (samples,)."""
        # Only reading an image shows whether it decodes. If one does not, other rows take its
        # place, and some of those may have to be read: another round.
        self.rows = broadcast_from_main(self.choose_rows())
        row, side, mirrored = self.shown_views().nonzero()
        keys = self.table.image_keys.numpy()[row, side]  # 0, of an unread image, is in no store
        keys = np.where(mirrored, ~keys, keys)
        return np.unique(row[self.latents.find(keys) < 0])

    def encode_images(self, to_read):
        """Read some rows, and encode those of their images that samples show and the cache
        lacks."""
        shown = self.shown_views()
        mine = self.table.my_rows(to_read)
        self.check_disk(int(shown[to_read].sum()))
        images = self.shown_images(mine, shown)
        fill_store(
            self.latents,
            images,
            self.load_image,
            self.encode_pixels,
            "encoding images",
            int(shown[mine].sum()),
            self.dist_info,
            self.cfg.workers,
        )
        self.table.share_image_keys()

    def shown_images(self, rows, shown):
        """The (key, (bytes, mirrored)) of images that samples show; notes every key on the way."""
        for row, cells in self.table.source.rows(self.table.image_columns, rows):
            for side, column in enumerate(self.table.image_columns):
                image = cells[column]
                self.table.image_keys[row, side] = image_key(image)
                for mirrored in shown[row, side].nonzero()[0]:
                    yield image_key(image, mirrored), (image, mirrored)

    def load_image(self, content):
        """(bytes, mirrored) -> (pixels, SDXL's six numbers), or None if it does not decode."""
        image_bytes, mirrored = content
        image = decode_image(image_bytes)
        if image is None:
            return None
        if mirrored:
            image = ImageOps.mirror(image)
        return resize_and_crop(image, self.cfg.resolution)

    def encode_pixels(self, loaded):
        pixels, sizes = zip(*loaded)
        # SDXL's VAE takes 20 GiB for 16 images at 1024 px: there it gets 4 at a time.
        at_once = max(1, ENCODE_BATCH * 512**2 // self.cfg.resolution**2)
        parts = torch.stack(pixels).split(at_once)
        latents = torch.cat([self.models.encode_images(part) for part in parts])
        return {"latent": latents.to(self.models.dtype), "size": torch.stack(sizes)}

    def encode_captions(self):
        """Encode the captions that samples have and the cache lacks, and the empty one."""
        met = np.unique(self.rows)
        keys = np.append(self.table.caption_keys.numpy()[met], caption_key(""))
        missing = broadcast_from_main(self.embeddings.find(keys) < 0)
        if not missing.any():
            return
        mine = self.table.my_rows(met[missing[:-1]])
        rows = self.table.source.rows(("caption",), mine)
        empty = [""] if self.dist_info.is_main else []  # once is enough
        captions = chain(empty, (row["caption"] for _, row in rows))
        items = ((caption_key(caption), caption) for caption in captions)
        fill_store(
            self.embeddings,
            items,
            str,
            self.models.encode_prompts,
            "encoding captions",
            len(mine),
            self.dist_info,
        )
        if (self.embeddings.find(keys) < 0).any():
            raise InputError(f"--data {self.cfg.data} changes while it is read")

    def check_disk(self, images):
        """Say what the cache will take at most, and refuse to start what cannot end."""
        size = math.prod(self.latent_shape) * self.models.dtype.itemsize
        needed = max(0, images - len(self.latents.keys)) * size  # what is there may be of these
        free = shutil.disk_usage(self.cfg.cache).free
        text = f"the latents of {images:,} images take up to {needed / 2**30:.1f} GiB"
        if needed > free:
            text = f"{text}, {free / 2**30:.1f} GiB are free"
            raise InputError(f"--cache {self.cfg.cache}: {text}")
        if self.dist_info.is_main and needed > 2**30:
            print(f"{text} in {self.cfg.cache}", flush=True)

    def digest(self, samples):
        """A hash of the set's labels, captions and scores, and of the first samples' images: what
        no sample has met yet need not have been read."""
        digest = hashlib.blake2b(self.keys_of(self.rows[:samples]).tobytes())
        for values in (self.table.labels, self.table.caption_keys, *self.extra.values()):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, numbers):
        """The B samples of these numbers, on the device: x0 (K B, 4, h, w), all first images, then
        all second ones; cond, the UNet's condition of the same length; t (B,) on the CPU; noise (B,
        4, h, w) to add; index (B,), the numbers; and the extra values (B,)."""
        numbers = np.asarray(numbers)
        rows = self.rows[numbers]  # (B,)
        draws = [self.draw(int(number)) for number in numbers]
        t, noise, dropped = zip(*draws)
        image_keys = self.keys_of(rows)
        image_keys = np.where(self.flips[numbers], ~image_keys, image_keys)
        images = self.latents.read(image_keys.T.ravel())  # all first images, then all second ones
        caption_keys = self.table.caption_keys.numpy()[rows]
        caption_keys = np.where(dropped, caption_key(""), caption_keys)
        cond = self.embeddings.read(caption_keys)
        copies = self.sides.shape[1]  # the images of a row share its caption
        cond = {name: torch.cat([value] * copies) for name, value in cond.items()}
        if "text_embeds" in cond:  # SDXL is told each image's original size and crop
            cond["time_ids"] = images["size"]
        device = self.models.device
        return {
            "x0": to_device(images["latent"].float(), device),
            "cond": {name: to_device(value, device) for name, value in cond.items()},
            "t": torch.stack(t),
            "noise": to_device(torch.stack(noise), device),
            "index": torch.from_numpy(numbers),
            **{name: to_device(values[rows], device) for name, values in self.extra.items()},
        }

    def draw(self, number):
        """Sample `number`'s timestep (), noise (4, h, w), and whether its caption is dropped."""
        random = generator(self.cfg.seed, "sample", number)
        t = torch.randint(len(self.models.alpha_bar), (), generator=random)
        noise = torch.randn(self.latent_shape, generator=random)
        dropped = bool(torch.rand(1, generator=random) < self.cfg.caption_dropout)
        return t, noise, dropped


# -------------------------------------------------------------------------------- 7. training
# The order of a run, and why: refuse what can be refused before anything is loaded; lock the output
# folder; load the models; open, score and encode the data; only then move aside what was in the
# folder and write to it. So a command that fails early leaves everything as it was.

# What may differ when a run is resumed. Everything else decides what is learnt.
MAY_CHANGE_ON_RESUME = (
    "preset out steps workers cache save_every keep_every resume overwrite compile checkpointing "
    "eval_prompts prompts judge eval_steps cfg"
).split()


def fixed_settings(cfg):
    settings = dataclasses.asdict(cfg)
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE_ON_RESUME}


def require_same_settings(cfg, settings):
    """A run goes on with the settings that it has, or not at all."""
    now = fixed_settings(cfg)
    for name, then in settings.items():
        if now.get(name) != then:
            raise InputError(
                f"--resume goes on with --{name} {then}, not {now.get(name)}: give the same"
            )


def check_ranges(cfg):
    """Refuse values outside of the range that their option names."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        range = field.metadata.get("metavar")
        if range and value is not None and not RANGES[range](value):
            raise InputError(f"--{field.name} must be {range}, it is {value}")


def validate_config(cfg, dist_info):
    """Refuse what can be refused before anything is loaded or written."""
    check_ranges(cfg)
    if cfg.compile and cfg.lora:  # the reference, without its adapter, would round differently
        raise InputError("--compile and --lora do not go together")
    if cfg.resolution % 8:
        raise InputError(f"--resolution must be a multiple of 8, it is {cfg.resolution}")
    if cfg.batch % (cfg.micro_batch * dist_info.world_size):
        parts = f"--micro_batch {cfg.micro_batch} x {dist_info.world_size} (processes)"
        raise InputError(f"--batch {cfg.batch} does not divide by {parts}")
    for name in ("model", "data", "out", "cache"):
        if not getattr(cfg, name):
            raise InputError(f"--{name} is missing")


def check_output_dir(cfg):
    """Refuse to write over an earlier run without being told to, or to resume what does not fit."""
    out = Path(cfg.out)
    cache = Path(cfg.cache).resolve()  # may lie inside, and is no result
    if all(file.resolve() == cache for file in results_in(out)):
        return
    if not (cfg.resume or cfg.overwrite):
        advice = "--resume goes on, --overwrite starts over, or name another"
        raise InputError(f"--out {cfg.out} exists: {advice}")
    config = read_run_config(out)
    if config is None:
        raise InputError(f"--out {cfg.out} holds something else than a run: nothing is touched")
    if cfg.resume:
        # What is not given may stand in the file resolved; the checkpoint decides about that.
        given = {name for name, value in fixed_settings(cfg).items() if value is not None}
        require_same_settings(cfg, {name: config[name] for name in given if name in config})
        require_checkpoint(out, config)
    else:
        refuse_inputs_inside(cfg, out)


def results_in(out):
    """What a run's folder holds, but for hidden files: the lock, what was set aside before, and
    somebody's .git."""
    files = out.iterdir() if out.exists() else ()
    return [file for file in files if not file.name.startswith(".")]


def read_run_config(out):
    """The config.json of a run's folder, or None if it is not one."""
    try:
        config = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return None
    keys = {"preset", "model", "data", "steps", "versions"}
    return config if isinstance(config, dict) and keys <= set(config) else None


def require_checkpoint(out, config):
    """A run that has saved checkpoints and has none now would silently start over."""
    log = out / "log.jsonl"
    steps = len(log.read_text().splitlines()) if log.exists() else 0
    if steps > config.get("save_every", steps) and not find_checkpoints(out):
        raise InputError(
            f"{out}: its log has {steps} steps, its checkpoint is gone: --overwrite starts over"
        )


def refuse_inputs_inside(cfg, out):
    """--overwrite replaces the folder, so nothing that the run needs can lie in it."""
    names = ("model", "vae", "unet", "data", "cache", "prompts", "judge")
    for name in (*names, "scores", "reward", "reward_processor"):
        value = getattr(cfg, name, None)
        if value and Path(value).resolve().is_relative_to(out.resolve()):
            raise InputError(
                f"--{name} {value} lies inside --out {cfg.out}, which --overwrite replaces"
            )


@contextmanager
def output_lock(cfg, dist_info):
    """The output folder belongs to one run at a time, from the first look at it to the end."""
    # The system lets go of the lock when the process ends, however that happens. A restart by
    # torchrun may meet the workers of before, which are about to end: it waits a little.
    if not dist_info.is_main:
        yield
        return
    out = Path(cfg.out).absolute()
    folders = [out, *out.parents]
    made = [folder for folder in folders if not folder.exists()]  # those that have to be made
    existing = folders[len(made)]
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"--out {out} cannot be written: {existing} is no folder that can be written to"
        )
    lock = open_lock(out, cfg.out)
    try:
        check_output_dir(cfg)
        for folder in (out, out / "checkpoint"):
            remove_leftovers(folder, age=0)
        yield
    finally:
        empty = not results_in(out)
        if empty:  # nothing came of it: leave no trace
            (out / ".lock").unlink(missing_ok=True)  # while it is still ours
        lock.close()
        if empty:
            with suppress(OSError):  # something else is in one of them by now
                for folder in made:
                    folder.rmdir()


def open_lock(out, name):
    """Open and lock the folder's lock file. A run that leaves no trace deletes its own: who has
    waited for that one holds a lock that nobody else will ever see, and has to begin again."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if fcntl:
            take_lock(lock, name)
        with suppress(FileNotFoundError):
            if os.path.samefile(lock.fileno(), out / ".lock"):
                return lock
        lock.close()


def take_lock(file, name, patience=10):
    """Lock an open file; InputError if somebody else has it for longer than `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise InputError(f"--out {name} is in use by another run") from None
            time.sleep(0.2)
        except OSError as error:  # some network storage has no locks
            print(
                f"--out {name} cannot be locked ({first_line(error)}): keep other runs away from it"
            )
            return None


def prepare_output_dir(cfg, dist_info):
    """Take the output folder, now that models and data are known to be good. With --overwrite the
    results of before are set aside; Trainer.finish deletes them when the new ones are complete."""
    barrier()
    if dist_info.is_main:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        old = results_in(out)
        if cfg.overwrite and not cfg.resume and old:
            aside = out / f".previous-{time.time_ns()}"
            aside.mkdir()
            for file in sorted(old, key=lambda file: file.name == "config.json"):
                file.rename(aside / file.name)
        if not (out / "config.json").exists():
            write_config(cfg)
    barrier()


def write_config(cfg):
    content = dataclasses.asdict(cfg) | {"versions": versions()}
    text = json.dumps(content, indent=1)
    write_text(Path(cfg.out) / "config.json", f"{text}\n")


def find_checkpoints(out):
    """The checkpoint files of a run, the newest last."""
    # The exact form: a copy somebody made beside it (step-best.pt) is not ours to load or delete.
    return sorted((Path(out) / "checkpoint").glob(f"step-{'[0-9]' * 8}.pt"))


def make_optimizer(cfg, weights):
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(weights, fused=True, **settings)
    from transformers.optimization import Adafactor

    # As Diffusion-DPO's code trains SDXL: the learning rate is used as it is
    return Adafactor(weights, scale_parameter=False, relative_step=False, **settings)


def tensorboard_writer(folder, step):
    """TensorBoard's writer where it is installed. What it shows from `step` on is removed: those
    steps are done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step)


class Trainer:
    """One training run: what lies between the loss and the disk, the same for every method.

    for micro_batches in trainer.steps():     # from the checkpoint on, with a progress bar
        for batch in micro_batches:           # gradient accumulation
            trainer.backward(loss, {...})     # a loss made with trainer.unet
        trainer.optimizer_step()
    trainer.finish()

    unet           the trained UNet, for the forward pass that gets a gradient (with DDP around it)
    raw_unet       the same without DDP, compiled with --compile
    no_grad_unet   the same weights for all other passes. In half precision it is a copy in that
                   precision, refreshed after each step: autocast would cast all weights anew in
                   each pass. The results are the same to the bit.
    extra_state    {name: what has state_dict and load_state_dict}: a method's own part of the
                   checkpoint. Modules are equal on all ranks, and saved once. Anything else belongs
                   to one rank, has a name that no other rank has, and is gathered.
    """

    def __init__(self, cfg, dist_info, models, samples, extra_state=None):
        self.cfg = cfg
        self.dist_info = dist_info
        self.models = models
        self.samples = samples
        self.extra_state = extra_state or {}
        self.out = Path(cfg.out)
        self.output_name = "lora" if cfg.lora else "unet"
        self.accumulate = cfg.batch // (cfg.micro_batch * dist_info.world_size)
        self.parameters = [p for p in models.unet.parameters() if p.requires_grad]
        self.weights = [p.detach() for p in self.parameters]  # the same memory, to read and copy to
        self.optimizer = make_optimizer(cfg, self.parameters)
        in_fp16 = cfg.precision == "fp16"
        self.scaler = torch.amp.GradScaler(dist_info.device.type, enabled=in_fp16)
        self.ema_weights = []
        if cfg.ema and dist_info.is_main:
            self.ema_weights = [weight.clone() for weight in self.weights]
        self.step = 0
        self.signal = 0
        self.half_unet = None
        if cfg.resume:
            self.load_checkpoint()
        if cfg.checkpointing:
            models.unet.enable_gradient_checkpointing()
        self.raw_unet = torch.compile(models.unet) if cfg.compile else models.unet
        self.unet = self.raw_unet
        if dist_info.world_size > 1:
            self.unet = DistributedDataParallel(self.raw_unet, gradient_as_bucket_view=True)
        self.board = tensorboard_writer(self.out, self.step) if dist_info.is_main else None
        if dist_info.is_main:
            write_config(cfg)
            self.print_summary()

    def print_summary(self):
        cfg = self.cfg
        size = sum(weight.numel() for weight in self.weights)
        kind = f"LoRA of rank {cfg.lora}, " if cfg.lora else ""
        world = f"{self.dist_info.world_size} {self.dist_info.device.type}"
        print(f"{kind}{size:,} trained parameters, {cfg.precision}, {world}")
        parts = f"{self.accumulate} x {self.dist_info.world_size} x {cfg.micro_batch}"
        rows = cfg.steps * cfg.batch
        epochs = rows / len(self.samples.train_rows)
        print(f"{cfg.steps} steps of {cfg.batch} rows ({parts}), lr {cfg.lr:g}")
        print(f"{rows:,} samples will be seen, {epochs:.2f} epochs", flush=True)

    @property
    def no_grad_unet(self):
        if self.models.dtype == torch.float32 or self.cfg.lora:
            return self.raw_unet
        if self.half_unet is None:
            self.half_unet = frozen_copy(self.models, self.cfg)
        return self.half_unet

    def steps(self):
        """For each optimizer step that is left, an iterator over this rank's micro-batches. What
        moves it on is `optimizer_step`, which counts the steps."""
        self.bar = tqdm(
            total=self.cfg.steps,
            initial=self.step,
            desc=self.out.name,
            disable=not self.dist_info.is_main,
        )
        stops = (signal.SIGTERM, signal.SIGINT)
        # A job that a shell runs with "&" has Ctrl-C ignored: then it stays so.
        stops = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.stop_after_step) for number in stops}
        try:
            while self.step < self.cfg.steps:
                self.started = time.perf_counter()
                self.waited = 0.0
                self.sums = defaultdict(float)
                self.models.calls = 0
                yield self.iter_micro_batches()
        finally:
            self.bar.close()
            if self.board:
                self.board.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_after_step(self, number, frame):
        """SIGTERM or Ctrl-C: end this step and save. A second one ends the process at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def iter_micro_batches(self):
        """This rank's micro-batches of the step. The step's samples are cut into micro-batches,
        which the ranks take in turn, so a micro-batch is the same whatever the number of ranks."""
        # With batch 32, micro-batches of 8 and two ranks, step 5 has samples 160 to 191:
        #     rank 0    160..167, then 176..183
        #     rank 1    168..175, then 184..191
        size = self.cfg.micro_batch
        for i in range(self.accumulate):
            number = i * self.dist_info.world_size + self.dist_info.rank
            start = self.step * self.cfg.batch + number * size
            before = time.perf_counter()
            batch = self.samples.batch(range(start, start + size))
            self.waited += time.perf_counter() - before
            if self.dist_info.world_size > 1:
                # As DDP.no_sync: only the last micro-batch's backward averages over the ranks.
                self.unet.require_backward_grad_sync = i + 1 == self.accumulate
            yield batch | {"number": number}

    def backward(self, loss, values):
        """Accumulate the gradient of a micro-batch's mean loss, and scalar tensors for the log."""
        # The gradient is the mean over all micro-batches: this division is over a rank's own, and
        # DDP takes the mean over the ranks. So it does not depend on how the batch is cut.
        self.scaler.scale(loss / self.accumulate).backward()
        for name, value in {"loss": loss, **values}.items():
            self.sums[name] += value.detach().float() / self.accumulate

    def optimizer_step(self):
        """Clip, update the weights and what follows them, log, and save where it is time."""
        cfg = self.cfg

        # Update the weights. (fp16's scaler has multiplied the loss, so that small gradients do not
        # become 0. unscale_ takes that back, so that clip is in the gradient's own unit.)
        lr = cfg.lr * min(1.0, (self.step + 1) / max(1, cfg.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        # Update the EMA weights and the half-precision copy.
        # A short memory at first: the weights of the first steps should not stay in the average.
        ema_decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
        if self.ema_weights:
            torch._foreach_lerp_(self.ema_weights, self.weights, 1 - ema_decay)
        if self.half_unet is not None:
            copy_weights(self.models.unet, self.half_unet)

        # Wait for the GPU, once a step, and log.
        values = self.mean_over_ranks(grad_norm)
        stopped = values.pop("signal") > 0  # any rank's signal: all stop after the same step
        self.refuse_non_finite(values)
        if cfg.ema:
            values["ema_decay"] = ema_decay
        self.log({"step": self.step, **values, "lr": lr, **self.speed()})
        self.step += 1

        # Save.
        if self.dist_info.is_main and cfg.keep_every and self.step % cfg.keep_every == 0:
            self.save_unet(f"{self.output_name}-{self.step}")
        if self.step % cfg.save_every == 0 or self.step == cfg.steps or stopped:
            self.save_checkpoint()
        if stopped:
            text = f"stopped after step {self.step} of {cfg.steps}, all saved: --resume goes on"
            raise Stopped(text)

    def mean_over_ranks(self, grad_norm):
        """The step's logged values as numbers: the one wait for the device in a step."""
        # UNet calls a row, of all ranks. (Times world_size, since the mean below divides by it.)
        calls = self.models.calls * self.dist_info.world_size / self.cfg.batch
        more = grad_norm.new_tensor([calls, self.signal])
        values = torch.stack([*self.sums.values(), grad_norm.float(), *more])
        if self.dist_info.world_size > 1:
            dist.all_reduce(values)
        values = (values / self.dist_info.world_size).tolist()
        return dict(zip([*self.sums, "grad_norm", "unet_calls", "signal"], values))

    def refuse_non_finite(self, values):
        """End all ranks before such a step is saved. (fp16's scaler skips a step whose gradient has
        overflowed, and lowers its scale: with it only the loss tells.)"""
        names = ("loss",) if self.scaler.is_enabled() else ("loss", "grad_norm")
        for name in names:
            if not math.isfinite(values[name]):
                text = f"the {name} is {values[name]} at step {self.step}"
                raise InputError(f"{text}; the last checkpoint is kept")

    def speed(self):
        seconds = time.perf_counter() - self.started
        memory = None
        if self.dist_info.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        elif resource:
            unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        rows_per_s = self.cfg.batch / seconds
        return {"rows_per_s": rows_per_s, "waiting": self.waited / seconds, "memory_gb": memory}

    def log(self, line):
        if not self.dist_info.is_main:
            return
        # JSON has no infinity: such a value (a gradient in fp16's first steps) is null.
        for name, value in line.items():
            if value is not None and not math.isfinite(value):
                line[name] = None
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if value is not None and name != "step":
                    self.board.add_scalar(name, value, line["step"])
        shown = {name: line[name] for name in list(self.sums)[:3]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def save_unet(self, name):
        """Write the UNet as diffusers does, in one file, or the LoRA: of the EMA weights, if there
        are any."""
        if self.ema_weights:
            trained = [weight.clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.ema_weights)
        with atomic(self.out / name) as temporary:
            if self.cfg.lora:
                save_lora(self.models, temporary)
            else:
                self.models.unet.save_pretrained(temporary, max_shard_size="100GB")
        if self.ema_weights:
            torch._foreach_copy_(self.weights, trained)

    def save_checkpoint(self):
        """A checkpoint is one file, complete or not there at all; only then do older ones go."""
        # DRO's buffers are each rank's own: they are gathered. Its policy is the same on all ranks.
        extra = {}
        own = {}
        for name, value in self.extra_state.items():
            is_same = isinstance(value, (torch.nn.Module, LoraView))
            part = extra if is_same else own
            part[name] = to_cpu(value.state_dict())
        for part in all_gather_objects(own):
            extra |= part
        if self.dist_info.is_main:
            state = {
                "step": self.step,
                "settings": fixed_settings(self.cfg),
                "data": self.samples.digest(self.step * self.cfg.batch),
                "models": self.models.hashes,
                "weights": self.weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema_weights": self.ema_weights,
                "extra": extra,
            }
            folder = self.out / "checkpoint"
            folder.mkdir(exist_ok=True)
            try:
                with atomic(folder / f"step-{self.step:08d}.pt") as temporary:
                    torch.save(state, temporary)
            except InputError as error:
                advice = "the one before it is whole, and --resume goes on from it"
                raise InputError(f"checkpoint of step {self.step}: {error}; {advice}") from error
            for older in find_checkpoints(self.out)[:-1]:
                older.unlink()
        barrier()

    def load_checkpoint(self):
        """Go on where the newest checkpoint stands; from the beginning where there is none."""
        files = find_checkpoints(self.out)
        if files:
            state = read_checkpoint(files[-1])
            require_same_settings(self.cfg, state["settings"])
            self.step = state["step"]
            if self.step > self.cfg.steps:
                raise InputError(
                    f"--resume: --steps {self.cfg.steps} is less than the {self.step} that are done"
                )
            for part, value in self.models.hashes.items():
                if state["models"][part] != value:
                    raise InputError(f"--resume: the {part} of --model is another one than before")
            if state["data"] != self.samples.digest(self.step * self.cfg.batch):
                text = "or its scores have changed since the run began"
                raise InputError(f"--resume: --data {self.cfg.data} {text}")
            self.restore(state)
        log = self.out / "log.jsonl"
        if self.dist_info.is_main and log.exists():
            # Steps after the checkpoint will be done again; the last line may be half a line.
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] < self.step]
            write_text(log, "".join(f"{line}\n" for line in kept))
        barrier()

    def restore(self, state):
        for weight, saved in zip(self.weights, state["weights"]):
            weight.copy_(saved)
        for weight, saved in zip(self.ema_weights, state["ema_weights"]):  # the main rank has these
            weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, value in self.extra_state.items():
            value.load_state_dict(state["extra"][name])

    def finish(self):
        """Write unet/ for the stock pipeline, and let go of what --overwrite had set aside."""
        if self.dist_info.is_main:
            self.save_unet(self.output_name)
            for old in self.out.glob(".previous-*"):
                shutil.rmtree(old)
            print(f"wrote {self.out / self.output_name}{self.samples.skipped_text()}", flush=True)
        barrier()


def read_checkpoint(path):
    """A checkpoint's content, read as tensors and never as code. InputError if the file is
    damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "settings", "models", "data", "weights", "optimizer"} - set(state)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # torch's reader raises nearly anything on a damaged file
        text = f"{path} cannot be read ({describe_error(error)})"
        raise InputError(f"{text}: --overwrite starts over") from error
    return state


def to_cpu(state):
    return {name: value.detach().cpu() for name, value in state.items()}
