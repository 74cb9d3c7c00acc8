# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, the four methods side by side.

    python tests/bench.py                                  the tiny world
    python tests/bench.py --shape sd15 --micro_batch 8     SD1.5's shapes, random weights, on a GPU
    python tests/bench.py --shape sdxl --count             memory by counting: no GPU needed

Further flags go to the method files. Each method runs in a process of its own.

    UNet calls   sample-forwards a row (backwards not counted), and what the equations ask for
    over calls   a step's time over that of its bare UNet calls: the same batch sizes in the same
                 order, the same ones with a gradient, repeated on random inputs right after it.
                 What is above 1 is our own code: data, noise, losses, optimizer, log
    over full    a step's time over that of as many sample-forwards, with and without gradient, in
                 calls of the full micro-batch: what batches that shrink cost comes on top
    rows/s       pairs (DPO, SmPO), winners (SFT) or experts (DRO), of the whole step
    memory       GiB: peak of the process; on a GPU, of what was allocated there

Both ratios are given by the clock and, on a CPU, by the process's computing time too, which other
programs do not stretch. Speed and memory do not depend on the weights' values.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from bench_memory import METHODS, make_unet, print_count

import common
import dro
import eval as evaluation
import smpo

WARM_UP = 2  # steps that are not counted: memory, kernels' choice, compilation

# glibc gives freed pages back to the system, and the next step faults them in again (DPO: 40 MB a
# step). Calls that are repeated right after a step find them still there. That is the allocator's
# cost and not our code's, so nothing is given back here.
KEEP_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}


# ------------------------------------------------------------------------------- timing a step
@dataclass
class Call:
    """One call of a UNet: what is needed to make it again on random inputs."""

    unet: object
    grad: bool
    x: torch.Size
    cond: dict  # name -> (shape, dtype)

    def inputs(self, n, device):
        """Random inputs for a batch of n."""
        cond = {}
        for name, (shape, dtype) in self.cond.items():
            cond[name] = torch.randn(n, *shape[1:], device=device, dtype=dtype)
        t = torch.full((n,), 500, device=device)
        return torch.randn(n, *self.x[1:], device=device), t, cond


class RecordingModels(common.Models):
    """Notes every call of a UNet."""

    plain_predict = common.Models.predict

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.recorded = []

    def predict(self, unet, xt, t, cond):
        shapes = {name: (value.shape, value.dtype) for name, value in cond.items()}
        self.recorded.append(Call(unet, torch.is_grad_enabled(), xt.shape, shapes))
        return super().predict(unet, xt, t, cond)

    def repeat(self, call, inputs):
        with torch.set_grad_enabled(call.grad):
            out = self.plain_predict(call.unet, *inputs)
        if call.grad:
            out.square().mean().backward()


class TimingTrainer(common.Trainer):
    """Times each step, and right after it the same UNet calls twice: as they were, and in full
    micro-batches."""

    def __init__(self, *args):
        super().__init__(*args)
        TimingTrainer.last = self
        self.times = []  # of each step: (3: step, bare calls, full calls; 2: clock, computing)
        self.asked = []  # of each step: UNet calls a row that the equations ask for
        self.started_at = self.now()

    def now(self):
        """Seconds on the clock, and of this process's computing (on a GPU the clock's too)."""
        if self.models.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.tensor([time.perf_counter()] * 2, dtype=torch.float64)
        return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)

    def optimizer_step(self):
        numbers = range(self.step * self.cfg.batch, (self.step + 1) * self.cfg.batch)
        super().optimizer_step()
        step = self.now() - self.started_at
        calls = self.models.recorded
        bare = self.time_of([(call, call.x[0]) for call in calls])
        full = torch.zeros_like(bare)
        largest = max(call.x[0] for call in calls)
        for grad in (False, True):
            alike = [call for call in calls if call.grad == grad]
            if alike:
                batches = sum(call.x[0] for call in alike) / largest
                full += batches * self.time_of([(alike[-1], largest)])
        self.times.append(torch.stack([step, bare, full]))
        t = torch.stack([self.samples.draw(number)[0] for number in numbers])
        self.asked.append(asked_calls(self.cfg, t, len(self.models.alpha_bar)))
        self.models.recorded = []
        self.optimizer.zero_grad()
        self.started_at = self.now()

    def time_of(self, calls):
        """The time of (call, batch size) after (call, batch size), on random inputs."""
        inputs = [call.inputs(n, self.models.device) for call, n in calls]
        before = self.now()
        for (call, _), values in zip(calls, inputs):
            self.models.repeat(call, values)
        return self.now() - before


