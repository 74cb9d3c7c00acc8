"""Data in all its forms: image formats, the folders people keep pairs in, captions, a set larger than the
memory, and files that would run code if they were trusted."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from child import Child
from conftest import ROOT, TINY
from PIL import Image, ImageOps

import common
import dpo_baseline
import dro
import eval as evaluation
import smpo

SIDE = 24


# ------------------------------------------------------------------------------------------------ images
def ramp():
    """A smooth picture as (SIDE, SIDE, 3) uint8: red grows to the right, green downwards, blue stays."""
    grow = np.linspace(20, 220, SIDE)
    picture = np.stack(np.broadcast_arrays(grow[None], grow[:, None], 90.0), -1)
    return picture.astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def alpha():
    return np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))


def on_white(picture):
    share = alpha()[..., None] / 255
    return picture * share + 255 * (1 - share)


def images():
    """name: (bytes, the RGB picture they stand for, how far off it may be)."""
    rgb, grey = ramp(), ramp()[..., 0]
    image, luma = Image.fromarray(rgb), Image.fromarray(grey)
    greys = np.repeat(grey[..., None], 3, 2)
    transparent, veiled = image.copy(), luma.copy()
    transparent.putalpha(Image.fromarray(alpha()))
    veiled.putalpha(Image.fromarray(alpha()))
    palette = image.quantize(64)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    hole = Image.new("P", (SIDE, SIDE), 1)
    hole.putpalette([0, 0, 0, 200, 30, 60])
    hole.putpixel((2, 3), 0)
    holed = np.tile(np.array([200, 30, 60]), (SIDE, SIDE, 1))
    holed[3, 2] = 255
    frames = {"save_all": True, "append_images": [ImageOps.invert(image)] * 2, "duration": 50}
    return {
        "jpg": (encoded(image, "JPEG", quality=95), rgb, 8),
        "png": (encoded(image, "PNG"), rgb, 0),
        "webp": (encoded(image, "WEBP", lossless=True), rgb, 0),
        "grey jpg": (encoded(luma, "JPEG", quality=95), greys, 6),
        "L": (encoded(luma, "PNG"), greys, 0),
        "1": (encoded(Image.fromarray(grey > 99), "PNG"), (greys > 99) * 255, 0),
        "LA": (encoded(veiled, "PNG"), on_white(greys), 1),
        "P": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB")), 0),
        "P with a hole": (encoded(hole, "PNG", transparency=0), holed, 0),
        "RGBA": (encoded(transparent, "PNG"), on_white(rgb), 1),
        "RGBA webp": (encoded(transparent, "WEBP", lossless=True, exact=True), on_white(rgb), 1),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG", quality=95), rgb, 8),
        "16 bits": (encoded(deep, "PNG"), greys, 0),
        "16 bits tiff": (encoded(deep, "TIFF"), greys, 0),
        "exif": (encoded(image, "JPEG", quality=95, exif=exif.tobytes()), np.rot90(rgb, -1), 8),
        "gif": (encoded(palette, "GIF", **frames), np.asarray(palette.convert("RGB")), 12),
        "animated webp": (encoded(image, "WEBP", lossless=True, **frames), rgb, 0),
        "animated png": (encoded(image, "PNG", **frames), rgb, 0),
    }


@pytest.mark.parametrize("name", images())
def test_every_kind_of_image(name):
    data, wanted, off = images()[name]
    found = np.asarray(common.decode_image(data), dtype=int)
    assert found.shape == (SIDE, SIDE, 3) and np.abs(found - wanted).max() <= off + 0.5


def bomb():
    """A PNG of a few bytes that says it is 60,000 x 60,000."""
    data = encoded(Image.new("L", (8, 8)), "PNG")
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


WHOLE = encoded(Image.fromarray(ramp()), "PNG")
BROKEN = {"cut": WHOLE[: len(WHOLE) // 2], "bomb": bomb(), "text": b"<html>", "empty": b""}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_decode_is_none(name):
    assert common.decode_image(BROKEN[name]) is None


# ------------------------------------------------------------------------------------------------ sets
@pytest.fixture
def losses(tmp_path, log_of):
    """losses(data, more flags) -> the losses of two steps of DPO on this data."""
    made = []

    def run(data, *more, method=dpo_baseline):
        made.append(tmp_path / f"run-{len(made)}")
        method.main([
            "--steps", "2", "--batch", "8", "--micro_batch", "8", "--eval_prompts", "0", "--data", str(data),
            "--out", str(made[-1]), "--cache", str(tmp_path / "cache"), *more,
        ])  # fmt: skip
        return [line["loss"] for line in log_of(made[-1])]

    return run


def pick_a_pic(rows):
    """Rows with the columns that Pick-a-Pic v2 has besides."""
    more = {"are_different": True, "has_label": True, "model_0": "a", "model_1": "b", "ranking_id": 3,
            "image_0_url": "https://nowhere", "created_at": "2023", "user_id": 7}  # fmt: skip
    return [row | more | {"label_1": 1 - row["label_0"]} for row in rows]


def write_images(rows, folder, line):
    """An image folder: the images of rows, and a metadata.jsonl of line(row number, row)."""
    folder.mkdir()
    for i, row in enumerate(rows):
        for name in common.PAIR:
            (folder / f"{i}_{name}.png").write_bytes(row[name])
    text = "".join(json.dumps(line(i, row)) + "\n" for i, row in enumerate(rows))
    (folder / "metadata.jsonl").write_text(text)
    return folder


def pair_line(i, row):
    files = {f"{name}_file_name": f"{i}_{name}.png" for name in common.PAIR}
    return files | {"label_0": row["label_0"], "caption": row["caption"]}


def test_the_same_pairs_in_every_form(losses, rows, make_set, tmp_path, monkeypatch, capsys):
    """A file, Pick-a-Pic's shards, an image folder, a folder that looks like a hub id, a hub id."""
    import datasets

    rows = rows[:20]
    wanted = losses(make_set(rows))
    shards = tmp_path / "owner" / "name"
    shards.mkdir(parents=True)
    for i in range(0, 20, 7):
        part = datasets.Dataset.from_list(pick_a_pic(rows)[i : i + 7])
        part.to_parquet(shards / f"train-{i:05d}-of-3.parquet")
    datasets.Dataset.from_list(pick_a_pic(rows)[:3]).to_parquet(shards / "test-00000-of-1.parquet")
    folder = write_images(rows, tmp_path / "folder", pair_line)
    assert losses(shards) == wanted and losses(folder) == wanted
    monkeypatch.chdir(tmp_path)
    assert losses("owner/name") == wanted  # a folder, relative

    # No hub here: what load_dataset is asked for is checked, and the shards stand in for its answer.
    asked, real = [], datasets.load_dataset

    def hub(path, **options):
        asked.append((path, options))
        return real("parquet", data_files=str(shards / "train*.parquet"), **options)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert losses("someone/pairs") == wanted
    assert {(path, options["split"]) for path, options in asked} == {("someone/pairs", "train")}


