"""Kill, stop and starve runs at every stage, then go on: the result is that of the run nobody touched, to the
bit, and no step is done twice.

    python tests/test_faults.py --kills 20 [--seed 0]     # at random moments, over the three methods
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from child import ROOT, Child

TINY = ROOT / "tests" / "tiny"
STEPS = 5
FLAGS = ["--steps", STEPS, "--batch", 8, "--micro_batch", 4, "--warmup", 2, "--save_every", 2,
         "--eval_prompts", 0, "--caption_dropout", 0.1, "--flip"]  # fmt: skip
METHODS = {
    "dpo_baseline": [],
    "smpo": ["--inversion_steps", 2],
    "dro": ["--experts", 24, "--rollout_steps", 5, "--ema", 0.9, "--refresh_every", 3, "--buffer", 16],
}


class Case:
    """One run's command and what stands of it on the disk."""

    def __init__(self, method, folder, data, *more):
        self.method, self.out, self.cache = method, folder / "run", folder / "cache"
        self.flags = [*FLAGS, "--data", data, "--out", self.out, "--cache", self.cache]
        self.flags += [*METHODS[method], *more]
        self.log = folder / "log.txt"

    def start(self, *more, part=16, **options):  # 16 of the 64 rows a part, so that there are several
        self.parts = 64 // part
        return Child(self.method, [*self.flags, *more], self.log, part=part, **options)

    def count(self, pattern, folder=None):
        return len(list((folder or self.out).glob(pattern)))

    def lines(self):
        file = self.out / "log.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def latents(self):
        return 0 < self.count("*/latents/*.safetensors", self.cache) < (2 if self.method == "dro" else 4)

    def scoring(self):
        return 0 < self.count("scores.safetensors.*.parts/*.safetensors") < self.parts

    def first_steps(self):
        return self.lines() == 1

    def saving(self):
        return self.count("checkpoint/new/*") > 0

    def saving_with_one_before(self):
        return self.saving() and self.count("checkpoint/[0-9]*") > 0

    def later_steps(self):
        return self.lines() == 3 and self.count("checkpoint/2") > 0 and not self.saving()

    def writing_unet(self):
        return self.count("unet.new") > 0

    def stage(self):
        """For the table: what was going on."""
        for stage in ("latents", "scoring", "saving", "writing_unet"):
            if getattr(self, stage)():
                return stage.replace("_", " ")
        return f"after step {self.lines()}" if self.lines() else "starting"


STAGES = {
    "dpo_baseline": ["latents", "first_steps", "saving", "later_steps", "writing_unet"],
    "smpo": ["latents", "scoring", "saving", "later_steps", "saving_with_one_before"],
    "dro": ["scoring", "latents", "first_steps", "saving", "later_steps", "saving_with_one_before"],
}


