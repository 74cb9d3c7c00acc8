"""What a training step costs: `python tests/bench.py` (the tiny world), `--shape sd15 --device cuda`, ...

A step is timed against exactly the UNet calls it makes: the same batch sizes, in the same order, the same
ones with a gradient, replayed on random inputs right after each step, in the same process. The ratio is what
our own code costs (data, encoding, losses, optimizer, log); 1.00 would be free. It is given by the clock and,
on a CPU, by the process's computing time too, which other programs do not stretch; with --variants "no cache"
the VAE and text encoder count as our own. Each case is its own process.

UNet calls a row are counted and held against the formula: a forward counts 1, its backward 2 (3 with gradient
checkpointing). sd15 and sdxl are random weights of the true shapes on random images: speed and memory do not
depend on the values.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import dpo_baseline  # noqa: E402
import dro  # noqa: E402
import smpo  # noqa: E402

METHODS = {"sft": dpo_baseline, "dpo": dpo_baseline, "smpo": smpo, "dro": dro}
VARIANTS = {
    "": [], "compile": ["--compile", "1"], "channels_last": ["--channels_last", "1"],
    "checkpointing": ["--checkpointing", "1"], "no cache": ["--cache", ""],
}  # fmt: skip

# glibc gives freed pages back to the system, for the next step to fault in again (DPO: 40 MB a step). A
# replay right after a step finds them still there. That is the allocator's cost, not our code's: none here.
KEEP_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}
COUNTED = {
    "sd15": [(8, "adamw", True), (2, "adamw", False)],
    "sdxl": [(2, "adafactor", True), (2, "adamw", True)],
}  # fmt: skip


def formula(method, rows_t, T, n, S):
    """UNet sample-forwards a row that METHODS' equations ask for, backward not counted; rows_t: drawn t."""
    if method == "sft":
        return 1
    if method == "dpo":
        return 4  # winner and loser under the trained and the reference UNet
    if method == "smpo":
        steps = torch.ceil(rows_t * n / T).clamp(min=1)
        return 4 + 2 * 2 * steps.mean().item()  # two images, two calls an inversion step
    return 4 + (S - rows_t // (T // S)).float().mean().item()  # the step that meets t is the last


class Bench:
    """Steps in between Run.update and Run.update: records the UNet calls, then replays them."""

    def __init__(self, device):
        self.device, self.calls, self.step, self.bare, self.started = device, [], [], [], None
        self.forwards, self.example = [], None  # sample-forwards a step, a backward as 2; models and shapes

    def now(self):
        """Seconds on the clock and, without a GPU, of this process's computing: the first suffers from what
        else the machine does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.tensor([time.perf_counter()] * 2, dtype=torch.float64)
        return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)

    def install(self):
        predict, update, bench = common.Models.predict, common.Run.update, self

        def recorded(models, unet, xt, t, cond):
            shapes = {k: v.shape for k, v in cond.items()}
            bench.calls.append((unet, xt.shape, shapes, torch.is_grad_enabled()))
            bench.example = models, xt.shape, shapes
            return predict(models, unet, xt, t, cond)

        def timed(run):
            update(run)
            end = bench.now()
            if bench.started is not None:
                bench.step.append(end - bench.started)
            calls, bench.calls = bench.calls, []
            bench.forwards.append(sum(shape[0] * (3 if grad else 1) for _, shape, _, grad in calls))
            inputs = [(unet, torch.randn(shape, device=bench.device), torch.full((shape[0],), 500),
                       {k: torch.randn(s, device=bench.device) for k, s in cond.items()}, grad)
                      for unet, shape, cond, grad in calls]  # fmt: skip
            before = bench.now()
            for unet, x, t, cond, grad in inputs:
                with torch.set_grad_enabled(grad):
                    out = predict(run.models, unet, x, t, cond)
                if grad:
                    out.square().mean().backward()
            if bench.started is not None:
                bench.bare.append(bench.now() - before)
            run.optimizer.zero_grad()
            bench.started = bench.now()

        common.Models.predict, common.Run.update = recorded, timed


def random_pipeline(shape, folder):
    """A pipeline folder with random weights of SD1.5's or SDXL's true shapes, fp16 on the disk."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    words = {"subfolder": "tokenizer", "model_max_length": 77}
    tokenizer = CLIPTokenizer.from_pretrained(common.TINY / "model", **words)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, vocab_size=49408, **ids)  # fmt: skip
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            force_upcast=False,
        ),
        "scheduler": DDIMScheduler.from_pretrained(common.TINY / "model", subfolder="scheduler"),
        "tokenizer": tokenizer, "text_encoder": CLIPTextModel(text), "unet": unet_of(shape),
    }  # fmt: skip
    kind = StableDiffusionPipeline
    if shape == "sdxl":
        kind, big = StableDiffusionXLPipeline, CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, vocab_size=49408, **ids,
        )  # fmt: skip
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(big)}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        if name in parts:
            parts[name] = parts[name].half()
    kind(**parts).save_pretrained(folder)
    return str(folder)


