# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""tests/tiny/evidence.py on made-up results: the runs themselves take hours."""

import evidence
import explain
import numpy as np
import pytest
import torch
from PIL import Image


def made_up(name, seed, effect, deviation=0.01, split="test", setting=None, captions=32):
    """A result whose scores are the initial model's plus `effect`, and noise of the seed."""
    random = np.random.default_rng([seed, len(name), int(1e6 * deviation)])
    captions_noise = np.random.default_rng(7).normal(0, 0.03, (captions, 1))
    scores = -0.13 + captions_noise + effect + random.normal(0, 0.02, (captions, 2))
    if setting is None:
        setting = {} if name == "initial" else evidence.CONFIGURATIONS[name].settings[0]
    return {
        "setting": setting,
        "seed": seed,
        "split": split,
        "scores": {"ground_truth": scores.tolist(), "pickscore": (20 + scores).tolist()},
        "deviation": deviation,
        "unet_calls": 12800,
        "cpu_seconds": 90,
        "commit": "abc1234",
    }


def finish_search(folder, name, best=0):
    """Search results of all settings, of which number `best` has the highest mean score."""
    for number, setting in enumerate(evidence.CONFIGURATIONS[name].settings):
        for seed in evidence.SEARCH_SEEDS:
            effect = 0.05 if number == best else 0.01
            result = made_up(name, seed, effect, split="search", setting=setting)
            evidence.keep(folder, name, result)


def fill(folder, effects):
    """All results of some configurations: {name: (effect, deviation) at the chosen setting}."""
    for seed in evidence.TEST_SEEDS:
        evidence.keep(folder, "initial", made_up("initial", seed, 0))
    for name, (effect, deviation) in effects.items():
        finish_search(folder, name)
        for job in evidence.main_jobs(folder, name) + evidence.curve_jobs(folder, name):
            if job.split == "search":
                continue
            step = job.setting["lr"] / evidence.chosen_setting(folder, name)["lr"]
            gain = effect * (1 - 0.3 * np.log2(step) ** 2)  # best at the chosen setting
            result = made_up(name, job.seed, gain, deviation * step**2, setting=job.setting)
            evidence.keep(folder, name, result)


def test_there_are_at_most_twelve_configurations_with_one_budget():
    assert len(evidence.CONFIGURATIONS) <= 12
    assert len(evidence.COMPARISONS) <= 10
    for configuration in evidence.CONFIGURATIONS.values():
        assert len(configuration.settings) == 4
    for first, second, _ in evidence.COMPARISONS:
        assert {first, second} <= set(evidence.CONFIGURATIONS)
        # One of the two needs a curve, or they cannot be compared at equal deviation.
        assert {first, second} & set(evidence.CURVES)


def test_the_setting_is_chosen_by_the_mean_score_over_both_search_seeds(tmp_path):
    """The second setting is best with one seed, the third on average. No win rate plays a part: the
    third setting's images lose more often, and gain more where they win."""
    settings = evidence.CONFIGURATIONS["dpo"].settings
    effects = {0: (0.00, 0.00), 1: (0.09, -0.05), 2: (0.04, 0.03), 3: (0.01, 0.01)}
    for number, by_seed in effects.items():
        for seed, effect in zip(evidence.SEARCH_SEEDS, by_seed):
            assert evidence.chosen_setting(tmp_path, "dpo") is None
            result = made_up("dpo", seed, effect, split="search", setting=settings[number])
            if number == 2:
                scores = np.full((32, 2), -0.15)
                scores[:8] = -0.13 + 4 * effect
                result["scores"]["ground_truth"] = scores.tolist()
            evidence.keep(tmp_path, "dpo", result)
    assert evidence.chosen_setting(tmp_path, "dpo") == settings[2]


