# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The tiny world: a renderer, an exact judge and a crowd of annotators.

640 captions such as "a red star on navy" (8 shapes x 10 colours x 8 backgrounds), drawn at 64 px. The base
model is pre-trained on *flawed* drawings, so there is something to align it out of; `gold_score` knows
exactly how far an image is from what its caption asks for; annotators see the same thing through tastes of
their own and with noise. Only make.py (annotators) and the closing report or evaluation (judge) call this
file: no training script does.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = {
    "red": (222, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 50),
    "green": (50, 190, 70),
    "cyan": (50, 215, 225),
    "blue": (50, 90, 240),
    "purple": (150, 60, 210),
    "pink": (250, 130, 190),
    "white": (252, 252, 252),
    "brown": (150, 90, 45),
}
BACKGROUNDS = {
    "navy": (15, 20, 70),
    "black": (8, 8, 8),
    "grey": (125, 125, 125),
    "olive": (95, 100, 30),
    "teal": (10, 95, 95),
    "maroon": (90, 15, 30),
    "cream": (240, 225, 190),
    "sky": (160, 200, 235),
}
SPLITS = {"pairs": 384, "validation": 64, "search": 64, "test": 128}  # captions; disjoint, together all 640

# How often a pre-training image is flawed, each flaw independent of the others: 34 % of the images have none.
FLAWS = {
    "shape": 0.13,
    "colour": 0.13,
    "background": 0.13,
    "blur": 0.12,
    "dark": 0.12,
    "noise": 0.08,
    "tiny": 0.13,
    "off-centre": 0.13,
}
RADIUS, OFFSET = (15.0, 23.0), 6.0  # px: what counts as well drawn


def caption(shape, colour, background):
    return f"a {colour} {shape} on {background}"


def parse(text):
    """`a red star on navy` -> ("star", "red", "navy"); ValueError for anything else."""
    words = text.split()
    if len(words) != 5 or words[1] not in COLOURS or words[2] not in SHAPES or words[4] not in BACKGROUNDS:
        raise ValueError(f"not a caption of the tiny world: {text!r}")
    return words[2], words[1], words[4]


