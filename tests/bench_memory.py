# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step at SD1.5's and SDXL's true shapes, counted without a GPU: the
second half of bench.py, which calls it for --count."""

import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import dpo_baseline
import dro
import smpo

METHODS = {"sft": dpo_baseline, "dpo": dpo_baseline, "smpo": smpo, "dro": dro}


def make_unet(shape):
    """The UNet of stable-diffusion-v1-5 or stable-diffusion-xl-base-1.0, as published."""
    from diffusers import UNet2DConditionModel

    if shape == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak: what an allocator has to hold at the least."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.sizes = {}

    def gone(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out


def count_memory(method, shape, more):
    """(GiB of what stays, GiB at the peak) of a training step on the GPU: UNets, gradients,
    optimizer, EMA and activations, at the true shapes, from fake tensors: nothing is computed. The
    allocator's fragmentation comes on top, and while the set is encoded, the VAE and the text
    encoders."""
    flags = ["--preset", shape, "--model", "m", "--data", "d", *more]
    flags += ["--sft"] if method == "sft" else []
    cfg = common.parse(METHODS[method].Config, METHODS[method].PRESETS, flags)
    dtype = common.DTYPES[cfg.precision]
    old_policy = method == "dro" and cfg.refresh_every > 1
    fresh_policy = method == "dro" and not old_policy and not cfg.buffer
    # The largest batch: SFT has winners alone, DRO's trained UNet does without fresh policy
    # samples.
    n = cfg.micro_batch if method == "sft" or fresh_policy else 2 * cfg.micro_batch
    with FakeTensorMode(), LiveBytes() as memory:
        unet = make_unet(shape)
        weights = list(unet.parameters())
        copies = (method != "sft") + (
            method in ("smpo", "dro")
        )  # reference; policy or no_grad_unet
        kept = [list(cast_weights(unet, dtype)) for _ in range(0 if cfg.lora else copies)]
        if cfg.lora:
            weights = freeze_and_add_lora(unet, cfg.lora, dtype)
        if cfg.lora and old_policy:
            kept.append([p.detach().clone() for p in weights])
        if cfg.ema:
            kept.append([p.detach().clone() for p in weights])
        if cfg.checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = common.make_optimizer(cfg, weights)
        for _ in range(2):  # the second step has the optimizer's state
            memory.peak = 0
            fake_forward(unet, shape, cfg.resolution // 8, n, dtype).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.live / 2**30, memory.peak / 2**30


def cast_weights(unet, dtype):
    """(module, name, tensor) of every weight, in the dtypes of common.frozen_copy, which cannot
    copy fake tensors."""
    for module in unet.modules():
        half = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        for name, weight in list(module.named_parameters(recurse=False)):
            yield module, name, torch.empty_like(weight, dtype=dtype if half else None)


class LoraLinear(torch.nn.Module):
    """W x + B A x, as peft computes it (peft cannot be added to fake tensors either)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x.float()))


def freeze_and_add_lora(unet, rank, dtype):
    """What common.freeze_and_add_lora does -> the weights that are trained."""
    for module, name, tensor in cast_weights(unet, dtype):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    for name, module in list(unet.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(common.LORA_MODULES)):
            parent, _, own_name = name.rpartition(".")
            setattr(unet.get_submodule(parent), own_name, LoraLinear(module, rank))
    return [p for p in unet.parameters() if p.requires_grad]


def fake_forward(unet, shape, side, n, dtype):
    hidden = torch.randn(n, 77, 768 if shape == "sd15" else 2048, dtype=dtype)
    added = {"text_embeds": torch.randn(n, 1280), "time_ids": torch.randn(n, 6)}
    added = added if shape == "sdxl" else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        x = torch.randn(n, 4, side, side)
        return unet(x, torch.full((n,), 500), hidden, added_cond_kwargs=added).sample.float()


# The presets as they are, and with smaller batches, an EMA, an old policy or LoRA.
COUNTED = """
sft; dpo; dpo --micro_batch 8; dpo --micro_batch 8 --checkpointing 0; dpo --micro_batch 2
dpo --optimizer adamw; dpo --ema 0.9999; dpo --lora 16; dpo --lora 16 --micro_batch 2
smpo; smpo --micro_batch 8; smpo --lora 16
dro; dro --refresh_every 8; dro --refresh_every 8 --lora 16
"""


def print_count(shape, more):
    """A table of COUNTED, or of its methods with the flags that are given."""
    cases = [case.split() for case in COUNTED.strip().replace("\n", ";").split(";")]
    if more:
        cases = [[method, *more] for method in METHODS]
    print("| preset | method | GiB that stay | GiB at the peak |\n|---|---|---|---|")
    for method, *flags in cases:
        stay, peak = count_memory(method, shape, flags)
        words = " ".join([method, *flags])
        print(f"| {shape} | {words} | {stay:.1f} | {peak:.1f} |", flush=True)
