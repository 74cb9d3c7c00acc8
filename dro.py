# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DRO (NeurIPS 2025, arXiv 2510.18353): rank experts above the policy's own samples.

The loss needs no reward model, no sigmoid and no pairs. An expert image should gain likelihood over
a sample of the current policy, relative to a frozen reference model, until a margin is reached;
then a hinge switches it off. The policy's samples are made while training runs, each only up to the
timestep that is needed. (The experts may be chosen by a reward model, before training.)

    paper              here           shape
    x_0^e              x0             (B, 4, h, w)  latents of the experts
    epsilon~           noise          (B, 4, h, w)  sampled noise, for the experts
    x_t                x_policy       (B, 4, h, w)  the policy's sample at timestep t
    epsilon            eps_policy     (B, 4, h, w)  the policy's own prediction there
    |eps - eps_phi|^2  err            (2B,)         error of the trained UNet: experts, then samples
    |eps - eps_ref|^2  ref_err        (2B,)         the same of the frozen initial UNet
    m                  margin         float         in units of the error, a mean over C, h, w
    M                  refresh_every  int           updates between copies of the trained UNet to
                                                    the policy; 1: the policy is the trained UNet

What changes against dpo_baseline.py:
    1. dro_loss: a hinge on the gap of two log-ratios, not a sigmoid of a human's choice
    2. rollout: the losers are the policy's own samples, by DPM-Solver++(2M) up to timestep t
    3. ReplayBuffer and --refresh_every decide how old these samples may be
    4. before training, the K best images of a pair set are chosen, or --data is a set of images

With M = 1 and no buffer **the policy's term has no gradient**: the policy is the trained UNet, so
its error against its own prediction is 0, at a minimum, and the trained UNet need not be run on its
samples at all. The loss is then

    relu(ref_err of the sample - 0 - (ref_err of the expert - err of the expert) + m):

fine-tuning on the experts, each switched off once training has lowered its error by more than m
plus what the model has drifted from the reference on its own samples.

    torchrun dro.py                                            # the tiny world, CPU, minutes
    torchrun dro.py --preset sd15 --model MODEL --data DATA    # one GPU
    torchrun --nproc_per_node=8 dro.py --preset sdxl --model MODEL --data DATA   # unpublished
