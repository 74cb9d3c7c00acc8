# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Kill, stop and starve runs at every stage, damage what they wrote, then go on. The result is that
of the run nobody touched, to the bit, and no step is done twice.

    python tests/test_faults.py --kills 20 [--seed 0]    # at random moments, over the three methods
    python tests/test_faults.py --disks 20 [--seed 0]    # disks that are full at a random file size
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from child import ROOT, Child, context, killer
from conftest import TINY, write_rows
from safetensors.torch import load_file, save_file

import common

STEPS = 5
ROWS = 40
FLAGS = [
    *("--steps", STEPS, "--batch", 4, "--micro_batch", 2, "--warmup", 2, "--save_every", 2),
    *("--eval_prompts", 0, "--caption_dropout", 0.1, "--flip"),
]
METHODS = {
    "dpo_baseline": [],
    "smpo": ["--inversion_steps", 2],
    "dro": [
        *("--experts", 12, "--rollout_steps", 5, "--ema", 0.9),
        *("--refresh_every", 3, "--buffer", 8),
    ],
}
pytestmark = pytest.mark.usefixtures("elsewhere")


class Case:
    """One run's command and what stands of it on the disk."""

    def __init__(self, method, folder, data, *more):
        folder.mkdir(exist_ok=True)
        self.method = method
        self.folder = folder
        self.data = data
        self.out = folder / "run"
        self.cache = folder / "cache"
        self.flags = [*FLAGS, "--data", data, "--out", self.out, "--cache", self.cache]
        self.flags += [*METHODS[method], *more]
        self.started = 0

    def start(self, *more, **options):
        """A Child with more flags, which win over those before."""
        self.started += 1
        log = self.folder / f"log-{self.started}.txt"
        self.child = Child(self.method, [*self.flags, *more], log, **options)
        return self.child

    def run(self, *more, **options):
        """A whole run that ends well; what it said."""
        child = self.start(*more, **options)
        assert child.wait() == 0, child.output[-3000:]
        return child.output

    def fail(self, *more, **options):
        """A run that ends with one line and exit code 2; that line."""
        child = self.start(*more, **options)
        assert child.wait() == 2, child.output[-3000:]
        assert "Traceback" not in child.output
        assert child.error.startswith("error: "), child.output[-3000:]
        return child.error

    def shards(self, kind):
        """The cache's files of a kind: latents, captions, scores."""
        return sorted(self.cache.glob(f"{kind}-*/*.safetensors"))

    def lines(self):
        file = self.out / "log.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def checkpoints(self):
        return sorted(file.name for file in (self.out / "checkpoint").glob("step-*.pt"))

    def encoding_images(self):
        return "encoding images: " in self.child.output and not self.shards("latents")

    def scoring(self):
        return "scores by " in self.child.output and not self.shards("scores")

    def first_steps(self):
        return self.lines() == 1

    def stage(self):
        """For the table: what was going on."""
        if list((self.out / "checkpoint").glob(".*")):
            return "saving a checkpoint"
        if list(self.out.glob(".unet*")):
            return "writing unet"
        if self.lines():
            return f"after step {self.lines()}"
        done = [kind for kind in ("scores", "latents", "captions") if self.shards(kind)]
        return "encoding images" if self.encoding_images() else f"starting; cached: {done}"


# Where a run is killed, in this order. A word is a Case's method: some time while it holds. The
# others are for `killer`: just before a file gets its name, is deleted, or the log its next line.
# The last step before (nothing saved yet: the run starts over) and the first after a checkpoint are
# among them.
SAVING_2 = ("os.rename", "*/checkpoint/step-00000002.pt")
SAVING_4 = ("os.rename", "*/checkpoint/step-00000004.pt")
STAGES = {
    "dpo_baseline": [
        "encoding_images",
        ("os.rename", "*/latents-*/*.safetensors"),
        ("os.rename", "*/rows/*.safetensors"),
        ("os.rename", "*/captions-*/*.safetensors"),
        ("os.rename", "*/run/config.json"),
        ("append", "*/log.jsonl", 2),
        SAVING_2,
        ("append", "*/log.jsonl", 4),
        SAVING_4,
        ("os.remove", "*/checkpoint/step-00000002.pt"),
        ("os.rename", "*/run/unet"),
    ],
    "smpo": [
        "scoring",
        ("os.rename", "*/scores-*/*.safetensors"),
        ("os.rename", "*/run/scores.safetensors"),
        SAVING_2,
        ("append", "*/log.jsonl", 4),
        SAVING_4,
    ],
    "dro": [
        ("os.rename", "*/experts/*.parquet"),
        "encoding_images",
        ("os.rename", "*/run/experts.parquet"),
        ("append", "*/log.jsonl", 2),
        SAVING_2,
        ("append", "*/log.jsonl", 4),
        SAVING_4,
        ("os.rename", "*/run/unet"),
    ],
}


