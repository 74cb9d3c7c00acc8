"""SmPO-Diffusion (Lu et al., ICML 2025, arXiv 2506.02698): smoothed preferences, and noise by inversion.

1. People differ, so "image 0 won" becomes a probability p from a reward model; the loss fades to zero
   gradient where the two images are equally good.
2. The noise of each image is not drawn but found: DDIM inversion with the current model, refined by ReNoise.

    paper        here      shape
    x_0          x0        (2B, 4, h, w)  latents: images 0 of the batch, then images 1; no winner, no loser
    x_t, tau     xt, eps   (2B, 4, h, w)  where the inversion ends, and the noise that would have led there
    eps_theta    err       (2B,)          denoising error of the trained UNet (mean over C, h, w, in fp32)
    eps_ref      ref_err   (2B,)          the same of the frozen start UNet
    alpha/gamma  p         (B,)           probability that image 0 is preferred
    beta         beta      float          KL strength
    gamma        gamma     float          how sharp preferences are: the weight is gamma (2p - 1)

What changes against dpo_baseline.py:
    1. preference_probability: the label becomes p, from the difference of two reward scores
    2. smpo_loss: the margin is weighted by gamma (2p - 1), which carries the sign
    3. the training step finds xt and eps by common.renoise_invert; each image has its own
    4. before training, every pair is scored once

    torchrun smpo.py                                                      # the tiny world, CPU, minutes
    torchrun smpo.py --preset sd15 --model M --data D --unet U    # one GPU; U: dpo_baseline.py --sft
    torchrun --nproc_per_node=8 smpo.py --preset sdxl --model M --data D
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common
from common import flag


def denoising_error(eps_pred, eps):  # same as dpo_baseline.py
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: differences of 1e-4 matter."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


def preference_probability(score_0, score_1, lo, hi):
    """p (B,) = probability that image 0 is preferred, from two scores (B,) of a reward model and the smallest
    and largest score of the data set: softmax over the min-max normalised scores."""
    return torch.sigmoid((score_0 - score_1) / (hi - lo))


def smpo_loss(err, ref_err, p, beta, gamma):
    """SmPO, arXiv 2506.02698 Eq. 9 (by a secondary note of the paper). err, ref_err (2B,): denoising errors
    of the trained and the frozen UNet, images 0 first, then images 1; p (B,). Returns losses (B,) and the
    detached margin in favour of image 0 (B,)."""
    log_ratio = ref_err - err  # grows as the trained UNet denoises an image better than the reference does
    image_0, image_1 = log_ratio.chunk(2)
    margin = image_0 - image_1
    weight = gamma * (2 * p - 1)  # the paper's 2 alpha - gamma; its sign says who wins, p = 1/2 fades out
    losses = -F.logsigmoid(0.5 * beta * weight * margin)  # p = gamma = 1 is Diffusion-DPO
    return losses, margin.detach()


@dataclass
class Config(common.RewardConfig):
    beta: float = flag(2000.0, "KL strength: larger stays closer to the reference; too small ruins it", ">0")
    gamma: float = flag(10.0, "sharpness of the smoothed preference: weights run from -gamma to gamma", ">0")
    inversion_steps: int = flag(5, "DDIM steps from clean to t = T; 0 draws noise: smoothing alone", ">=0")
    renoise: int = flag(1, "1: ReNoise, a second look at each inversion step; 0: plain DDIM inversion", ">=0")
    landing: Literal["t", "grid"] = flag("grid", "where inversion ends: drawn t, or first grid level >= t")
    ask: Literal["end", "start"] = flag("start", "level that a step tells the UNet; end: ReNoise's own")
    min_t: int = flag(0, "smallest t; near 0 found noise is a difference divided by nearly nothing", ">=0")
    reward_min: float | None = flag(None, "smallest reward, for the normalisation; default: the data's own")
    reward_max: float | None = flag(None, "largest; released code: 11.5435, 28.2016 in PickScore's unit")


# sd15, sdxl: Diffusion-DPO's batch, steps, lr, warm-up, caption dropout and beta, which the release builds
# on; gamma 10, five inversion steps, grid landing, asked at a step's start: SmPO's release under the library
# it pins. Precision, micro-batch, workers are ours.
# tiny: searched; tests/tiny/searches.md has what was tried.
PRESETS = {
    "tiny": common.tiny("smpo") | {
        "steps": 100, "batch": 32, "micro_batch": 32, "lr": 2e-5, "warmup": 10, "beta": 300.0,
        "caption_dropout": 0.1, "ema": 0.9999, "reward": str(common.TINY / "reward"),
    },
    "sd15": {
        "steps": 2000, "batch": 2048, "micro_batch": 8, "lr": 2.048e-5, "warmup": 500, "beta": 2000.0,
        "caption_dropout": 0.2, "flip": True, "resolution": 512, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/smpo-sd15", "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    },
    "sdxl": {
        "steps": 2000, "batch": 2048, "micro_batch": 2, "lr": 2.048e-5, "warmup": 500, "beta": 5000.0,
        "optimizer": "adafactor",
        "caption_dropout": 0.2, "flip": True, "resolution": 1024, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/smpo-sdxl", "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    },
}  # fmt: skip


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    place = common.setup()
    common.check(cfg, place)
    models = common.Models(cfg, place.device)
    ref, T = common.reference_unet(models, cfg), len(models.alpha_bar)
    if cfg.min_t >= T:
        raise common.InputError(f"--min_t {cfg.min_t} is not below the model's {T} timesteps")

    # Rows to train on: not tied, every image decodes. Who won is not used: the reward says by how much.
    source = common.open_source(cfg, models, place, common.PAIR)
    usable = (source.labels != 0.5) & source.good
    find_scores = common.open_scores(cfg, models, place, source)  # refuses what is wrong, scores when called
    common.claim(cfg, place, usable)

    # Every pair is scored once, ties too: the normalisers are the whole set's smallest and largest score.
    scores = find_scores()
    del find_scores  # and with it the reward model
    s0, s1 = scores["score_0"], scores["score_1"]
    both = torch.cat([s0, s1])
    # what is found goes into cfg too: config.json tells it, and a resume compares it
    lo = cfg.reward_min = both[both.isfinite()].min().item() if cfg.reward_min is None else cfg.reward_min
    hi = cfg.reward_max = both[both.isfinite()].max().item() if cfg.reward_max is None else cfg.reward_max
    if hi <= lo:
        raise common.InputError(f"rewards run from {lo:g} to {hi:g}: nothing tells the images apart")
    usable &= s0.isfinite() & s1.isfinite()
    samples = common.Samples(source, usable, cfg, models, score_0=s0, score_1=s1)

    run = common.Run(cfg, place, models, samples)
    for micro_batches in run.steps():
        for batch in micro_batches:
            x0, cond = models.encode(batch)  # (2B, 4, h, w): images 0, then images 1
            t = (cfg.min_t + batch["t"] * (T - cfg.min_t) // T).repeat(2)  # one t a pair, in [min_t, T)
            p = preference_probability(batch["score_0"], batch["score_1"], lo, hi).to(place.device)

            def eps_fn(x, level, rows):  # the model as it is now, no DDP; no guidance; the pair's caption
                return models.predict_eps(run.bare, x, level, common.take(cond, rows))

            with torch.no_grad():
                if cfg.inversion_steps:  # find the noise of each image
                    how = cfg.inversion_steps, cfg.renoise, cfg.landing, cfg.ask
                    xt, eps = common.renoise_invert(eps_fn, x0, t, models.alpha_bar, *how)
                else:  # draw it, one for both images
                    eps = batch["noise"].repeat(2, 1, 1, 1).to(place.device)
                    xt = common.add_noise(x0, eps, t, models.alpha_bar)
                target = models.target(x0, eps, t)
                ref_err = denoising_error(models.predict(ref, xt, t, cond), target)

            err = denoising_error(models.predict(run.unet, xt, t, cond), target)
            losses, margin = smpo_loss(err, ref_err, p, cfg.beta, cfg.gamma)
            for_0, (err_0, err_1) = p > 0.5, err.chunk(2)
            margin = torch.where(for_0, margin, -margin)  # in favour of the image the reward prefers
            run.backward(losses.mean(), {
                "accuracy": (margin > 0).float().mean(), "margin": margin.mean(),
                "err_winner": torch.where(for_0, err_0, err_1).mean(),
                "err_loser": torch.where(for_0, err_1, err_0).mean(),
            })  # fmt: skip
        run.update()
    run.finish()


if __name__ == "__main__":
    common.launch(main)
