# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""From a set to what a run trains on: the same pairs in every form give the same losses, each image
and caption is encoded once and only if a run meets it, nothing stale is used, sets may be larger than
the memory, and no file's code is run."""

import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from child import Child
from conftest import ROOT, TINY, write_rows
from PIL import Image
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import eval as evaluation
import smpo

PAIR = ("jpg_0", "jpg_1")
SHORT = [*("--steps", "2", "--batch", "8", "--micro_batch", "8"), *("--eval_prompts", "0")]
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def losses(tmp_path, log_of):
    """losses(data, more flags) -> the losses of two steps on this data, DPO's by default."""
    count = 0

    def run(data, *more, method=dpo_baseline, cache="cache"):
        nonlocal count
        count += 1
        out = tmp_path / f"run-{count}"
        files = ["--data", str(data), "--out", str(out), "--cache", str(tmp_path / cache)]
        method.main([*SHORT, *files, *more])
        return [line["loss"] for line in log_of(out)]

    return run


def open_samples(data, cache, *flags):
    """The SampleStream of dpo_baseline.py with these flags, as its `train` makes it."""
    files = ["--data", str(data), "--out", "run", "--cache", str(cache)]
    cfg = common.parse(dpo_baseline.Config, dpo_baseline.PRESETS, [*SHORT, *files, *flags])
    dist_info = common.DistInfo()
    models = common.Models(cfg, "cpu")
    table = common.RowTable(cfg, dist_info, common.PAIR_COLUMNS)
    winner = (table.labels < 0.5).long()
    sides = winner[:, None] if cfg.sft else torch.stack([winner, 1 - winner], 1)
    train_mask = table.labels != 0.5
    return common.SampleStream(cfg, dist_info, models, table, train_mask, sides)


def stored(cache, kind):
    """{key: {name: tensor}} of what the cache holds of latents, captions or scores. No key is there
    twice."""
    found = {}
    for file in Path(cache).glob(f"{kind}-*/*.safetensors"):
        tensors = load_file(file)
        keys = tensors.pop("key").tolist()
        tensors.pop("undecodable")
        assert not found.keys() & set(keys) and len(keys) == len(set(keys))
        for i, key in enumerate(keys):
            found[key] = {name: tensor[i] for name, tensor in tensors.items()}
    return found


def times(cache):
    """When each file of the cache was written; the tables of rows are written at every start."""
    files = [file for file in Path(cache).rglob("*.safetensors") if file.parent.name != "rows"]
    return {file: file.stat().st_mtime_ns for file in files}


