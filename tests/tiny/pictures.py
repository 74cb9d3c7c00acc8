"""The README's two explaining pictures, made by the code they explain: losses.png and inversion.png.

python tests/tiny/pictures.py           # half a minute on a CPU
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent)]

import common  # noqa: E402
import dpo_baseline  # noqa: E402
import dro  # noqa: E402
import smpo  # noqa: E402
from eval import write  # noqa: E402

COLOURS = ("#0550ae", "#1a7f37", "#6e7781", "#c93c37")


def draw_losses(file):
    """A pair's loss over its margin (DPO, SmPO) and over its gap (DRO), by the loss functions themselves."""
    x = torch.linspace(-4, 4, 161)
    err, ref_err = torch.cat([-x, 0 * x]), torch.zeros(2 * len(x))  # a margin of x
    preferences = {"p = 0.55": 0.55, "p = 0.52": 0.52, "p = 0.50": 0.5, "p = 0.45": 0.45}
    panels = [
        ("Diffusion-DPO", "margin, in 2 / beta", {"image 0 won": dpo_baseline.dpo_loss(err, ref_err, 2)[0]}),
        ("SmPO, gamma = 10", "margin, in 2 / beta",
         {k: smpo.smpo_loss(err, ref_err, torch.tensor(p), 2, 10)[0] for k, p in preferences.items()}),
        ("DRO", "gap, and loss, in m", {"": dro.dro_loss(-err, ref_err, 1)[0]}),
    ]  # fmt: skip
    draw = ImageDraw.Draw(sheet := Image.new("RGB", (1110, 340), "white"))
    for left, (title, below, curves) in zip((30, 395, 760), panels):

        def at(u, v, left=left):
            return left + 40 * (u + 4), 280 - 55 * v

        write(draw, (left, 10), f"{title}: loss", 18)
        for u in range(-4, 5, 2):
            draw.line((*at(u, 0), *at(u, 4)), "black" if u == 0 else "#d8d8d8", 1)
            write(draw, (at(u, 0)[0], 288), f"{u}", 14, anchor="ma")
        for v in range(5):
            draw.line((*at(-4, v), *at(4, v)), "black" if v == 0 else "#d8d8d8", 1)
            write(draw, (at(-4, v)[0] - 6, at(0, v)[1]), f"{v}", 14, anchor="rm")
        write(draw, (at(0, 0)[0], 310), below, 15, anchor="ma")
        for i, (name, y) in enumerate(curves.items()):
            draw.line([at(u, v) for u, v in zip(x.tolist(), y.tolist()) if v <= 4], COLOURS[i], 4)
            draw.text(at(-0.15, 3.7 - 0.35 * i), name, COLOURS[i], ImageFont.load_default(15), "rm")
    sheet.save(file)


@torch.no_grad()
def draw_inversion(file, count=5, level=600):
    """Images, noised up to one t by drawn and by found noise, and what the start model makes of these."""
    cfg = common.parse(smpo.Config, smpo.PRESETS, ["--cache", ""])
    models = common.Models(cfg, torch.device("cpu"))
    rows = list(common.open_rows(cfg.data, common.PAIR, streaming=True))[: 40 * count : 40]
    images = torch.stack([common.square(common.decode_image(row["jpg_0"]), 64)[0] for row in rows])
    x0, cond = models.encode_images(images), models.encode_prompts([row["caption"] for row in rows])
    t = torch.full((count,), level)

    def eps_fn(x, t, rows):
        return models.predict_eps(models.unet, x, t, common.take(cond, rows))

    def denoised(x, steps=60):  # DDIM back from t
        levels = torch.linspace(level, 0, steps + 1).long()
        for a, b in zip(levels, levels[1:]):
            ab_a, ab_b = models.alpha_bar[a], models.alpha_bar[b]
            x = common._ddim(x, eps_fn(x, a.expand(count), torch.arange(count)), ab_a, ab_b)
        return x

    drawn = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    ways = {"drawn": (common.add_noise(x0, drawn, t, models.alpha_bar), drawn)}
    preset = cfg.inversion_steps, cfg.renoise, cfg.landing, cfg.ask
    found = {"found, as preset": preset, "found, landing t": (7, 1, "t", "end")}
    for name, how in found.items():
        ways[name] = common.renoise_invert(eps_fn, x0, t, models.alpha_bar, *how)
    columns = {"image": x0}
    for name, (xt, eps) in ways.items():
        size = f"mean square {eps.square().mean():.2f}"
        columns |= {f"{name}|x_t, {size}": xt, f"{name}|denoised": denoised(xt)}
    side, gap = 128, 16
    size = len(columns) * (side + gap) + gap, 54 + count * 140
    draw = ImageDraw.Draw(sheet := Image.new("RGB", size, "white"))
    for k, (title, latents) in enumerate(columns.items()):
        pixels = models.vae.decode(latents / models.vae.config.scaling_factor).sample / 2 + 0.5
        pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for i, line in enumerate(title.split("|")):
            write(draw, (gap + k * (side + gap), 8 + 20 * i), line, 13, side + 14)
        for i in range(count):
            picture = Image.fromarray(pixels[i]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + k * (side + gap), 54 + i * 140))
    sheet.save(file)


if __name__ == "__main__":
    draw_losses(HERE / "losses.png")
    draw_inversion(HERE / "inversion.png")
