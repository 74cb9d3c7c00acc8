"""What the authors' released SmPO loop computes, rebuilt from its description for tests and evidence: five
DDIM inversion steps between fixed levels, then a target and two UNet calls at another timestep than the
latent's.

The released code does it with sample 0's t for a whole batch; here every sample has its own. What the loop
means depends on the library: diffusers 0.20.0, which it pins, and 0.22 and later disagree about which end of
a step a timestep names."""

import torch


def released_invert(eps_fn, x0, t, alpha_bar, library):
    """-> (xt, eps), as common.renoise_invert. library: "0.20" or "0.22".

    Steps go to the levels 1, 201, 401, 601, 801, from 200 below; the first starts at alpha_bar[0], not
    clean. They are taken while the timestep that names a step is at most t: under 0.20 that is the level the
    step comes from (-199, 1, ...), so the last step lands above t if it can; from 0.22 on the level it goes
    to, so it lands below. The UNet is told the same timestep."""
    ab = alpha_bar.double().cpu()
    x = x0.clone()
    for to in range(1, 1000, 200):
        named = to - 200 if library == "0.20" else to
        rows = (t >= named).nonzero()[:, 0]
        if not len(rows):
            break
        a, b = ab[max(to - 200, 0)].item(), ab[to].item()
        told = torch.full((len(rows),), named)

        def up(e, x=x, rows=rows, a=a, b=b):
            return b**0.5 * (x[rows] - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e

        first = eps_fn(x[rows], told, rows)
        second = eps_fn(up(first), told, rows)
        x[rows] = up((first + second) / 2)
    at = ab[t].float().view(-1, 1, 1, 1)
    return x, (x - at.sqrt() * x0) / (1 - at).sqrt()
