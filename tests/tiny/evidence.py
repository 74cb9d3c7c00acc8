"""Which of the methods' claims hold where the true preference is known: every arm of the tiny world, trained,
judged and written into the README.

    python tests/tiny/evidence.py                     # everything that is missing, two jobs at a time
    python tests/tiny/evidence.py --arms dpo smpo     # these arms alone
    python tests/tiny/evidence.py --quick             # the core arms, one short seed; nothing is kept
    python tests/tiny/evidence.py --tables            # README, searches.md and chart, of what is there

The protocol is the same for every arm: 100 steps of 32 rows, averaged weights, and a search over four
settings of learning rate and beta (or margin) with seed 100 on the search captions (64 x 4 images; all of
them stand in searches.md); the one that wins most often against the start model under the exact judge (in
the arms "best mean" the one with the best mean score) is trained with the seeds 0, 1, ... and judged on the
test captions (128 x 2). Image j of caption i starts from the same noise for every model of a seed. An arm's
results are one file of tests/tiny/evidence/; a job that is in it is not done again, so this can be stopped
at any time.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
RESULTS = HERE / "evidence"
SEARCH_SEED = 100
SPLITS = {"search": 4, "test": 2}  # prompts/NAME.txt, and images a prompt
JUDGES = ("gold_score", "pickscore")  # the exact one, and the learned reward


def grid(*settings, **names):
    """grid((1e-5, 500), ..., lr=0, beta=1): settings as flags."""
    return [{name: row[i] for name, i in names.items()} for row in settings]


LR = grid((1e-5,), (3e-5,), (1e-4,), (3e-4,), lr=0)
DPO = grid((1e-5, 500), (3e-5, 500), (3e-5, 2000), (1e-4, 1000), lr=0, beta=1)
LONG = DPO[1:2]  # the preset's
SMPO = grid((1e-5, 300), (1e-5, 1000), (2e-5, 300), (2e-5, 1000), lr=0, beta=1)
SMPO_T = grid((1e-5, 5000), (2e-5, 2000), (2e-5, 5000), (2e-5, 15000), lr=0, beta=1)
DRO = grid((3e-5, 0.01), (1e-4, 0.003), (1e-4, 0.01), (3e-4, 0.01), lr=0, margin=1)
OLD_SAMPLES = grid((1e-5, 0.01), (3e-5, 0.003), (3e-5, 0.01), (1e-4, 0.01), lr=0, margin=1)


@dataclass
class Arm:
    """title: what the table calls it; script; flags beside the setting's; seeds; library: of the released
    loop in place of ours; of: the arm whose best setting it takes, without a search of its own, by: the
    search's "win" rate or its "mean" score."""

    title: str
    script: str
    settings: list
    flags: dict = field(default_factory=dict)
    seeds: int = 5
    library: str = ""
    of: str = ""
    by: str = "win"


