# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""ReNoise inversion against scalar float64 arithmetic, one image at a time, and against networks
whose inversion is known in closed form.
"""

import math
from fractions import Fraction

import pytest
import torch
from conftest import TINY

from common import add_noise, ddim_step, inversion_path, predicted_x0, renoise_invert

MODES = ["release", "above", "paper"]
T = 1000
# Both ends, both sides of the timesteps that a path of five steps visits, and some in between.
TIMES = [0, 1, 2, 150, 199, 200, 201, 202, 401, 650, 800, 801, 802, 999]
# The spacing of fp32 numbers at 1: a rounding is off by at most half of it, relative to the result.
FP32 = 2**-23


def latents(n, seed=0):
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the three inversions in words
def expected_path(t, T, n, mode):
    """The timesteps that an image visits, from the description of the three inversions."""
    if mode == "release":
        # Targets 1, 1 + T/n, ..., 1 + (n-1) T/n. The end is the first at or above t, or else the
        # last. The step onto 1 is left out where another step follows.
        targets = [1 + k * T // n for k in range(n)]
        end = 0
        while targets[end] < t and end < n - 1:
            end += 1
        return targets[1 : end + 1] if end > 0 else [1]
    if mode == "above":
        # Multiples of T/n. The end is the first at or above t, but at most T - 1.
        count = max(1, math.ceil(Fraction(t * n, T)))
        return [min(k * T // n, T - 1) for k in range(1, count + 1)]
    # "paper": the multiples of T/n that are below t, then exactly t.
    path = []
    while (len(path) + 1) * T // n < t:
        path.append((len(path) + 1) * T // n)
    return [*path, t]


def probe(x, unet_t, row):
    """A non-linear network that knows its timestep and its row. Scalars in, a scalar out."""
    return math.tanh(0.7 * x + 0.3 * row) + 0.2 * unet_t / 1000


def expected_inversion(x0, t, row, alpha_bar, n, mode, renoise):
    """(xt, eps, largest number met) of one image of one pixel, in float64.

    alpha_bar: a list of floats.
    """
    path = expected_path(t, len(alpha_bar), n, mode)
    x = x0
    largest = abs(x0)
    ab_from = 1.0  # the start is the clean image
    t_from = 0  # which the UNet knows as timestep 0
    for t_to in path:
        ab_to = alpha_bar[t_to]

        def step(eps):
            clean = (x - math.sqrt(1 - ab_from) * eps) / math.sqrt(ab_from)
            return math.sqrt(ab_to) * clean + math.sqrt(1 - ab_to) * eps

        # "paper" tells the UNet where a step goes, and corrects the last step alone.
        unet_t = t_to if mode == "paper" else t_from
        corrected = renoise == 1 and (mode != "paper" or t_to == path[-1])
        eps = probe(x, unet_t, row)
        if corrected:
            eps = (eps + probe(step(eps), unet_t, row)) / 2
        x = step(eps)
        ab_from = ab_to
        t_from = t_to
        largest = max(largest, abs(x), abs(eps))
    tau = (x - math.sqrt(alpha_bar[t]) * x0) / math.sqrt(1 - alpha_bar[t])
    return x, tau, largest


# -------------------------------------------------------------------------------------- the paths
def test_the_worked_example():
    assert inversion_path(450, 1000, 5, "release") == [201, 401, 601]
    assert inversion_path(450, 1000, 5, "above") == [200, 400, 600]
    assert inversion_path(450, 1000, 5, "paper") == [200, 400, 450]


@pytest.mark.parametrize(
    "mode, paths",
    {
        # above 801 the path ends below t: there is no further timestep in the release's list
        "release": {
            (0, 1): [1],
            (2, 150, 199, 200, 201): [201],
            (202, 401): [201, 401],
            (402, 600, 601): [201, 401, 601],
            (602, 650, 800, 801, 802, 999): [201, 401, 601, 801],
        },
        "above": {
            (0, 1, 2, 150, 199, 200): [200],
            (201, 202, 400): [200, 400],
            (401, 600): [200, 400, 600],
            (650, 800): [200, 400, 600, 800],
            (801, 802, 999): [200, 400, 600, 800, 999],
        },
        "paper": {
            (0,): [0],
            (1,): [1],
            (199,): [199],
            (200,): [200],
            (201,): [200, 201],
            (401,): [200, 400, 401],
            (800,): [200, 400, 600, 800],
            (801,): [200, 400, 600, 800, 801],
            (999,): [200, 400, 600, 800, 999],
        },
    }.items(),
)
def test_paths_of_five_steps_by_hand(mode, paths):
    for timesteps, path in paths.items():
        for t in timesteps:
            assert inversion_path(t, 1000, 5, mode) == path, t


def test_other_paths_by_hand():
    # One step: the release has no timestep but 1, whatever t is.
    assert inversion_path(999, 1000, 1, "release") == [1]
    assert inversion_path(3, 1000, 1, "above") == [999]
    assert inversion_path(3, 1000, 1, "paper") == [3]
    assert inversion_path(102, 1000, 10, "release") == [101, 201]
    assert inversion_path(950, 1000, 2, "release") == [501]
    # The paper's nine steps do not divide T: 1000 / 9 = 111.1 is rounded down.
    assert inversion_path(111, 1000, 9, "paper") == [111]
    assert inversion_path(112, 1000, 9, "paper") == [111, 112]
    assert inversion_path(112, 1000, 9, "above") == [111, 222]
    # Nor do seven: 2 T / 7 = 285.7 is rounded down. The release rounds the spacing, T / 7 = 142.9,
    # as diffusers does.
    assert inversion_path(286, 1000, 7, "above") == [142, 285, 428]
    assert inversion_path(286, 1000, 7, "paper") == [142, 285, 286]
    assert inversion_path(286, 1000, 7, "release") == [143, 285, 427]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T, counts", [(1000, [1, 2, 5, 9, 10]), (100, [1, 2, 4, 5, 10])])
def test_paths_of_every_timestep(mode, T, counts):
    for n in counts:
        for t in range(T):
            assert inversion_path(t, T, n, mode) == expected_path(t, T, n, mode), (t, n)


# --------------------------------------------------------------------------------- the arithmetic
@pytest.mark.parametrize("renoise", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("mode", MODES)
def test_each_image_takes_its_own_path(alpha_bar, mode, n, renoise):
    """A batch in fp32 against one image at a time in float64."""
    x0 = torch.randn(len(TIMES), 1, 1, 1, generator=torch.Generator().manual_seed(3))

    def eps_fn(x, t, rows):
        values = [probe(x[i].item(), t[i].item(), rows[i].item()) for i in range(len(x))]
        return torch.tensor(values).view(-1, 1, 1, 1)

    xt, eps = renoise_invert(eps_fn, x0, torch.tensor(TIMES), alpha_bar, n, mode, renoise)
    ab = alpha_bar.double().tolist()
    for i, t in enumerate(TIMES):
        expected = expected_inversion(x0[i].item(), t, i, ab, n, mode, renoise)
        x_expected, eps_expected, largest = expected
        # A step is about ten roundings of numbers up to `largest`. Later steps hardly enlarge an
        # error: they scale it by sqrt(ab_to / ab_from) < 1, and the network's slope is below 1.
        x_tolerance = 10 * len(expected_path(t, T, n, mode)) * FP32 * largest
        assert xt[i].item() == pytest.approx(x_expected, rel=0, abs=x_tolerance), t
        # eps is a difference of such numbers, divided by sqrt(1 - ab_t), which is 0.03 at t = 0.
        eps_tolerance = (x_tolerance + 2 * FP32 * largest) / math.sqrt(1 - ab[t])
        assert eps[i].item() == pytest.approx(eps_expected, rel=0, abs=eps_tolerance), t


@pytest.mark.parametrize("mode", MODES)
def test_renoise_is_one_by_default(alpha_bar, mode):
    x0 = latents(2)
    t = torch.tensor([150, 700])

    def eps_fn(x, t, rows):
        return torch.tanh(x)

    default = renoise_invert(eps_fn, x0, t, alpha_bar, 5, mode)[0]
    assert torch.equal(default, renoise_invert(eps_fn, x0, t, alpha_bar, 5, mode, renoise=1)[0])
    assert not torch.allclose(default, renoise_invert(eps_fn, x0, t, alpha_bar, 5, mode, 0)[0])


@pytest.mark.parametrize("renoise", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_that_always_answers_c(alpha_bar, mode, renoise):
    """Then the latent is x0 noised with c where the path ends, and eps is that, seen from t."""
    x0 = latents(len(TIMES))
    c = latents(len(TIMES), 1)
    t = torch.tensor(TIMES)
    xt, eps = renoise_invert(lambda x, t, rows: c[rows], x0, t, alpha_bar, 5, mode, renoise)
    end = torch.tensor([expected_path(i, T, 5, mode)[-1] for i in TIMES])
    a = alpha_bar.double()[end].view(-1, 1, 1, 1)
    b = alpha_bar.double()[t].view(-1, 1, 1, 1)
    eps_expected = ((a.sqrt() - b.sqrt()) * x0 + (1 - a).sqrt() * c) / (1 - b).sqrt()
    if mode == "paper":  # it ends exactly at t, so it finds the noise itself
        assert torch.allclose(eps_expected, c.double())
    # At most five steps of ten roundings of numbers up to 4; eps divides by sqrt(1 - ab_t).
    tolerance = 5 * 10 * FP32 * 4
    assert torch.allclose(xt, add_noise(x0, c, end, alpha_bar), rtol=0, atol=tolerance)
    assert ((eps - eps_expected).abs() * (1 - b).sqrt()).max() < tolerance


def test_a_gaussian_is_followed_to_its_noise(alpha_bar):
    """Data x0 ~ N(0, s^2): the exact network is eps = sqrt(1 - ab) x / (ab s^2 + 1 - ab), and the
    probability flow carries x0 to x0 sqrt(ab s^2 + 1 - ab) / s.

    DDIM is of first order, so five times the steps should leave a fifth of the error. A quarter is
    left, because the first step is a special one: sqrt(1 - ab) jumps from 0 to 0.03 at t = 0.
    Order 1/2 would leave 0.45, order 2 a twenty-fifth. ReNoise corrects only the last step, which
    does not change the order.
    """
    s = 0.8
    x0 = latents(2)
    t = torch.tensor([300, 700])

    def exact_network(x, t, rows):
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * x / (ab * s**2 + 1 - ab)

    ab = alpha_bar[t].view(-1, 1, 1, 1)
    exact = x0 * (ab * s**2 + 1 - ab).sqrt() / s
    for renoise in (0, 1):
        errors = []
        for n in (40, 200, 1000):
            xt, _ = renoise_invert(exact_network, x0, t, alpha_bar, n, "paper", renoise)
            errors.append((xt - exact).abs().max().item())
        assert errors[2] < 0.01
        assert 3 < errors[0] / errors[1] < 6
        assert 3 < errors[1] / errors[2] < 6


# --------------------------------------------------------------------------- calls of the network
def calls_of_every_timestep(alpha_bar, n, mode, renoise):
    """How often each of T images, one at every timestep, is passed to the network -> (T,) long."""
    calls = torch.zeros(T, dtype=torch.long)

    def count(x, t, rows):
        assert len(x) == len(t) == len(rows) > 0
        assert t.dtype == rows.dtype == torch.long
        assert len(rows.unique()) == len(rows)
        calls[rows] += 1
        return x

    renoise_invert(count, torch.zeros(T, 1, 1, 1), torch.arange(T), alpha_bar, n, mode, renoise)
    return calls


@pytest.mark.parametrize("n", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("mode", MODES)
def test_number_of_calls(alpha_bar, mode, n):
    """No image is computed further than it has to go."""
    calls = calls_of_every_timestep(alpha_bar, n, mode, 1)
    plain_calls = calls_of_every_timestep(alpha_bar, n, mode, 0)
    for t in range(T):
        grid_steps = max(1, math.ceil(Fraction(t * n, T)))
        if mode == "release":
            real_steps = len(expected_path(t, T, n, mode))
            expected = (2 * real_steps, real_steps)
        elif mode == "above":
            expected = (2 * grid_steps, grid_steps)
        else:
            expected = (grid_steps + 1, grid_steps)
        assert (calls[t].item(), plain_calls[t].item()) == expected, t


@pytest.mark.parametrize("n, mean", [(5, 5.588), (10, 10.768)])
def test_mean_number_of_calls_of_release(alpha_bar, n, mean):
    """By hand for n = 5: 202 timesteps need one step, 200 two, 200 three, 398 four. Each step calls
    the network twice."""
    calls = calls_of_every_timestep(alpha_bar, n, "release", 1)
    assert calls.double().mean().item() == pytest.approx(mean)


@pytest.mark.parametrize(
    "mode, unet_timesteps",
    [
        ("release", [0, 0, 201, 201, 401, 401]),  # two calls a step, told where the step comes from
        ("above", [0, 0, 200, 200, 400, 400]),
        ("paper", [200, 400, 450, 450]),  # told where the step goes to; the last step is corrected
    ],
)
def test_timesteps_the_network_is_told(alpha_bar, mode, unet_timesteps):
    told = []

    def record(x, t, rows):
        assert rows.tolist() == [0]
        told.append(t.item())
        return x

    renoise_invert(record, latents(1), torch.tensor([450]), alpha_bar, 5, mode)
    assert told == unet_timesteps


# ------------------------------------------------------------------------------- how it is called
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_images_one_at_a_time(alpha_bar, mode):
    x0 = latents(len(TIMES))
    t = torch.tensor(TIMES)

    def network(numbers):
        """What the network answers depends on the image's number, which `rows` picks."""
        return lambda x, t, rows: torch.tanh(x) + 0.1 * numbers[rows].view(-1, 1, 1, 1)

    numbers = torch.arange(len(TIMES))
    batch = renoise_invert(network(numbers), x0, t, alpha_bar, 5, mode)
    for i in range(len(TIMES)):
        one = slice(i, i + 1)
        alone = renoise_invert(network(numbers[one]), x0[one], t[one], alpha_bar, 5, mode)
        # The last bit of tanh depends on the size of the batch. eps divides by 0.03 at t = 0.
        assert torch.allclose(batch[0][one], alone[0], rtol=0, atol=16 * FP32)
        assert torch.allclose(batch[1][one], alone[1], rtol=0, atol=16 * FP32 / 0.029)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("t_device", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_arguments_are_left_alone_on_any_device(alpha_bar, mode, device, t_device):
    """x0 and t may lie on different devices. The network is called on x0's. Neither is modified."""
    x0 = latents(len(TIMES)).to(device)
    t = torch.tensor(TIMES, device=t_device)
    x0_before = x0.clone()
    t_before = t.clone()
    schedule_before = alpha_bar.clone()

    def network(x, t, rows):
        assert x.device == t.device == rows.device == x0.device
        return torch.tanh(x)

    xt, eps = renoise_invert(network, x0, t, alpha_bar.to(device), 5, mode)
    assert torch.equal(x0, x0_before)
    assert torch.equal(t, t_before)
    assert torch.equal(alpha_bar, schedule_before)
    assert xt.device == eps.device == x0.device
    assert xt.dtype == eps.dtype == torch.float32
    assert xt.shape == eps.shape == x0.shape


def test_unknown_options_are_errors(alpha_bar):
    def invert(steps=5, mode="release", renoise=1):
        t = torch.tensor([9])
        return renoise_invert(lambda x, t, rows: x, latents(1), t, alpha_bar, steps, mode, renoise)

    invert()
    for options in (
        {"mode": "relase"},
        {"mode": "none"},
        {"renoise": 2},
        {"renoise": -1},
        {"steps": 0},
        {"steps": -5},
    ):
        with pytest.raises(ValueError):
            invert(**options)


def test_a_path_of_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError):
        inversion_path(450, 1000, 5, "relase")


