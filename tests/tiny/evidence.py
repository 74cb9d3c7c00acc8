# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Which of the methods' claims hold in the tiny world, where the true preference is known.

    python tests/tiny/evidence.py                     # everything missing, two jobs at a time
    python tests/tiny/evidence.py --configs dpo smpo  # these configurations only
    python tests/tiny/evidence.py --quick             # four short runs; nothing is kept
    python tests/tiny/evidence.py --tables            # tables and picture of what is there

The protocol is the same for every configuration:

1. Search: four settings, two seeds, the search captions. The setting with the best mean
   ground-truth score is the chosen one. The test captions play no part in this.
2. Test: the chosen setting is trained with five other seeds and scored on the test captions.
3. Curve, for six configurations: the same with 1/4 and 2 times the chosen learning rate.

Every run takes 100 steps of 32 rows and ends with the EMA weights. Image j of caption i starts from
the same noise for every model of a seed, so two models are compared image by image.

All results of a configuration are one file, evidence/NAME.json, with one line for each job. A job
that is in its file is not done again: the command can be stopped at any time and started again.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE), str(HERE.parent)]

import evidence_picture  # noqa: E402
import explain  # noqa: E402
import released  # noqa: E402

import common  # noqa: E402
import eval as evaluation  # noqa: E402

RESULTS = HERE / "evidence"
README = HERE / "README.md"
TINY = common.tiny_preset("evidence")
STEPS = 100
BATCH = 32
SEARCH_SEEDS = (100, 101)
TEST_SEEDS = (0, 1, 2, 3, 4)
CURVE_FACTORS = (0.25, 2)  # of the chosen learning rate


# ----------------------------------------------------------------------------- the configurations
def grid(**values):
    """All combinations: grid(lr=(1, 2), beta=(3,)) -> [{lr: 1, beta: 3}, {lr: 2, beta: 3}]."""
    return [dict(zip(values, row)) for row in product(*values.values())]


# The grids were moved until no best value stood at an edge that earlier runs had not tried. A LoRA's
# second matrices start at 0: it takes fifty times the learning rate to move as far. The paper's
# inversion and DRO with M > 1 are ruined by the steps that suit the others. SFT has no beta.
PAIRS = grid(lr=(5e-5, 1e-4), beta=(300, 1000))
PAPER = grid(lr=(5e-6, 1e-5, 2e-5, 5e-5), beta=(1000,))
LORA = grid(lr=(1e-3, 2.5e-3), beta=(300, 1000))
SFT = grid(lr=(5e-5, 1e-4, 2e-4, 4e-4))
DRO_1 = grid(lr=(1e-4, 2e-4), margin=(0.01, 0.03))
DRO_8 = grid(lr=(2e-5, 5e-5), margin=(0.001, 0.003))

# {work} is the folder of what `prepare` makes.
SCORES = {"scores": "{work}/scores.safetensors"}
EXPERTS = {"data": "{work}/experts.parquet"}


def inverted(mode, steps):
    return {**SCORES, "inversion": mode, "inversion_steps": steps}


@dataclass(frozen=True)
class Configuration:
    title: str
    script: str
    settings: list
    options: dict = field(default_factory=dict)  # the script's other options


CONFIGURATIONS = {
    "sft": Configuration("SFT on the winners", "dpo_baseline", SFT, {"sft": 1}),
    "sft_experts": Configuration("SFT on the experts", "dpo_baseline", SFT, {**EXPERTS, "sft": 1}),
    "dpo": Configuration("DPO", "dpo_baseline", PAIRS),
    "dpo_reward": Configuration("DPO, reward's labels", "dpo_baseline", PAIRS, SCORES),
    "smoothing": Configuration("smoothing alone", "smpo", PAIRS, inverted("none", 5)),
    "smpo": Configuration("SmPO, release, n = 5", "smpo", PAIRS, inverted("release", 5)),
    "smpo_above": Configuration("SmPO, above, n = 2", "smpo", PAIRS, inverted("above", 2)),
    "smpo_paper": Configuration("SmPO, paper, n = 9", "smpo", PAPER, inverted("paper", 9)),
    # The exact loop of the release takes the place of common.renoise_invert.
    "released_loop": Configuration("SmPO, released loop", "smpo", PAIRS, inverted("release", 5)),
    "dro": Configuration("DRO, M = 1", "dro", DRO_1, EXPERTS),
    "dro_m8": Configuration("DRO, M = 8", "dro", DRO_8, {**EXPERTS, "refresh_every": 8}),
    "dpo_lora": Configuration("LoRA-DPO", "dpo_baseline", LORA, {"lora": 8}),
}
# Those with a curve, in colours that the colour-blind can tell apart (Okabe and Ito's).
CURVES = {
    "sft": "#8a6d00",
    "dpo": "#0072b2",
    "dpo_reward": "#009e73",
    "smpo": "#d55e00",
    "dro": "#c0569a",
    "dro_m8": "#4b3f9e",
}
QUICK = ("sft_experts", "dpo", "smpo", "dro")