SCORED = {"scores": "{work}/scores.safetensors"}
N0, N2, N5, N10 = ({**SCORED, "inversion_steps": n} for n in (0, 2, 5, 10))
# p = 1 for the image that the label prefers: the label instead of the reward
LABELS = {"scores": "{work}/labels.safetensors", "reward_min": 0, "reward_max": 1, "gamma": 1}
# two inversions that were the tiny preset's before: see searches.md
ASK_END = {"ask": "end", "inversion_steps": 2, "min_t": 50}
LANDING_T = {**SCORED, "ask": "end", "landing": "t", "inversion_steps": 7, "min_t": 300}
EXPERTS = {"data": "{work}/experts.parquet"}
ARMS = {
    "sft": Arm("SFT on the winners", "dpo_baseline", LR, {"sft": 1}),
    "sft_experts": Arm("SFT on the experts", "dpo_baseline", LR, {"sft": 1, **EXPERTS}),
    "sft_experts_lr": Arm("SFT on the experts, lr as DRO's", "dpo_baseline", grid((3e-5,), lr=0),
                          {"sft": 1, **EXPERTS}),
    "dpo": Arm("DPO", "dpo_baseline", DPO),
    "dpo_reward": Arm("DPO, labels by the reward", "dpo_baseline", DPO, SCORED),
    "smoothing": Arm("smoothing alone (drawn noise)", "smpo", DPO, N0),
    "smpo": Arm("SmPO", "smpo", SMPO, N5),
    "n2": Arm("SmPO, n = 2", "smpo", SMPO, N2),
    "smpo_end": Arm("SmPO, --ask end, n = 2", "smpo", SMPO, {**SCORED, **ASK_END}),
    "inversion": Arm("inversion alone, --ask end, n = 2", "smpo", SMPO, {**LABELS, **ASK_END}),
    "smpo_t": Arm("SmPO, --landing t, n = 7, t >= 300", "smpo", SMPO_T, LANDING_T),
    "smpo_020": Arm("SmPO, released loop (diffusers 0.20)", "smpo", SMPO, N5, library="0.20"),
    "smpo_022": Arm("SmPO, released loop (diffusers 0.22)", "smpo", SMPO, N5, library="0.22"),
    "dro": Arm("DRO, M = 1 (its gate alone)", "dro", DRO, EXPERTS),
    "dro_m2": Arm("DRO, M = 2", "dro", [], {**EXPERTS, "refresh_every": 2}, 3, of="dro_m8"),
    "dro_m8": Arm("DRO, M = 8", "dro", OLD_SAMPLES, {**EXPERTS, "refresh_every": 8}),
    "n10": Arm("SmPO, n = 10", "smpo", [], N10, 3, of="smpo"),
    "no_renoise": Arm("SmPO, no ReNoise", "smpo", [], {**N5, "renoise": 0}, 3, of="smpo"),
    "no_renoise_end": Arm("SmPO, --ask end, n = 2, no ReNoise", "smpo", [],
                          {**SCORED, **ASK_END, "renoise": 0}, 3, of="smpo_end"),
    "no_renoise_t": Arm("SmPO, --landing t, no ReNoise", "smpo", [],
                        {**LANDING_T, "renoise": 0}, 3, of="smpo_t"),
    "gamma3": Arm("SmPO, gamma 3", "smpo", [], {**N5, "gamma": 3}, 3, of="smpo"),
    "gamma30": Arm("SmPO, gamma 30", "smpo", [], {**N5, "gamma": 30}, 3, of="smpo"),
    "dpo_long": Arm("DPO, lr 3e-5 (its preset)", "dpo_baseline", LONG),
    "dpo_reward_long": Arm("DPO, labels by the reward, lr 3e-5", "dpo_baseline", LONG, SCORED),
    "dpo_60": Arm("DPO, 60 % of the labels right", "dpo_baseline", [],
                  {"data": "{work}/labels-60.parquet"}, 3, of="dpo"),
    "dpo_90": Arm("DPO, 90 % of the labels right", "dpo_baseline", [],
                  {"data": "{work}/labels-90.parquet"}, 3, of="dpo"),
    "smpo_60": Arm("SmPO, --ask end, reward of 60 %", "smpo", [],
                   {**ASK_END, "scores": "{work}/noise-60/scores.safetensors"}, 3, of="smpo_end"),
    "smpo_90": Arm("SmPO, --ask end, reward of 90 %", "smpo", [],
                   {**ASK_END, "scores": "{work}/noise-90/scores.safetensors"}, 3, of="smpo_end"),
    "dpo_reward_60": Arm("DPO, labels by the reward of 60 %", "dpo_baseline", [],
                         {"scores": "{work}/noise-60/scores.safetensors"}, 3, of="dpo_reward"),
    "dpo_reward_90": Arm("DPO, labels by the reward of 90 %", "dpo_baseline", [],
                         {"scores": "{work}/noise-90/scores.safetensors"}, 3, of="dpo_reward"),
}  # fmt: skip
# the best mean scores of these arms' searches, with so many seeds
for name, seeds in {"dpo": 5, "smoothing": 5, "smpo": 5, "n2": 5, "sft_experts": 3, "dro": 3}.items():
    title = ARMS[name].title.partition(" (")[0] + ", best mean"
    ARMS[f"{name}_mean"] = replace(ARMS[name], title=title, settings=[], seeds=seeds, of=name, by="mean")
