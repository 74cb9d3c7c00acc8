"""eval.py: scorers against the original architectures' outputs and published preprocessing, generation
against the stock pipeline, statistics against brute force, and the command line as a user runs it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from PIL import Image
from safetensors import safe_open

import common
import eval as evaluation
from eval import load_scorer, win_rate

PROMPTS = ["a red star on navy", "a blue ring on grey", "a green heart on black", "a white cross on teal"]


def golden(name):
    """A golden file -> {"weights": {...}, "in": {...}, "out": {...}}."""
    found = {"weights": {}, "in": {}, "out": {}}
    with safe_open(ROOT / "tests" / "golden" / f"{name}_small.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            found[kind][rest] = file.get_tensor(key)
    return found


def picture(seed, size=(64, 64), mode="RGB"):
    """A smooth random image: upscaled noise, as natural images have little energy at high frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def run(*words, processes=0):
    """eval.py as a user runs it; processes > 0: by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *torchrun, str(ROOT / "eval.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def main(monkeypatch):
    """main(words...) runs eval.py's command line in this process, which then asks nothing of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return lambda *words: evaluation.main([str(word) for word in words])


@pytest.fixture
def judge(tmp_path):
    """A judge file: `bright` is an image's mean, `red` that of its red; `wrong` and `nan` are no good."""
    path = tmp_path / "judge.py"
    path.write_text(
        "import numpy as np\n"
        "def bright(images, prompts): return [np.asarray(i).mean() / 255 for i in images]\n"
        "def red(images, prompts): return [np.asarray(i)[..., 0].mean() / 255 for i in images]\n"
        "def wrong(images, prompts): return [0.0]\n"
        "def nan(images, prompts): return [float('nan')] * len(images)\n"
        "def boom(images, prompts): return 1 / 0\n"
        "def words(images, prompts): return prompts\n"
    )
    return path


def folder_of(path, values):
    """An image folder, one 32 px image of each (red, green, blue)."""
    path.mkdir()
    for i, colour in enumerate(values):
        Image.new("RGB", (32, 32), colour).save(path / f"{i}.png")
    return path


# ------------------------------------------------------------------------------------------- win rates
def test_win_rate_counts():
    a, b = [1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 3, 5, 4, 5, 8, 7]  # wins at 0, 4, 5, 7; ties at 1, 2
    result = win_rate(a, b)
    assert (result["win"], result["win_strict"], result["tie"]) == (5 / 8, 4 / 8, 2 / 8)
    mirror = win_rate(b, a)
    assert mirror["win"] == 3 / 8 and mirror["win_strict"] == 2 / 8
    assert win_rate(a, b) == result  # a report does not change when it is made again
    assert list(win_rate(a, a).values()) == [0.5, 0, 1, 0.5, 0.5]


def test_win_rate_interval_is_the_bootstrap_over_prompts():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, (128, 2)), rng.integers(0, 3, (128, 2))  # many ties
    points = ((a > b) + (a == b) / 2).mean(1)
    resamples = [points[rng.integers(128, size=128)].mean() for _ in range(20_000)]
    result = win_rate(a, b)
    assert np.allclose([result["low"], result["high"]], np.quantile(resamples, [0.025, 0.975]), atol=0.006)
    copies = win_rate(np.repeat(a[:, :1], 5, 1), np.repeat(b[:, :1], 5, 1))  # copies are no further evidence
    assert copies == win_rate(a[:, 0], b[:, 0])


@pytest.mark.parametrize("a, b", [([1, 2], [1]), ([], []), ([1, float("nan")], [1, 2]), ([[[1]]], [[[1]]])])
def test_win_rate_refuses(a, b):
    with pytest.raises(ValueError, match="win_rate"):
        win_rate(a, b)


