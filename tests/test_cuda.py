# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: the copies in half precision give the trained UNet's bits there too,
nothing waits for the GPU but the log, and the results are the CPU's."""

import warnings

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import smpo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

EXPERTS = ["--experts", "8", "--rollout_steps", "5"]
# method -> its script, more flags, and what the log calls its margin
METHODS = {
    "smpo": (smpo, [], "margin"),
    "dpo": (dpo_baseline, [], "margin"),
    "sft": (dpo_baseline, ["--sft"], None),
    "dro": (dro, EXPERTS, "gap"),
    "dro-old": (dro, [*EXPERTS, "--refresh_every", "2", "--buffer", "8"], "gap"),
}


@pytest.fixture
def fp32_products():
    """Products of fp32 numbers in fp32. The scripts allow TF32 (10 bits), which only a comparison
    with the CPU minds; common.init_distributed sets it again at the start of each run."""
    matmul = torch.backends.cuda.matmul.fp32_precision
    conv = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = conv


@pytest.fixture
def run(make_set, rows, tmp_path):
    """run("name", method, more flags) trains on the GPU and returns the run's folder."""
    data = make_set(rows[:12])

    def train(name, method, *more):
        script, flags, _ = METHODS[method]
        settings = "--batch 4 --micro_batch 2 --warmup 0 --eval_prompts 0 --flip".split()
        paths = ["--data", data, "--out", str(tmp_path / name)]
        script.main([*settings, *flags, *paths, "--cache", str(tmp_path / "cache"), *more])
        return tmp_path / name

    return train


# ------------------------------------------------------------------------------- half precision
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name][2]])
def test_the_margin_at_step_0_is_exactly_zero(method, precision, run, log_of):
    log = log_of(run("run", method, "--precision", precision, "--steps", "2"))
    margin = METHODS[method][2]
    assert log[0][margin] == 0
    if precision != "fp16":  # whose scaler skips the first steps until no gradient overflows
        assert log[1][margin] != 0


def load_models(device, precision="fp32"):
    cfg = dpo_baseline.Config(model=str(TINY / "model"), precision=precision)
    return cfg, common.Models(cfg, torch.device(device))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_copy_computes_what_the_trained_unet_does(precision):
    """To the bit, at the start and after the weights have moved, at several batch sizes."""
    cfg, models = load_models("cuda", precision)
    half = common.reference_unet(models, cfg)
    random = torch.Generator("cuda").manual_seed(0)
    for n in (1, 3, 16):
        x = torch.randn(n, 4, 8, 8, device="cuda", generator=random)
        t = torch.randint(1000, (n,), device="cuda", generator=random)
        cond = models.encode_prompts(["a red star on navy"] * n)
        trained = models.predict(models.unet, x, t, cond).detach()
        with torch.no_grad():
            assert torch.equal(models.predict(half, x, t, cond), trained)
            for weight in models.unet.parameters():
                weight.mul_(1 + 0.01 * torch.randn(weight.shape, device="cuda", generator=random))
        common.copy_weights(models.unet, half)


# ------------------------------------------------------------------------------- the CPU's results
SHAPE = (6, 4, 8, 8)
T = torch.tensor([0, 130, 420, 510, 860, 999])


def on_cpu_and_gpu(function):
    """function(device) -> tuple of tensors, on both devices and brought to the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        results.append([tensor.cpu() for tensor in function(device)])
    return results


def probe(x, t, idx):
    """A network that is smooth, and different for every timestep and image."""
    shift = 0.2 * idx.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 4000
    return torch.tanh(1.3 * x + shift) * 0.9


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


# Of fp32: a step rounds numbers up to 10 by 2^-24 = 6e-8 of them a few times, and carries on the
# errors before it at a factor of up to 3. With up to 20 steps: 20 * 3 * 10 * 6e-8 = 4e-5.
STEPS_OF_FP32 = 4e-5


@pytest.mark.parametrize("mode", common.INVERSION_MODES)
def test_inversion_is_the_cpus(mode, alpha_bar, fp32_products):
    """eps is divided by sqrt(1 - ab), 0.03 at t = 0, so its tolerance is 30 times xt's."""

    def invert(device):
        return common.renoise_invert(probe, noise(0).to(device), T, alpha_bar, 5, mode)

    (xt_cpu, eps_cpu), (xt, eps) = on_cpu_and_gpu(invert)
    assert torch.allclose(xt, xt_cpu, atol=STEPS_OF_FP32)
    assert torch.allclose(eps, eps_cpu, atol=30 * STEPS_OF_FP32)


def test_rollout_is_the_cpus(alpha_bar, fp32_products):
    timesteps, stop = dro.trajectory(T, 1000, 20)

    def roll(device):
        return dro.rollout(probe, noise(0).to(device), timesteps, stop, alpha_bar)

    (xt_cpu, eps_cpu, t_cpu), (xt, eps, t) = on_cpu_and_gpu(roll)
    assert torch.equal(t, t_cpu)
    assert torch.allclose(xt, xt_cpu, atol=STEPS_OF_FP32)
    assert torch.allclose(eps, eps_cpu, atol=STEPS_OF_FP32)