QUICK = ("sft_experts", "dpo", "smpo", "dro")
CLAIMS = {  # (arm, against, what would be claimed of it)
    "SmPO": [
        ("smpo", "dpo", "SmPO above DPO"), ("n2", "dpo", "SmPO, n = 2, above DPO"),
        ("smpo_020", "dpo", "the released loop above DPO"),
        ("smpo_t", "dpo", "SmPO, end, landing t, above DPO"),
        ("dpo_long", "dpo", "DPO, lr 3e-5, above DPO"),
        ("smpo_mean", "dpo_mean", "SmPO above DPO, best means"),
        ("n2_mean", "dpo_mean", "SmPO, n = 2, above DPO, best means"),
        ("smpo_mean", "dpo_long", "SmPO, best mean, above DPO, lr 3e-5"),
        ("n2_mean", "dpo_long", "the same, n = 2"),
    ],
    "its two parts": [
        ("dpo_reward", "dpo", "the reward's labels beat people's"),
        ("dpo_reward_long", "dpo_long", "the same, lr 3e-5"),
        ("smoothing", "dpo_reward", "smoothing adds to these hard labels"),
        ("smoothing_mean", "dpo_reward_long", "the same, lr 3e-5"),
        ("smpo", "smoothing", "inversion adds to smoothing"),
        ("smpo_mean", "smoothing_mean", "the same, best means"),
        ("n2", "smoothing", "inversion, n = 2, adds to smoothing"),
        ("n2_mean", "smoothing_mean", "the same, best means"),
        ("smpo", "dpo_reward", "SmPO above DPO, reward's labels"),
        ("smpo_mean", "dpo_reward_long", "the same, best mean, lr 3e-5"),
        ("n2", "dpo_reward", "n = 2 above DPO, reward's labels"),
        ("n2_mean", "dpo_reward_long", "the same, best mean, lr 3e-5"),
        ("inversion", "dpo", "inversion adds to DPO"),
        ("smpo_end", "inversion", "smooth labels add to inversion"),
    ],
    "the inversion, and gamma": [
        ("n2", "smpo", "n = 2 above n = 5"), ("n2_mean", "smpo_mean", "the same, best means"),
        ("smpo", "n10", "n = 5 above n = 10"),
        ("smpo", "smpo_end", "--ask start, n = 5, above end, n = 2"),
        ("smpo", "smpo_t", "start, grid, above end, landing t"),
        ("smpo", "smpo_020", "ours above the released loop"),
        ("smpo_020", "smpo_022", "released loop: 0.20 above 0.22"),
        ("smpo", "no_renoise", "ReNoise adds to DDIM inversion"),
        ("smpo_end", "no_renoise_end", "the same, --ask end"),
        ("smpo_t", "no_renoise_t", "the same, --landing t"),
        ("gamma3", "smpo", "gamma 3 above 10"), ("gamma30", "smpo", "gamma 30 above 10"),
    ],
    "noisy labels": [
        ("dpo_reward_60", "dpo_60", "60 % right: reward's labels above"),
        ("dpo_reward_90", "dpo_90", "90 % right: reward's labels above"),
        ("smpo_60", "dpo_60", "60 % right: SmPO, end, above DPO"),
        ("smpo_60", "dpo_reward_60", "the same, DPO with that reward's labels"),
        ("smpo_90", "dpo_90", "90 % right: SmPO, end, above DPO"),
        ("smpo_90", "dpo_reward_90", "the same, DPO with that reward's labels"),
    ],
    "DRO": [
        ("dro", "sft_experts", "DRO above SFT on its experts"),
        ("dro", "sft_experts_lr", "the same, at one lr"),
        ("dro_mean", "sft_experts_mean", "the same, best means"),
        ("dro_m2", "dro", "real negatives (M = 2) add to M = 1"),
        ("dro_m8", "dro", "real negatives (M = 8) add to M = 1"),
        ("dro", "dpo", "DRO above DPO"), ("dro", "dpo_long", "the same, both lr 3e-5"),
        ("sft_experts_lr", "dpo", "SFT on the experts above DPO"),
        ("sft_experts_lr", "dpo_long", "the same, both lr 3e-5"),
        ("dro_mean", "dpo_long", "DRO, best mean, above DPO, lr 3e-5"),
    ],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ one job
def prepare(work, names):
    """What several arms read: scores, labels as scores, experts, sets with other label noise, caches."""
    import torch
    import world
    from datasets import Dataset

    import common
    import dpo_baseline
    import dro

    data = common.tiny("")["data"]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "scores.safetensors").exists():
        score_shipped_pairs(common.TINY / "reward", work / "scores.safetensors", "tiny reward")
    scores = common.load_scores(work / "scores.safetensors")
    if not (work / "experts.parquet").exists():
        cfg = common.parse(dro.Config, dro.PRESETS, [])
        dro.choose_experts(cfg, common.Place(), scores, work / "experts.parquet")
    rows = list(common.open_rows(data, common.PAIR, streaming=True))
    if not (work / "labels.safetensors").exists():
        label = torch.tensor([float(row["label_0"]) for row in rows])
        hard = scores | {"score_0": 100 * label, "score_1": 100 * (1 - label)}
        with safe_open(work / "scores.safetensors", "pt") as file:
            common.write(work / "labels.safetensors", hard, file.metadata() | {"scorer": "labels"})
    for percent in (60, 90):
        file = work / f"labels-{percent}.parquet"
        if not file.exists():  # the judge's own verdict, wrong so often
            captions = [row["caption"] for row in rows]
            gold = [world.gold_score([common.decode_image(row[name]) for row in rows], captions)
                    for name in common.PAIR]  # fmt: skip
            wrong = np.random.default_rng(percent).random(len(rows)) >= percent / 100
            first = (np.asarray(gold[0]) > np.asarray(gold[1])) != wrong
            Dataset.from_list([row | {"label_0": float(f)} for row, f in zip(rows, first)]).to_parquet(file)
        if not names.isdisjoint((f"smpo_{percent}", f"dpo_reward_{percent}")):
            noisy_scores(work / f"noise-{percent}", percent / 100)
    for data in (data, *sorted(work.glob("*.parquet"))):  # encoded here, before two jobs ask for it
        flags = ["--data", str(data), "--cache", str(work / "cache")]
        cfg = common.parse(dpo_baseline.Config, dpo_baseline.PRESETS, flags)
        models = common.Models(cfg, torch.device("cpu"))
        common.open_source(cfg, models, common.Place(), common.PAIR, common.SINGLE)


