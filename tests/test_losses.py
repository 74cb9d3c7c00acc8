# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The losses against closed forms, and against each other where the papers say they meet."""

import ast
import math

import pytest
import torch
from conftest import ROOT

from dpo_baseline import denoising_error, dpo_loss
from dro import dro_loss
from smpo import preference_probability, smpo_loss

# A fp32 number is off by 2^-24 = 6e-8 of its size at the most, and each loss is a handful of
# operations on numbers of size 1 or less: 1e-6 is 16 such roundings.
FP32 = 1e-6


def errors(pairs=6):
    """err, with a gradient, and ref_err: (2 * pairs,) each, close to each other as in training."""
    random = torch.Generator().manual_seed(0)
    err = torch.rand(2 * pairs, generator=random) * 0.02 + 0.1
    ref_err = torch.rand(2 * pairs, generator=random) * 0.02 + 0.1
    return err.requires_grad_(), ref_err


def test_denoising_error_is_a_mean_over_everything_but_the_batch():
    eps = torch.zeros(3, 4, 2, 2)
    eps_pred = torch.zeros(3, 4, 2, 2)
    eps_pred[1] = 2.0
    eps_pred[2, 0, 0, 0] = 4.0
    assert denoising_error(eps_pred, eps).tolist() == [0, 4, 1]


def test_denoising_error_is_formed_in_fp32():
    eps_pred = torch.full((1, 4, 2, 2), 400.0, dtype=torch.float16)
    error = denoising_error(eps_pred, torch.zeros_like(eps_pred))
    assert error.dtype == torch.float32
    assert error.item() == 160000  # above the largest fp16 number, 65504


def test_dpo_by_hand():
    """The winner is 0.03 better than under the reference, the loser 0.02 worse."""
    err = torch.tensor([0.10, 0.30])
    ref_err = torch.tensor([0.13, 0.28])
    losses, margin = dpo_loss(err, ref_err, beta=20.0)
    assert margin.item() == pytest.approx(0.05, abs=FP32)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 20 * 0.05)), abs=FP32)


def test_dpo_at_the_reference():
    """Margin 0, loss log 2, and a gradient of beta / 4: the winner's error down, the loser's up."""
    err, _ = errors()
    losses, margin = dpo_loss(err, err.detach(), beta=5000.0)
    losses.sum().backward()
    assert torch.allclose(losses, torch.full((6,), math.log(2)), rtol=FP32)
    assert not margin.any()
    assert not margin.requires_grad
    assert err.grad.tolist() == [1250.0] * 6 + [-1250.0] * 6


def test_smpo_at_the_reference_is_log_two_for_any_p():
    err, _ = errors()
    p = torch.linspace(0, 1, 6)
    losses, margin = smpo_loss(err, err.detach(), p, beta=2000.0, gamma=10.0)
    assert torch.allclose(losses, torch.full((6,), math.log(2)), rtol=FP32)
    assert not margin.any()
    assert not margin.requires_grad


def test_equally_good_images_have_no_gradient():
    err, ref_err = errors()
    losses, _ = smpo_loss(err, ref_err, torch.full((6,), 0.5), beta=2000.0, gamma=10.0)
    losses.sum().backward()
    assert not err.grad.any()


def test_certain_preferences_are_dpo():
    err, ref_err = errors()
    smpo = smpo_loss(err, ref_err, torch.ones(6), beta=300.0, gamma=1.0)
    dpo = dpo_loss(err, ref_err, beta=300.0)
    assert torch.equal(smpo[0], dpo[0])
    assert torch.equal(smpo[1], dpo[1])


def test_smoothing_is_a_factor_on_beta():
    """arXiv 2506.02698 Eq. 9: with alpha = gamma p, the factor is 2 alpha - gamma."""
    err, ref_err = errors()
    gamma = 10.0
    alpha = gamma * 0.8
    smpo, _ = smpo_loss(err, ref_err, torch.full((6,), 0.8), beta=300.0, gamma=gamma)
    dpo, _ = dpo_loss(err, ref_err, beta=300.0 * (2 * alpha - gamma))
    # 2 p - 1 is rounded once for fp32's 0.8, by 6e-8 of 0.6, and margins reach 20 here
    assert torch.allclose(smpo, dpo, rtol=FP32, atol=20 * FP32)


def test_the_order_of_the_images_does_not_matter():
    err, ref_err = errors()
    p = torch.linspace(0.1, 0.9, 6)
    losses, margin = smpo_loss(err, ref_err, p, beta=300.0, gamma=10.0)
    swap = torch.arange(12).roll(6)
    swapped, swapped_margin = smpo_loss(err[swap], ref_err[swap], 1 - p, beta=300.0, gamma=10.0)
    # the argument of the sigmoid reaches 0.5 * 300 * 8 * 0.04 = 48
    assert torch.allclose(losses, swapped, atol=48 * FP32)
    assert torch.equal(margin, -swapped_margin)


