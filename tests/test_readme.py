# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What the README files say exists, runs and holds: commands, flags, links, numbers, snippets, pictures."""

import ast
import json
import math
import re
import shlex
import sys
import types

import numpy as np
import pictures
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, TINY
from PIL import Image

import common
import dpo_baseline
import dro
import eval as evaluation
import smpo

README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "tests/README.md", "tests/tiny/README.md")
SCRIPTS = {"smpo.py": smpo, "dro.py": dro, "dpo_baseline.py": dpo_baseline, "eval.py": evaluation}


def read(page):
    return (ROOT / page).read_text()


def section(title):
    """The text of a part of the README, down to the next title of its level or above."""
    lines = README.splitlines()
    in_code = False
    titles = []  # (line, level, title), without the comments in code
    for i, line in enumerate(lines):
        in_code ^= line.startswith("```")
        found = re.fullmatch(r"(#+) (.*)", line)
        if found and not in_code:
            titles.append((i, len(found[1]), found[2]))
    ((start, level, _),) = [found for found in titles if found[2] == title]
    ends = [i for i, other, _ in titles if i > start and other <= level]
    return "\n".join(lines[start + 1 : min(ends, default=len(lines))])


def table_rows(text):
    """The cells of all table rows of a text, without titles' underlines."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def snippet(first_words):
    """The Python block of the README that begins with these words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (found,) = [code for code in blocks if code.startswith(first_words)]
    return found


def test_nothing_is_left_to_fill_in():
    left = [f"{page}: {what}" for page in PAGES for what in re.findall(r"TODO-RUN\(([^)]*)\)", read(page))]
    assert not left


# ------------------------------------------------------------------------------- links and pictures
def links(page):
    return re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", read(page))


def headings(text):
    """Anchors as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A file is there, and so is the heading; a link with a test's name leads to the file that has it."""
    assert len(links(page)) > 5
    for label, target in links(page):
        if re.match(r"https://", target):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file.read_text()), target
        name = label.strip("`")
        if label.startswith("`test_") and not name.endswith(".py"):
            assert f"def {name}(" in file.read_text(), f"{name} is not in {path}"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_can_be_seen(page):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(page))
    for file in shown:
        assert np.asarray(Image.open((ROOT / page).parent / file).convert("L")).std() > 10, file


def test_the_first_screen_has_the_two_commands():
    first = "\n".join(README.splitlines()[:20])
    assert "pip install -r requirements.txt && torchrun smpo.py\n" in first
    assert "pip install -r requirements.txt && python -m pytest -q\n" in first
    assert "torch==2.13.0\n" in read("requirements.txt") and "torch 2.13.0" in README


def test_the_length():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert len(re.findall(r"[A-Za-z0-9][\w.'-]*", prose)) < 2900 and len(README.split()) < 4100


# ------------------------------------------------------------------------------ commands and flags
def commands(page):
    """Every command of a page that starts one of its scripts: its words, from the script on, and the
    words of torchrun before it."""
    text = read(page)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [*blocks.splitlines(), *inline]:
        line = line.split("#")[0].split("&&")[-1]
        words = shlex.split(line.replace("\n", " "))
        if words and words[0] in ("python", "torchrun") and words[1] != "-m":
            start = next(i for i, word in enumerate(words) if word.endswith(".py"))
            yield words[start:], words[1:start]


def test_commands_are_understood():
    """Each is parsed as its script would, and its values are checked as at a start."""
    found = [(words, launcher) for page in PAGES for words, launcher in commands(page)]
    assert len(found) > 15
    for words, launcher in found:
        script = words[0]
        assert (ROOT / script).exists(), script
        if script not in SCRIPTS:
            known = set(re.findall(r'"(--\w+)"', read(script)))
            assert {word for word in words if word.startswith("--")} <= known, words
            continue
        module = SCRIPTS[script]
        cfg = common.parse(module.Config, module.PRESETS, words[1:])
        common.check_ranges(cfg)
        if script == "eval.py":
            evaluation.wanted_scorers(cfg.scorers, cfg.scorer_paths)
        else:
            common.validate_config(cfg, common.DistInfo(world_size=processes(launcher)))


