# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What the authors' releases compute, and where this code departs from them, shown with numbers."""

import io

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from released import released_invert, released_path

import common
import dro

# Images of the tiny world that the two inversions are compared on.
IMAGES = 16


def constant(c):
    """A network that always answers c (N, C, h, w)."""
    return lambda x, t, rows: c[rows]


# -------------------------------------------------------------- the rebuilt loop is the release's
@pytest.mark.parametrize(
    "library, paths",
    {
        # A step is named by where it comes from: -199, 1, 201, 401, 601. Those below t are taken,
        # so the path ends at or above t, but never above 801.
        "0.20": {
            0: [(0, 1, -199)],
            1: [(0, 1, -199)],
            2: [(0, 1, -199), (1, 201, 1)],
            201: [(0, 1, -199), (1, 201, 1)],
            202: [(0, 1, -199), (1, 201, 1), (201, 401, 201)],
            801: [(0, 1, -199), (1, 201, 1), (201, 401, 201), (401, 601, 401), (601, 801, 601)],
            802: [(0, 1, -199), (1, 201, 1), (201, 401, 201), (401, 601, 401), (601, 801, 601)],
            999: [(0, 1, -199), (1, 201, 1), (201, 401, 201), (401, 601, 401), (601, 801, 601)],
        },
        # A step is named by where it goes to: 1, 201, 401, 601, 801. Those below t are taken, so
        # the path ends below t, and at t = 0 and 1 there is no step at all.
        "0.22": {
            0: [],
            1: [],
            2: [(0, 1, 1)],
            201: [(0, 1, 1)],
            202: [(0, 1, 1), (1, 201, 201)],
            801: [(0, 1, 1), (1, 201, 201), (201, 401, 401), (401, 601, 601)],
            802: [(0, 1, 1), (1, 201, 201), (201, 401, 401), (401, 601, 601), (601, 801, 801)],
            999: [(0, 1, 1), (1, 201, 201), (201, 401, 401), (401, 601, 601), (601, 801, 801)],
        },
    }.items(),
)
def test_steps_of_the_released_loop_by_hand(library, paths):
    for t, path in paths.items():
        assert released_path(t, 1000, 5, library) == path, t


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("library", ["0.20", "0.22"])
def test_the_rebuilt_loop_is_diffusers_inverse_scheduler(library, steps):
    """The installed diffusers names its steps as 0.22 did. 0.20 named the same step by the timestep
    one spacing below.
    """
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler.from_pretrained(TINY / "model", subfolder="scheduler")
    scheduler.set_timesteps(steps)
    shift = 1000 // steps if library == "0.20" else 0

    def network(x, t, rows):
        return torch.tanh(0.7 * x) * (1 + 0.5 * t.view(-1, 1, 1, 1) / 1000)

    times = torch.tensor([0, 1, 2, 101, 102, 150, 201, 202, 401, 601, 602, 801, 802, 901, 902, 999])
    x0 = torch.randn(len(times), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    xt, eps = released_invert(network, x0, times, scheduler.alphas_cumprod, library, steps)
    for i, t in enumerate(times.tolist()):
        x = x0[i : i + 1]
        for name in scheduler.timesteps - shift:
            if name < t:
                unet_t = name.view(1)
                first = network(x, unet_t, None)
                guess = scheduler.step(first, int(name) + shift, x).prev_sample
                second = network(guess, unet_t, None)
                x = scheduler.step((first + second) / 2, int(name) + shift, x).prev_sample
        # The rounding of ten steps of fp32 numbers up to 5.
        assert torch.allclose(xt[i], x[0], rtol=0, atol=1e-5)
        ab = scheduler.alphas_cumprod[t]
        expected = (x[0] - ab.sqrt() * x0[i]) / (1 - ab).sqrt()
        assert torch.allclose(eps[i], expected, rtol=0, atol=1e-5 / (1 - ab).sqrt().item())


# --------------------------------------------------------------- mode "release" against that loop
@pytest.fixture(scope="module")
def tiny():
    """The tiny world's UNet and IMAGES of its images, loaded by diffusers alone.

    Returns (eps_fn, x0 (IMAGES, 4, 8, 8), alpha_bar (1000,)). In eps_fn's batches the images repeat
    in the same order.
    """
    from datasets import load_dataset
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(TINY / "model", low_cpu_mem_usage=False)
    file = str(TINY / "pairs" / "train.parquet")
    rows = load_dataset("parquet", data_files=file, split="train").select(range(IMAGES)).to_list()
    images = [Image.open(io.BytesIO(row["jpg_0"])).convert("RGB") for row in rows]
    pixels = torch.tensor(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        cond, _ = pipe.encode_prompt([row["caption"] for row in rows], "cpu", 1, False)

    def eps_fn(x, t, rows):
        with torch.no_grad():
            return pipe.unet(x, t, cond[rows % IMAGES]).sample

    return eps_fn, latents * pipe.vae.config.scaling_factor, pipe.scheduler.alphas_cumprod


def relative_error(actual, expected):
    """Of each image: (N, C, h, w) -> (N,)."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def compare(tiny, timesteps, steps, library="0.20"):
    """Both inversions of all images at each timestep.

    Returns the (xt, eps) of mode "release" and the (xt, eps) of the released loop.
    """
    eps_fn, x0, alpha_bar = tiny
    x0 = x0.repeat(len(timesteps), 1, 1, 1)
    t = torch.tensor(timesteps).repeat_interleave(IMAGES)
    ours = common.renoise_invert(eps_fn, x0, t, alpha_bar, steps, "release")
    return ours, released_invert(eps_fn, x0, t, alpha_bar, library, steps)


# The relative error of eps against the released loop (diffusers 0.20) on the tiny UNet, by t: mean
# and largest of the images.
MEASURED = {
    # t: mean and largest with 5 steps, mean and largest with 10 steps
    2: (0.051, 0.065, 0.077, 0.096),
    50: (0.056, 0.069, 0.085, 0.101),
    101: (0.062, 0.074, 0.087, 0.105),
    102: (0.062, 0.075, 0.062, 0.081),
    150: (0.068, 0.085, 0.066, 0.086),
    201: (0.070, 0.091, 0.067, 0.091),
    202: (0.039, 0.051, 0.056, 0.076),
    300: (0.047, 0.064, 0.061, 0.087),
    401: (0.054, 0.079, 0.058, 0.084),
    402: (0.036, 0.049, 0.052, 0.072),
    601: (0.049, 0.072, 0.055, 0.079),
    602: (0.037, 0.050, 0.050, 0.071),
    700: (0.041, 0.059, 0.053, 0.077),
    801: (0.045, 0.066, 0.052, 0.076),
    802: (0.045, 0.066, 0.049, 0.071),
    999: (0.047, 0.071, 0.051, 0.076),
}


@pytest.mark.parametrize("steps", [5, 10])
def test_release_is_the_released_loop(tiny, steps):
    """They differ in the first step. The loop goes clean -> 1 -> 201, and starts as if the clean
    latent had the noise of alpha_bar[0]. Ours goes clean -> 201. So the loop adds less noise, by a
    fraction of sqrt((1 - ab_0) / ab_0) / sqrt((1 - ab_201) / ab_201), which is 5.1 % (10 steps: 101
    in place of 201, 8.4 %). The network answers differently too, because it is told 0 and not 1,
    and sees another latent. The tolerance gives that as much room again.
    """
    alpha_bar = tiny[2]
    (_, eps), (_, released_eps) = compare(tiny, list(MEASURED), steps)
    error = relative_error(eps, released_eps).view(-1, IMAGES)

    first = 1 + 1000 // steps
    noise_ratio = ((1 - alpha_bar) / alpha_bar).sqrt()
    tolerance = 2 * (noise_ratio[0] / noise_ratio[first]).item()
    assert tolerance == pytest.approx({5: 0.102, 10: 0.169}[steps], abs=0.001)
    assert error.max() < tolerance

    column = {5: 0, 10: 2}[steps]
    for i, (t, measured) in enumerate(MEASURED.items()):
        # The comment's digits, with room for another CPU's kernels.
        assert error[i].mean().item() == pytest.approx(measured[column], abs=0.002), t
        assert error[i].max().item() == pytest.approx(measured[column + 1], abs=0.002), t


def test_release_at_the_two_smallest_timesteps(tiny):
    """At t = 0 and 1 the only step is the one onto 1. The loop starts it at alpha_bar[0] and tells
    the UNet -199. So it adds little noise: E[tau^2] is 0.05 and 0.03. Ours starts clean and tells
    the UNet 0, which makes 0.8 and 0.4. The relative error of eps is 4 on average. The latents are
    close all the same, because there is hardly any noise at timestep 1: sqrt(1 - ab_1) = 0.04 times
    a prediction whose mean square is below 1.
    """
    _, x0, alpha_bar = tiny
    (xt, eps), (released_xt, released_eps) = compare(tiny, [0, 1], 5)
    squares = eps.square().view(2, -1).mean(1)
    released_squares = released_eps.square().view(2, -1).mean(1)
    assert squares.tolist() == pytest.approx([0.810, 0.405], abs=0.01)
    assert released_squares.tolist() == pytest.approx([0.047, 0.027], abs=0.003)
    rms = (xt - released_xt).square().mean((1, 2, 3)).sqrt()
    assert rms.max() < (1 - alpha_bar[1]).sqrt()


def test_release_is_not_the_loop_under_a_later_diffusers(tiny):
    """From 0.22 on the loop ends below t, and the UNet is told where a step goes to."""
    timesteps = [150, 300, 500, 700, 999]
    (_, eps), (_, later_eps) = compare(tiny, timesteps, 5, "0.22")
    assert relative_error(eps, later_eps).min() > 0.25


# ------------------------------------------------------------- SmPO's departures from the release
def fitted(xt, eps, x0, c):
    """eps as a sum of c and x0, image by image -> (n, 2)."""
    basis = torch.stack([c.flatten(1), x0.flatten(1)], 2)
    return torch.linalg.lstsq(basis, eps.flatten(1)[:, :, None]).solution[:, :, 0]


@pytest.mark.parametrize("library, parts", [("0.20", (1.139, -0.102)), ("0.22", (0.029, 0.216))])
def test_the_released_loop_does_not_find_a_constant_noise(alpha_bar, library, parts):
    """A network that always answers c should be inverted to c. At t = 150 the released loop finds
    1.14 c - 0.10 x0 with diffusers 0.20.0 (it ends at timestep 201), and almost none of c from 0.22
    on (it ends at 1). `release` keeps that and finds 1.20 c - 0.10 x0, `paper` finds c.
    """
    x0, c = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([150])
    found = fitted(*released_invert(constant(c), x0, t, alpha_bar, library), x0, c)[0]
    assert found.tolist() == pytest.approx(parts, abs=1e-3)
    for mode, expected in (("release", (1.200, -0.103)), ("paper", (1, 0))):
        found = common.renoise_invert(constant(c), x0, t, alpha_bar, 5, mode)
        assert fitted(*found, x0, c)[0].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "t, released, release", [(2, 93.8, 103.4), (50, 4.84, 5.35), (0, 0.173, 2.0)]
)
def test_the_inverted_noise_blows_up_at_small_t(alpha_bar, t, released, release):
    """The latent is at timestep 201, but tau is formed at t. With a network that answers sampled
    noise, E[tau^2] is 94 at t = 2 and 4.8 at t = 50, where 1 is right. `release` keeps that,
    `paper` does not.
    """
    x0, c = torch.randn(2, 256, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((256,), t)
    found = [released_invert(constant(c), x0, t, alpha_bar, "0.20")]
    for mode in ("release", "paper"):
        found.append(common.renoise_invert(constant(c), x0, t, alpha_bar, 5, mode))
    squares = [eps.square().mean().item() for _, eps in found]
    # A mean of 65,536 squares of normal numbers is known to 0.6 %; here to three of that.
    assert squares == pytest.approx([released, release, 1], rel=0.018)


def test_calls_of_the_released_loop(alpha_bar):
    """On average over t, 5 steps take 7.6 calls an image under 0.20, 6.0 from 0.22 on, and 5.6
    here, where the step onto timestep 1 is left out. 10 steps take 12.8, 11.0 and 10.8.
    """
    t = torch.arange(1000)
    calls = torch.zeros(1000)

    def count(x, unet_t, rows):
        calls[rows] += 1
        return x

    means = []
    for steps in (5, 10):
        for library in ("0.20", "0.22"):
            calls.zero_()
            released_invert(count, torch.zeros(1000, 1, 1, 1), t, alpha_bar, library, steps)
            means.append(calls.mean().item())
        calls.zero_()
        common.renoise_invert(count, torch.zeros(1000, 1, 1, 1), t, alpha_bar, steps, "release")
        means.append(calls.mean().item())
    assert means == pytest.approx([7.584, 5.98, 5.588, 12.764, 10.96, 10.768], abs=1e-3)


# -------------------------------------------------------------- DRO's departures from the release
def test_one_samples_timesteps_for_all_is_another_trajectory(alpha_bar):
    """The released DRO integrates a whole batch with the noise levels of its first sample, which
    are wrong for the others.
    """
    xT = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([40, 0, 7, 13, 21, 28, 35, 49])
    timesteps = torch.arange(19, -1, -1)[:, None] * 50 + offsets  # (20, 8)
    stop = torch.full((8,), 19)  # all samples go to the last step

    def network(x, t, rows):
        return torch.tanh(x) * 0.8

    own, _, _ = dro.rollout(network, xT, timesteps, stop, alpha_bar)
    of_the_first = timesteps[:, :1].expand(-1, 8)
    shared, _, _ = dro.rollout(network, xT, of_the_first, stop, alpha_bar)
    error = relative_error(shared, own)
    assert error[0] == 0
    assert error[1:].min() > 0.002
    assert error.max() > 0.02


def test_gradients_are_clipped(make_set, rows, tmp_path, monkeypatch):
    """The released DRO clips an exhausted iterator, which is nothing."""
    norms = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in weights]).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    options = {
        "data": make_set(rows[:8]),
        "experts": 8,
        "steps": 1,
        "batch": 4,
        "micro_batch": 4,
        "clip": 0.01,
        "eval_prompts": 0,
        "out": tmp_path / "out",
        "cache": tmp_path / "cache",
    }
    dro.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert norms == pytest.approx([0.01], rel=1e-3)
