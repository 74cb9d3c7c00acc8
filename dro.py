"""Diffusion-DRO (NeurIPS 2025, arXiv 2510.18353): rank expert images above the policy's own samples.

1. No reward model and no sigmoid: an expert's denoising error should fall below that of an image the policy
   paints for the same caption, each relative to a frozen reference, by a margin; a hinge says how far.
2. The policy's samples are drawn while it trains, each only as far as the timestep that is needed.

    paper            here      shape
    x_0^e            x0        (B, 4, h, w)   latents of the experts
    epsilon~         noise     (B, 4, h, w)   drawn, for the experts
    x_t, epsilon     xp, ep    (B, 4, h, w)   the policy's sample at t, and its own prediction there
    eps_phi          err       (2B,)          error of the trained UNet: experts, then policy samples
    eps_ref          ref_err   (2B,)          the same of the frozen start UNet
    m                margin    float          in units of the error, a mean over C, h, w
    M                refresh_every  int       updates between two copies of the trained UNet to the policy

What changes against dpo_baseline.py:
    1. dro_loss: a hinge on the gap between two log-ratios; nothing is relative to a human's choice
    2. rollout: the losers are the policy's own, sampled online by DPM-Solver++(2M) up to the timestep t
    3. ReplayBuffer and --refresh_every: how old those samples may be
    4. before training, the K best images of a pair set are chosen, unless --data is a set of images

With M = 1 and no buffer **the policy's term has no gradient**: the trained UNet is the policy, so its error
against its own prediction is 0, at a minimum. What remains is fine-tuning on the experts, each switched off
once the hinge is satisfied. The loss is then not what trains the model against its own samples; the log's
policy_share (of the gradient at the UNet's output) tells: 0 at M = 1, above 0 where samples are old.

    torchrun dro.py                                                       # the tiny world, CPU, minutes
    torchrun dro.py --preset sd15 --model M --data D                      # one GPU
    torchrun --nproc_per_node=8 dro.py --preset sdxl --model M --data D   # no published result: ours to find
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import flag


def denoising_error(eps_pred, eps):  # same as dpo_baseline.py
    """Mean squared error of each image, (N, C, h, w) -> (N,), in fp32: differences of 1e-4 matter."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


def dro_loss(err, ref_err, margin):
    """Diffusion-DRO, arXiv 2510.18353 Eq. 15, as relu(gap + m): the paper's max(-m, gap) + m. err, ref_err
    (2B,): denoising errors of the trained and the frozen UNet, experts first, then policy samples. Returns
    losses (B,) and the detached gap (B,), below -margin where there is nothing left to learn."""
    log_ratio = ref_err - err  # grows as the trained UNet denoises an image better than the reference does
    expert, policy = log_ratio.chunk(2)
    gap = policy - expert
    losses = F.relu(gap + margin)  # margin > 0: at the start every gap is 0, and a hinge at 0 never moves
    return losses, gap.detach()


def rollout(eps_fn, xT, timesteps, stop, alpha_bar):
    """Sample with DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), each image on its own levels and only as
    far as it is wanted: on average (S + 1) / 2 network calls an image where all S would take S.

    xT (B, C, h, w): pure noise. timesteps (S, B) long, descending; stop (B,) long in [0, S): the step whose
    (x_t, eps(x_t)) is wanted; both are best kept on the CPU: no sync. eps_fn(x (n, C, h, w), t (n,),
    rows (n,)) -> eps; rows tells which samples these are. Returns (xt, eps, t) at each sample's own stop.
    """
    timesteps, stop = timesteps.cpu(), stop.cpu()
    ab = alpha_bar.cpu().double()[timesteps]
    alpha, sigma = ab.sqrt(), (1 - ab).sqrt()
    lam = (alpha / sigma).log()  # (S, B): half the log signal-to-noise ratio, the solver's time

    def to_image(a):
        return a.to(xT.device, torch.float32).view(-1, 1, 1, 1)

    x, eps, before = xT.clone(), torch.empty_like(xT), torch.empty_like(xT)
    for k in range(int(stop.max()) + 1):
        rows = (stop >= k).nonzero()[:, 0]
        here = rows.to(xT.device)
        eps[here] = e = eps_fn(x[here], timesteps[k, rows].to(xT.device), here)
        on = (stop[rows] > k).nonzero()[:, 0]  # the others have arrived
        if not len(on):
            break
        rows, e = rows[on], e[on.to(xT.device)]
        here = rows.to(xT.device)
        clean = (x[here] - to_image(sigma[k, rows]) * e) / to_image(alpha[k, rows])  # the predicted x0
        direction, h = clean, lam[k + 1, rows] - lam[k, rows]
        if k:  # second order: extrapolate from the prediction of the step before
            h_before = lam[k, rows] - lam[k - 1, rows]
            direction = clean + to_image(h / (2 * h_before)) * (clean - before[here])
        carried, added = sigma[k + 1, rows] / sigma[k, rows], -alpha[k + 1, rows] * torch.expm1(-h)
        x[here], before[here] = to_image(carried) * x[here] + to_image(added) * direction, clean
    return x, eps, timesteps.gather(0, stop[None])[0]