# The comparisons that decide the papers' claims: the first is claimed to be better than the second.
COMPARISONS = [
    ("smpo", "dpo", "SmPO is better than DPO"),
    ("smpo", "dpo_reward", "SmPO is better than DPO with the reward's labels"),
    ("smpo", "smoothing", "inversion adds to smoothing"),
    ("smoothing", "dpo_reward", "smoothing adds to the reward's labels"),
    ("smpo_paper", "smpo", "the paper's inversion is better than the release's"),
    ("dro", "sft_experts", "DRO is better than SFT on its experts"),
    ("dro_m8", "dro", "older samples (M = 8) are better than M = 1"),
    ("dro", "dpo", "DRO is better than DPO"),
]


class Job(NamedTuple):
    name: str  # of CONFIGURATIONS, or "initial" (the initial model), or "explain"
    setting: dict
    seed: int
    split: str  # "search" or "test": prompts/SPLIT.txt

    @property
    def label(self):
        setting = [f"{name}{value:g}" for name, value in self.setting.items()]
        return "-".join([self.name, *setting, self.split, str(self.seed)])


# ----------------------------------------------------------------------------- what is to be done
def load(folder, name):
    """The results of a configuration: a list of what `run_job` writes."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def keep(folder, name, result):
    """Add a result to the configuration's file."""
    results = [*load(folder, name), result]
    results.sort(key=lambda r: (r["split"], json.dumps(r["setting"]), r["seed"]))
    lines = ",\n".join(json.dumps(result) for result in results)
    folder.mkdir(parents=True, exist_ok=True)
    with common.atomic(folder / f"{name}.json") as file:
        file.write_text(f"[\n{lines}\n]\n")


def results_of(folder, name, setting, split="test"):
    """{seed: result} of a setting."""
    found = [r for r in load(folder, name) if (r["setting"], r["split"]) == (setting, split)]
    return {result["seed"]: result for result in found}


def search_means(folder, name):
    """[(setting, mean ground-truth score over the search seeds)] of the settings with all seeds."""
    found = []
    for setting in CONFIGURATIONS[name].settings:
        results = results_of(folder, name, setting, "search")
        if set(results) == set(SEARCH_SEEDS):
            means = [caption_means(result).mean() for result in results.values()]
            found.append((setting, np.mean(means)))
    return found


def chosen_setting(folder, name):
    """The setting with the best mean score of the search; None while the search is not complete."""
    found = search_means(folder, name)
    if len(found) < len(CONFIGURATIONS[name].settings):
        return None
    return max(found, key=lambda item: item[1])[0]


def main_jobs(folder, name):
    """The search and, once it is complete, the tests of the chosen setting."""
    searches = product(CONFIGURATIONS[name].settings, SEARCH_SEEDS)
    jobs = [Job(name, setting, seed, "search") for setting, seed in searches]
    setting = chosen_setting(folder, name)
    return jobs + [Job(name, setting, seed, "test") for seed in TEST_SEEDS if setting]


def curve_settings(folder, name):
    """The chosen setting at the curve's other learning rates; [] where there is no curve."""
    setting = chosen_setting(folder, name)
    if setting is None or name not in CURVES:
        return []
    return [{**setting, "lr": float(f"{setting['lr'] * f:.3g}")} for f in CURVE_FACTORS]


def curve_jobs(folder, name):
    settings = product(curve_settings(folder, name), TEST_SEEDS)
    return [Job(name, setting, seed, "test") for setting, seed in settings]


def all_jobs(folder, names):
    """Every job that can be done now, done or not, the most important first: what COMPARISONS need,
    then the curves of these, then the other configurations."""
    compared = dict.fromkeys(name for *both, _ in COMPARISONS for name in both)
    compared = [name for name in compared if name in names]
    others = [name for name in names if name not in compared]
    jobs = [Job("initial", {}, seed, "test") for seed in TEST_SEEDS]
    jobs += [Job("explain", {}, 0, "test")]
    jobs += [job for name in compared for job in main_jobs(folder, name)]
    jobs += [job for name in compared for job in curve_jobs(folder, name)]
    return jobs + [job for n in others for job in main_jobs(folder, n) + curve_jobs(folder, n)]