# --------------------------------------------------------------------------------------------- scorers
def test_open_clip_parity():
    data = golden("open_clip")
    model = evaluation.clip_from_open_clip(data["weights"], 4, 3)
    with torch.no_grad():
        result = model(**data["in"])
    assert (result.image_embeds - data["out"]["image_features"]).abs().max() < 1e-5
    assert (result.text_embeds - data["out"]["text_features"]).abs().max() < 1e-5
    cosine = (result.image_embeds * result.text_embeds).sum(1)
    assert (cosine - data["out"]["cosine"]).abs().max() < 1e-5
    assert model.logit_scale == data["weights"]["logit_scale"] and not model.training
    del data["weights"]["visual.ln_pre.bias"]
    with pytest.raises(RuntimeError, match="pre_layrnorm"):  # what is missing is never drawn at random
        evaluation.clip_from_open_clip(data["weights"], 4, 3)


def test_image_reward_parity():
    data = golden("imagereward")
    assert data["in"]["attention_mask"].min() == 0  # padding is part of what is compared
    model = evaluation.image_reward_from_state_dict(data["weights"], 4, 3)
    with torch.no_grad():
        assert (model(**data["in"]) - data["out"]["reward"]).abs().max() < 1e-5
        image = model.vision(data["in"]["pixel_values"]).last_hidden_state
        assert (image - data["out"]["image_embeds"]).abs().max() < 1e-5


def test_linear_chain():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(11)))
    layers[2], layers[10] = torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)  # 10 comes after 2, not before
    x = torch.randn(3, 6)
    assert torch.equal(evaluation.linear_chain(layers.state_dict())(x), layers(x))
    alone = torch.nn.Linear(6, 1)
    assert torch.equal(evaluation.linear_chain(alone.state_dict())(x), alone(x))


VARIETY = {
    "landscape": picture(1, (333, 200)), "portrait": picture(2, (150, 334)),
    "grey": picture(3, (97, 98), "L"),
    "palette": picture(4, (260, 130)).quantize(64, dither=Image.Dither.NONE), "rgba": picture(5, mode="RGBA"),
}  # fmt: skip


@pytest.mark.parametrize("image", VARIETY.values(), ids=VARIETY)
def test_clip_preprocessing(image):
    """What the CLIP family sees, against transformers' own processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    expected = CLIPImageProcessorPil()(image.convert("RGB"), return_tensors="pt").pixel_values
    assert (common.clip_pixels([image]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("image", VARIETY.values(), ids=VARIETY)
def test_hps_preprocessing(image):
    """Long side to 224, zero-padded to a square, against torch's antialiased bicubic (within rounding)."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    height, width = x.shape[2:]
    h, w = (224, round(width * 224 / height)) if height > width else (round(height * 224 / width), 224)
    small = F.interpolate(x, (h, w), mode="bicubic", antialias=True).round().clamp(0, 255)[0] / 255
    expected = torch.zeros(3, 224, 224)
    top, left = (224 - h) // 2, (224 - w) // 2
    expected[:, top : top + h, left : left + w] = small
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = evaluation.hps_pixels([image])[0].permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    pixels = pixels.permute(2, 0, 1)
    assert pixels.shape == (3, 224, 224) and (pixels - expected).abs().max() < 1.5 / 255


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every scorer's files in their true layouts, small and random: {name: --scorer_paths words}."""
    from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    letters = [chr(97 + i) for i in range(26)]
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=12)
    ids = {k: getattr(words, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, **ids, "vocab_size": len(tokens), "max_position_embeddings": 12}
    vision = {**tower, "image_size": 28, "patch_size": 14}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for part in (clip, words, processor):
        part.save_pretrained(root / "clip")
    hps = golden("open_clip")["weights"]
    hps["token_embedding.weight"] = torch.randn(len(tokens), 24)
    (root / "hps").mkdir()
    words.save_pretrained(root / "hps")
    for file in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": hps, "epoch": 3}, root / "hps" / file)
        hps = {k: v * 1.01 for k, v in hps.items()}
    torch.save(torch.nn.Linear(20, 1).state_dict(), root / "v1.pth")
    mlp = {}
    for i, (a, b) in zip((0, 2, 4, 6, 7), ((20, 16), (16, 12), (12, 8), (8, 4), (4, 1))):
        mlp |= {f"layers.{i}.weight": torch.randn(b, a) / a**0.5, f"layers.{i}.bias": torch.randn(b)}
    torch.save(mlp, root / "v2.pth")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    reward = golden("imagereward")["weights"]
    reward["blip.text_encoder.embeddings.word_embeddings.weight"] = torch.randn(len(vocabulary) + 2, 24)
    (root / "ir").mkdir()
    torch.save(reward, root / "ir" / "ImageReward.pt")
    BertTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}).save_pretrained(root / "ir")
    return root, {
        "pickscore": [f"pickscore={root / 'clip'}"], "clip": [f"clip={root / 'clip'}"],
        "hpsv2.0": [f"hpsv2.0={root / 'hps'}"],
        "hpsv2.1": [f"hpsv2.1={root}/hps/HPS_v2.1_compressed.pt", f"hpsv2.1.processor={root}/hps"],
        "aesthetic.v1": [f"aesthetic.v1={root / 'v1.pth'}", f"aesthetic.v1.clip={root / 'clip'}"],
        "aesthetic.v2": [f"aesthetic.v2={root / 'v2.pth'}", f"aesthetic.v2.clip={root / 'clip'}"],
        "imagereward": [f"imagereward={root / 'ir'}"],
    }  # fmt: skip


