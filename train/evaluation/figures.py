"""Metrics of one model, and differences of two, with bootstrap intervals and spread. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypedDict

from logitcask.train.evaluation.by_sequence import BySequence, Floats, interval


class Figure(TypedDict):
    """One metric. low, high: its 95 % interval. deviation: over sequences. exactness: as
    ``logitcask.train.losses.base.Exactness``. None where there is none.
    """

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    exactness: str


class Bootstrap(NamedTuple):
    """A bootstrap over sequences: its seed and its number of resamples."""

    seed: int = 0
    resamples: int = 1000


def figures_of(
    model: BySequence, kinds: Mapping[str, str], bootstrap: Bootstrap
) -> dict[str, Figure]:
    """The metrics of a model. ``kinds``: the exactness of each."""
    resampled = model.resampled(**bootstrap._asdict())
    return _figures(model.means(), resampled, model.deviations(), kinds, len(model))


def differences(
    one: BySequence, other: BySequence, kinds: Mapping[str, str], bootstrap: Bootstrap
) -> dict[str, Figure]:
    """The metrics of ``one`` minus those of ``other``, paired by sequence: both have the same
    sequences, and the same ones are drawn for both. ``kinds``: the exactness of the metrics.
    """
    means, others = one.means(), other.means()
    first, second = (each.resampled(**bootstrap._asdict()) for each in (one, other))
    return _figures(
        {name: means[name] - others[name] for name in means},
        {name: first[name] - second[name] for name in first},
        _paired_deviations(one, other),
        kinds_of_difference(kinds),
        len(one),
    )


def kinds_of_difference(kinds: Mapping[str, str]) -> dict[str, str]:
    """The exactness of differences of two models' metrics: that of two lower bounds is no bound."""
    return {name: "biased" if kind == "lower" else kind for name, kind in kinds.items()}


def _figures(
    means: dict[str, float],
    resampled: dict[str, Floats],
    deviations: dict[str, float],
    kinds: Mapping[str, str],
    sequences: int,
) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, mean in means.items():
        known = sequences > 1 and name in resampled
        low, high = interval(resampled[name]) if known else (None, None)
        figures[name] = {
            "mean": mean,
            "low": low,
            "high": high,
            "deviation": deviations.get(name),
            "exactness": kinds[name],
        }
    return figures


def _paired_deviations(one: BySequence, other: BySequence) -> dict[str, float]:
    sums = {name: one.sums[name] - other.sums[name] for name in one.sums}
    paired = BySequence(sums, one.positions, math.nan).deviations()
    paired.pop("perplexity", None)  # of differences of cross-entropies, there
    return paired
