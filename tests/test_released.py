"""Where this code departs from the authors' releases, shown with numbers: README, "Deviations from the
released code"."""

import pytest
import torch
from released import released_invert

import common
import dro


def constant(c):
    return lambda x, t, rows: c[rows]


def fitted(xt, eps, x0, c):
    """eps as a sum of c and x0, sample by sample -> (n, 2)."""
    basis = torch.stack([c.flatten(1), x0.flatten(1)], 2)
    return torch.linalg.lstsq(basis, eps.flatten(1)[:, :, None]).solution[:, :, 0]


@pytest.mark.parametrize("library, share", [("0.20", (1.139, -0.102)), ("0.22", (0.029, 0.216))])
def test_the_released_loop_does_not_find_a_constant_noise(alpha_bar, library, share):
    """A network that always answers c should be inverted to c. At t = 150 the released loop finds 1.14 c -
    0.10 x0 with diffusers 0.20.0 (it has gone to level 201), and almost none of it from 0.22 on (it has
    stopped at 1)."""
    x0, c = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([150])
    found = fitted(*released_invert(constant(c), x0, t, alpha_bar, library), x0, c)[0]
    assert found.tolist() == pytest.approx(share, abs=1e-3)
    ours = fitted(*common.renoise_invert(constant(c), x0, t, alpha_bar, 5, 1, "t"), x0, c)[0]
    assert ours.tolist() == pytest.approx([1, 0], abs=1e-4)


def test_asked_at_the_start_of_a_step_the_grid_is_the_released_loop(alpha_bar):
    """diffusers 0.20 tells the UNet the level that a step comes from: so does --ask start. What is left is
    the release's start at alpha_bar[0] and its levels, one higher; where t is above them, it ends below."""
    x0 = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.arange(202, 800, 10)

    def network(x, told, rows):
        return torch.tanh(0.7 * x) * (1 + 0.5 * told.clamp(min=0).view(-1, 1, 1, 1) / 1000)

    released = released_invert(network, x0, t, alpha_bar, "0.20")[1]
    off = {}
    for ask in ("start", "end"):
        found = common.renoise_invert(network, x0, t, alpha_bar, 5, 1, "grid", ask)[1]
        off[ask] = ((found - released).norm() / released.norm()).item()
    assert off["start"] < 0.03 and off["end"] > 4 * off["start"], off


def test_the_found_noise_blows_up_at_small_t(alpha_bar):
    """Latent at level 201, target formed at t: E[tau^2] 94 at t = 2, where 1 is right. `grid` keeps that
    (its latent is at 200), `t` does not, --min_t keeps away from it."""
    x0, c = torch.randn(2, 64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 2)
    squares = [released_invert(constant(c), x0, t, alpha_bar, "0.20")[1].square().mean().item()]
    for landing in ("grid", "t"):
        found = common.renoise_invert(constant(c), x0, t, alpha_bar, 5, 1, landing)[1]
        squares.append(found.square().mean().item())
    assert squares[0] == pytest.approx(94, rel=0.05) and squares[1] == pytest.approx(103, rel=0.05)
    assert squares[2] == pytest.approx(1, rel=0.05)


def test_steps_of_the_released_loop(alpha_bar):
    """3.8 steps on average under 0.20; 3.0 from 0.22 on, and 3.0 here."""
    t, calls = torch.arange(1000), torch.zeros(1000)

    def count(x, told, rows):
        calls[rows] += 0.5  # two calls a step
        return x

    means = []
    for library in ("0.20", "0.22"):
        calls.zero_()
        released_invert(count, torch.zeros(1000, 1, 1, 1), t, alpha_bar, library)
        means.append(calls.mean().item())
    calls.zero_()
    common.renoise_invert(count, torch.zeros(1000, 1, 1, 1), t, alpha_bar, 5, 1, "grid")
    assert [*means, calls.mean().item()] == pytest.approx([3.8, 3.0, 3.0], abs=0.01)


def test_one_samples_levels_for_all_is_another_trajectory(alpha_bar):
    """The released DRO integrates a whole batch with sample 0's noise levels: far off for the others."""
    random = torch.Generator().manual_seed(0)
    xT = torch.randn(8, 4, 4, 4, generator=random)
    t = torch.tensor([40, 0, 7, 13, 21, 28, 35, 49])  # offsets; all stop at the last step
    levels, stop = torch.arange(19, -1, -1)[:, None] * 50 + t, torch.full((8,), 19)

    def network(x, t, rows):
        return torch.tanh(x) * 0.8

    own = dro.rollout(network, xT, levels, stop, alpha_bar)[0]
    shared = dro.rollout(network, xT, levels[:, :1].expand(-1, 8), stop, alpha_bar)[0]
    far = (own - shared).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)
    assert far[0] == 0 and far[1:].min() > 0.002 and far.max() > 0.02


def test_gradients_are_clipped(make_set, rows, tmp_path, monkeypatch):
    """The released DRO clips an exhausted iterator: nothing."""
    norms, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args, **more):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(optimizer, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    dro.main([
        "--data", make_set(rows[:8]), "--experts", "8", "--steps", "1", "--batch", "4", "--micro_batch", "4",
        "--clip", "0.01", "--eval_prompts", "0", "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c"),
    ])  # fmt: skip
    assert norms == pytest.approx([0.01], rel=1e-3)