def processes(launcher):
    """How many processes torchrun starts with these words."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args([*launcher, "script.py"])
    return int(args.nnodes.split(":")[0]) * int(args.nproc_per_node)


def options_of(script):
    if script in SCRIPTS:
        return set(SCRIPTS[script].Config.__dataclass_fields__)
    return set(re.findall(r'"--(\w+)"', read(script)))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_exists(page):
    others = ["tests/bench.py", "tests/bench_data.py", "tests/test_faults.py"]
    others += ["tests/tiny/evidence.py"]
    known = set.union(*map(options_of, [*SCRIPTS, *others]))
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"}  # torchrun's
    known |= {"help"}  # argparse's
    assert set(re.findall(r"(?<![-\w])--(\w+)", read(page))) <= known


def test_flags_are_named_with_their_defaults():
    assert "`--inversion release`, the default" in README
    assert smpo.Config().inversion == "release"
    assert "with 20 steps of DPM-Solver++ (`--rollout_steps`)" in README
    assert dro.Config().rollout_steps == 20
    assert dro.PRESETS["sd15"]["lr"] != 1e-4  # "DRO's learning rate ... ours"


def test_the_sft_command_is_the_one_that_smpo_names():
    """At a tenth of DPO's learning rate."""
    flags = "--preset sd15 --sft --lr 2.048e-6"
    assert flags in README and flags in smpo.SFT_START
    assert dpo_baseline.PRESETS["sd15"]["lr"] / 10 == pytest.approx(2.048e-6)


def test_published_checkpoints_have_the_names_of_the_methods():
    (line,) = [line for line in README.splitlines() if "ylwu/diffusion-dro-sd1.5" in line]
    cfg = common.parse(evaluation.Config, evaluation.PRESETS, shlex.split(line)[2:])
    assert list(evaluation.named_unets(cfg, common.DistInfo())) == ["initial", "dpo", "smpo", "dro"]


# ------------------------------------------------------------------------------------ the methods
def test_the_worked_example_and_the_mean_calls():
    assert common.inversion_path(450, 1000, 5, "release") == [201, 401, 601]
    assert pictures.steps_taken(450, 5, "release") == [(201, 0, 2), (401, 201, 2), (601, 401, 2)]
    assert [t_to for t_to, *_ in pictures.steps_taken(450, 9, "paper")] == [111, 222, 333, 444, 450]
    assert [calls for *_, calls in pictures.steps_taken(450, 9, "paper")] == [1, 1, 1, 1, 2]

    def mean_calls(steps, mode):
        paths = [common.inversion_path(t, 1000, steps, mode) for t in range(1000)]
        calls = [len(path) + 1 if mode == "paper" else 2 * len(path) for path in paths]
        return f"{sum(calls) / 1000:.1f}"

    text = " ".join(section("SmPO").split())
    assert f"{mean_calls(5, 'release')} UNet calls an image" in text
    assert f"{mean_calls(10, 'release')} with n = 10" in text
    assert f"n = 5: {mean_calls(5, 'above')} calls" in text
    assert f"n = 9: {mean_calls(9, 'paper')} calls" in text


def test_the_timeline_of_the_rollout():
    timesteps, stop = dro.trajectory(torch.tensor([470]), 1000, 20)
    way = timesteps[:, 0].tolist()
    assert way[:3] == [970, 920, 870] and way[-1] == 20
    assert way[int(stop) - 1 : int(stop) + 2] == [520, 470, 420]
    assert int(stop) + 1 == 11
    _, stops = dro.trajectory(torch.arange(1000), 1000, 20)
    assert (stops + 1).float().mean() == 10.5
    timeline = " ".join(section("Diffusion-DRO").split())
    assert "970 -> 920 -> 870 -> ... -> 520 -> 470 | 420 -> ... -> 20" in timeline
    assert "11 UNet calls" in timeline and "10.5 of 20" in timeline


