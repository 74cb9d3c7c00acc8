# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading data sets: every form that people keep pairs in, and one line for what is no good."""

import decimal
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from PIL import Image, ImageFilter, ImageOps

import common

COLUMNS = ("caption", "label_0", "jpg_0", "jpg_1")
PAIR = ("jpg_0", "jpg_1")
SIDE = 24


@pytest.fixture(scope="module")
def rows():
    """16 pairs of the tiny world, labels 0 and 1 in turn."""
    table = pq.read_table(TINY / "pairs" / "train.parquet", columns=list(COLUMNS)).slice(0, 16)
    return [row | {"label_0": float(i % 2)} for i, row in enumerate(table.to_pylist())]


@pytest.fixture
def make_set(tmp_path):
    """make_set(rows, name) writes a parquet file; columns= replaces columns, None drops one."""

    def write(rows, name="set.parquet", columns=None, **options):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        cells = {key: [row[key] for row in rows] for key in rows[0]} | (columns or {})
        table = pa.table({key: cell for key, cell in cells.items() if cell is not None})
        pq.write_table(table, file, **options)
        return str(file)

    return write


@pytest.fixture
def make_folder(tmp_path, rows):
    """make_folder(name, change) writes an image folder of 12 pairs; change(i, line) its lines."""

    def write(name="folder", change=lambda i, line: line, images=".", text=None):
        folder = tmp_path / name
        (folder / images).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, row in enumerate(rows[:12]):
            line = {"label_0": 1, "caption": row["caption"]}
            for column in PAIR:
                file = f"{i}_{column}.png"
                (folder / images / file).write_bytes(row[column])
                line[f"{column}_file_name"] = file if images == "." else f"{images}/{file}"
            lines.append(json.dumps(change(i, line)))
        text = text or "\n".join
        (folder / "metadata.jsonl").write_bytes(text(lines).encode())
        return str(folder)

    return write


def read(path, columns=COLUMNS, wanted=None):
    return list(common.open_rows(path).rows(columns, wanted))


def refused(path, columns=COLUMNS):
    """The one line that a set is refused with."""
    with pytest.raises(common.InputError) as caught:
        read(path, columns)
    message = str(caught.value)
    assert message.startswith(f"--data {path}") and "\n" not in message
    return message.removeprefix(f"--data {path}")


# ------------------------------------------------------------------------------------- parquet
def test_a_file_gives_numbered_rows_of_exactly_the_columns(rows, make_set):
    extra = {"are_different": [True] * 16}
    source = common.open_rows(make_set(rows, columns=extra))
    assert set(source.columns) == {*COLUMNS, "are_different"}
    assert list(source.rows(COLUMNS)) == list(enumerate(rows))
    captions = [(i, {"caption": row["caption"]}) for i, row in enumerate(rows)]
    assert list(source.rows(("caption",))) == captions


def binary_view(cells):
    return pa.array(cells, pa.binary_view())


def struct(cells):
    return pa.array([{"bytes": cell, "path": "no such file"} for cell in cells])


@pytest.mark.parametrize("kind", [binary_view, struct, pa.array])
def test_image_cells_of_every_kind(kind, rows, make_set):
    cells = {column: kind([row[column] for row in rows]) for column in PAIR}
    assert read(make_set(rows, columns=cells)) == list(enumerate(rows))


@pytest.mark.parametrize("label", [int, bool, decimal.Decimal, lambda x: str(int(x)), np.float16])
def test_labels_of_every_type(label, rows, make_set):
    labels = [label(row["label_0"]) for row in rows]
    found = read(make_set(rows, columns={"label_0": labels}))
    assert found == list(enumerate(rows))
    assert all(type(row["label_0"]) is float for _, row in found)


@pytest.mark.parametrize("false", [False, 0, 0.0, "False", "false", "0", b"False", b"0"])
def test_has_label_is_false_in_any_spelling(false, rows, make_set):
    true = {bool: True, int: 1, float: 1.0, str: "True", bytes: b"True"}[type(false)]
    path = make_set(rows, columns={"has_label": [false if i < 5 else true for i in range(16)]})
    labels = [row["label_0"] for _, row in read(path)]
    assert labels == [0.5] * 5 + [float(i % 2) for i in range(5, 16)]
    assert [row["label_0"] for _, row in read(path, ("label_0",))] == labels