class ReplayBuffer:
    """The last `size` items, first in first out. An item fixes t and caption, so it carries its expert."""

    def __init__(self, size):
        self.size, self.items = size, {}

    def __len__(self):
        return len(next(iter(self.items.values()), ()))

    def push(self, items):
        """items: a dict of (B, ...) tensors, always with the same names."""
        old = self.items or {k: v[:0] for k, v in items.items()}
        self.items = {k: torch.cat([old[k].to(v.device), v])[-self.size :] for k, v in items.items()}

    def sample(self, n, generator):
        """A dict of (n, ...) tensors; no item comes twice while there are n."""
        if len(self) >= n:
            order = torch.randperm(len(self), generator=generator)[:n]
        else:
            order = torch.randint(len(self), (n,), generator=generator)
        return {k: v[order.to(v.device)] for k, v in self.items.items()}

    def state_dict(self):
        return self.items

    def load_state_dict(self, items):
        self.items = items


def top_experts(scores, k):
    """The k highest scoring of a pair set's unique (image, caption) items -> their (row, side, score), best
    first; of equal scores the earlier row. scores: what common.load_scores returns. Labels have no say."""
    value, key = (torch.stack([scores[f"{n}_0"], scores[f"{n}_1"]], 1).flatten() for n in ("score", "key"))
    chosen, seen = [], set()
    for i in value.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).tolist():
        if len(chosen) == k or not value[i].isfinite():
            break
        if (item := int(key[i])) not in seen:
            seen.add(item)
            chosen.append((i // 2, i % 2, value[i].item()))
    return chosen


@dataclass
class Config(common.RewardConfig):
    margin: float = flag(0.001, "how far an expert's log-ratio should exceed the policy sample's", ">0")
    rollout_steps: int = flag(20, "DPM-Solver++ steps of a whole trajectory; half are taken on average", ">0")
    refresh_every: int = flag(1, "M: updates between copies of the UNet to the policy; >1: lower --lr", ">0")
    buffer: int = flag(0, "policy samples to keep and draw from, over all GPUs; 0 uses each once", ">=0")
    experts: int = flag(500, "best images of a pair set to learn from; a set of images is taken whole", ">0")


# sd15: the paper's 1,600 updates of 256, constant lr, margin 0.001, caption dropout 0.2, EMA, 500 experts;
# for SDXL it has a code path and no result. Its lr is 1e-4, on pure bf16 weights, where most updates are too
# small to change a weight; on fp32 weights that is a far stronger recipe. 1e-5 is ours and has not been run.
# Its EMA decay of 0.9999 is nominal: in 1,600 updates (1 + n) / (10 + n) never lets it beyond 0.995.
PRESETS = {
    "tiny": common.tiny("dro") | {
        "steps": 60, "batch": 32, "micro_batch": 32, "lr": 1e-4, "warmup": 10, "margin": 0.003,
        "ema": 0.9999, "caption_dropout": 0.1, "experts": 64, "reward": str(common.TINY / "reward"),
    },
    "sd15": {
        "steps": 1600, "batch": 256, "micro_batch": 4, "lr": 1e-5, "margin": 0.001, "ema": 0.9999,
        "caption_dropout": 0.2, "resolution": 512, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/dro-sd15", "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    },
    "sdxl": {
        "steps": 1600, "batch": 256, "micro_batch": 1, "lr": 1e-5, "margin": 0.001, "ema": 0.9999,
        "caption_dropout": 0.2, "resolution": 1024, "precision": "bf16", "checkpointing": True,
        "workers": 8, "out": "runs/dro-sdxl", "reward_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    },
}  # fmt: skip


def choose_experts(cfg, place, scores, file):
    """The best images of a pair set -> a parquet file (caption, image, score) that training reads, and
    dpo_baseline.py --sft --data too."""
    from datasets import Dataset

    best = {(row, side): value for row, side, value in top_experts(scores, cfg.experts)}
    if not best:
        raise common.InputError(f"--data {cfg.data}: no image of it has a score")
    if place.main:
        found, last = {}, max(row for row, _ in best)
        for i, row in enumerate(common.open_rows(cfg.data, ("caption", *common.PAIR), streaming=True)):
            for side, name in enumerate(common.PAIR):
                if (i, side) in best:
                    if common.item_key(row, name) != scores[f"key_{side}"][i]:
                        continue
                    image, value = common.raw_bytes(row[name]), best[i, side]
                    found[i, side] = {"caption": row["caption"], "image": image, "score": value}
            if i == last:
                break
        if len(found) < len(best):
            raise common.InputError(f"--scores {cfg.scores} was made from other rows than --data")
        Dataset.from_list([found[item] for item in best]).to_parquet(f"{file}.new")
        Path(f"{file}.new").replace(file)
        low, high = min(best.values()), max(best.values())
        print(f"{len(best)} experts, scored {low:.4g} to {high:.4g}: {file}", flush=True)
    common.barrier()


def main(argv=None):
    cfg = common.parse(Config, PRESETS, argv)
    place = common.setup()
    common.check(cfg, place)
    models = common.Models(cfg, place.device)
    ref = common.reference_unet(models, cfg)
    M, S, T = cfg.refresh_every, cfg.rollout_steps, len(models.alpha_bar)
    if T % S:
        raise common.InputError(f"--rollout_steps {S} does not divide the model's {T} timesteps")
    if models.alpha_bar[-1] == 0:
        raise common.InputError(f"--model {cfg.model}: no signal at its last timestep; rollouts need some")
    if 0 < cfg.buffer < cfg.batch:
        raise common.InputError(f"--buffer {cfg.buffer} holds less than a step's --batch {cfg.batch}")

    # The experts: a set of images as it is, or the best of a set of pairs.
    if common.layout(cfg.data, common.PAIR, common.SINGLE) == common.PAIR:
        find_scores = common.open_scores(cfg, models, place)
        common.claim(cfg, place)
        experts = Path(cfg.out) / "experts.parquet"
        if not common.agree(experts.exists()):
            choose_experts(cfg, place, find_scores(), experts)
        del find_scores  # and with it the reward model
        source = common.open_source(replace(cfg, data=str(experts)), models, place, common.SINGLE)
    else:
        source = common.open_source(cfg, models, place, common.SINGLE)
        common.claim(cfg, place, source.good)
    samples = common.Samples(source, source.good, cfg, models)

    # One buffer for each micro-batch of a step: then it does not matter which GPU does which. The policy is
    # the trained UNet itself, or a copy of it that is refreshed every M updates.
    mine = range(place.rank, cfg.batch // cfg.micro_batch, place.world)
    buffers = {i: ReplayBuffer(cfg.buffer * cfg.micro_batch // cfg.batch) for i in mine if cfg.buffer}
    keep = {f"buffer-{i}": buffer for i, buffer in buffers.items()}
    if M > 1:
        keep["policy"] = common.reference_unet(models, cfg)  # a frozen copy
    run = common.Run(cfg, place, models, samples, keep)
    policy = keep["policy"] if M > 1 else run.bare
    for micro_batches in run.steps():
        if M > 1 and run.step % M == 0:
            common.copy_weights(models.unet, policy)
        for i, batch in zip(mine, micro_batches):
            x0, cond = models.encode(batch)  # (B, 4, h, w)

            def eps_fn(x, t, rows):  # the policy; no guidance; the expert's own caption
                return models.predict_eps(policy, x, t, common.take(cond, rows))

            # A trajectory has S levels, T / S apart; its offset is such that it meets t, at step `stop`.
            t, apart = batch["t"], T // S
            levels, stop = torch.arange(S - 1, -1, -1)[:, None] * apart + t % apart, S - 1 - t // apart
            starts = (common.generator(cfg.seed, "rollout", k) for k in batch["index"].tolist())
            xT = torch.stack([torch.randn(samples.latent, generator=start) for start in starts])
            with torch.no_grad():
                xp, ep, t = rollout(eps_fn, xT.to(place.device), levels, stop, models.alpha_bar)
            if cfg.buffer:
                buffers[i].push({"x0": x0, "xp": xp, "ep": ep, "t": t, **cond})
                item = buffers[i].sample(len(x0), common.generator(cfg.seed, "replay", run.step, i))
                x0, xp, ep, t = (item.pop(k) for k in ("x0", "xp", "ep", "t"))
                cond = item  # what is left

            # Experts with drawn noise, then the policy's samples, at the same t and with the same captions.
            noise = batch["noise"].to(place.device)
            clean = torch.cat([x0, common.predicted_x0(xp, ep, t, models.alpha_bar)])
            xt = torch.cat([common.add_noise(x0, noise, t, models.alpha_bar), xp])
            t, cond = t.repeat(2), {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in cond.items()}
            target = models.target(clean, torch.cat([noise, ep]), t)
            with torch.no_grad():
                ref_err = denoising_error(models.predict(ref, xt, t, cond), target)

            err = denoising_error(models.predict(run.unet, xt, t, cond), target)
            losses, gap = dro_loss(err, ref_err, cfg.margin)
            # d loss / d prediction of an image has a norm in proportion to sqrt(err) where the hinge is on
            pull = err.detach().sqrt() * (losses > 0).repeat(2)
            expert, sample = err.chunk(2)
            run.backward(losses.mean(), {
                "active": (losses > 0).float().mean(), "gap": gap.mean(),
                "err_expert": expert.mean(), "err_policy": sample.mean(),
                "policy_share": pull[len(x0) :].sum() / pull.sum().clamp_min(1e-12),
            })  # fmt: skip
        run.update()
    run.finish()


if __name__ == "__main__":
    common.launch(main)
