# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Rebuild the tiny world from nothing: `python tests/tiny/make.py` (about an hour on 2 CPU cores).

1. tokenizer, VAE, then UNet + text encoder on flawed drawings      -> model/   a StableDiffusionPipeline
2. two images a caption from that model, labelled by annotators     -> pairs/   Pick-a-Pic v2's columns
3. CLIP on drawings, then PickScore's objective on labels           -> reward/  PickScore's layout
4. prompts in no pair, and a sheet to look at                       -> prompts/, sheet.png, facts.json

Every stage is seeded and keeps its state in OUT/work: run the command again and it goes on where it stopped.
What is shipped in tests/tiny was made by this script (copy the folders, not `work`). A GPU, where there is
one, is not used: the result should not depend on the machine more than it must.
"""

import argparse
import io
import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from datasets import Dataset, load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

GUIDANCE, SAMPLING_STEPS = 2.0, 20
PAIRS_PER_CAPTION = 5  # shipped: 384 x 5 pairs to train on, 64 x 5 to validate and test the reward model on
REWARD_ONLY_PAIRS = 3  # more pairs of the training captions that only the reward model sees; not shipped
VAE_STEPS, UNET_STEPS, CLIP_STEPS, REWARD_STEPS = 1600, 3500, 900, 600


def train(name, work, modules, loss_of, steps, lr, ema=None):
    """AdamW with a warm-up and a cosine, resumable: the state is saved every 250 steps under work/NAME.pt.
    loss_of takes a generator seeded by the step. With ema, the modules end with the averaged weights."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3)
    average = [p.detach().clone() for p in parameters]
    path, start, losses = work / f"{name}.pt", 0, []
    if path.exists():
        state = torch.load(path, weights_only=True)
        start, average = state["step"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(parameters, state["parameters"]):
            parameter.data.copy_(value)
    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps)):
        optimizer.param_groups[0]["lr"] = lr * min(
            1, (step + 1) / 100, 0.02 + 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        loss = loss_of(torch.Generator().manual_seed(1_000_003 * step + 17))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema or 0, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"step": step + 1, "average": average, "parameters": [p.data for p in parameters]}
            torch.save(state | {"optimizer": optimizer.state_dict()}, f"{path}.new")
            os.replace(f"{path}.new", path)
    for parameter, value in zip(parameters, average):
        parameter.data.copy_(value)


def make_tokenizer():
    """A CLIPTokenizer over the whole byte alphabet (any text can be encoded) that knows the world's words."""
    # GPT-2's printable stand-ins for the 256 bytes, in its order
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = {w for texts in world.split_captions().values() for t in texts for w in t.split()}
    merges = []
    for word in sorted(
        words, key=lambda w: (-len(w), w)
    ):  # longest first: no word is cut by another word's merges
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if tuple(parts[:2]) not in merges:
                merges.append(tuple(parts[:2]))
            parts[:2] = ["".join(parts[:2])]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary = {t: i for i, t in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    cut = [w for w in words if len(tokenizer(w).input_ids) != 3]
    assert not cut, f"not one token each: {cut}"
    return tokenizer


def text_config(tokenizer, **more):
    """The ids must be set: CLIP's defaults point at tokens that are not there, and every caption then looks
    alike."""
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **ids, **more}


