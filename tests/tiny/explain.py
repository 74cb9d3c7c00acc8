# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What evidence.py measures of the models themselves: how far a trained UNet has moved, and three
things at the initial model that explain why a claim of a method holds or fails."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world

import common
import eval as evaluation
import smpo

PAIRS = Path(__file__).parent / "pairs"
METHODS = {  # title: (inversion, its steps, whose preference)
    "smoothing alone": ("none", 0, "smooth"),
    "DPO": ("none", 0, "people"),
    "DPO, reward's labels": ("none", 0, "reward"),
    "SmPO, release, n = 5": ("release", 5, "smooth"),
    "SmPO, above, n = 2": ("above", 2, "smooth"),
    "SmPO, paper, n = 9": ("paper", 9, "smooth"),
}
NOISE_TIMESTEPS = (2, 50, 200, 400, 600, 800, 950)


def load_pairs(file, count):
    """The tiny world's models, and a file's first `count` pairs.

    Returns (models, rows, x0, cond): rows a list of dicts; x0 (2, P, 4, h, w), images 0, then
    images 1; cond a dict of (P, ...) tensors.
    """
    models = common.Models(common.parse(smpo.Config, smpo.PRESETS, []), torch.device("cpu"))
    columns = ("caption", "label_0", *common.PAIR_COLUMNS)
    rows = [row for _, row in common.open_rows(str(file)).rows(columns, np.arange(count))]
    x0 = []
    for column in common.PAIR_COLUMNS:
        images = [common.decode_image(row[column]) for row in rows]
        pixels = [common.resize_and_crop(image, world.SIZE)[0] for image in images]
        x0.append(models.encode_images(torch.stack(pixels)))
    cond = models.encode_prompts([row["caption"] for row in rows])
    return models, rows, torch.stack(x0), cond


@torch.no_grad()
def deviation_of(unet, count=128):
    """How far a UNet or a LoRA (its folder) has moved from the initial model: the mean squared
    difference of their predictions on held-out images, noised to timesteps spread over [0, T)."""
    models, _, x0, cond = load_pairs(PAIRS / "test.parquet", count)
    t = ((torch.arange(count) + 0.5) * len(models.alpha_bar) / count).long()
    noise = torch.randn(x0[0].shape, generator=common.generator(0, "deviation"))
    xt = common.add_noise(x0[0], noise, t, models.alpha_bar)
    before = models.predict(models.unet, xt, t, cond)
    after = models.predict(evaluation.load_comparison_unet(models.pipe, unet), xt, t, cond)
    return float(f"{(after - before).square().mean():.4g}")


def explain(scores_file, count=768):
    """Three measurements at the initial model, on the first `count` training pairs.

    weights: five equal groups of pairs by the size of their reward gap; for each the mean weight
        10 |2p - 1| of a pair in SmPO's loss, and how often the sign of the gap agrees with people
        and with the ground truth.
    noise: {method: mean square of the noise that its inversion finds, at NOISE_TIMESTEPS}. Sampled
        noise has 1.
    gradients: {method: [agreement, cosine]}, see `compare_gradients`.
    """
    models, rows, x0, cond = load_pairs(PAIRS / "train.parquet", count)
    scores = evaluation.load_scores(str(scores_file))
    all_scores = torch.cat([scores["score_0"], scores["score_1"]])
    p = smpo.preference_probability(
        scores["score_0"][:count], scores["score_1"][:count], all_scores.min(), all_scores.max()
    )
    label = torch.tensor([row["label_0"] for row in rows])
    preferences = {  # (probability that image 0 is preferred, gamma)
        "smooth": (p, 10),
        "people": (label, 1),
        "reward": ((p > 0.5).float(), 1),
    }
    noise = {}
    gradients = {}
    for title, (inversion, steps, whose) in METHODS.items():
        if inversion != "none":
            noise[title] = noise_by_t(models, x0[0, :64], cond, inversion, steps)
        decided = torch.arange(count)[label != 0.5]
        preference = preferences[whose]
        gradients[title] = unit_gradients(models, x0, cond, decided, *preference, inversion, steps)
    reference = gradients["smoothing alone"]
    return {
        "weights": weights_by_gap(rows, p, label),
        "noise": noise,
        "gradients": {title: compare_gradients(g, reference) for title, g in gradients.items()},
    }