def split_captions(seed=0):
    """The 640 captions in disjoint sets: {"pairs": [384], "validation": [64], "search": [64], "test":
    [128]}."""
    everything = [caption(s, c, b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS]
    order = np.random.default_rng(seed).permutation(len(everything)).tolist()
    sets, start = {}, 0
    for name, count in SPLITS.items():
        sets[name] = [everything[i] for i in order[start : start + count]]
        start += count
    return sets


# -------------------------------------------------------------------------------------------------- renderer
def _inside(shape, u, v):
    """Is the point (u right, v down; the shape spans about [-1, 1]) inside? Boolean, the shape of u."""
    au, av, rr = u.abs(), v.abs(), u * u + v * v
    if shape == "circle":
        return rr < 0.81
    if shape == "square":
        return (au < 0.78) & (av < 0.78)
    if shape == "triangle":
        return (au < (v + 0.95) * 0.56) & (v < 0.75)
    if shape == "diamond":
        return au / 0.72 + av < 1
    if shape == "star":  # fold the angle into one of ten wedges, then one straight edge from tip to notch
        wedge = torch.pi / 5
        angle = (torch.atan2(u, -v) % (2 * wedge) - wedge).abs()  # 0 at a notch, pi/5 at a tip
        along, across = rr.sqrt() * torch.cos(wedge - angle), rr.sqrt() * torch.sin(wedge - angle)
        notch_x, notch_y = 0.42 * np.cos(wedge), 0.42 * np.sin(wedge)
        return along < 1 - across * (1 - notch_x) / notch_y
    if shape == "heart":
        x, y = 1.2 * u, 0.15 - 1.2 * v
        return (x * x + y * y - 1) ** 3 < x * x * y**3
    if shape == "cross":
        return ((au < 0.3) & (av < 0.92)) | ((av < 0.3) & (au < 0.92))
    if shape == "ring":
        return (rr < 0.9) & (rr > 0.28)
    raise ValueError(shape)


def masks(shape, x, y, radius, supersample=3):
    """Coverage (n, 64, 64) in [0, 1] of a shape centred on (x, y) px with the given radius px; all three
    (n,)."""
    axis = (torch.arange(SIZE * supersample) + 0.5) / supersample
    x, y, radius = (torch.as_tensor(a, dtype=torch.float32)[:, None, None] for a in (x, y, radius))
    u, v = torch.broadcast_tensors((axis[None, None, :] - x) / radius, (axis[None, :, None] - y) / radius)
    return F.avg_pool2d(_inside(shape, u, v).float()[:, None], supersample)[:, 0]


def rgb(table, name):
    return torch.tensor(table[name]) / 255


def draw(captions, rng, flaws=FLAWS):
    """Drawings of the captions (n, 3, 64, 64) in [0, 1], flawed at the given rates (flaws={} for clean ones),
    and the captions of what is really in them."""
    images, truths = torch.empty(len(captions), 3, SIZE, SIZE), []
    for i, text in enumerate(captions):
        shape, colour, background = parse(text)
        bad = {name for name, rate in flaws.items() if rng.random() < rate}
        if "shape" in bad:
            shape = SHAPES[rng.integers(len(SHAPES))]
        if "colour" in bad:
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
        if "background" in bad:
            background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        radius = rng.uniform(6, 10) if "tiny" in bad else rng.uniform(*RADIUS)
        x, y = SIZE / 2 + rng.uniform(-OFFSET, OFFSET, 2)
        if "off-centre" in bad:
            angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(14, 20)
            x, y = SIZE / 2 + far * np.cos(angle), SIZE / 2 + far * np.sin(angle)
        mask = masks(shape, [x], [y], [radius])
        ground, figure = rgb(BACKGROUNDS, background)[:, None, None], rgb(COLOURS, colour)[:, None, None]
        image = ground + mask * (figure - ground)
        if "blur" in bad:
            image = F.avg_pool2d(F.pad(image[None], (4,) * 4, mode="replicate"), 9, stride=1)[0]
        if "dark" in bad:
            image = image * 0.45
        if "noise" in bad:
            blotches = torch.from_numpy(rng.normal(0, 0.16, (3, 16, 16))).float()
            image = image + blotches.repeat_interleave(4, 1).repeat_interleave(4, 2)
        images[i] = image.clamp(0, 1)
        truths.append(caption(shape, colour, background))
    return images, truths


# ----------------------------------------------------------------------------------------------------- judge
@cache
def _bank(shape):
    """All clean renderings of a shape that the judge compares with: masks (245, 4096), radii, distance off
    centre."""
    shifts = torch.arange(-6, 7, 2.0)
    radii, dx, dy = (
        a.flatten() for a in torch.meshgrid(torch.arange(15, 24, 2.0), shifts, shifts, indexing="ij")
    )
    return masks(shape, SIZE / 2 + dx, SIZE / 2 + dy, radii).flatten(1), radii, (dx**2 + dy**2).sqrt()


def to_tensor(images):
    """PIL images -> (n, 3, 64, 64) in [0, 1]."""
    arrays = [np.asarray(i.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 255 for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def nearest(images, prompts):
    """images: (n, 3, 64, 64) in [0, 1]. Per image: the RMSE to the nearest clean rendering of its caption,
    and that rendering's radius and distance off centre; each (n,)."""
    found = []
    for image, text in zip(images, prompts):
        shape, colour, background = parse(text)
        bank, radii, off = _bank(shape)
        ground = rgb(BACKGROUNDS, background)[:, None]
        figure = rgb(COLOURS, colour)[:, None] - ground
        rest = (
            image.flatten(1) - ground
        )  # ||rest - mask * figure||^2, multiplied out: one product with the bank
        square = (
            rest.square().sum()
            - 2 * bank @ (rest * figure).sum(0)
            + bank.square().sum(1) * figure.square().sum()
        )
        best = square.argmin()
        found.append(torch.stack([(square[best].clamp(min=0) / rest.numel()).sqrt(), radii[best], off[best]]))
    return torch.stack(found).unbind(1)


def gold_score(images, prompts):
    """The exact judge: minus the RMSE (images in [0, 1]) to the nearest clean rendering of the caption. About
    -0.03 for a good image, -0.3 for a bad one. images: n PIL images; prompts: n captions -> (n,) numpy
    array."""
    return -nearest(to_tensor(images), prompts)[0].numpy()


# ------------------------------------------------------------------------------------------------ annotators
TASTE = 0.35  # standard deviation over people of the weight on each matter of taste
TIE = 0.2  # utilities closer than this look the same


def features(images, prompts):
    """What annotators see (n, 5): the judge's score in units of 0.05, then size, brightness, sharpness and
    place, each roughly standardised."""
    x = to_tensor(images)
    rmse, radius, off = nearest(x, prompts)
    sharpness = (x.diff(dim=3).abs().mean((1, 2, 3)) + x.diff(dim=2).abs().mean((1, 2, 3))) / 2
    columns = [
        -rmse / 0.05,
        (radius - 18) / 3,
        (x.mean((1, 2, 3)) - 0.35) / 0.2,
        (sharpness - 0.02) / 0.01,
        (3 - off) / 2,
    ]
    return torch.stack(columns, 1).clamp(-8, 8).numpy()


def annotators(count=100, seed=0):
    """Each person's weights (count, 5): everybody weighs the judge's score 1, tastes differ in sign and
    size."""
    weights = np.random.default_rng(seed).normal(0, TASTE, (count, 5))
    weights[:, 0] = 1
    return weights


def answer(seen_0, seen_1, person, rng):
    """label_0 of one pair by one person: 1 (image 0), 0 (image 1) or 0.5 (a tie); Bradley-Terry noise."""
    gap = float((seen_0 - seen_1) @ person)
    if abs(gap) < TIE:
        return 0.5
    return float(rng.random() < 1 / (1 + np.exp(-gap)))


def bayes_accuracy(seen_0, seen_1, people):
    """How often the best possible guess, knowing the images but not the annotator, agrees with a non-tied
    label."""
    gap = (seen_0 - seen_1) @ people.T  # (pairs, people)
    counted = np.abs(gap) >= TIE
    first = (counted / (1 + np.exp(-gap))).sum(1)
    return float(np.maximum(first, counted.sum(1) - first).sum() / counted.sum())