def ids_of(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def drawings(work, count=16384):
    """The pre-training set: flawed images (count, 3, 64, 64) uint8, the captions asked for and those really
    drawn."""
    everything = sum(world.split_captions().values(), [])
    rng = np.random.default_rng(1)
    asked = [everything[i] for i in rng.integers(len(everything), size=count)]
    images, truths = [], []
    for i in tqdm(range(0, count, 256), "drawing"):
        part, truth = world.draw(asked[i : i + 256], rng)
        images.append((part * 255).round().byte())
        truths += truth
    return torch.cat(images), asked, truths


@torch.no_grad()
def start_near_identity(vae):
    """Initial weights that let a shrunken copy of the image through: resampling and shortcut convolutions
    near the identity, residual branches small, the posterior narrow. Colours are then right after 150 steps
    instead of 2,000."""
    ends = [vae.encoder.conv_in, vae.encoder.conv_out, vae.quant_conv, vae.post_quant_conv]
    through = [*ends, vae.decoder.conv_in, vae.decoder.conv_out]
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight *= 0.1
            through += [module.conv_shortcut] if module.conv_shortcut is not None else []
        elif isinstance(module, (Downsample2D, Upsample2D)):
            through.append(module.conv)
    for conv in through:
        conv.weight.mul_(0.3).add_(torch.nn.init.dirac_(torch.empty_like(conv.weight)))
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -6


def make_model(out, work, images, captions):
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=world.SIZE,
    ).to(memory_format=torch.channels_last)
    start_near_identity(vae)

    def vae_loss(generator):
        x = images[torch.randint(len(images), (16,), generator=generator)].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        back = vae.decode(z).sample
        return F.mse_loss(back, x) + F.l1_loss(back, x) + 1e-5 * posterior.kl().mean() / z[0].numel()

    train("vae", work, [vae], vae_loss, VAE_STEPS, 1e-3, ema=0.998)
    vae.requires_grad_(False)
    with torch.no_grad():
        batches = tqdm(images.split(128), "encoding")
        latents = torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mean for b in batches])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents = latents * vae.config.scaling_factor

    encoder = CLIPTextModel(
        CLIPTextConfig(
            **text_config(
                tokenizer,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokens, empty = ids_of(tokenizer, captions), ids_of(tokenizer, [""])

    def unet_loss(generator):
        rows = torch.randint(len(latents), (64,), generator=generator)
        t = torch.randint(1000, (64,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        dropped = torch.rand(64, 1, generator=generator) < 0.1
        hidden = encoder(torch.where(dropped, empty, tokens[rows])).last_hidden_state
        return F.mse_loss(unet(scheduler.add_noise(latents[rows], noise, t), t, hidden).sample, noise)

    train("unet", work, [unet, encoder], unet_loss, UNET_STEPS, 1e-3, ema=0.998)
    pipeline = StableDiffusionPipeline(
        vae=vae.half().to(memory_format=torch.contiguous_format),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out / "model.new")
    os.replace(out / "model.new", out / "model")


def sample_pairs(out, work, name, captions, per_caption, seed):
    """Pairs of images of one caption from the base model as shipped, labelled once each: the rows of
    Pick-a-Pic v2."""
    path = work / f"{name}.parquet"
    if path.exists():
        return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(work / "hf"))
    pipeline = StableDiffusionPipeline.from_pretrained(out / "model", low_cpu_mem_usage=False).to(
        torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = [c for c in captions for _ in range(per_caption)]
    people, rng, rows = world.annotators(), np.random.default_rng(seed), []
    for i in tqdm(range(0, len(texts), 32), f"{name} pairs"):
        batch = texts[i : i + 32]
        noise = torch.randn(
            2 * len(batch), 4, 8, 8, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)
        )
        images = pipeline(
            batch * 2, latents=noise, guidance_scale=GUIDANCE, num_inference_steps=SAMPLING_STEPS
        ).images  # winners and losers are not known yet: images 0, then images 1
        seen = world.features(images, batch * 2)
        for k, text in enumerate(batch):
            person = int(rng.integers(len(people)))
            label = world.answer(seen[k], seen[k + len(batch)], people[person], rng)
            rows.append(
                {
                    "caption": text,
                    "jpg_0": jpeg(images[k]),
                    "jpg_1": jpeg(images[k + len(batch)]),
                    "label_0": label,
                    "label_1": 1 - label,
                    "has_label": True,
                    "are_different": True,
                    "user_id": person,
                    "ranking_id": len(rows),
                    "model_0": "tiny",
                    "model_1": "tiny",
                }
            )
    Dataset.from_list(rows).to_parquet(f"{path}.new")
    os.replace(f"{path}.new", path)
    return sample_pairs(out, work, name, captions, per_caption, seed)


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def pixels(processor, pils):
    return processor(pils, return_tensors="pt").pixel_values


def make_reward(out, work, images, truths, training, validation, agreement=None):
    """A small CLIP, first taught what the words mean (contrastively, on drawings), then what people prefer;
    with `agreement`, the judge's own verdict instead, right with this probability."""
    tokenizer = make_tokenizer()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    text = text_config(
        tokenizer, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    tokens = ids_of(tokenizer, truths)
    by_caption = {t: [] for t in truths}
    for i, t in enumerate(truths):
        by_caption[t].append(i)
    by_caption = list(by_caption.values())

    def clip_loss(generator):  # 128 different captions, one image each
        draw = [by_caption[i] for i in torch.randperm(len(by_caption), generator=generator)[:128]]
        rows = torch.tensor([d[int(torch.randint(len(d), (), generator=generator))] for d in draw])
        x = (images[rows].float() / 255 - mean) / std
        logits = model(input_ids=tokens[rows], pixel_values=x).logits_per_text
        target = torch.arange(len(rows))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    train("clip", work, [model], clip_loss, CLIP_STEPS, 1e-3)

    def scores(caption, x):  # PickScore: exp(logit_scale) * cosine of the two embeddings
        result = model(input_ids=caption, pixel_values=x)
        return model.logit_scale.exp() * (result.text_embeds * result.image_embeds).sum(-1)

    # Any two images of a caption are a pair, labelled once by one annotator: 5,760 pairs of images would be
    # learnt by heart, the 46,080 that 16 images a caption make are not.
    texts = [t for rows in training for t in list(rows["caption"]) * 2]
    pils = [Image.open(io.BytesIO(i)) for rows in training for k in (0, 1) for i in rows[f"jpg_{k}"]]
    parts = range(0, len(pils), 256)
    seen = np.concatenate([world.features(pils[i : i + 256], texts[i : i + 256]) for i in parts])
    people, given = world.annotators(), {}
    caption, x = ids_of(tokenizer, texts), torch.cat([pixels(processor, pils[i : i + 256]) for i in parts])
    by_caption = {t: [] for t in texts}
    for i, t in enumerate(texts):
        by_caption[t].append(i)
    by_caption = [torch.tensor(rows) for rows in by_caption.values()]

    def label(i, j):
        if (i, j) not in given:
            rng = np.random.default_rng([i, j, 7])
            if agreement is None:
                given[i, j] = world.answer(seen[i], seen[j], people[int(rng.integers(len(people)))], rng)
            else:
                given[i, j] = float((seen[i, 0] > seen[j, 0]) == (rng.random() < agreement))
        return given[i, j]

    def preference_loss(generator):  # arXiv 2305.01569 Eq. 2: cross-entropy of the softmax over both scores
        pairs = []
        for _ in range(128):
            rows = by_caption[int(torch.randint(len(by_caption), (), generator=generator))]
            pairs.append(sorted(rows[torch.randperm(len(rows), generator=generator)[:2]].tolist()))
        first, rows = torch.tensor([label(i, j) for i, j in pairs]), torch.tensor(pairs).T.flatten()
        mirror = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        predicted = scores(caption[rows], torch.where(mirror, x[rows].flip(-1), x[rows])).view(2, -1).T
        target = torch.stack([first, 1 - first], 1).float()
        return -(target * F.log_softmax(predicted, 1)).sum(1).mean()

    # The contrastive stage ends at 21, where a preference would be far too sure of itself: scores should be
    # log-odds of a crowd that disagrees.
    model.logit_scale.data.fill_(math.log(6))
    model.train()
    train("reward", work, [model], preference_loss, REWARD_STEPS, 3e-4, ema=0.99)
    model.eval()
    tokens, answers = ids_of(tokenizer, list(validation["caption"])), torch.tensor(validation["label_0"])
    unseen = [[Image.open(io.BytesIO(i)) for i in validation[f"jpg_{k}"]] for k in (0, 1)]
    with torch.no_grad():
        predicted = torch.stack([scores(tokens, pixels(processor, p)) for p in unseen], 1)
    counted = answers != 0.5
    accuracy = ((predicted[:, 0] > predicted[:, 1]) == (answers == 1))[counted].float().mean().item()
    model.save_pretrained(out / "reward.new")
    tokenizer.save_pretrained(out / "reward.new")
    processor.save_pretrained(out / "reward.new")
    os.replace(out / "reward.new", out / "reward")
    return accuracy, predicted


def make_facts(out, training, validation, accuracy, predicted):
    """What a reader should know of this world, measured on the validation captions' pairs."""
    pils = [[Image.open(io.BytesIO(r[f"jpg_{k}"])).convert("RGB") for r in validation] for k in (0, 1)]
    captions = list(validation["caption"])
    seen, gold = zip(
        *((world.features(p, captions), torch.from_numpy(world.gold_score(p, captions))) for p in pils)
    )
    label = torch.tensor(validation["label_0"])
    counted = label != 0.5
    agree = ((gold[0] > gold[1]) == (label == 1))[counted].float().mean().item()
    oracle = ((predicted[:, 0] > predicted[:, 1]) == (gold[0] > gold[1]))[counted].float().mean().item()
    return {
        "train pairs": len(training),
        "test pairs": len(validation),
        "ties": 1 - counted.float().mean().item(),
        "gold score of the base model": torch.cat(gold).mean().item(),
        "gold score's standard deviation": torch.cat(gold).std().item(),
        "mean gold difference within a pair": (gold[0] - gold[1]).abs().mean().item(),
        "labels agree with the judge": agree,
        "reward model agrees with the labels": accuracy,
        "best possible agreement with the labels": world.bayes_accuracy(*seen, world.annotators()),
        "reward model agrees with the judge": oracle,
    }


def make_sheet(out, images, training):
    """Rows: drawings as pre-trained on, then pairs (left image, right image; a frame around the preferred
    one; the caption below)."""
    sheet = Image.new("RGB", (16 * 68, 2 * 68 + 4 * 84), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for k in range(32):
        sheet.paste(Image.fromarray(images[k].permute(1, 2, 0).numpy()), (k % 16 * 68 + 2, k // 16 * 68 + 2))
    for k, row in enumerate(training.shuffle(seed=0).select(range(32))):
        y = 2 * 68 + k // 8 * 84
        for side in (0, 1):
            x = (2 * k + side) % 16 * 68
            if row[f"label_{side}"] == 1:
                sheet.paste("red", (x, y, x + 68, y + 68))
            sheet.paste(Image.open(io.BytesIO(row[f"jpg_{side}"])), (x + 2, y + 2))
        draw.text((2 * k % 16 * 68 + 4, y + 69), row["caption"], "black", font)
    sheet.save(out / "sheet.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_world"))
    out = parser.parse_args().out
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)  # initial weights; everything else has its own generator
    images, asked, truths = drawings(work)
    if not (out / "model").exists():
        make_model(out, work, images, asked)
    captions = world.split_captions()
    training = sample_pairs(out, work, "train", captions["pairs"], PAIRS_PER_CAPTION, 2)
    validation = sample_pairs(out, work, "test", captions["validation"], PAIRS_PER_CAPTION, 3)
    more = sample_pairs(out, work, "reward_only", captions["pairs"], REWARD_ONLY_PAIRS, 4)
    torch.manual_seed(1)
    accuracy, predicted = make_reward(out, work, images, truths, [training, more], validation)
    for folder in ("pairs", "prompts"):
        (out / folder).mkdir(exist_ok=True)
    for name in ("train", "test"):
        shutil.copy(work / f"{name}.parquet", out / "pairs" / f"{name}.parquet")
    for name in ("search", "test"):
        (out / "prompts" / f"{name}.txt").write_text("\n".join(captions[name]) + "\n")
    make_sheet(out, images, training)
    facts = make_facts(out, training, validation, accuracy, predicted)
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