def unet(out):
    return (Path(out) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def log_of(out):
    """(step, loss, gradient norm) of each line: the numbers that do not depend on the machine's
    mood."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def require_same(case, whole):
    """The run ended as the untouched one did, every step is there once, and nothing is left
    over."""
    assert log_of(case.out) == log_of(whole.out)
    assert unet(case.out) == unet(whole.out)
    assert case.checkpoints() == whole.checkpoints()
    assert not leftovers(case.out)


def leftovers(folder):
    """Temporary files, which are those with a dot in front."""
    return [file for file in folder.rglob(".*") if file.name != ".lock"]


def picture(folder):
    """Every file of a folder: when it was written, and its content."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory, rows):
    return write_rows(rows[:ROWS], tmp_path_factory.mktemp("set") / "set.parquet")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, data):
    """untouched(method) -> the Case of the run that nobody disturbs, made once."""
    made = {}

    def whole(method="dpo_baseline"):
        if method not in made:
            made[method] = Case(method, tmp_path_factory.mktemp(method), data)
            made[method].run()
        return made[method]

    return whole


@pytest.fixture
def stopped_run(untouched, data, tmp_path):
    """A run with a checkpoint of step 2, on a copy of the untouched run's cache."""
    case = Case("dpo_baseline", tmp_path, data)
    shutil.copytree(untouched().cache, case.cache)
    case.run("--steps", 2)
    return case


# --------------------------------------------------------------------------------------- kills
@pytest.mark.parametrize("method", METHODS)
def test_kill_at_every_stage(method, untouched, data, tmp_path):
    case = Case(method, tmp_path, data)
    more = []
    for stage in STAGES[method]:
        if isinstance(stage, str):
            code = case.start(*more).send_when(getattr(case, stage))
        else:
            code = case.start(*more, kill_at=stage).wait()
        assert code == -signal.SIGKILL, (stage, case.child.output[-3000:])
        more = ["--resume"]
    case.run("--resume")
    require_same(case, untouched(method))


FILL_ROWS = 600  # three shards


def fill(folder, encoded, kill_at=None):
    """Fill a store with FILL_ROWS rows, as SampleStream does. `encoded`: a file that gets a line
    for each batch, its size. Runs in a process of its own."""
    if kill_at:
        sys.addaudithook(killer(*kill_at))
    store = common.TensorStore(folder)
    keys = [common.content_key(b"row %d" % number) for number in range(FILL_ROWS)]
    missing = ((k, n) for n, k in enumerate(keys) if store.find(np.array([k]))[0] < 0)

    def load(number):
        return None if number % 100 == 99 else torch.tensor([number, -number])  # some do not decode

    def encode(batch):
        with open(encoded, "a") as file:
            file.write(f"{len(batch)}\n")
        return {"value": torch.stack(batch).float()}

    common.fill_store(store, missing, load, encode, "filling", FILL_ROWS, common.DistInfo())


def test_a_killed_fill_store_keeps_its_finished_shards(tmp_path):
    runs = {"whole": None, "killed": ("os.rename", "*.safetensors", 3), "again": None}
    counts = {}
    for name, kill_at in runs.items():
        folder = tmp_path / ("whole" if name == "whole" else "killed")
        log = tmp_path / f"{name}.txt"
        child = context.Process(target=fill, args=(folder, log, kill_at))
        child.start()
        child.join(60)
        assert child.exitcode == (-signal.SIGKILL if kill_at else 0)
        if kill_at:
            assert len(list(folder.glob("*.safetensors"))) == 2
        counts[name] = log.read_text().split()
    # 600 rows are 37 batches of 16 and one of 8; what does not decode is filled up, to 16. Two
    # shards of 256 are 32 batches, which stay: the second run encodes the 88 rows that are missing.
    assert counts == {"whole": ["16"] * 38, "killed": ["16"] * 38, "again": ["16"] * 6}
    keys = [common.content_key(b"row %d" % number) for number in range(FILL_ROWS)]
    for folder in ("whole", "killed"):
        store = common.TensorStore(tmp_path / folder)
        found = store.find(np.array(keys))
        broken = [number for number in range(FILL_ROWS) if number % 100 == 99]
        assert (found < 0).nonzero()[0].tolist() == broken
        assert set(store.undecodable.tolist()) == {keys[number] for number in broken}
        decodable = [number for number in range(FILL_ROWS) if number % 100 != 99]
        values = store.read(np.array(keys)[decodable])["value"]
        assert values[:, 0].tolist() == decodable and values[:, 1].tolist() == [
            -n for n in decodable
        ]
        assert len(store.keys) == len(set(store.keys.tolist()))  # nothing is there twice


BRIGHTNESS = """
import numpy
def brightness(images, prompts):
    return [numpy.asarray(image).mean() for image in images]
"""