def test_errors_of_the_unet_are_the_cpus(fp32_products):
    """Some 30 layers that each sum up to 1,152 products: sqrt(30 * 1152) * 6e-8 = 1e-5 of a
    prediction near 1, twice that of its square; 10 times that is allowed for layers that enlarge
    it."""

    def errors(device):
        _, models = load_models(device)
        cond = models.encode_prompts(["a red star on navy"] * len(T))
        x0 = noise(0).to(device)
        eps = noise(1).to(device)
        xt = common.add_noise(x0, eps, T, models.alpha_bar)
        with torch.no_grad():
            prediction = models.predict(models.unet, xt, T, cond)
        return (dpo_baseline.denoising_error(prediction, eps),)

    (expected,), (actual,) = on_cpu_and_gpu(errors)
    assert torch.allclose(actual, expected, rtol=2e-4)


# The GPU's exponentials and logarithms are off by up to 2 units in the last place: 2.4e-7.
def test_losses_are_the_cpus():
    random = torch.Generator().manual_seed(0)
    err = torch.rand(12, generator=random) * 0.02 + 0.1
    ref_err = torch.rand(12, generator=random) * 0.02 + 0.1
    p = torch.rand(6, generator=random)

    def losses(device):
        a = err.to(device)
        b = ref_err.to(device)
        dpo = dpo_baseline.dpo_loss(a, b, 500.0)
        ours = smpo.smpo_loss(a, b, p.to(device), 300.0, 10.0)
        return (*dpo, *ours, *dro.dro_loss(a, b, 0.003))

    for expected, actual in zip(*on_cpu_and_gpu(losses), strict=True):
        # sigmoids of up to 0.5 * 300 * 10 * 0.04 = 60: their arguments are rounded by 60 * 6e-8
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-5)


# ------------------------------------------------------------------------------- no hidden waiting
@pytest.fixture
def waiting_is_an_error():
    """Within it, whatever waits for the GPU raises an error: copies from ordinary memory too."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed(waiting_is_an_error):
    """What the tests below rely on."""
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        x.sum().item()
    with pytest.raises(RuntimeError):
        torch.zeros(3).to("cuda")


@pytest.mark.parametrize("mode", common.INVERSION_MODES)
def test_an_inversion_does_not_wait(mode, alpha_bar, waiting_is_an_error):
    x0 = torch.zeros(SHAPE, device="cuda")
    common.renoise_invert(probe, x0, T, alpha_bar, 5, mode)


def test_a_rollout_does_not_wait(alpha_bar, waiting_is_an_error):
    timesteps, stop = dro.trajectory(T, 1000, 20)
    dro.rollout(probe, torch.zeros(SHAPE, device="cuda"), timesteps, stop, alpha_bar)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_once(method, run):
    """For its log. Of two runs one has 3 steps more, so it waits 3 times more. Both save one
    checkpoint, and a run before them has encoded what they read."""
    flags = ["--save_every", "100", "--precision", "bf16"]
    run("before", method, *flags, "--steps", "6")
    waits = []
    for steps in (3, 6):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(f"run-{steps}", method, *flags, "--steps", str(steps))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert waits[1] - waits[0] == 3


def test_pinned_memory_is_not_reused_before_it_is_copied():
    """common.to_device returns before the copy is made, and its pinned memory is free for the next
    call. While the GPU is busy for longer than all of these calls take, nothing may be lost."""
    x = torch.zeros(8192, 8192, device="cuda")
    for _ in range(30):
        x = x @ x  # 30 times 1.1e12 operations: half a second at 60 TFLOP/s
    sent = [common.to_device(torch.full((256,), i), "cuda") for i in range(1000)]
    values = torch.stack(sent).cpu()
    assert torch.equal(values, torch.arange(1000)[:, None].expand(1000, 256))


# ------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_resume(method, precision, run, log_of):
    """A run cut after 2 of 4 steps goes on as if it had not been cut. Gradients are summed in no
    fixed order on a GPU, so losses differ in their last digits: here by less than 1 % after 2 steps
    more."""
    flags = ["--precision", precision]
    whole = log_of(run("whole", method, *flags, "--steps", "4"))
    run("cut", method, *flags, "--steps", "2")
    cut = log_of(run("cut", method, *flags, "--steps", "4", "--resume"))
    for expected, actual in zip(whole, cut, strict=True):
        assert actual["step"] == expected["step"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=0.01)
        assert actual["memory_gb"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_restored_weights_are_what_was_saved(method, run):
    """To the bit, whatever the kernels do: a resumed run without a step left writes it again."""
    flags = ["--ema", "0.9", "--steps", "2"]
    file = "unet/diffusion_pytorch_model.safetensors"
    before = load_file(run("run", method, *flags) / file)
    after = load_file(run("run", method, *flags, "--resume") / file)
    initial = load_file(TINY / "model" / file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], initial[name].float()) for name in before)
