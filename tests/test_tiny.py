"""The tiny world as shipped: it loads with the stock classes, its sets are disjoint, its judge is exact."""

import io
import json

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, TINY
from PIL import Image


def pil(images):
    return [Image.fromarray((i.permute(1, 2, 0).numpy() * 255).round().astype("uint8")) for i in images]


def test_size():
    assert (
        sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file() and "__pycache__" not in f.parts) < 20e6
    )


def test_the_stock_pipeline_loads_and_samples_what_is_asked():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "model", low_cpu_mem_usage=False).to(
        torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle on black", "a white square on navy"] * 4
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(prompts, latents=noise, num_inference_steps=20, guidance_scale=2.0).images
    right, wrong = (world.gold_score(images, p) for p in (prompts, prompts[::-1]))
    assert images[0].size == (64, 64) and right.mean() > wrong.mean() + 0.05


def test_captions_differ_for_the_text_encoder():
    """With CLIP's default token ids every caption gets the same embedding."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "model", subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(TINY / "model", subfolder="text_encoder")
    config = encoder.config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    texts = ["a red star on navy", "a red star on black", "", "zebra & Ünïcode"]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == 16 and len(tokenizer("a red star on navy").input_ids) == 7
    assert tokenizer.decode(tokenizer("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"
    out = encoder(ids)
    for states in (out.last_hidden_state, out.pooler_output):
        assert all((states[i] - states[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


def test_the_reward_model_loads_and_reads_the_caption():
    from transformers import AutoTokenizer, CLIPModel

    from common import load_reward

    CLIPModel.from_pretrained(TINY / "reward")
    AutoTokenizer.from_pretrained(TINY / "reward")
    captions = world.split_captions()["test"]
    score = load_reward(str(TINY / "reward"))
    clean = pil(world.draw(captions, np.random.default_rng(0), {})[0])
    assert (score(clean, captions) > score(clean, captions[1:] + captions[:1])).float().mean() > 0.9


def test_load_reward_is_clips_own_arithmetic():
    """exp(logit_scale) * cosine, against CLIPModel's own logits on transformers' own preprocessing."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from common import load_reward

    captions = world.split_captions()["test"][:3]
    images = pil(world.draw(captions, np.random.default_rng(0))[0])
    images = [images[0], images[1].resize((100, 70)), images[2].convert("L").convert("RGB")]
    model = CLIPModel.from_pretrained(TINY / "reward").eval()
    words = AutoTokenizer.from_pretrained(TINY / "reward")(
        captions, padding="max_length", return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil.from_pretrained(TINY / "reward")(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(input_ids=words.input_ids, pixel_values=pixels).logits_per_image.diagonal()
    assert torch.allclose(load_reward(str(TINY / "reward"))(images, captions), logits, atol=2e-3)


def test_the_sets():
    from datasets import load_dataset

    sets = {
        n: load_dataset("parquet", data_files=str(TINY / "pairs" / f"{n}.parquet"), split="train")
        for n in ("train", "test")
    }
    assert len(sets["train"]) >= 1500 and len(sets["test"]) >= 300
    prompts = {n: (TINY / "prompts" / f"{n}.txt").read_text().split("\n")[:-1] for n in ("search", "test")}
    assert len(prompts["test"]) == 128
    groups = [set(s["caption"]) for s in sets.values()] + [set(p) for p in prompts.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 640
    row = sets["train"][0]
    assert isinstance(row["jpg_0"], bytes) and Image.open(io.BytesIO(row["jpg_0"])).size == (64, 64)
    labels = np.array(sets["train"]["label_0"])
    assert set(labels) == {0, 0.5, 1} and 0.02 < (labels == 0.5).mean() < 0.2
    assert 0.45 < labels.mean() < 0.55  # neither side is favoured


def test_facts_are_what_the_test_pairs_say():
    """The README's numbers on the world: a fresh count of the labels, the judge and the reward model."""
    from datasets import load_dataset

    facts = json.loads((TINY / "facts.json").read_text())
    rows = load_dataset("parquet", data_files=str(TINY / "pairs" / "test.parquet"), split="train")
    label = np.array(rows["label_0"])
    gold = [
        world.gold_score([Image.open(io.BytesIO(r[f"jpg_{k}"])) for r in rows], rows["caption"])
        for k in (0, 1)
    ]
    agree = ((gold[0] > gold[1]) == (label == 1))[label != 0.5].mean()
    assert facts["labels agree with the judge"] == pytest.approx(agree, abs=1e-6)
    assert facts["reward model agrees with the labels"] > 0.65
    assert facts["best possible agreement with the labels"] > facts["reward model agrees with the labels"]


def test_the_judge_is_exact():
    """A clean drawing at a place of the bank has no error; a known error has its own size; shapes are told
    apart."""
    for shape in world.SHAPES:
        text = world.caption(shape, "white", "black")
        mask = world.masks(shape, [32 - 4], [32 + 2], [19])
        ground, figure = (
            world.rgb(t, n)[:, None, None]
            for t, n in ((world.BACKGROUNDS, "black"), (world.COLOURS, "white"))
        )
        image = (ground + mask * (figure - ground))[None]
        rmse, radius, off = world.nearest(image, [text])
        assert rmse[0] < 1e-3 and radius[0] == 19 and off[0] == pytest.approx(20**0.5)
        assert world.nearest((image + 0.1) * (mask == 0) + image * (mask > 0), [text])[0][0] == pytest.approx(
            0.1 * (mask == 0).float().mean().sqrt().item(), abs=0.01
        )
        others = [
            world.nearest(image, [world.caption(s, "white", "black")])[0][0]
            for s in world.SHAPES
            if s != shape
        ]
        assert min(others) > 0.03
    with pytest.raises(ValueError):
        world.parse("a red dog on navy")


def test_annotators_prefer_better_images_and_disagree():
    captions = world.split_captions()["validation"]
    good, bad = (pil(world.draw(captions, np.random.default_rng(1), f)[0]) for f in ({}, world.FLAWS))
    seen = [world.features(images, captions) for images in (good, bad)]
    people = world.annotators()
    rng = np.random.default_rng(0)
    answers = np.array([[world.answer(a, b, p, rng) for p in people[:20]] for a, b in zip(*seen)])
    assert answers.mean() > 0.6 and answers.std(1).mean() > 0.1
    assert 0.6 < world.bayes_accuracy(*seen, people) < 0.95


@pytest.mark.parametrize("script", ["smpo.py", "dro.py", "dpo_baseline.py", "common.py", "eval.py"])
def test_no_script_knows_the_world(script):
    """No `if tiny`, and the judge is met by its path only."""
    source = (ROOT / script).read_text()
    assert "import world" not in source and "if tiny" not in source and "preset ==" not in source