def test_kill_during_the_final_evaluation(untouched, data, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text(BRIGHTNESS)
    more = [
        *("--steps", 1, "--eval_prompts", 4, "--eval_steps", 2, "--cfg", 1),
        *("--prompts", TINY / "prompts" / "test.txt", "--judge", f"{judge}:brightness"),
    ]
    whole = Case("dpo_baseline", tmp_path / "whole", data, *more)
    case = Case("dpo_baseline", tmp_path / "killed", data, *more)
    for made in (whole, case):
        shutil.copytree(untouched().cache, made.cache)
    whole.run()
    # All of the initial model's images are there, and one of the trained model's.
    kill_at = ("os.rename", "*/images/*/*.png", 6)
    assert case.start(kill_at=kill_at).wait() == -signal.SIGKILL
    assert len(list(case.cache.glob("images/*/*.png"))) == 5
    assert not (case.out / "scores.json").exists()
    case.run("--resume")
    results = [json.loads((made.out / "scores.json").read_text()) for made in (whole, case)]
    for name in ("scores", "win_rates"):
        assert results[0][name] == results[1][name]
    assert unet(case.out) == unet(whole.out)


def test_torchrun_restarts_after_a_killed_worker(untouched, data, tmp_path):
    """One of two workers is killed; torchrun starts both again, and --resume goes on."""
    case = Case("dpo_baseline", tmp_path, data, "--save_every", 1)  # one micro-batch a worker
    shutil.copytree(untouched().cache, case.cache)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("--max_restarts=1", ROOT / "dpo_baseline.py", *case.flags, "--resume"),
    ]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = [str(word) for word in command]
        agent = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
        while not case.checkpoints():
            assert agent.poll() is None, log.read_text()[-3000:]
            time.sleep(0.005)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert agent.wait(150) == 0, log.read_text()[-3000:]
    assert log.read_text().count("trained parameters") == 2
    # As in test_two_processes_train_like_one: two ranks with one micro-batch each change no bit.
    require_same(case, untouched())


# --------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stop_by_signal_saves_and_says_how_to_go_on(number, group, untouched, data, tmp_path):
    """Ctrl-C reaches the whole group of processes."""
    case = Case("dpo_baseline", tmp_path, data)
    shutil.copytree(untouched().cache, case.cache)
    child = case.start()
    assert child.send_when(case.first_steps, number, group) == 130, child.output[-3000:]
    step = case.lines()
    assert child.error == f"stopped after step {step} of {STEPS}, all saved: --resume goes on"
    assert step < STEPS and "Traceback" not in child.output
    assert case.checkpoints() == [f"step-{step:08d}.pt"]
    case.run("--resume")
    require_same(case, untouched())


def test_a_run_in_the_background_does_not_hear_ctrl_c(untouched, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data)
    shutil.copytree(untouched().cache, case.cache)
    child = case.start(ignore_interrupt=True)
    assert child.send_when(case.first_steps, signal.SIGINT) == 0
    require_same(case, untouched())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_scoring_or_encoding_is_one_line(number, data, tmp_path):
    case = Case("smpo", tmp_path, data)
    stage = case.scoring if number == signal.SIGTERM else case.encoding_images
    child = case.start()
    assert child.send_when(stage, number) == 130 and "Traceback" not in child.output
    assert child.error == "interrupted: what was finished is kept, --resume goes on"
    assert not leftovers(case.cache)


EARLY = [
    (signal.SIGINT, "_multiarray_umath"),  # numpy, in the first tenths of a second
    (signal.SIGTERM, "libtorch_cpu"),
    (signal.SIGINT, "libtorch_python"),
    (signal.SIGINT, "libarrow"),  # the imports of the last second
]