def test_jobs_follow_from_what_is_there(tmp_path):
    names = list(evidence.CONFIGURATIONS)
    first = evidence.all_jobs(tmp_path, names)
    assert [job.name for job in first[:6]] == ["initial"] * 5 + ["explain"]
    assert (first[6].name, first[6].split) == ("smpo", "search")
    assert len(first) == 5 + 1 + 12 * 4 * 2

    assert evidence.curve_jobs(tmp_path, "dpo") == []
    finish_search(tmp_path, "dpo", best=1)
    chosen = evidence.CONFIGURATIONS["dpo"].settings[1]
    tests = [job for job in evidence.main_jobs(tmp_path, "dpo") if job.split == "test"]
    assert [(job.setting, job.seed) for job in tests] == [(chosen, seed) for seed in range(5)]
    for job in evidence.main_jobs(tmp_path, "dpo"):
        assert evidence.is_done(tmp_path, job) == (job.split == "search")
    curve = evidence.curve_jobs(tmp_path, "dpo")
    assert {job.setting["lr"] for job in curve} == {chosen["lr"] * f for f in (0.25, 2)}
    assert {job.setting["beta"] for job in curve} == {chosen["beta"]}

    for name in names:
        finish_search(tmp_path, name, best=2)
    everything = evidence.all_jobs(tmp_path, names)
    assert len(everything) == evidence.count_jobs(names)
    assert len({job.label for job in everything}) == len(everything)


def test_results_are_kept_one_by_one(tmp_path):
    for seed in (3, 0):
        evidence.keep(tmp_path, "dpo", made_up("dpo", seed, 0.02))
    results = evidence.load(tmp_path, "dpo")
    assert [result["seed"] for result in results] == [0, 3]
    assert results[1] == made_up("dpo", 3, 0.02)
    assert len((tmp_path / "dpo.json").read_text().splitlines()) == 4


def test_quantiles_of_student_t_are_those_of_the_tables():
    table = {(0.975, 4): 2.7764, (0.995, 4): 4.6041, (0.975, 10): 2.2281, (0.975, 1e6): 1.95996}
    for (p, df), expected in table.items():
        assert evidence.t_quantile(p, df) == pytest.approx(expected, rel=1e-3)


def test_the_interval_is_the_normal_one_where_all_values_are_independent():
    """Many seeds and captions, no effect of either: the binomial interval of a proportion."""
    random = np.random.default_rng(0)
    table = (random.random((60, 200)) < 0.6).astype(float)
    mean, low, high = evidence.interval(table, 0.95)
    binomial = 2 * 1.96 * (0.6 * 0.4 / table.size) ** 0.5
    assert low < 0.6 < high and mean == table.mean()
    assert high - low == pytest.approx(binomial, rel=0.2)


