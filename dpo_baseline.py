"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), and plain fine-tuning with --sft: the two baselines.

People chose one image of each pair. Raise the likelihood of the winner over the loser's, relative to a frozen
reference; for a diffusion model log-likelihoods become denoising errors at one random timestep.

    paper         here      shape
    x_0^w, x_0^l  x0        (2B, 4, h, w)  latents: winners, then losers
    epsilon       noise     (2B, 4, h, w)  drawn; the same for winner and loser, like t and the caption
    eps_theta     err       (2B,)          denoising error of the trained UNet (mean over C, h, w, in fp32)
    eps_ref       ref_err   (2B,)          the same of the frozen start UNet
    beta T omega  beta      float          KL strength; T and the weighting omega are absorbed, all but a 1/2

    torchrun dpo_baseline.py                                              # the tiny world, CPU, minutes
    torchrun dpo_baseline.py --preset sd15 --model M --data D             # one GPU
    torchrun --nproc_per_node=8 dpo_baseline.py --preset sdxl --model M --data D
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import flag


def denoising_error(eps_pred, eps):
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: differences of 1e-4 matter."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


def dpo_loss(err, ref_err, beta):
    """Diffusion-DPO, arXiv 2311.12908 Eq. 14. err, ref_err (2B,): denoising errors of the trained and the
    frozen UNet, winners first, then losers. Returns losses (B,) and the detached margin (B,)."""
    log_ratio = ref_err - err  # grows as the trained UNet denoises an image better than the reference does
    winner, loser = log_ratio.chunk(2)
    margin = winner - loser
    losses = -F.logsigmoid(0.5 * beta * margin)  # log 2 and a pull of beta / 4 at the start, where margin = 0
    return losses, margin.detach()


@dataclass
class Config(common.TrainConfig):
    beta: float = flag(5000.0, "KL strength: larger stays closer to the reference; too small ruins it", ">0")
    sft: bool = flag(False, "plain denoising loss, on the winners or on a set of caption + image rows")
    scores: str | None = flag(None, "scores file: the higher score wins, whatever the human said")


# sd15, sdxl: Diffusion-DPO's 2,000 steps of 2,048 pairs, a quarter of them warm-up, caption dropout 0.2,
# AdamW, Adafactor for SDXL; beta is its launcher's (its text: 2000 for SD1.5); lr is (2000 / beta) 2.048e-8
# in the text, 1e-8 x 2048 = 2.048e-5 in the code: used here. Precision, micro-batch and workers are ours.
PRESETS = {
    "tiny": common.tiny("dpo") | {
        "steps": 100, "batch": 32, "micro_batch": 32, "lr": 3e-5, "warmup": 10, "beta": 500.0,
        "caption_dropout": 0.1,
    },
    "sd15": {
        "steps": 2000, "batch": 2048, "micro_batch": 8, "lr": 2.048e-5, "warmup": 500, "beta": 5000.0,
        "caption_dropout": 0.2, "flip": True, "resolution": 512, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/dpo-sd15",
    },
    "sdxl": {
        "steps": 2000, "batch": 2048, "micro_batch": 2, "lr": 2.048e-5, "warmup": 500, "beta": 5000.0,
        "optimizer": "adafactor",
        "caption_dropout": 0.2, "flip": True, "resolution": 1024, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/dpo-sdxl",
    },
}  # fmt: skip


def winners_first(label):
    """Indices (2B,) that turn (images 0, then images 1) into (winners, then losers); label (B,): 1 where
    image 0 wins."""
    zero = torch.arange(len(label))
    one, won = zero + len(label), label == 1
    return torch.cat([torch.where(won, zero, one), torch.where(won, one, zero)])


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    place = common.setup()
    common.check(cfg, place)
    models = common.Models(cfg, place.device)
    ref = None if cfg.sft else common.reference_unet(models, cfg)
    images = 1 if cfg.sft else 2  # of each row: SFT has no use for the loser

    # Rows to train on: not tied, every image decodes. label: 1 where image 0 wins.
    source = common.open_source(cfg, models, place, common.PAIR, *([common.SINGLE] if cfg.sft else []))
    label, usable = source.labels, (source.labels != 0.5) & source.good
    if cfg.scores:
        scores = common.load_scores(cfg.scores, source)
        s0, s1 = scores["score_0"], scores["score_1"]
        label = (s0 > s1).float()
        usable &= s0.isfinite() & s1.isfinite() & (s0 != s1)
    common.claim(cfg, place, usable)
    samples = common.Samples(source, usable, cfg, models, label=label)

    run = common.Run(cfg, place, models, samples)
    for micro_batches in run.steps():
        for batch in micro_batches:
            x0, cond = models.encode(batch)  # (2B, 4, h, w): images 0, then images 1
            pairs = len(batch["label"])
            order = winners_first(batch["label"])[: images * pairs].to(place.device)
            x0, cond = x0[order], common.take(cond, order)  # winners, then losers

            # One t and one noise for both images of a pair.
            t, eps = batch["t"].repeat(images), batch["noise"].repeat(images, 1, 1, 1).to(place.device)
            xt, target = common.add_noise(x0, eps, t, models.alpha_bar), models.target(x0, eps, t)

            err = denoising_error(models.predict(run.unet, xt, t, cond), target)
            if cfg.sft:
                run.backward(err.mean(), {})
                continue
            with torch.no_grad():
                ref_err = denoising_error(models.predict(ref, xt, t, cond), target)
            losses, margin = dpo_loss(err, ref_err, cfg.beta)
            run.backward(losses.mean(), {
                "accuracy": (margin > 0).float().mean(), "margin": margin.mean(),
                "err_winner": err[:pairs].mean(), "err_loser": err[pairs:].mean(),
            })  # fmt: skip
        run.update()
    run.finish()


if __name__ == "__main__":
    common.launch(main)