@pytest.mark.parametrize("number, library", EARLY)
def test_a_stop_during_the_imports_is_quiet(number, library, tmp_path):
    """A real process, interrupted once it has loaded a library, wherever it is then."""
    # As in a terminal: the test itself may have been started with SIGINT ignored.
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = [ROOT / "smpo.py", "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    command = [sys.executable, "-c", start, *map(str, words), "--eval_prompts", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said[1], said


# -------------------------------------------------------------------------------------- full disk
def test_a_full_disk_leaves_the_checkpoint_before_it(stopped_run, untouched):
    size = (stopped_run.out / "checkpoint" / "step-00000002.pt").stat().st_size
    error = stopped_run.fail("--resume", limit=size // 2)
    assert error.startswith("error: checkpoint of step 4: ") and "cannot be written: " in error
    assert error.endswith("the one before it is whole, and --resume goes on from it")
    assert stopped_run.checkpoints() == ["step-00000002.pt"]
    stopped_run.run("--resume")
    require_same(stopped_run, untouched())


@pytest.mark.parametrize(
    "limit, more, what",
    [
        (400, [], "rows/"),  # the table of the rows
        (20_000, [], "latents-"),
        (3_000_000, ["--keep_every", 1], "unet-1 cannot be written"),
        (1_000, [], "config.json cannot be written"),
    ],
)
def test_a_full_disk_is_one_line_anywhere(limit, more, what, untouched, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data, *more)
    if limit == 1_000:  # the cache is there, the run is not
        shutil.copytree(untouched().cache, case.cache)
    error = case.fail(limit=limit)
    assert what in error
    assert not leftovers(case.folder) and not list(case.out.glob("unet*"))
    case.run("--resume", "--steps", 2)


# ---------------------------------------------------------------------------- what a resume refuses
def test_a_resume_with_other_settings_is_refused_and_touches_nothing(stopped_run, tmp_path):
    before = picture(stopped_run.out)
    other = tmp_path / "other.parquet"
    other.write_bytes(Path(stopped_run.data).read_bytes())
    for name, value in {"beta": 7.0, "data": other, "lr": 1e-3, "flip": False}.items():
        error = stopped_run.fail("--resume", f"--{name}", value)
        assert error.startswith(f"error: --resume goes on with --{name} "), name
        assert f"not {value}: give the same" in error and picture(stopped_run.out) == before
    # These may differ.
    stopped_run.run("--resume", "--steps", 3, "--workers", 1, "--save_every", 1)


def test_a_resume_without_a_setting_it_had_is_refused_and_touches_nothing(data, tmp_path):
    """Known late, at the checkpoint: what is not given now may be a default that the run has
    resolved."""
    case = Case("dpo_baseline", tmp_path, data, "--steps", 1)
    vae = TINY / "model" / "vae"
    case.run("--vae", vae)
    before = picture(case.out)
    assert f"goes on with --vae {vae}, not None" in case.fail("--resume")
    assert picture(case.out) == before


def changed(rows, change):
    rows = [dict(row) for row in rows[:ROWS]]
    if change == "sides are swapped":
        for row in rows:
            row["jpg_0"], row["jpg_1"] = row["jpg_1"], row["jpg_0"]
    elif change == "a row is appended":
        rows.append(rows[0])
    elif change == "labels are flipped":
        for row in rows:
            row["label_0"] = 1 - row["label_0"]
    elif change == "captions are others":
        for row in rows:
            row["caption"] += " at night"
    return rows


CHANGES = [
    ("dpo_baseline", "sides are swapped"),
    ("dpo_baseline", "a row is appended"),
    ("dpo_baseline", "labels are flipped"),
    ("dpo_baseline", "captions are others"),
    ("smpo", "sides are swapped"),
    ("dro", "captions are others"),
]


@pytest.mark.parametrize("method, change", CHANGES)
def test_a_resume_on_changed_data_is_refused_and_touches_nothing(
    method, change, untouched, rows, tmp_path
):
    data = write_rows(rows[:ROWS], tmp_path / "set.parquet")
    case = Case(method, tmp_path, data)
    shutil.copytree(untouched(method).cache, case.cache)
    case.run("--steps", 2)
    before = picture(case.out)
    write_rows(changed(rows, change), data)
    error = case.fail("--resume")
    assert f"--data {data}" in error
    assert any(words in error for words in ("has changed", "have changed", "other rows")), error
    assert "None" not in error  # nobody gave --scores: the run's own are meant
    assert picture(case.out) == before
    write_rows(rows[:ROWS], data)  # a file of the same content: all is well again
    case.run("--resume")
    require_same(case, untouched(method))


def test_a_resume_with_another_initial_unet_is_refused(untouched, stopped_run, tmp_path):
    """The path is the same, what lies there is not: the reference would be another model."""
    start = tmp_path / "start"
    shutil.copytree(untouched().out / "unet", start)
    case = Case("dpo_baseline", tmp_path / "other", stopped_run.data, "--unet", start)
    shutil.copytree(untouched().cache, case.cache)
    case.run("--steps", 2)
    before = picture(case.out)
    shutil.rmtree(start)
    shutil.copytree(stopped_run.out / "unet", start)
    error = case.fail("--resume")
    assert "the unet of " in error and "is another one than before" in error
    assert picture(case.out) == before


def test_a_resume_whose_checkpoint_is_gone_or_longer_is_refused(stopped_run):
    error = stopped_run.fail("--resume", "--steps", 1)
    assert error == "error: --resume: --steps 1 is less than the 2 that are done"
    stopped_run.run("--resume", "--steps", 3)
    shutil.rmtree(stopped_run.out / "checkpoint")
    before = picture(stopped_run.out)
    error = stopped_run.fail("--resume")
    assert "its log has 3 steps, its checkpoint is gone: --overwrite starts over" in error
    assert picture(stopped_run.out) == before


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "no settings", "another pickle"])
def test_a_damaged_checkpoint_is_one_line(damage, stopped_run):
    file = stopped_run.out / "checkpoint" / "step-00000002.pt"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "zeros":
        file.write_bytes(bytes(len(content)))
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        state = torch.load(file, weights_only=True)
        state.pop("settings")
        torch.save(state if damage == "no settings" else [Path("/tmp")], file)
    before = picture(stopped_run.out)
    error = stopped_run.fail("--resume")
    assert f"{file} cannot be read" in error and error.endswith("--overwrite starts over")
    assert picture(stopped_run.out) == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_is_not_told_as_a_damaged_checkpoint(error, monkeypatch, tmp_path):
    """Which `run_script` turns into one line that says so."""

    def load(*args, **kwargs):
        raise error("tried to allocate 2 GiB")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error):
        common.read_checkpoint(tmp_path / "step-00000002.pt")


