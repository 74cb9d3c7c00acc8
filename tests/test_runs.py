"""Whole runs through the command line's own entry, on a few pairs of the tiny world: what is written, that a
resume and a second process change nothing, and that bad input costs one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from child import Child
from conftest import ROOT, TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import dpo_baseline
import dro
import smpo

SHORT = ["--steps", "4", "--batch", "8", "--micro_batch", "4", "--warmup", "2", "--eval_prompts", "0",
         "--save_every", "2"]  # fmt: skip
METHODS = {"dpo": dpo_baseline, "smpo": smpo, "dro": dro}


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


@pytest.mark.parametrize("method", ["dpo", "smpo"])
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
    flags = ["--steps", "2", "--beta", "300"]  # beta multiplies the rounding of other batch sizes' kernels
    runs = [short("smpo", f"m{m}", "--micro_batch", m, *flags) for m in ("1", "8")]
    for a, b in zip(*map(log_of, runs)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert same(*map(weights, runs), atol=1e-4)


def test_without_the_cache_the_same_rows_and_draws_come_by(short, log_of, make_set, rows, tmp_path):
    # latents encoded in other batches differ in their last bits, and beta multiplies that
    cached = short("smpo", "cached", "--steps", "2", "--beta", "300")
    data = make_set(rows[:24])
    plain = tmp_path / "plain"
    flags = ["--data", data, "--out", str(plain), "--cache", "", "--workers", "1", "--steps", "2"]
    smpo.main([*SHORT, *flags, "--beta", "300"])
    for a, b in zip(log_of(cached), log_of(plain)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_sft_learns_the_winners_and_single_images(short, log_of, make_set, rows):
    out = short("dpo", "sft", "--sft")
    assert {"accuracy", "margin"}.isdisjoint(log_of(out)[0]) and log_of(out)[0]["unet_calls"] == 1
    experts = make_set([{"caption": r["caption"], "image": r["jpg_0"]} for r in rows[:16]], "experts.parquet")
    assert len(log_of(short("dpo", "experts", "--sft", "--data", experts))) == 4


def test_labels_can_come_from_a_scores_file(short, tmp_path, rows, log_of, capsys):
    scored = short("smpo", "scored", "--steps", "1")
    out = short("dpo", "relabelled", "--scores", str(scored / "scores.safetensors"), "--steps", "1")
    again = short("smpo", "again", "--scores", str(scored / "scores.safetensors"), "--steps", "1")
    assert log_of(again)[0]["loss"] == log_of(scored)[0]["loss"] and len(log_of(out)) == 1
    with safe_open(scored / "scores.safetensors", "pt") as file:  # equal scores: nobody has won
        tensors, about = {k: file.get_tensor(k) for k in common.SCORES}, file.metadata()
    tensors["score_1"][:5] = tensors["score_0"][:5]
    save_file(tensors, tmp_path / "ties.safetensors", about)
    short("dpo", "ties", "--scores", str(tmp_path / "ties.safetensors"), "--steps", "1")
    usable = [row["label_0"] != 0.5 for row in rows[:24]]
    assert f"{sum(usable[5:])} of 24 rows can be used" in capsys.readouterr().out


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


TWO = {  # where the ranks' numbers of UNet calls differ: smpo's levels, dro's rollouts
    "smpo": ["--inversion_steps", "2"], "dpo": [],
    "dro": ["--refresh_every", "2", "--buffer", "16", "--experts", "12", "--rollout_steps", "5"],
}  # fmt: skip


@pytest.mark.parametrize("method", TWO)
def test_two_processes_train_like_one(method, short, tmp_path, log_of):
    """2 processes on gloo, with a resume: the same losses and weights as one process, to rounding."""
    one, two = short(method, "one", *TWO[method]), tmp_path / "two"
    flags = [*SHORT, *TWO[method], "--data", tmp_path / "set.parquet", "--out", two, "--cache", tmp_path]
    name = METHODS[method].__name__
    for more in (["--steps", "2"], ["--resume"]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [where | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        children = [Child(name, flags + more, tmp_path / f"rank-{r['RANK']}.txt", **r) for r in ranks]
        for child in children:
            assert child.wait() == 0, child.output[-3000:]
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["unet_calls"] == b["unet_calls"]
    assert same(weights(one), weights(two), atol=1e-4)
    if method != "dpo":
        assert same(load_file(one / "scores.safetensors"), load_file(two / "scores.safetensors"), atol=1e-4)


def bad(rows, case):
    """The rows, spoiled as the case says."""

    def last(**values):  # the last row is another
        return [dict(r, label_0=1.0) for r in rows[:-1]] + [rows[-1] | values]

    spoiled = {
        "no rows": lambda: [],
        "no image column": lambda: [{k: v for k, v in r.items() if k != "jpg_1"} for r in rows],
        "all tied": lambda: [dict(r, label_0=0.5) for r in rows],
        "no label": lambda: [dict(r, has_label=False) for r in rows],
        "no image decodes": lambda: [dict(r, jpg_0=b"nothing") for r in rows],
        "captions are numbers": lambda: [dict(r, caption=i) for i, r in enumerate(rows)],
        "a caption is missing": lambda: last(caption=None),
        "a label is 0.3": lambda: last(label_0=0.3),
        "a label is missing": lambda: last(label_0=None),
    }
    return spoiled.get(case, lambda: rows)()


def spoil(case, data, out, folder, rows):
    """What a case needs besides rows; returns further flags."""
    model, unet = folder / "model", folder / "model" / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    if case in ("no rows", "cut in the middle", "cut at once"):
        from datasets import Dataset, Features, Value

        columns = {"caption": Value("string"), "label_0": Value("float64")}
        columns |= {name: Value("binary") for name in common.PAIR}
        table = Dataset.from_dict({k: [r[k] for r in rows] if case != "no rows" else [] for k in columns},
                                  features=Features(columns))  # fmt: skip
        table.to_parquet(data, batch_size=2)  # four row groups: the first can be read
        content = bytearray(Path(data).read_bytes())
        if case == "cut in the middle":
            middle = slice(len(content) * 6 // 10, len(content) * 9 // 10)
            content[middle] = bytes(len(content[middle]))
        Path(data).write_bytes(content[:200] if case == "cut at once" else content)
    elif case == "a shard is cut":
        (folder / "shards").mkdir()
        content = Path(data).read_bytes()
        (folder / "shards" / "a.parquet").write_bytes(content)
        half = len(content) // 2  # the last bytes say what is where: it can be opened, but not read
        (folder / "shards" / "b.parquet").write_bytes(content[:4] + bytes(half) + content[half + 4 :])
        return ["--data", str(folder / "shards")]
    elif case.startswith("model:"):
        shutil.copytree(TINY / "model", model)
        if case == "model: no unet":
            shutil.rmtree(unet)
        if case == "model: no text encoder":
            shutil.rmtree(model / "text_encoder")
        if case == "model: weights are cut":
            weights.write_bytes(weights.read_bytes()[:9999])
        if case == "model: a weight is nan":
            tensors = load_file(weights)
            tensors["conv_in.bias"][0] = float("nan")
            save_file(tensors, weights)
        return ["--model", str(model)]
    elif case.startswith("unet:"):
        from diffusers import UNet2DConditionModel

        config = UNet2DConditionModel.load_config(TINY / "model", subfolder="unet")
        xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
              "projection_class_embeddings_input_dim": 112}  # fmt: skip
        other = {"unet: of SDXL": xl, "unet: for inpainting": {"in_channels": 9},
                 "unet: of another encoder": {"cross_attention_dim": 32}}[case]  # fmt: skip
        UNet2DConditionModel.from_config(config | other).save_pretrained(folder / "unet")
        return ["--unet", str(folder / "unet")]
    elif case.startswith("out"):
        if case == "out is a file":
            out.write_text("kept")
        elif case == "out is under a file":
            (folder / "file").write_text("kept")
            return ["--out", str(folder / "file" / "run")]
        else:
            out.mkdir()
            (out / "precious").write_text("kept")
    elif case.startswith("judge"):
        (folder / "judge.py").write_text(
            "def boom(images, prompts): return 1 / 0\ndef nan(images, prompts): return [float('nan')]\n"
        )
        (folder / "broken.py").write_text("import nothing_of_that_name\n")
        file = "broken.py" if case == "judge cannot be imported" else "judge.py"
        return ["--judge", f"{folder / file}:{case.split()[-1]}"]
    elif case == "prompts are empty":
        (folder / "empty.txt").write_text("\n\n")
        return ["--prompts", str(folder / "empty.txt")]
    elif case.startswith("scores:"):
        value = {"scores: not finite": float("nan"), "scores: all equal": 1.0}.get(case)
        from datasets import Dataset

        others = [dict(r, caption="another") for r in rows] if case == "scores: of another set" else rows
        Dataset.from_list(others).to_parquet(folder / "scored.parquet")
        made, number = folder / "made.safetensors", iter(range(100))

        def score(images, prompts):
            return torch.tensor([value or next(number) for _ in images]).float()

        with suppress(common.InputError):  # not finite: the file is made all the same
            common.score_pairs(str(folder / "scored.parquet"), score, made, "made up", "")
        return ["--scores", str(folder / "made.safetensors")]
    return []


REPORT = ["--eval_prompts", "4"]


@pytest.mark.parametrize("case, flags, words", [
    ("no data", ["--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ("no hub", ["--data", "no-one-at-all/no-such-set"], "no-one-at-all/no-such-set cannot be read"),
    ("a folder of nothing", ["--data", str(TINY / "prompts")], "neither parquet files nor a metadata.jsonl"),
    ("no parquet", ["--data", str(TINY / "facts.json")], "facts.json cannot be read"),
    ("cut at once", [], "cannot be read"),
    ("cut in the middle", [], "cannot be read"),
    ("a shard is cut", [], "cannot be read after row 7"),
    ("a shard is cut", ["--cache", ""], "cannot be read"),
    ("no rows", [], "has no rows"),
    ("no model", ["--model", "nowhere/at/all"], "no diffusers pipeline"),
    ("not a pipeline", ["--model", str(TINY / "reward")], "no diffusers pipeline"),
    ("model: no unet", [], "no unet in"),
    ("model: no text encoder", [], "no text_encoder in"),
    ("model: weights are cut", [], "no unet in"),
    ("model: a weight is nan", [], "weights that are not finite"),
    ("no unet", ["--unet", "nowhere"], "nowhere"),
    ("unet: of SDXL", [], "its addition_embed_type is text_time, not None"),
    ("unet: for inpainting", [], "its in_channels is 9, not 4"),
    ("unet: of another encoder", [], "its cross_attention_dim is 32, not 64"),
    ("no image column", [], "no column jpg_1"),
    ("all tied", [], "its 8 rows are all ties"),
    ("no label", [], "its 8 rows are all ties"),
    ("no image decodes", [], "its 8 rows are all ties"),
    ("captions are numbers", [], "caption of row 0 (from 0) is no text: 0"),
    ("a caption is missing", [], "caption of row 7 (from 0) is no text: None"),
    ("a label is 0.3", [], "label_0 of row 7 (from 0) is 0.3"),
    ("a label is missing", ["--cache", ""], "label_0 of row 7 (from 0) is None"),
    ("does not divide by", ["--batch", "6", "--micro_batch", "4"], "does not divide"),
    *[(name, [f"--{name}", value], f"--{name} must be {wanted}") for name, value, wanted in (
        ("steps", "0", ">0"), ("batch", "-8", ">0"), ("lr", "nan", ">0"), ("clip", "-1", ">=0"),
        ("warmup", "-1", ">=0"), ("caption_dropout", "1.5", "0..1"), ("workers", "-1", ">=0"),
        ("resolution", "60", "a multiple of 8"), ("save_every", "0", ">0"), ("keep_every", "-2", ">=0"),
        ("beta", "0", ">0"), ("gamma", "0", ">0"), ("renoise", "-1", ">=0"), ("inversion_steps", "-1", ">=0"),
        ("min_t", "-1", ">=0"), ("eval_prompts", "-1", ">=0"), ("weight_decay", "inf", ">=0"))],
    *[(f"dro: {name}", [f"--{name}", value], f"--{name} {words}") for name, value, words in (
        ("margin", "0", "must be >0"), ("refresh_every", "0", "must be >0"), ("experts", "0", "must be >0"),
        ("ema", "1", "must be 0..<1"), ("ema", "-0.1", "must be 0..<1"), ("buffer", "-1", "must be >=0"),
        ("buffer", "2", "2 holds less than"), ("rollout_steps", "30", "30 does not divide"),
        ("rollout_steps", "0", "must be >0"))],
    ("min_t", ["--min_t", "1000"], "--min_t 1000 is not below the model's 1000 timesteps"),
    ("landing", ["--landing", "nonsense"], "argument --landing: invalid choice: 'nonsense'"),
    ("precision", ["--precision", "fp8"], "fp8"),
    ("preset", ["--preset", "sd3"], "sd3 is not one of"),
    ("prompts", [*REPORT, "--prompts", "nowhere.txt"], "nowhere.txt"),
    ("prompts are empty", REPORT, "holds no prompt"),
    ("judge missing", [*REPORT, "--judge", "nowhere.py:f"], "no file nowhere.py"),
    ("judge has no function", REPORT, "has no function function"),
    ("judge goes boom", REPORT, "raises ZeroDivisionError"),
    ("judge cannot be imported", REPORT, "raises ModuleNotFoundError"),
    ("judge says nan", REPORT, "0 finite values"),
    ("reward", ["--reward", str(TINY / "model")], "cannot be loaded"),
    ("scores", ["--scores", str(TINY / "world.py")], "no scores file"),
    ("scores: of another set", [], "was made from other rows"),
    ("scores: not finite", [], "not one score is finite"),
    ("scores: all equal", [], "rewards run from 1 to 1: nothing tells the images apart"),
    ("range", ["--reward_min", "3", "--reward_max", "2"], "rewards run from 3 to 2"),
    ("out exists", [], "--resume goes on"),
    ("out is not a run", ["--overwrite"], "something else than a run"),
    ("out is a file", ["--overwrite"], "no folder that can be written to"),
    ("out is under a file", [], "no folder that can be written to"),
])  # fmt: skip
def test_bad_input_is_one_line_and_touches_nothing(
    case, flags, words, make_set, rows, tmp_path, capsys, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nobody is asked
    rows = rows[:8]
    data, out = make_set(bad(rows, case) or rows), tmp_path / "out"
    method = dro if case.startswith("dro:") else smpo
    more = spoil(case, data, out, tmp_path, rows)
    files = [*SHORT, "--data", data, "--out", str(out), "--cache", str(tmp_path / "c"), "--judge", "", *more]
    with pytest.raises(SystemExit) as stop:
        common.launch(lambda: method.main([*files, *flags]))
    said = capsys.readouterr().err.strip()
    error = said.split("\n")[-1]
    assert stop.value.code == 2 and "error: " in error and words in error and "Traceback" not in said
    if case.startswith("out"):
        assert [f.read_text() for f in tmp_path.glob("*/precious")] + [f.read_text() for f in (
            out, tmp_path / "file") if f.is_file()] == ["kept"]  # fmt: skip
    elif case in ("scores: all equal", "range"):  # known when all is scored: what that cost is kept
        assert not (out / "unet").exists() and not (out / "log.jsonl").exists()
    else:
        assert not out.exists()


def test_a_nan_loss_stops_and_keeps_the_last_checkpoint(short, make_set, rows, tmp_path, capsys, log_of):
    """A latent that overflowed in half precision would look like this: nan, in one row of 24."""
    out = short("dpo", "first", "--steps", "1", "--save_every", "1")
    usable = [i for i, row in enumerate(rows[:24]) if row["label_0"] != 0.5]
    order = torch.randperm(len(usable), generator=common.generator(0, "order", 0))
    row = usable[order[8 * 2 + 5]]  # met in step 2
    file = next((tmp_path / "cache").glob("*/latents/*.safetensors"))
    with safe_open(file, "pt") as part:
        tensors, about = {k: part.get_tensor(k) for k in part.keys()}, part.metadata()  # noqa: SIM118
    tensors["jpg_0.latent"][row] = float("nan")
    save_file(tensors, file, about)
    with pytest.raises(common.InputError, match="the loss is nan at step 2; the last checkpoint is kept"):
        short("dpo", "first", "--resume", "--save_every", "1", "--steps", "3")
    assert [f.name for f in (out / "checkpoint").iterdir()] == ["2"]
    assert [line["step"] for line in log_of(out)] == [0, 1]
    kept = load_file(out / "checkpoint" / "2" / "unet.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(short, monkeypatch):
    """The loss of such a step is finite still; its weights are not."""
    calls, real = [], dpo_baseline.dpo_loss

    def spoiled(err, ref_err, beta):
        calls.append(1)
        losses, margin = real(err, ref_err, beta)
        root = (0 * err[: len(losses)]).sqrt()  # 0, and its derivative is infinite
        return (losses + 0 * root if len(calls) == 3 else losses), margin

    monkeypatch.setattr(dpo_baseline, "dpo_loss", spoiled)
    with pytest.raises(common.InputError, match="grad_norm is nan at step 1; the last checkpoint is kept"):
        short("dpo", "run", "--save_every", "1")
    out = short("dpo", "run", "--save_every", "1", "--resume", "--steps", "2")  # goes on from step 1
    assert all(value.isfinite().all() for value in weights(out).values())


@pytest.mark.parametrize("preset", ["tiny", "sd15"])
def test_help_shows_the_presets_own_values(preset, capsys):
    with pytest.raises(SystemExit) as done:
        smpo.main(["--preset", preset, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = re.findall(r" --(\w+) (?:(?! --).)*\(default: ([^)]*)\)", text)
    shown = dict(reversed(shown))  # a flag's own line comes before others speak of it
    assert done.value.code == 0
    for name in ("lr", "batch", "beta", "resolution", "out"):
        assert shown[name] == str(smpo.PRESETS[preset][name])


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