def score_shipped_pairs(reward, file, name):
    """Both scores of every training pair by the reward model in a folder, as --scores reads them."""
    import common

    score = common.load_reward(reward)
    common.score_pairs(common.tiny("")["data"], score, file, name, "exp(logit_scale) * cosine")


def noisy_scores(folder, agreement):
    """The pairs' scores by a reward model that was trained, as make.py does it, on labels which agree with
    the judge so often; on the shipped images, 10 a caption. About half an hour."""
    import make
    import torch
    from datasets import load_dataset

    if (folder / "scores.safetensors").exists():
        return
    pairs = {name: str(HERE / "pairs" / f"{name}.parquet") for name in ("train", "test")}
    sets = load_dataset("parquet", data_files=pairs, cache_dir=str(folder / "hf"))
    folder.mkdir(parents=True, exist_ok=True)
    images, _, truths = make.drawings(folder)
    torch.manual_seed(1)
    right, _ = make.make_reward(folder, folder, images, truths, [sets["train"]], sets["test"], agreement)
    print(f"reward of labels that agree with the judge in {agreement:.0%}: agrees with people in {right:.1%}")
    score_shipped_pairs(folder / "reward", folder / "scores.safetensors", "noisy reward")


def job(name, setting, seed, split, steps, work):
    """Train an arm and judge it, in a process of its own. Returns a plain dict."""
    import torch

    torch.set_num_threads(1)
    import released

    import common
    import eval as evaluation

    arm, started = ARMS[name], time.process_time()
    out = work / "runs" / f"{name}-{seed}-{steps}" / "-".join(f"{k}{v:g}" for k, v in setting.items())
    if arm.library:

        def invert(eps_fn, x0, t, alpha_bar, *_):
            return released.released_invert(eps_fn, x0, t.cpu(), alpha_bar, arm.library)

        common.renoise_invert = invert
    flags = {"steps": steps, "batch": 32, "ema": 0.9999, "cache": work / "cache", "seed": seed, "out": out,
             "eval_prompts": 0, **arm.flags, **setting}  # fmt: skip
    more = ["--resume"] if (out / "config.json").exists() else []
    flags = [word.format(work=work) for k, v in flags.items() for word in (f"--{k}", str(v))]
    importlib.import_module(arm.script).main(flags + more)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    tiny, prompts = common.tiny(""), (HERE / "prompts" / f"{split}.txt").read_text().split("\n")
    report = evaluation.report(
        tiny["model"], {"start": None, name: out / "unet"}, [p for p in prompts if p], out / "report",
        images_per_prompt=SPLITS[split], seed=seed, steps=tiny["eval_steps"], cfg=tiny["cfg"],
        cache=work / "cache", judges=[tiny["judge"]], scorers={"pickscore": {"model": str(HERE / "reward")}},
    )  # fmt: skip
    return {
        "setting": setting, "seed": seed, "split": split, "commit": common.versions()["commit"],
        "unet_calls": round(sum(line["unet_calls"] * 32 for line in log)),
        "cpu_seconds": None if more else round(time.process_time() - started),  # not known of a resumed job
        "win": {judge: report["win_rates"][judge][name]["start"]["win"] for judge in JUDGES},
        "mean": {judge: report["summary"][judge][name]["mean"] for judge in JUDGES},
        "scores": {judge: {m: [[float(f"{v:.5g}") for v in row] for row in report["scores"][judge][m]]
                           for m in ("start", name)} for judge in JUDGES} if split == "test" else None,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- all jobs
def load(name):
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"search": [], "test": []}


