"""Comparisons against numbers made by hand, and against ``train-student evaluate``."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest

from logitcask.cache_format import CacheReader
from logitcask.train.comparison.compare import compare, verdict
from logitcask.train.comparison.runs import read_runs
from logitcask.train.evaluation.figures import Bootstrap
from logitcask.train.evaluation.judge import Settings, judge
from logitcask.train.run import train

BOOTSTRAP = Bootstrap(seed=3, resamples=200)
MORE = ("top1_agreement", "mor@5", "cr@5", "spearman@5")


def content(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_differences_by_hand(make_run):
    folders = [make_run("a"), make_run("b", level=0.9), make_run("c", level=2.0)]
    found = compare(read_runs([*map(str, folders)]), 1, BOOTSTRAP)
    assert found["base"] == "b"
    assert found["runs"][1]["difference"] is None
    assert found["notes"] == []
    held = [content(folder, "held_out") for folder in folders]
    positions = np.array(held[0]["positions"])
    rng = np.random.default_rng(3)
    drawn = [rng.integers(0, 20, 20) for _ in range(200)]
    for number in (0, 2):
        for name, figure in found["runs"][number]["difference"].items():
            after = [content(folder, "metrics")["after"][name] for folder in folders]
            assert figure["mean"] == pytest.approx(after[number] - after[1])
            if name == "ece":
                assert (figure["low"], figure["high"]) == (None, None)
                continue
            key = "ce" if name == "perplexity" else name
            one, other = (np.array(held[at]["sums"][key]) for at in (number, 1))
            means = [[each[rows].sum() / positions[rows].sum() for each in (one, other)] for rows in drawn]  # fmt: skip
            apart = [np.exp(a) - np.exp(b) if name == "perplexity" else a - b for a, b in means]
            assert (figure["low"], figure["high"]) == pytest.approx(
                tuple(np.quantile(apart, [0.025, 0.975]))
            )
            if name != "perplexity":
                each = (one - other) / positions
                assert figure["deviation"] == pytest.approx(each.std(ddof=1))
    kinds = {n: f["exactness"] for n, f in found["runs"][0]["difference"].items()}
    assert (kinds["kl"], kinds["reverse_kl"], kinds["ce"]) == ("unbiased", "biased", "exact")


def test_the_best_of_each_metric(make_run):
    runs = read_runs([str(make_run(name, level=level)) for name, level in zip("abc", (9, 1, 5), strict=True)])  # fmt: skip
    for run in runs:
        run.metrics["after"]["cr@5"] = 0.25  # equal for all: none is best
        run.metrics["after"]["ece"] = 0.125 if run.label in "ac" else 0.5  # two share it
    found = compare(runs, 0, BOOTSTRAP)
    best = {each["run"]: set(each["best"]) for each in found["runs"]}
    assert best["a"] == {*MORE, "ece"} - {"cr@5"}
    assert best["b"] == {"kl", "reverse_kl", "ce", "perplexity"}
    assert best["c"] == {"ece"}


def test_runs_of_different_texts_are_not_subtracted(make_run):
    """Nor is a best taken across them; each text has its own."""
    names = ("a", "x", "b", "y", "z")
    runs = read_runs(
        [
            *(str(make_run(name, level=n + 1, reference=("q" if name in "xy" else "p" if name == "z" else "r") * 64)) for n, name in enumerate(names))
        ]
    )  # fmt: skip
    found = compare(runs, 3, BOOTSTRAP)
    assert [each["judged_on"] for each in found["runs"]] == [1, 0, 1, 0, 2]
    assert [each["difference"] is None for each in found["runs"]] == [True, False, True, True, True]
    assert [("kl" in each["best"]) for each in found["runs"]] == [True, True, False, False, False]
    assert "judged on 3 different held-out texts" in found["notes"][0]
    assert "(qqqqqqqqqqqqqqqq)" in found["judged_on"][0]


def test_runs_of_older_versions_have_no_intervals(make_run):
    folders = [make_run("a"), make_run("old", old=True)]
    found = compare(read_runs([*map(str, folders)]), 0, BOOTSTRAP)
    figure = found["runs"][1]["difference"]["kl"]
    after = [content(folder, "metrics")["after"]["kl"] for folder in folders]
    assert figure["mean"] == pytest.approx(after[1] - after[0])
    assert (figure["low"], figure["high"], verdict("kl", figure)) == (None, None, "no interval")
    assert found["runs"][0]["metrics"]["kl"]["low"] is not None
    assert found["runs"][1]["metrics"]["kl"]["low"] is None
    assert "No intervals for old: it has no values" in found["notes"][0]


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("kl", -0.2, -0.1, "better"),
        ("kl", 0.1, 0.2, "worse"),
        ("mor@5", 0.1, 0.2, "better"),
        ("mor@5", -0.2, -0.1, "worse"),
        ("kl", -0.1, 0.1, "not told apart"),
        ("kl", 0.0, 0.0, "not told apart"),
        ("ece", None, None, "no interval"),
    ],
)
def test_verdicts(metric, low, high, expected):
    figure = {"mean": 0.0, "low": low, "high": high, "deviation": None, "exactness": "exact"}
    assert verdict(metric, figure) == expected


def test_configs_and_seeds(make_run):
    losses = [{"name": "jsd", "weight": 1.0}]
    runs = read_runs(
        [
            str(make_run("a", seed=1)),
            str(make_run("b", seed=2)),
            str(make_run("c", seed=1, config={"losses": losses, "training.extra": 3})),
            str(make_run("d", seed=3, fingerprint="d" * 64)),
        ]
    )
    found = compare(runs, 0, BOOTSTRAP)
    forward = [{"name": "forward_kl", "weight": 1.0}]
    assert found["config"] == {
        "cache (fingerprint)": [*["c" * 16] * 3, "d" * 16],
        "losses": [forward, forward, losses, forward],
        "training.extra": [None, None, 3, None],
        "training.seed": [1, 2, 1, 3],
    }
    (group,) = found["seeds"]
    assert group["runs"] == ["a", "b"]
    kl = [run.metrics["after"]["kl"] for run in runs[:2]]
    assert group["after"]["kl"] == {"mean": statistics.fmean(kl), "deviation": statistics.stdev(kl)}
    assert compare(runs[1:], 0, BOOTSTRAP)["seeds"] == []


def test_few_sequences_are_said(make_run):
    runs = read_runs([str(make_run(name, sequences=4)) for name in "ab"])
    assert "intervals from less than 10 are too narrow" in compare(runs, 0, BOOTSTRAP)["notes"][0]


def test_the_numbers_are_those_of_evaluate(config, cache, tmp_path):
    """Of the saved students, measured again, with the same seed."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder, weight in zip(folders, (0.5, 0.0), strict=True):
        train(config(ce_weight=weight, training={"max_steps": 3, "output_dir": str(folder)}))
    found = compare(read_runs([*map(str, folders)]), 0, Bootstrap(4, 300))
    settings = Settings(held_out_of=str(folders[0]), max_sequences=64, seed=4, resamples=300)
    truth = judge(str(folders[1]), str(cache), str(folders[0]), settings)
    for table, expected in (
        (found["runs"][0]["metrics"], truth["baseline"]),
        (found["runs"][1]["metrics"], truth["metrics"]),
        (found["runs"][1]["difference"], truth["difference"]),
    ):
        assert list(table) == list(expected)
        for name, figure in table.items():
            assert figure["exactness"] == expected[name]["exactness"]
            assert (figure["low"] is None) == (name == "ece")
            for key in ("mean", "low", "high", "deviation"):
                if expected[name][key] is None:
                    assert figure[key] is None
                else:
                    assert figure[key] == pytest.approx(expected[name][key], rel=1e-3, abs=1e-5)
    assert found["config"] == {"ce_weight": [0.5, 0.0]}
    assert found["runs"][0]["bytes"] == CacheReader(cache).manifest.statistics.bytes