def test_every_scorer_on_a_folder_of_images(weights, tmp_path):
    """One command, as a user runs it; PickScore, CLIP score, Aesthetic v2 against transformers' processor."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root, paths = weights
    (tmp_path / "images").mkdir()
    images = [picture(k, (80, 60)) for k in range(12)]
    for k, image in enumerate(images):  # three a prompt; by name, 10 would come before 2
        image.save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    words = ["--images", tmp_path / "images", "--prompts", tmp_path / "prompts.txt", "--micro_batch", 5]
    words += ["--scorers", ",".join(paths), "--scorer_paths", *sum(paths.values(), []), "--out", tmp_path]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found["scores"]) == list(paths) and not found["left_out"]
    scores = {k: torch.tensor(v["images"]).flatten() for k, v in found["scores"].items()}
    assert all(v.shape == (12,) and v.unique().numel() == 12 for v in scores.values())

    model, tokenizer = CLIPModel.from_pretrained(root / "clip"), AutoTokenizer.from_pretrained(root / "clip")
    x = CLIPImageProcessorPil.from_pretrained(root / "clip")(images, return_tensors="pt").pixel_values
    texts = [prompt for prompt in PROMPTS for _ in range(3)]
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        result = model(pixel_values=x, **words)
        cosine = (result.image_embeds * result.text_embeds).sum(1)
        layers = torch.load(root / "v2.pth", weights_only=True)
        y = result.image_embeds
        for i in (0, 2, 4, 6, 7):
            y = y @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
    assert (scores["clip"] - cosine).abs().max() < 1e-5
    assert (scores["pickscore"] - model.logit_scale.exp().item() * cosine).abs().max() < 1e-4
    assert (scores["aesthetic.v2"] - y[:, 0]).abs().max() < 1e-5
    assert (scores["hpsv2.0"].abs() <= 100).all() and scores["hpsv2.0"].abs().max() > 1


def test_image_reward_reads_the_prompt(weights):
    score = load_scorer("imagereward", weights[0] / "ir", device="cpu")
    image = picture(0)
    one, same, other = score([image] * 3, ["star", "star", "ring"])
    assert one == same != other
    assert torch.equal(score([image, picture(1)], ["star", "ring"], batch=1)[:1], score([image], ["star"]))


def test_scorer_without_files_is_named_and_left_out(weights, main, tmp_path, capsys):
    images = folder_of(tmp_path / "grey", [(k, k, k) for k in range(4)])
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    words = ("--images", images, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
    main(*words, "--scorers", "hpsv2.1,clip", "--scorer_paths", "hpsv2.1=nowhere/HPS.pt", *weights[1]["clip"])
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(found["scores"]) == ["clip"] and "nowhere/HPS.pt" in found["left_out"]["hpsv2.1"]
    assert "left out: scorer hpsv2.1" in capsys.readouterr().out
    with pytest.raises(common.InputError, match="nowhere/HPS.pt"):  # none is left: nothing to report
        main(*words, "--scorers", "hpsv2.1", "--scorer_paths", "hpsv2.1=nowhere/HPS.pt", "--overwrite")


def test_pickles_are_not_run(tmp_path, weights):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(common.InputError, match="evil.pth"):
        load_scorer("aesthetic.v1", {"weights": tmp_path / "evil.pth", "clip": weights[0] / "clip"})
    assert not (tmp_path / "ran").exists()


def test_image_reward_published_values():
    """THUDM/ImageReward's README; IMAGEREWARD names a folder with ImageReward.pt, bert-base-uncased's
    tokenizer, and the README's images as 1.webp to 4.webp."""
    folder = Path(os.environ.get("IMAGEREWARD", "nowhere"))
    if not (folder / "ImageReward.pt").exists():
        pytest.skip("the weights are not on this machine")
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    score = load_scorer("imagereward", folder, dtype=torch.float32)
    found = score([Image.open(folder / f"{k}.webp") for k in range(1, 5)], [prompt] * 4)
    assert found.tolist() == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=2e-3)


