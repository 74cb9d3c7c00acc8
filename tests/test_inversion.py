"""ReNoise inversion against probe networks whose answer is known, and against scalar float64 arithmetic."""

import math

import pytest
import torch
from conftest import TINY

from common import add_noise, renoise_invert

TIMES = torch.tensor([0, 1, 150, 199, 200, 201, 650, 800, 801, 999])


def latents(n, seed=0):
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_add_noise_is_the_schedulers(alpha_bar):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(TINY / "model", subfolder="scheduler")
    x0, eps = latents(10), latents(10, 1)
    assert torch.allclose(scheduler.alphas_cumprod, alpha_bar, atol=1e-6)
    assert torch.allclose(
        add_noise(x0, eps, TIMES, scheduler.alphas_cumprod), scheduler.add_noise(x0, eps, TIMES), atol=1e-6
    )


@pytest.mark.parametrize("renoise", [0, 1])
def test_a_network_that_always_answers_the_same_noise_is_inverted_to_it(alpha_bar, renoise):
    x0, c = latents(10), latents(10, 1)
    xt, eps = renoise_invert(lambda x, t, rows: c[rows], x0, TIMES, alpha_bar, 5, renoise, "t")
    assert torch.allclose(xt, add_noise(x0, c, TIMES, alpha_bar), atol=1e-4)
    assert torch.allclose(eps[1:], c[1:], atol=1e-3)  # at t = 0 eps is a difference over sqrt(1 - 0.99915)


def test_grid_landing_of_a_constant_network(alpha_bar):
    """It ends on the level of the grid at or above t: 150 -> 200, and tau mixes the two levels."""
    x0, c, t = latents(1), latents(1, 1), torch.tensor([150])
    xt, eps = renoise_invert(lambda x, t, rows: c[rows], x0, t, alpha_bar, 5, 1, "grid")
    assert torch.allclose(xt, add_noise(x0, c, torch.tensor([200]), alpha_bar), atol=1e-5)
    a, b = alpha_bar[150].item(), alpha_bar[200].item()
    expected = (math.sqrt(b) - math.sqrt(a)) / math.sqrt(1 - a) * x0 + math.sqrt((1 - b) / (1 - a)) * c
    assert torch.allclose(eps, expected, atol=1e-5)


def levels(t, steps, landing, T=1000):
    """METHODS.md in words: grid levels k T // n as long as they are below t, then the landing."""
    path = [k * T // steps for k in range(1, steps + 1) if k * T // steps < t]
    if landing == "t":
        return [*path, t]
    return [*path, min(T - 1, next(k * T // steps for k in range(1, steps + 1) if k * T // steps >= t))]


@pytest.mark.parametrize("landing", ["t", "grid"])
@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("renoise, ask", [(0, "end"), (1, "end"), (1, "start")])
def test_each_sample_takes_its_own_path(alpha_bar, landing, steps, renoise, ask):
    """A network that is non-linear and different for every sample, against float64 scalars, one sample at a
    time."""
    ab = [1.0 if i is None else alpha_bar[i].item() for i in range(1000)]
    x0 = torch.randn(len(TIMES), 1, 1, 1, generator=torch.Generator().manual_seed(3))

    def probe(x, level, row):  # row is a float, level in [0, 1]
        return math.tanh(0.7 * x + 0.3 * row) + 0.2 * level

    def eps_fn(x, t, rows):
        assert x.shape[0] == t.shape[0] == rows.shape[0]
        values = [probe(v.item(), u.item() / 1000, float(r)) for v, u, r in zip(x, t, rows)]
        return torch.tensor(values).view(-1, 1, 1, 1)

    xt, eps = renoise_invert(eps_fn, x0, TIMES, alpha_bar, steps, renoise, landing, ask)
    for i, t in enumerate(TIMES.tolist()):
        x, a, at = x0[i].item(), 1.0, 0
        for u in levels(t, steps, landing):
            b = ab[u]

            def up(e):
                return math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e

            told = (u if ask == "end" else at) / 1000
            e = probe(x, told, i)
            if renoise:
                e = (e + probe(up(e), told, i)) / 2
            x, a, at = up(e), b, u
        tau = (x - math.sqrt(ab[t]) * x0[i].item()) / math.sqrt(1 - ab[t])
        assert xt[i].item() == pytest.approx(x, abs=1e-5)
        assert eps[i].item() == pytest.approx(tau, abs=2e-3 if t < 2 else 1e-5)


@pytest.mark.parametrize("landing", ["t", "grid"])
def test_number_of_calls(alpha_bar, landing):
    """2 max(1, ceil(t n / T)) sample-forwards an image, and no sample is computed after it has arrived."""
    x0, calls = latents(10), torch.zeros(10, dtype=torch.long)

    def count(x, t, rows):
        calls[rows] += 1
        return x

    renoise_invert(count, x0, TIMES, alpha_bar, 5, 1, landing)
    assert calls.tolist() == [2 * max(1, math.ceil(t * 5 / 1000)) for t in TIMES.tolist()]


def test_a_gaussian_is_followed_to_its_noise(alpha_bar):
    """Data x0 ~ N(0, s^2): the perfect network is eps = sqrt(1 - ab) x / (ab s^2 + 1 - ab), and the
    probability flow carries x0 to x0 sqrt(ab s^2 + 1 - ab) / s. Inversion comes as close as its number of
    steps allows: first order."""
    s, t, x0 = 0.8, torch.tensor([300, 700]), latents(2)

    def perfect(x, t, rows):
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * x / (ab * s**2 + 1 - ab)

    ab = alpha_bar[t].view(-1, 1, 1, 1)
    exact = x0 * (ab * s**2 + 1 - ab).sqrt() / s
    for renoise in (0, 1):
        far = [
            (renoise_invert(perfect, x0, t, alpha_bar, n, renoise, "t")[0] - exact).abs().max()
            for n in (40, 200, 1000)
        ]
        assert far[2] < 0.01 and far[1] < far[0] / 2.5 and far[2] < far[1] / 2.5