@pytest.mark.parametrize(
    "column, cells, message",
    [
        ("label_0", [1.0] * 7 + [0.3] * 9, ": label_0 of row 7 (from 0) is 0.3, not 0, 0.5 or 1"),
        ("label_0", [1, -1] * 8, ": label_0 of row 1 (from 0) is -1, not 0, 0.5 or 1"),
        ("label_0", [None] + [1] * 15, ": label_0 of row 0 (from 0) is None, not 0, 0.5 or 1"),
        ("label_0", ["won"] * 16, ": label_0 of row 0 (from 0) is 'won', not 0, 0.5 or 1"),
        ("label_0", [float("nan")] * 16, ": label_0 of row 0 (from 0) is nan, not 0, 0.5 or 1"),
        ("label_0", [[1]] * 16, ": label_0 of row 0 (from 0) is [1], not 0, 0.5 or 1"),
        ("caption", ["x"] * 9 + [None] * 7, ": the caption of row 9 (from 0) is no text: None"),
        ("caption", [["x"]] * 3 + [[]] * 13, ": the caption of row 3 (from 0) is no text: []"),
        ("caption", [b"x"] * 16, ": the caption of row 0 (from 0) is no text: b'x'"),
        ("caption", [{"en": "x"}] * 16, ": the caption of row 0 (from 0) is no text: {'en': 'x'}"),
        ("jpg_0", ["aGVsbG8="] * 16, ": jpg_0 of row 0 (from 0) is text, not an image's bytes"),
        ("jpg_1", [[1, 2]] * 16, ": jpg_1 of row 0 (from 0) is a list, not an image's bytes"),
        ("jpg_1", [3] * 16, ": jpg_1 of row 0 (from 0) is a int, not an image's bytes"),
        ("jpg_1", [{"url": "x"}] * 16, ": jpg_1 of row 0 (from 0) is a dict, not an image's bytes"),
    ],
)
def test_a_bad_cell_is_named(column, cells, message, rows, make_set):
    assert refused(make_set(rows, columns={column: cells})) == message


def test_of_several_captions_the_first(rows, make_set):
    lists = {"caption": [[row["caption"], "another"] for row in rows]}
    assert read(make_set(rows, columns=lists)) == list(enumerate(rows))


def test_an_empty_image_cell_is_no_bytes_and_no_error(rows, make_set):
    empty = {"jpg_0": pa.array([None] * 16, pa.binary())}
    assert {row["jpg_0"] for _, row in read(make_set(rows, columns=empty))} == {b""}


def test_trl_columns(rows, make_set):
    names = {"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"}
    trl = [{name: row[column] for name, column in names.items()} for row in rows]
    source = common.open_rows(make_set(trl, columns={"model": ["m"] * 16}))
    assert source.columns == ("caption", "jpg_0", "jpg_1", "label_0", "model")
    assert list(source.rows(COLUMNS)) == [(i, row | {"label_0": 1.0}) for i, row in enumerate(rows)]
    assert {row["label_0"] for _, row in source.rows(("label_0",))} == {1.0}
    assert common.read_prompts(source.path, "prompt") == [row["caption"] for row in rows]


def test_a_missing_column_is_said_before_a_row_is_read(rows, make_set):
    path = make_set(rows, columns={"jpg_1": None})
    source = common.open_rows(path)
    with pytest.raises(common.InputError) as caught:
        source.rows(COLUMNS)
    assert (
        str(caught.value) == f"--data {path} has no column jpg_1 (it has caption, label_0, jpg_0)"
    )


def test_only_wanted_rows_over_files_and_row_groups(rows, make_set, tmp_path):
    for i in range(4):
        part = [row | {"caption": f"{16 * i + j}"} for j, row in enumerate(rows)]
        make_set(part, f"many/train-{i}.parquet", row_group_size=5)
    folder = str(tmp_path / "many")
    everything = read(folder)
    assert [int(row["caption"]) for _, row in everything] == list(range(64))
    rng = np.random.default_rng(0)
    for count in (0, 1, 7, 40, 64):
        wanted = np.sort(rng.choice(64, count, replace=False))
        for columns in (COLUMNS, ("caption", "label_0")):
            expected = [(i, {name: everything[i][1][name] for name in columns}) for i in wanted]
            assert read(folder, columns, wanted) == expected