# ------------------------------------------------------------------------------------------ generation
HOW = {"steps": 3, "cfg": 2.0, "judges": [f"{TINY / 'world.py'}:gold_score"]}


@pytest.fixture(scope="module")
def other_unet(tmp_path_factory):
    """The tiny model's UNet, visibly changed: what a training run leaves in runs/NAME/unet."""
    from diffusers import UNet2DConditionModel

    path = tmp_path_factory.mktemp("runs") / "changed" / "unet"
    unet = UNet2DConditionModel.from_pretrained(TINY / "model" / "unet", low_cpu_mem_usage=False).float()
    torch.nn.init.normal_(unet.conv_out.bias, std=0.5, generator=torch.Generator().manual_seed(0))
    unet.save_pretrained(path)
    return path


def pixels_in(folder):
    files = sorted(Path(folder).glob("images/*/*.png"))
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in files}


def largest(a, b):
    """The largest difference of two images, in 1/255."""
    return np.abs(a - np.asarray(b)).max()


def test_images_are_the_stock_pipelines(tmp_path):
    """DDIM, guidance and decoding as diffusers does them, from the stated noise; whatever the batch."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    found = {}
    for batch in (2, 3):
        how = {**HOW, "images_per_prompt": 2, "seed": 5, "batch_size": batch}
        evaluation.report(TINY / "model", {"start": None}, PROMPTS[:2], tmp_path / str(batch), **how)
        found[batch] = pixels_in(tmp_path / str(batch))
    assert all(largest(found[2][k], found[3][k]) <= 1 for k in found[2])

    pipe = StableDiffusionPipeline.from_pretrained(TINY / "model", low_cpu_mem_usage=False).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, 8, 8, generator=common.generator(5, "image", 1, 0))
    image = pipe(PROMPTS[1], latents=noise, num_inference_steps=3, guidance_scale=2.0).images[0]
    assert largest(found[2]["00001_0.png"], image) <= 1
    assert largest(found[2]["00001_1.png"], image) > 1  # the second image of a prompt has noise of its own


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm"])
def test_schedulers_draw_each_image_from_its_own_generator(scheduler, tmp_path):
    for count in (1, 3):
        how = {**HOW, "scheduler": scheduler, "batch_size": count}
        evaluation.report(TINY / "model", {"start": None}, PROMPTS[:count], tmp_path / str(count), **how)
    one, three = pixels_in(tmp_path / "1"), pixels_in(tmp_path / "3")
    assert largest(one["00000_0.png"], three["00000_0.png"]) <= 1


def test_two_processes_give_the_same_report(other_unet, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"text": p} for p in PROMPTS]))
    words = ["--model", TINY / "model", "--unet", other_unet, "--images_per_prompt", 2, "--scheduler", "ddpm"]
    words += ["--prompts", tmp_path / "p.json", "--prompt_column", "text", "--max_prompts", 3, "--steps", 2]
    words += ["--scorers", f"{TINY}/world.py:gold_score", "--median_by", "gold_score", "--micro_batch", 4]
    for name, processes in (("one", 0), ("two", 2)):
        done = run(*words, "--out", tmp_path / name, "--cache", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "scores.json").read_bytes() for name in ("one", "two"))
    assert one == two
    images = {name: sorted((tmp_path / name).glob("images/*/*.png")) for name in ("one", "two")}
    assert len(images["one"]) == 12 and [f.name for f in images["one"]] == [f.name for f in images["two"]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(images["one"], images["two"]))
    result = json.loads(one)
    assert list(result["summary"]["gold_score"]) == ["start", "changed"]
    assert "| gold_score | changed |" in done.stdout and (tmp_path / "two" / "winrate.png").exists()


def test_images_are_used_again_and_never_stale(other_unet, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    drawn, stock = [], StableDiffusionPipeline.__call__

    def watched(pipe, prompts, **more):
        drawn.append(len(prompts))
        return stock(pipe, prompts, **more)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", watched)

    def report(model=TINY / "model", unet=None, **more):
        """The hash that names the images' folder; `drawn` then holds the batches that were drawn for it."""
        drawn.clear()
        how = {**HOW, "steps": 1, "batch_size": 2, "cache": tmp_path, **more}
        return evaluation.report(model, {"a": unet}, PROMPTS[:3], tmp_path, **how)["settings"]["images"]["a"]

    first = report()
    assert drawn == [2, 1]
    before = pixels_in(tmp_path)
    assert report() == first and not drawn
    (tmp_path / "images" / first / "00000_0.png").unlink()  # as if killed there: the batch is drawn whole
    assert report() == first and drawn == [2]
    assert all(np.array_equal(v, before[k]) for k, v in pixels_in(tmp_path).items())
    copy = tmp_path / "copy"
    shutil.copytree(TINY / "model", copy)
    assert report(copy) == first and not drawn  # the same weights elsewhere
    shutil.copy(other_unet / "diffusion_pytorch_model.safetensors", copy / "unet")
    changed = report(copy)
    assert drawn and report(unet=other_unet) == changed != first  # the same weights by another way
    others = [report(seed=1), report(steps=2), report(scheduler="dpm"), report(cfg=3)]
    assert len({first, changed, *others}) == 6


