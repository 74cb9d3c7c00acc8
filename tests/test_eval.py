# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""eval.py: scorers against the original architectures' outputs and published preprocessing,
generation against the stock pipeline, statistics against brute force, scores of pair sets, and the
command line as a user runs it."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from child import Child
from conftest import ROOT, TINY
from layouts import make_xl_model
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import eval as evaluation
from common import InputError
from eval import load_scorer, win_rate

PROMPTS = ["a red star on navy", "a blue ring on grey", "a green heart on black"]
PROMPTS += ["a white cross on teal"]
JUDGE = f"{TINY / 'world.py'}:gold_score"
HAS_PEFT = importlib.util.find_spec("peft") is not None


def golden(name):
    """A golden file -> {"weights": {...}, "in": {...}, "out": {...}}."""
    found = {"weights": {}, "in": {}, "out": {}}
    for key, value in load_file(ROOT / "tests" / "golden" / f"{name}_small.safetensors").items():
        kind, _, rest = key.partition(".")
        found[kind][rest] = value
    return found


def picture(seed, size=(64, 64), mode="RGB"):
    """A smooth random image: upscaled noise, as natural images have little energy at high
    frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def folder_of(path, colours):
    """An image folder, one 32 px image of each (red, green, blue)."""
    path.mkdir()
    for i, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(path / f"{i}.png")
    return path


def write_prompts(path, prompts):
    path.write_text("\n".join(prompts) + "\n")
    return path


def report_in(out):
    return json.loads((Path(out) / "scores.json").read_text())


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(words...) runs eval.py's command line in this process, in an empty working folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nobody is asked
    monkeypatch.chdir(tmp_path)
    return lambda *words: evaluation.main([str(word) for word in words])


@pytest.fixture
def draw(main, judge, tmp_path):
    """draw(words..., prompts=, out=) compares UNets of the tiny model -> what scores.json holds.
    One image of each prompt, 3 steps, a judge that costs nothing, unless the words say otherwise.
    Images are kept in `out`."""

    def compare(*words, prompts=PROMPTS[:2], out=tmp_path / "out"):
        file = write_prompts(tmp_path / "drawn.txt", prompts)
        settings = [
            *("--prompts", file, "--out", out, "--cache", out, "--overwrite"),
            *("--images_per_prompt", 1, "--steps", 3, "--scorers", f"{judge}:bright"),
        ]
        main(*settings, *words)
        return report_in(out)

    return compare


def pixels_of(found, out, model="initial"):
    """The images of a model in a report: {file name: int array}."""
    folder = Path(out) / "images" / found["settings"]["images"][model]
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in sorted(folder.glob("*.png"))}


def largest(a, b):
    """The largest difference of two images, in 1/255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.fixture
def judge(tmp_path):
    """A judge file. `bright` is an image's mean, `red` that of its red; the others are no good."""
    path = tmp_path / "judge.py"
    path.write_text(
        "import numpy as np\n"
        "def bright(images, prompts): return [np.asarray(i).mean() / 255 for i in images]\n"
        "def red(images, prompts): return [np.asarray(i)[..., 0].mean() / 255 for i in images]\n"
        "def wrong(images, prompts): return [0.0]\n"
        "def nan(images, prompts): return [float('nan')] * len(images)\n"
        "def boom(images, prompts): return 1 / 0\n"
        "def words(images, prompts): return prompts\n"
        "def wide(images, prompts): return [float(i.width) for i in images]\n"
    )
    return path


# ------------------------------------------------------------------------------------- win rates
def test_win_rate_counts():
    # wins at 0, 4, 5, 7; ties at 1, 2
    a = [1, 2, 3, 4, 5, 6, 7, 8]
    b = [0, 2, 3, 5, 4, 5, 8, 7]
    result = win_rate(a, b)
    assert (result["win"], result["win_strict"], result["tie"]) == (5 / 8, 4 / 8, 2 / 8)
    mirror = win_rate(b, a)
    assert mirror["win"] == 3 / 8 and mirror["win_strict"] == 2 / 8
    assert win_rate(a, b) == result  # a report does not change when it is made again
    assert list(win_rate(a, a).values()) == [0.5, 0, 1, 0.5, 0.5]


def test_win_rate_interval_is_the_bootstrap_over_prompts():
    """A quantile of n resamples has a standard error of sqrt(q (1 - q) / n) over the density there:
    0.0012 for 10,000 against 20,000 resamples of a mean with the standard deviation 0.036. Means of
    128 quarters lie 0.002 apart. 0.006 is five standard errors, or three such distances."""
    rng = np.random.default_rng(3)
    a = rng.integers(0, 4, (128, 2))
    b = rng.integers(0, 3, (128, 2))  # many ties
    points = ((a > b) + (a == b) / 2).mean(1)
    resamples = [points[rng.integers(128, size=128)].mean() for _ in range(20_000)]
    result = win_rate(a, b)
    expected = np.quantile(resamples, [0.025, 0.975])
    assert np.allclose([result["low"], result["high"]], expected, atol=0.006)
    # Copies of an image are no further evidence.
    copies = win_rate(np.repeat(a[:, :1], 5, 1), np.repeat(b[:, :1], 5, 1))
    assert copies == win_rate(a[:, 0], b[:, 0])


@pytest.mark.parametrize(
    "a, b",
    [([1, 2], [1]), ([], []), ([1, np.nan], [1, 2]), ([1, np.inf], [1, 2]), ([[[1]]], [[[1]]])],
)
def test_win_rate_refuses(a, b):
    with pytest.raises(ValueError, match="win_rate"):
        win_rate(a, b)


# --------------------------------------------------------------------------- published weights
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


def test_image_reward_parity():
    data = golden("imagereward")
    assert data["in"]["attention_mask"].min() == 0  # padding is part of what is compared
    model = evaluation.image_reward_from_state_dict(data["weights"], 4, 3)
    with torch.no_grad():
        assert (model(**data["in"]) - data["out"]["reward"]).abs().max() < 1e-5
        image = model.vision(data["in"]["pixel_values"]).last_hidden_state
        assert (image - data["out"]["image_embeds"]).abs().max() < 1e-5
    assert not model.training


def test_linear_chain():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(11)))
    layers[2] = torch.nn.Linear(6, 5)
    layers[10] = torch.nn.Linear(5, 1)  # 10 comes after 2, not before
    x = torch.randn(3, 6)
    assert torch.equal(evaluation.linear_chain(layers.state_dict())(x), layers(x))
    alone = torch.nn.Linear(6, 1)
    assert torch.equal(evaluation.linear_chain(alone.state_dict())(x), alone(x))


# ---------------------------------------------------------------------------- preprocessing
VARIETY = {
    "landscape": picture(1, (333, 200)),
    "portrait": picture(2, (150, 334)),
    "grey": picture(3, (97, 98), "L"),
    "palette": picture(4, (260, 130)).quantize(64, dither=Image.Dither.NONE),
    "rgba": picture(5, mode="RGBA"),
}