"""

import common
from common import option
from dataclasses import dataclass, replace
import eval as evaluation
import hashlib
from pathlib import Path
import torch
import torch.nn.functional as F


def denoising_error(eps_pred, eps):  # same as dpo_baseline.py
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: 1e-4 matters here."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


# Max-margin inverse reinforcement learning: find a reward under which experts are better than what
# the best policy for that reward does. Take the reward log(p_phi / p_ref), p_phi being the trained
# model (p_theta in the other files). The best policy for it, held to p_ref by a KL term of weight
# 1, is proportional to p_ref exp(reward) = p_phi: so the policy is a copy of the trained model.
# Denoising errors stand in for log-likelihoods, as in DPO; the factor 1/2 is part of the margin.
def dro_loss(err, ref_err, margin):
    """Diffusion-DRO, arXiv 2510.18353 Eq. 15, as relu(gap + m): the paper's max(-m, gap), plus m.
    err, ref_err (2B,): denoising errors of the trained and of the frozen UNet, experts first, then
    policy samples. Returns the losses (B,) and the detached gap (B,): here, unlike DPO's margin,
    smaller is better, and below -margin there is nothing left to learn."""
    log_ratio = ref_err - err  # (2B,) twice log(p_phi / p_ref), see dpo_baseline.py
    log_ratio_expert, log_ratio_policy = log_ratio.chunk(2)  # (B,) each
    gap = log_ratio_policy - log_ratio_expert  # (B,)
    # margin > 0: at the start every gap is 0, and without a margin relu would give no gradient.
    losses = F.relu(gap + margin)
    return losses, gap.detach()


# A sample of the policy is wanted at timestep t only, as x_t with the policy's prediction there. So
# its trajectory is cut short: on average (S + 1) / 2 UNet calls an image, where a whole one takes
# S. For one image, with alpha = sqrt(ab), sigma = sqrt(1 - ab) and lam = log(alpha / sigma) at each
# of its timesteps, e.g. t = 970, 920, ..., 20 with S = 20, DPM-Solver++(2M) is:
#
#     for k in range(S):
#         eps = eps_fn(x, t[k])
#         if k == stop: return x, eps
#         x0 = (x - sigma[k] eps) / alpha[k]
#         h = lam[k + 1] - lam[k]                                      # the solver's step size
#         direction = x0 + h / (2 h_before) (x0 - x0_before)           # in the first step: x0;
#                                                                      # "before": of step k - 1
#         x = sigma[k + 1] / sigma[k] x - alpha[k + 1] (exp(-h) - 1) direction
#
# "2M" stands for second-order multistep: the solver extrapolates x0 linearly in lam from the last
# two predictions. Here each image of a batch has its own timesteps and its own stop, so the
# coefficients are tables, made ahead by `rollout_plan`.
def rollout(eps_fn, xT, timesteps, stop, alpha_bar):
    """Sample with DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), each image on its own timesteps
    and only as far as it is wanted.

    xT (B, C, h, w): pure noise, taken for the latents at timesteps[0]. timesteps (S, B) long,
    descending; stop (B,) long in [0, S): the step whose (x_t, eps) is wanted; both on the CPU, or
    reading them waits for the GPU. eps_fn(x (n, C, h, w), t (n,), idx (n,)) -> eps, where idx says
    which images these are. Returns (xt, eps, t): (B, C, h, w) twice, and (B,), at each image's own
    stop. To copy it elsewhere, take `rollout_plan` and common.to_device with it."""
    x = xT.clone()
    eps = torch.empty_like(xT)
    x0_before = torch.zeros_like(xT)
    for step in rollout_plan(timesteps.cpu(), stop.cpu(), alpha_bar.cpu(), xT.device):
        idx = step["idx"]  # (n,) the images that take part in this step
        eps_now = eps_fn(x[idx], step["t"], idx)
        x0 = (x[idx] - step["sigma"] * eps_now) / step["alpha"]
        direction = x0 + step["extrapolation"] * (x0 - x0_before[idx])
        x[idx] = step["coef_x"] * x[idx] + step["coef_x0"] * direction
        eps[idx] = eps_now  # the last one stays
        x0_before[idx] = x0
    return x, eps, timesteps.cpu().gather(0, stop.cpu()[None])[0]


# An image with an earlier stop joins later, so that all stop together. With stop = [1, 3]:
#
#     step of the batch     0    1    2    3
#     image 0, its step k             0    1
#     image 1, its step k   0    1    2    3
#
# So the last prediction is made for the whole batch at once, as the reference's will be, and the
# two are equal to the bit where the models are. An image's last step has coef_x = 1 and coef_x0 =
# 0: its x_t stays as it is.
def rollout_plan(timesteps, stop, alpha_bar, device):
    """The steps of a batch's rollout, each a dict of its n images' numbers: idx (n,), t (n,), and
    the coefficients (n, 1, 1, 1). Everything is made on the CPU in double precision and sent in one
    copy: see common.to_device."""
    ab = alpha_bar.double()[timesteps]  # (S, B)
    alpha = ab.sqrt()
    sigma = (1 - ab).sqrt()
    h = (alpha / sigma).log().diff(dim=0)  # (S - 1, B) steps in log(alpha / sigma)
    zeros = torch.zeros(1, ab.shape[1], dtype=torch.float64)
    coef_x = torch.cat([sigma[1:] / sigma[:-1], zeros])  # no step leaves the last timestep
    coef_x0 = torch.cat([-alpha[1:] * torch.expm1(-h), zeros])
    # How far to go on along the line through the last two predictions of x0.
    # None at k = 0, which has no prediction before. (The zeros at the end of the three tables stand
    # for steps that nobody takes; the slice is for S = 1.)
    extrapolation = torch.cat([zeros, h[1:] / (2 * h[:-1]), zeros])[: len(ab)]
    last = int(stop.max())
    table = []
    for step in range(last + 1):
        k = stop - last + step  # which of its own steps this is for each image; < 0: not yet
        idx = (k >= 0).nonzero()[:, 0]
        k = k[idx]
        moves = k < stop[idx]
        columns = [
            idx.double(),
            timesteps[k, idx].double(),
            alpha[k, idx],
            sigma[k, idx],
            torch.where(moves, coef_x[k, idx], 1.0),
            torch.where(moves, coef_x0[k, idx], 0.0),
            extrapolation[k, idx],
        ]
        table.append(torch.stack(columns, 1))
    # One copy to the device, then cut into the steps again.
    on_device = common.to_device(torch.cat(table), device)
    plan = []
    for part in on_device.split([len(rows) for rows in table]):
        step = {"idx": part[:, 0].long(), "t": part[:, 1].long()}
        names = ("alpha", "sigma", "coef_x", "coef_x0", "extrapolation")
        for name, values in zip(names, part[:, 2:].float().T):
            step[name] = values.view(-1, 1, 1, 1)
        plan.append(step)
    return plan


# A sample drawn again has been made by an older policy, so the trained UNet no longer predicts what
# stands in it, and the policy's term has a gradient. (M > 1 does the same, but in the first step
# after each copy.)
class ReplayBuffer:
    """The last `size` items, first in, first out. A policy sample fixes timestep and caption, so an
    item holds its expert too; the expert's noise is sampled anew each time."""

    def __init__(self, size):
        self.size = size
        self.items = {}

    def __len__(self):
        return len(next(iter(self.items.values()), ()))

    def push(self, items):
        """items: a dict of (B, ...) tensors, always with the same names."""
        for name, new in items.items():
            old = self.items.get(name, new[:0]).to(new.device)
            self.items[name] = torch.cat([old, new])[-self.size :]

    def sample(self, n, generator):
        """A dict of (n, ...) tensors, drawn without replacement if there are n, else with."""
        if len(self) >= n:
            order = torch.randperm(len(self), generator=generator)[:n]
        else:
            order = torch.randint(len(self), (n,), generator=generator)
        order = common.to_device(order, next(iter(self.items.values())).device)
        return {name: values[order] for name, values in self.items.items()}

    def state_dict(self):
        return self.items

    def load_state_dict(self, items):
        self.items = items


