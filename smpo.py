# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""SmPO-Diffusion (Lu et al., ICML 2025, arXiv 2506.02698): smoothed preferences, inverted noise.

1. Preferences differ between people, and in strength. So the label "image 0 won" is replaced by a
   probability p, estimated from a reward model's scores of both images. The loss fades to zero
   gradient where the two images are equally good.
2. The noise of an image is not sampled but found: by DDIM inversion with the current model,
   refined by ReNoise.

    paper                here      shape
    x_0                  x0        (2B, 4, h, w)  latents: images 0 of the micro-batch, then 1
    x_t                  xt        (2B, 4, h, w)  where the inversion of x0 ends
    tau                  eps       (2B, 4, h, w)  the noise that leads from x0 to xt
    |tau - eps_theta|^2  err       (2B,)          denoising error of the trained UNet, a mean
    |tau - eps_ref|^2    ref_err   (2B,)          the same of the frozen initial UNet
    alpha / gamma        p         (B,)           probability that image 0 is preferred
    beta                 beta      float          KL strength
    gamma                gamma     float          sharpness of the smoothed preference

What changes against dpo_baseline.py:
    1. preference_probability: the label becomes p, from the difference of two reward scores
    2. smpo_loss: the margin is weighted by gamma (2p - 1), which carries the sign
    3. the training step finds xt and eps by common.renoise_invert, for each image its own
    4. before training, every pair is scored once by the reward model

The paper's text could not be had in full: what is called its equation here rests on secondary
notes of it and on the released code. tests/README.md lists where this code departs from that.

    torchrun smpo.py                                             # the tiny world, CPU, minutes
    torchrun smpo.py --preset sd15 --model M --data D --unet U   # U: by dpo_baseline.py --sft
    torchrun --nproc_per_node=8 smpo.py --preset sdxl --model M --data D
