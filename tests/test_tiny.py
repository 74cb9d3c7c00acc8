# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The tiny world as shipped: it loads with the stock classes, its sets are disjoint, its judge is
exact."""

import io
import json

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, TINY
from PIL import Image

import eval as evaluation


def pil(images):
    """(N, 3, h, w) in [0, 1] -> N PIL images."""
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    return [Image.fromarray(image) for image in pixels]


def draw(captions, seed, flaws):
    """Drawings of the captions, as PIL images; flaws: {} for clean ones, or world.FLAWS."""
    images, _ = world.draw(captions, np.random.default_rng(seed), flaws)
    return pil(images)


def load_set(name):
    from datasets import load_dataset

    file = str(TINY / "pairs" / f"{name}.parquet")
    return load_dataset("parquet", data_files=file, split="train")


def test_size():
    files = [file for file in TINY.rglob("*") if "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 20e6


def test_the_stock_pipeline_loads_and_samples_what_is_asked():
    """The judge's score is 0 at best and about -0.1 for the initial model; images of other prompts
    are worse by more than half of that."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(TINY / "model", low_cpu_mem_usage=False)
    pipe = pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle on black", "a white square on navy"] * 4
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(prompts, latents=latents, num_inference_steps=20, guidance_scale=2.0).images
    right = world.gold_score(images, prompts)
    wrong = world.gold_score(images, prompts[::-1])
    assert images[0].size == (64, 64)
    assert right.mean() > wrong.mean() + 0.05


def test_captions_differ_for_the_text_encoder():
    """With CLIP's default token ids every caption would get the same embedding."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "model", subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(TINY / "model", subfolder="text_encoder")
    assert encoder.config.bos_token_id == tokenizer.bos_token_id
    assert encoder.config.eos_token_id == tokenizer.eos_token_id
    texts = ["a red star on navy", "a red star on black", "", "zebra & Ünïcode"]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == 16
    assert len(tokenizer("a red star on navy").input_ids) == 7  # a token a word, begin and end
    zebra = tokenizer.decode(tokenizer("zebra").input_ids, skip_special_tokens=True)
    assert zebra.strip() == "zebra"
    with torch.no_grad():
        out = encoder(ids)
    for states in (out.last_hidden_state, out.pooler_output):
        for i in range(len(texts)):
            for j in range(i):
                assert (states[i] - states[j]).abs().max() > 0.1


def test_the_reward_model_loads_and_reads_the_caption():
    """Of clean drawings, more than 9 in 10 score higher with their own caption than with
    another."""
    captions = world.split_captions()["test"]
    score = evaluation.load_reward(str(TINY / "reward"))
    images = draw(captions, 0, {})
    own = score(images, captions)
    other = score(images, captions[1:] + captions[:1])
    assert (own > other).float().mean() > 0.9


def test_load_reward_is_clips_own_arithmetic():
    """exp(logit_scale) * cosine: CLIPModel's own logits on transformers' own preprocessing.

    Tolerance: scores are near 10 and fp32 rounds each of some 10 layers by 2^-24, which is 1e-5.
    The preprocessing may round a pixel to the next of 256 values, which moves a score by about
    1e-3."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    captions = world.split_captions()["test"][:3]
    first, second, third = draw(captions, 0, world.FLAWS)
    images = [first, second.resize((100, 70)), third.convert("L").convert("RGB")]
    model = CLIPModel.from_pretrained(TINY / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "reward")
    words = tokenizer(captions, padding="max_length", return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(TINY / "reward")
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(input_ids=words.input_ids, pixel_values=pixels).logits_per_image.diagonal()
    scores = evaluation.load_reward(str(TINY / "reward"))(images, captions)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, logits, atol=2e-3)