@dataclass
class Config(evaluation.RewardConfig):
    margin: float = option(
        0.001, "how far ref_err - err of an expert should exceed that of a policy sample", ">0"
    )
    rollout_steps: int = option(20, "DPM-Solver++ steps of a whole trajectory", ">0")
    refresh_every: int = option(
        1, "M: updates between copies to the policy; above 1: lower --lr", ">0"
    )
    buffer: int = option(
        0, "policy samples to keep and draw from, all GPUs; 0: use each once", ">=0"
    )
    experts: int = option(500, "K best images of a pair set; a set of images is taken whole", ">0")


# Where the values of the presets are from:
# - sd15 is the released launcher: 1,600 updates of 256 experts, constant lr, margin 0.001, M = 1,
#   caption dropout 0.2, flips, EMA, the 500 best images. (Its EMA decay of 0.9999 is nominal: in
#   1,600 updates the warm-up (1 + n) / (10 + n) never lets it beyond 0.995.)
# - The learning rate is ours, and has not been run. The launcher's 1e-4 is for pure bf16 weights,
#   where most updates are too small to change a weight; on fp32 weights that is a far stronger
#   recipe.
# - The paper's main experts are HPSv2's: score the set with
#       eval.py --data D --scorers hpsv2.0 --scores_out hps.safetensors
#   and train with --scores hps.safetensors. The default here is PickScore's, the paper's second
#   choice, which one command can do.
# - sdxl is a code path without a published result. Ours are also precision, micro-batch,
#   checkpointing and clip. tiny: see tests/tiny/searches.md.
# - --lora needs a larger lr; nothing is published, and none was searched for DRO.
TINY = common.tiny_preset("dro") | {
    "steps": 60,
    "batch": 32,
    "micro_batch": 32,
    "lr": 1e-4,
    "warmup": 10,
    "margin": 0.003,
    "ema": 0.9999,
    "caption_dropout": 0.1,
    "experts": 64,
    "reward": str(common.TINY / "reward"),
}
SD15 = {
    "steps": 1600,
    "batch": 256,
    "micro_batch": 32,
    "lr": 1e-5,
    "margin": 0.001,
    "ema": 0.9999,
    "caption_dropout": 0.2,
    "flip": True,
    "resolution": 512,
    "precision": "bf16",
    "checkpointing": True,
    "workers": 8,
    "save_every": 100,
    "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "out": "runs/dro-sd15",
}
SDXL = SD15 | {
    "micro_batch": 8,
    "optimizer": "adafactor",
    "resolution": 1024,
    "save_every": 20,
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "out": "runs/dro-sdxl",
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
    ref = common.reference_unet(models, cfg)
    check_rollout(cfg, models)
    samples, chosen = expert_samples(cfg, dist_info, models)
    common.prepare_output_dir(cfg, dist_info)
    policy = Policy(cfg, dist_info, models)
    trainer = common.Trainer(cfg, dist_info, models, samples, policy.extra_state)
    keep_experts(cfg, chosen, dist_info)
    for micro_batches in trainer.steps():
        policy.refresh(trainer)  # with M > 1, in every M-th step
        for batch in micro_batches:
            # A sample of the policy for each expert: the same caption, and the same timestep. (With
            # --buffer both are drawn from it, so x0, t and cond need not be the batch's.)
            item = policy.sample(batch, trainer)
            x0 = item["x0"]  # (B, 4, h, w) the experts
            t = item["t"]  # (B,)
            x_policy = item["x_policy"]  # (B, 4, h, w) at timestep t: sampling stopped there
            eps_policy = item["eps_policy"]

            # x_t: of the experts with sampled noise, then of the policy. An expert's target is that
            # noise; a policy sample's is what the policy predicted there.
            noise = batch["noise"]
            xt = torch.cat([common.add_noise(x0, noise, t, models.alpha_bar), x_policy])
            eps = torch.cat([noise, eps_policy])
            x0_policy = common.predicted_x0(x_policy, eps_policy, t, models.alpha_bar)  # for v
            t = t.repeat(2)  # (2B,)
            target = models.target(torch.cat([x0, x0_policy]), eps, t)  # eps, or v
            cond = {name: torch.cat([value, value]) for name, value in item["cond"].items()}

            # Denoising errors of the reference and of the trained model, (2B,) each.
            inputs = (xt, t, target, cond)
            ref_err = reference_errors(models, ref, *inputs, policy.is_trained_unet)
            err = trained_errors(models, trainer.unet, *inputs, policy.is_trained_unet)

            # Loss and gradient.
            losses, gap = dro_loss(err, ref_err, cfg.margin)  # (B,) each
            trainer.backward(losses.mean(), values_to_log(losses, gap, err))
        # Clip, step, EMA, log, checkpoint.
        trainer.optimizer_step()
    trainer.finish()
    evaluation.final_evaluation(cfg)


def errors(models, unet, part, xt, t, target, cond):
    """Denoising errors (n,) of a UNet on a part (a slice) of the 2B images."""
    cond = common.index_condition(cond, part)
    return denoising_error(models.predict(unet, xt[part], t[part], cond), target[part])


@torch.no_grad()
def reference_errors(models, ref, xt, t, target, cond, is_trained_unet):
    """Errors (2B,) of the frozen UNet, in calls of the same sizes as those they are compared with.

    Kernels round differently for other batch sizes. The policy predicted its B samples in one call
    (the rollout's last), and the trained UNet will see B experts, or all 2B images. With the same
    sizes here the gap at step 0 is exactly 0. (For v-prediction, whose targets are made from eps,
    it is 0 up to rounding.)"""
    B = len(xt) // 2
    if not is_trained_unet:
        return errors(models, ref, slice(0, 2 * B), xt, t, target, cond)
    of_experts = errors(models, ref, slice(0, B), xt, t, target, cond)
    of_policy = errors(models, ref, slice(B, 2 * B), xt, t, target, cond)
    return torch.cat([of_experts, of_policy])


def trained_errors(models, unet, xt, t, target, cond, is_trained_unet):
    """Errors (2B,) of the trained UNet. Where it has just made the samples itself, it would predict
    the same again: their error and its gradient are 0, and it is run on the experts alone."""
    B = len(xt) // 2
    if not is_trained_unet:
        return errors(models, unet, slice(0, 2 * B), xt, t, target, cond)
    of_experts = errors(models, unet, slice(0, B), xt, t, target, cond)
    return torch.cat([of_experts, torch.zeros_like(of_experts)])


class Policy:
    """The model that is sampled from: the trained UNet itself, or with M > 1 a copy of it that is
    refreshed every M updates. With --buffer, samples are also drawn again later.

    is_trained_unet: the samples are always of the trained UNet as it is now (M = 1, no buffer)."""

    def __init__(self, cfg, dist_info, models):
        self.cfg = cfg
        self.models = models
        self.copy = common.policy_unet(models, cfg) if cfg.refresh_every > 1 else None
        self.is_trained_unet = self.copy is None and not cfg.buffer
        # One buffer for each of this rank's micro-batches of a step, under its number in the step:
        # then it does not matter which rank has which micro-batch.
        count = cfg.batch // cfg.micro_batch
        mine = range(dist_info.rank, count, dist_info.world_size) if cfg.buffer else ()
        self.buffers = {number: ReplayBuffer(cfg.buffer // count) for number in mine}
        self.extra_state = {f"buffer-{number}": buffer for number, buffer in self.buffers.items()}
        if self.copy is not None:
            self.extra_state["policy"] = self.copy

    def refresh(self, trainer):
        if self.copy is not None and trainer.step % self.cfg.refresh_every == 0:
            common.copy_weights(self.models.unet, self.copy)

    def sample(self, batch, trainer):
        """A dict of B experts with a policy sample each: x0, x_policy, eps_policy (B, 4, h, w), t
        (B,), cond."""
        cond = batch["cond"]
        unet = trainer.no_grad_unet if self.copy is None else self.copy

        def predict_eps(x, unet_t, idx):  # no guidance
            return self.models.predict_eps(unet, x, unet_t, common.index_condition(cond, idx))

        # From noise down to the timestep of each expert.
        T = len(self.models.alpha_bar)
        timesteps, stop = trajectory(batch["t"], T, self.cfg.rollout_steps)
        x0 = batch["x0"]
        xT = start_noise(self.cfg.seed, batch["index"], x0.shape[1:])
        xT = common.to_device(xT, x0.device)
        with torch.no_grad():
            x_policy, eps_policy, t = rollout(
                predict_eps, xT, timesteps, stop, self.models.alpha_bar
            )
        item = {"x0": x0, "x_policy": x_policy, "eps_policy": eps_policy, "t": t}

        # With --buffer: keep it, and learn from any that are there.
        if self.cfg.buffer:
            buffer = self.buffers[batch["number"]]
            buffer.push({**item, **cond})
            key = (self.cfg.seed, "replay", trainer.step, batch["number"])
            drawn = buffer.sample(len(x0), common.generator(*key))
            item = {name: drawn[name] for name in item}
            cond = {name: drawn[name] for name in cond}
        return {**item, "cond": cond}


def check_rollout(cfg, models):
    T = len(models.alpha_bar)
    if T % cfg.rollout_steps:
        text = f"--rollout_steps {cfg.rollout_steps} does not divide the model's {T} timesteps"
        raise common.InputError(text)
    if models.alpha_bar[-1] == 0:
        text = "no signal at its last timestep; rollouts need some"
        raise common.InputError(f"--model {cfg.model}: {text}")
    if 0 < cfg.buffer < cfg.batch:
        text = f"--buffer {cfg.buffer} holds less than a step's --batch {cfg.batch}"
        raise common.InputError(text)


def trajectory(t, T, S):
    """The S timesteps of a trajectory that meets t (B,), T / S apart, and the step at which it
    does: (S, B), (B,), on the CPU."""
    # With T = 1000, S = 20: t = 470 -> 970, 920, ..., 20, in which 470 is number 10 (from 0): so it
    # takes 11 calls. The remainder of t shifts the whole trajectory: every timestep can be met.
    t = t.cpu()
    spacing = T // S
    timesteps = torch.arange(S - 1, -1, -1)[:, None] * spacing + t % spacing
    stop = S - 1 - t // spacing
    return timesteps, stop


def start_noise(seed, index, shape):
    """The noise that each sample's trajectory starts from, (B, *shape), a function of seed and
    index."""
    generators = [common.generator(seed, "rollout", number) for number in index.tolist()]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def values_to_log(losses, gap, err):
    """Scalars for the log; policy_share is the policy samples' part of the gradient."""
    # It is measured at the UNet's predictions: the gradient of err = |pred - target|^2 has a norm
    # proportional to sqrt(err), and the hinge passes it on or stops it. With M = 1 and no buffer
    # it is always 0.
    err_expert, err_policy = err.detach().chunk(2)
    active = (losses.detach() > 0).float()
    grad_expert = (err_expert.sqrt() * active).sum()
    grad_policy = (err_policy.sqrt() * active).sum()
    return {
        "active": active.mean(),
        "gap": gap.mean(),
        "err_expert": err_expert.mean(),
        "err_policy": err_policy.mean(),
        "policy_share": grad_policy / (grad_expert + grad_policy).clamp_min(1e-12),
    }


# ------------------------------------------------------------------- choosing the experts
def expert_samples(cfg, dist_info, models):
    """The samples of the run, an expert each; and what `open_experts` tells of a choice."""
    table, chosen = open_experts(cfg, dist_info)
    rows = len(table.labels)
    train_mask = torch.ones(rows, dtype=torch.bool)
    sides = torch.zeros(rows, 1, dtype=torch.long)  # a row has one image
    return common.SampleStream(cfg, dist_info, models, table, train_mask, sides), chosen


def open_experts(cfg, dist_info):
    """The table of the experts; if they had to be chosen, also a dict with their file, the scores
    and the table of the pair set."""
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS, common.IMAGE_COLUMNS)
    if table.image_columns == common.IMAGE_COLUMNS:
        return table, None
    scores = evaluation.pair_scores(cfg, table, dist_info)
    table.check_scores(scores, cfg)
    file = choose_experts(cfg, dist_info, table, scores)
    experts = common.RowTable(replace(cfg, data=str(file)), dist_info, common.IMAGE_COLUMNS)
    return experts, {"file": file, "scores": scores, "table": table}


def top_experts(scores, k):
    """The k highest scoring of a pair set's unique (image, caption) items -> their (row, side,
    score), best first; of equal scores the earlier row. Labels have no say."""
    # One entry an image: row 0 side 0, row 0 side 1, row 1 side 0, ... An image with its caption
    # can stand in several pairs: the key tells.
    value = torch.stack([scores["score_0"], scores["score_1"]], 1).flatten()
    key = torch.stack([scores["key_0"], scores["key_1"]], 1).flatten()
    best_first = value.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    chosen = []
    seen = set()
    for i in best_first.tolist():
        if len(chosen) == k:
            break
        item = int(key[i])
        if item not in seen and value[i].isfinite():
            seen.add(item)
            chosen.append((i // 2, i % 2, value[i].item()))
    return chosen


def choose_experts(cfg, dist_info, table, scores):
    """The best images of a pair set, as a parquet file (caption, image, score) in --cache."""
    best = top_experts(scores, cfg.experts)
    if not best:
        raise common.InputError(f"--data {cfg.data}: no image of it has a score")
    items = [int(scores[f"key_{side}"][row]) for row, side, _ in best]
    values = [value for _, _, value in best]
    name = hashlib.blake2b(str([items, values]).encode(), digest_size=12).hexdigest()
    file = Path(cfg.cache) / "experts" / f"{name}.parquet"
    if dist_info.is_main:
        write_experts(cfg, table, scores, best, file)
        text = f"{len(best)} experts, scored {best[-1][2]:.4g} to {best[0][2]:.4g}"
        print(f"{text}: {Path(cfg.out) / 'experts.parquet'}", flush=True)
    common.barrier()
    return file


def write_experts(cfg, table, scores, best, file):
    from datasets import Dataset

    rows = sorted({row for row, _, _ in best})
    wanted = {(row, side): value for row, side, value in best}
    columns = ("caption", *table.image_columns)
    found = {}
    for number, row in table.source.rows(columns, torch.tensor(rows).numpy()):
        for side, name in enumerate(table.image_columns):
            if (number, side) not in wanted:
                continue
            key = common.item_key(common.image_key(row[name]), common.caption_key(row["caption"]))
            if key != scores[f"key_{side}"][number]:
                text = f"row {number} is not the one that was scored: the set has changed"
                raise common.InputError(f"--data {cfg.data}: {text}")
            score = wanted[number, side]
            found[number, side] = {"caption": row["caption"], "image": row[name], "score": score}
    if file.exists():  # written by an earlier run: the rows above were checked all the same
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with common.atomic(file) as temporary:
        Dataset.from_list([found[row, side] for row, side, _ in best]).to_parquet(temporary)


def keep_experts(cfg, chosen, dist_info):
    """Keep the chosen experts and the scores beside the run, once it is known to go on.
    dpo_baseline.py --sft --data reads the experts too."""
    if chosen is None:
        return
    evaluation.keep_scores(cfg, chosen["scores"], chosen["table"], dist_info)
    if dist_info.is_main:
        with common.atomic(Path(cfg.out) / "experts.parquet") as temporary:
            temporary.write_bytes(chosen["file"].read_bytes())
    common.barrier()


if __name__ == "__main__":
    common.run_script(main)
