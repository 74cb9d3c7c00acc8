"""Whole runs through the command line's own entry, on a few pairs of the tiny world: what is written, that a
resume and a second process change nothing, and that bad input costs one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

import common
import dpo_baseline
import smpo

SHORT = [
    "--steps",
    "4",
    "--batch",
    "8",
    "--micro_batch",
    "4",
    "--warmup",
    "2",
    "--eval_prompts",
    "0",
    "--save_every",
    "2",
]
METHODS = {"dpo": dpo_baseline, "smpo": smpo}


@pytest.fixture
def short(make_set, rows, tmp_path):
    """short("dpo", "name", more flags) runs a method for 4 steps of 8 pairs and returns the run's folder."""
    data = make_set(rows[:24])

    def run(method, name, *more):
        flags = [
            *SHORT,
            "--data",
            data,
            "--out",
            str(tmp_path / name),
            "--cache",
            str(tmp_path / "cache"),
            *more,
        ]
        METHODS[method].main(flags)
        return tmp_path / name

    return run


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def same(a, b, atol=0.0):
    return all(torch.allclose(a[k], b[k], atol=atol, rtol=0) for k in a)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_its_resume(method, short, log_of):
    whole = short(method, "whole")
    log = log_of(whole)
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert log[0]["margin"] == 0 and log[0]["loss"] == pytest.approx(
        0.693147, abs=1e-5
    )  # trained = reference, exactly
    assert log[1]["margin"] != 0 and log[3]["grad_norm"] > 0
    assert (
        log[0]["unet_calls"] == 4 if method == "dpo" else log[0]["unet_calls"] > 8
    )  # forward or backward, a pair
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(whole / "unet", low_cpu_mem_usage=False)
    start = UNet2DConditionModel.from_pretrained(TINY / "model", subfolder="unet", low_cpu_mem_usage=False)
    assert not same(unet.state_dict(), start.float().state_dict())
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "model", low_cpu_mem_usage=False).to(
        torch.float32
    )
    pipeline.unet = unet
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red star on navy", num_inference_steps=2).images[0].size == (64, 64)
    config = json.loads((whole / "config.json").read_text())
    assert (
        config["beta"] == METHODS[method].PRESETS["tiny"]["beta"]
        and config["versions"]["torch"] == torch.__version__
    )

    # Stopped after two steps (the checkpoint's), then resumed, at a line of the log that the checkpoint does
    # not know
    cut = short(method, "cut", "--steps", "2")
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 9}\n{"step": 3, "lo')
    short(method, "cut", "--resume")
    assert same(weights(whole), weights(cut))
    assert [line["loss"] for line in log_of(cut)] == [line["loss"] for line in log]


def test_micro_batches_do_not_change_the_result(short, log_of):
    """The released code is only right for micro-batch 1. Per-sample t, levels and weights: here the size is
    free."""
    runs = [short("smpo", f"m{m}", "--micro_batch", m, "--steps", "2") for m in ("1", "8")]
    for a, b in zip(*map(log_of, runs)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
    assert same(*map(weights, runs), atol=1e-4)


def test_without_the_cache_the_same_rows_and_draws_come_by(short, log_of, make_set, rows, tmp_path):
    cached = short("smpo", "cached", "--steps", "2")
    data = make_set(rows[:24])
    plain = tmp_path / "plain"
    smpo.main([*SHORT, "--data", data, "--out", str(plain), "--cache", "", "--workers", "1", "--steps", "2"])
    for a, b in zip(log_of(cached), log_of(plain)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_sft_learns_the_winners_and_single_images(short, log_of, make_set, rows):
    out = short("dpo", "sft", "--sft")
    assert {"accuracy", "margin"}.isdisjoint(log_of(out)[0]) and log_of(out)[0]["unet_calls"] == 1
    experts = make_set([{"caption": r["caption"], "image": r["jpg_0"]} for r in rows[:16]], "experts.parquet")
    assert len(log_of(short("dpo", "experts", "--sft", "--data", experts))) == 4


def test_labels_can_come_from_a_scores_file(short, tmp_path, rows, log_of):
    scored = short("smpo", "scored", "--steps", "1")
    out = short("dpo", "relabelled", "--scores", str(scored / "scores.safetensors"), "--steps", "1")
    again = short("smpo", "again", "--scores", str(scored / "scores.safetensors"), "--steps", "1")
    assert log_of(again)[0]["loss"] == log_of(scored)[0]["loss"] and len(log_of(out)) == 1


def test_normalisers_are_the_sets_own_and_recorded(short):
    out = short("smpo", "run", "--steps", "1")
    scores = load_file(out / "scores.safetensors")
    assert scores["score_0"].shape == (24,)
    both = torch.cat([scores["score_0"], scores["score_1"]])
    config = json.loads((out / "config.json").read_text())
    assert (config["reward_min"], config["reward_max"]) == (both.min().item(), both.max().item())
    given = short("smpo", "given", "--steps", "1", "--reward_min", "10", "--reward_max", "30")
    assert json.loads((given / "config.json").read_text())["reward_max"] == 30


def test_an_undecodable_image_drops_its_pair(short, make_set, rows, tmp_path, log_of, capsys):
    broken = [dict(r, label_0=1.0) for r in rows[:12]]
    broken[3]["jpg_1"] = broken[3]["jpg_1"][:40]
    data = make_set(broken, "broken.parquet")
    out = short("smpo", "run", "--data", data, "--steps", "1")
    assert "11 of 12 rows can be used" in capsys.readouterr().out
    scores = load_file(out / "scores.safetensors")["score_1"]
    assert scores.isnan().tolist() == [i == 3 for i in range(12)]
    short(
        "dpo", "plain", "--data", data, "--steps", "3", "--cache", ""
    )  # found while training: the next row is taken
    assert "passed over" in capsys.readouterr().out


def test_two_processes_train_like_one(short, make_set, rows, tmp_path, log_of):
    """torchrun with 2 processes on gloo: the same losses and weights as one process, to rounding."""
    one = short("smpo", "one", "--steps", "2")
    two = tmp_path / "two"
    flags = [
        *SHORT,
        "--steps",
        "2",
        "--data",
        str(tmp_path / "set.parquet"),
        "--out",
        str(two),
        "--cache",
        str(tmp_path / "c2"),
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "smpo.py"),
    ]
    result = subprocess.run(
        [*launch, *flags], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for a, b in zip(log_of(one), log_of(two)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["unet_calls"] == b["unet_calls"]
    assert same(weights(one), weights(two), atol=1e-4)
    assert same(load_file(one / "scores.safetensors"), load_file(two / "scores.safetensors"), atol=1e-4)


def bad(rows, name):
    rows = [dict(r) for r in rows]
    if name == "no image column":
        return [{k: v for k, v in r.items() if k != "jpg_1"} for r in rows]
    if name == "all tied":
        return [dict(r, label_0=0.5) for r in rows]
    if name == "no image decodes":
        return [dict(r, jpg_0=b"nothing") for r in rows]
    if name == "caption is a list":
        return [dict(r, caption=[r["caption"]]) for r in rows]
    return rows


@pytest.mark.parametrize("case, flags, words", [
    ("no data", ["--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ("no model", ["--model", "nowhere/at/all"], "no diffusers pipeline"),
    ("model without a pipeline", ["--model", str(TINY / "reward")], "no diffusers pipeline"),
    ("no unet", ["--unet", "nowhere"], "nowhere"),
    ("no image column", [], "no column jpg_1"),
    ("all tied", [], "its 8 rows are all ties"),
    ("no image decodes", [], "its 8 rows are all ties"),
    ("caption is a list", [], "captions must be text"),
    ("does not divide by", ["--batch", "6", "--micro_batch", "4"], "does not divide"),
    ("no steps", ["--steps", "0"], "--steps must be >0"),
    ("precision", ["--precision", "fp8"], "fp8"),
    ("preset", ["--preset", "sd3"], "sd3 is not one of"),
    ("prompts", ["--eval_prompts", "4", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ("reward", ["--reward", str(TINY / "model")], "cannot be loaded"),
    ("scores", ["--scores", str(TINY / "world.py")], "no scores file"),
    ("out exists", [], "--resume goes on"),
    ("out is not a run", ["--overwrite"], "something else than a run"),
])  # fmt: skip
def test_bad_input_is_one_line_and_touches_nothing(case, flags, words, make_set, rows, tmp_path, capsys):
    data, out = make_set(bad(rows[:8], case)), tmp_path / "out"
    if case.startswith("out"):
        out.mkdir()
        (out / "precious").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        common.launch(
            lambda: smpo.main(
                [*SHORT, "--data", data, "--out", str(out), "--cache", str(tmp_path / "c"), *flags]
            )
        )
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and words in error
    assert (out / "precious").read_text() == "kept" if case.startswith("out") else not out.exists()


def test_exit_code_and_no_traceback_from_the_shell():
    result = subprocess.run(
        [sys.executable, str(ROOT / "smpo.py"), "--data", "gone.parquet"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().split("\n")[-1] == "error: --data gone.parquet does not exist"
    assert (
        subprocess.run([sys.executable, str(ROOT / "smpo.py"), "--bata", "3"], capture_output=True).returncode
        == 2
    )


def test_imports_do_nothing(tmp_path):
    code = "import common, dpo_baseline, smpo, eval, torch; assert not torch.distributed.is_initialized()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, "--nonsense"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir()), result.stderr