def test_the_sets():
    """They share no caption; images are 64 x 64; there are ties, and neither side is favoured."""
    train = load_set("train")
    test = load_set("test")
    assert len(train) >= 1500
    assert len(test) >= 300
    search_prompts = (TINY / "prompts" / "search.txt").read_text().split("\n")[:-1]
    test_prompts = (TINY / "prompts" / "test.txt").read_text().split("\n")[:-1]
    assert len(test_prompts) == 128
    groups = [set(train["caption"]), set(test["caption"]), set(search_prompts), set(test_prompts)]
    assert sum(len(group) for group in groups) == len(set().union(*groups)) == 640

    row = train[0]
    assert isinstance(row["jpg_0"], bytes)
    assert Image.open(io.BytesIO(row["jpg_0"])).size == (64, 64)
    labels = np.array(train["label_0"])
    assert set(labels) == {0, 0.5, 1}
    assert 0.02 < (labels == 0.5).mean() < 0.2
    # 1,500 labels: their mean has a standard deviation of at most 0.5 / sqrt(1500) = 0.013
    assert abs(labels.mean() - 0.5) < 4 * 0.013


def test_facts_are_what_the_test_pairs_say():
    """The README's numbers on the world: a fresh count of the labels, the judge and the reward."""
    facts = json.loads((TINY / "facts.json").read_text())
    rows = load_set("test")
    labels = np.array(rows["label_0"])
    gold = []
    for name in ("jpg_0", "jpg_1"):
        images = [Image.open(io.BytesIO(row[name])) for row in rows]
        gold.append(world.gold_score(images, rows["caption"]))
    judge_prefers_0 = np.array(gold[0] > gold[1])
    agree = (judge_prefers_0 == (labels == 1))[labels != 0.5].mean()
    assert facts["labels agree with the judge"] == pytest.approx(agree, abs=1e-6)
    by_reward = facts["reward model agrees with the labels"]
    assert 0.65 < by_reward < facts["best possible agreement with the labels"]


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_judge_is_exact(shape):
    """A clean drawing at a place of the judge's bank has no error, a known error has its own size,
    and shapes are told apart."""
    caption = world.caption(shape, "white", "black")
    mask = world.masks(shape, [32 - 4], [32 + 2], [19])
    ground = world.rgb(world.BACKGROUNDS, "black")[:, None, None]
    figure = world.rgb(world.COLOURS, "white")[:, None, None]
    image = (ground + mask * (figure - ground))[None]
    rmse, radius, off_centre = world.nearest(image, [caption])
    assert rmse[0] < 1e-3
    assert radius[0] == 19
    assert off_centre[0] == pytest.approx(20**0.5)  # 4 to the left, 2 down

    # 0.1 more wherever there is no figure; the judge works on fewer pixels, so edges may cost 0.01
    brighter = (image + 0.1) * (mask == 0) + image * (mask > 0)
    known = 0.1 * (mask == 0).float().mean().sqrt().item()
    assert world.nearest(brighter, [caption])[0][0] == pytest.approx(known, abs=0.01)

    for other in set(world.SHAPES) - {shape}:
        rmse, _, _ = world.nearest(image, [world.caption(other, "white", "black")])
        assert rmse[0] > 0.03


def test_the_judge_refuses_what_it_cannot_read():
    with pytest.raises(ValueError):
        world.parse("a red dog on navy")


def test_annotators_prefer_better_images_and_disagree():
    captions = world.split_captions()["validation"]
    good = world.features(draw(captions, 1, {}), captions)
    bad = world.features(draw(captions, 1, world.FLAWS), captions)
    people = world.annotators()
    random = np.random.default_rng(0)
    answers = []
    for good_image, bad_image in zip(good, bad):
        answers.append([world.answer(good_image, bad_image, who, random) for who in people[:20]])
    answers = np.array(answers)
    assert answers.mean() > 0.6
    assert answers.std(1).mean() > 0.1
    assert 0.6 < world.bayes_accuracy(good, bad, people) < 0.95


@pytest.mark.parametrize("script", ["smpo.py", "dro.py", "dpo_baseline.py", "common.py", "eval.py"])
def test_no_script_knows_the_world(script):
    """None does anything else in the tiny world, and the judge is met by its path alone."""
    source = (ROOT / script).read_text()
    assert "import world" not in source
    assert "if tiny" not in source
    assert "preset ==" not in source