def best(name, by="win"):
    """The setting that the search chose, once it is whole."""
    arm = ARMS[name]
    if arm.of:
        return best(arm.of, arm.by)
    if len(arm.settings) == 1:
        return arm.settings[0]
    found = load(name)["search"]
    if len(found) < len(arm.settings):
        return None
    return max(found, key=lambda r: r[by]["gold_score"])["setting"]


def count_missing(name):
    """All jobs of an arm that are not done, also those that wait for the search."""
    arm, todo = ARMS[name], missing(name)
    return len(todo) + arm.seeds * (best(name) is None)


def missing(name):
    """The jobs of an arm that can be done now, as (setting, seed, split)."""
    arm, done = ARMS[name], load(name)
    tried = [r["setting"] for r in done["search"]]
    todo = [(s, SEARCH_SEED, "search") for s in arm.settings if s not in tried and len(arm.settings) > 1]
    if not todo and (setting := best(name)) is not None:
        seeds = {r["seed"] for r in done["test"] if r["setting"] == setting}
        todo = [(setting, seed, "test") for seed in range(arm.seeds) if seed not in seeds]
    return todo


def run(names, work, jobs, steps):
    """Every missing job of these arms, `jobs` at a time; each is written down as it ends."""
    prepare(work, set(names))
    running, failed = {}, set()
    whole = sum(len(ARMS[n].settings) * (len(ARMS[n].settings) > 1) + ARMS[n].seeds for n in names)
    with tqdm(total=whole, desc="evidence", unit="job", smoothing=0) as bar:
        while True:
            bar.update(whole - bar.n - sum(count_missing(n) for n in names))
            for key in [key for key, process in running.items() if process.poll() is not None]:
                if running.pop(key).returncode:
                    failed.add(key)
                    bar.write(f"failed: {key}, see {key_file(work, key).with_suffix('.log')}")
                else:
                    keep(key, json.loads(key_file(work, key).read_text()))
            todo = [json.dumps([n, *j]) for n in names for j in missing(n)]
            todo = [key for key in todo if key not in running and key not in failed]
            if not todo and not running:
                return
            for key in todo[: jobs - len(running)]:
                with open(key_file(work, key).with_suffix(".log"), "w") as log:
                    words = [sys.executable, __file__, "--job", key, "--work", work, "--steps", steps]
                    one = os.environ | {"OMP_NUM_THREADS": "1"}
                    running[key] = subprocess.Popen(map(str, words), stdout=log, stderr=log, env=one)
            time.sleep(1)


