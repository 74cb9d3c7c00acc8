# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""An inversion and a rollout never wait for the GPU, checked without one.

A copy from ordinary memory to a GPU waits until the GPU has done all its work, and so does reading
a value back. So a whole batch's timesteps, indices and coefficients have to travel together, once.

PyTorch's "meta" device stands in for the GPU. Its tensors have shapes and no values: reading one
back is an error, and what comes from the CPU can be counted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import dro

SHAPE = (8, 4, 2, 2)
# timesteps of images with one step, with all steps, and with several in between
T_MIXED = torch.tensor([0, 1, 130, 420, 510, 860, 950, 999])
T_ONE = torch.tensor([0, 1])


class Transfers(TorchDispatchMode):
    """Counts what comes to the meta device from the CPU.

    Copies, and CPU tensors among the arguments of an operation there (an index, say), are seen as
    they happen. torch.tensor(list, device=...) and x[list] are not shown to a dispatch mode, but
    their result is a tensor that no operation made. `on_device`: the tensors that are there from
    the start."""

    def __init__(self, *on_device):
        super().__init__()
        self.count = 0
        self.kept = []  # all tensors stay alive, so that no two storages have the same address
        self.known = set()
        self.remember(on_device)

    def remember(self, tensors):
        for tensor in tensors:
            self.kept.append(tensor)
            self.known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        for x in inputs:
            if x.is_meta:
                self.count += x.untyped_storage()._cdata not in self.known
            elif outputs:
                # A CPU scalar in arithmetic is passed by value, like a Python number.
                self.count += is_copy or x.dim() > 0
        self.remember([x for x in inputs if x.is_meta])
        self.remember(outputs)
        return out


def on_meta():
    return torch.zeros(SHAPE, device="meta")


def eps_fn(x, t, idx):
    """The UNet: what it is given has to be on the device already."""
    return x * t.view(-1, 1, 1, 1) * idx.view(-1, 1, 1, 1)


def copies_of_an_inversion(t, alpha_bar, steps, mode):
    x0 = on_meta()[: len(t)]
    with Transfers(x0) as transfers:
        common.renoise_invert(eps_fn, x0, t, alpha_bar, steps, mode)
    return transfers.count


@pytest.mark.parametrize("mode", common.INVERSION_MODES)
def test_an_inversion_sends_its_plan_in_one_copy(mode, alpha_bar):
    """And a second one, alpha_bar at t. Neither more steps nor other timesteps cost more copies."""
    assert copies_of_an_inversion(T_MIXED, alpha_bar, 5, mode) == 2
    assert copies_of_an_inversion(T_MIXED, alpha_bar, 10, mode) == 2
    assert copies_of_an_inversion(T_ONE, alpha_bar, 5, mode) == 2


def copies_of_a_rollout(t, alpha_bar, steps):
    timesteps, stop = dro.trajectory(t, len(alpha_bar), steps)
    xT = on_meta()[: len(t)]
    with Transfers(xT) as transfers:
        _, _, t_end = dro.rollout(eps_fn, xT, timesteps, stop, alpha_bar)
    assert torch.equal(t_end, t)
    return transfers.count


def test_a_rollout_sends_its_plan_in_one_copy(alpha_bar):
    assert copies_of_a_rollout(T_MIXED, alpha_bar, 20) == 1
    assert copies_of_a_rollout(T_MIXED, alpha_bar, 4) == 1
    assert copies_of_a_rollout(T_MIXED[-2:], alpha_bar, 20) == 1


@pytest.mark.parametrize("function", [common.add_noise, common.predicted_x0])
def test_noising_sends_alpha_bar_in_one_copy(function, alpha_bar):
    x0 = on_meta()
    eps = on_meta()
    with Transfers(x0, eps) as transfers:
        function(x0, eps, T_MIXED, alpha_bar)
    assert transfers.count == 1


# ------------------------------------------------------------------- the counter itself
def index_by_a_list(x):
    return x[[0, 1]]


def index_by_a_cpu_tensor(x):
    return x[torch.tensor([0, 1])]


def write_by_a_cpu_tensor(x):
    x[torch.tensor([0, 1])] = 0


def make_on_the_device(x):
    return x[:2] * torch.tensor([1.0, 2.0], device=x.device).view(-1, 1, 1, 1)


def make_like(x):
    return x[:2] * x.new_tensor([1.0, 2.0]).view(-1, 1, 1, 1)


def copy_a_tensor(x):
    return torch.tensor(1.0).to(x.device)


COUNTED = [
    index_by_a_list,
    index_by_a_cpu_tensor,
    write_by_a_cpu_tensor,
    make_on_the_device,
    make_like,
    copy_a_tensor,
]


@pytest.mark.parametrize("transfer", COUNTED)
def test_a_hidden_copy_is_counted(transfer):
    x = on_meta()
    with Transfers(x) as transfers:
        transfer(x)
        transfer(x)
    assert transfers.count == 2


def test_what_stays_on_the_device_is_not_counted():
    x = on_meta()
    with Transfers(x) as transfers:
        y = torch.zeros_like(x) + torch.full((2,), 3.0, device="meta")
        y[torch.arange(2, device="meta")] = x[:2] * 2.0 + torch.tensor(1.0)
    assert transfers.count == 0


def test_reading_back_is_an_error():
    with pytest.raises(RuntimeError, match="meta tensors"):
        on_meta().sum().item()
