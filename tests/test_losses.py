"""The losses against closed forms, and against each other where the papers say they meet."""

import ast
import math

import pytest
import torch
from conftest import ROOT

from dpo_baseline import denoising_error, dpo_loss, winners_first
from smpo import preference_probability, smpo_loss


def errors(seed=0, pairs=6):
    err, ref_err = torch.rand(2, 2 * pairs, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.1
    return err.requires_grad_(), ref_err


def test_denoising_error_is_a_mean_over_everything_but_the_batch():
    pred, eps = torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)
    pred[1], pred[2, 0, 0, 0] = 2.0, 4.0
    assert denoising_error(pred, eps).tolist() == [0, 4, 1]
    half = denoising_error(pred.half() * 200, eps.half())  # 400^2 overflows fp16
    assert half.dtype == torch.float32 and half[1] == 160000


def test_dpo_by_hand():
    losses, margin = dpo_loss(torch.tensor([0.10, 0.30]), torch.tensor([0.13, 0.28]), beta=20.0)
    assert margin.item() == pytest.approx(
        0.03 + 0.02
    )  # winner 0.03 better than the reference, loser 0.02 worse
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 20 * 0.05)))


def test_dpo_at_the_reference():
    err, ref_err = errors()
    losses, margin = dpo_loss(err, err.detach(), beta=5000.0)
    assert (
        torch.allclose(losses, torch.full((6,), math.log(2)))
        and not margin.any()
        and not margin.requires_grad
    )
    losses.sum().backward()  # the winner's error is pulled down, the loser's up, with beta / 4
    assert torch.allclose(err.grad, torch.tensor([1250.0] * 6 + [-1250.0] * 6))


def test_smpo_at_the_reference_is_log_two_for_any_p():
    err, _ = errors()
    losses, margin = smpo_loss(err, err.detach(), torch.linspace(0, 1, 6), beta=2000.0, gamma=10.0)
    assert (
        torch.allclose(losses, torch.full((6,), math.log(2)))
        and not margin.any()
        and not margin.requires_grad
    )


def test_equally_good_images_have_no_gradient():
    err, ref_err = errors()
    smpo_loss(err, ref_err, torch.full((6,), 0.5), beta=2000.0, gamma=10.0)[0].sum().backward()
    assert not err.grad.any()


def test_certain_preferences_are_dpo():
    err, ref_err = errors()
    ours, dpo = smpo_loss(err, ref_err, torch.ones(6), 300.0, gamma=1.0), dpo_loss(err, ref_err, 300.0)
    assert torch.equal(ours[0], dpo[0]) and torch.equal(ours[1], dpo[1])


def test_smoothing_is_a_factor_on_beta():
    """Eq. 9: 2 alpha - gamma with alpha = gamma p multiplies beta."""
    err, ref_err = errors()
    gamma, p = 10.0, 0.8
    ours, _ = smpo_loss(err, ref_err, torch.full((6,), p), 300.0, gamma)
    assert torch.allclose(ours, dpo_loss(err, ref_err, 300.0 * (2 * gamma * p - gamma))[0])


def test_the_order_of_the_images_does_not_matter():
    err, ref_err = errors()
    swap = torch.arange(12).roll(6)
    p = torch.linspace(0.1, 0.9, 6)
    ours, margin = smpo_loss(err, ref_err, p, 300.0, 10.0)
    swapped, other = smpo_loss(err[swap], ref_err[swap], 1 - p, 300.0, 10.0)
    assert torch.allclose(ours, swapped, atol=1e-7) and torch.allclose(margin, -other)


def test_preference_probability_is_the_softmax_of_normalised_scores():
    s0, s1, lo, hi = torch.tensor([21.0, 19.5, 20.0]), torch.tensor([20.0, 22.5, 20.0]), 18.0, 24.0
    normalised = (torch.stack([s0, s1]) - lo) / (hi - lo)
    p = preference_probability(s0, s1, lo, hi)
    assert torch.allclose(p, normalised.softmax(0)[0]) and p[2] == 0.5
    # gamma (2p - 1) = gamma tanh(difference / (2 range))
    assert torch.allclose(2 * p - 1, torch.tanh((s0 - s1) / (2 * (hi - lo))), atol=1e-6)


def test_released_constants_in_pickscores_unit():
    """One PickScore point under the released normalisers moves p to 0.515 only."""
    p = preference_probability(torch.tensor(21.0), torch.tensor(20.0), 11.543526500463486, 28.201571106910706)
    assert p.item() == pytest.approx(0.515, abs=5e-4)


def test_winners_first():
    images = torch.tensor([10, 11, 12, 20, 21, 22])  # images 0 of three pairs, then images 1
    assert images[winners_first(torch.tensor([1.0, 0.0, 1.0]))].tolist() == [10, 21, 12, 20, 11, 22]


METHODS = {"dpo_baseline.py": "dpo_loss", "smpo.py": "smpo_loss", "dro.py": "dro_loss"}


@pytest.mark.parametrize("file", METHODS)
def test_the_loss_can_be_read_early_and_copied(file):
    """Within the first 80 lines, at most 12 lines of body, and working in a file that has only torch and
    F."""
    source = (ROOT / file).read_text()
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    loss = functions[METHODS[file]]
    assert loss.end_lineno <= 80 and loss.end_lineno - loss.body[1].lineno + 1 <= 12
    space = {"torch": torch, "F": torch.nn.functional}
    exec(ast.get_source_segment(source, loss), space)
    err, ref_err = errors()
    extra = {"smpo.py": [torch.full((6,), 0.7), 300.0, 10.0], "dro.py": [0.001]}.get(file, [300.0])
    losses, _ = space[loss.name](err, ref_err, *extra)
    assert losses.shape == (6,)


def test_marked_copies_have_not_drifted():
    """A function whose first line says `# same as FILE` stands in that file with the same lines."""
    found = 0
    for file in METHODS:
        lines = (ROOT / file).read_text().splitlines()
        for i, line in enumerate(lines):
            if line.startswith("def ") and "# same as " in line:
                head, other = line.split("  # same as ")
                end = next(k for k in range(i + 1, len(lines)) if lines[k] == "")
                assert "\n".join([head, *lines[i + 1 : end]]) in (ROOT / other).read_text(), f"{file}: {head}"
                found += 1
    assert found