def test_without_arguments_every_run_is_compared(other_unet, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model in (("smpo", str(TINY / "model")), ("other", "another/model")):
        shutil.copytree(other_unet, tmp_path / "runs" / name / "unet")
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"model": model}))
    main("--max_prompts", 2, "--steps", 1)
    found = json.loads((tmp_path / "runs" / "eval" / "scores.json").read_text())
    assert list(found["summary"]) == ["gold_score", "pickscore"]
    assert list(found["summary"]["pickscore"]) == ["start", "smpo"]
    assert np.array(found["scores"]["pickscore"]["smpo"]).shape == (2, 2)
    kept = {folder.name for folder in (tmp_path / "runs" / "cache" / "images").iterdir()}
    assert kept == set(found["settings"]["images"].values())  # where the runs' own reports draw


def test_stable_diffusion_xl(tmp_path):
    """SDXL's layout, small and random: two text encoders, size conditioning, no safety checker."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        projection_dim=24, num_attention_heads=2, max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    blocks = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet(
        sample_size=8, cross_attention_dim=64, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, sample_size=16, **blocks)  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler,
    ).save_pretrained(tmp_path / "xl")  # fmt: skip
    (tmp_path / "judge.py").write_text("def ones(images, prompts): return [float(i.width) for i in images]\n")
    result = evaluation.report(tmp_path / "xl", {"start": None}, PROMPTS[:2], tmp_path / "out", steps=2,
                               scheduler="dpm", judges=[f"{tmp_path / 'judge.py'}:ones"])  # fmt: skip
    assert result["scores"]["ones"]["start"] == [[16.0], [16.0]]
    with pytest.raises(common.InputError, match="does not fit"):  # before anything is drawn with it
        evaluation.report(TINY / "model", {"xl": tmp_path / "xl" / "unet"}, PROMPTS, tmp_path / "out", **HOW)


# ---------------------------------------------------------------------------------------------- report
def test_report_numbers_and_median_rule(judge, main, tmp_path):
    """Three prompts x three images: colours are the scores, so that all numbers are known."""
    same = [(40, 0, 0), (50, 0, 0), (60, 0, 0)]  # the third prompt ties
    first = [(10, 0, 50), (20, 0, 10), (30, 0, 20), (5, 0, 5), (7, 0, 90), (9, 0, 9), *same]
    second = [(11, 0, 99), (20, 0, 10), (29, 0, 0), (6, 0, 0), (8, 0, 0), (1, 0, 0), *same]
    dark, light = folder_of(tmp_path / "dark", first), folder_of(tmp_path / "light", second)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:3]))
    words = ["--images", dark, light, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out"]
    words += ["--scorers", f"{judge}:red,{judge}:bright"]
    main(*words)
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    red = {m: np.array(v) * 255 for m, v in found["scores"]["red"].items()}
    assert np.allclose(red["dark"], [[10, 20, 30], [5, 7, 9], [40, 50, 60]], atol=1e-4)
    summary = found["summary"]["red"]["dark"]
    assert summary["mean"] * 255 == pytest.approx(231 / 9) and summary["median"] * 255 == pytest.approx(20)
    assert summary["standard_error"] * 255 == pytest.approx(np.std([20, 7, 50], ddof=1) / 3**0.5)
    win = found["win_rates"]["red"]["light"]["dark"]  # 3 wins, 4 ties, 2 losses
    assert win["win"] == pytest.approx(5 / 9) and win["tie"] == pytest.approx(4 / 9)
    assert found["win_rates"]["red"]["dark"]["light"]["win"] == pytest.approx(4 / 9)
    chart = Image.open(tmp_path / "out" / "winrate.png").convert("RGB")
    assert chart.getpixel((340 + round(500 * 5 / 9), 67)) != (255, 255, 255)  # the dot of the first line
    assert chart.getpixel((590, 80)) == (0, 0, 0)  # 50 %
    sheet = Image.open(tmp_path / "out" / "samples.png")  # 32 px images fivefold, dark left, light right
    assert sheet.getpixel((12 + 80, 30 + 80)) == (10, 0, 50)
    assert sheet.getpixel((12 + 166 + 80, 30 + 80)) == (11, 0, 99)

    main(*words, "--median_by", "bright", "--overwrite")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    # red + blue is dark (60, 30, 50), (10, 97, 18): the third, the third; light (110, 30, 29), (6, 8, 1): the
    # second, the first; and for both the second of the third prompt
    assert found["summary"]["red"]["dark"]["mean"] * 255 == pytest.approx((30 + 9 + 50) / 3)
    assert found["summary"]["red"]["light"]["mean"] * 255 == pytest.approx((20 + 6 + 50) / 3)
    assert found["win_rates"]["red"]["light"]["dark"]["win_strict"] == 0
    assert found["settings"]["median_by"] == "bright" and {"torch", "commit"} <= set(found["versions"])


def test_pair_set_scores(judge, main, rows, make_set, tmp_path):
    data, out = make_set(rows[:5]), tmp_path / "scores.safetensors"
    main("--data", data, "--scorers", f"{judge}:bright", "--scores_out", out)
    with safe_open(out, "pt") as file:
        for k in (0, 1):
            images = [common.decode_image(row[f"jpg_{k}"]) for row in rows[:5]]
            expected = [np.asarray(image).mean() / 255 for image in images]
            assert file.get_tensor(f"score_{k}").tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(common.InputError, match="exists"):
        main("--data", data, "--scorers", f"{judge}:red", "--scores_out", out)
    main("--data", data, "--scorers", f"{judge}:red", "--scores_out", out, "--overwrite")
    red = np.asarray(common.decode_image(rows[0]["jpg_0"]))[..., 0].mean() / 255
    with safe_open(out, "pt") as file:
        assert file.get_tensor("score_0")[0] == pytest.approx(red, abs=1e-6)


def test_prompts_from_anywhere(make_set, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    (tmp_path / "p.json").write_text('["one", "two"]')
    (tmp_path / "o.json").write_text('[{"Prompt": "one"}, {"Prompt": "two"}]')
    table = make_set([{"Prompt": "one"}, {"Prompt": "two"}], "p.parquet")
    for place, column in (("p.txt", "caption"), ("p.json", "caption"), ("o.json", "Prompt")):
        assert evaluation.read_prompts(str(tmp_path / place), column) == ["one", "two"]
    assert evaluation.read_prompts(table, "Prompt") == ["one", "two"]
    assert evaluation.read_prompts(str(tmp_path / "p*.parquet"), "Prompt") == ["one", "two"]


BAD = {
    "prompts": (("--prompts", "nowhere.txt"), "nowhere.txt"),
    "empty": (("--prompts", "EMPTY"), "no prompts"),
    "column": (("--prompts", "JSON", "--prompt_column", "words"), "words"),
    "scorer": (("--scorers", "pickscroe"), "unknown scorer pickscroe; known: pickscore, clip"),
    "judge": (("--scorers", "nowhere.py:f"), "nowhere.py"),
    "function": (("--scorers", "JUDGE:f"), "no function f"),
    "part": (("--scorers", "clip", "--scorer_paths", "clip.head=x"), "head"),
    "paths": (("--scorers", "clip", "--scorer_paths", "clip"), "NAME=PATH"),
    "images": (("--images", "nowhere"), "0 images"),
    "odd": (("--images", "ODD"), "3 images do not divide among 2 prompts"),
    "undecodable": (("--images", "BROKEN"), "0.png does not decode"),
    "few": (("--scorers", "JUDGE:wrong", "--images", "EVEN"), "2 images"),
    "nan": (("--scorers", "JUDGE:nan", "--images", "EVEN"), "0 finite values"),
    "boom": (("--scorers", "JUDGE:boom", "--images", "EVEN"), "raises ZeroDivisionError"),
    "words": (("--scorers", "JUDGE:words", "--images", "EVEN"), "raises ValueError"),
    "scheduler": (("--scheduler", "pndm"), "pndm is not one of ddim, ddpm, dpm"),
    "precision": (("--precision", "fp8"), "fp8"),
    "model": (("--model", "nowhere/at/all"), "nowhere/at/all"),
    "unet": (("--unet", "nowhere/unet"), "nowhere/unet"),
    "median": (("--median_by", "clip", "--images", "EVEN"), "clip is not one of bright"),
    "pairs": (("--data", "nowhere"), "--scores_out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, judge, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs/*/unet here
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS[:2] if case != "column" else [{"caption": "x"}]))
    (tmp_path / "empty.txt").write_text("\n")
    names = {"EMPTY": tmp_path / "empty.txt", "JSON": tmp_path / "p.json", "ODD": tmp_path / "odd",
             "EVEN": tmp_path / "even", "BROKEN": tmp_path / "broken"}  # fmt: skip
    folder_of(tmp_path / "odd", [(0, 0, 0)] * 3), folder_of(tmp_path / "even", [(0, 0, 0)] * 2)
    folder_of(tmp_path / "broken", [(0, 0, 0)] * 2)
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    words, message = BAD[case]
    words = [str(names.get(w, w)).replace("JUDGE", str(judge)) for w in words]
    defaults = {"--prompts": tmp_path / "p.json", "--scorers": f"{judge}:bright", "--model": TINY / "model"}
    words += [x for k, v in defaults.items() if k not in words for x in (k, v)]
    with pytest.raises(common.InputError, match=message.replace("(", r"\(")) as error:
        main(*words, "--out", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "scores.json").exists()


def test_existing_report_is_not_overwritten(judge, tmp_path):
    """Through the process: one line on stderr and exit code 2."""
    folder_of(tmp_path / "even", [(0, 0, 0)] * 2)
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS[:2]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("precious")
    words = ["--images", tmp_path / "even", "--prompts", tmp_path / "p.json", "--out", tmp_path / "out"]
    done = run(*words, "--scorers", f"{judge}:bright")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--overwrite" in done.stderr and (tmp_path / "out" / "scores.json").read_text() == "precious"


def test_nothing_happens_on_import():
    code = "import sys, eval; print(len(sys.argv), 'diffusers' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1 False False" and not done.stderr