@pytest.mark.parametrize("cache", [[], ["--cache", ""]])
def test_rows_nobody_labelled_are_left_out(cache, losses, rows, make_set, capsys):
    labelled = [dict(row, label_0=1.0) for row in rows[:16]]
    more = [dict(row, has_label=i < 12, label_0=None if i == 15 else 1.0) for i, row in enumerate(labelled)]
    losses(make_set(more), *cache)
    assert "12 of 16 rows can be used" in capsys.readouterr().out


def test_single_images_in_a_folder(losses, rows, make_set, tmp_path):
    singles = [{"caption": row["caption"], "image": row["jpg_0"]} for row in rows[:16]]

    def line(i, row):
        return {"file_name": f"{i}_jpg_0.png", "caption": row["caption"]}

    folder = write_images(rows[:16], tmp_path / "folder", line)
    for i in range(16):
        (folder / f"{i}_jpg_1.png").unlink()
    for method, more in ((dpo_baseline, ["--sft"]), (dro, ["--rollout_steps", "5"])):
        wanted = losses(make_set(singles), *more, method=method)
        assert losses(folder, *more, method=method) == wanted


def test_hpdv3_by_the_lines_in_the_readme(losses, rows, make_set, tmp_path, monkeypatch):
    """Its JSON is a list of prompt, path1 (preferred), path2."""
    rows = [dict(row, label_0=1.0) for row in rows[:16]]
    folder = write_images(rows, tmp_path / "hpdv3", pair_line)
    (folder / "metadata.jsonl").unlink()
    content = [{"prompt": row["caption"], "path1": f"{i}_jpg_0.png", "path2": f"{i}_jpg_1.png", "model1": "x",
                "confidence": 0.9} for i, row in enumerate(rows)]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(content))
    code = re.search(r"```python\n(import json\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.strip().split("\n")) == 5
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert losses(folder) == losses(make_set(rows))


@pytest.mark.parametrize("cache", [[], ["--cache", ""]])
def test_captions_of_every_kind(cache, losses, rows, make_set):
    """Of a list the first; empty and endless ones are captions too."""
    captions = [["a red star", "something else"], ["", "x"], ["word " * 500]]
    lists = [row | {"caption": captions[i % 3]} for i, row in enumerate(rows[:12])]
    texts = [row | {"caption": captions[i % 3][0]} for i, row in enumerate(rows[:12])]
    assert losses(make_set(lists), *cache) == losses(make_set(texts, "texts.parquet"), *cache)


@pytest.mark.parametrize("source", ["cache", "no cache", "scoring"])
@pytest.mark.parametrize("caption, words", [(None, "None"), ([], r"\[\]")])
def test_a_caption_that_is_no_text_names_its_row(source, caption, words, losses, rows, make_set):
    """Not the first row's: that one is seen when the set is opened."""
    lists = [row | {"caption": [row["caption"]] if caption == [] else row["caption"]} for row in rows[:12]]
    lists[9]["caption"] = caption
    method = dro if source == "scoring" else dpo_baseline
    with pytest.raises(common.InputError, match=f"caption of row 9 .from 0. is no text: {words}"):
        losses(make_set(lists), *(["--cache", ""] if source == "no cache" else []), method=method)


def test_16_bit_and_transparent_pairs_train(losses, rows, make_set):
    """A run over all kinds of images, and over those that do not decode: those pairs are dropped, counted."""
    kinds = [data for data, *_ in images().values()] + list(BROKEN.values())
    more = [row | {"jpg_0": kinds[i], "label_0": 1.0} for i, row in enumerate(rows[: len(kinds)])]
    out = [losses(make_set(more)), losses(make_set(more), "--cache", "")]
    assert np.isfinite(out).all()


def test_an_image_may_lie_where_the_hub_keeps_it():
    """`datasets` streams a hub's image folder as addresses: here of fsspec's memory, with a hub's path."""
    import fsspec

    with fsspec.open("memory://owner/name@main/a b.png", "wb") as file:
        file.write(b"image")
    assert common.raw_bytes({"bytes": None, "path": "memory://owner/name@main/a b.png"}) == b"image"
    assert common.raw_bytes({"bytes": None, "path": None}) == b"" == common.raw_bytes(None)


def test_broken_images_are_dropped_and_counted(losses, rows, make_set, capsys):
    more = [dict(row, label_0=1.0) for row in rows[:12]]
    for i, data in enumerate(BROKEN.values()):
        more[i + 2]["jpg_1"] = data
    losses(make_set(more))
    assert "8 of 12 rows can be used" in capsys.readouterr().out
    losses(make_set(more), "--cache", "")  # found while training
    passed = re.search(r"(\d+) times a row was passed over", capsys.readouterr().out)
    assert int(passed[1]) >= 1


def test_a_set_larger_than_the_memory(tmp_path):
    """Noise does not compress: 160 MB in 20 shards. To encode and score all of it takes hardly more memory
    than to encode and score the first two shards."""
    from datasets import Dataset

    rng, total = np.random.default_rng(0), 0
    for shard in range(20):
        noise = rng.integers(0, 256, (10, 2, 384, 384, 3), dtype=np.uint8)
        cells = [[encoded(Image.fromarray(i), "PNG", compress_level=0) for i in pair] for pair in noise]
        total += sum(len(cell) for pair in cells for cell in pair)
        made = [{"jpg_0": a, "jpg_1": b, "label_0": 1.0, "caption": f"shape {shard}"} for a, b in cells]
        for folder in ["all", "few"] if shard < 2 else ["all"]:
            (tmp_path / folder).mkdir(exist_ok=True)
            Dataset.from_list(made).to_parquet(tmp_path / folder / f"train-{shard:05d}.parquet")
    peak = {}
    for name in ("few", "all"):
        flags = ["--steps", 1, "--batch", 4, "--micro_batch", 4, "--eval_prompts", 0,
                 "--data", tmp_path / name, "--out", tmp_path / name / "o", "--cache", tmp_path]  # fmt: skip
        child = Child("smpo", flags, tmp_path / "log.txt", part=16)
        assert child.wait() == 0, child.output[-2000:]
        peak[name] = json.loads((tmp_path / name / "o" / "log.jsonl").read_text())["memory_gb"]
    growth = (peak["all"] - peak["few"]) * 2**30
    print(f"set {total / 1e6:.0f} MB, peak {peak}, growth {growth / 1e6:.0f} MB")
    assert total > 150e6 and growth < total / 4


# ------------------------------------------------------------------------------------- files that run code
class Payload:
    """Unpickled by someone who trusts it, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def evil(tmp_path):
    """evil(file) puts a pickle there whose payload would create `ran`, in torch's old format."""
    ran = tmp_path / "ran"

    def write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as out:
            torch.save({"weight": Payload(str(ran))}, out, _use_new_zipfile_serialization=False)

    write(tmp_path / "control.bin")
    torch.load(tmp_path / "control.bin", weights_only=False)
    assert ran.exists()  # it is a real one
    ran.unlink()
    yield write
    assert not ran.exists()


PARTS = {
    "unet": ("unet", "diffusion_pytorch_model.bin"), "unet as .pt": ("unet", "model.pt"),
    "unet in disguise": ("unet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.bin"), "text encoder": ("text_encoder", "pytorch_model.bin"),
    "text encoder in disguise": ("text_encoder", "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PARTS, "--unet", "reward", "reward in disguise", "scores", "checkpoint"])
def test_no_pickle_is_run(name, evil, rows, make_set, tmp_path, capsys):
    flags, model, reward = [], tmp_path / "model", tmp_path / "reward"
    shutil.copytree(TINY / "model", model)
    if name in PARTS or name == "--unet":
        part, file = PARTS.get(name, PARTS["unet"])
        for weights in (model / part).glob("*.safetensors"):
            weights.unlink()
        evil(model / part / file)
        flags = ["--unet", str(model / "unet")] if name == "--unet" else ["--model", str(model)]
    elif name.startswith("reward"):
        shutil.copytree(TINY / "reward", reward)
        (reward / "model.safetensors").unlink()
        evil(reward / ("model.safetensors" if "disguise" in name else "pytorch_model.bin"))
        flags = ["--reward", str(reward)]
    elif name == "scores":
        evil(tmp_path / "scores.safetensors")
        flags = ["--scores", str(tmp_path / "scores.safetensors")]
    flags = ["--steps", "2", "--batch", "4", "--micro_batch", "4", "--eval_prompts", "0", "--save_every", "1",
             "--data", make_set(rows[:8]), "--out", str(tmp_path / "out"), "--cache", "", *flags]  # fmt: skip
    if name == "checkpoint":
        smpo.main(["--steps", "1", *flags[2:]])
        for weights in (tmp_path / "out" / "checkpoint" / "1").glob("*.safetensors"):
            evil(weights)
        flags.append("--resume")
    with pytest.raises(SystemExit) as stop:
        common.launch(lambda: smpo.main(flags))
    assert stop.value.code == 2 and capsys.readouterr().err.strip().split("\n")[-1].startswith("error: ")


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic.v2", "imagereward"])
def test_no_scorer_is_unpickled(name, evil, tmp_path):
    folder = shutil.copytree(TINY / "reward", tmp_path / "scorer")
    (folder / "model.safetensors").unlink()
    evil(folder / "pytorch_model.bin")
    first = next(iter(evaluation.SCORERS[name][1]))
    paths = {part: str(folder) for part in evaluation.SCORERS[name][1]}
    if first == "weights":
        evil(tmp_path / "weights.pt")
        paths["weights"] = str(tmp_path / "weights.pt")
    with pytest.raises(common.InputError, match=f"scorer {name} cannot be loaded"):
        evaluation.load_scorer(name, paths)


def test_nothing_that_runs_code_is_in_the_source():
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        assert "trust_remote_code" not in text and not re.search(r"pickle\.loads?\(|allow_pickle", text), file
        for call in re.finditer(r"torch\.load\b", text):
            assert "weights_only=True" in text[call.start() : call.start() + 300], file