def weights_by_gap(rows, p, label):
    captions = [row["caption"] for row in rows]
    truth = []
    for column in common.PAIR_COLUMNS:
        images = [common.decode_image(row[column]) for row in rows]
        truth.append(torch.from_numpy(world.gold_score(images, captions)))
    prefers_0 = p > 0.5
    weight = 10 * (2 * p - 1).abs()
    found = []
    for group in weight.argsort().chunk(5):
        decided = group[label[group] != 0.5]
        people = (prefers_0 == (label == 1))[decided]
        right = (prefers_0 == (truth[0] > truth[1]))[group]
        means = [weight[group].mean(), people.float().mean(), right.float().mean()]
        found.append([round(mean.item(), 4) for mean in means])
    return found


def noise_by_t(models, x0, cond, inversion, steps):
    found = []
    for t in NOISE_TIMESTEPS:
        _, eps = invert(models, x0, cond, torch.full((len(x0),), t), inversion, steps)
        found.append(round(eps.square().mean().item(), 4))
    return found


@torch.no_grad()
def invert(models, x0, cond, t, inversion, steps):
    """common.renoise_invert with the initial model; x0 (N, 4, h, w), t (N,)."""

    def eps_fn(x, unet_t, idx):
        return models.predict_eps(models.unet, x, unet_t, common.index_condition(cond, idx))

    return common.renoise_invert(eps_fn, x0, t, models.alpha_bar, steps, inversion)


def unit_gradients(models, x0, cond, rows, p, gamma, inversion, steps, batch=32):
    """Gradients (batches, parameters) of the loss while the trained UNet is still the reference.

    rows (n,): the pairs to use, in whole batches. The loss is SmPO's, which is DPO's at gamma 1 and
    p 0 or 1. All methods meet the same timesteps and noise. Each gradient is scaled to length 1, as
    clipping does to nearly all of them here.
    """
    found = []
    for number in range(len(rows) // batch):
        idx = rows[number * batch : (number + 1) * batch]
        random = common.generator(number, "explain")
        t = torch.randint(len(models.alpha_bar), (batch,), generator=random).repeat(2)
        eps = torch.randn(x0[0, idx].shape, generator=random).repeat(2, 1, 1, 1)
        images = x0[:, idx].flatten(0, 1)
        captions = common.index_condition(cond, idx.repeat(2))
        xt = common.add_noise(images, eps, t, models.alpha_bar)
        if inversion != "none":
            xt, eps = invert(models, images, captions, t, inversion, steps)
        err = smpo.denoising_error(models.predict(models.unet, xt, t, captions), eps)
        losses, _ = smpo.smpo_loss(err, err.detach(), p[idx], 1, gamma)
        gradient = torch.autograd.grad(losses.mean(), list(models.unet.parameters()))
        found.append(F.normalize(torch.cat([part.flatten() for part in gradient]), dim=0))
    return torch.stack(found)


def compare_gradients(gradients, reference):
    """[agreement, cosine] of (batches, parameters) unit gradients.

    agreement: the mean inner product of two batches' gradients: 1 where all are equal, 0 where they
    are noise. cosine: of the mean gradient and the reference's, corrected for the noise of the
    batches: 1 where the two methods go the same way on average. Its own error is about 0.1.
    """

    def inner_product(a, b):  # of different batches only, whose noise is independent
        same = (a * b).sum()
        return float((a.sum(0) @ b.sum(0) - same) / (len(a) * (len(a) - 1)))

    agreement = inner_product(gradients, gradients)
    # Without any agreement there is no mean gradient, and its cosine means nothing.
    lengths = max(agreement * inner_product(reference, reference), 1e-9)
    cosine = inner_product(gradients, reference) / math.sqrt(lengths)
    return [round(agreement, 4), round(cosine, 4)]