"""

import common
from common import option
from dataclasses import dataclass
import eval as evaluation
import torch
import torch.nn.functional as F
from typing import Literal


def denoising_error(eps_pred, eps):  # same as dpo_baseline.py
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: 1e-4 matters here."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


def preference_probability(score_0, score_1, lo, hi):
    """The probability (B,) that image 0 is preferred, from a reward model's scores (B,) of both; lo
    and hi: the smallest and largest score of the data set, or constants in their place."""
    # The scores are normalised to (score - lo) / (hi - lo). A softmax over two values is a sigmoid
    # of their difference. With the set's own extremes p lies between sigmoid(-1) = 0.27 and
    # sigmoid(1) = 0.73, near 1/2 for most pairs. gamma makes up for that: the weight in the loss is
    # at most gamma tanh(1/2) = 0.46 gamma.
    return torch.sigmoid((score_0 - score_1) / (hi - lo))


# Smoothing (Eq. 8) replaces each likelihood by a weighted product in which the other image has a
# part:
#     p_theta(x_0)  ->  p_theta(x_0)^alpha  p_theta(x_1)^(gamma - alpha)
#     p_theta(x_1)  ->  p_theta(x_1)^alpha  p_theta(x_0)^(gamma - alpha)
# and p_ref likewise. With L_i = log(p_theta(x_i) / p_ref(x_i)), the difference of the two
# log-ratios in DPO becomes
#     alpha L_0 + (gamma - alpha) L_1 - alpha L_1 - (gamma - alpha) L_0
#         = (2 alpha - gamma) (L_0 - L_1),
# and with alpha = gamma p the weight is gamma (2p - 1). Its sign says which image is preferred; it
# is 0 where p = 1/2. Swapping the two images changes both signs, so their order does not matter.
def smpo_loss(err, ref_err, p, beta, gamma):
    """SmPO, arXiv 2506.02698 Eq. 9. err, ref_err (2B,): denoising errors of the trained and of the
    frozen UNet, all images 0 first, then all images 1; p (B,). Returns the losses (B,) and the
    detached margin (B,), above 0 where training has helped image 0 more than image 1."""
    # Gradient on the margin at the start, where it is 0: -beta weight / 4, nothing where p = 1/2.
    log_ratio = ref_err - err  # (2B,) twice log(p_theta / p_ref), see dpo_baseline.py
    log_ratio_0, log_ratio_1 = log_ratio.chunk(2)  # (B,) each
    margin = log_ratio_0 - log_ratio_1  # (B,)
    weight = gamma * (2 * p - 1)  # (B,) the paper's 2 alpha - gamma
    losses = -F.logsigmoid(0.5 * beta * weight * margin)  # p = 1, gamma = 1: Diffusion-DPO
    return losses, margin.detach()


@dataclass
class Config(evaluation.RewardConfig):
    beta: float = option(2000.0, "KL strength: larger stays closer to the reference model", ">0")
    gamma: float = option(10.0, "sharpness of the smoothed preference", ">0")
    inversion: Literal["release", "above", "paper", "none"] = option(
        "release", "which inversion finds the noise; none: sampled noise, which is smoothing alone"
    )
    inversion_steps: int = option(5, "inversion steps from clean to the last timestep", ">0")
    renoise: Literal[0, 1] = option(1, "1: ReNoise, a second prediction for a step; 0: plain DDIM")
    reward_min: float | None = option(None, "smallest reward; default: the data's own")
    reward_max: float | None = option(None, "largest reward; default: the data's own")


# The released code's constants for the normalisation, 100 times its cosines: PickScore's unit.
RELEASED_RANGE = {"reward_min": 11.543526500463486, "reward_max": 28.201571106910706}

# Where the values of the presets are from:
# - sd15 and sdxl are the released launchers: 200 steps of 1,024 pairs at lr 1e-8 x 1024, warm-up
#   100, gamma 10, inversion in 5 steps (SDXL: 10), AdamW (SDXL: Adafactor, beta 5,000), caption
#   dropout 0.2, each image flipped on its own, PickScore.
# - Ours are precision, micro-batch, checkpointing and clip. tiny: see tests/tiny/searches.md.
# - --lora needs a larger lr; nothing is published, and none was searched for SmPO.
TINY = common.tiny_preset("smpo") | {
    "steps": 100,
    "batch": 32,
    "micro_batch": 32,
    "lr": 2e-5,
    "warmup": 10,
    "beta": 300.0,
    "caption_dropout": 0.1,
    "ema": 0.9999,
    "reward": str(common.TINY / "reward"),
}
SD15 = RELEASED_RANGE | {
    "steps": 200,
    "batch": 1024,
    "micro_batch": 32,
    "lr": 1.024e-5,
    "warmup": 100,
    "beta": 2000.0,
    "inversion_steps": 5,
    "caption_dropout": 0.2,
    "flip": True,
    "resolution": 512,
    "precision": "bf16",
    "checkpointing": True,
    "workers": 8,
    "save_every": 20,
    "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "out": "runs/smpo-sd15",
}
SDXL = SD15 | {
    "micro_batch": 8,
    "optimizer": "adafactor",
    "beta": 5000.0,
    "inversion_steps": 10,
    "resolution": 1024,
    "save_every": 5,
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "out": "runs/smpo-sdxl",
}
PRESETS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}
SFT_START = (
    "note: the published recipe starts from an SFT model, which was never released: make one with\n"
    "      dpo_baseline.py --preset sd15 --sft --lr 2.048e-6 --out runs/sft, then --unet runs/sft"
)
NOTES = {"sd15": SFT_START}  # printed for this preset if --unet is missing


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    forget_released_range(cfg)
    dist_info = common.init_distributed()
    common.validate_config(cfg, dist_info)
    if cfg.inversion == "release" and cfg.inversion_steps == 1:
        raise common.InputError("--inversion_steps 1 leads --inversion release to timestep 1 only")
    evaluation.test_run_judge(cfg)  # what would fail after the training should fail now
    if cfg.preset in NOTES and not cfg.unet and dist_info.is_main:
        print(NOTES[cfg.preset])
    with common.output_lock(cfg, dist_info):
        train(cfg, dist_info)


def train(cfg, dist_info):
    models = common.Models(cfg, dist_info.device)
    ref = common.reference_unet(models, cfg)
    table, scores = scored_table(cfg, dist_info)
    lo, hi = reward_range(cfg, scores)
    samples = training_samples(cfg, dist_info, models, table, scores)
    common.prepare_output_dir(cfg, dist_info)
    trainer = common.Trainer(cfg, dist_info, models, samples)
    evaluation.keep_scores(cfg, scores, table, dist_info)
    for micro_batches in trainer.steps():
        for batch in micro_batches:
            # Latents and captions of images 0, then of images 1. A pair shares its timestep.
            x0 = batch["x0"]  # (2B, 4, h, w)
            cond = batch["cond"]
            t = batch["t"].repeat(2)  # (2B,)

            # How probably image 0 is preferred. (Labels only say which pairs are ties, and those
            # stay out. The reward says which image is better, and by how much.)
            p = preference_probability(batch["score_0"], batch["score_1"], lo, hi)  # (B,)

            # x_t and its noise: found by inversion, or sampled (one noise for both images).
            if cfg.inversion == "none":
                eps = batch["noise"].repeat(2, 1, 1, 1)
                xt = common.add_noise(x0, eps, t, models.alpha_bar)
            else:
                xt, eps = invert(cfg, models, trainer.no_grad_unet, x0, t, cond)
            target = models.target(x0, eps, t)  # eps itself, or v for v-prediction models

            # Denoising errors of the reference and of the trained model, (2B,) each. (With --lora
            # the reference is the same UNet without its adapter, so it comes first.)
            with torch.no_grad():
                ref_err = denoising_error(models.predict(ref, xt, t, cond), target)
            err = denoising_error(models.predict(trainer.unet, xt, t, cond), target)

            # Loss and gradient.
            losses, margin = smpo_loss(err, ref_err, p, cfg.beta, cfg.gamma)  # (B,) each
            trainer.backward(losses.mean(), values_to_log(margin, err, p))
        # Clip, step, EMA, log, checkpoint.
        trainer.optimizer_step()
    trainer.finish()
    evaluation.final_evaluation(cfg)


@torch.no_grad()
def invert(cfg, models, unet, x0, t, cond):
    """Where the inversion of each image ends, and the noise that leads there: (xt, eps), both
    (2B, 4, h, w). The current model inverts, without guidance, each image with its own caption. No
    gradient flows through the inversion: xt and eps are constants in the loss."""

    def predict_eps(x, unet_t, idx):
        return models.predict_eps(unet, x, unet_t, common.index_condition(cond, idx))

    how = (cfg.inversion_steps, cfg.inversion, cfg.renoise)
    return common.renoise_invert(predict_eps, x0, t, models.alpha_bar, *how)


def values_to_log(margin, err, p):
    """Scalars for the log, named as DPO's."""
    # Here the winner is the image that the reward model prefers: the margin counts towards it.
    prefers_0 = p > 0.5
    err_0, err_1 = err.chunk(2)
    margin = torch.where(prefers_0, margin, -margin)
    return {
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean(),
        "err_winner": torch.where(prefers_0, err_0, err_1).mean(),
        "err_loser": torch.where(prefers_0, err_1, err_0).mean(),
    }