def asked_calls(cfg, t, T):
    """UNet sample-forwards a row, backwards not counted; t (B,): the rows' timesteps."""
    if isinstance(cfg, dro.Config):
        rollout = (cfg.rollout_steps - t // (T // cfg.rollout_steps)).float().mean().item()
        fresh = cfg.refresh_every == 1 and not cfg.buffer
        return rollout + (
            3 if fresh else 4
        )  # reference on both, trained UNet on the expert or both
    if isinstance(cfg, smpo.Config) and cfg.inversion != "none":
        n = cfg.inversion_steps
        if cfg.inversion == "release":  # steps onto 1 + T/n, 1 + 2T/n, ...; at t = 0, 1 onto 1
            steps = torch.ceil((t - 1) * n / T).clamp(1, n - 1)
        else:
            steps = torch.ceil(t * n / T).clamp(min=1)
        refined = steps if cfg.inversion != "paper" else torch.ones_like(steps)
        return 4 + 2 * (steps + cfg.renoise * refined).mean().item()  # two images a row
    return 1 if getattr(cfg, "sft", False) else 4


def run_case(method, shape, steps, folder, more):
    """One method in this process -> its row of the table."""
    common.Models = RecordingModels
    common.Trainer = TimingTrainer
    out = folder / f"out-{method}"
    flags = ["--steps", str(steps + WARM_UP), "--save_every", "1000000", "--eval_prompts", "0"]
    flags += ["--out", str(out), "--overwrite", "--cache", str(folder / "cache")]
    if shape != "tiny":
        flags += [
            "--preset",
            shape,
            "--model",
            str(folder / shape),
            "--vae",
            str(folder / shape / "vae"),
        ]
        flags += ["--data", str(folder / f"{shape}.parquet")]
        flags += ["--batch", str(METHODS[method].PRESETS[shape]["micro_batch"])]
    if shape != "tiny" and method in ("smpo", "dro"):
        flags += ["--scores", str(folder / f"{shape}.safetensors")]
    if method == "sft":
        flags += ["--sft"]
    METHODS[method].main([*flags, *more])

    trainer = TimingTrainer.last
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    made = sum(line["unet_calls"] for line in log) / len(log)
    asked = sum(trainer.asked) / len(trainer.asked)
    times = torch.stack(trainer.times[WARM_UP:])
    ratios = times[:, :1] / times[:, 1:]  # (steps; bare, full; clock, computing)
    (clock, computing), (full_clock, full_computing) = ratios.median(0).values.tolist()
    low, high = ratios[:, 0, 1].quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    cells = [
        method,
        f"{made:.2f}, {asked:.2f}",
        f"{clock:.3f}, {computing:.3f} ({low:.3f} to {high:.3f})",
        f"{full_clock:.3f}, {full_computing:.3f}",
        f"{trainer.cfg.batch / times[:, 0, 0].median().item():.2f}",
        f"{log[-1]['memory_gb']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------- random models
def make_pipeline(shape, folder):
    """A pipeline with random weights of the true shapes, in fp16 on the disk."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tiny = common.TINY / "model"
    words = {"subfolder": "tokenizer", "model_max_length": 77}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny, **words)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}

    def text_encoder(kind, width, layers):
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        heads = {"num_hidden_layers": layers, "num_attention_heads": width // 64}
        return kind(transformers.CLIPTextConfig(vocab_size=49408, **sizes, **heads, **ids))

    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        force_upcast=False,
    )
    scheduler = diffusers.DDIMScheduler.from_pretrained(tiny, subfolder="scheduler")
    first = text_encoder(transformers.CLIPTextModel, 768, 12)
    unet = make_unet(shape)
    parts = {"vae": vae, "unet": unet, "text_encoder": first, "tokenizer": tokenizer}
    if shape == "sdxl":
        second = text_encoder(transformers.CLIPTextModelWithProjection, 1280, 32)
        more = {"text_encoder_2": second, "tokenizer_2": tokenizer}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, **more, scheduler=scheduler)
    else:
        none = {"safety_checker": None, "feature_extractor": None}
        pipe = diffusers.StableDiffusionPipeline(
            **parts, **none, scheduler=scheduler, requires_safety_checker=False
        )
    pipe.to(torch.float16).save_pretrained(folder)


def make_pairs(path, side, count=16):
    """Pairs of noise images in Pick-a-Pic's columns, and a file of random scores beside them."""
    import io

    from datasets import Dataset
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    rows = [{"caption": f"a red star {i}", "label_0": float(i % 2)} for i in range(count)]
    scores = {}
    for k in (0, 1):
        scores[f"score_{k}"] = torch.randn(count, generator=random)
        keys = []
        for row in rows:
            pixels = torch.randint(256, (side, side, 3), generator=random)
            buffer = io.BytesIO()
            Image.fromarray(pixels.byte().numpy()).save(buffer, "JPEG")
            row[f"jpg_{k}"] = buffer.getvalue()
            image_key = common.image_key(row[f"jpg_{k}"])
            keys.append(common.item_key(image_key, common.caption_key(row["caption"])))
        scores[f"key_{k}"] = torch.tensor(keys)
    Dataset.from_list(rows).to_parquet(path)
    evaluation.write_scores(path.with_suffix(".safetensors"), scores, "random", "none", path)


# ------------------------------------------------------------------------------- the command
def parse_arguments():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--shape", choices=["tiny", "sd15", "sdxl"], default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--measured_steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="of random models and runs; else temporary")
    parser.add_argument("--count", action="store_true", help="count memory with fake tensors")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_known_args()


def print_table(args, more, folder):
    columns = ["UNet calls: made, asked", "over calls: clock, computing (quartiles)"]
    columns += ["over full: clock, computing", "rows/s", "memory"]
    print(f"| method | {' | '.join(columns)} |\n{'|---' * 6}|", flush=True)
    for method in args.methods:
        words = [sys.executable, __file__, "--shape", args.shape, "--folder", str(folder)]
        words += ["--measured_steps", str(args.measured_steps), "--case", method, *more]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | KEEP_PAGES)
        rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(rows[0] if rows else f"| {method} | failed: {error[:200]} |", flush=True)


def main():
    args, more = parse_arguments()
    if args.count:
        print_count("sdxl" if args.shape == "sdxl" else "sd15", more)
        return
    if args.case:
        print(run_case(args.case, args.shape, args.measured_steps, args.folder, more))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.shape != "tiny" and not (folder / args.shape).exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_pipeline(args.shape, folder / args.shape)
            make_pairs(folder / f"{args.shape}.parquet", 512 if args.shape == "sd15" else 1024)
        print_table(args, more, folder)


if __name__ == "__main__":
    main()
