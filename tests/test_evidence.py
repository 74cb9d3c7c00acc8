"""tests/tiny/evidence.py's bookkeeping, on made-up results: the runs themselves take hours."""

import json

import evidence
import numpy as np
import pytest


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)

    def put(name, **result):
        evidence.keep(json.dumps([name, result["setting"], result["seed"], result["split"]]), result)

    return put


def scores(name, start, trained):
    return {judge: {"start": start, name: trained} for judge in evidence.JUDGES}


def test_a_search_comes_first_and_its_winner_is_run_on_every_seed(results):
    settings = evidence.ARMS["dpo"].settings
    assert evidence.missing("dpo") == [(s, evidence.SEARCH_SEED, "search") for s in settings]
    assert evidence.missing("dpo_60") == [] and evidence.count_missing("dpo") == 4 + 5
    for setting, win in zip(settings, (0.6, 0.9, 0.7, 0.8)):
        assert evidence.best("dpo") is None
        results("dpo", setting=setting, seed=evidence.SEARCH_SEED, split="search", win={"gold_score": win},
                mean={"gold_score": -win / 10})  # fmt: skip
    assert evidence.searches().count("**lr 3e-05, beta 500: 90.0%, -0.090**") == 1
    assert evidence.missing("dpo") == [(settings[1], seed, "test") for seed in range(5)]
    assert evidence.missing("dpo_60") == [(settings[1], seed, "test") for seed in range(3)]
    assert evidence.missing("dpo_mean") == [(settings[0], seed, "test") for seed in range(5)]
    for seed in (3, 0):
        results("dpo", setting=settings[1], seed=seed, split="test")
    assert [seed for _, seed, _ in evidence.missing("dpo")] == [1, 2, 4]
    assert [r["seed"] for r in evidence.load("dpo")["test"]] == [0, 3]


def test_arms_are_compared_on_the_seeds_they_share(results, tmp_path):
    low, high = [[0.0, 0.0]] * 8, [[1.0, 1.0]] * 8
    for name, seeds, trained in (("smpo", (0, 1, 2), high), ("dpo", (1, 2, 3), low)):
        for seed in seeds:
            results(name, setting={"lr": 1e-5}, seed=seed, split="test", commit="abc", unet_calls=10,
                    cpu_seconds=60, scores=scores(name, low, trained))  # fmt: skip
    (ours, theirs), seeds = evidence.tables_of("smpo", "gold_score", "dpo")
    assert seeds == [1, 2] and ours.shape == (2, 8, 2)
    assert evidence.over_seeds(ours, theirs) == {"win": 1, "low": 1, "high": 1, "tie": 0}
    text = evidence.tables(tmp_path / "chart.png")
    row = "| SmPO above DPO | 100.0% (100.0% to 100.0%): holds | +1.0000 (+1.0000 to +1.0000): holds | 2 |"
    assert row in text
    assert "| DRO, M = 8 | | not run |" in text and (tmp_path / "chart.png").exists()


def test_the_check_on_other_captions_is_what_the_readme_says():
    scores = json.loads((evidence.RESULTS / "validation.json").read_text())["scores"]
    found = {name: np.array(table) for name, table in scores.items()}
    text = " ".join((evidence.ROOT / "README.md").read_text().split())
    for ours, theirs in (("n2", "dpo"), ("n2_mean", "dpo_long"), ("smpo_mean", "dpo_long")):
        assert found[ours].shape == (5, 64, 5)
        over = evidence.over_seeds(found[ours], found[theirs])
        said = "{win:.1%} ({low:.1%} to {high:.1%})".format(**over).replace("%", " %")
        assert said in text, said


def test_the_interval_knows_that_seeds_differ():
    """Seeds that disagree wholly: between 0 and 1 whatever the number of prompts. Seeds that agree: as narrow
    as that number allows, the binomial interval."""
    random = np.random.default_rng(1)
    between = np.repeat([0.0, 1.0, 0.0, 1.0, 1.0], 400).reshape(5, 400, 1)
    wide = evidence.over_seeds(between, np.full_like(between, 0.5))
    assert wide["win"] == pytest.approx(0.6) and wide["high"] - wide["low"] > 0.7
    alike = (random.random((5, 400, 1)) < 0.6).astype(float)
    narrow = evidence.over_seeds(alike, np.full_like(alike, 0.5))
    binomial = 2 * 1.96 * (0.6 * 0.4 / 2000) ** 0.5
    assert binomial < narrow["high"] - narrow["low"] < 2.2 * binomial
    low, high = evidence.interval(random.normal(0.1, 1, (5, 400)))  # the same for a mean
    assert 2 * 1.96 / 2000**0.5 < high - low < 2.2 * 2 * 1.96 / 2000**0.5 and low < 0.1 < high
