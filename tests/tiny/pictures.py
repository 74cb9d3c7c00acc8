# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The pictures that explain the methods, drawn by the functions that they explain.

losses.png      the three losses over their margin or gap
ladder.png      the way of one image through each inversion, at t = 450
inversion.png   images of the tiny world, noised by sampled and by inverted noise, and denoised

    python tests/tiny/pictures.py           # all three, a minute on a CPU
    python tests/tiny/pictures.py ladder    # this one only
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import common  # noqa: E402
import dpo_baseline  # noqa: E402
import dro  # noqa: E402
import smpo  # noqa: E402

BLUE = "#0072b2"  # these four can be told apart by the colour-blind (Okabe and Ito's)
GREEN = "#009e73"
RED = "#d55e00"
GREY = "#6e7781"
LIGHT = "#dcdcdc"


class Sheet:
    """A white picture. Everything is drawn at twice its size: Pillow's lines are jagged."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour="black", width=1):
        self.pen.line([(2 * x, 2 * y) for x, y in points], colour, 2 * width, joint="curve")

    def dashes(self, x_from, x_to, y, colour, width=2):
        for x in range(x_from, x_to, 12):
            self.line([(x, y), (min(x + 7, x_to), y)], colour, width)

    def arrow(self, x, y_from, y_to, colour="black"):
        head = 9 if y_from > y_to else -9  # which way is "back along the arrow"
        self.line([(x, y_from), (x, y_to + head)], colour, 3)
        triangle = [(x, y_to), (x - 6, y_to + head), (x + 6, y_to + head)]
        self.pen.polygon([(2 * u, 2 * v) for u, v in triangle], colour)

    def text(self, x, y, text, size=15, anchor="la", colour="black"):
        self.pen.text((2 * x, 2 * y), text, colour, ImageFont.load_default(2 * size), anchor)

    def save(self, file):
        self.image.reduce(2).save(file, optimize=True)


# ------------------------------------------------------------------------------------- the losses
def draw_losses(file):
    """A pair's loss over its margin (DPO, SmPO) and over its gap (DRO)."""
    x = torch.linspace(-4, 4, 161)
    # The errors of a pair whose margin is x: the winner's is smaller by x than the reference's.
    err = torch.cat([-x, 0 * x])
    ref_err = torch.zeros_like(err)
    smpo_curves = {}
    for p in (0.55, 0.52, 0.5, 0.45):
        smpo_curves[f"p = {p:.2f}"] = smpo.smpo_loss(err, ref_err, torch.tensor(p), 2, 10)[0]
    sheet = Sheet(1110, 345)
    dpo_curve = {"image 0 won": dpo_baseline.dpo_loss(err, ref_err, 2)[0]}
    draw_panel(sheet, 30, "Diffusion-DPO: loss", "margin, in units of 2 / beta", x, dpo_curve)
    title = "SmPO with gamma = 10: loss"
    draw_panel(sheet, 395, title, "margin, in units of 2 / beta", x, smpo_curves)
    # The gap is the margin's opposite: policy minus expert, where experts come first.
    dro_curve = {"": dro.dro_loss(-err, ref_err, 1)[0]}
    draw_panel(sheet, 760, "DRO: loss, in units of m", "gap, in units of m", x, dro_curve)
    sheet.save(file)


def draw_panel(sheet, left, title, below, x, curves):
    """Curves {name: (161,) values} over x in [-4, 4]; values above 4 are not shown."""

    def at(u, v):
        return left + 40 * (u + 4), 280 - 55 * v

    sheet.text(left, 10, title, 18)
    for u in range(-4, 5, 2):
        sheet.line([at(u, 0), at(u, 4)], "black" if u == 0 else LIGHT)
        sheet.text(at(u, 0)[0], 288, f"{u}", 14, "ma")
    for v in range(5):
        sheet.line([at(-4, v), at(4, v)], "black" if v == 0 else LIGHT)
        sheet.text(at(-4, v)[0] - 6, at(0, v)[1], f"{v}", 14, "rm")
    sheet.text(at(0, 0)[0], 312, below, 15, "ma")
    for i, (colour, (name, y)) in enumerate(zip((BLUE, GREEN, GREY, RED), curves.items())):
        shown = [at(u, v) for u, v in zip(x.tolist(), y.tolist()) if v <= 4]
        sheet.line(shown, colour, 3)
        sheet.text(at(-0.15, 0)[0], at(0, 3.7 - 0.35 * i)[1], name, 15, "rm", colour)