def test_what_the_methods_say_of_their_losses():
    """log 2 at the start; a factor gamma (2p - 1); no gradient for equal scores; relu(gap + m)."""
    zero = torch.zeros(2)
    assert dpo_baseline.dpo_loss(zero, zero, 5000)[0].item() == pytest.approx(math.log(2))
    err = torch.tensor([0.1, 0.3])
    p = torch.tensor([0.7])
    smoothed = smpo.smpo_loss(err, zero, p, 2, 10)[0]
    assert smoothed.item() == pytest.approx(-math.log(1 / (1 + math.exp(-10 * 0.4 * 0.2))), rel=1e-5)
    assert smpo.smpo_loss(err, zero, torch.tensor([0.5]), 2, 10)[0].item() == pytest.approx(math.log(2))
    # gap = r of the policy's sample - r of the expert = -0.3 + 0.1
    assert dro.dro_loss(err, zero, 0.25)[0].item() == pytest.approx(0.05)


# -------------------------------------------------------------------------------- cost and memory
def unet_of(shape):
    """The UNet of stable-diffusion-v1-5 or stable-diffusion-xl-base-1.0, without memory."""
    from diffusers import UNet2DConditionModel

    settings = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if shape == "sdxl":
        settings = {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


TFLOP = {"sd15": 0.803, "sdxl": 6.761}  # of a forward of one image
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_flops_of_a_forward(shape):
    from torch.utils.flop_counter import FlopCounterMode

    unet = unet_of(shape)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[shape]
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    added = {"text_embeds": torch.empty(1, 1280, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        latent, hidden = torch.empty(1, 4, side, side), torch.empty(1, 77, width)
        unet(latent, torch.empty(1), hidden, added_cond_kwargs=added if shape == "sdxl" else None)
    assert counter.get_total_flops() / 1e12 == pytest.approx(TFLOP[shape], abs=1e-3)
    assert f"{TFLOP['sd15']:.2f} TFLOP for SD1.5 and {TFLOP['sdxl']:.2f} for SDXL" in " ".join(README.split())


# GiB of a training step's activations, by images with a gradient, with gradient checkpointing, in bf16
# autocast: counted with fake tensors as what is alive beside weights and gradients at the peak.
ACTIVATIONS = {
    ("sd15", "full"): {16: 4.6, 32: 7.5, 64: 14.6},
    ("sd15", "LoRA"): {32: 7.2, 64: 14.5},
    ("sdxl", "full"): {8: 9.4, 16: 14.0},
    ("sdxl", "LoRA"): {8: 4.1, 16: 8.2},
}


def memory(shape, method, kind, rows):
    """GiB: fp32 weights and gradients, AdamW's two states (Adafactor: none), EMA, and in bf16 the
    reference and the copy for calls without gradient. With LoRA only the bf16 weights count."""
    images = rows * (2 if method in ("DPO", "SmPO") else 1)
    fp32 = PARAMETERS[shape] * 4 / 2**30
    parts = [ACTIVATIONS[shape, kind][images]]
    if kind == "LoRA":
        rank_16 = {"sd15": 199_296, "sdxl": 1_451_520}[shape] * 16 * 4 / 2**30
        return sum([*parts, fp32 / 2, 4 * rank_16])
    parts += [fp32, fp32]
    if shape == "sd15":
        parts += [2 * fp32]
    if method != "SFT":
        parts += [fp32 / 2]
    if method in ("SmPO", "DRO"):
        parts += [fp32 / 2]
    if method == "DRO":
        parts += [fp32]
    return sum(parts)


def units(method, steps, kind):
    """Forwards a row: see the README's Cost. Adapters need no gradient of the frozen weights."""
    trained = 1 + (2 if kind == "full" else 1) + 1
    if method == "SFT":
        return trained
    if method == "DRO":
        return trained + 1 + 10.5 + 1
    inversion = {"DPO": 0, "SmPO": {5: 5.588, 10: 10.768}.get(steps)}[method]
    return 2 * (trained + 1 + inversion)


def test_the_cost_table():
    scripts = {"SFT": dpo_baseline, "DPO": dpo_baseline, "SmPO": smpo, "DRO": dro}
    found = [row for row in table_rows(section("Your own model and data")) if row[0].startswith("sd")]
    assert len(found) == 7
    for title, millions, hours, gib, _ in found:
        shape, method = title.split()
        preset = scripts[method].PRESETS[shape]
        assert preset["checkpointing"]
        expected = []
        for kind in ("full", "LoRA"):
            total = preset["steps"] * preset["batch"] * units(method, preset.get("inversion_steps"), kind)
            expected.append([total / 1e6, total * TFLOP[shape] / 300 / 3600])
            expected[-1].append(memory(shape, method, kind, preset["micro_batch"]))
        for cell, column in zip((millions, hours, gib), zip(*expected)):
            for text, value in zip(cell.split(" / "), column):
                digits = len(text.partition(".")[2])
                assert float(text) == pytest.approx(value, abs=0.51 * 10**-digits), (title, cell, value)
    static = memory("sd15", "SmPO", "full", 32) - ACTIVATIONS["sd15", "full"][64]
    assert f"takes {static + ACTIVATIONS['sd15', 'full'][16]:.0f} GiB" in README


PUBLISHED_HOURS = {
    "sd15 DPO": "384 (A100, launcher), 205 (note)",  # 16 A100, about 24 hours
    "sd15 SmPO": "41 (A800, note)",
    "sd15 DRO": "80 to 100 (RTX 3090)",  # 4 cards, 20 to 25 hours
    "sdxl DPO": "976 (note)",
    "sdxl SmPO": "151 (note)",
}


def test_published_hours():
    rows = table_rows(section("Your own model and data"))
    found = {row[0]: row[4] for row in rows if row[0].startswith("sd") and row[4]}
    assert found == PUBLISHED_HOURS


def test_the_disk_table():
    """Pick-a-Pic v2 has about 851,000 pairs without ties, and 59,000 captions."""
    rows = {row[0]: row[1:] for row in table_rows(section("Your own model and data"))}
    pairs, captions = 851_000, 59_000
    for title, side, caption in (("SD1.5", 64, 77 * 768), ("SDXL", 128, 77 * 2048 + 1280)):
        latent = 4 * side * side * 2  # bytes in half precision
        smpo_bytes = 2 * 200 * 1024 * latent + captions * 2 * caption
        dpo_bytes = 2 * 2 * pairs * latent + captions * 2 * caption
        image_cell, caption_cell, smpo_cell, dpo_cell = rows[title]
        assert image_cell == f"{latent // 1024} KiB"
        assert caption_cell == f"{math.ceil(2 * caption / 1024)} KiB"
        assert int(smpo_cell.split()[0]) == pytest.approx(smpo_bytes / 1e9, rel=0.02)
        assert int(dpo_cell.split()[2]) == pytest.approx(dpo_bytes / 1e9, rel=0.02)


# ----------------------------------------------------------------------------------------- formats
def test_the_lines_of_an_image_folder(rows, tmp_path):
    """Each line of the table is read, with the columns that the table names."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    found = [row for row in table_rows(section("Your own model and data")) if row[-1].startswith("`{")]
    assert len(found) == 3
    for about, columns, line in found:
        (tmp_path / "metadata.jsonl").write_text(line.strip("`") + "\n")
        source = common.open_rows(str(tmp_path))
        names = re.findall(r"`(\w+)`", columns)
        assert set(names) <= set(source.raw_names), about
        images = common.IMAGE_COLUMNS if about.startswith("images") else common.PAIR_COLUMNS
        label = () if about.startswith("images") else ("label_0",)
        ((_, row),) = source.rows(("caption", *label, *images))
        assert row["caption"] == "a cat" and all(common.decode_image(row[name]) for name in images)
        assert row.get("label_0", 1) == 1


def test_hpdv3_becomes_an_image_folder(tmp_path, monkeypatch):
    (tmp_path / "hpdv3").mkdir()
    for name, colour in (("x.png", "red"), ("y.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "hpdv3" / name)
    content = [{"prompt": "a cat", "path1": "x.png", "path2": "y.png", "confidence": 0.9}]
    (tmp_path / "hpdv3" / "train.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    exec(snippet("import json\nwith open"), {})
    ((_, row),) = common.open_rows("hpdv3").rows(("caption", "label_0", "jpg_0", "jpg_1"))
    assert (row["caption"], row["label_0"]) == ("a cat", 1)
    assert common.decode_image(row["jpg_0"]).getpixel((0, 0)) == (255, 0, 0)


# ------------------------------------------------------------------------------------- healthy runs
def test_the_log_has_the_values_and_their_first_step(make_set, rows, tmp_path, log_of):
    first = {}
    for name, module in (("dpo", dpo_baseline), ("dro", dro)):
        options = {"data": make_set(rows[:8]), "steps": 1, "batch": 4, "micro_batch": 4, "eval_prompts": 0}
        options |= {"out": tmp_path / name, "cache": tmp_path / "cache"}
        module.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
        (first[name],) = log_of(tmp_path / name)
        assert (tmp_path / name / "curves.png").exists()
    dpo, policy = first["dpo"], first["dro"]
    cells = " ".join(row[0] for row in table_rows(section("Is my run healthy?")))
    named = set(re.findall(r"`(\w+)`", cells))
    assert named <= dpo.keys() | policy.keys()
    assert dpo["loss"] == pytest.approx(math.log(2)) and dpo["margin"] == dpo["accuracy"] == 0
    m = dro.PRESETS["tiny"]["margin"]
    assert policy["loss"] == pytest.approx(m) and policy["gap"] == policy["policy_share"] == 0
    assert policy["active"] == 1


def test_the_healthy_ranges_are_those_of_the_curves():
    for row in table_rows(section("Is my run healthy?")):
        name = row[0].strip("`").split("`")[0]
        if name in ("loss", "accuracy", "active") and "DRO" not in row[0]:
            low, high = re.search(r"([\d.]+) to ([\d.]+)", row[2]).groups()
            assert (float(low), float(high)) == evaluation.HEALTHY[name], name


# ---------------------------------------------------------------------------------------- results
PUBLISHED = {
    # (model, source): PickScore, HPSv2 (SmPO: 2.1, DRO: 2.0), ImageReward, aesthetic, CLIP-H
    ("SD1.5", "SmPO"): (20.83, 23.61, -0.078, 5.390),
    ("DPO", "SmPO"): (21.29, 25.11, 0.195, 5.530),
    ("SmPO", "SmPO"): (22.08, 29.31, 0.885, 5.831),
    ("SDXL", "SmPO"): (22.75, 28.45, 0.881, 6.114),
    ("DPO-SDXL", "SmPO"): (23.13, 30.06, 1.184, 6.112),
    ("SmPO-SDXL", "SmPO"): (23.62, 32.53, 1.331, 6.264),
    ("SD1.5", "DRO"): (20.68, 26.88, 0.177, 5.93, 0.337),
    ("SFT on the experts", "DRO"): (21.24, 28.11, 0.762, 6.34, 0.329),
    ("DPO", "DRO"): (21.00, 27.22, 0.337, 5.96, 0.343),
    ("DRO, HPSv2 experts", "DRO"): (21.52, 28.49, 0.851, 6.40, 0.339),
    ("DRO, PickScore experts", "DRO"): (21.76, 28.38, 0.864, 6.40, 0.345),
}


def test_published_numbers():
    rows = [row for row in table_rows(section("Results")) if row[1] in ("SmPO", "DRO")]
    found = {(row[0], row[1]): tuple(float(cell) for cell in row[2:] if cell) for row in rows}
    assert found == PUBLISHED


def test_the_table_of_presets():
    for script, title in ((smpo, "SmPO"), (dpo_baseline, "DPO"), (dro, "DRO")):
        row = re.search(rf"^\| {title}: (.*)$", README, re.M)[1].split(" | ")[1:]
        for preset, cell in zip(("tiny", "sd15", "sdxl"), row, strict=True):
            strength, lr, count = cell.strip(" |").split(", ")
            steps, rows = count.split(" x ")
            values = common.parse(script.Config, script.PRESETS, ["--preset", preset])
            assert float(strength) == (values.margin if title == "DRO" else values.beta)
            assert (float(lr), int(steps), int(rows)) == (values.lr, values.steps, values.batch)
    assert smpo.Config().gamma == 10 and "(gamma 10)" in README


def test_not_run_is_said_once():
    assert README.lower().count("not run") == 1


# ---------------------------------------------------------------------------------------- copying
def sources(script, *names):
    """The source of some functions of a script."""
    text = read(script)
    found = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return "\n\n".join(ast.get_source_segment(text, found[name]) for name in names)


def test_what_can_be_copied_needs_what_is_said():
    """Each row of the table, in an empty namespace that has what the row names and nothing more. The
    snippets then run with these copies."""
    namespace = {}
    for what, origin, needs in table_rows(section("Copying"))[1:]:
        names = re.findall(r"`(\w+)`", what)
        (script,) = re.findall(r"`(\w+\.py)`", origin)
        has = {"torch": torch, "F": F} if "torch" in needs else {"np": np}
        if "to_device" in needs:
            has["common"] = types.SimpleNamespace(to_device=common.to_device)
        if origin.startswith("section 1"):
            part = re.split(r"^# -+ \d\. .*\n", read(script), flags=re.M)[1]
            exec(part, has)
        else:
            exec(sources(script, *names), has)
        namespace |= {name: has[name] for name in names}
    assert len(namespace) == 10
    assert namespace["win_rate"]([1, 0], [0, 1])["win"] == 0.5
    run_losses(namespace)
    run_inversion_and_rollout(namespace)


def run_losses(namespace):
    """At the reference the loss is log 2, and the model gets a gradient."""
    weight = torch.full((1,), 0.3, requires_grad=True)
    told = []

    def model(x_t, s, caption):
        told.append(s)
        return weight * x_t

    has = namespace | {"torch": torch, "model": model, "reference": model, "caption": None}
    x0 = torch.randn(6, 4, 8, 8)
    exec(snippet("half = "), has | {"x0": x0}, local := {})
    assert local["losses"].tolist() == pytest.approx([math.log(2)] * 3)
    assert weight.grad.abs() > 0
    assert torch.equal(told[0][:3], told[0][3:])  # winner and loser share the time
    velocity = local["eps"] - x0
    assert torch.allclose(local["x_t"], x0 + local["s"] * velocity, atol=1e-6)


def run_inversion_and_rollout(namespace):
    """For a network that always answers c, `paper` would find c. Each rollout ends at its own t."""
    c = torch.randn(4, 4, 8, 8)
    t = torch.tensor([3, 450, 999, 601])

    def unet(x, unet_t, hidden):
        return types.SimpleNamespace(sample=c[hidden[:, 0].long()])

    has = namespace | {"torch": torch, "unet": unet, "hidden": torch.arange(4)[:, None], "t": t}
    has |= {"x0": torch.randn(4, 4, 8, 8), "alpha_bar": torch.linspace(0.999, 0.01, 1000)}
    exec(snippet("def predict_eps"), has)
    assert torch.allclose(has["eps"][3], c[3], atol=1e-4)  # 601 is on the grid: it ends at its t
    assert torch.equal(has["eps_policy"], c)
    assert torch.equal(has["timesteps"].gather(0, has["stop"][None])[0], t)


def test_the_trained_unet_goes_into_the_stock_pipeline(tmp_path, monkeypatch):
    import diffusers

    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs" / "smpo").mkdir(parents=True)
    (tmp_path / "runs" / "smpo" / "unet").symlink_to(TINY / "model" / "unet")
    monkeypatch.chdir(tmp_path)
    names = ("UNet2DConditionModel", "StableDiffusionPipeline")
    has = {name: getattr(diffusers, name) for name in names}
    exec(snippet("unet = UNet2DConditionModel"), has)
    assert has["pipe"].unet is has["unet"]


def test_the_log_goes_to_wandb(tmp_path, monkeypatch):
    (tmp_path / "runs" / "smpo").mkdir(parents=True)
    (tmp_path / "runs" / "smpo" / "log.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 2}\n')
    monkeypatch.chdir(tmp_path)
    logged = []
    fake = types.SimpleNamespace(init=lambda project: None, log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    exec(snippet("import json, wandb"), {})
    assert logged == [{"step": 0, "loss": 1}, {"step": 1, "loss": 2}]


def test_the_model_goes_to_a_hub(monkeypatch):
    """Where --unet ME/MY_MODEL looks for it: in the repository's unet/."""
    import huggingface_hub

    calls = []
    for name in ("create_repo", "upload_folder"):

        def called(api, *args, name=name, **kwargs):
            calls.append((name, args, kwargs))

        monkeypatch.setattr(huggingface_hub.HfApi, name, called)
    exec(snippet("from huggingface_hub"), {})
    assert [name for name, *_ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][2]["path_in_repo"] == "unet"


def test_the_licence_lines_are_those_of_the_sources():
    lines = snippet("# SPDX").strip().splitlines()
    for script in SCRIPTS:
        assert read(script).splitlines()[:2] == lines, script


# --------------------------------------------------------------------------------------- citation
def test_the_citations_agree():
    """BibTeX in the README and CITATION.cff: the same titles and all authors, in order."""
    entries = re.findall(r"title = \{(.*)\},\n  author = \{(.*)\},\n.*?year = \{(\d+)\}", README)
    bibtex = {}
    for title, authors, year in entries:
        bibtex[re.sub("[{}]", "", title)] = (authors.split(" and "), int(year))
    cff = yaml.safe_load(read("CITATION.cff"))
    assert cff["cff-version"] == "1.2.0" and cff["authors"] == [{"name": "the contributors"}]
    assert len(cff["references"]) == len(bibtex) == 4
    for reference in cff["references"]:
        names = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
        assert bibtex[reference["title"]] == (names, reference["year"])
        arxiv = reference["identifiers"][0]["value"].removeprefix("arXiv:")
        assert f"https://arxiv.org/abs/{arxiv}" in README


# ------------------------------------------------------------------------------- the other two pages
def test_the_facts_of_the_tiny_world():
    facts = json.loads((TINY / "facts.json").read_text())
    text = " ".join(read("tests/tiny/README.md").split())
    for name in (
        "labels agree with the judge",
        "best possible agreement with the labels",
        "reward model agrees with the labels",
        "reward model agrees with the judge",
    ):
        assert f"{100 * facts[name]:.1f} %" in text, name
    assert f"{100 * facts['ties']:.0f} % are ties" in text
    assert f"the {facts['test pairs']} pairs" in text
    assert f"score {facts['gold score of the base model']:.3f} on average" in text
    deviation = facts["gold score's standard deviation"]
    assert f"a standard deviation of {deviation:.3f}" in text


def test_the_numbers_of_the_deviations():
    """Those that no other test has in words: 99 timesteps between the release's latent and t."""
    gaps = []
    for t in range(1000):
        end = common.inversion_path(t, 1000, 5, "release")[-1]
        gaps.append(abs(end - t))
    assert round(np.mean(gaps)) in (99, 100)
    decay = (1 + 1599) / (10 + 1599)
    assert f"{decay:.3f}" == "0.994" and "bring to 0.994" in " ".join(read("tests/README.md").split())


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for name in ("losses", "ladder"):
        pictures.PICTURES[name](tmp_path / f"{name}.png")
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).astype(float)
        shown = np.asarray(Image.open(TINY / f"{name}.png").convert("L")).astype(float)
        assert drawn.shape == shown.shape and np.abs(drawn - shown).mean() < 1, name


def test_denoised_images_are_what_the_text_says(tmp_path):
    """From sampled noise comes another image, from `release` nearly the same, from `paper` that image."""
    pictures.draw_inversion(tmp_path / "inversion.png", count=2)
    sheet = np.asarray(Image.open(tmp_path / "inversion.png")).astype(float)[pictures.TOP :]
    shown = []
    for k in (0, 2, 4, 6):  # the image, and what comes back from each kind of noise
        left = pictures.GAP + k * (pictures.SIDE + pictures.GAP)
        shown.append(sheet[:, left : left + pictures.SIDE])
    image, sampled, release, paper = shown
    off = [np.abs(column - image).mean() for column in (sampled, release, paper)]
    assert off[2] < 5 and 2 * off[2] < off[1] < off[0]
