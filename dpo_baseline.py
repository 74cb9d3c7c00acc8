# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO (Wallace et al., arXiv 2311.12908) and, with --sft, plain fine-tuning.

These are the two baselines. People chose one image of each pair. DPO raises the likelihood of the
winner over that of the loser, relative to a frozen reference model. A diffusion model's likelihood
cannot be computed, but its denoising error at a random timestep stands in for it: the smaller the
error, the more likely the image.

    paper                here      shape
    x_0^w, x_0^l         x0        (2B, 4, h, w)  latents: winners of the micro-batch, then losers
    epsilon              eps       (2B, 4, h, w)  sampled noise; a pair shares it, as t and caption
    |eps - eps_theta|^2  err       (2B,)          denoising error of the trained UNet, a mean
    |eps - eps_ref|^2    ref_err   (2B,)          the same of the frozen initial UNet
    beta T omega(t)      beta      float          KL strength; T, omega and constants are in it

    torchrun dpo_baseline.py                                     # the tiny world, CPU, minutes
    torchrun dpo_baseline.py --preset sd15 --model M --data D    # one GPU
    torchrun --nproc_per_node=8 dpo_baseline.py --preset sdxl --model M --data D
"""

import common
from common import option
from dataclasses import dataclass
import eval as evaluation
import torch
import torch.nn.functional as F


def denoising_error(eps_pred, eps):
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: 1e-4 matters here."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


# The likelihood bound of a diffusion model is a sum over timesteps of squared errors over 2. So at
# one sampled t, -err / 2 estimates log p_theta(x_0), up to a constant and a weight that are the
# same for both models. The log-ratio log(p_theta / p_ref) is then (ref_err - err) / 2, and the DPO
# loss of language models,
#     -log sigmoid(beta (log-ratio of the winner - log-ratio of the loser)),
# becomes the one below. Its log_ratio is twice the log-ratio, and the 1/2 stands beside beta: so it
# does in released code, and published betas are meant that way.
def dpo_loss(err, ref_err, beta):
    """Diffusion-DPO, arXiv 2311.12908 Eq. 14. err, ref_err (2B,): denoising errors of the trained
    and of the frozen UNet, all winners first, then all losers. Returns the losses (B,) and the
    detached margin (B,), above 0 where the trained model prefers the winner more than the reference
    prefers it."""
    log_ratio = ref_err - err  # (2B,) twice log(p_theta / p_ref): above 0 where training has helped
    log_ratio_winner, log_ratio_loser = log_ratio.chunk(2)  # (B,) each
    margin = log_ratio_winner - log_ratio_loser  # (B,)
    # At the start the models are equal: margin 0, loss log 2, gradient -beta / 4 on the margin.
    losses = -F.logsigmoid(0.5 * beta * margin)
    return losses, margin.detach()


@dataclass
class Config(common.TrainConfig):
    beta: float = option(5000.0, "KL strength: larger stays closer to the reference model", ">0")
    sft: bool = option(False, "plain denoising loss, on the winners or on caption + image rows")
    scores: str | None = option(None, "scores file: it says who won; human ties still stay out")


# Where the values of the presets are from:
# - sd15 and sdxl are the launchers of the released code: 2,000 steps of 2,048 pairs at lr 1e-8 x
#   2048, beta 5,000, caption dropout 0.2, each image flipped on its own; SDXL with Adafactor and a
#   warm-up of 200.
# - The paper's text has other values: beta 2,000 for SD1.5, lr (2000 / beta) 2.048e-8, a warm-up
#   of 25 %. Its SFT runs as long, at a tenth of the learning rate: --sft --lr 2.048e-6. It reports
#   that any amount of SFT makes SDXL worse.
# - Ours are precision, micro-batch, checkpointing and clip. tiny: see tests/tiny/searches.md.
# - --lora needs a larger lr; nothing is published. Of three tried on the tiny world, 2e-3 was best.
TINY = common.tiny_preset("dpo") | {
    "steps": 100,
    "batch": 32,
    "micro_batch": 32,
    "lr": 3e-5,
    "warmup": 10,
    "beta": 500.0,
    "caption_dropout": 0.1,
}
SD15 = {
    "steps": 2000,
    "batch": 2048,
    "micro_batch": 32,
    "lr": 2.048e-5,
    "warmup": 500,
    "beta": 5000.0,
    "caption_dropout": 0.2,
    "flip": True,
    "resolution": 512,
    "precision": "bf16",
    "checkpointing": True,
    "workers": 8,
    "save_every": 50,
    "out": "runs/dpo-sd15",
}
SDXL = SD15 | {
    "micro_batch": 8,
    "optimizer": "adafactor",
    "warmup": 200,
    "resolution": 1024,
    "save_every": 10,
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "out": "runs/dpo-sdxl",
}
PRESETS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    dist_info = common.init_distributed()
    common.validate_config(cfg, dist_info)
    evaluation.test_run_judge(cfg)  # what would fail after the training should fail now
    with common.output_lock(cfg, dist_info):
        train(cfg, dist_info)


def train(cfg, dist_info):
    models = common.Models(cfg, dist_info.device)
    ref = None if cfg.sft else common.reference_unet(models, cfg)
    samples = training_samples(cfg, dist_info, models)
    common.prepare_output_dir(cfg, dist_info)
    trainer = common.Trainer(cfg, dist_info, models, samples)
    for micro_batches in trainer.steps():
        for batch in micro_batches:
            # Latents and captions: all winners, then all losers. (With --sft the winners alone:
            # then B stands where 2B does below.)
            x0 = batch["x0"]  # (2B, 4, h, w)
            cond = batch["cond"]
            images_per_row = len(x0) // len(batch["t"])

            # Both images of a pair get one timestep and one noise: so the difference of their
            # errors comes from the images alone.
            t = batch["t"].repeat(images_per_row)  # (2B,)
            eps = batch["noise"].repeat(images_per_row, 1, 1, 1)
            xt = common.add_noise(x0, eps, t, models.alpha_bar)
            target = models.target(x0, eps, t)  # eps itself, or v for v-prediction models

            # Denoising errors of the reference and of the trained model, (2B,) each. (With --lora
            # the reference is the same UNet without its adapter, so it comes first.)
            if not cfg.sft:
                with torch.no_grad():
                    ref_err = denoising_error(models.predict(ref, xt, t, cond), target)
            err = denoising_error(models.predict(trainer.unet, xt, t, cond), target)

            # Loss and gradient. The mean over the rows is what makes the learning rate independent
            # of the micro-batch; Trainer.backward divides by the number of micro-batches.
            if cfg.sft:
                trainer.backward(err.mean(), {})
            else:
                losses, margin = dpo_loss(err, ref_err, cfg.beta)  # (B,) each
                trainer.backward(losses.mean(), values_to_log(margin, err))
        # Clip, step, EMA, log, checkpoint.
        trainer.optimizer_step()
    trainer.finish()
    evaluation.final_evaluation(cfg)


def training_samples(cfg, dist_info, models):
    """The samples of the run: rows that are not tied, each with its winner first."""
    # SFT has no use for the loser, and takes sets of single images too.
    layouts = (common.PAIR_COLUMNS, common.IMAGE_COLUMNS) if cfg.sft else (common.PAIR_COLUMNS,)
    table = common.RowTable(cfg, dist_info, *layouts)
    wins_0 = table.labels > 0.5  # (R,) labels are 1 where image 0 won, 0 where image 1 did
    train_mask = table.labels != 0.5

    # --scores says who won; a human tie stays out all the same.
    scores = evaluation.load_scores(cfg.scores) if cfg.scores else None
    if scores and table.image_columns != common.PAIR_COLUMNS:
        raise common.InputError(f"--scores tells winners of pairs, --data {cfg.data} has none")
    if scores:
        table.check_scores(scores, cfg)
        wins_0 = scores["score_0"] > scores["score_1"]
        decided = scores["score_0"] != scores["score_1"]
        train_mask &= decided & scores["score_0"].isfinite() & scores["score_1"].isfinite()

    # Which images of a row a sample has: (R, 2), e.g. [1, 0] where image 1 won; SFT: (R, 1).
    winner_side = (~wins_0).long()  # (R,) 0 or 1
    both_sides = torch.stack([winner_side, 1 - winner_side], 1)
    sides = winner_side[:, None] if cfg.sft else both_sides
    samples = common.SampleStream(cfg, dist_info, models, table, train_mask, sides)
    if scores:
        # Again: the line above has read images, whose keys can now be compared too.
        table.check_scores(scores, cfg)
    return samples


def values_to_log(margin, err):
    # Watch both errors: the margin also grows where the winner gets worse and the loser more so.
    err_winner, err_loser = err.chunk(2)
    return {
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean(),
        "err_winner": err_winner.mean(),
        "err_loser": err_loser.mean(),
    }


if __name__ == "__main__":
    common.run_script(main)