def unet(out):
    return (Path(out) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def log_of(out):
    """(step, loss, gradient norm) of each line: the numbers that do not depend on the machine's mood."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def same(case, whole):
    """The run ended as the untouched one did, and every step is there once."""
    log = log_of(case.out)
    once = [step for step, *_ in log] == [*range(STEPS)]
    return once and log == log_of(whole.out) and unet(case.out) == unet(whole.out)


def write_set(path):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(TINY / "pairs" / "train.parquet"), split="train")
    rows.select(range(64)).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set.parquet")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, data):
    """untouched(method) -> the Case of the run that nobody disturbs, made once."""
    made = {}

    def whole(method):
        if method not in made:
            made[method] = Case(method, tmp_path_factory.mktemp(method), data)
            child = made[method].start()
            assert child.wait() == 0, child.output[-3000:]
        return made[method]

    return whole


@pytest.mark.parametrize("method", METHODS)
def test_kill_at_every_stage(method, untouched, data, tmp_path):
    case, more = Case(method, tmp_path, data), ()
    for stage in STAGES[method]:
        child = case.start(*more)
        assert child.send_when(getattr(case, stage)) == -signal.SIGKILL, (stage, child.output[-3000:])
        more = ["--resume"]
    child = case.start("--resume")
    assert child.wait() == 0, child.output[-3000:]
    assert same(case, untouched(method))
    leftovers = [*case.out.rglob("*.new"), *case.out.glob("*.parts"), *case.out.glob("checkpoint/new")]
    assert not leftovers and case.count("checkpoint/*") == 1


def test_kill_during_the_report(data, tmp_path):
    more = ["--steps", 1, "--eval_prompts", 4, "--eval_steps", 2, "--prompts", TINY / "prompts" / "test.txt",
            "--judge", f"{TINY / 'world.py'}:gold_score"]  # fmt: skip
    whole, case = (Case("dpo_baseline", tmp_path / name, data, *more) for name in ("whole", "killed"))
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert whole.start().wait() == 0
    # all of the start model's images are there, not all of the trained one's
    child = case.start()
    assert child.send_when(lambda: 4 <= case.count("images/*/*.png", case.cache) < 8) == -signal.SIGKILL
    assert not (case.out / "scores.json").exists()
    assert case.start("--resume").wait() == 0
    a, b = (json.loads((c.out / "scores.json").read_text()) for c in (whole, case))
    assert a["scores"] == b["scores"] and a["win_rates"] == b["win_rates"]
    assert unet(case.out) == unet(whole.out)


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stop_by_signal_saves_and_says_how_to_go_on(number, group, untouched, data, tmp_path):
    """Ctrl-C reaches the whole group: the loader's worker must not die before the step has its data."""
    case = Case("dpo_baseline", tmp_path, data)
    child = case.start("--workers", 1)
    assert child.send_when(case.first_steps, number, group) == 130, child.output[-3000:]
    step = case.lines()
    assert child.error == f"stopped after step {step} of {STEPS}, all saved: --resume goes on"
    assert step < STEPS and "Traceback" not in child.output
    assert case.count(f"checkpoint/{step}/state.json") == 1
    assert case.start("--resume").wait() == 0 and same(case, untouched("dpo_baseline"))


def test_a_run_in_the_background_does_not_hear_ctrl_c(untouched, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data)
    assert case.start(ignore=True).send_when(case.first_steps, signal.SIGINT) == 0
    assert same(case, untouched("dpo_baseline"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_labelling_keeps_the_parts(number, data, tmp_path):
    case = Case("smpo", tmp_path, data)
    child = case.start(part=2)  # many parts: a moment that a busy machine does not miss
    assert child.send_when(case.scoring, number) == 130 and "Traceback" not in child.output
    assert child.error == "interrupted: what was finished is kept, --resume goes on"
    assert case.scoring()


def test_a_full_disk_leaves_the_checkpoint_before_it(untouched, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data)
    assert case.start("--steps", 2).wait() == 0
    child = case.start("--resume", limit=10_000_000)  # the UNet's file fits, the optimizer's does not
    assert child.wait() == 2 and "Traceback" not in child.output
    assert child.error.startswith("error: checkpoint of step 4 cannot be written: ")
    assert "File too large" in child.error and child.error.endswith("--resume goes on from it")
    assert [f.name for f in (case.out / "checkpoint").iterdir()] == ["2"]
    assert case.start("--resume").wait() == 0 and same(case, untouched("dpo_baseline"))


@pytest.mark.parametrize("limit, more, what", [
    (20_000, [], "part-000000.safetensors cannot be written"),  # the latents
    (3_000_000, ["--keep_every", 1], "unet-1 cannot be written"),
    (200, [], "File too large"),  # not even config.json
])  # fmt: skip
def test_a_full_disk_is_one_line_anywhere(limit, more, what, data, tmp_path):
    case = Case("dpo_baseline", tmp_path, data, *more)
    if limit == 200:
        assert case.start("--steps", 1).wait() == 0
        case.flags[-1:] += ["--out", tmp_path / "other"]  # the cache is there, the run is not
        case.out = tmp_path / "other"
    child = case.start(limit=limit)
    assert child.wait() == 2 and "Traceback" not in child.output, child.output[-2000:]
    assert child.error.startswith("error: ") and what in child.error
    assert not [*case.cache.rglob("*.new"), *case.out.glob("unet*")]
    assert case.start("--resume").wait() == 0


def test_torchrun_restarts_after_a_killed_worker(untouched, data, tmp_path):
    """One of two workers is killed; torchrun starts both again, and --resume goes on."""
    case = Case("dpo_baseline", tmp_path, data, "--save_every", 1)  # one micro-batch a worker
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max_restarts=1", ROOT / "dpo_baseline.py", *case.flags, "--resume"]  # fmt: skip
    with open(case.log, "w") as log:
        agent = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        while not case.count("checkpoint/[0-9]*"):
            assert agent.poll() is None, case.log.read_text()[-3000:]
            time.sleep(0.005)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", children[-1]], check=True)
        assert agent.wait(150) == 0, case.log.read_text()[-3000:]
    assert case.log.read_text().count("trained parameters") == 2
    steps = log_of(case.out)
    assert [step for step, *_ in steps] == [*range(STEPS)]
    for (_, a, _), (_, b, _) in zip(steps, log_of(untouched("dpo_baseline").out)):
        assert a == pytest.approx(b, abs=1e-5)


# ------------------------------------------------------------------------------------ what a resume refuses
@pytest.fixture
def stopped_run(data, tmp_path):
    """A run with a checkpoint of step 2, and a picture of all its files."""
    case = Case("dpo_baseline", tmp_path, data)
    assert case.start("--steps", 2).wait() == 0
    return case


def picture(folder):
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


def test_a_resume_with_other_settings_is_refused_and_touches_nothing(stopped_run, tmp_path):
    before = picture(stopped_run.out)
    other = str(tmp_path / "other.parquet")
    Path(other).write_bytes(Path(stopped_run.flags[stopped_run.flags.index("--data") + 1]).read_bytes())
    for name, value in {"beta": 7.0, "data": other, "lr": 1e-3, "seed": 5, "flip": False}.items():
        child = stopped_run.start("--resume", f"--{name}", value)
        assert child.wait() == 2 and child.error.startswith(f"error: --resume goes on with --{name} "), name
        assert f"not {value}: give the same" in child.error and picture(stopped_run.out) == before
    # these may differ
    assert stopped_run.start("--resume", "--steps", 3, "--workers", 1, "--save_every", 1).wait() == 0


def test_a_resume_without_a_setting_it_had_is_refused_and_touches_nothing(data, tmp_path):
    """Known late, at the checkpoint: what is not given now may be a default that the run has resolved."""
    case = Case("dpo_baseline", tmp_path, data, "--steps", 1)
    vae = TINY / "model" / "vae"
    assert case.start("--vae", vae).wait() == 0
    before, child = picture(case.out), case.start("--resume")
    assert child.wait() == 2 and f"goes on with --vae {vae}, not None" in child.error
    assert picture(case.out) == before


@pytest.mark.parametrize("damage", ["state.json is cut", "no settings", "weights are cut", "a file is gone"])
def test_a_damaged_checkpoint_is_one_line(damage, stopped_run):
    folder = stopped_run.out / "checkpoint" / "2"
    state, weights = folder / "state.json", folder / "unet.safetensors"
    if damage == "state.json is cut":
        state.write_text(state.read_text()[:30])
    elif damage == "no settings":
        content = json.loads(state.read_text())
        del content["settings"]
        state.write_text(json.dumps(content))
    elif damage == "weights are cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    else:
        (folder / "optimizer.safetensors").unlink()
    before = picture(stopped_run.out)
    child = stopped_run.start("--resume")
    assert child.wait() == 2 and "Traceback" not in child.output
    assert "checkpoint cannot be read" in child.error and "--overwrite starts over" in child.error
    assert picture(stopped_run.out) == before


def test_the_reference_is_the_start_model_also_after_a_resume(stopped_run):
    """If it were the resumed UNet, the first margin would be 0 again."""
    assert stopped_run.start("--resume").wait() == 0
    lines = (stopped_run.out / "log.jsonl").read_text().splitlines()
    margins = [json.loads(line)["margin"] for line in lines]
    assert margins[0] == 0 and all(margin != 0 for margin in margins[1:])


# -------------------------------------------------------------------------------------- many, at random
def main():
    words = argparse.ArgumentParser()
    words.add_argument("--kills", type=int, default=20)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_at_random(Path(folder), given.kills, given.seed)


def kill_at_random(folder, kills, seed):
    """A table: which method was killed when, doing what, and whether the end was the untouched run's."""
    print(f"seed {seed}, torch {torch.__version__}\n")
    print("| kill | method | after | during | result |\n" + "|---" * 5 + "|")
    draw, data, rows, runs = random.Random(seed), write_set(folder / "set.parquet"), [], 0
    whole, seconds = {}, {}
    for method in ["dpo_baseline", *METHODS]:  # the first starts the fork server, and counts twice
        (folder / method).mkdir(exist_ok=True)
        whole[method], start = Case(method, folder / method, data, "--overwrite"), time.monotonic()
        assert whole[method].start().wait() == 0
        seconds[method] = time.monotonic() - start
    while len(rows) < kills:
        method, killed = list(METHODS)[runs % len(METHODS)], []
        runs += 1
        (folder / f"killed-{runs}").mkdir()
        case, code = Case(method, folder / f"killed-{runs}", data), None
        while code is None:
            child = case.start(*(["--resume"] if case.out.exists() else []))
            more = len(killed) < min(3, kills - len(rows))  # kills of one run: all methods have their share
            moment = draw.uniform(0.2, 0.9 * seconds[method]) if more else 600
            child.process.join(moment)
            code = child.process.exitcode
            if code is None:
                child.send(signal.SIGSTOP)  # so that the stage is that of the kill
                time.sleep(0.01)
                killed.append((f"{moment:.2f} s", case.stage()))
                child.send(signal.SIGKILL)
                child.wait()
        good = code == 0 and same(case, whole[method])
        for moment, stage in killed:
            rows.append(good)
            end = "bit-identical" if good else f"DIFFERENT (exit {code})"
            print(f"| {len(rows)} | {method} | {moment} | {stage} | {end} |", flush=True)
    print(f"\n{sum(rows)} of {len(rows)} kills, in {runs} runs, end as the untouched run")
    sys.exit(not all(rows))


if __name__ == "__main__":
    main()