@pytest.mark.parametrize("image", VARIETY.values(), ids=VARIETY)
def test_clip_preprocessing(image):
    """What the CLIP family sees is what transformers' own processor gives. 1e-5: fp32's rounding of
    numbers up to 2.7, a few times."""
    from transformers import CLIPImageProcessorPil

    image = image.convert("RGB")
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    assert (evaluation.Scorer().prepare(image) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("image", VARIETY.values(), ids=VARIETY)
def test_hps_preprocessing(image):
    """Long side to 224, zero-padded to a square, against torch's antialiased bicubic. Pillow rounds
    between its two passes and at the end: 1.5 of 255 at most."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    height, width = x.shape[2:]
    h = 224 if height > width else round(height * 224 / width)
    w = 224 if width >= height else round(width * 224 / height)
    small = F.interpolate(x, (h, w), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
    expected = torch.zeros(3, 224, 224)
    top = (224 - h) // 2
    left = (224 - w) // 2
    expected[:, top : top + h, left : left + w] = small
    found = np.asarray(evaluation.hps_square(image, 224))
    assert found.shape == (224, 224, 3)
    assert (torch.from_numpy(found.copy()).permute(2, 0, 1) - expected).abs().max() <= 1.5


# ---------------------------------------------------------------------------------- scorers
LETTERS = [chr(97 + i) for i in range(26)]
TOKENS = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "in</w>", "<|startoftext|>", "<|endoftext|>"]


def clip_tokenizer(folder, tokens=TOKENS, **settings):
    """CLIP's tokenizer over letters, in a folder."""
    from transformers import CLIPTokenizer

    vocab = {token: i for i, token in enumerate(tokens)}
    settings = {"model_max_length": 12, **settings}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("i", "n</w>")], **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every scorer's files in their true layouts, small and random: (folder, {name:
    --scorer_paths})."""
    from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    for name in ("clip", "hps", "ir"):
        (root / name).mkdir()

    # CLIP, as transformers writes it
    words = clip_tokenizer(root / "clip")
    ids = {k: getattr(words, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 4
    text = {**tower, **ids, "vocab_size": len(TOKENS), "max_position_embeddings": 12}
    vision = {**tower, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    CLIPModel(config).save_pretrained(root / "clip")
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessorPil(**size).save_pretrained(root / "clip")

    # HPSv2: open_clip's state dict. It has 64 words, so that its end of text is 63.
    hps = golden("open_clip")["weights"]
    hps["token_embedding.weight"] = torch.randn(len(TOKENS), 24)
    clip_tokenizer(root / "hps")
    for file in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": hps, "epoch": 3}, root / "hps" / file)
        hps = {k: v * 1.01 for k, v in hps.items()}

    # The aesthetic predictors
    torch.save(torch.nn.Linear(20, 1).state_dict(), root / "v1.pth")
    mlp = {}
    widths = (20, 16, 12, 8, 4, 1)
    for i, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        mlp[f"layers.{i}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        mlp[f"layers.{i}.bias"] = torch.randn(outputs)
    torch.save(mlp, root / "v2.pth")

    # ImageReward, and BERT's tokenizer
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += [*LETTERS, *(f"##{x}" for x in LETTERS)]
    reward = golden("imagereward")["weights"]
    words = "blip.text_encoder.embeddings.word_embeddings.weight"
    reward[words] = torch.randn(len(vocabulary) + 2, 24)
    torch.save(reward, root / "ir" / "ImageReward.pt")
    BertTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}).save_pretrained(root / "ir")
    return root, {
        "pickscore": [f"pickscore={root / 'clip'}"],
        "clip": [f"clip={root / 'clip'}"],
        "hpsv2.0": [f"hpsv2.0={root / 'hps'}"],
        "hpsv2.1": [f"hpsv2.1={root}/hps/HPS_v2.1_compressed.pt", f"hpsv2.1.processor={root}/hps"],
        "aesthetic.v1": [f"aesthetic.v1={root / 'v1.pth'}", f"aesthetic.v1.clip={root / 'clip'}"],
        "aesthetic.v2": [f"aesthetic.v2={root / 'v2.pth'}", f"aesthetic.v2.clip={root / 'clip'}"],
        "imagereward": [f"imagereward={root / 'ir'}"],
    }


def expected_scores(root, images, texts):
    """The scores of all scorers, by transformers' processors and a few lines of our own."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    expected = {}
    # The CLIP family
    model = CLIPModel.from_pretrained(root / "clip")
    tokenizer = AutoTokenizer.from_pretrained(root / "clip")
    processor = CLIPImageProcessorPil.from_pretrained(root / "clip")
    pixels = processor(images, return_tensors="pt").pixel_values
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    result = model(pixel_values=pixels, **words)
    cosine = (result.image_embeds * result.text_embeds).sum(1)
    expected["clip"] = cosine
    expected["pickscore"] = model.logit_scale.exp() * cosine
    layer = torch.load(root / "v1.pth", weights_only=True)
    expected["aesthetic.v1"] = (result.image_embeds @ layer["weight"].T + layer["bias"])[:, 0]
    layers = torch.load(root / "v2.pth", weights_only=True)
    y = result.image_embeds
    for i in (0, 2, 4, 6, 7):
        y = y @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
    expected["aesthetic.v2"] = y[:, 0]
    # HPS, whose squares Pillow's own `pad` makes
    squares = [ImageOps.pad(image, (28, 28), Image.Resampling.BICUBIC) for image in images]
    pixels = processor(squares, return_tensors="pt").pixel_values
    for name, file in (("hpsv2.0", "HPS_v2"), ("hpsv2.1", "HPS_v2.1")):
        state = torch.load(root / "hps" / f"{file}_compressed.pt", weights_only=True)["state_dict"]
        # These small towers have one head each: head_counts takes 64 channels for a head.
        model = evaluation.clip_from_open_clip(state, 1, 1)
        result = model(pixel_values=pixels, **words)
        expected[name] = 100 * (result.image_embeds * result.text_embeds).sum(1)
    # ImageReward, whose BERT has a word more for each of [DEC] and [ENC]
    state = torch.load(root / "ir" / "ImageReward.pt", weights_only=True)
    model = evaluation.image_reward_from_state_dict(state, 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(root / "ir")
    words = tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt")
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    pixels = CLIPImageProcessorPil(**size)(images, return_tensors="pt").pixel_values
    expected["imagereward"] = model(pixels, words.input_ids, words.attention_mask)
    return {name: values.detach() for name, values in expected.items()}


def test_every_scorer_on_a_folder_of_images(weights, tmp_path):
    """One command, as a user runs it. fp32 sums in batches of another size and padding differ in
    their last bits: 1e-5 for numbers near 1, in proportion for larger ones."""
    root, paths = weights
    (tmp_path / "images").mkdir()
    # To 28 x 22: an even number of black rows, which Pillow's `pad` distributes as we do
    images = [picture(k, (80, 64)) for k in range(12)]
    for k, image in enumerate(images):  # three a prompt; by name, 10 would come before 2
        image.save(tmp_path / "images" / f"{k}.png")
    file = write_prompts(tmp_path / "prompts.txt", [*PROMPTS, ""])
    command = [
        *(sys.executable, ROOT / "eval.py", "--images", tmp_path / "images", "--prompts", file),
        *("--micro_batch", 5, "--scorers", ",".join(paths), "--out", tmp_path / "out"),
        *("--scorer_paths", *sum(paths.values(), [])),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = report_in(tmp_path / "out")
    assert list(found["scores"]) == list(paths) and not found["left_out"]
    texts = [prompt for prompt in PROMPTS for _ in range(3)]
    for name, expected in expected_scores(root, images, texts).items():
        scores = torch.tensor(found["scores"][name]["images"])
        assert scores.shape == (4, 3) and scores.unique().numel() == 12
        limit = 1e-5 * max(1, expected.abs().max())
        assert (scores.flatten() - expected).abs().max() < limit, name
    assert found["scorers"]["clip"]["unit"] == "cosine"
    table = (tmp_path / "out" / "scores.md").read_text()
    assert table in done.stdout and f"- clip: cosine, {root / 'clip'}" in table


def test_image_reward_reads_the_prompt(weights):
    score = load_scorer("imagereward", weights[0] / "ir", device="cpu")
    image = picture(0)
    one, same, other = score([image] * 3, ["star", "star", "ring"])
    assert one == same != other
    both = score([image, picture(1)], ["star", "ring"], batch=1)
    assert torch.equal(both[:1], score([image], ["star"]))


def test_a_reward_is_in_fp32_whatever_the_run(make_set, rows, weights, tmp_path):
    """Bit for bit, where half precision would differ by 1e-3."""
    images = [common.decode_image(row["jpg_0"]) for row in rows[:4]]
    captions = [row["caption"] for row in rows[:4]]
    expected = evaluation.load_reward(str(TINY / "reward"))(images, captions)
    half = load_scorer("pickscore", TINY / "reward", device="cpu", dtype=torch.bfloat16)
    assert torch.equal(half(images, captions), expected)
    for precision in ("bf16", "fp16"):
        cfg = evaluation.RewardConfig(
            precision=precision,
            data=make_set(rows[:4]),
            reward=str(TINY / "reward"),
            cache=str(tmp_path / precision),
        )
        table = common.RowTable(cfg, common.DistInfo(), common.PAIR_COLUMNS)
        scores = evaluation.pair_scores(cfg, table, common.DistInfo())["score_0"]
        # fill_store has batches of 16: the last bits of fp32 may differ
        assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
    # The other scorers take the dtype that they are given, and that can be seen.
    whole, half = (
        load_scorer("clip", weights[0] / "clip", device="cpu", dtype=dtype)(images, captions)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (whole - half).abs().max() > 1e-4


@pytest.fixture
def tf32_allowed():
    """As common.init_distributed sets it on a GPU."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32"
    yield
    for backend, precision in zip(backends, before):
        backend.fp32_precision = precision


def test_scores_are_without_tf32_also_where_training_allows_it(tf32_allowed, tmp_path):
    """What a scorer runs under is observed here; that the results differ takes a GPU."""
    file = tmp_path / "observer.py"
    file.write_text(
        "import torch\n"
        "def exact(images, prompts):\n"
        "    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)\n"
        "    return [float(all(b.fp32_precision == 'ieee' for b in backends)) for _ in images]\n"
    )
    assert load_scorer(f"{file}:exact")([picture(0)], ["a"]).tolist() == [1.0]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_an_image_for_each_prompt(judge):
    score = load_scorer(f"{judge}:bright")
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        score([picture(0)] * 2, ["a"])
    assert score([], []).shape == (0,)
    # Any mode is read as RGB, in batches of any size.
    images = [picture(k, mode=mode) for k, mode in enumerate(("L", "RGB", "RGBA"))]
    expected = [np.asarray(image.convert("RGB")).mean() / 255 for image in images]
    assert score(images, ["a"] * 3, batch=2).tolist() == pytest.approx(expected, abs=1e-6)


def test_scorer_without_files_is_named_and_left_out(weights, main, tmp_path, capsys):
    images = folder_of(tmp_path / "grey", [(k, k, k) for k in range(4)])
    words = ("--images", images, "--prompts", write_prompts(tmp_path / "p.txt", PROMPTS))
    words += ("--out", tmp_path / "out", "--scorer_paths", "hpsv2.1=nowhere/HPS.pt")
    both = (*words, *weights[1]["clip"], "--scorers", "hpsv2.1,clip")
    main(*both)
    found = report_in(tmp_path / "out")
    assert list(found["scores"]) == ["clip"]
    assert "nowhere/HPS.pt" in found["left_out"]["hpsv2.1"]
    said = capsys.readouterr().out
    assert "left out: scorer hpsv2.1 (nowhere/HPS.pt, " in said
    with pytest.raises(InputError, match="nowhere/HPS.pt"):  # none is left: nothing to report
        main(*words, "--scorers", "hpsv2.1", "--overwrite")
    with pytest.raises(InputError, match="nowhere/HPS.pt"):  # it has to choose the images
        main(*both, "--overwrite", "--median_by", "hpsv2.1")


def test_pickles_are_not_run(tmp_path, weights):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(InputError, match="evil.pth"):
        files = {"weights": tmp_path / "evil.pth", "clip": weights[0] / "clip"}
        load_scorer("aesthetic.v1", files)
    assert not (tmp_path / "ran").exists()


def test_image_reward_published_values():
    """THUDM/ImageReward's README, to half a unit of its last digit and the difference of half
    precision. IMAGEREWARD names a folder with ImageReward.pt, bert-base-uncased's tokenizer, and
    the README's images as 1.webp to 4.webp."""
    folder = Path(os.environ.get("IMAGEREWARD", "nowhere"))
    if not (folder / "ImageReward.pt").exists():
        pytest.skip("the weights are not on this machine")
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    score = load_scorer("imagereward", folder, dtype=torch.float32)
    found = score([Image.open(folder / f"{k}.webp") for k in range(1, 5)], [prompt] * 4)
    assert found.tolist() == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=2e-3)


# ------------------------------------------------------ weights and tokenizers that do not fit
def prefixed(weights):
    return {f"model.{key}": value for key, value in weights.items()}


def without(part):
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def with_one_more(name):
    return lambda weights: {**weights, name: torch.zeros(3)}


REWARD_CHANGES = {
    "prefix": (prefixed, "missing: logit_scale, .*unexpected: model.logit_scale"),
    "no text half": (without("text_model."), "missing: text_model."),
    "one less": (without("visual_projection"), "missing: visual_projection.weight"),
    "one more": (with_one_more("other.weight"), "unexpected: other.weight"),
}


@pytest.mark.parametrize("case", REWARD_CHANGES)
def test_wrong_weights_of_a_reward_are_named(case, tmp_path):
    change, message = REWARD_CHANGES[case]
    folder = Path(shutil.copytree(TINY / "reward", tmp_path / "reward"))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    for load in (evaluation.load_reward, lambda path: load_scorer("clip", path)):
        with pytest.raises(InputError, match=message) as error:
            load(str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


HPS = "hps/HPS_v2_compressed.pt"
IMAGE_REWARD = "ir/ImageReward.pt"
STATE_CHANGES = [
    ("hpsv2.0", HPS, prefixed, "visual.ln_pre.bias"),
    ("hpsv2.0", HPS, without("ln_final"), "ln_final.bias"),
    ("hpsv2.0", HPS, without("visual.ln_post.bias"), "vision_model.post_layernorm.bias"),
    ("hpsv2.0", HPS, with_one_more("visual.other"), "visual.other"),
    ("imagereward", IMAGE_REWARD, prefixed, "blip.visual_encoder.cls_token"),
    ("imagereward", IMAGE_REWARD, without("text_encoder"), "embeddings.word_embeddings.weight"),
    ("imagereward", IMAGE_REWARD, without("visual_encoder.norm.bias"), "post_layernorm.bias"),
    ("imagereward", IMAGE_REWARD, with_one_more("blip.text_encoder.other"), "other"),
    ("imagereward", IMAGE_REWARD, without("mlp.layers.4.bias"), "4.bias"),
    ("aesthetic.v1", "v1.pth", prefixed, "model"),
    ("aesthetic.v1", "v1.pth", without("bias"), "bias"),
    ("aesthetic.v1", "v1.pth", with_one_more("other"), "other"),
    ("aesthetic.v2", "v2.pth", prefixed, "model.layers."),
    ("aesthetic.v2", "v2.pth", without("layers.2.bias"), "2.bias"),
    ("aesthetic.v2", "v2.pth", with_one_more("layers.2.running_mean"), "2.running_mean"),
    ("aesthetic.v2", "v2.pth", with_one_more("layers.9.bias"), "9."),
]


@pytest.mark.parametrize("name, file, change, message", STATE_CHANGES)
def test_wrong_weights_of_a_published_scorer_are_named(
    name, file, change, message, weights, tmp_path
):
    root = weights[0]
    state = torch.load(root / file, weights_only=True)
    torch.save(change(state.get("state_dict", state)), tmp_path / "wrong.pt")
    others = {"hpsv2.0": ("processor", "hps"), "imagereward": ("tokenizer", "ir")}
    part, folder = others.get(name, ("clip", "clip"))
    files = {"weights": tmp_path / "wrong.pt", part: root / folder}
    with pytest.raises(InputError) as error:
        load_scorer(name, files, device="cpu")
    assert message in str(error.value) and "wrong.pt" in str(error.value)
    assert "\n" not in str(error.value)


TOKENIZERS = {
    "words": ({"tokens": [f"{i}</w>" for i in range(9)] + TOKENS}, "64 words, the model 55"),
    "length": ({"model_max_length": 13}, "more than 12 tokens"),
    "no length": ({"model_max_length": None}, "has no length"),
    "end": ({"tokens": [*TOKENS[:-2], *TOKENS[:-3:-1]]}, "the model expects 54"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit(case, weights, tmp_path):
    """Each of these would score without a word: texts cut off or all the same, or would end the
    process on a GPU."""
    settings, message = TOKENIZERS[case]
    folder = Path(shutil.copytree(weights[0] / "clip", tmp_path / "clip"))
    clip_tokenizer(folder, **settings)
    with pytest.raises(InputError, match=f"the tokenizer does not fit the model: .*{message}"):
        evaluation.load_reward(str(weights[0] / "clip"), str(folder))
    with pytest.raises(InputError, match=message):
        load_scorer("hpsv2.0", {"weights": weights[0] / HPS, "processor": folder}, device="cpu")


def test_other_parts_that_do_not_fit(weights, tmp_path):
    """ImageReward with the words of another BERT; CLIP with another model's image processor."""
    from transformers import AutoTokenizer

    root = weights[0]
    folder = tmp_path / "words"
    tokenizer = AutoTokenizer.from_pretrained(root / "ir")
    tokenizer.add_tokens(["star"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="it has 60 words, the model 59"):
        load_scorer("imagereward", {"weights": root / IMAGE_REWARD, "tokenizer": folder})
    folder = Path(shutil.copytree(root / "clip", tmp_path / "clip"))
    shutil.copy(TINY / "reward" / "preprocessor_config.json", folder)
    with pytest.raises(InputError, match="not the 28 px of the model"):
        evaluation.load_reward(str(root / "clip"), str(folder))
    with pytest.raises(InputError, match="processor of .*nowhere cannot be loaded"):
        evaluation.load_reward(str(root / "clip"), str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------- generation
def stock_image(prompt, key, steps=3, scheduler="DDIMScheduler", unet=None, lora=None, model=None):
    """The image that diffusers' own pipeline makes of the stated noise; guidance 2."""
    import diffusers

    kind = diffusers.DiffusionPipeline
    pipe = kind.from_pretrained(model or TINY / "model", low_cpu_mem_usage=False).to(torch.float32)
    settings = {"algorithm_type": "dpmsolver++", "solver_order": 2} if "DPM" in scheduler else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    if unet is not None:
        pipe.unet = unet
    if lora:
        pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    generator = common.generator(*key)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    words = {"num_inference_steps": steps, "guidance_scale": 2.0, "generator": generator}
    return pipe(prompt, latents=noise, **words).images[0]


def tiny_unet(path=TINY / "model" / "unet"):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(path, low_cpu_mem_usage=False).float()


@pytest.fixture(scope="module")
def other_unet(tmp_path_factory):
    """The tiny model's UNet, visibly changed: what a training run leaves in runs/NAME/unet."""
    path = tmp_path_factory.mktemp("runs") / "changed" / "unet"
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(unet.conv_out.bias, std=0.5, generator=generator)
    unet.save_pretrained(path)
    return path


# Kernels' last bits depend on the size of the batch. In a picture that is 1 of 255, where a value
# lies at the border of two.
ROUNDING = 1


def test_images_are_the_stock_pipelines(draw, tmp_path):
    """Guidance and decoding as diffusers does them, from the stated noise; whatever the batch."""
    found = {}
    for batch in (2, 3):
        out = tmp_path / str(batch)
        words = ("--images_per_prompt", 2, "--seed", 5, "--micro_batch", batch)
        found[batch] = pixels_of(draw(*words, out=out), out)
    names = [f"0000{i}_{j}.png" for i in (0, 1) for j in (0, 1)]
    assert list(found[2]) == list(found[3]) == names
    assert all(largest(found[2][name], found[3][name]) <= ROUNDING for name in names)
    for j in (0, 1):
        expected = stock_image(PROMPTS[1], (5, "image", 1, j))
        assert largest(found[2][f"00001_{j}.png"], expected) <= ROUNDING
    assert largest(found[2]["00001_0.png"], found[2]["00001_1.png"]) > 10


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_draw_each_image_from_its_own_generator(name, draw, tmp_path):
    """DDPM adds noise at every step, from the image's own generator."""
    words = ("--scheduler", "ddpm" if name == "DDPMScheduler" else "dpm", "--micro_batch", 3)
    found = pixels_of(draw(*words, prompts=PROMPTS[:3]), tmp_path / "out")
    expected = stock_image(PROMPTS[1], (0, "image", 1, 0), scheduler=name)
    assert largest(found["00001_0.png"], expected) <= ROUNDING


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_latents_are_never_clipped(scheduler, draw, tmp_path):
    """PNDM's file, which Stable Diffusion came with, does not say whether to clip, and both of
    diffusers' classes would. Clipping to 0.2 would be seen; to 1, in some images only."""
    words = ("--scheduler", scheduler)
    plain = pixels_of(draw(*words), tmp_path / "out")
    model = Path(shutil.copytree(TINY / "model", tmp_path / "model"))
    file = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    del settings["clip_sample"]
    settings |= {"_class_name": "PNDMScheduler", "clip_sample_range": 0.2}
    file.write_text(json.dumps(settings))
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    out = tmp_path / "clipped"
    found = pixels_of(draw(*words, "--model", model, out=out), out)
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_stable_diffusion_xl(draw, judge, tmp_path):
    """SDXL's layout, small and random: two text encoders, size conditioning."""
    model = make_xl_model(tmp_path / "xl")
    words = ("--model", model, "--scheduler", "dpm", "--scorers", f"{judge}:wide")
    found = draw(*words)
    assert found["scores"]["wide"]["initial"] == [[64.0], [64.0]]
    expected = stock_image(
        PROMPTS[1], (0, "image", 1, 0), scheduler="DPMSolverMultistepScheduler", model=model
    )
    pixels = pixels_of(found, tmp_path / "out")
    assert largest(pixels["00001_0.png"], expected) <= ROUNDING
    # A UNet of another layout is refused before anything is drawn with it.
    with pytest.raises(InputError, match="does not fit --model"):
        draw("--unet", f"{model}/unet", out=tmp_path / "none")
    assert not (tmp_path / "none" / "images").exists()


@pytest.mark.parametrize("name", ["boom", "nan", "wrong"])
def test_a_judge_is_tried_before_anything_is_drawn(name, draw, judge, tmp_path):
    with pytest.raises(InputError, match=f"judge .*:{name} "):
        draw("--scorers", f"{judge}:{name}")
    assert not (tmp_path / "out" / "images").exists()


def test_two_processes_give_the_same_report(other_unet, main, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"text": prompt} for prompt in PROMPTS]))
    words = [
        *("--model", TINY / "model", "--unet", other_unet, "--images_per_prompt", 2),
        *("--prompts", "p.json", "--prompt_column", "text", "--max_prompts", 3, "--steps", 2),
        *("--scorers", JUDGE, "--median_by", "gold_score", "--micro_batch", 4),
        *("--scheduler", "ddpm"),
    ]
    main(*words, "--out", "one", "--cache", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "eval.py", *words, "--out", "two", "--cache", "two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings = {"capture_output": True, "text": True, "env": env, "cwd": tmp_path}
    done = subprocess.run(list(map(str, command)), **settings)
    assert done.returncode == 0, done.stderr
    one = (tmp_path / "one" / "scores.json").read_bytes()
    assert one == (tmp_path / "two" / "scores.json").read_bytes()
    images = {}
    for name in ("one", "two"):
        files = (tmp_path / name).glob("images/*/*.png")
        images[name] = {file.relative_to(tmp_path / name): file.read_bytes() for file in files}
    assert len(images["one"]) == 12 and images["one"] == images["two"]
    assert list(json.loads(one)["summary"]["gold_score"]) == ["initial", "changed"]
    assert "| gold_score | changed |" in done.stdout
    assert (tmp_path / "two" / "winrate.png").exists()


# ---------------------------------------------------------------- images are kept, and never stale
def drawn_at(out, found, model="initial"):
    """{file name: inode}. A file that is drawn again is another file."""
    folder = Path(out) / "images" / found["settings"]["images"][model]
    return {file.name: file.stat().st_ino for file in folder.glob("*.png")}


def test_images_are_used_again(draw, tmp_path):
    words = ("--steps", 1, "--micro_batch", 2)
    out = tmp_path / "out"
    first = draw(*words, prompts=PROMPTS[:3])
    before = drawn_at(out, first)
    pixels = pixels_of(first, out)
    again = draw(*words, "--resume", prompts=PROMPTS[:3])
    assert again == first and drawn_at(out, again) == before and len(before) == 3
    # As if killed there: the batch is drawn whole, and no other.
    folder = out / "images" / first["settings"]["images"]["initial"]
    for name in before:
        os.link(folder / name, tmp_path / name)  # so that no inode is used again
    (folder / "00000_0.png").unlink()
    again = draw(*words, prompts=PROMPTS[:3])
    after = drawn_at(out, again)
    assert [name for name in before if after[name] == before[name]] == ["00002_0.png"]
    found = pixels_of(again, out)
    assert again == first and all(np.array_equal(found[name], pixels[name]) for name in pixels)


def test_images_are_never_stale(main, other_unet, tmp_path):
    """The same weights elsewhere, or by another way, have the same images. Everything else that
    images depend on gives others."""

    def folder_of_images(unet=None, prompts=PROMPTS[:1], **settings):
        settings = {**evaluation.PRESETS["tiny"], "steps": 1, **settings}
        cfg = evaluation.Config(**settings)
        pipe = evaluation.open_pipeline(cfg)
        return evaluation.hash_images(pipe, cfg, {"a": unet}, prompts, common.DistInfo())["a"]

    first = folder_of_images()
    elsewhere = Path(shutil.copytree(TINY / "model", tmp_path / "elsewhere"))
    assert folder_of_images(model=str(elsewhere)) == first
    assert folder_of_images(unet=str(TINY / "model")) == first
    changed = folder_of_images(unet=str(other_unet))
    shutil.copy(other_unet / "diffusion_pytorch_model.safetensors", elsewhere / "unet")
    assert folder_of_images(model=str(elsewhere)) == changed
    others = [folder_of_images(prompts=PROMPTS[1:2])]
    changes = {"seed": 1, "steps": 2, "cfg": 3.0, "scheduler": "ddpm", "precision": "bf16"}
    changes |= {"images_per_prompt": 1, "micro_batch": 1}
    others += [folder_of_images(**{name: value}) for name, value in changes.items()]
    # A part besides the UNet: the VAE's decoder
    file = elsewhere / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"decoder.conv_out.bias": state["decoder.conv_out.bias"] + 1}, file)
    others += [folder_of_images(vae=str(elsewhere / "vae"))]
    others += [folder_of_images(model=str(elsewhere))]
    assert len({first, changed, *others}) == 12


def test_existing_report_is_replaced_on_request_only(judge, main, tmp_path, capsys):
    """One line on stderr and exit code 2, as the script ends."""
    folder_of(tmp_path / "even", [(0, 0, 0)] * 2)
    file = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.json").write_text("precious")
    words = ["--images", tmp_path / "even", "--prompts", file, "--scorers", f"{judge}:bright"]
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda: main(*words, "--out", out))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "--overwrite" in said and (out / "scores.json").read_text() == "precious"
    for flag in ("--resume", "--overwrite"):
        (out / "scores.json").write_text("precious")
        main(*words, "--out", out, flag)
        assert report_in(out)["summary"]["bright"]["even"]["mean"] == 0


# ----------------------------------------------------------------------- runs, LoRAs, checkpoints
def make_run(folder, unet=None, **config):
    """A finished run's folder with its unet/ and config.json."""
    if unet:
        shutil.copytree(unet, folder / "unet")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"preset": "tiny", "data": "x", "steps": 1, "versions": {}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_lora(folder, unet, strength=1.0):
    """A LoRA of rank 2 on all query projections, as common.save_lora writes it. Returns it merged
    into the UNet, by the definition W + B A."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, layer in unet.named_modules():
        if name.endswith("to_q"):
            down = torch.randn(2, layer.in_features, generator=generator)
            up = strength * torch.randn(layer.out_features, 2, generator=generator)
            layers[f"unet.{name}.lora_A.weight"] = down
            layers[f"unet.{name}.lora_B.weight"] = up
            layer.weight.data += up @ down
    save_file(layers, folder / "pytorch_lora_weights.safetensors")
    return unet


def test_without_arguments_every_run_is_compared(other_unet, main, tmp_path, capsys):
    """Runs of any name, however their path to the model was spelled. Other things in runs/ do not
    stop it, whatever is in them."""
    (tmp_path / "link").symlink_to(TINY / "model")
    relative = os.path.relpath(TINY / "model", tmp_path)
    runs = tmp_path / "runs"
    make_run(runs / "smpo", other_unet, model=str(TINY / "model"))
    make_run(runs / "my run=1e-5", other_unet, model=f"{relative}/../model/")
    make_run(runs / "linked", other_unet, model="link")
    make_run(runs / "other", other_unet, model="another/model")
    make_run(runs / "unfinished", model=str(TINY / "model"))
    broken = ["", "{", "[]", "null", "3", '"model"', "{}", '{"model": null}', '{"model": []}']
    for i, text in enumerate([*broken, b"\xff\xfe", '{"model": "a\\u0000b"}']):
        folder = make_run(runs / f"broken{i}", other_unet)
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copytree(other_unet, runs / "no config" / "unet")
    (runs / "folder" / "config.json").mkdir(parents=True)
    main("--max_prompts", 2, "--steps", 1, "--model", relative)
    said = capsys.readouterr().err
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    named = {line.split()[1] for line in warnings}
    expected = [f"runs/broken{i}/config.json" for i in range(11)]
    assert named == {*expected, "runs/folder/config.json"}
    found = report_in("runs/eval")
    assert list(found["summary"]) == ["gold_score", "pickscore"]
    models = ["initial", "linked", "my run=1e-5", "smpo"]
    assert list(found["summary"]["pickscore"]) == models
    assert np.array(found["scores"]["pickscore"]["smpo"]).shape == (2, 2)
    kept = {folder.name for folder in (runs / "cache" / "images").iterdir()}
    assert kept == set(found["settings"]["images"].values()) and len(kept) == 2
    # A path with = in it is a path, and NAME=PATH a name.
    words = ("--max_prompts", 1, "--steps", 1, "--overwrite", "--unet")
    main(*words, "runs/my run=1e-5", f"mine={other_unet}", runs / "smpo" / "unet")
    found = report_in("runs/eval")["settings"]["unets"]
    assert list(found) == ["initial", "my run=1e-5", "mine", "smpo"]
    assert found["smpo"] == "runs/smpo/unet"


def test_a_config_that_is_no_object_beside_a_unet(draw, other_unet, tmp_path):
    texts = ("", "[]", "null", '{"unet": 3}')
    folders = [make_run(tmp_path / f"run{i}", other_unet) for i in range(len(texts))]
    for folder, text in zip(folders, texts):
        (folder / "config.json").write_text(text)
    hashes = draw("--unet", *folders, "--steps", 1)["settings"]["images"]
    assert list(hashes) == ["initial", "run0", "run1", "run2", "run3"]
    assert len(set(hashes.values())) == 2


@pytest.mark.parametrize("start", ["own", "other"])
def test_a_lora_run_is_the_stock_pipelines_lora(start, draw, other_unet, tmp_path):
    """--unet of the run's folder and of its lora/: the image is pipe.load_lora_weights's, on the
    UNet that the run was trained on. diffusers adds the LoRA's product in every forward where
    eval.py merges it once: ROUNDING."""
    unet = tiny_unet(other_unet) if start == "other" else tiny_unet()
    path = str(other_unet) if start == "other" else None
    folder = make_run(tmp_path / "runs" / "mine", model=str(TINY / "model"), unet=None)
    config = json.loads((folder / "config.json").read_text()) | {"unet": path}
    (folder / "config.json").write_text(json.dumps(config))
    merged = make_lora(folder / "lora", unet)
    if not HAS_PEFT:
        with pytest.raises(InputError, match="its LoRA cannot be loaded: .*PEFT"):
            draw("--unet", folder)
        return
    found = draw("--unet", folder, f"again={folder / 'lora'}")
    assert list(found["settings"]["unets"]) == ["initial", "mine", "again"]
    hashes = found["settings"]["images"]
    assert hashes["mine"] == hashes["again"] != hashes["initial"]
    key = (0, "image", 1, 0)
    start = path or TINY / "model" / "unet"
    image = pixels_of(found, tmp_path / "out", "mine")["00001_0.png"]
    stock = stock_image(PROMPTS[1], key, unet=tiny_unet(start), lora=folder / "lora")
    assert largest(image, stock) <= ROUNDING
    assert largest(image, stock_image(PROMPTS[1], key, unet=merged)) <= ROUNDING
    assert largest(image, stock_image(PROMPTS[1], key, unet=tiny_unet(start))) > 10
    # The pipeline's own UNet is as it was.
    image = pixels_of(found, tmp_path / "out")["00001_0.png"]
    assert largest(image, stock_image(PROMPTS[1], key)) <= ROUNDING


def test_lora_runs_are_found(draw, tmp_path):
    pytest.importorskip("peft")
    folder = make_run(tmp_path / "runs" / "mine", model=str(TINY / "model"))
    make_lora(folder / "lora", tiny_unet(), strength=0)
    found = draw("--steps", 1)["settings"]
    assert found["unets"] == {"initial": None, "mine": "runs/mine/lora"}
    # It adds nothing, so the images are the initial model's: the merged UNet is a plain one.
    assert found["images"]["mine"] == found["images"]["initial"]


def wider(layers):
    return {name: torch.cat([value, value], -1) for name, value in layers.items()}


def without_the_last(layers):
    return dict(list(layers.items())[:-1])


def not_finite(layers):
    return {name: value * torch.nan for name, value in layers.items()}


def for_text_alone(layers):
    return {f"text_encoder{name.removeprefix('unet')}": value for name, value in layers.items()}


def with_text_half(layers):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    width = 64
    half = {f"{name}A.weight": torch.ones(2, width), f"{name}B.weight": torch.ones(width, 2)}
    return layers | half


def with_a_layer_more(layers):
    more = {"unet.other.to_q.lora_A.weight": torch.ones(2, 48)}
    return layers | more | {"unet.other.to_q.lora_B.weight": torch.ones(48, 2)}


LORA_CHANGES = [wider, without_the_last, not_finite, for_text_alone, with_text_half]
LORA_CHANGES += [with_a_layer_more]


@pytest.mark.parametrize("change", LORA_CHANGES)
def test_a_lora_that_does_not_fit(change, tmp_path):
    """A UNet with a part of a LoRA, or with none, would be compared as if it were the whole."""
    pytest.importorskip("peft")
    folder = tmp_path / "lora"
    make_lora(folder, tiny_unet())
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(change(load_file(file)), file)
    pipe = evaluation.open_pipeline(evaluation.Config(**evaluation.PRESETS["tiny"]))
    with pytest.raises(InputError, match="--unet .*lora: its LoRA cannot be loaded") as error:
        evaluation.load_comparison_unet(pipe, folder)
    assert "\n" not in str(error.value)


def test_layouts_of_published_checkpoints(draw, other_unet, tmp_path):
    """A plain UNet folder, a folder with a unet/, a whole pipeline: the same weights each time."""
    plain = shutil.copytree(other_unet, tmp_path / "plain")
    inside = shutil.copytree(other_unet, tmp_path / "inside" / "unet").parent
    whole = Path(shutil.copytree(TINY / "model", tmp_path / "whole"))
    shutil.copy(other_unet / "diffusion_pytorch_model.safetensors", whole / "unet")
    hashes = draw("--unet", plain, inside, whole, "--steps", 1)["settings"]["images"]
    assert list(hashes) == ["initial", "plain", "inside", "whole"]
    assert len(set(hashes.values())) == 2 and hashes["plain"] != hashes["initial"]
    # Pickled weights are not read.
    state = load_file(plain / "diffusion_pytorch_model.safetensors")
    (plain / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, plain / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="only .safetensors files are read") as error:
        draw("--unet", plain)
    assert str(plain) in str(error.value) and "\n" not in str(error.value)


def test_a_unet_of_another_image_size_is_refused(draw, other_unet, tmp_path):
    """SD 2.1 and its base have the same UNet but for this number: it would be asked for images of
    the wrong size."""
    folder = Path(shutil.copytree(other_unet, tmp_path / "larger"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sample_size": 12}))
    with pytest.raises(InputError, match="its sample_size is 12, not 8"):
        draw("--unet", folder, out=tmp_path / "none")
    assert not (tmp_path / "none" / "images").exists()


def test_prompts_of_every_kind_are_drawn(draw, rows, make_set, tmp_path):
    """MJHQ-30K's object, and several files one after the other."""
    content = {f"{i:040x}": {"category": "x", "prompt": p} for i, p in enumerate(PROMPTS[:2])}
    file = tmp_path / "meta_data.json"
    file.write_text(json.dumps(content))
    words = ("--steps", 1, "--prompt_column", "prompt", "--prompts", file)
    assert draw(*words)["prompts"] == PROMPTS[:2]
    words = ("--steps", 1, "--prompts", write_prompts(tmp_path / "p.txt", PROMPTS[:1]))
    found = draw(*words, make_set(rows[:3]), "--max_prompts", 3)
    assert found["prompts"] == [PROMPTS[0], *(row["caption"] for row in rows[:2])]


# ------------------------------------------------------------------------- folders of images
def touch(folder, names):
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


GOOD_NAMES = {
    "from 0": ([f"{i}.png" for i in range(12)], 4),
    "from 1": ([f"{i}.JPG" for i in range(1, 13)], 4),
    "a constant number": ([f"sd15_{i:04d}.webp" for i in range(12)], 12),
    "prompt and image": ([f"{i:05d}_{j}.png" for i in range(4) for j in range(3)], 4),
    "prompt and image from 1": ([f"p{i} ({j}).jpeg" for i in range(1, 5) for j in (1, 2)], 4),
    "one prompt": ([f"0_{j}.png" for j in range(3)], 1),
    "one image": (["picture.png"], 1),
}


@pytest.mark.parametrize("case", GOOD_NAMES)
def test_names_of_images(case, tmp_path):
    names, prompts = GOOD_NAMES[case]  # in the right order
    folder = touch(tmp_path / "images", sorted(names))
    (folder / "notes.txt").touch()
    found = evaluation.read_images(folder, ["a prompt"] * prompts)
    assert [len(row) for row in found] == [len(names) // prompts] * prompts
    assert [file.name for row in found for file in row] == names


BAD_NAMES = {
    "a gap": ([*(f"{i}.png" for i in range(7)), "8.png"], 4),
    "begins at 2": ([f"{i}.png" for i in range(2, 6)], 4),
    "a gap in two numbers": (["0_0.png", "0_1.png", "1_0.png", "1_2.png"], 2),
    "one prompt has more": (["0_0.png", "0_1.png", "0_2.png", "1_0.png"], 2),
    "twice": (["0.png", "1.png", "2.png", "2.jpg"], 2),
    "no numbers": (["a.png", "b.png"], 2),
    "other prompts": ([f"{i}_{j}.png" for i in range(2) for j in range(4)], 4),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_images_that_would_shift_are_refused(case, tmp_path):
    names, prompts = BAD_NAMES[case]
    folder = touch(tmp_path / "images", names)
    with pytest.raises(InputError, match="gaps, are there twice, or do not fit the prompts"):
        evaluation.read_images(folder, ["a prompt"] * prompts)


def test_folders_that_cannot_be_compared(main, judge, tmp_path):
    file = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    words = ("--prompts", file, "--scorers", f"{judge}:bright", "--out", "out", "--images")
    two = folder_of(tmp_path / "two", [(0, 0, 0)] * 2)
    four = folder_of(tmp_path / "four", [(0, 0, 0)] * 4)
    for folders in ((two, four), (two, "two/.")):
        with pytest.raises(InputError, match="different names and equally many images"):
            main(*words, *folders)
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------- report
def test_report_numbers_and_median_rule(judge, main, tmp_path):
    """Three prompts x three images: colours are the scores, so that all numbers are known."""
    same = [(40, 0, 0), (50, 0, 0), (60, 0, 0)]  # the third prompt ties
    first = [(10, 0, 50), (20, 0, 10), (30, 0, 20), (5, 0, 5), (7, 0, 90), (9, 0, 9), *same]
    second = [(11, 0, 99), (20, 0, 10), (29, 0, 0), (6, 0, 0), (8, 0, 0), (1, 0, 0), *same]
    words = [
        *("--images", folder_of(tmp_path / "dark", first), folder_of(tmp_path / "light", second)),
        *("--prompts", write_prompts(tmp_path / "p.txt", PROMPTS[:3]), "--out", "out"),
        *("--scorers", f"{judge}:red,{judge}:bright"),
    ]
    main(*words)
    found = report_in("out")
    red = np.array(found["scores"]["red"]["dark"]) * 255
    assert np.allclose(red, [[10, 20, 30], [5, 7, 9], [40, 50, 60]], atol=1e-4)
    summary = found["summary"]["red"]["dark"]
    assert summary["mean"] * 255 == pytest.approx(231 / 9)
    assert summary["median"] * 255 == pytest.approx(20)
    error = np.std([20, 7, 50], ddof=1) / 3**0.5
    assert summary["standard_error"] * 255 == pytest.approx(error)
    win = found["win_rates"]["red"]["light"]["dark"]  # 3 wins, 4 ties, 2 losses
    assert win["win"] == pytest.approx(5 / 9) and win["tie"] == pytest.approx(4 / 9)
    assert win["win_strict"] == pytest.approx(3 / 9)
    assert found["win_rates"]["red"]["dark"]["light"]["win"] == pytest.approx(4 / 9)
    assert list(found) == [
        *("settings", "versions", "scorers", "left_out", "summary", "win_rates", "prompts"),
        "scores",
    ]
    assert "| red | light over dark | | | 55.6% (" in Path("out/scores.md").read_text()

    # The dot of the chart's first line, and the line at 50 %
    chart = Image.open("out/winrate.png").convert("RGB")
    assert chart.getpixel((340 + round(500 * 5 / 9), 67)) != (255, 255, 255)
    assert chart.getpixel((590, 80)) == (0, 0, 0)
    # 32 px images fivefold, dark left, light right
    sheet = Image.open("out/samples.png")
    assert sheet.getpixel((12 + 80, 30 + 80)) == (10, 0, 50)
    assert sheet.getpixel((12 + 166 + 80, 30 + 80)) == (11, 0, 99)

    # Which image counts: red + blue is dark (60, 30, 50), (10, 97, 18): the third, the third; light
    # (110, 30, 29), (6, 8, 1): the second, the first; and for both the second of the third prompt.
    main(*words, "--median_by", "bright", "--overwrite")
    found = report_in("out")
    assert found["summary"]["red"]["dark"]["mean"] * 255 == pytest.approx((30 + 9 + 50) / 3)
    assert found["summary"]["red"]["light"]["mean"] * 255 == pytest.approx((20 + 6 + 50) / 3)
    assert found["win_rates"]["red"]["light"]["dark"]["win_strict"] == 0
    assert np.array(found["scores"]["red"]["dark"]).shape == (3, 3)  # all scores are kept
    assert found["settings"]["median_by"] == "bright"
    assert {"torch", "commit"} <= set(found["versions"])


def test_the_median_of_an_even_number_is_the_lower(main, judge, tmp_path):
    colours = [(k, 0, 0) for k in (40, 10, 30, 20)]
    file = write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    words = ("--images", folder_of(tmp_path / "four", colours), "--prompts", file, "--out", "out")
    main(*words, "--scorers", f"{judge}:red", "--median_by", "red")
    found = report_in("out")["summary"]["red"]["four"]
    assert found["mean"] * 255 == pytest.approx(20, abs=1e-4) and found["standard_error"] == 0


DARK_BLUE = (31, 95, 180)  # the moving average


def columns_of(picture, colour, box):
    """The x coordinates in a box at which a picture has a colour."""
    pixels = np.asarray(picture.crop(box))
    return set((pixels == colour).all(2).any(0).nonzero()[0] + box[0])


def test_curves_with_nulls(tmp_path):
    """fp16's first steps have infinite gradients, which the log has as null: they are left out, and
    so is a value that is always null. The last step counts also where its value is null."""
    lines = [
        {"step": k, "loss": 0.5, "grad_norm": None if k < 10 else 1.0, "margin": None}
        for k in range(21)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.draw_curves(tmp_path)
    curves = Image.open(tmp_path / "curves.png").convert("RGB")
    assert curves.size == (1160, 290)  # one line of panels
    panels = [(70 + 380 * k, 45, 370 + 380 * k, 210) for k in range(3)]
    found = [columns_of(curves, DARK_BLUE, box) for box in panels]
    assert min(found[0]) <= 72 and max(found[0]) >= 368
    # Steps 10 to 20 of 0 to 20: the right half
    assert min(found[1]) == pytest.approx(450 + 150, abs=3) and max(found[1]) >= 748
    assert not found[2]


@pytest.mark.parametrize("text", [None, "", '{"step": 0, "loss": null}\n'])
def test_no_curves_without_values(text, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    evaluation.draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_curves_of_a_single_step(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 0.7, "margin": -0.0}\n')
    evaluation.draw_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (1160, 290)


# ------------------------------------------------------------------------- scores of pair sets
def brightness(row, side):
    return np.asarray(common.decode_image(row[f"jpg_{side}"])).mean() / 255


def test_pair_set_scores(judge, main, rows, make_set, tmp_path):
    """NaN where an image does not decode. What had the name before is replaced on request only, and
    by the scores of the set that was given."""
    rows = [dict(row) for row in rows[:7]]
    rows[2]["jpg_1"] = b"no image"
    rows[6]["label_0"] = 0.5  # ties are scored too
    out = tmp_path / "scores.safetensors"
    words = ("--scores_out", out, "--cache", "cache", "--scorers", f"{judge}:bright", "--data")
    main(*words, make_set(rows))
    found = load_file(out)
    assert set(found) == {"score_0", "score_1", "key_0", "key_1"}
    for side in (0, 1):
        expected = [brightness(row, side) if row != rows[2] else None for row in rows]
        expected[2] = np.nan if side else brightness(rows[2], 0)
        assert found[f"score_{side}"].dtype == torch.float32
        # sums of 12,288 bytes in fp64, then one rounding to fp32
        assert np.allclose(found[f"score_{side}"], expected, rtol=1e-6, equal_nan=True)
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["scorer"].endswith("judge.py:bright") and about["unit"] == "the judge's own unit"
    assert about["data"].endswith("set.parquet")

    # The same file for another scorer, then for another set
    other = make_set(rows[3:6], "other.parquet")
    with pytest.raises(InputError, match="exists: --overwrite"):
        main(*words, other)
    assert torch.equal(load_file(out)["key_0"], found["key_0"])
    main(*words, make_set(rows), "--scorers", f"{judge}:red", "--overwrite")
    red = np.asarray(common.decode_image(rows[0]["jpg_0"]))[..., 0].mean() / 255
    assert load_file(out)["score_0"][0].item() == pytest.approx(red, rel=1e-6)
    main(*words, other, "--overwrite")
    again = load_file(out)
    assert all(torch.equal(again[name], found[name][3:6]) for name in found)
    # So is the same name of a set that changed.
    make_set(rows[::-1])
    main(*words, make_set(rows[::-1]), "--overwrite")
    again = load_file(out)
    for name in found:
        assert torch.equal(again[name].nan_to_num(), found[name].flip(0).nan_to_num())


def test_what_is_refused_leaves_the_scores_alone(judge, main, rows, make_set, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    data = Path(make_set(rows[:3]))
    content = data.read_bytes()
    shard = Path(shutil.copy(data, folder / "train-0.parquet"))
    out = tmp_path / "scores.safetensors"
    out.write_text("precious")
    bright = f"{judge}:bright"
    words = ("--overwrite", "--cache", "cache", "--scores_out")
    cases = [
        ((out, "--data", "nowhere", "--scorers", bright), "--data nowhere does not exist"),
        ((out, "--data", data, "--scorers", f"{judge}:nan"), "0 finite values"),
        ((out, "--data", data, "--scorers", "clip=nowhere/CLIP"), "nowhere/CLIP"),
        ((out, "--data", data, "--scorers", f"{bright},{judge}:red"), "one of --scorers"),
        ((data, "--data", data, "--scorers", bright), "is --data itself"),
        ((tmp_path / "link", "--data", "set.parquet", "--scorers", bright), "is --data itself"),
        ((tmp_path, "--data", data, "--scorers", bright), "a folder"),
        ((shard, "--data", folder, "--scorers", bright), "--scores_out .*train-0.parquet"),
        ((shard, "--data", f"{folder}:train", "--scorers", bright), "--scores_out .*train-0"),
        ((out, "--scorers", bright), "--data, --scores_out"),
    ]
    (tmp_path / "link").symlink_to(data)
    for flags, message in cases:
        with pytest.raises(InputError, match=message):
            main(*words, *flags)
        assert out.read_text() == "precious"
        assert data.read_bytes() == shard.read_bytes() == content
    with pytest.raises(InputError, match="--data, --scores_out"):
        main("--data", data, "--scorers", bright)


@pytest.fixture
def counting(tmp_path):
    """A judge that writes down its calls: counting() -> how many images each was given, since the
    last time that it was asked."""
    file = tmp_path / "counting.py"
    calls = tmp_path / "calls.txt"
    file.write_text(
        "import numpy as np\n"
        "def bright(images, prompts):\n"
        f"    print(len(images), file=open({str(calls)!r}, 'a'))\n"
        "    means = [np.asarray(image).mean() / 255 for image in images]\n"
        "    return [mean + len(prompt) for mean, prompt in zip(means, prompts)]\n"
    )

    def count():
        found = calls.read_text().split() if calls.exists() else []
        calls.write_text("")
        return [int(number) for number in found]

    count.name = f"{file}:bright"
    return count


def test_an_item_is_scored_once(counting, main, rows, make_set, tmp_path):
    """16 images under one caption stand in 240 pairs: a single batch. Under another caption an
    image is another item."""
    images = [row["jpg_0"] for row in rows[:16]]
    pairs = [
        {"caption": "a star", "jpg_0": a, "jpg_1": b, "label_0": 1.0}
        for a in images
        for b in images
        if a != b
    ]
    words = ("--scorers", counting.name, "--cache", "cache", "--overwrite")
    main(*words, "--data", make_set(pairs), "--scores_out", "a.safetensors")
    assert counting() == [16] and len(pairs) == 240
    found = load_file("a.safetensors")
    expected = [brightness(row, 0) + 6 for row in pairs]
    assert np.allclose(found["score_0"], expected, rtol=1e-6)
    # A set of known items asks for nothing; one more caption is one more item.
    main(*words, "--data", make_set(pairs[::7]), "--scores_out", "b.safetensors")
    assert counting() == []
    assert torch.equal(load_file("b.safetensors")["score_1"], found["score_1"][::7])
    more = [*pairs[:3], pairs[0] | {"caption": "a ring on it"}]
    main(*words, "--data", make_set(more), "--scores_out", "b.safetensors")
    assert counting() == [16]  # two items, repeated: a batch always has that size
    again = load_file("b.safetensors")
    assert again["score_0"][3].item() == pytest.approx(brightness(more[3], 0) + 12, rel=1e-6)
    assert torch.equal(again["score_0"][:3], found["score_0"][:3])


def test_a_killed_scoring_goes_on(counting, main, make_set, tmp_path):
    """300 items are two shards. Killed just before the second has its name, the first is kept."""
    import pyarrow.parquet as pq

    table = pq.read_table(TINY / "pairs" / "train.parquet").slice(0, 150)
    data = make_set(table.to_pylist())
    words = ["--data", data, "--scorers", counting.name, "--cache", str(tmp_path / "cache")]
    words += ["--scores_out", str(tmp_path / "scores.safetensors")]
    kill_at = ("os.rename", "*/scores-*/*.safetensors", 2)
    child = Child("eval", words, tmp_path / "log.txt", kill_at=kill_at)
    assert child.wait() == -signal.SIGKILL, child.output
    assert not (tmp_path / "scores.safetensors").exists()
    before = counting()
    assert before == [16] * 19  # 300 items
    main(*words)
    assert counting() == [16] * 3  # the last 44
    assert len(load_file(tmp_path / "scores.safetensors")["score_0"]) == 150
    main(*words, "--overwrite")
    assert counting() == []


class Watcher(evaluation.Scorer):
    """Counts how many of the decoded pictures are alive at once."""

    unit = "px"
    parts = ("watcher",)

    def __init__(self):
        self.seen = []
        self.most = 0

    def prepare(self, image):
        self.seen.append(weakref.ref(image))
        self.most = max(self.most, sum(ref() is not None for ref in list(self.seen)))
        return image.width

    def compute(self, prepared, prompts):
        return [float(width) for width in prepared]


def test_few_pictures_are_in_memory_at_once(rows, make_set, tmp_path):
    """Each of the 4 threads that decode and prepare holds one, and one at most that it has not let
    go of yet: not the 128 of the set, nor the 32 that wait for the model."""
    cfg = evaluation.Config(data=make_set(rows), cache=str(tmp_path / "cache"))
    dist_info = common.DistInfo()
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS)
    watcher = Watcher()
    scores = evaluation.score_pairs(table, watcher, cfg.cache, "watched", dist_info)
    assert (scores["score_0"] == 64).all()
    assert len(watcher.seen) == 128 and watcher.most <= 8
    # Images of a comparison
    files = folder_of(tmp_path / "images", [(k, k, k) for k in range(60)])
    files = evaluation.read_images(files, PROMPTS[:2])
    watcher = Watcher()
    cfg.micro_batch = 8
    found = evaluation.score_files(watcher, files, PROMPTS[:2], cfg, dist_info, "watched")
    assert np.array_equal(found, np.full((2, 30), 32))
    assert len(watcher.seen) == 60 and watcher.most <= 8


def test_scores_files_that_are_none(rows, main, judge, make_set, tmp_path):
    data = make_set(rows[:3])
    words = ("--data", data, "--scorers", f"{judge}:bright", "--scores_out", "good.safetensors")
    main(*words, "--cache", "cache")
    good = evaluation.load_scores("good.safetensors")
    written = load_file("good.safetensors")
    assert good.keys() == written.keys()
    assert all(torch.equal(good[name], written[name]) for name in good)
    changes = {
        "no keys": {"key_0": None},
        "another type": {"score_1": good["score_1"].double()},
        "another length": {"score_1": good["score_1"][:2]},
        "another shape": {"score_0": good["score_0"][:, None]},
        "keys are numbers": {"key_1": good["key_1"].float()},
        "no number": {"score_0": good["score_0"] * np.nan, "score_1": good["score_1"] * np.inf},
    }
    for name, change in changes.items():
        content = {k: v for k, v in (good | change).items() if v is not None}
        save_file(content, f"{name}.safetensors")
        with pytest.raises(InputError, match=f"--scores {name}.safetensors"):
            evaluation.load_scores(f"{name}.safetensors")
    with pytest.raises(InputError, match="no scores file"):
        evaluation.load_scores(data)


# --------------------------------------------------------------------- a run's check and evaluation
def run_config(out, prompts, **settings):
    """What a method's command line would give for a tiny run."""
    preset = {**common.tiny_preset("x"), "out": str(out), "prompts": str(prompts), **settings}
    return evaluation.RewardConfig(steps=1, batch=2, micro_batch=2, lr=1e-5, **preset)


BEFORE_TRAINING = {
    "steps": ({"eval_steps": 1001}, "--eval_steps must be at most the scheduler's 1000"),
    "judge": ({"judge": "nowhere.py:f"}, "there is no file nowhere.py"),
    "function": ({"judge": "JUDGE:f"}, "has no function f"),
    "boom": ({"judge": "JUDGE:boom"}, "raises ZeroDivisionError"),
    "nan": ({"judge": "JUDGE:nan"}, "0 finite values for 2 images"),
    "one number for all": ({"judge": "JUDGE:wrong"}, "1 finite values for 2 images"),
    "words": ({"judge": "JUDGE:words"}, "raises "),
    "prompts": ({"prompts": "nowhere.txt"}, "nowhere.txt"),
}


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_errors_of_the_evaluation_come_before_the_training(case, judge, tmp_path):
    """Whole runs with such settings are in test_runs.py."""
    settings, message = BEFORE_TRAINING[case]
    settings = {name: str(value).replace("JUDGE", str(judge)) for name, value in settings.items()}
    if "eval_steps" in settings:
        settings["eval_steps"] = int(settings["eval_steps"])
    settings = {"prompts": write_prompts(tmp_path / "p.txt", PROMPTS), **settings}
    cfg = run_config(tmp_path / "out", **settings)
    with pytest.raises(InputError, match=message) as error:
        evaluation.test_run_judge(cfg)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    cfg.eval_prompts = 0  # there will be no evaluation, and nothing to complain of
    evaluation.test_run_judge(cfg)


def test_too_many_steps_are_refused_by_a_run_and_by_eval(draw, rows, make_set, tmp_path):
    import dpo_baseline

    words = ["--data", make_set(rows[:4]), "--out", str(tmp_path / "run"), "--eval_steps", "1001"]
    with pytest.raises(InputError, match="--eval_steps must be at most"):
        dpo_baseline.main([*words, "--cache", str(tmp_path / "cache")])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="--steps must be at most the scheduler's 1000"):
        draw("--steps", 1001)


def test_a_judge_is_tried_on_the_runs_own_size(judge, tmp_path):
    """With a blank image of --resolution and a prompt that it will meet."""
    file = tmp_path / "strict.py"
    file.write_text(
        "def f(images, prompts):\n"
        "    assert images[0].size == (64, 64) and images[0].mode == 'RGB', images[0].size\n"
        f"    assert set(prompts) == {{{PROMPTS[0]!r}}}, prompts\n"
        "    return [0.0] * len(images)\n"
    )
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS)
    evaluation.test_run_judge(run_config(tmp_path / "out", prompts, judge=f"{file}:f"))
    with pytest.raises(InputError, match=r"raises AssertionError: \(72, 72\)"):
        settings = {"judge": f"{file}:f", "resolution": 72}
        evaluation.test_run_judge(run_config(tmp_path / "out", prompts, **settings))


@pytest.mark.parametrize(
    "images, prompts, expected", [(256, 128, (128, 2)), (200, 128, (100, 2)), (8, 128, (8, 1))]
)
def test_images_of_the_final_evaluation(images, prompts, expected, tmp_path):
    file = write_prompts(tmp_path / "p.txt", [f"prompt {i}" for i in range(prompts)])
    cfg = run_config(tmp_path, file, eval_prompts=images)
    found, each = evaluation.evaluation_prompts(cfg)
    assert (len(found), each) == expected and found[-1] == f"prompt {len(found) - 1}"


def test_the_final_evaluation_and_eval_draw_the_same_once(main, other_unet, tmp_path):
    """A run's last act compares the initial model with the trained one. `python eval.py` afterwards
    has the same images, and draws none."""
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    run = make_run(tmp_path / "runs" / "mine", other_unet, model=str(TINY / "model"))
    (run / "log.jsonl").write_text('{"step": 0, "loss": 0.7}\n')
    cfg = run_config("runs/mine", prompts, cache="runs/cache", eval_prompts=4, eval_steps=2)
    evaluation.final_evaluation(cfg)
    found = report_in(run)
    assert list(found["scores"]["gold_score"]) == ["initial", "trained"]
    assert np.array(found["scores"]["gold_score"]["trained"]).shape == (2, 2)
    assert (run / "samples.png").exists() and (run / "curves.png").exists()
    folders = tmp_path / "runs" / "cache" / "images"
    before = {file: file.stat().st_ino for file in folders.glob("*/*")}
    main("--prompts", prompts, "--steps", 2)
    again = report_in("runs/eval")
    names = {"initial": "initial", "trained": "mine"}
    for trained, mine in names.items():
        for key in ("scores", "summary"):
            assert again[key]["gold_score"][mine] == found[key]["gold_score"][trained]
    assert {file: file.stat().st_ino for file in folders.glob("*/*")} == before
    assert len(before) == 8
    # Without --eval_prompts the curves are all.
    cfg = run_config(tmp_path / "runs" / "plain", prompts, eval_prompts=0)
    Path(cfg.out).mkdir()
    shutil.copy(run / "log.jsonl", cfg.out)
    evaluation.final_evaluation(cfg)
    assert {file.name for file in Path(cfg.out).iterdir()} == {"log.jsonl", "curves.png"}


# --------------------------------------------------------------------------------- bad input
BAD = {
    "prompts": (("--prompts", "nowhere.txt"), "nowhere.txt"),
    "empty": (("--prompts", "EMPTY"), "has no prompts"),
    "column": (("--prompts", "JSON", "--prompt_column", "words"), "words"),
    "scorer": (("--scorers", "pickscroe"), "unknown scorer pickscroe; known: pickscore, clip"),
    "no scorer": (("--scorers", ""), "unknown scorer ;"),
    "judge": (("--scorers", "nowhere.py:f"), "there is no file nowhere.py"),
    "function": (("--scorers", "JUDGE:f"), "no function f"),
    "part": (("--scorers", "clip", "--scorer_paths", "clip.head=x"), "no part head"),
    "paths": (("--scorers", "clip", "--scorer_paths", "clip"), "NAME=PATH"),
    "path of none": (("--scorers", "clip", "--scorer_paths", "clop=x"), "NAME=PATH"),
    "one name": (("--scorers", "JUDGE:bright,./JUDGE:bright"), "two judges have one name"),
    "images": (("--images", "nowhere"), "0 images do not divide"),
    "odd": (("--images", "ODD"), "3 images do not divide among 2 prompts"),
    "undecodable": (("--images", "BROKEN"), "0.png does not decode"),
    "later one": (("--images", "LATER"), "1.png does not decode"),
    "few": (("--scorers", "JUDGE:wrong", "--images", "EVEN"), "1 finite values for 2 images"),
    "nan": (("--scorers", "JUDGE:nan", "--images", "EVEN"), "0 finite values"),
    "boom": (("--scorers", "JUDGE:boom", "--images", "EVEN"), "raises ZeroDivisionError"),
    "words": (("--scorers", "JUDGE:words", "--images", "EVEN"), "raises "),
    "model": (("--model", "nowhere/at/all"), "nowhere/at/all"),
    "no model": (("--model", ""), "--model is missing"),
    "unet": (("--unet", "nowhere/unet/x"), "--unet nowhere/unet/x does not exist"),
    "unet on the hub": (("--unet", "some/one"), "the unet of some/one cannot be loaded"),
    "one unet twice": (("--unet", "a/unet", "a/unet"), "two UNets are called a"),
    "initial": (("--unet", "initial=x"), "two UNets are called initial"),
    "median": (("--median_by", "clip", "--images", "EVEN"), "clip is not one of bright"),
    "pairs": (("--data", "nowhere"), "--scores_out"),
    "range": (("--images_per_prompt", "0"), "--images_per_prompt must be >0, it is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, judge, main, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS[:2]))
    (tmp_path / "objects.json").write_text('[{"caption": "x"}]')
    (tmp_path / "empty.txt").write_text("\n")
    names = {"EMPTY": "empty.txt", "JSON": "objects.json"}
    for name, count in (("odd", 3), ("even", 2), ("broken", 2), ("later", 2)):
        names[name.upper()] = folder_of(tmp_path / name, [(0, 0, 0)] * count)
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    (tmp_path / "later" / "1.png").write_bytes(b"no image")
    flags, message = BAD[case]
    words = [str(names.get(word, word)).replace("./JUDGE", "./judge.py") for word in flags]
    words = [word.replace("JUDGE", str(judge)) for word in words]
    defaults = {"--prompts": "p.json", "--scorers": f"{judge}:bright", "--model": TINY / "model"}
    words += [x for k, v in defaults.items() if k not in words for x in (k, v)]
    with pytest.raises(InputError) as error:
        main(*words, "--out", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("flag, value", [("--scheduler", "pndm"), ("--precision", "fp8")])
def test_choices(flag, value, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flag, value)
    assert stop.value.code == 2 and f"invalid choice: '{value}'" in capsys.readouterr().err