def test_preference_probability_is_the_softmax_of_normalised_scores():
    score_0 = torch.tensor([21.0, 19.5, 20.0])
    score_1 = torch.tensor([20.0, 22.5, 20.0])
    normalised = (torch.stack([score_0, score_1]) - 18.0) / (24.0 - 18.0)
    p = preference_probability(score_0, score_1, lo=18.0, hi=24.0)
    assert torch.allclose(p, normalised.softmax(0)[0], atol=FP32)
    assert p[2] == 0.5
    # The weight gamma (2p - 1) is gamma tanh(difference / (2 range)).
    assert torch.allclose(2 * p - 1, torch.tanh((score_0 - score_1) / (2 * 6)), atol=FP32)


def test_one_point_of_pickscore_is_a_small_preference_in_the_released_range():
    """A sigmoid of 1 / 16.658, and 16.658 = 100 times the released 0.28201571 - 0.11543526."""
    p = preference_probability(
        torch.tensor(21.0), torch.tensor(20.0), lo=11.543526500463486, hi=28.201571106910706
    )
    assert p.item() == pytest.approx(1 / (1 + math.exp(-1 / 16.65804460644722)), abs=FP32)
    assert p.item() == pytest.approx(0.515, abs=5e-4)


def test_dro_by_hand():
    """max(-m, gap) + m of arXiv 2510.18353 Eq. 15: far behind, at the reference, far ahead."""
    err = torch.tensor([0.30, 0.10, 0.10, 0.05, 0.02, 0.05], requires_grad=True)
    ref_err = torch.tensor([0.20, 0.10, 0.20, 0.10, 0.02, 0.05])
    losses, gap = dro_loss(err, ref_err, margin=0.01)
    losses.sum().backward()
    by_hand = torch.tensor([0.10 + 0.05, 0.0, -0.10])
    assert torch.allclose(gap, by_hand, atol=FP32)
    assert not gap.requires_grad
    assert torch.allclose(losses, by_hand.clamp(min=-0.01) + 0.01, atol=FP32)
    # Experts down, policy samples up, and nothing where the hinge is satisfied.
    assert err.grad.tolist() == [1, 1, 0, -1, -1, 0]


def test_dro_at_the_reference_is_the_margin():
    err, _ = errors()
    losses, gap = dro_loss(err, err.detach(), margin=0.001)
    assert losses.tolist() == [pytest.approx(0.001, rel=FP32)] * 6
    assert not gap.any()


# file -> the loss in it, and what it is called with besides the errors
LOSSES = {
    "dpo_baseline.py": ("dpo_loss", [300.0]),
    "smpo.py": ("smpo_loss", [torch.full((6,), 0.7), 300.0, 10.0]),
    "dro.py": ("dro_loss", [0.001]),
}


@pytest.mark.parametrize("file", LOSSES)
def test_the_loss_can_be_read_early_and_copied(file):
    """It stands in the first 80 lines, is short, and works in a file with torch and F alone."""
    name, arguments = LOSSES[file]
    source = (ROOT / file).read_text()
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    loss = functions[name]
    after_the_docstring = loss.body[1].lineno
    assert loss.end_lineno <= 80
    assert loss.end_lineno - after_the_docstring + 1 <= 12
    empty_file = {"torch": torch, "F": torch.nn.functional}
    exec(ast.get_source_segment(source, loss), empty_file)
    err, ref_err = errors()
    losses, margin = empty_file[name](err, ref_err, *arguments)
    assert losses.shape == (6,)
    assert margin.shape == (6,)


@pytest.mark.parametrize("file", LOSSES)
def test_marked_copies_have_not_drifted(file):
    """A function marked `# same as FILE` stands in FILE with the same lines."""
    source = (ROOT / file).read_text()
    for function in ast.parse(source).body:
        text = ast.get_source_segment(source, function) or ""
        head, mark, rest = text.partition("  # same as ")
        if mark and "\n" not in head:
            other, _, body = rest.partition("\n")
            assert f"{head}\n{body}\n" in (ROOT / other).read_text(), head


def test_copies_are_marked():
    """Otherwise the test above would check nothing."""
    assert "# same as dpo_baseline.py" in (ROOT / "smpo.py").read_text()
    assert "# same as dpo_baseline.py" in (ROOT / "dro.py").read_text()