def png(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decided(rows, label=1.0):
    """The rows without their ties: every label is the same."""
    return [row | {"label_0": label} for row in rows]


# ------------------------------------------------------------------------------ forms of a set
def write_images(rows, folder, line):
    """An image folder: the images of rows, and a metadata.jsonl of line(row number, row)."""
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        for name in PAIR:
            (folder / f"{i}_{name}.png").write_bytes(row[name])
    lines = [json.dumps(line(i, row)) + "\n" for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def pair_line(i, row):
    files = {f"{name}_file_name": f"{i}_{name}.png" for name in PAIR}
    return files | {"label_0": row["label_0"], "caption": row["caption"]}


def test_the_same_pairs_in_every_local_form(losses, rows, make_set, tmp_path, monkeypatch):
    rows = rows[:20]
    expected = losses(make_set(rows))

    # Shards with the columns that Pick-a-Pic has besides, and another split beside them
    more = {"are_different": True, "has_label": True, "ranking_id": 3, "image_0_url": "https://x"}
    shards = tmp_path / "owner" / "name"
    shards.mkdir(parents=True)
    for i in range(0, 20, 7):
        part = [row | more | {"label_1": 1 - row["label_0"]} for row in rows[i : i + 7]]
        write_rows(part, shards / f"train-{i:05d}-of-00003.parquet")
    write_rows([row | more for row in rows[:3]], shards / "test-00000-of-00001.parquet")
    assert losses(shards) == expected
    assert losses(f"{shards}:train") == expected
    monkeypatch.chdir(tmp_path)
    assert losses("owner/name") == expected  # a folder, though it looks like a hub id
    assert losses("owner/name/:train") == expected

    assert losses(write_images(rows, tmp_path / "folder", pair_line)) == expected
    # The cache knows images and captions by their content, so they were encoded for the first only.
    assert len(stored("cache", "latents")) <= 2 * len(rows)


def test_a_split_is_trained_on(losses, rows, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(rows[:12], folder / "train.parquet")
    expected = losses(write_rows(rows[20:40], folder / "test.parquet"))
    assert losses(f"{folder}:test") == expected


def test_a_hub_id(losses, rows, make_set, monkeypatch):
    """No hub here: a set in memory stands in for its answer, and what is asked of it is recorded."""
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(rows[:20]).to_iterable_dataset()

    class Api:
        def dataset_info(self, name):
            return huggingface_hub.DatasetInfo(id=name, sha="abc", tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    expected = losses(make_set(rows[:20]), cache="other")
    assert losses("someone/pairs:part") == expected
    assert losses("someone/pairs") == expected
    options = {"streaming": True, "revision": "abc"}
    splits = ("part", "train")
    assert asked == [("someone/pairs", {"split": split} | options) for split in splits]


def test_trl_columns(losses, rows, make_set):
    """prompt, chosen, rejected: the first image won."""
    rows = decided(rows[:16])
    names = {"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"}
    trl = [{name: row[column] for name, column in names.items()} for row in rows]
    assert losses(make_set(trl, "trl.parquet")) == losses(make_set(rows))


def test_single_images_in_a_folder(losses, rows, make_set, tmp_path):
    rows = rows[:16]
    singles = [{"caption": row["caption"], "image": row["jpg_0"]} for row in rows]

    def line(i, row):
        return {"file_name": f"{i}_jpg_0.png", "caption": row["caption"]}

    folder = write_images(rows, tmp_path / "folder", line)
    for method, more in ((dpo_baseline, ["--sft"]), (dro, ["--rollout_steps", "5"])):
        expected = losses(make_set(singles), *more, method=method)
        assert losses(folder, *more, method=method) == expected


def test_hpdv3_by_the_lines_in_the_readme(losses, rows, make_set, tmp_path, monkeypatch):
    """Its JSON is a list of prompt, path1 (preferred), path2."""
    text = (ROOT / "README.md").read_text()
    code = next((c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "path1" in c), None)
    if code is None:
        pytest.skip("the README has no such lines")
    rows = decided(rows[:16])
    folder = write_images(rows, tmp_path / "hpdv3", pair_line)
    (folder / "metadata.jsonl").unlink()
    content = []
    for i, row in enumerate(rows):
        paths = {"path1": f"{i}_jpg_0.png", "path2": f"{i}_jpg_1.png"}
        content.append(paths | {"prompt": row["caption"], "model1": "x", "confidence": 0.9})
    (folder / "train.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert losses(folder) == losses(make_set(rows))


# ------------------------------------------------------------------------ what is encoded, once
def test_sft_does_not_encode_losers(rows, make_set, tmp_path):
    samples = open_samples(make_set(rows[:24]), tmp_path / "cache", "--sft")
    met = [rows[i] for i in samples.rows]
    winners = [row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"] for row in met]
    assert stored(tmp_path / "cache", "latents").keys() == set(map(common.image_key, winners))
    captions = {row["caption"] for row in met} | {""}
    keys = stored(tmp_path / "cache", "captions").keys()
    assert keys == set(map(common.caption_key, captions))


def test_an_image_of_several_pairs_is_encoded_once(rows, make_set, tmp_path):
    images = [row[name] for row in rows[:4] for name in PAIR]
    pairs = [rows[0] | {"jpg_0": a, "jpg_1": b, "label_0": 1.0} for a in images for b in images]
    samples = open_samples(make_set(pairs), tmp_path / "cache", "--steps", "8")
    assert len(np.unique(samples.rows)) == 64
    assert len(stored(tmp_path / "cache", "latents")) == 8
    assert len(stored(tmp_path / "cache", "captions")) == 2  # and the empty one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_neighbours(precision, rows, make_set, tmp_path):
    """To the bit, in latents, in embeddings and in scores."""
    flags = ["--steps", "4", "--precision", precision]
    parts = {"a": rows[:16], "b": [*rows[20:31], *rows[8:13]][::-1]}
    for name, part in parts.items():
        open_samples(make_set(decided(part), f"{name}.parquet"), tmp_path / name, *flags)
    for kind in ("latents", "captions"):
        a = stored(tmp_path / "a", kind)
        b = stored(tmp_path / "b", kind)
        both = a.keys() & b.keys()
        assert len(both) >= 3 and a.keys() - both and b.keys() - both
        for key in both:
            assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_runs_share_the_cache(losses, rows, make_set, tmp_path):
    """Another method, more steps, another set: what is there stays as it is, the rest is added."""
    cache = tmp_path / "cache"
    data = make_set(rows[:40])
    losses(data, "--sft", "--steps", "1")
    for method, more in (
        (dpo_baseline, ["--steps", "1"]),
        (dpo_baseline, ["--steps", "3"]),
        (smpo, ["--steps", "4", "--inversion_steps", "2"]),
        (dpo_baseline, ["--steps", "3", "--data", make_set(rows[20:60], "other.parquet")]),
        (dpo_baseline, ["--steps", "3", "--flip"]),
    ):
        before = times(cache)
        count = len(stored(cache, "latents"))
        losses(data, *more, method=method)
        after = times(cache)
        assert before.items() < after.items()
        assert len(stored(cache, "latents")) > count
    before = times(cache)
    losses(data, "--steps", "3")
    assert times(cache) == before  # nothing is missing any more


def test_more_steps_add_to_the_cache(rows, make_set, tmp_path):
    data = make_set(rows)
    short = open_samples(data, tmp_path / "cache", "--flip")
    before = times(tmp_path / "cache")
    long = open_samples(data, tmp_path / "cache", "--flip", "--steps", "5")
    assert before.items() < times(tmp_path / "cache").items()
    assert long.rows[:16].tolist() == short.rows.tolist()
    whole = open_samples(data, tmp_path / "other", "--flip", "--steps", "5")
    assert whole.rows.tolist() == long.rows.tolist()
    for kind in ("latents", "captions"):
        keys = stored(tmp_path / "cache", kind).keys()
        assert keys == stored(tmp_path / "other", kind).keys()
    for number in (0, 20):
        a = long.batch(range(number, number + 8))
        b = whole.batch(range(number, number + 8))
        assert torch.equal(a["x0"], b["x0"])
        assert all(torch.equal(a["cond"][name], b["cond"][name]) for name in a["cond"])


def test_mirrored_views_are_stored_only_where_they_are_drawn(rows, make_set, tmp_path):
    samples = open_samples(make_set(rows[:16]), tmp_path / "cache", "--flip", "--steps", "4")
    expected = set()
    for row, sides, flips in zip(samples.rows, samples.sides[samples.rows], samples.flips):
        for side, mirrored in zip(sides, flips):
            expected.add(common.image_key(rows[row][PAIR[side]], mirrored))
    keys = stored(tmp_path / "cache", "latents").keys()
    assert keys == expected
    views = [~key in keys for key in keys]
    assert any(views) and not all(views)  # images are met in one of the views or in both


@pytest.mark.parametrize("change", ["sides", "labels", "captions", "an image"])
def test_a_set_that_changed_is_read_again(change, losses, rows, make_set):
    """The same name, size and modification time: the losses are those of a run without a past."""
    rows = [row | {"caption": f"{i % 10} stars"} for i, row in enumerate(decided(rows[:16]))]
    data = make_set(rows)
    losses(data)
    stat = os.stat(data)
    if change == "sides":
        rows = [row | {"jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"]} for row in rows]
    elif change == "labels":
        rows = decided(rows, label=0.0)
    elif change == "captions":
        rows = [row | {"caption": row["caption"][::-1]} for row in rows]
    else:
        one = rows[0]["jpg_0"]
        rows[0] = rows[0] | {"jpg_0": rows[1]["jpg_0"]}
        rows[1] = rows[1] | {"jpg_0": one}
    make_set(rows)
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = losses(data, "--steps", "3")
    assert found == losses(data, "--steps", "3", cache="fresh")


# ------------------------------------------------------------------------------ images as they are
def images_of_many_kinds():
    """Images that decode, though they are no plain RGB."""
    rgb = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    grey = rgb.convert("L")
    veiled = rgb.copy()
    veiled.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return [
        png(deep),
        png(deep, "TIFF"),
        png(veiled),
        png(veiled, "WEBP"),
        png(grey.convert("1")),
        png(rgb.quantize(16), "GIF"),
        png(rgb.convert("CMYK"), "JPEG"),
        png(rgb.resize((1, 3000))),
    ]


def test_16_bit_transparent_and_thin_images_train(losses, rows, make_set, capsys):
    cells = images_of_many_kinds()
    pairs = decided([row | {"jpg_0": cell} for row, cell in zip(rows, cells)])
    assert np.isfinite(losses(make_set(pairs))).all()
    assert f"{len(cells)} of {len(cells)} rows can be used" in capsys.readouterr().out


@pytest.mark.parametrize("method", [dpo_baseline, smpo])
def test_broken_images_are_dropped_and_counted(method, losses, rows, make_set, capsys):
    """At the start, and again at the end, where a long log has not scrolled it away."""
    pairs = decided(rows[:12])
    whole = pairs[0]["jpg_0"]
    cells = [whole[: len(whole) // 2], b"<html>", b"", png(Image.new("F", (9, 9)), "TIFF")]
    for i, cell in enumerate(cells):
        pairs[i + 2][PAIR[i % 2]] = cell
    text = "(4 were skipped: an image of them does not decode)"
    for _ in range(2):  # found now, and known from the cache
        losses(make_set(pairs), method=method)
        output = capsys.readouterr().out
        assert "8 of 12 rows can be used" in output
        if method is dpo_baseline:  # rows without a score are none to train on from the beginning
            assert f"8 of 12 rows can be used {text}" in output
            assert re.search(r"wrote \S+ " + re.escape(text), output)


def test_the_next_decodable_row_takes_the_place(rows, make_set, tmp_path):
    pairs = decided(rows[:12])
    whole = open_samples(make_set(pairs), tmp_path / "whole", "--steps", "3")
    broken = [3, 8]
    for row in broken:
        pairs[row] = pairs[row] | {"jpg_1": b""}
    samples = open_samples(make_set(pairs), tmp_path / "cache", "--steps", "3")
    assert samples.skipped == 2
    for epoch in (0, 12):
        order = whole.rows[epoch : epoch + 12].tolist()
        following = [*order, *order]
        for place, row in enumerate(order):
            expected = next(row for row in following[place:] if row not in broken)
            assert samples.rows[epoch + place] == expected


# ---------------------------------------------------------------------------------------- size
def test_a_set_larger_than_the_memory(tmp_path):
    """160 MB of noise, which does not compress, in 20 shards. To encode and score all of it takes
    hardly more memory than the first two shards."""
    rng = np.random.default_rng(0)
    total = 0
    for shard in range(20):
        noise = rng.integers(0, 256, (10, 2, 384, 384, 3), dtype=np.uint8)
        pairs = []
        for pair in noise:
            cells = [png(Image.fromarray(image), compress_level=0) for image in pair]
            total += sum(map(len, cells))
            row = dict(zip(PAIR, cells)) | {"label_0": 1.0, "caption": f"shape {shard}"}
            pairs.append(row)
        for folder in ("all", "few") if shard < 2 else ("all",):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_rows(pairs, tmp_path / folder / f"train-{shard:05d}.parquet")
    peak = {}
    for name in ("few", "all"):
        flags = [
            *("--steps", 10, "--batch", 20, "--micro_batch", 20, "--eval_prompts", 0),
            *("--inversion", "none", "--data", tmp_path / name),
            *("--out", tmp_path / f"run-{name}", "--cache", tmp_path / f"cache-{name}"),
        ]
        child = Child("smpo", flags, tmp_path / "log.txt")
        assert child.wait() == 0, child.output[-2000:]
        lines = (tmp_path / f"run-{name}" / "log.jsonl").read_text().splitlines()
        peak[name] = json.loads(lines[-1])["memory_gb"]
    growth = (peak["all"] - peak["few"]) * 2**30
    assert total > 150e6 and growth < total / 4, (peak, growth)


def test_more_than_the_disk_holds_is_refused(rows, make_set, tmp_path):
    samples = open_samples(make_set(rows[:16]), tmp_path / "cache")
    samples.check_disk(1000)
    with pytest.raises(common.InputError) as caught:
        samples.check_disk(10**12)
    start = re.escape(f"--cache {tmp_path / 'cache'}: the latents of 1,000,000,000,000 images")
    found = re.fullmatch(start + r" take up to ([\d.]+) GiB, [\d.]+ GiB are free", str(caught.value))
    assert float(found[1]) == pytest.approx(10**12 * 4 * 8 * 8 * 4 / 2**30, rel=1e-3)


def test_a_start_with_a_finished_cache_is_fast(rows, tmp_path):
    """It opens no image. Ten times the rows may take thirty times as long: it is in proportion, and
    what a start costs anyhow is not."""
    dist_info = common.DistInfo()
    seconds = {}
    for count in (4_000, 40_000):
        kinds = pa.array(np.arange(count) % 4).cast(pa.int32())
        columns = {"label_0": np.ones(count)}
        for name in (*PAIR, "caption"):  # four rows in turn, which parquet stores but once
            values = pa.array([row[name] for row in rows[:4]])
            columns[name] = pa.DictionaryArray.from_arrays(kinds, values)
        data = tmp_path / f"{count}.parquet"
        pq.write_table(pa.table(columns), data)
        flags = ["--steps", str(count // 8)]
        first = open_samples(data, tmp_path / "cache", *flags)
        assert (first.table.image_keys != 0).all()
        before = times(tmp_path / "cache")
        tries = []
        for _ in range(3):
            started = time.perf_counter()
            table = common.RowTable(first.cfg, dist_info, common.PAIR_COLUMNS)
            mask = table.labels != 0.5
            again = common.SampleStream(first.cfg, dist_info, first.models, table, mask, first.sides)
            tries.append(time.perf_counter() - started)
        seconds[count] = min(tries)
        assert again.rows.tolist() == first.rows.tolist()
        assert times(tmp_path / "cache") == before
    assert seconds[40_000] < 30 * seconds[4_000], seconds


# ------------------------------------------------------------------------- files that run code
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
            payload = {"weight": Payload(str(ran))}
            torch.save(payload, out, _use_new_zipfile_serialization=False)

    write(tmp_path / "control.bin")
    torch.load(tmp_path / "control.bin", weights_only=False)
    assert ran.exists()  # it is a real one
    ran.unlink()
    yield write
    assert not ran.exists()


PARTS = {
    "unet": ("unet", "diffusion_pytorch_model.bin"),
    "unet as .pt": ("unet", "model.pt"),
    "unet in disguise": ("unet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.bin"),
    "text encoder": ("text_encoder", "pytorch_model.bin"),
    "text encoder in disguise": ("text_encoder", "model.safetensors"),
}
REWARDS = {"reward": "pytorch_model.bin", "reward in disguise": "model.safetensors"}


@pytest.mark.parametrize("name", [*PARTS, *REWARDS, "--unet", "scores", "checkpoint"])
def test_no_pickle_is_run(name, evil, rows, make_set, tmp_path, capsys):
    model = shutil.copytree(TINY / "model", tmp_path / "model")
    flags = []
    if name in PARTS or name == "--unet":
        part, file = PARTS.get(name, PARTS["unet"])
        for weights in (model / part).glob("*.safetensors"):
            weights.unlink()
        evil(model / part / file)
        flags = ["--model", str(model)]
        if name == "--unet":
            flags = ["--unet", str(model / "unet")]
    elif name in REWARDS:
        reward = shutil.copytree(TINY / "reward", tmp_path / "reward")
        (reward / "model.safetensors").unlink()
        evil(reward / REWARDS[name])
        flags = ["--reward", str(reward)]
    elif name == "scores":
        evil(tmp_path / "scores.safetensors")
        flags = ["--scores", str(tmp_path / "scores.safetensors")]
    files = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    flags = [*SHORT, "--data", make_set(rows[:12]), *files, *flags]
    if name == "checkpoint":
        smpo.main([*flags, "--steps", "1"])
        evil(tmp_path / "out" / "checkpoint" / "step-00000001.pt")
        flags.append("--resume")
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda: smpo.main(flags))
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().split("\n")[-1].startswith("error: ")


def test_a_pickle_in_the_cache_is_no_shard(evil, losses, rows, make_set, tmp_path):
    """Its content is made again."""
    data = make_set(rows[:12])
    expected = losses(data, method=smpo)
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    kinds = {file.parent.name.partition("-")[0] for file in files}
    assert kinds == {"rows", "latents", "captions", "scores"}
    for file in files:
        evil(file)
    assert losses(data, method=smpo) == expected


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic.v2", "imagereward"])
def test_no_scorer_is_unpickled(name, evil, tmp_path):
    folder = shutil.copytree(TINY / "reward", tmp_path / "scorer")
    (folder / "model.safetensors").unlink()
    evil(folder / "pytorch_model.bin")
    parts = evaluation.SCORERS[name][1]
    paths = dict.fromkeys(parts, str(folder))
    if "weights" in parts:
        evil(tmp_path / "weights.pt")
        paths["weights"] = str(tmp_path / "weights.pt")
    with pytest.raises(common.InputError, match=rf"^scorer {name} \(.*\) cannot be used: "):
        evaluation.load_scorer(name, paths)


def test_nothing_that_runs_code_is_in_the_source():
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        assert not re.search(r"trust_remote_code\W+True", text), file
        assert not re.search(r"pickle\.loads?\(|allow_pickle|[^.\w](eval|exec)\(", text), file
        for call in re.finditer(r"torch\.load\b|load_state_dict_from_url", text):
            near = text[max(0, call.start() - 600) : call.start() + 300]
            assert re.search(r"weights_only\W+True", near), file