def scored_table(cfg, dist_info):
    """The set's rows, and the reward model's scores of all of them (made now, or kept)."""
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS)
    scores = evaluation.pair_scores(cfg, table, dist_info)
    table.check_scores(scores, cfg)
    return table, scores


def training_samples(cfg, dist_info, models, table, scores):
    """The samples of the run: rows that are no human tie and have both scores, image 0 first."""
    has_scores = scores["score_0"].isfinite() & scores["score_1"].isfinite()
    samples = common.SampleStream(
        cfg,
        dist_info,
        models,
        table,
        train_mask=(table.labels != 0.5) & has_scores,
        sides=torch.tensor([[0, 1]]).expand(len(table.labels), 2),
        score_0=scores["score_0"],
        score_1=scores["score_1"],
    )
    # Again: the constructor above has read images, whose keys can now be compared too.
    table.check_scores(scores, cfg)
    return samples


def forget_released_range(cfg):
    """The released range is PickScore's: not for another reward model, nor for --scores."""
    other_reward = cfg.scores or cfg.reward != evaluation.PICKSCORE
    for name, value in RELEASED_RANGE.items():
        if other_reward and getattr(cfg, name) == value:
            setattr(cfg, name, None)


def reward_range(cfg, scores):
    """(lo, hi) for the normalisation: as given, or the smallest and largest score of the whole set,
    ties included. InputError where they are equal."""
    all_scores = torch.cat([scores["score_0"], scores["score_1"]])
    all_scores = all_scores[all_scores.isfinite()]
    if not len(all_scores):
        raise common.InputError(f"--data {cfg.data}: no image of it has a score")
    # What is found goes into cfg: config.json records it, and a resume compares it.
    if cfg.reward_min is None:
        cfg.reward_min = all_scores.min().item()
    if cfg.reward_max is None:
        cfg.reward_max = all_scores.max().item()
    if cfg.reward_max <= cfg.reward_min:
        text = f"rewards run from {cfg.reward_min:g} to {cfg.reward_max:g}"
        raise common.InputError(f"{text}: nothing tells the images apart")
    return cfg.reward_min, cfg.reward_max


if __name__ == "__main__":
    common.run_script(main)