def test_the_reference_is_the_initial_model_also_after_a_resume(stopped_run):
    """If it were the resumed UNet, the first margin would be 0 again."""
    stopped_run.run("--resume")
    lines = (stopped_run.out / "log.jsonl").read_text().splitlines()
    margins = [json.loads(line)["margin"] for line in lines]
    assert margins[0] == 0 and all(margin != 0 for margin in margins[1:])


# --------------------------------------------------------------------------------- the kept files
@pytest.mark.parametrize("method", ["dpo_baseline", "smpo"])
def test_more_steps_encode_only_what_is_missing(method, untouched, data, tmp_path):
    """And end, to the bit, as the run that had them from the beginning."""
    case = Case(method, tmp_path, data)
    case.run("--steps", 2)
    before = {kind: case.shards(kind) for kind in ("latents", "captions", "scores")}
    stamps = picture(case.cache)
    case.run("--resume")
    require_same(case, untouched(method))
    for kind in ("latents", "captions"):
        files = case.shards(kind)
        assert len(files) == 2 and set(before[kind]) < set(files)
        keys = [load_file(file)["key"] for file in files]
        assert len(torch.cat(keys).unique()) == sum(map(len, keys))  # nothing was encoded twice
        wanted = torch.cat([load_file(file)["key"] for file in untouched(method).shards(kind)])
        assert set(torch.cat(keys).tolist()) == set(wanted.tolist())
        assert all(picture(case.cache)[str(file)] == stamps[str(file)] for file in before[kind])
    assert case.shards("scores") == before["scores"]


def damage_file(file, damage):
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "zeros":
        file.write_bytes(bytes(len(content)))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "deleted":
        file.unlink()
    elif damage == "long header":  # its length is the first 8 bytes
        file.write_bytes(b"\xff" * 8 + content[8:])
    elif damage == "other keys":  # a header that is valid and hostile: the keys have another type
        tensors = load_file(file)
        tensors["key"] = tensors["key"].bfloat16()
        save_file(tensors, file)
    elif damage == "other shape":
        tensors = load_file(file)
        tensors = {name: value[:1] if value.dim() > 1 else value for name, value in tensors.items()}
        save_file(tensors, file)
    elif damage == "one bit":  # in the last tensor's last value
        content[-5] ^= 1
        file.write_bytes(content)


DAMAGES = [
    "cut",
    "zeros",
    "empty",
    "deleted",
    "long header",
    "other keys",
    "other shape",
    "one bit",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_the_cache_is_named_and_made_again(damage, untouched, data, tmp_path):
    """At once or, where it shows late, by --resume; the run ends as if nothing had happened."""
    case = Case("dpo_baseline", tmp_path, data)
    shutil.copytree(untouched().cache, case.cache)
    files = [*case.shards("latents"), *case.shards("captions")]
    assert len(files) == 2
    for file in files:
        damage_file(file, damage)
    outputs = []
    for _ in range(3):  # at the worst, latents and captions are found one after the other
        code = case.start("--resume").wait()
        outputs.append(case.child.output)
        assert code in (0, 2) and "Traceback" not in outputs[-1], outputs[-1][-3000:]
        if code == 0:
            break
        assert case.child.error.endswith("--resume makes it again")
    if damage != "deleted":
        assert all(f"{file} is damaged" in "".join(outputs) for file in files)
    require_same(case, untouched())


@pytest.mark.parametrize("damage", ["cut", "zeros", "other caption", "other label"])
def test_a_damaged_table_of_rows_is_made_again(damage, untouched, data, tmp_path):
    """What is known of each row: label, and the keys of its caption and images."""
    case = Case("dpo_baseline", tmp_path, data)
    shutil.copytree(untouched().cache, case.cache)
    for file in case.cache.glob("rows/*"):
        if damage in ("cut", "zeros"):
            damage_file(file, damage)
            continue
        content = file.read_bytes()
        tensors = load_file(file)
        values = tensors["labels" if damage == "other label" else "caption_keys"].numpy()
        start = content.index(values.tobytes())
        for row in range(ROWS):
            if damage == "other label":  # a winner becomes a loser
                values[row] = 1 - values[row]
            else:
                values[row] ^= 1
        file.write_bytes(content[:start] + values.tobytes() + content[start + values.nbytes :])
    code = case.start().wait()
    assert "Traceback" not in case.child.output
    if code == 2:
        case.run("--resume")
    require_same(case, untouched())


def test_damaged_scores_are_made_again(untouched, data, tmp_path):
    case = Case("smpo", tmp_path, data)
    shutil.copytree(untouched("smpo").cache, case.cache)
    for file in case.shards("scores"):
        damage_file(file, "cut")
    assert "is damaged" in case.run()
    require_same(case, untouched("smpo"))


def test_files_have_the_users_umask(untouched, data, tmp_path):
    for umask, mode in (("0022", 0o644), ("0077", 0o600)):
        case = Case("smpo", tmp_path / umask, data, "--steps", 1)
        case.run(UMASK=umask)
        files = [file for file in case.folder.rglob("*") if file.is_file()]
        names = {file.name for file in files}
        assert {"config.json", "log.jsonl", "scores.safetensors", "step-00000001.pt"} <= names
        assert {"config.json", "diffusion_pytorch_model.safetensors"} <= {
            file.name for file in (case.out / "unet").iterdir()
        }
        assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}, umask


