# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""--lora: adapters in place of all weights. The reference is the UNet without its adapter, DRO's
policy a second adapter, and what is written loads into the stock pipeline."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from layouts import make_xl_model
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import smpo

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the package peft is not installed"
)
SETTINGS = "--lora 4 --lr 1e-3 --warmup 0 --batch 4 --micro_batch 2 --eval_prompts 0 --flip"
EXPERTS = ["--experts", "8", "--rollout_steps", "5"]
# method -> its script, more flags, and what the log calls its margin
METHODS = {
    "smpo": (smpo, [], "margin"),
    "dpo": (dpo_baseline, [], "margin"),
    "sft": (dpo_baseline, ["--sft"], None),
    "dro": (dro, EXPERTS, "gap"),
    "dro-old": (dro, [*EXPERTS, "--refresh_every", "2"], "gap"),
}
LORA_FILES = ["pytorch_lora_weights.safetensors", "kohya.safetensors"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{layout: folder of its pipeline}"""
    folder = tmp_path_factory.mktemp("models")
    return {"tiny": str(TINY / "model"), "xl": make_xl_model(folder / "xl")}


@pytest.fixture
def run(models, make_set, rows, tmp_path):
    """run("name", method, more flags, layout="tiny") trains and returns the run's folder."""
    data = make_set(rows[:12])

    def train(name, method, *more, layout="tiny"):
        script, flags, _ = METHODS[method]
        paths = ["--model", models[layout], "--data", data, "--out", str(tmp_path / name)]
        cache = ["--cache", str(tmp_path / "cache")]
        script.main([*SETTINGS.split(), *flags, *paths, *cache, *more])
        return tmp_path / name

    return train


def checkpoint_of(out):
    return common.read_checkpoint(common.find_checkpoints(out)[-1])


def same(a, b):
    """Whether two lists of tensors are equal to the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ----------------------------------------------------------------------------- training
@needs_peft
@pytest.mark.parametrize("layout", ["tiny", "xl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_training(method, precision, layout, run, log_of):
    """The margin is exactly 0 at step 0 and then moves; a resumed run has the same adapter to the
    bit, and little more than that is in a checkpoint."""
    margin = METHODS[method][2]
    kind = {"layout": layout}
    whole = run("whole", method, "--precision", precision, "--steps", "3", **kind)
    run("cut", method, "--precision", precision, "--steps", "1", **kind)
    cut = run("cut", method, "--precision", precision, "--steps", "3", "--resume", **kind)

    log = log_of(whole)
    assert [line["loss"] for line in log] == [line["loss"] for line in log_of(cut)]
    if margin:
        assert log[0][margin] == 0
        assert log[1][margin] != 0
    expected = checkpoint_of(whole)
    actual = checkpoint_of(cut)
    assert same(expected["weights"], actual["weights"])
    assert not (whole / "unet").exists()
    for name in LORA_FILES:
        weights = load_file(whole / "lora" / name)
        assert weights.keys() == load_file(cut / "lora" / name).keys()
        assert any(value.abs().max() > 0 for key, value in weights.items() if "up" in key)


def load_models(model, precision="fp32", lora=4, **more):
    cfg = dpo_baseline.Config(model=model, precision=precision, lora=lora, **more)
    return cfg, common.Models(cfg, torch.device("cpu"))


@needs_peft
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["tiny", "xl"])
def test_what_is_trained(layout, precision, models):
    """The adapters alone, in fp32. The weights below them are the model's own, cast once as
    autocast would cast them at every call; the norms stay fp32."""
    _, plain = load_models(models[layout], precision, lora=0)
    _, adapted = load_models(models[layout], precision)
    base = dict(plain.unet.named_parameters())
    half = common.DTYPES[precision]
    modules = dict(plain.unet.named_modules())
    trained = 0
    for name, weight in adapted.unet.named_parameters():
        if ".lora_" in name:
            assert weight.requires_grad
            assert weight.dtype == torch.float32
            trained += weight.numel()
            continue
        assert not weight.requires_grad
        name = name.replace(".base_layer", "")
        module = modules[name.rpartition(".")[0]]
        cast = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        assert torch.equal(weight, base.pop(name).to(half if cast else torch.float32))
    assert not base
    assert 0 < trained < 0.2 * sum(weight.numel() for weight in plain.unet.parameters())


@needs_peft
def test_the_seed_fixes_the_adapters_start_and_nothing_else(models):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    _, first = load_models(models["tiny"], seed=0)
    assert torch.equal(torch.rand(3), expected)  # the global stream has not moved
    _, again = load_models(models["tiny"], seed=0)
    _, other = load_models(models["tiny"], seed=1)
    weights = [[p for p in m.unet.parameters() if p.requires_grad] for m in (first, again, other)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


@needs_peft
def test_weights_below_the_adapters_do_not_move(run, models):
    """They are in no checkpoint: a trained model without its adapter has to be the initial one."""
    cfg, adapted = load_models(models["tiny"])
    _, plain = load_models(models["tiny"], lora=0)
    reference = common.reference_unet(adapted, cfg)
    weights = [p for p in adapted.unet.parameters() if p.requires_grad]
    out = run("run", "dpo", "--steps", "3")
    with torch.no_grad():
        for weight, value in zip(weights, checkpoint_of(out)["weights"], strict=True):
            weight.copy_(value)

    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=random)
    t = torch.tensor([100, 700])
    cond = plain.encode_prompts(["a red star on navy", ""])
    with torch.no_grad():
        initial = plain.predict(plain.unet, x, t, cond)
        assert torch.equal(adapted.predict(reference, x, t, cond), initial)
        assert not torch.equal(adapted.predict(adapted.unet, x, t, cond), initial)
    # The reference's call has left the trained adapter active, and trainable.
    adapted.predict(adapted.unet, x, t, cond).square().mean().backward()
    assert all(weight.grad is not None for weight in weights)


@needs_peft
def test_ema_of_the_adapters(run, log_of):
    """The written adapter is the EMA of the trained one: decay (1 + n) / (10 + n) at first."""
    out = run(
        "run", "dpo", "--steps", "3", "--ema", "0.9", "--keep_every", "1", "--save_every", "1"
    )
    assert [line["ema_decay"] for line in log_of(out)] == [1 / 10, 2 / 11, 3 / 12]
    state = checkpoint_of(out)
    assert len(state["ema_weights"]) == len(state["weights"])
    assert not same(state["ema_weights"], state["weights"])
    assert (out / "lora-1").is_dir()
    written = load_file(out / "lora" / LORA_FILES[0])
    by_shape = sorted((tuple(v.shape), v.sum().item()) for v in written.values())
    assert by_shape == sorted((tuple(v.shape), v.sum().item()) for v in state["ema_weights"])


# ----------------------------------------------------------------------------- DRO's policy
@needs_peft
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_policy_is_a_second_adapter(precision, models):
    """It computes what the trained UNet does right after a refresh, to the bit, and keeps to that
    while the trained adapter moves on."""
    cfg, adapted = load_models(models["tiny"], precision)
    policy = common.policy_unet(adapted, cfg)
    trained = [p for p in adapted.unet.parameters() if p.requires_grad]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=random)
    t = torch.tensor([100, 700])
    cond = adapted.encode_prompts(["a red star on navy", ""])

    def answers():
        with torch.no_grad():
            by_policy = adapted.predict(policy, x, t, cond)
            return by_policy, adapted.predict(adapted.unet, x, t, cond)

    def move():
        with torch.no_grad():
            for weight in trained:
                weight.add_(0.05 * torch.randn(weight.shape, generator=random))

    move()
    common.copy_weights(adapted.unet, policy)
    after_refresh = answers()
    assert torch.equal(*after_refresh)
    move()
    after_move = answers()
    assert torch.equal(after_move[0], after_refresh[0])
    assert not torch.equal(after_move[1], after_refresh[1])
    assert [p for p in adapted.unet.parameters() if p.requires_grad] == trained


@needs_peft
def test_the_policy_samples_have_a_gradient_between_refreshes(run, log_of):
    """M = 2: at steps 0 and 2 the policy has just been refreshed, and its samples' error is 0.
    Kernels may round otherwise for this pass than for the rollout: by some 30 layers' 2^-24,
    squared."""
    log = log_of(run("run", "dro-old", "--steps", "4"))
    for step in (0, 2):
        assert log[step]["err_policy"] < 1e-10
    for step in (1, 3):
        assert log[step]["err_policy"] > 1e-6
    assert log[0]["gap"] == 0
    assert log[2]["gap"] != 0


@needs_peft
@pytest.mark.parametrize("method", ["smpo", "dpo", "dro", "dro-old"])
def test_gradient_checkpointing_changes_nothing(method, run, log_of):
    """It runs parts of the trained forward again during the backward pass, with whatever adapter is
    active then. Were that the reference's or the policy's, the gradients would be others."""
    plain = run("plain", method, "--steps", "2")
    with_checkpointing = run("checkpointing", method, "--steps", "2", "--checkpointing")
    grad_norms = [line["grad_norm"] for line in log_of(plain)]
    assert grad_norms == [line["grad_norm"] for line in log_of(with_checkpointing)]
    expected = checkpoint_of(plain)["weights"]
    assert same(expected, checkpoint_of(with_checkpointing)["weights"])


# ----------------------------------------------------------------------------- what is written
def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    prompts = ["a red star on navy", "a blue ring on cream"]
    return pipe(prompts, num_inference_steps=4, output_type="pt", generator=random).images


@needs_peft
@pytest.mark.parametrize("layout", ["tiny", "xl"])
def test_both_files_load_into_the_stock_pipeline(layout, run, models):
    """With the image that the trained UNet itself gives, to fp32's rounding: W x + B A x is formed
    in the same order, 4 steps of some 30 layers round numbers near 1 by 2^-24 each, so 1e-5."""
    from diffusers import DiffusionPipeline

    out = run("run", "dpo", "--steps", "3", "--lr", "1e-2", layout=layout)
    _, adapted = load_models(models[layout])
    trained = [p for p in adapted.unet.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight, value in zip(trained, checkpoint_of(out)["weights"], strict=True):
            weight.copy_(value)
    expected = sample(adapted.pipe)

    def stock():
        return DiffusionPipeline.from_pretrained(models[layout], low_cpu_mem_usage=False).to(
            torch.float32
        )

    assert (sample(stock()) - expected).abs().max() > 1e-2
    for name in LORA_FILES:
        pipe = stock()
        pipe.load_lora_weights(str(out / "lora"), weight_name=name)
        assert torch.allclose(sample(pipe), expected, atol=1e-5), name


# ----------------------------------------------------------------------------- without peft
WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # importing it now fails, as if it were not installed
import common, dpo_baseline
common.run_script(lambda: dpo_baseline.main(sys.argv[1:]))
"""


def test_without_peft_one_line_says_what_to_install(make_set, rows, tmp_path):
    paths = ["--data", make_set(rows[:4]), "--out", str(tmp_path / "out")]
    paths += ["--cache", str(tmp_path / "cache")]
    words = [sys.executable, "-c", WITHOUT_PEFT, *SETTINGS.split(), *paths]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: --lora needs the package peft: pip install peft"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