@pytest.mark.parametrize("by_seed, by_caption", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_the_interval_covers_what_it_says(by_seed, by_caption):
    """Seeds that differ, captions that differ, or both: the intervals of 95 % of 400 experiments hold
    the true mean. With all values taken as independent, only half would where the seeds differ."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        seeds = by_seed * random.normal(size=(5, 1))
        captions = by_caption * random.normal(size=(1, 40))
        _, low, high = evidence.interval(seeds + captions + random.normal(size=(5, 40)), 0.95)
        held += low < 0 < high
    assert held / 400 > 0.92


def test_verdicts():
    assert evidence.verdict(0.001, 0.002) == "significantly better"
    assert evidence.verdict(-0.002, -0.001) == "significantly worse"
    assert evidence.verdict(-0.001, 0.001) == "no significant difference"


def test_configurations_are_compared_on_the_seeds_they_share(tmp_path):
    for name, seeds, effect in (("smpo", (0, 1, 2), 0.06), ("dpo", (1, 2, 3), 0.02)):
        finish_search(tmp_path, name)
        for seed in seeds:
            evidence.keep(tmp_path, name, made_up(name, seed, effect))
    table = evidence.difference(tmp_path, "smpo", "dpo")
    assert table.shape == (2, 32)
    assert table.mean() == pytest.approx(0.04, abs=0.005)
    assert evidence.difference(tmp_path, "smpo", "dro") is None


def test_a_method_that_only_moves_further_is_not_better_at_equal_deviation(tmp_path):
    """Both methods have the same score at every deviation; the first is chosen at a larger one."""

    def score(deviation):
        return 0.02 * np.log(deviation / 0.001)

    for name, deviation in (("smpo", 0.016), ("dpo", 0.006)):
        finish_search(tmp_path, name)
        for job in evidence.main_jobs(tmp_path, name) + evidence.curve_jobs(tmp_path, name):
            step = job.setting["lr"] / evidence.chosen_setting(tmp_path, name)["lr"]
            moved = deviation * step**2
            if job.split == "test":
                result = made_up(name, job.seed, score(moved), moved, setting=job.setting)
                evidence.keep(tmp_path, name, result)
    apart = evidence.difference(tmp_path, "smpo", "dpo")
    equal = evidence.difference_at_equal_deviation(tmp_path, "smpo", "dpo")
    assert apart.mean() == pytest.approx(score(0.016) - score(0.006), abs=0.004)
    assert equal.shape == apart.shape
    assert equal.mean() == pytest.approx(0, abs=0.004)
    # The curve of a method that hardly moves does not reach the other.
    fill(tmp_path, {"dro": (0.03, 0.5)})
    assert evidence.difference_at_equal_deviation(tmp_path, "dro", "dpo") is None


def test_where_only_the_first_has_a_curve_it_is_the_one_that_moves(tmp_path):
    fill(tmp_path, {"dro": (0.05, 0.01), "sft_experts": (0.02, 0.01)})
    plain = evidence.difference(tmp_path, "dro", "sft_experts")
    equal = evidence.difference_at_equal_deviation(tmp_path, "dro", "sft_experts")
    assert equal == pytest.approx(plain)  # the deviations are equal already


def test_tables_and_picture(tmp_path):
    assert "not measured" in evidence.tables(tmp_path)
    fill(tmp_path, {"smpo": (0.05, 0.02), "dpo": (0.02, 0.01), "smoothing": (0.05, 0.015)})
    text = evidence.tables(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| SmPO is better than DPO |"))
    table = evidence.difference(tmp_path, "smpo", "dpo")
    # Eight comparisons, so each interval has 1 - 0.05 / 8.
    mean, low, high = evidence.interval(table, 0.99375)
    assert f"{mean:+.4f} ({low:+.4f} to {high:+.4f}) | significantly better |" in row
    row = next(line for line in text.splitlines() if line.startswith("| DPO | lr"))
    assert "lr 5e-05, beta 300 | 5 | -0.1" in row and "12,800 | 1.5 |" in row
    assert "**lr 5e-05, beta 300: -0.0" in text
    assert "| DRO is better than DPO | not measured |" in text
    evidence.draw_picture(tmp_path, tmp_path / "evidence.png")
    assert Image.open(tmp_path / "evidence.png").size == (1080, 630)


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- evidence -->\nold\n<!-- /evidence -->\nafter\n")
    for text in ("new\n", "newer\n"):
        evidence.write_between_marks(file, text)
        expected = f"before\n<!-- evidence -->\n{text}<!-- /evidence -->\nafter\n"
        assert file.read_text() == expected


def test_the_readme_says_what_the_results_say():
    text = evidence.README.read_text()
    _, rest = text.split("<!-- evidence -->\n")
    said, _ = rest.split("<!-- /evidence -->")
    assert said == evidence.tables(evidence.RESULTS)


def test_gradients_with_one_mean_have_a_cosine_of_1_whatever_their_noise():
    random = torch.Generator().manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(2000, generator=random), dim=0)

    def unit_gradients(direction, noise):
        rows = direction + noise * torch.randn(40, 2000, generator=random) / 2000**0.5
        return torch.nn.functional.normalize(rows, dim=1)

    quiet = unit_gradients(mean, 0.1)
    noisy = unit_gradients(mean, 3)
    agreement, cosine = explain.compare_gradients(noisy, quiet)
    assert agreement == pytest.approx(1 / (1 + 9), abs=0.03)
    assert cosine == pytest.approx(1, abs=0.1)
    _, cosine = explain.compare_gradients(unit_gradients(-mean, 3), quiet)
    assert cosine == pytest.approx(-1, abs=0.1)