# -------------------------------------------------------------------------------- noise and steps
def test_add_noise_is_the_schedulers(alpha_bar):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(TINY / "model", subfolder="scheduler")
    x0 = latents(len(TIMES))
    eps = latents(len(TIMES), 1)
    t = torch.tensor(TIMES)
    # fp32 rounding of a product of 1000 factors: 1000 half spacings at most
    assert torch.allclose(scheduler.alphas_cumprod, alpha_bar, rtol=0, atol=500 * FP32)
    expected = scheduler.add_noise(x0, eps, t)
    # a few roundings of numbers up to 4
    actual = add_noise(x0, eps, t, scheduler.alphas_cumprod)
    assert torch.allclose(actual, expected, rtol=0, atol=8 * FP32 * 4)


def test_predicted_x0_undoes_add_noise(alpha_bar):
    x0 = latents(len(TIMES))
    eps = latents(len(TIMES), 1)
    t = torch.tensor(TIMES)
    found = predicted_x0(add_noise(x0, eps, t, alpha_bar), eps, t, alpha_bar)
    # A few roundings of numbers up to 4, divided by sqrt(ab_t), which is 0.07 at t = 999.
    error = (found - x0).abs() * alpha_bar[t].sqrt().view(-1, 1, 1, 1)
    assert error.max() < 8 * FP32 * 4


def test_a_ddim_step_keeps_noise_and_image():
    """From x0 noised with eps to another timestep, told the right eps: x0 noised with eps there."""
    x0 = latents(3)
    eps = latents(3, 1)
    ab_from = torch.tensor([1.0, 0.9, 0.3]).view(-1, 1, 1, 1)
    ab_to = torch.tensor([0.9, 0.2, 0.7]).view(-1, 1, 1, 1)
    x_from = ab_from.sqrt() * x0 + (1 - ab_from).sqrt() * eps
    x_to = ab_to.sqrt() * x0 + (1 - ab_to).sqrt() * eps
    # ten roundings of numbers up to 4, enlarged by sqrt(0.7 / 0.3) = 1.5 in the step down
    found = ddim_step(x_from, eps, ab_from, ab_to)
    assert torch.allclose(found, x_to, rtol=0, atol=10 * FP32 * 4 * 1.6)