def is_done(folder, job):
    return job.seed in results_of(folder, job.name, job.setting, job.split)


# ---------------------------------------------------------------------------------------- one job
def prepare(work):
    """Make what several jobs read: the reward's scores of all pairs, and the 64 experts."""
    scores = work / "scores.safetensors"
    if not scores.exists():
        command = ["--data", TINY["data"], "--scorers", f"pickscore={HERE / 'reward'}"]
        evaluation.main([*command, "--scores_out", str(scores), "--cache", str(work / "cache")])
    if not (work / "experts.parquet").exists():
        # DRO chooses the experts before its first step, and leaves them in its folder.
        train("dro", work / "choose", work, {"data": TINY["data"], "steps": 1, **SCORES})
        (work / "choose" / "experts.parquet").replace(work / "experts.parquet")
        shutil.rmtree(work / "choose")


def train(script, out, work, options):
    """Run a training script; returns its number of UNet sample-forwards."""
    shared = {"batch": BATCH, "micro_batch": BATCH, "ema": 0.9999, "eval_prompts": 0}
    shared["save_every"] = STEPS  # one checkpoint, at the end
    options = {**shared, "out": out, "cache": work / "cache", **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    shutil.rmtree(out, ignore_errors=True)  # a job that was stopped begins anew
    importlib.import_module(script).main([word.format(work=work) for word in words])
    lines = (out / "log.jsonl").read_text().splitlines()
    return round(sum(json.loads(line)["unet_calls"] * BATCH for line in lines))


def run_job(job, work, steps):
    """Do a job, in a process of its own, and write its result to work/jobs/LABEL.json.

    The result holds the job's setting, seed and split; scores {scorer: (prompts, images) list};
    deviation, see `deviation_of`; unet_calls of the training; cpu_seconds; commit.
    """
    log = os.open(work / "jobs" / f"{job.label}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    result = {"setting": job.setting, "seed": job.seed, "split": job.split}
    out = work / "jobs" / job.label
    if job.name == "explain":
        result["measured"] = explain.explain(work / "scores.safetensors")
    elif job.name == "initial":
        result["scores"] = score_model(None, job, work)
    else:
        if job.name == "released_loop":
            use_released_loop()
        configuration = CONFIGURATIONS[job.name]
        options = {**configuration.options, **job.setting, "steps": steps, "seed": job.seed}
        result["unet_calls"] = train(configuration.script, out, work, options)
        trained = str(out / ("lora" if "lora" in options else "unet"))
        result["scores"] = score_model(trained, job, work)
        result["deviation"] = explain.deviation_of(trained)
        shutil.rmtree(out)
    result["cpu_seconds"] = round(time.process_time())
    result["commit"] = common.versions()["commit"]
    Path(f"{out}.json").write_text(json.dumps(result))


def use_released_loop():
    """From now on this process inverts as the authors' release does under diffusers 0.20."""

    def invert(eps_fn, x0, t, alpha_bar, steps, mode, renoise=1):
        return released.released_invert(eps_fn, x0, t.cpu(), alpha_bar, "0.20", steps)

    common.renoise_invert = invert


def score_model(unet, job, work):
    """Scores of a UNet's images (None: the initial model): {scorer: (prompts, images) list}."""
    prompts = common.read_prompts(str(HERE / "prompts" / f"{job.split}.txt"))
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = ["--seed", str(job.seed), "--out", out, "--cache", out]
        cfg = common.parse(evaluation.Config, evaluation.PRESETS, command)
        wanted = evaluation.wanted_scorers(cfg.scorers, cfg.scorer_paths)
        report = evaluation.compare_unets(cfg, {"model": unet}, prompts, wanted)
    scores = {name: table["model"] for name, table in report["scores"].items()}
    scores["ground_truth"] = scores.pop("gold_score")
    return {name: np.round(table, 4).tolist() for name, table in scores.items()}


# -------------------------------------------------------------------------------------- statistics
def caption_means(result):
    """Mean ground-truth score of each caption, (prompts,)."""
    return np.mean(result["scores"]["ground_truth"], axis=1)


def chosen_results(folder, name):
    return results_of(folder, name, chosen_setting(folder, name))


def interval(table, level):
    """Mean of a (seeds, captions) table with its confidence interval: (mean, low, high).

    Seeds and captions are both samples, and all seeds meet the same captions. The variance of the
    mean is that of the two-way random-effects model, made of the mean squares of seeds, captions
    and the rest; the interval is Student's t with Satterthwaite's degrees of freedom. A bootstrap
    of five seeds would be too narrow.
    """
    seeds, captions = table.shape
    mean = table.mean()
    by_seed = table.mean(1) - mean
    by_caption = table.mean(0) - mean
    rest = table - mean - by_seed[:, None] - by_caption
    freedom = np.array([seeds - 1, captions - 1, (seeds - 1) * (captions - 1)])
    sums = [captions * (by_seed**2).sum(), seeds * (by_caption**2).sum(), (rest**2).sum()]
    of_seeds, of_captions, of_rest = squares = sums / freedom
    # The sum may be too small by chance. It cannot be less than either of its first two terms.
    variance = max(of_seeds + of_captions - of_rest, of_seeds, of_captions)
    if variance == 0:
        return mean, mean, mean
    t = t_quantile(0.5 + level / 2, variance**2 / (squares**2 / freedom).sum())
    half = t * math.sqrt(variance / table.size)
    return mean, mean - half, mean + half


def t_quantile(p, df):
    """The p-quantile (p >= 1/2) of Student's t distribution, by integrating its density."""
    x = np.linspace(0, 200, 100_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    steps = (density[1:] + density[:-1]) / 2 * (x[1] - x[0])
    return float(np.interp(p, 0.5 + np.cumsum(steps), x[1:]))


def verdict(low, high):
    if low > 0:
        return "significantly better"
    return "significantly worse" if high < 0 else "no significant difference"


def difference(folder, first, second):
    """Paired difference of two configurations' chosen settings: (seeds, captions), or None."""
    results = chosen_results(folder, first)
    others = chosen_results(folder, second)
    tables = [caption_means(results[s]) - caption_means(others[s]) for s in results if s in others]
    return np.array(tables) if len(tables) > 1 else None


def difference_at_equal_deviation(folder, first, second):
    """The same where both have moved equally far from the initial model.

    One of the two stays at its chosen setting, and the other moves along its curve to the same
    deviation, seed by seed: the second if it has a curve, otherwise the first. None where the curve
    does not reach that far, or is not measured.
    """
    moves = second if second in CURVES else first
    stays = first if moves == second else second
    tables = []
    for seed, result in chosen_results(folder, stays).items():
        moved = on_curve(folder, moves, seed, result["deviation"])
        if moved is None:
            return None
        pair = (caption_means(result), moved) if stays == first else (moved, caption_means(result))
        tables.append(pair[0] - pair[1])
    return np.array(tables) if len(tables) > 1 else None


def curve_points(folder, name):
    """[{seed: result}] of the chosen setting and its curve, by growing learning rate."""
    settings = [chosen_setting(folder, name), *curve_settings(folder, name)]
    settings = sorted(filter(None, settings), key=lambda setting: setting["lr"])
    return list(filter(None, (results_of(folder, name, setting) for setting in settings)))


def on_curve(folder, name, seed, deviation):
    """Caption means (prompts,) of a seed's curve at a deviation, linear in its logarithm between
    two runs; None outside of the curve."""
    points = [results[seed] for results in curve_points(folder, name) if seed in results]
    for low, high in zip(points, points[1:]):
        if low["deviation"] <= deviation <= high["deviation"]:
            way = math.log(deviation / low["deviation"])
            way /= math.log(high["deviation"] / low["deviation"])
            return (1 - way) * caption_means(low) + way * caption_means(high)
    return None


# ------------------------------------------------------------------------------------------ tables
def markdown_table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def folded(title, lines):
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]


def spelled(setting):
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def comparison_rows(folder):
    # Bonferroni: a column's intervals hold all together in 95 % of such experiments.
    level = 1 - 0.05 / len(COMPARISONS)
    rows = []
    for first, second, claim in COMPARISONS:
        row = [claim]
        for compare in (difference, difference_at_equal_deviation):
            table = compare(folder, first, second)
            if table is None:
                row += ["not measured", ""]
            else:
                mean, low, high = interval(table, level)
                row += [f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", verdict(low, high)]
        rows.append(row)
    return rows


def gains(folder, results):
    """Of each seed: ground-truth scores less the initial model's, (seeds, prompts, images)."""
    initial = results_of(folder, "initial", {})
    after = np.array([result["scores"]["ground_truth"] for result in results.values()])
    return after - np.array([initial[seed]["scores"]["ground_truth"] for seed in results])


def configuration_rows(folder):
    rows = []
    initial = results_of(folder, "initial", {})
    if initial:
        mean = np.mean([caption_means(result) for result in initial.values()])
        rows.append(["initial model", "", len(initial), f"{mean:.4f}", *[""] * 5])
    for name, configuration in CONFIGURATIONS.items():
        results = chosen_results(folder, name)
        if not results:
            rows.append([configuration.title, "not measured", *[""] * 7])
            continue
        gain = gains(folder, results)
        score = np.mean([caption_means(result) for result in results.values()])
        win = ((gain > 0) + 0.5 * (gain == 0)).mean()
        pickscore = np.mean([result["scores"]["pickscore"] for result in results.values()])
        names = ("deviation", "unet_calls", "cpu_seconds")
        means = {n: np.mean([result[n] for result in results.values()]) for n in names}
        row = [configuration.title, spelled(chosen_setting(folder, name)), len(results)]
        row += [f"{score:.4f} ± {gain.mean((1, 2)).std(ddof=1):.4f}", f"{win:.1%}"]
        row += [f"{pickscore:.2f}", f"{means['deviation']:.2g}", f"{means['unet_calls']:,.0f}"]
        rows.append([*row, f"{means['cpu_seconds'] / 60:.1f}"])
    return rows


def search_rows(folder):
    rows = []
    for name, configuration in CONFIGURATIONS.items():
        found = search_means(folder, name)
        chosen = chosen_setting(folder, name)
        cells = [f"{spelled(setting)}: {mean:.4f}" for setting, mean in found]
        cells = [f"**{c}**" if s == chosen else c for c, (s, _) in zip(cells, found)]
        rows.append([configuration.title, "; ".join(cells) or "not measured"])
    return rows


def explain_lines(folder):
    results = load(folder, "explain")
    if not results:
        return ["Not measured.", ""]
    measured = results[0]["measured"]
    gradients = [[k, *(f"{v:.2f}" for v in row)] for k, row in measured["gradients"].items()]
    noise = [[k, *(f"{v:.2f}" for v in row)] for k, row in measured["noise"].items()]
    weights = [
        [i + 1, f"{weight:.2f}", f"{people:.0%}", f"{truth:.0%}"]
        for i, (weight, people, truth) in enumerate(measured["weights"])
    ]
    return [
        "Gradients of batches of 32 pairs, each scaled to length 1. Agreement: the mean inner",
        "product of two batches' gradients (1: they are equal, 0: noise). Cosine: of the mean",
        "gradient and smoothing's, corrected for the noise of the batches.",
        "",
        *markdown_table(["method", "agreement", "cosine with smoothing"], gradients),
        "Mean square of the noise that inversion finds. Sampled noise has 1.",
        "",
        *markdown_table(["inversion", *(f"t = {t}" for t in explain.NOISE_TIMESTEPS)], noise),
        "Training pairs in five equal groups, by the size of their reward gap: the weight of a",
        "pair in SmPO's loss, and how often the gap's sign agrees with people and ground truth.",
        "",
        *markdown_table(["group", "weight", "people", "ground truth"], weights),
    ]


def tables(folder):
    """What README.md says between its two marks, as Markdown."""
    commits = {str(result["commit"]) for n in CONFIGURATIONS for result in load(folder, n)}
    claims = ["claim", "difference", "verdict", "at equal deviation", "verdict"]
    columns = ["configuration", "chosen setting", "seeds", "ground-truth score", "win rate"]
    columns += ["PickScore", "deviation", "UNet calls", "CPU minutes"]
    searches = markdown_table(["configuration", "mean ground-truth score"], search_rows(folder))
    picture = "![mean ground-truth score against deviation from the initial model](evidence.png)"
    has_picture = any(curve_points(folder, name) for name in CONFIGURATIONS)
    lines = [
        *([picture, ""] if has_picture else []),
        *markdown_table(claims, comparison_rows(folder)),
        *folded("Every configuration", markdown_table(columns, configuration_rows(folder))),
        *folded("The searches: the chosen setting is bold", searches),
        *folded("Why: three measurements at the initial model", explain_lines(folder)),
        f"Commits: {', '.join(sorted(commits)) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def write_between_marks(file, text):
    begin = "<!-- evidence -->\n"
    end = "<!-- /evidence -->"
    head, rest = file.read_text().split(begin)
    file.write_text(head + begin + text + end + rest.split(end)[1])


def draw_picture(folder, file):
    curves = []
    for name, configuration in CONFIGURATIONS.items():
        points = []
        for results in curve_points(folder, name):
            is_chosen = results == chosen_results(folder, name)
            deviation = np.exp(np.mean([math.log(r["deviation"]) for r in results.values()]))
            score = np.mean([caption_means(result) for result in results.values()])
            spread = gains(folder, results).mean((1, 2)).std(ddof=1)
            points.append(evidence_picture.Point(deviation, score, spread, is_chosen))
        colour = CURVES.get(name, evidence_picture.DARK)
        curves.append(evidence_picture.Curve(configuration.title, colour, points))
    curves = [curve for curve in curves if curve.points]
    if curves:
        initial = [caption_means(r).mean() for r in results_of(folder, "initial", {}).values()]
        evidence_picture.draw_picture(curves, np.mean(initial), file)


# ------------------------------------------------------------------------------------ command line
# What the scripts import only when they need it.
LIBRARIES = (
    "dro",
    "dpo_baseline",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "transformers.hf_argparser",
)


def run_all(next_jobs, total, folder, work, at_once, steps):
    """Do jobs until none is left, `at_once` at a time; each result is kept as its job ends.

    next_jobs() -> all jobs that are known by now, in order; those that are done are left out. Each
    job is a fork of a server that has imported the libraries, which would take a fresh interpreter
    seconds. Returns the labels of the jobs that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *LIBRARIES])
    (work / "jobs").mkdir(parents=True, exist_ok=True)
    running = {}  # process: job
    failed = []
    with tqdm(total=total, desc="evidence", unit="job", smoothing=0) as bar:
        while True:
            jobs = next_jobs()
            todo = [job for job in jobs if not is_done(folder, job)]
            bar.update(len(jobs) - len(todo) - bar.n)
            todo = [job for job in todo if job not in running.values() and job.label not in failed]
            for job in todo[: at_once - len(running)]:
                process = context.Process(target=run_job, args=(job, work, steps), daemon=True)
                process.start()
                running[process] = job
            if not running:
                return failed
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.exitcode is not None]:
                job = running.pop(process)
                file = work / "jobs" / f"{job.label}.json"
                if process.exitcode == 0:
                    keep(folder, job.name, json.loads(file.read_text()))
                    file.unlink()
                else:
                    failed.append(job.label)
                    bar.write(f"failed: {job.label}, see {file.with_suffix('.log')}")


def run_quick(work, at_once):
    """Four configurations with one short seed: shows that everything runs, and nothing more."""
    jobs = [Job("initial", {}, 0, "search")]
    jobs += [Job(name, CONFIGURATIONS[name].settings[0], 0, "search") for name in QUICK]
    with tempfile.TemporaryDirectory() as folder:
        run_all(lambda: jobs, len(jobs), Path(folder), work, at_once, steps=40)
        for job in jobs:
            for result in load(Path(folder), job.name):
                score = caption_means(result).mean()
                print(f"{job.name:12} {score:.4f}, deviation {result.get('deviation', 0):.2g}")


def count_jobs(names):
    """All jobs of these configurations, with those that still wait for a search."""
    searches = sum(len(CONFIGURATIONS[name].settings) for name in names)
    tests = len(names) + len(CURVE_FACTORS) * len(CURVES.keys() & set(names))
    return 1 + len(SEARCH_SEEDS) * searches + len(TEST_SEEDS) * (tests + 1)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = list(CONFIGURATIONS)
    parser.add_argument("--configs", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="caches, logs")
    parser.add_argument("--quick", action="store_true", help="four short runs; nothing is kept")
    parser.add_argument("--tables", action="store_true", help="tables and picture only")
    args = parser.parse_args()
    failed = []
    if not args.tables:
        work = args.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["OMP_NUM_THREADS"] = "1"
        prepare(work)
        if args.quick:
            return run_quick(work, args.jobs)
        jobs = (lambda: all_jobs(RESULTS, args.configs), count_jobs(args.configs))
        failed = run_all(*jobs, RESULTS, work, args.jobs, STEPS)
    draw_picture(RESULTS, HERE / "evidence.png")
    write_between_marks(README, tables(RESULTS))
    if failed:
        sys.exit(f"{len(failed)} jobs failed")


if __name__ == "__main__":
    main()