def keep(key, result):
    """Into the arm's file, whole or not at all."""
    name, _, _, split = json.loads(key)
    found, file = load(name), RESULTS / f"{name}.json"
    found[split] = sorted([*found[split], result], key=lambda r: r["seed"])
    RESULTS.mkdir(exist_ok=True)
    file.with_suffix(".new").write_text(json.dumps(found | {"title": ARMS[name].title}) + "\n")
    file.with_suffix(".new").replace(file)


def key_file(work, key):
    folder = work / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("".join(c if c.isalnum() or c in ".-_" else "_" for c in key) + ".json")


# ----------------------------------------------------------------------------------------------------- tables
def tables_of(name, judge, against="start"):
    """Scores of an arm and of what it is held against, (seeds, prompts, images) each, for the seeds that
    both have."""
    ours = {r["seed"]: r for r in load(name)["test"]}
    theirs = ours if against == "start" else {r["seed"]: r for r in load(against)["test"]}
    seeds = sorted(ours.keys() & theirs.keys())
    pick = [[r[s]["scores"][judge][m] for s in seeds] for r, m in ((ours, name), (theirs, against))]
    return [np.array(table) for table in pick], seeds


def interval(values, draws=2000):
    """95 % of the means of a (seeds, prompts) table: bootstrap over seeds, and prompts in each."""
    random, seeds, prompts = np.random.default_rng(0), *values.shape
    drawn = [np.mean([values[s][random.integers(prompts, size=prompts)].mean()
                      for s in random.integers(seeds, size=seeds)]) for _ in range(draws)]  # fmt: skip
    return np.quantile(drawn, [0.025, 0.975])


def over_seeds(a, b):
    """Win rate of a over b, (seeds, prompts, images) each, with its interval."""
    points = ((a > b) + 0.5 * (a == b)).mean(2)
    low, high = interval(points)
    return {"win": points.mean(), "low": low, "high": high, "tie": (a == b).mean()}


def spelled(setting):
    return ", ".join(f"{k} {v:g}" for k, v in setting.items())


def told(low, high, tie):
    return "holds" if low > tie else "the opposite" if high < tie else "not told apart"