def test_leftovers_are_removed_and_what_others_put_there_is_not(stopped_run, untouched):
    """A killed writer's temporary files go: at once from the run's own folder, after a day from the
    cache, where other runs may be writing."""
    latents = stopped_run.shards("latents")[0].parent
    own = [stopped_run.out, stopped_run.out / "checkpoint"]
    temporary = ".x.0123456789ab.new"
    gone = [folder / temporary for folder in own] + [latents / ".x.ba9876543210.new"]
    others = ["step-best.pt", "step-00000002-copy.pt", "notes.txt", ".notes.old"]
    others = [folder / name for folder in own for name in others] + [latents / temporary]
    for file in (*gone, *others):
        file.write_text("kept")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(gone[-1], (two_days_ago, two_days_ago))
    stopped_run.run("--resume")
    assert log_of(stopped_run.out) == log_of(untouched().out)
    assert unet(stopped_run.out) == unet(untouched().out)
    assert [file for file in gone if file.exists()] == []
    assert [file for file in others if not file.exists() or file.read_text() != "kept"] == []


def test_two_runs_fill_one_cache_at_once(untouched, data, tmp_path):
    cases = [Case("dpo_baseline", tmp_path / name, data) for name in ("a", "b")]
    for case in cases:
        case.flags += ["--cache", tmp_path / "cache"]
        case.cache = tmp_path / "cache"
        case.start()
    for case in cases:
        assert case.child.wait() == 0, case.child.output[-3000:]
    for case in cases:
        require_same(case, untouched())