def unet_of(shape):
    """The UNet of stable-diffusion-v1-5 or stable-diffusion-xl-base-1.0, by its published configuration."""
    from diffusers import UNet2DConditionModel

    if shape == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def random_pairs(path, side, count=16):
    """Pairs of noise images in Pick-a-Pic's columns, and a file of random scores beside them."""
    import io

    from datasets import Dataset
    from PIL import Image

    def jpeg(i):
        pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(i))
        buffer = io.BytesIO()
        Image.fromarray(pixels.byte().numpy()).save(buffer, "JPEG")
        return buffer.getvalue()

    rows = [{"caption": f"a red star {i}", "jpg_0": jpeg(2 * i), "jpg_1": jpeg(2 * i + 1),
             "label_0": float(i % 2)} for i in range(count)]  # fmt: skip
    Dataset.from_list(rows).to_parquet(path)
    scores = {f"score_{k}": torch.randn(count, generator=torch.Generator().manual_seed(k)) for k in (0, 1)}
    keys = {f"key_{k}": torch.tensor([common.item_key(r, f"jpg_{k}") for r in rows]) for k in (0, 1)}
    metadata = {"scorer": "random", "unit": "none", "data": common.sha256(common.hash_rows(rows))}
    common.write(path.with_name("scores.safetensors"), scores | keys, metadata)


