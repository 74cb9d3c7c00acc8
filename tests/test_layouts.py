# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Training runs on other pipelines: v-prediction (Stable Diffusion 2.x) and SDXL's layout, with
small random weights. How such pipelines are loaded and called is the matter of test_loading.py."""

import pytest
import torch
from layouts import make_v_model, make_xl_model
from safetensors.torch import load_file

import dpo_baseline
import dro
import smpo

FILE = "unet/diffusion_pytorch_model.safetensors"
# method -> its script, more flags, and what the log calls its margin
METHODS = {
    "smpo": (smpo, [], "margin"),
    "dpo": (dpo_baseline, [], "margin"),
    "sft": (dpo_baseline, ["--sft"], None),
    "dro": (dro, ["--experts", "8", "--rollout_steps", "5"], "gap"),
}
# the trained UNet itself is the policy, or an older copy of it whose samples are kept
OLD_SAMPLES = ["--experts", "8", "--rollout_steps", "5", "--refresh_every", "2", "--buffer", "8"]
METHODS["dro-old"] = (dro, OLD_SAMPLES, "gap")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{layout: folder of its pipeline}"""
    folder = tmp_path_factory.mktemp("models")
    return {"v": make_v_model(folder / "v"), "xl": make_xl_model(folder / "xl")}


@pytest.fixture
def flags(make_set, rows, tmp_path):
    """A short run's flags, with everything switched on that a sample may meet."""
    run = "--batch 4 --micro_batch 2 --warmup 0 --eval_prompts 0 --flip --caption_dropout 0.5"
    return [*run.split(), "--data", make_set(rows[:12]), "--cache", str(tmp_path / "cache")]


def sample(model, unet):
    """A latent that the stock pipeline samples with a trained UNet."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    pipe = DiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False).to(torch.float32)
    pipe.unet = UNet2DConditionModel.from_pretrained(unet, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red star on navy"
    random = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, output_type="latent", generator=random).images


@pytest.mark.parametrize("layout", ["v", "xl"])
@pytest.mark.parametrize("method", METHODS)
def test_training(layout, method, models, flags, tmp_path, log_of):
    """The margin is exactly 0 at step 0 and then moves; a resumed run has the same weights to the
    bit; the stock pipeline samples with the result."""
    script, more, margin = METHODS[method]
    flags = [*flags, *more, "--model", models[layout]]
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    script.main([*flags, "--steps", "3", "--out", str(whole)])
    script.main([*flags, "--steps", "2", "--out", str(cut)])
    script.main([*flags, "--steps", "3", "--out", str(cut), "--resume"])

    log = log_of(whole)
    assert len(log) == 3
    assert [line["loss"] for line in log] == [line["loss"] for line in log_of(cut)]
    if margin:
        # DRO takes the trained UNet's error on fresh policy samples to be 0. The reference's is
        # that of a v formed from the policy's eps, some roundings of 2^-24 away from its answer:
        # squared, 1e-14.
        rounding = 1e-12 if (method, layout) == ("dro", "v") else 0
        assert abs(log[0][margin]) <= rounding
        assert abs(log[1][margin]) > 1e-9
    expected = load_file(whole / FILE)
    actual = load_file(cut / FILE)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)

    trained = sample(models[layout], whole / "unet")
    assert trained.isfinite().all()
    assert not torch.equal(trained, sample(models[layout], f"{models[layout]}/unet"))


def test_a_compiled_run_trains_the_same(models, flags, tmp_path, monkeypatch, log_of):
    """torch.compile around trained UNet, reference and policy, resumed with it and without it.

    Its code generator is left out: that takes minutes, and is torch's own affair. What it compiles
    then runs the same kernels in the same order, so the losses differ by rounding at the most."""
    real_compile = torch.compile
    compiled = []

    def compile_without_code_generator(function, **kwargs):
        compiled.append(function)
        return real_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_code_generator)
    flags = [*flags, *OLD_SAMPLES, "--model", models["xl"], "--ema", "0.5"]
    plain = ["--out", str(tmp_path / "plain"), "--steps", "4"]
    dro.main([*flags, *plain])
    assert not compiled
    out = ["--out", str(tmp_path / "compiled")]
    dro.main([*flags, *out, "--steps", "2", "--compile"])
    dro.main([*flags, *out, "--steps", "3", "--compile", "--resume"])
    assert len(compiled) == 2 * 3
    dro.main([*flags, *out, "--steps", "4", "--resume"])

    expected_log = log_of(tmp_path / "plain")
    actual_log = log_of(tmp_path / "compiled")
    assert actual_log[0]["gap"] == 0
    for expected, actual in zip(expected_log, actual_log, strict=True):
        # 4 steps of roundings by 2^-24 = 6e-8, each through some 30 layers
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    expected = load_file(tmp_path / "plain" / FILE)
    actual = load_file(tmp_path / "compiled" / FILE)
    assert expected.keys() == actual.keys()
    # Adam moves a weight by up to lr = 1e-4 a step, in the direction of its gradient. Where that is
    # mere rounding, nothing fixes the direction: such a weight may differ by 2 lr a step.
    assert all((expected[name] - actual[name]).abs().max() < 4 * 2e-4 for name in expected)
    changed = torch.cat([(expected[name] - actual[name]).abs().flatten() for name in expected])
    assert (changed > 1e-6).float().mean() < 0.01