def test_shards_of_different_columns_and_types(rows, make_set, tmp_path):
    """An empty shard, integer labels, has_label in one of them, a column that one of them lacks."""
    empty = pa.schema([("caption", pa.string())]).empty_table()
    (tmp_path / "s").mkdir()
    pq.write_table(empty, tmp_path / "s" / "train-0.parquet")
    make_set(rows, "s/train-1.parquet")
    more = {"has_label": [False] * 16, "label_0": [1] * 16}
    make_set(rows, "s/train-2.parquet", columns=more)
    labels = [row["label_0"] for _, row in read(str(tmp_path / "s"))]
    assert labels == [float(i % 2) for i in range(16)] + [0.5] * 16
    make_set(rows, "s/train-3.parquet", columns={"jpg_1": None})
    has = "(it has caption, label_0, jpg_0)"
    assert refused(str(tmp_path / "s")) == f" has no column jpg_1 {has}"


def test_damaged_files(rows, make_set, tmp_path):
    whole = Path(make_set(rows, "whole.parquet", compression="none", row_group_size=4))
    data = whole.read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(data[: len(data) // 2])
    assert refused(str(cut)).startswith(" cannot be read: cut.parquet: Parquet magic bytes")
    empty = tmp_path / "empty.parquet"
    empty.write_bytes(b"")
    assert refused(str(empty)).startswith(" cannot be read: empty.parquet: ")
    middle = Path(make_set(rows * 8, "middle.parquet", compression="none", row_group_size=16))
    data = middle.read_bytes()
    column = pq.ParquetFile(middle).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset
    middle.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    assert refused(str(middle)).startswith(" cannot be read after row 31: ")
    assert refused(make_set(rows, "no.parquet", columns={k: pa.nulls(0) for k in COLUMNS})) == (
        " has no rows"
    )


def test_paths_that_are_no_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in ("", "nothing", "./a/b", "/a/b", "a/b/c", "sets/pairs.parquet", "nothing:test"):
        assert refused(path) == " does not exist"
    assert refused("empty") == " holds neither parquet files nor a metadata.jsonl"
    assert refused("pipe") == refused("/dev/zero") == " is no regular file"


def test_text_that_is_no_unicode_names_where(rows, make_set):
    captions = pa.array([b"one", b"tw\xff"] * 8).view(pa.string())
    message = refused(make_set(rows, columns={"caption": captions}))
    assert message.startswith(" cannot be read: 'utf-8' codec can't decode")


def test_shards_may_be_links_as_in_the_hubs_cache(rows, make_set, tmp_path):
    blob = make_set(rows, "blobs/1234.parquet")
    (tmp_path / "set").mkdir()
    os.symlink(blob, tmp_path / "set" / "train-0.parquet")
    first = common.open_rows(tmp_path / "set").fingerprint()
    assert read(tmp_path / "set") == list(enumerate(rows))
    Path(blob).write_bytes(Path(blob).read_bytes())
    assert common.open_rows(tmp_path / "set").fingerprint() != first


def test_paths_are_literal_and_a_slash_changes_nothing(rows, make_set, tmp_path):
    make_set([rows[0]], "set1/train.parquet")
    for name in ("set[1]", "pq [v2] {x}*", "名 ?", "a:b", "-._test"):
        path = make_set(rows, f"{name}/train.parquet")
        for spelling in (path, tmp_path / name, f"{tmp_path}/{name}/", f"{tmp_path}/{name}/."):
            assert read(spelling) == list(enumerate(rows))


def test_one_large_row_group_is_read_in_bounded_memory(tmp_path):
    """240 MB of noise in one row group: a page of pyarrow's holds 1,024 rows, here 31 MB."""
    code = """if True:
        import resource, sys
        import common
        source = common.open_rows(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(len(row["image"]) for _, row in source.rows(("image",)))
        print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    rng = np.random.default_rng(0)
    cells = [rng.bytes(30_000) for _ in range(8000)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "one.parquet", row_group_size=8000)
    command = [sys.executable, "-c", code, str(tmp_path / "one.parquet")]
    environment = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, memory = map(int, done.stdout.split())
    assert count == 240_000_000 and memory < 150_000_000


# -------------------------------------------------------------------------------------- splits
SPLITS = {
    "folders": ("train/0000.parquet", "test/0000.parquet"),
    "converted": ("default/train/0000.parquet", "default/validation/0000.parquet"),
    "suffix": ("pairs_train.parquet", "pairs_test.parquet"),
    "dash": ("hpdv2-train-00000-of-00001.parquet", "hpdv2-test-00000-of-00001.parquet"),
    "sharded": ("data/train-00000-of-00001.parquet", "data/test_unique-00000-of-00001.parquet"),
    "dev": ("train.parquet", "dev.parquet"),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_test_rows_are_not_read(kind, rows, make_set, tmp_path):
    ours, other = SPLITS[kind]
    make_set(rows, f"set/{ours}")
    make_set([row | {"caption": "TEST ROW"} for row in rows[:3]], f"set/{other}")
    (tmp_path / "set" / "test.png").write_bytes(b"a picture is no split")
    make_set(rows[:1], "set/.cache/train.parquet")
    assert read(str(tmp_path / "set")) == list(enumerate(rows))
    assert read(f"{tmp_path}/set:train") == list(enumerate(rows))
    name = {"converted": "validation", "sharded": "test_unique", "dev": "validation"}
    held_out = read(f"{tmp_path}/set:{name.get(kind, 'test')}")
    assert [row["caption"] for _, row in held_out] == ["TEST ROW"] * 3


@pytest.mark.parametrize(
    "files, message",
    [
        (("split=train/0.parquet", "split=test/0.parquet"), "no clear train split: split=test/0.p"),
        (("Train-0.parquet", "Test-0.parquet"), "no clear train split: Test-0.parquet"),
        (("train/0.parquet", "train/test/0.parquet"), "no clear train split: train/test/0.parquet"),
        (("test/train-0.parquet", "0.parquet"), "no split train, only test"),
        (("dev-0.parquet", "test-0.parquet"), "no split train, only validation, test"),
        (("Test/metadata.jsonl",), "no clear train split: Test/metadata.jsonl"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(files, message, rows, make_set, tmp_path):
    for file in files:
        make_set(rows, f"set/{file}")
    assert refused(str(tmp_path / "set")).startswith(f" has {message}")


def test_a_split_that_is_not_there(rows, make_set, tmp_path):
    make_set(rows, "set/part.parquet")
    assert refused(f"{tmp_path}/set:test") == " has no split test, only train"
    assert refused(f"{tmp_path}/set/part.parquet:test") == " does not exist"


def test_files_of_two_patterns_are_read_once(rows, make_set, tmp_path):
    make_set(rows, "set/train-x_train-0.parquet")
    assert len(read(str(tmp_path / "set"))) == 16


# ------------------------------------------------------------------------------- image folders
def pairs(rows):
    return [(i, row | {"label_0": 1.0}) for i, row in enumerate(rows[:12])]


def test_lines_of_every_kind(rows, make_folder):
    assert read(make_folder()) == pairs(rows)
    assert read(make_folder("bom", text=lambda lines: "\ufeff" + "\n".join(lines))) == pairs(rows)
    assert read(make_folder("crlf", text="\r\n".join)) == pairs(rows)
    assert (
        read(make_folder("blank", text=lambda lines: "\n \n\n".join(["", *lines, ""])))[3:]
        == (pairs(rows)[3:])
    )
    assert read(make_folder("名 [v2]", images="images")) == pairs(rows)
    nested = make_folder("nested", lambda i, line: line | ({"votes": {"a": [i]}} if i > 5 else {}))
    assert read(nested) == pairs(rows)
    wanted = np.array([0, 3, 11])
    assert read(nested, wanted=wanted) == [pairs(rows)[i] for i in wanted]


def test_absolute_names_and_links_inside_the_folder(rows, make_folder, tmp_path):
    def absolute(i, line):
        return line | {
            "jpg_0_file_name": f"{tmp_path}/folder/{i}_jpg_0.png",
            "jpg_1_file_name": "link",
        }

    folder = make_folder(change=absolute)
    os.symlink("0_jpg_1.png", f"{folder}/link")
    assert [row["jpg_1"] for _, row in read(folder)] == [rows[0]["jpg_1"]] * 12


def test_a_stray_parquet_file_does_not_replace_the_folder(rows, make_folder, make_set):
    folder = make_folder()
    make_set(rows[:1], "folder/stray.parquet")
    make_set(rows[:1], "folder/old/backup.parquet")
    assert read(folder) == pairs(rows)


def test_a_stray_metadata_file_does_not_replace_the_shards(rows, make_set, make_folder, tmp_path):
    make_set(rows, "folder/data/part.parquet")
    make_folder("folder/data/old")
    assert read(str(tmp_path / "folder")) == list(enumerate(rows))


def test_the_train_folder_of_an_image_folder(rows, make_folder, tmp_path):
    make_folder("set/train")
    make_folder("set/test", lambda i, line: line | {"caption": "TEST ROW"})
    assert read(str(tmp_path / "set")) == pairs(rows)
    assert len(read(f"{tmp_path}/set:test")) == 12


@pytest.mark.parametrize("name", ["file_name", "image_file_name"])
def test_single_images_and_several_captions_of_one(name, rows, make_folder):
    folder = make_folder(change=lambda i, line: {name: f"{i % 3}_jpg_0.png", "caption": f"c{i}"})
    expected = [(i, {"caption": f"c{i}", "image": rows[i % 3]["jpg_0"]}) for i in range(12)]
    assert read(folder, ("caption", "image")) == expected


def test_a_late_tie_stays_a_tie(make_folder):
    late = make_folder("late", lambda i, line: line | {"label_0": 1 if i < 10 else 0.5})
    assert [row["label_0"] for _, row in read(late)] == [1.0] * 10 + [0.5] * 2
    soft = make_folder("soft", lambda i, line: line | {"label_0": 1 if i < 10 else 0.9})
    assert refused(soft) == ": label_0 of row 10 (from 0) is 0.9, not 0, 0.5 or 1"


def test_files_that_are_not_opened(make_folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    names = {
        "../secret": "lies outside",
        str(tmp_path / "secret"): "lies outside",
        "link": "lies outside",
        "/dev/zero": "lies outside",
        "pipe": "does not exist, or is no regular file",
        "missing.png": "does not exist",
        "loop": "does not exist",
        ".": "lies outside",
        "https://example.invalid/1.png": "does not exist",
    }
    for i, (name, message) in enumerate(names.items()):

        def change(row, line, name=name):
            return line | ({"jpg_1_file_name": name} if row == 7 else {})

        folder = make_folder(f"folder{i}", change)
        os.mkfifo(f"{folder}/pipe")
        os.symlink("loop", f"{folder}/loop")
        os.symlink("../secret", f"{folder}/link")
        assert refused(folder).startswith(f": jpg_1 of row 7 (from 0) {message}")


def test_lines_that_are_no_good(make_folder):
    surrogate = make_folder("a", lambda i, line: line | {"caption": "a cat \ud83d"})
    assert refused(surrogate) == r": the caption of row 0 (from 0) is no text: 'a cat \ud83d'"
    lacks = make_folder("b", lambda i, line: {k: line[k] for k in line if i != 4 or k != "label_0"})
    assert refused(lacks) == ": row 4 (from 0) has no label_0"
    broken = make_folder("c", text=lambda lines: "\n".join([*lines[:3], lines[3][:20]]))
    assert refused(broken).startswith(" cannot be read after row 2: ")
    for name, text in (("d", "[]"), ("e", "nonsense"), ("f", "3")):
        assert refused(make_folder(name, text=lambda lines, text=text: text)).startswith(
            " cannot be read: "
        )
    assert refused(make_folder("g", text=lambda lines: "\n\n")) == " has no rows"


def test_paths_in_parquet_cells(rows, make_set, make_folder, tmp_path):
    """Opened inside the folder that is given; a single file has none."""
    folder = make_folder()
    os.remove(f"{folder}/metadata.jsonl")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = [{"bytes": None, "path": f"{i % 12}_jpg_0.png"} for i in range(16)]
    file = make_set(rows, "folder/pairs.parquet", columns={"jpg_0": pa.array(paths, kind)})
    assert [row["jpg_0"] for _, row in read(folder)][:12] == [row["jpg_0"] for row in rows[:12]]
    assert refused(file) == (
        ": jpg_0 of row 0 (from 0) names a file (0_jpg_0.png): give the folder of the set"
    )


# --------------------------------------------------------------------------------- fingerprints
def test_the_fingerprint_changes_with_the_files(rows, make_set, make_folder):
    file = make_set(rows)
    first = common.open_rows(file).fingerprint()
    assert first == common.open_rows(file).fingerprint()
    stat = os.stat(file)
    data = Path(file).read_bytes()
    Path(file).write_bytes(data)  # the same size and mtime
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert common.open_rows(file).fingerprint() != first
    folder = make_folder()
    os.symlink("nowhere", f"{folder}/link")
    source = common.open_rows(folder)
    first = source.fingerprint()
    assert source.fingerprint() == first
    Path(folder, "3_jpg_0.png").write_bytes(rows[0]["jpg_0"])
    assert source.fingerprint() != first


# ----------------------------------------------------------------------------------------- hub
def test_a_hub_set(rows, make_set, monkeypatch):
    """No hub here: what is asked of it is recorded, and a file stands in for its answer."""
    import datasets
    import huggingface_hub

    asked = []
    kind = datasets.Image()
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "label_0": datasets.Value("float64"),
            "jpg_0": kind,
            "jpg_1": kind,
            "others": datasets.List(kind),
        }
    )
    broken = [row | {"jpg_0": {"bytes": b"broken"}, "others": [{"bytes": b"x"}]} for row in rows]
    stand_in = datasets.Dataset.from_list(broken, features=features)

    def load_dataset(name, split, streaming, revision):
        asked.append((name, split, streaming, revision))
        return stand_in.to_iterable_dataset()

    class Api:
        def dataset_info(self, name):
            return huggingface_hub.DatasetInfo(id=name, sha="abc", tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = common.open_rows("someone/pairs:test")
    assert asked == [("someone/pairs", "test", True, "abc")]
    assert source.fingerprint() == "abc"
    expected = [(i, row | {"jpg_0": b"broken"}) for i, row in enumerate(rows)]
    assert list(source.rows(COLUMNS)) == expected
    assert list(source.rows(COLUMNS, np.array([2, 5]))) == [expected[2], expected[5]]
    assert list(source.rows(("caption",), np.array([], int))) == []
    for path in (
        "/etc/passwd",
        "file:///etc/passwd::hf://datasets/a/b",
        "https://x/y",
        "memory://x",
    ):
        with pytest.raises(common.InputError, match="is not kept on the hub"):
            source.image_bytes({"bytes": None, "path": path}, "jpg_0")


# ------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "\ufeffone\r\n\n  two \nthree\n"),
        ("[a].json", '["one", "two", "three"]'),
        ("a.json", '[{"prompt": "one"}, {"prompt": "two"}, "three"]'),
        ("mjhq.json", '{"1": {"prompt": "one"}, "2": {"prompt": "two"}, "3": {"prompt": "three"}}'),
        ("b.json", '\ufeff{"1": "one", "2": "two", "3": "three"}'),
        ("a.jsonl", '{"prompt": "one"}\n\n"two"\r\n{"prompt": ["three", "four"]}'),
    ],
)
def test_prompts_of_every_form(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    assert common.read_prompts(tmp_path / name, "prompt") == ["one", "two", "three"]


def test_prompts_of_a_set(rows, make_set, make_folder, tmp_path):
    captions = [row["caption"] for row in rows]
    make_set(rows[:1], "set1/train.parquet")
    path = make_set(rows, "set[1]/train.parquet", columns={"words": [[c] for c in captions]})
    assert common.read_prompts(path) == common.read_prompts(path, "words") == captions
    assert common.read_prompts(tmp_path / "set[1]") == captions
    assert common.read_prompts(make_folder()) == captions[:12]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", " \n\n", " has no prompts"),
        ("a.json", "{}", " has no prompts"),
        ("a.json", "[", " cannot be read: "),
        ("a.json", "7", " cannot be read: "),
        ("a.json", '{"prompts": ["one"]}', None),
        ("a.json", '[{"caption": "one"}]', ": a row has no 'prompt'"),
        ("a.json", '["one", null]', ": the caption of row 1 (from 0) is no text: None"),
        ("a.json", r'["\ud83d"]', ": the caption of row 0 (from 0) is no text: "),
        ("a.txt", b"\xff\xfe", " cannot be read: "),
        ("a.parquet", "x", " cannot be read: "),
        ("missing.txt", None, " cannot be read: "),
        ("missing.parquet", None, " does not exist"),
    ],
)
def test_prompts_that_are_no_good(name, text, message, tmp_path):
    if name[0] == "a":
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if message is None:  # a list of texts is taken for a caption in several wordings
        assert common.read_prompts(tmp_path / name, "prompt") == ["one"]
        return
    with pytest.raises(common.InputError) as caught:
        common.read_prompts(tmp_path / name, "prompt")
    assert str(caught.value).startswith(f"--prompts {tmp_path / name}{message}")


# -------------------------------------------------------------------------------------- images
def ramp():
    """A smooth picture (SIDE, SIDE, 3) uint8: red grows to the right, green downwards."""
    grow = np.linspace(20, 220, SIDE)
    return np.stack(np.broadcast_arrays(grow[None], grow[:, None], 90.0), -1).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image):
    alpha = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def on_white(picture):
    alpha = np.linspace(0, 255, SIDE).astype(np.uint8)[None, :, None] / 255
    return picture * alpha + 255 * (1 - alpha)


def kinds():
    """name: (bytes, the picture they stand for, how far off a value may be)."""
    rgb = ramp()
    image = Image.fromarray(rgb)
    grey = rgb[..., 0]
    luma = Image.fromarray(grey)
    greys = np.repeat(grey[..., None], 3, 2)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = image.quantize(64)
    hole = Image.new("P", (SIDE, SIDE), 1)
    hole.putpalette([0, 0, 0, 200, 30, 60])
    hole.putpixel((2, 3), 0)
    holed = np.tile(np.array([200, 30, 60]), (SIDE, SIDE, 1))
    holed[3, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = np.rot90(rgb, -1)
    frames = {"save_all": True, "append_images": [ImageOps.invert(image)] * 2, "duration": 50}
    return {
        "jpg": (encoded(image, "JPEG", quality=95), rgb, 8),
        "png": (encoded(image, "PNG"), rgb, 0),
        "webp": (encoded(image, "WEBP", lossless=True), rgb, 0),
        "bmp": (encoded(image, "BMP"), rgb, 0),
        "tiff": (encoded(image, "TIFF", compression="tiff_lzw"), rgb, 0),
        "grey jpg": (encoded(luma, "JPEG", quality=95), greys, 6),
        "grey": (encoded(luma, "PNG"), greys, 0),
        "1 bit": (encoded(Image.fromarray(grey > 99), "PNG"), (greys > 99) * 255, 0),
        "LA": (encoded(with_alpha(luma), "PNG"), on_white(greys), 1),
        "P": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB")), 0),
        "P with a hole": (encoded(hole, "PNG", transparency=0), holed, 0),
        "gif with a hole": (encoded(hole, "GIF", transparency=0), holed, 0),
        "RGBA": (encoded(with_alpha(image), "PNG"), on_white(rgb), 1),
        "RGBA webp": (
            encoded(with_alpha(image), "WEBP", lossless=True, exact=True),
            on_white(rgb),
            1,
        ),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG", quality=95), rgb, 8),
        "CMYK tiff": (encoded(image.convert("CMYK"), "TIFF"), rgb, 1),
        "16 bits": (encoded(deep, "PNG"), greys, 0),
        "16 bits tiff": (encoded(deep, "TIFF"), greys, 0),
        "turned jpg": (encoded(image, "JPEG", quality=95, exif=exif), turned, 8),
        "turned png": (encoded(image, "PNG", exif=exif), turned, 0),
        "turned webp": (encoded(image, "WEBP", lossless=True, exif=exif), turned, 0),
        "turned tiff": (encoded(image, "TIFF", exif=exif), turned, 0),
        "bad exif": (encoded(image, "PNG", exif=b"Exif\0\0MM\0*\0\0"), rgb, 0),
        "gif": (encoded(image.quantize(64), "GIF"), np.asarray(palette.convert("RGB")), 0),
        "animated webp": (encoded(image, "WEBP", lossless=True, **frames), rgb, 0),
        "animated png": (encoded(image, "PNG", **frames), rgb, 0),
        "pages of tiff": (encoded(image, "TIFF", **frames), rgb, 0),
        "several jpgs": (
            encoded(image, "MPO", save_all=True, append_images=[luma], quality=95),
            rgb,
            8,
        ),
    }


@pytest.mark.parametrize("kind", kinds())
def test_images_of_every_kind(kind):
    data, picture, tolerance = kinds()[kind]
    for cell in (data, memoryview(data), {"bytes": data, "path": None}):
        image = common.decode_image(cell)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, float) - picture).max() <= tolerance


def test_images_that_do_not_decode():
    image = Image.fromarray(ramp())
    floats = Image.fromarray(np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE))
    ints = Image.fromarray(np.full((SIDE, SIDE), 70_000, np.int32))
    broken = [b"", None, {"bytes": None}, {}, b"no image", "text", encoded(floats, "TIFF")]
    broken += [encoded(ints, "TIFF"), encoded(image, "PPM"), encoded(image, "JPEG2000")]
    broken += [encoded(image, kind) for kind in ("ICO", "PCX", "TGA", "EPS", "PDF", "AVIF")]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        data = encoded(image, kind)
        broken += [data[: len(data) // 2], data[:20]]
    assert [common.decode_image(cell) for cell in broken] == [None] * len(broken)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_huge_image_is_not_decoded():
    for side in (10_000, 15_000):  # Pillow warns of the first and refuses the second
        assert common.decode_image(encoded(Image.new("1", (side, side)), "PNG")) is None


@pytest.mark.parametrize("size", [(24, 24), (37, 24), (24, 61), (100, 333), (333, 100), (16, 255)])
def test_resize_and_crop_is_clips(size):
    """transformers' own, to the last bit, and SDXL's six numbers."""
    from transformers import CLIPImageProcessorPil as Processor

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    processor = Processor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    pixels, numbers = common.resize_and_crop(image, 16)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)
    assert (pixels - expected).abs().max() < 1e-6
    height, width = size[1] * 16 // min(size), size[0] * 16 // min(size)
    crop = [(height - 16) // 2, (width - 16) // 2]
    assert numbers.tolist() == [size[1], size[0], *crop, 16, 16]


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 100), (100, 3)])
def test_thin_images(size):
    """The middle of what would be up to 15 million pixels long."""
    ends = Image.new("RGB", size, "white")
    middle = tuple(length * 9 // 20 for length in size)
    grey = Image.new("RGB", tuple(max(1, length // 10) for length in size), (128, 128, 128))
    ends.paste(grey, middle)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels, numbers = common.resize_and_crop(ends, 512)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000 and pixels.shape == (3, 512, 512)
    assert (pixels[:, 256, 256] - (128 / 127.5 - 1)).abs().max() < 0.01


def test_a_box_gives_the_middle_of_the_whole():
    """Beyond 16 : 1 only the middle is resized; beside the whole, it is off by rounding."""
    noise = np.random.default_rng(0).integers(0, 256, (20 * 17, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    pixels, _ = common.resize_and_crop(image, 40)
    whole = image.resize((40, 680), Image.Resampling.BICUBIC).crop((0, 320, 40, 360))
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 127.5 - 1
    assert (pixels - expected).abs().max() < 2.5 / 127.5