# ------------------------------------------------------------------------------------- the ladder
def steps_taken(t, steps, mode):
    """The steps of one image through common.renoise_invert, as (t_to, what the UNet was told, how
    many calls), in order."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's schedule
    alpha_bar = (1 - betas).cumprod(0)
    told = []

    def watched(x, unet_t, idx):
        told.append(int(unet_t))
        return x

    common.renoise_invert(watched, torch.ones(1, 1, 1, 1), torch.tensor([t]), alpha_bar, steps, mode)
    found = []
    for t_to in common.inversion_path(t, len(alpha_bar), steps, mode):
        unet_t = told[0]
        calls = 2 if told[:2] == [unet_t, unet_t] else 1
        del told[:calls]
        found.append((t_to, unet_t, calls))
    return found


def draw_ladder(file, t=450):
    """Three ladders side by side: from the clean latent to where each inversion ends."""
    sheet = Sheet(1110, 640)
    ways = [
        ("release", 5, "the default: what the published numbers used"),
        ("above", 5, "the same on the grid of T / n"),
        ("paper", 9, "ends exactly at t"),
    ]
    y_of_t = height_of(t)
    sheet.dashes(20, 1090, y_of_t, RED)
    sheet.text(20, y_of_t - 8, f"t = {t}", 17, "ls", RED)
    for i, (mode, steps, note) in enumerate(ways):
        middle = 230 + 335 * i
        sheet.text(middle - 90, 14, f"{mode}, n = {steps}", 19)
        sheet.text(middle - 90, 42, note, 14, colour=GREY)
        draw_way(sheet, middle, steps_taken(t, steps, mode), t)
    note = "An arrow is a DDIM step. Beside it: the timestep that the UNet is told, and how often it is"
    sheet.text(20, 580, note + " called (twice with ReNoise).", 15)
    note = f"x_t is the latent at the top. Its noise is read off at t = {t}, and both UNets, trained"
    note += " and reference, are told t: the error is taken there."
    sheet.text(20, 606, note, 15, colour=RED)
    sheet.save(file)


def height_of(t):
    return 540 - 0.72 * t


def draw_way(sheet, middle, steps, t):
    """One ladder. steps: see `steps_taken`."""
    for x in (middle - 45, middle + 45):
        sheet.line([(x, height_of(0)), (x, height_of(640))], LIGHT, 3)
    levels = [0, *(t_to for t_to, _, _ in steps)]
    top = height_of(levels[-1])
    last_gap = height_of(levels[-2]) - top
    for level in levels:
        y = height_of(level)
        colour = BLUE if level == levels[-1] else "black"
        sheet.line([(middle - 45, y), (middle + 45, y)], colour, 5)
        if last_gap < 20 and level >= levels[-2]:  # the numbers of two rungs that nearly touch
            y += 10 if level == levels[-2] else -10
        sheet.text(middle - 54, y, str(level or "clean"), 16, "rm", colour)
    for t_from, (t_to, unet_t, calls) in zip(levels, steps):
        y_from = height_of(t_from) - 4
        y_to = height_of(t_to) + 4
        y = (y_from + y_to) / 2
        if y_from - y_to > 20:
            sheet.arrow(middle, y_from, y_to)
        else:
            y -= 10
        sheet.text(middle + 54, y, f"told {unet_t}: {calls} call{'s' * (calls > 1)}", 15, "lm")
    sheet.text(middle, top - 8, "x_t", 17, "ms", BLUE)
    if top < height_of(t) - 20:
        sheet.arrow(middle - 118, top, height_of(t) - 3, RED)
        y = (top + height_of(t)) / 2
        sheet.text(middle - 126, y - 9, "used as", 14, "rm", RED)
        sheet.text(middle - 126, y + 9, "if at t", 14, "rm", RED)


# -------------------------------------------------------------------------- images there and back
@torch.no_grad()
def draw_inversion(file, count=5, t=600):
    """Images, noised up to t by sampled and by inverted noise, and what the initial model makes of
    each x_t."""
    cfg = common.parse(smpo.Config, smpo.PRESETS, [])
    models = common.Models(cfg, torch.device("cpu"))
    wanted = np.arange(count) * 40
    rows = [row for _, row in common.open_rows(cfg.data).rows(("caption", "jpg_0"), wanted)]
    images = [common.decode_image(row["jpg_0"]) for row in rows]
    pixels = torch.stack([common.resize_and_crop(image, cfg.resolution)[0] for image in images])
    x0 = models.encode_images(pixels)
    cond = models.encode_prompts([row["caption"] for row in rows])
    timesteps = torch.full((count,), t)

    def predict_eps(x, unet_t, idx):
        return models.predict_eps(models.unet, x, unet_t, common.index_condition(cond, idx))

    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    ways = {"sampled noise": (common.add_noise(x0, noise, timesteps, models.alpha_bar), noise)}
    for mode, steps in (("release", cfg.inversion_steps), ("paper", 9)):
        inverted = common.renoise_invert(
            predict_eps, x0, timesteps, models.alpha_bar, steps, mode, cfg.renoise
        )
        ways[f"{mode}, n = {steps}"] = inverted
    columns = {("image", ""): x0}
    for name, (xt, eps) in ways.items():
        columns[name, f"x_t; mean eps^2 {eps.square().mean():.2f}"] = xt
        columns[name, "denoised"] = denoise(predict_eps, xt, t, models.alpha_bar)
    columns = {titles: to_pixels(models, latents) for titles, latents in columns.items()}
    paste_columns(columns).save(file)


def denoise(predict_eps, x, t, alpha_bar, steps=60):
    """DDIM from t back to the smallest timestep, without guidance."""
    timesteps = torch.linspace(t, 0, steps + 1).long()
    idx = torch.arange(len(x))
    for t_from, t_to in zip(timesteps, timesteps[1:]):
        eps = predict_eps(x, t_from.expand(len(x)), idx)
        x = common.ddim_step(x, eps, alpha_bar[t_from], alpha_bar[t_to])
    return x


def to_pixels(models, latents):
    """(N, 4, h, w) -> (N, H, W, 3) uint8."""
    pixels = models.vae.decode(latents / models.vae.config.scaling_factor).sample / 2 + 0.5
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


SIDE = 128  # of an image, px
GAP = 16  # between two of them
TOP = 54  # above the first row


def paste_columns(columns):
    """A Sheet with a column of images below each pair of titles."""
    count = len(next(iter(columns.values())))
    sheet = Sheet(len(columns) * (SIDE + GAP) + GAP, TOP + count * (SIDE + 12))
    for k, (titles, pixels) in enumerate(columns.items()):
        left = GAP + k * (SIDE + GAP)
        for i, title in enumerate(titles):
            sheet.text(left, 8 + 20 * i, title, 13)
        for i in range(count):
            picture = Image.fromarray(pixels[i])
            picture = picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
            sheet.image.paste(picture, (2 * left, 2 * (TOP + i * (SIDE + 12))))
    return sheet


PICTURES = {"losses": draw_losses, "ladder": draw_ladder, "inversion": draw_inversion}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name](HERE / f"{name}.png")