def folded(title, columns, rows):
    """A Markdown table that unfolds."""
    head = [
        f"<details><summary>{title}</summary>",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return [*head, *rows, "", "</details>"]


def arms():
    """Every arm against the start model, as the rows of a table."""
    import eval as evaluation

    rows, commits = [], set()
    for name, arm in ARMS.items():
        results = load(name)["test"]
        if not results:
            rows.append(f"| {arm.title} | | not run | | | | | |")
            continue
        commits |= {r["commit"] for r in results}
        wins = []
        for judge in JUDGES:
            (ours, start), seeds = tables_of(name, judge)
            wins.append(over_seeds(ours, start))
            if judge == "gold_score":
                mean = f"{start.mean():.3f} to {ours.mean():.3f}"
        chosen = len(arm.settings) > 1 or arm.by == "mean"
        setting = spelled(results[0]["setting"]) + ("" if chosen else " (given)")
        calls = [r["unet_calls"] for r in results]
        seconds = [r["cpu_seconds"] for r in results if r["cpu_seconds"] is not None]
        cost = f"{np.mean(calls):,.0f} | " + (f"{np.mean(seconds) / 60:.1f}" if seconds else "")
        exact, learned = map(evaluation.percents, wins)
        rows.append(f"| {arm.title} | {setting} | {len(seeds)} | {exact} | {mean} | {learned} | {cost} |")
    return [*rows, "", f"Commits: {', '.join(sorted(commits)) or 'none'}."]


def comparisons():
    """The claims, as the rows of a table, and as (claim, win rate) for the chart."""
    import eval as evaluation

    rows, chart = [], []
    for group, claims in CLAIMS.items():
        rows.append(f"| **{group}** | | | |")
        for name, against, claim in claims:
            (ours, theirs), seeds = tables_of(name, "gold_score", against)
            if not seeds:
                rows.append(f"| {claim} | not run | | |")
                continue
            win, more = over_seeds(ours, theirs), (ours - theirs).mean(2)
            chart.append((claim, win))
            low, high = interval(more)
            wins = f"{evaluation.percents(win)}: {told(win['low'], win['high'], 0.5)}"
            means = f"{more.mean():+.4f} ({low:+.4f} to {high:+.4f}): {told(low, high, 0)}"
            rows.append(f"| {claim} | {wins} | {means} | {len(seeds)} |")
    return rows, chart


def tables(chart_file):
    """All results as Markdown, the long tables folded, and the chart."""
    import eval as evaluation

    rows, chart = comparisons()
    columns = ("claim", "win rate, first over second", "difference of the mean scores", "seeds")
    lines = folded("The comparisons in numbers", columns, rows)
    columns = (
        "arm",
        "setting of 4",
        "seeds",
        "exact judge",
        "its mean",
        "learned reward",
        "UNet calls",
        "CPU min",
    )
    lines += ["", *folded("Every arm against the start model", columns, arms())]
    if chart:
        evaluation.draw_win_rates(chart, "seeds and prompts", chart_file)
        lines = [f"![how often one arm wins over another]({os.path.relpath(chart_file, ROOT)})", "", *lines]
    return "\n".join(lines) + "\n"


def searches():
    """What each search saw, as Markdown: the setting it chose is bold."""
    lines = ["| arm | settings: win rate over the start model, mean score, exact judge |", "|---|---|"]
    for name, arm in ARMS.items():
        cells = []
        for found in load(name)["search"]:
            wins, mean = found["win"]["gold_score"], found["mean"]["gold_score"]
            cell = f"{spelled(found['setting'])}: {wins:.1%}, {mean:.3f}"
            cells.append(f"**{cell}**" if found["setting"] == best(name) else cell)
        if cells:
            lines.append(f"| {arm.title} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_between_marks(file, text):
    begin, end = "<!-- evidence -->\n", "<!-- /evidence -->"
    head, rest = file.read_text().split(begin)
    file.write_text(head + begin + text + end + rest.split(end)[1])


def main():
    global RESULTS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="runs, caches, images")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=100, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.absolute()
    if args.job:
        name, setting, seed, split = json.loads(args.job)
        result = job(name, setting, seed, split, args.steps, args.work)
        key_file(args.work, args.job).write_text(json.dumps(result))
    elif args.quick:
        RESULTS = args.work / "quick"
        for name in QUICK:
            ARMS[name].settings, ARMS[name].seeds = ARMS[name].settings[2:3], 1
        run(QUICK, args.work, args.jobs, 40)
        print(tables(RESULTS / "evidence.png"))
    else:
        if not args.tables:
            run(args.arms, args.work, args.jobs, args.steps)
        write_between_marks(ROOT / "README.md", tables(HERE / "evidence.png"))
        write_between_marks(HERE / "searches.md", searches())


if __name__ == "__main__":
    main()
