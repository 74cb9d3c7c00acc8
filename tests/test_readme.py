"""The README's commands, flags, files and line links exist."""

import ast
import math
import re
import sys
import types

import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import dpo_baseline
import dro
import eval as evaluation
import smpo

TEXT = (ROOT / "README.md").read_text()
CONFIGS = {"smpo.py": smpo, "dro.py": dro, "dpo_baseline.py": dpo_baseline, "eval.py": evaluation}


def flags_of(script):
    if script in CONFIGS:
        return set(CONFIGS[script].Config.__dataclass_fields__)
    return set(re.findall(r'"--(\w+)"', (ROOT / script).read_text()))


def commands():
    """(script, flag names) of every command in the README: from its .py on, up to the line's end."""
    for line in re.findall(r"^(?:.*\s|`)?([\w/]+\.py)((?: .*)?)$", TEXT.replace("`", "\n"), flags=re.M):
        yield line[0], re.findall(r"--(\w+)", line[1].split("#")[0])


def test_commands_and_flags_exist():
    found = list(commands())
    assert len(found) > 20
    for script, flags in found:
        assert (ROOT / script).exists(), script
        known = flags_of(script)
        if script == "tests/bench.py":
            known |= flags_of("dro.py")
        assert set(flags) <= known | {"help"}, f"{script}: {set(flags) - known}"


def test_every_flag_named_in_passing_exists():
    scripts = [*CONFIGS, "tests/bench.py", "tests/test_faults.py", "tests/tiny/evidence.py"]
    everything = set.union(*(flags_of(script) for script in scripts))
    launcher = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts", "help"}
    assert set(re.findall(r"(?<![-\w])--(\w+)", TEXT)) <= everything | launcher


LINKS = sorted(set(re.findall(r"\[([^\]]*)\]\(([^)#:]+(?:#[^)]*)?)\)", TEXT)))


@pytest.mark.parametrize("label, target", LINKS)
def test_links(label, target):
    """A file is there; a line link points at the definition that the label, or the loss's row, speaks of; a
    link that carries a test's name points at the file which has it."""
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists(), target
    names = {}
    if path.endswith(".py"):
        tree = ast.parse((ROOT / path).read_text())
        names = {n.name: n.lineno for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    if anchor:
        loss = {"Diffusion-DPO": "dpo_loss", "SmPO": "smpo_loss", "DRO": "dro_loss"}
        assert names[loss.get(label, label.strip("`"))] == int(anchor.removeprefix("L"))
    elif label.startswith("`test_") and not label.endswith(".py`"):
        assert label.strip("`") in names, f"{label} is not in {path}"


def test_headings_that_are_linked_exist():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.M)
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(#([\w-]+)\)", TEXT):
        assert target in headings


def test_the_two_commands_stand_on_the_first_screen():
    first = "\n".join(TEXT.splitlines()[:20])
    assert "pip install -r requirements.txt && torchrun smpo.py" in first
    assert "pip install -r requirements.txt && python -m pytest -q" in first


def test_the_snippets_for_copying_run_as_pasted():
    """At the reference DPO's loss is log 2, DRO's the margin; each rollout ends at its own t."""
    part = TEXT.split("## Copying from here")[1].split("Variants are edits")[0]
    around, inversion, samples = re.findall(r"```python\n(.*?)```", part, re.S)
    c, t = torch.full((4, 4, 8, 8), 0.3, requires_grad=True), torch.tensor([3, 450, 999, 600])

    def unet(x, t, hidden):
        return types.SimpleNamespace(sample=c[: len(x)] * hidden[:, :1, None])

    names = vars(smpo).copy() | vars(dro) | vars(common) | {
        "dpo_loss": dpo_baseline.dpo_loss, "unet": unet, "ref": unet, "hidden": torch.ones(4, 2, 1), "t": t,
        "x0": torch.randn(4, 4, 8, 8), "alpha_bar": torch.linspace(0.999, 0.01, 1000),
    }  # fmt: skip
    exec(inversion, names)
    exec(around, names)
    assert names["losses"].tolist() == pytest.approx([math.log(2)] * 2)
    exec(samples, names)
    assert names["losses"].tolist() == pytest.approx([0.001] * 2)
    assert torch.equal(names["ep"], c) and torch.equal(names["_"], t)


def variant(about):
    """The lines of the README's variant whose comment begins like this."""
    block = re.search(r"Variants are edits.*?```python\n(.*?)```", TEXT, re.S)[1]
    (found,) = [part for part in re.split(r"^# ", block, flags=re.M) if part.startswith(about)]
    return found.split("\n", 1)[1]


def edited(old, new):
    """dpo_baseline.py with one line of it replaced, as its reader would do it."""
    lines = (ROOT / "dpo_baseline.py").read_text().split("\n")
    (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(old)]
    indent = re.match(" *", lines[at])[0]
    lines[at : at + 1] = [indent + line for line in new.rstrip().split("\n")]
    module = types.ModuleType("edited")
    sys.modules["edited"] = module  # where its dataclass looks for its annotations
    exec("\n".join(lines), module.__dict__)
    return module


def test_loss_variants_run_as_pasted():
    """p = sigmoid(beta h): cDPO is its cross-entropy with a label of 0.9, IPO beta^2 (h - 1 / (2 beta))^2."""
    margin, beta = torch.linspace(-0.01, 0.01, 5), 500.0
    err, h = torch.cat([-margin, 0 * margin]), margin.double() / 2
    cdpo = edited("losses = -F", variant("DPO with labels smoothed")).dpo_loss(err, 0 * err, beta)[0]
    p = 1 / (1 + (-beta * h).exp())
    assert cdpo.numpy() == pytest.approx((-0.9 * p.log() - 0.1 * (1 - p).log()).numpy(), rel=1e-5)
    ipo = edited("losses = -F", variant("IPO")).dpo_loss(err, 0 * err, beta)[0]
    assert ipo.numpy() == pytest.approx((beta**2 * (h - 1 / (2 * beta)) ** 2).numpy(), rel=1e-4)


def test_the_inversion_variant_runs_as_pasted(make_set, rows, tmp_path, log_of):
    module = edited("xt, target = ", variant("DPO with noise found by inversion"))
    module.main(["--data", make_set(rows[:8]), "--out", str(tmp_path / "o"), "--cache", "", "--steps", "1",
                 "--batch", "4", "--micro_batch", "4", "--eval_prompts", "0"])  # fmt: skip
    (line,) = log_of(tmp_path / "o")
    assert line["loss"] == pytest.approx(math.log(2)) and line["unet_calls"] > 6


def test_the_pictures_show_what_the_text_beside_them_says(tmp_path):
    """Denoised from drawn noise an image comes back as another one, from found noise as itself."""
    pictures.draw_losses(tmp_path / "losses.png")
    pictures.draw_inversion(tmp_path / "inversion.png", count=2)
    sheet = np.asarray(Image.open(tmp_path / "inversion.png")).astype(float)[54:]
    image, drawn, preset, landing_t = (sheet[:, 16 + 144 * k :][:, :128] for k in (0, 2, 4, 6))
    off = [np.abs(column - image).mean() for column in (drawn, preset, landing_t)]
    assert off[2] < 5 and 2 * off[2] < off[1] < off[0]