# ---------------------------------------------------------------------------- one folder, one run
def require_locked(out):
    handle = os.open(out / ".lock", os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_a_folder_belongs_to_one_run_at_a_time(untouched, data, tmp_path):
    """In the first seconds, when nothing but the lock is there, and later. The others wait for 10
    s."""
    case = Case("dpo_baseline", tmp_path / "first", data)
    later = Case("dpo_baseline", tmp_path / "later", data)
    shutil.copytree(untouched().cache, later.cache)
    assert case.start().stop_when(case.encoding_images)
    assert later.start().stop_when(later.first_steps)
    before = picture(later.out)
    intruders = []
    for number, run in enumerate((case, later)):
        for flag in ("--resume", "--overwrite"):
            log = tmp_path / f"intruder-{number}{flag}.txt"
            flags = [*run.flags, "--cache", tmp_path / f"cache-{number}", flag]
            intruders.append((Child("dpo_baseline", flags, log), run))
    for intruder, run in intruders:
        assert intruder.wait(60) == 2, intruder.output[-3000:]
        assert intruder.error == f"error: --out {run.out} is in use by another run"
        assert "Traceback" not in intruder.output
    for run in (case, later):  # being refused does not end the lock
        require_locked(run.out)
    assert picture(later.out) == before
    for run in (case, later):
        run.child.send(signal.SIGCONT)
        assert run.child.wait() == 0, run.child.output[-3000:]
        require_same(run, untouched())


def test_the_wait_for_a_folder_can_be_short(tmp_path):
    first = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    second = os.open(tmp_path / ".lock", os.O_RDWR)
    common.take_lock(first, "run", patience=0)
    start = time.monotonic()
    with pytest.raises(common.InputError, match="--out run is in use by another run"):
        common.take_lock(second, "run", patience=0.3)
    assert 0.3 <= time.monotonic() - start < 5
    os.close(first)
    common.take_lock(second, "run", patience=0)
    os.close(second)


def test_two_resumes_at_once(stopped_run, untouched):
    """The second waits until the first has ended, and finds nothing left to do."""
    first = stopped_run.start("--resume")
    second = stopped_run.start("--resume")
    assert first.wait() == 0, first.output[-3000:]
    assert second.wait() == 0, second.output[-3000:]
    require_same(stopped_run, untouched())


def test_a_waiting_run_does_not_take_a_lock_that_was_deleted(stopped_run):
    """A run that ends without having written anything deletes its lock. One that waits for it has
    the deleted file open, and must not think that it holds the folder then."""
    stopped_run.out = stopped_run.folder / "new"
    stopped_run.out.mkdir()
    stopped_run.flags += ["--out", stopped_run.out]
    lock = stopped_run.out / ".lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    child = stopped_run.start()
    maps = Path(f"/proc/{child.process.pid}/fd")
    while not any(os.path.realpath(fd) == str(lock) for fd in maps.iterdir()):
        time.sleep(0.01)
    lock.unlink()
    os.close(handle)
    assert child.stop_when(stopped_run.first_steps)
    require_locked(stopped_run.out)
    child.send(signal.SIGCONT)
    assert child.wait() == 0


# ------------------------------------------------------------------------------------- --overwrite
INSIDE = {
    "unet": "unet",
    "data": "experts.parquet",
    "cache": "cache",
    "scores": "scores.safetensors",
    "prompts": "prompts.txt",
    "judge": "judge.py:function",
    "vae": "../run/vae",
    "reward_processor": "reward",
}


def test_overwrite_refuses_inputs_that_it_would_replace(untouched, tmp_path):
    case = Case("smpo", tmp_path, untouched("smpo").data)
    shutil.copytree(untouched("smpo").out, case.out)
    before = picture(case.out)
    for name, inside in INSIDE.items():
        error = case.fail("--overwrite", f"--{name}", case.out / inside)
        assert f"--{name} {case.out / inside} lies inside --out {case.out}" in error
        assert picture(case.out) == before and not list(case.out.glob(".previous*"))


def test_overwrite_keeps_the_results_until_the_new_ones_are_complete(untouched, data, tmp_path):
    case = Case("smpo", tmp_path, data)
    shutil.copytree(untouched("smpo").out, case.out)
    shutil.copytree(untouched("smpo").cache, case.cache)
    before = picture(case.out)
    error = case.fail("--overwrite", "--reward_min", 3, "--reward_max", 2)
    assert "rewards run from 3 to 2" in error and picture(case.out) == before
    error = case.fail("--overwrite", "--data", "nowhere.parquet")
    assert "nowhere.parquet does not exist" in error and picture(case.out) == before

    # Killed after the first step, then while it steps aside once more: nothing of before is lost.
    old = {Path(file).name: content for file, (_, content) in before.items()}
    assert case.start("--overwrite", kill_at=("append", "*/log.jsonl", 2)).wait() < 0
    assert case.start("--overwrite", kill_at=("os.rename", "*/.previous-*/log.jsonl")).wait() < 0
    kept = {file.name: file.read_bytes() for file in case.out.glob(".previous-*/**/*.*")}
    assert old["diffusion_pytorch_model.safetensors"] == kept["diffusion_pytorch_model.safetensors"]
    assert old["step-00000005.pt"] == kept["step-00000005.pt"]
    case.run("--overwrite")
    require_same(case, untouched("smpo"))
    assert not list(case.out.glob(".previous-*"))


def test_overwrite_leaves_a_folder_alone_that_holds_hidden_files_of_others(
    untouched, data, tmp_path
):
    """Nothing but a .git, say: it is no run, and not for --overwrite to delete."""
    case = Case("dpo_baseline", tmp_path, data, "--steps", 1)
    shutil.copytree(untouched().cache, case.cache)
    (case.out / ".git").mkdir(parents=True)
    (case.out / ".git" / "HEAD").write_text("kept")
    case.start("--overwrite").wait()
    assert (case.out / ".git" / "HEAD").read_text() == "kept"


NO_RUNS = [
    '["preset", "model", "data", "steps", "versions"]',
    "",
    "5",
    "null",
    '{"preset": 1}',
    "{",
]


@pytest.mark.parametrize("interpreter", [[sys.executable], [sys.executable, "-O"]])
def test_a_folder_with_another_config_is_not_a_run(interpreter, tmp_path):
    """Under python -O, too, which leaves out assertions."""
    folders = []
    for number, text in enumerate(NO_RUNS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "precious").write_text("kept")
        folders.append(str(folder))
    before = picture(tmp_path)
    code = """
import common, sys
for out in sys.argv[1:]:
    for flag in ("overwrite", "resume"):
        cfg = common.TrainConfig(out=out, **{flag: True})
        try:
            with common.output_lock(cfg, common.DistInfo()):
                print("taken")
        except common.InputError as error:
            print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*interpreter, "-c", code, *folders]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [
        f"--out {out} holds something else than a run: nothing is touched" for out in folders
    ]
    assert result.stdout.splitlines() == [line for line in expected for _ in range(2)]
    after = {name: content for name, content in picture(tmp_path).items() if ".lock" not in name}
    assert after == before


def test_a_cache_inside_the_output_folder_can_be_resumed(data, tmp_path):
    """Killed before it is a run: the folder holds nothing but its cache."""
    case = Case("dpo_baseline", tmp_path, data, "--steps", 1)
    case.cache = case.out / "cache"
    case.flags += ["--cache", case.cache]
    kill_at = ("os.rename", "*/captions-*/*.safetensors")
    assert case.start(kill_at=kill_at).wait() == -signal.SIGKILL
    case.run("--resume")


def test_without_git(untouched, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data, "--steps", 1)
    shutil.copytree(untouched().cache, case.cache)
    (tmp_path / "empty").mkdir()
    case.run(PATH=str(tmp_path / "empty"))
    assert json.loads((case.out / "config.json").read_text())["versions"]["commit"] is None


# ---------------------------------------------------------------------------------- many, at random
def main():
    words = argparse.ArgumentParser()
    words.add_argument("--kills", type=int, default=0)
    words.add_argument("--disks", type=int, default=0)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.disks:
            fill_disks_at_random(Path(folder), given.disks, given.seed)
        else:
            kill_at_random(Path(folder), given.kills or 20, given.seed)


def untouched_runs(folder):
    """The set's path, a whole run of each method, and the seconds that it takes."""
    from datasets import load_dataset

    train = str(TINY / "pairs" / "train.parquet")
    rows = load_dataset("parquet", data_files=train, split=f"train[:{ROWS}]").to_list()
    data = write_rows(rows, folder / "set.parquet")
    whole = {}
    seconds = {}
    for method in ["dpo_baseline", *METHODS]:  # the first starts the fork server, and counts twice
        whole[method] = Case(method, folder / method, data, "--overwrite")
        start = time.monotonic()
        whole[method].run()
        seconds[method] = time.monotonic() - start
    return data, whole, seconds


def is_same(case, whole):
    try:
        require_same(case, whole)
    except (AssertionError, OSError):
        return False
    return True


def fill_disks_at_random(folder, disks, seed):
    """A table: no file of a run can grow beyond a random size; what it said, and the end after
    --resume without that limit."""
    print(f"seed {seed}, torch {torch.__version__}\n")
    print("| disk | method | largest file | exit | one line | after --resume |\n" + "|---" * 6 + "|")
    draw = random.Random(seed)
    data, whole, _ = untouched_runs(folder)
    results = []
    for number in range(disks):
        method = list(METHODS)[number % len(METHODS)]
        limit = int(10 ** draw.uniform(2.5, 7.3))
        case = Case(method, folder / f"full-{number}", data, "--resume")
        child = case.start(limit=limit)
        code = child.wait()
        clean = "Traceback" not in child.output
        clean &= code == 0 or (code == 2 and child.error.startswith("error: "))
        again = case.start()
        good = again.wait() == 0 and is_same(case, whole[method])
        results.append(clean and good)
        end = "bit-identical" if good else "DIFFERENT"
        print(f"| {number + 1} | {method} | {limit:,} | {code} | {clean} | {end} |", flush=True)
    print(f"\n{sum(results)} of {len(results)} full disks end in one line and go on to the same end")
    sys.exit(not all(results))


def kill_at_random(folder, kills, seed):
    """A table: which method was killed when, doing what, and whether the end was the untouched
    run's."""
    print(f"seed {seed}, torch {torch.__version__}\n")
    print("| kill | method | after | during | result |\n" + "|---" * 5 + "|")
    draw = random.Random(seed)
    results = []
    runs = 0
    data, whole, seconds = untouched_runs(folder)
    while len(results) < kills:
        method = list(METHODS)[runs % len(METHODS)]
        runs += 1
        case = Case(method, folder / f"killed-{runs}", data, "--resume")
        killed = []
        code = None
        while code is None:
            child = case.start()
            # A few kills of each run: so all methods have their share
            more = len(killed) < min(3, kills - len(results))
            moment = draw.uniform(0.2, 0.9 * seconds[method]) if more else 600
            child.process.join(moment)
            code = child.process.exitcode
            if code is None:
                child.send(signal.SIGSTOP)  # so that the stage is that of the kill
                time.sleep(0.01)
                killed.append((f"{moment:.2f} s", case.stage()))
                child.send(signal.SIGKILL)
                child.wait()
        good = code == 0 and is_same(case, whole[method])
        for moment, stage in killed:
            results.append(good)
            end = "bit-identical" if good else f"DIFFERENT (exit {code})"
            print(f"| {len(results)} | {method} | {moment} | {stage} | {end} |", flush=True)
    print(f"\n{sum(results)} of {len(results)} kills, in {runs} runs, end as the untouched run")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
