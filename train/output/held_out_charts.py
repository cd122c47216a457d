"""Charts of ``held_out.json``: calibration, agreement by the teacher's entropy, spread of the KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from logitcask.cache_format.pages.charts import Chart, Histogram, LineChart, Series
from logitcask.train.evaluation.by_sequence import BySequence
from logitcask.train.output.held_out_file import HeldOutValues, by_sequence_of

Bin = Sequence[float]

_SPREAD_BINS = 12

_ENTROPY_NOTE = {
    "exact": "Bins of the teacher's entropy, which the cache stores for each whole distribution.",
    "lower": "The cache does not store entropies: bins are of the entropy of the head with everything outside it as one cell, "
    "a lower bound.",
}


def held_out_charts(values: HeldOutValues, k: int) -> list[Chart]:
    """The charts that the values allow. ``k``: of MOR@k."""
    found: list[Chart | None] = [
        _by_entropy(values, k),
        _calibration(values),
        _confidences(values),
        _spread(by_sequence_of(values)),
    ]
    return [each for each in found if each is not None]


def _by_entropy(values: HeldOutValues, k: int) -> LineChart | None:
    kind, bins = values["after"]["entropy_kind"], values["after"]["entropy"]
    if kind is None or "top1_agreement" not in bins:
        return None
    before = values["before"]["entropy"] if "before" in values else {}
    total = sum(bins["positions"])
    some = [at for at, count in enumerate(bins["positions"]) if count]
    x = [bins["entropy"][at] / bins["positions"][at] for at in some]

    def shares(found: dict[str, list[float]], name: str) -> list[float]:
        return [found[name][at] / bins["positions"][at] for at in some]

    series = [
        Series("top-1 agreement", x, shares(bins, "top1_agreement")),
        Series(f"overlap of both top-{k}", x, shares(bins, f"mor@{k}")),
    ]
    if "top1_agreement" in before:
        series.append(Series("top-1 before training", x, shares(before, "top1_agreement")))
    series.append(
        Series("share of the positions", x, [bins["positions"][at] / total for at in some], 5)
    )
    return LineChart(
        "Agreement by the teacher's entropy",
        "mean entropy of the bin, nats",
        "share of positions",
        series,
        unit="%",
        dots=True,
        note=_ENTROPY_NOTE[kind],
    )


def _calibration(values: HeldOutValues) -> LineChart:
    series = [_calibration_of("student", values["after"]["calibration"], 0)]
    if "before" in values:
        series.append(_calibration_of("before training", values["before"]["calibration"], 1))
    teacher = values["teacher_calibration"]
    if teacher is not None:
        series.append(_calibration_of("teacher", teacher, 2))
    series.append(Series("calibrated", [0.0, 1.0], [0.0, 1.0], 4))
    return LineChart(
        "Calibration",
        "mean probability of the most probable token",
        "share of positions where it is the next token",
        series,
        ticks=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        unit="%",
        dots=True,
        note="15 bins of the probability; bins without positions have no point. The student's are exact; the teacher's are from "
        "the stored heads.",
    )


def _calibration_of(label: str, sums: Sequence[Bin], style: int) -> Series:
    some = [at for at, count in enumerate(sums[0]) if count]
    means = [[sums[row][at] / sums[0][at] for at in some] for row in (1, 2)]
    return Series(label, means[0], means[1], style)


def _confidences(values: HeldOutValues) -> Histogram:
    counts = [round(count) for count in values["after"]["calibration"][0]]
    edges = [at / len(counts) for at in range(len(counts) + 1)]
    title, label = "How sure the student is", "probability of its most probable token"
    return Histogram(title, label, "positions", edges, counts, unit="%")


def _spread(sequences: BySequence) -> Histogram | None:
    each = sequences.sums["kl"] / sequences.positions
    if len(each) < 2 or not math.isfinite(each.sum()) or each.min() == each.max():
        return None
    counts, edges = np.histogram(each, _SPREAD_BINS)
    return Histogram(
        "KL of each sequence", "nats per position", "sequences", edges.tolist(), counts.tolist()
    )
