"""Half precision must not become a preference: the margin at step 0 is exactly 0, and errors stay close to
fp32's."""

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import smpo

METHODS = {"dpo": (dpo_baseline, "margin"), "smpo": (smpo, "margin"), "dro": (dro, "gap")}


@pytest.mark.parametrize("method, precision", [*((m, "bf16") for m in METHODS), ("dpo", "fp16")])
def test_the_margin_at_step_0_is_exactly_zero(method, precision, make_set, rows, tmp_path, log_of):
    (script, name), steps = METHODS[method], 1 if precision == "fp16" else 2  # fp16 is slow on a CPU
    script.main([
        "--data", make_set(rows[:8]), "--out", str(tmp_path / "out"), "--cache", "", "--eval_prompts", "0",
        "--steps", str(steps), "--batch", "4", "--micro_batch", "4", "--warmup", "0",
        "--precision", precision,
        *(["--experts", "8"] if method == "dro" else []),
    ])  # fmt: skip
    log = log_of(tmp_path / "out")
    assert log[0][name] == 0 and (precision == "fp16" or log[1][name] != 0)


def test_bf16_errors_are_near_fp32s():
    """The same weights, noise and captions: a denoising error differs by less than 2 % of its value."""
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 16, 4, 8, 8, generator=random)
    t = torch.arange(20, 1000, 61)[:16]
    errors = []
    for precision in ("fp32", "bf16"):
        cfg = dpo_baseline.Config(model=str(TINY / "model"), precision=precision)
        models = common.Models(cfg, torch.device("cpu"))
        cond = models.encode_prompts(["a red star on navy"] * 16)
        xt = common.add_noise(x0, noise, t, models.alpha_bar)
        with torch.no_grad():
            out = models.predict(models.unet, xt, t, cond)
        assert out.dtype == torch.float32 and next(models.unet.parameters()).dtype == torch.float32
        errors.append(dpo_baseline.denoising_error(out, noise))
    assert not torch.equal(*errors) and ((errors[1] - errors[0]).abs() / errors[0]).max() < 0.02


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_alpha_bar_stays_in_fp32(precision):
    """Against the schedule in double precision: 1 - alpha_bar at t = 0 is right to 0.1 %; in fp16, which the
    released SmPO casts to, it is 15 % off."""
    cfg = dpo_baseline.Config(model=str(TINY / "model"), precision=precision)
    models = common.Models(cfg, torch.device("cpu"))
    exact = 1 - np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    off = np.abs(1 - models.alpha_bar.double().numpy() - exact) / exact
    assert off.max() < 1e-3 < 0.1 < abs(1 - models.alpha_bar.half()[0].double() - exact[0]) / exact[0]
    clean, noise = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    xt = common.add_noise(clean, noise, torch.tensor([0]), models.alpha_bar)
    assert xt.dtype == torch.float32 and xt[0, 0, 0, 0] == pytest.approx(exact[0] ** 0.5, rel=1e-3)


@pytest.mark.parametrize("lr, lost", [(1e-5, 0.9), (1e-4, 0.3)])
def test_bf16_weights_lose_small_updates(lr, lost):
    """An Adam step moves a weight by about lr: in bf16, as the released DRO trains, a third (lr 1e-4) to nine
    tenths (1e-5) of the weights stay where they are; in fp32 all of them move."""
    models = common.Models(dpo_baseline.Config(model=str(TINY / "model")), torch.device("cpu"))
    weights = torch.cat([p.detach().flatten() for p in models.unet.parameters() if p.dim() > 1])
    assert ((weights.bfloat16() - torch.tensor(lr).bfloat16()) == weights.bfloat16()).float().mean() > lost
    assert ((weights - lr) == weights).float().mean() < 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_resume(optimizer, make_set, rows, tmp_path, log_of):
    flags = [
        "--data", make_set(rows[:8]), "--cache", str(tmp_path / "c"), "--eval_prompts", "0", "--batch", "4",
        "--micro_batch", "4", "--optimizer", optimizer, "--save_every", "1", "--channels_last", "1",
    ]  # fmt: skip
    dpo_baseline.main([*flags, "--out", str(tmp_path / "a"), "--steps", "3"])
    dpo_baseline.main([*flags, "--out", str(tmp_path / "b"), "--steps", "1"])
    dpo_baseline.main([*flags, "--out", str(tmp_path / "b"), "--steps", "3", "--resume"])
    assert [x["loss"] for x in log_of(tmp_path / "a")] == [x["loss"] for x in log_of(tmp_path / "b")]
    file = "unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / name / file) for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)  # also in channels-last memory order
