"""The comparison of runs: metrics, the best of each, paired differences from a base, seeds, costs
and configs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypedDict

from logitcask.train.comparison.runs import Run
from logitcask.train.comparison.seeds import SEED, without_seeds
from logitcask.train.evaluation.figures import (
    Bootstrap,
    Figure,
    differences,
    figures_of,
    kinds_of_difference,
)
from logitcask.train.output.held_out_file import by_sequence_of
from logitcask.train.output.report import METRICS


class Compared(TypedDict):
    """One run.

    judged_on:  number of its held-out text in ``Comparison.judged_on``.
    metrics:    after training; intervals if its values by sequence are known.
    best:       metrics in which no run of the same held-out text is better, and some run is worse.
    difference: its metrics minus those of the base; None for the base, and for runs that were
                judged on other text. Without values by sequence it has no intervals.
    bytes:      of the cache that it learnt from.
    """

    run: str
    folder: str
    judged_on: int
    metrics: dict[str, Figure]
    best: list[str]
    difference: dict[str, Figure] | None
    steps: int
    seconds: float
    positions_trained: int
    bytes: int
    bytes_per_token: float
    parameters: int
    seed: int


class Comparison(TypedDict):
    """The result of ``train-student compare``.

    judged_on: the held-out texts in words; the base's is the first.
    seeds:     runs that differ in the seed alone: ``runs`` (their labels) and ``after`` (mean and
               deviation of each metric).
    config:    fields that differ: field -> the value of each run, None where it is not set.
    notes:     what the comparison cannot say, in sentences.
    """

    base: str
    seed: int
    resamples: int
    judged_on: list[str]
    runs: list[Compared]
    seeds: list[dict[str, Any]]
    config: dict[str, list[Any]]
    notes: list[str]


def compare(runs: Sequence[Run], base: int, bootstrap: Bootstrap) -> Comparison:
    """Compares ``runs`` with the one of number ``base``."""
    groups = _groups(runs, base)
    group_of = [next(n for n, group in enumerate(groups) if run in group) for run in runs]
    compared: list[Compared] = [
        {
            "run": run.label,
            "folder": str(run.folder),
            "judged_on": group,
            "metrics": _metrics(run, bootstrap),
            "best": _best(run, groups[group]),
            "difference": None
            if run is runs[base] or group
            else _difference(run, runs[base], bootstrap),
            "steps": run.metrics["steps"],
            "seconds": run.metrics["seconds"],
            "positions_trained": run.metrics["positions_trained"],
            "bytes": run.cache_bytes,
            "bytes_per_token": run.metrics["cache"]["bytes_per_token"],
            "parameters": run.metrics["student"]["parameters"],
            "seed": run.metrics["seed"],
        }
        for run, group in zip(runs, group_of, strict=True)
    ]
    return {
        "base": runs[base].label,
        "seed": bootstrap.seed,
        "resamples": bootstrap.resamples,
        "judged_on": [group[0].judge.words for group in groups],
        "runs": compared,
        "seeds": _seeds(runs, group_of),
        "config": differing_fields(runs),
        "notes": _notes(runs, groups),
    }


def less_is_better(metric: str) -> bool:
    return METRICS[metric.partition("@")[0]][2].startswith("less")


def verdict(metric: str, difference: Figure) -> str:
    """The difference of a metric from the base in a word. Only an interval without 0 tells two runs
    apart.
    """
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "no interval"
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (high < 0) == less_is_better(metric) else "worse"


def value_text(value: Any) -> str:
    """A value of a config in one line; ``none`` for one that is not set."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differing_fields(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Fields of the configs, by dotted path, in which not all runs agree, with each run's value;
    None where a run does not set it. Lists are single values. The places of caches and outputs are
    no part of a config here; the caches' fingerprints are.
    """
    flat = [_fields(run) for run in runs]
    return {
        name: [each.get(name) for each in flat]
        for name in sorted({name for each in flat for name in each})
        if len({json.dumps(each.get(name), sort_keys=True) for each in flat}) > 1
    }


def _groups(runs: Sequence[Run], base: int) -> list[list[Run]]:
    """Runs that were judged on the same text, those of the base first."""
    groups: list[list[Run]] = [[run for run in runs if run.judged_as(runs[base])]]
    for run in runs:
        if run in groups[0]:
            continue
        for group in groups[1:]:
            if run.judged_as(group[0]):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _metrics(run: Run, bootstrap: Bootstrap) -> dict[str, Figure]:
    kinds = run.metrics.get("kinds", {})
    if run.held_out is not None and kinds:
        return figures_of(by_sequence_of(run.held_out), kinds, bootstrap)
    return {name: _bare(value, kinds.get(name)) for name, value in run.metrics["after"].items()}


def _difference(run: Run, base: Run, bootstrap: Bootstrap) -> dict[str, Figure]:
    kinds = base.metrics.get("kinds", {})
    if run.held_out is not None and base.held_out is not None and run.paired_with(base):
        one, other = by_sequence_of(run.held_out), by_sequence_of(base.held_out)
        if one.sums.keys() == other.sums.keys() and kinds:
            return differences(one, other, kinds, bootstrap)
    after, before = run.metrics["after"], base.metrics["after"]
    kinds = kinds_of_difference(kinds)
    return {
        name: _bare(value - before[name], kinds.get(name))
        for name, value in after.items()
        if name in before
    }


def _bare(value: float, kind: str | None) -> Figure:
    return {"mean": value, "low": None, "high": None, "deviation": None, "exactness": kind or ""}


def _best(run: Run, group: Sequence[Run]) -> list[str]:
    """Metrics in which no run of ``group`` is better than ``run``, and some run is worse."""
    found = []
    for name, value in run.metrics["after"].items():
        values = [each.metrics["after"][name] for each in group if name in each.metrics["after"]]
        values = [each for each in values if math.isfinite(each)]
        best = (min if less_is_better(name) else max)(values, default=math.nan)
        if value == best and min(values) < max(values):
            found.append(name)
    return found


def _seeds(runs: Sequence[Run], group_of: list[int]) -> list[dict[str, Any]]:
    values = [
        {**_fields(run), "judged on": group, SEED: run.metrics["seed"]}
        for run, group in zip(runs, group_of, strict=True)
    ]
    found = without_seeds(
        [
            {"values": value, "after": run.metrics["after"]}
            for run, value in zip(runs, values, strict=True)
        ]
    )
    members = [
        [
            run.label
            for run, value in zip(runs, values, strict=True)
            if {**group["values"], SEED: value[SEED]} == value
        ]
        for group in found
    ]
    return [
        {"runs": labels, "after": group["after"]}
        for group, labels in zip(found, members, strict=True)
        if len(labels) > 1
    ]


def _fields(run: Run) -> dict[str, Any]:
    flat = _flat(run.metrics["config"], "")
    reference = run.metrics.get("reference")
    return flat | {
        "cache (fingerprint)": _short(run.metrics["cache"]["fingerprint"]),
        "evaluation.cache (fingerprint)": None
        if reference is None
        else _short(reference["fingerprint"]),
        "created by": run.metrics["created_by"],
        SEED: run.metrics["seed"],
    }


def _short(fingerprints: str) -> str:
    """The beginning of each fingerprint of a text with commas."""
    return ", ".join(each[:16] for each in fingerprints.split(", "))


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= _flat(each, f"{prefix}.{name}" if prefix else name)
    return found


def _notes(runs: Sequence[Run], groups: list[list[Run]]) -> list[str]:
    notes = []
    if len(groups) > 1:
        notes.append(
            f"The runs were judged on {len(groups)} different held-out texts, so their metrics are different quantities. Each text has "
            "a table and curves of its own; no best and no difference is taken across them. evaluation.cache judges runs on one "
            "reference; train-student evaluate does so afterwards."
        )
    without = [run.label for run in runs if run.held_out is None]
    if without:
        notes.append(
            f"No intervals for {', '.join(without)}: {'it has' if len(without) == 1 else 'they have'} no values by sequence (a run of an older "
            "version). train-student evaluate MODEL --cache CACHE --baseline OTHER computes them."
        )
    sequences = min((run.metrics["held_out_sequences"] for run in groups[0]), default=0)
    if sequences < 10:
        notes.append(
            f"The base was judged on {sequences} sequences; intervals from less than 10 are too narrow. Raise evaluation.max_sequences "
            "or hold out more."
        )
    return notes