def matmul_rate(device):
    """bf16 multiply-adds a second that this chip reaches on a large product, times 2: FLOP/s."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for repeats in (3, 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ a
        torch.cuda.synchronize()
    return 2 * 8192**3 * repeats / (time.perf_counter() - start)


def flops_of(models, shape, cond):
    """FLOP of one sample's forward."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, *shape[1:], device=models.device)
    cond = {k: torch.randn(1, *s[1:], device=models.device) for k, s in cond.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.predict(models.unet, x, torch.tensor([500]), cond)
    return counter.get_total_flops()


def case(method, variant, shape, steps, folder, more):
    """One case, in this process: a line of the table as a dict."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, folder, more = Bench(device), Path(folder), list(more)
    flags = ["--out", str(folder / "out"), "--overwrite", "1", "--eval_prompts", "0"]
    flags += ["--save_every", "100000", "--steps", str(steps), "--cache", str(folder / "cache"), *more]
    if shape != "tiny":
        model, data = folder / shape, folder / "pairs.parquet"
        side = 512 if shape == "sd15" else 1024
        if not model.exists():
            random_pipeline(shape, model)
            random_pairs(data, side)
        flags += ["--preset", shape, "--model", str(model), "--data", str(data), "--workers", "0"]
        flags += ["--scores", str(folder / "scores.safetensors")] if method != "sft" else []
        flags += ["--experts", "16"] if method == "dro" else []
        if "--batch" not in more:
            flags += ["--batch", str(METHODS[method].PRESETS[shape]["micro_batch"])]
    flags += ["--sft", "1"] if method == "sft" else []
    flags += VARIANTS[variant]
    drawn, get = [], common.Samples.__getitem__

    def watched(samples, k):  # the t that the formula needs
        item = get(samples, k)
        drawn.append(item["t"])
        return item

    common.Samples.__getitem__ = watched
    bench.install()
    METHODS[method].main(flags)
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    counted = sum(line["unet_calls"] for line in log) / len(log)
    t, T = torch.stack(drawn), 1000
    config = json.loads((folder / "out" / "config.json").read_text())
    t = config.get("min_t", 0) + t * (T - config.get("min_t", 0)) // T
    expected = formula(method, t, T, config.get("inversion_steps"), config.get("rollout_steps"))
    skip = 2  # compilation, caches
    step, bare = (torch.stack(v[skip:]) for v in (bench.step, bench.bare))
    ratio, computing = (step / bare).unbind(1)
    step = step[:, 0]
    result = {
        "method": method, "variant": variant, "calls": counted, "formula": expected,
        "ratio": ratio.median().item(), "computing": computing.median().item(),
        "low": computing.quantile(0.25).item(), "high": computing.quantile(0.75).item(),
        "rows_per_s": config["batch"] / step.median().item(), "step": step.median().item(),
        "waiting": sum(line["waiting"] for line in log[skip:]) / len(log[skip:]),
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "batch": config["batch"],
    }  # fmt: skip
    if device.type == "cuda":
        result["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        result["device"] = torch.cuda.get_device_name()
        forwards = torch.tensor(bench.forwards[skip + 1 :]).float().mean().item()
        result["of_matmul"] = flops_of(*bench.example) * forwards / result["step"] / matmul_rate(device)
    return result


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak: what an allocator would have to hold (no fragmentation)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def gone(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out


def count_memory(shape, samples, optimizer, checkpointing):
    """Peak GiB of a training step's UNets, gradients, optimizer and activations at the true shapes, in bf16
    autocast, from fake tensors: nothing is computed. VAE and text encoders (0.4 GB for SD1.5, 1.8 GB for
    SDXL, in half; off the GPU with --cache) and the allocator's fragmentation come on top."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    xl = shape == "sdxl"
    with FakeTensorMode(), LiveBytes() as memory:
        unet, ref = unet_of(shape), unet_of(shape).requires_grad_(False)
        for module in ref.modules():  # as common.reference_unet
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                for name, value in list(module.named_parameters(recurse=False)):
                    small = torch.empty(value.shape, dtype=torch.bfloat16)
                    setattr(module, name, torch.nn.Parameter(small, requires_grad=False))
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = list(unet.parameters())
        kind = common.make_optimizer(common.TrainConfig(optimizer=optimizer, lr=1e-5), weights, 1)
        x, t = torch.randn(samples, 4, *[128 if xl else 64] * 2), torch.full((samples,), 500)
        hidden = torch.randn(samples, 77, 2048 if xl else 768)
        added = {"text_embeds": torch.randn(samples, 1280), "time_ids": torch.randn(samples, 6)}
        for _ in range(2):  # the second step has the optimizer's state
            memory.peak = 0
            outputs = []
            for network, grad in ((ref, False), (unet, True)):
                with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
                    outputs.append(network(x, t, hidden, added_cond_kwargs=added if xl else None)[0].float())
            (outputs[1] - outputs[0]).square().mean().backward()
            kind.step()
            kind.zero_grad()
            del outputs
    return memory.peak / 2**30


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=["tiny", "sd15", "sdxl"], default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dpo", "smpo", "dro"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[""])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", help="where random pipelines are kept; a temporary one by default")
    parser.add_argument("--count", action="store_true", help="memory by fake tensors instead: no GPU needed")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()  # more: flags of the method files
    if args.case:
        print("RESULT " + json.dumps(case(*args.case, args.shape, args.steps, args.folder, more)))
        return
    if args.count:
        print("| shape | pairs a micro-batch | optimizer | gradient checkpointing | peak GiB |")
        print("|---|---|---|---|---|")
        for pairs, optimizer, checkpointing in COUNTED[args.shape]:
            peak = count_memory(args.shape, 2 * pairs, optimizer, checkpointing)
            print(f"| {args.shape} | {pairs} | {optimizer} | {checkpointing} | {peak:.1f} |", flush=True)
        return
    folder = args.folder or tempfile.mkdtemp()
    print("| method | variant | UNet calls a row: counted, formula | step over its bare calls: clock | "
          "computing (quartiles) | rows/s | waiting for data | peak GB |\n" + "|---" * 8 + "|")  # fmt: skip
    for method in args.methods:
        for variant in args.variants:
            words = ["--shape", args.shape, "--steps", str(args.steps), "--folder", folder]
            words = [sys.executable, __file__, *words, "--case", method, variant, *more]
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ | KEEP_PAGES)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                print(f"| {method} | {variant} | failed: {done.stderr.strip().splitlines()[-1][:200]} |")
                continue
            r = json.loads(found[0][7:])
            print(f"| {method} | {variant} | {r['calls']:.2f}, {r['formula']:.2f} | {r['ratio']:.3f} | "
                  f"{r['computing']:.3f} ({r['low']:.3f} to {r['high']:.3f}) | {r['rows_per_s']:.2f} | "
                  f"{r['waiting']:.1%} | {r['memory_gb']:.2f} |"
                  + (f" {r['of_matmul']:.0%} of {r['device']}'s matmul rate |" if "device" in r else ""),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
