"""The quality study's figures: means and spreads over seeds, what each arm recovers, and the
tables of docs/quality.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arms import FULL, PRETRAINED, SCRATCH, TEXT

Row = dict[str, Any]
ENOUGH = 0.95
"""Share of the way from hard labels to full logits that a store should recover."""


def summarise(found: Iterable[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """``arms``: a row for each arm, teacher and start, over seeds. ``noise``: what moves where
    nothing studied changes.

    ``found`` has jobs and their records. Recovered is ``(text - arm) / (text - full)`` in held-out
    cross-entropy, each taken from the run with the same seed: the same first weights, the same
    order of the data.
    """
    grouped: dict[
        tuple[str, str, str, str], dict[int, tuple[Any, dict[str, float], float | None]]
    ] = defaultdict(dict)
    moved: dict[tuple[str, str], list[float]] = defaultdict(list)
    for job, record in found:
        arm = job.arm
        for teacher, metrics in record["metrics"].items():
            one = (arm, metrics, record["bytes_per_token"])
            if job.init == job.order == job.draws:
                grouped[arm.group, arm.start, teacher, arm.name][job.init] = one
            elif teacher == "strong":
                what = (
                    "first weights" if job.init else "order of the data" if job.order else "draws"
                )
                moved[arm.name, what].append(metrics["ce"])
    arms = [_row(key, runs, grouped) for key, runs in grouped.items()]
    noise = []
    for (name, what), values in moved.items():
        base = next(
            (row for row in arms if row["name"] == name and row["teacher"] == "strong"), None
        )
        if base is not None and 0 in base["seeds"]:
            at_zero = base["values"]["ce"][base["seeds"].index(0)]
            noise.append({"arm": name, "moved": what, "ce": _spread([at_zero, *values])})
    return {"arms": arms, "noise": noise, "cheapest": _cheapest(arms)}


def _row(key: tuple[str, str, str, str], runs: dict[int, Any], grouped: dict[Any, Any]) -> Row:
    group, start, teacher, name = key
    arm = next(iter(runs.values()))[0]
    seeds = sorted(runs)
    metrics = {metric: [runs[seed][1][metric] for seed in seeds] for metric in runs[seeds[0]][1]}
    sizes = [runs[seed][2] for seed in seeds if runs[seed][2] is not None]
    text = grouped.get(("text", start, teacher, "text alone"), {})
    reference = grouped.get(("bytes", start, teacher, FULL)) or grouped.get(
        ("ranking", start, teacher, "KL"), {}
    )
    paired = [seed for seed in seeds if seed in text and seed in reference]
    best = {seed: reference[seed][1]["ce"] for seed in paired}
    gaps = [runs[seed][1]["ce"] - best[seed] for seed in paired]
    shares = [
        1 - gap / (text[seed][1]["ce"] - best[seed]) for seed, gap in zip(paired, gaps, strict=True)
    ]
    return {
        "group": group,
        "start": start,
        "teacher": teacher,
        "name": name,
        "source": arm.source,
        "losses": list(arm.losses),
        "ce_weight": arm.ce,
        "seeds": seeds,
        "bytes_per_token": round(mean(sizes), 2) if sizes else None,
        "values": metrics,
        **{metric: _spread(values) for metric, values in metrics.items()},
        "behind_full": _spread(gaps),
        "recovered": _spread(shares),
    }


def _spread(values: list[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    return {
        "mean": round(mean(values), 5),
        "sd": round(stdev(values), 5) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def _cheapest(arms: list[Row]) -> list[dict[str, Any]]:
    """Per teacher, without and with hard labels: the smallest store that recovers enough, and the
    smallest that cannot be told from full logits: behind by less than they vary from seed to
    seed."""
    result = []
    for teacher, start in dict.fromkeys((row["teacher"], row["start"]) for row in arms):
        own = [
            row
            for row in arms
            if (row["teacher"], row["start"], row["group"]) == (teacher, start, "bytes")
        ]
        full = next((row for row in own if row["name"] == FULL), None)
        for half in (False, True):
            stored = [
                row
                for row in own
                if row["bytes_per_token"] and bool(row["ce_weight"]) == half and row["recovered"]
            ]
            stored.sort(key=lambda row: row["bytes_per_token"])
            enough = next((row for row in stored if row["recovered"]["mean"] >= ENOUGH), None)
            level = next(
                (
                    row
                    for row in stored
                    if full is not None and row["behind_full"]["mean"] <= full["ce"]["sd"]
                ),
                None,
            )
            result.append(
                {
                    "teacher": teacher,
                    "start": start,
                    "hard_labels": half,
                    "recovers_95": enough and [enough["name"], enough["bytes_per_token"]],
                    "level_with_full_logits": level and [level["name"], level["bytes_per_token"]],
                }
            )
    return result


def update_page(results: dict[str, Any], page: Path) -> None:
    """Puts the tables into the page."""
    tables = {
        **{
            f"{kind} {start} {teacher}": table(results, kind, start, teacher)
            for kind, table in (
                ("bytes", _bytes_table),
                ("ranking", _loss_table),
                ("tails", _loss_table),
            )
            for start in (PRETRAINED, SCRATCH)
            for teacher in results["teachers"]
        },
        "losses": _loss_table(results, "losses", PRETRAINED, "strong"),
        "noise": _noise_table(results),
        "teachers": _teachers_table(results),
    }
    fill(page, tables)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Puts each table between the markers ``<!-- table NAME -->`` and ``<!-- end -->``."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}"

    text = page.read_text()
    page.write_text(
        re.sub(r"(<!-- table ([^>]*) -->)\n.*?(<!-- end -->)", filled, text, flags=re.DOTALL)
    )


def _bytes_table(results: dict[str, Any], kind: str, start: str, teacher: str) -> str:
    rows = {
        row["name"]: row
        for row in results["arms"]
        if row["teacher"] == teacher and row["start"] == start and row["group"] in (kind, "text")
    }
    native = (results["native"] or {"stores": {}})["stores"]
    lines = [
        "| stored | B/token | with 49,152 ids | CE | recovered | ECE, % | half CE: CE | recovered | ECE, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    no_cache = {TEXT: -1.0, FULL: float("inf")}
    for name, row in sorted(
        rows.items(), key=lambda item: item[1]["bytes_per_token"] or no_cache[item[1]["source"]]
    ):
        if name.startswith("half "):
            continue
        half = rows.get(f"half {name}")
        size = "" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.1f}"
        whole = native.get(row["source"])
        lines.append(
            f"| {name} | {size} | {whole['bytes_per_token'] if whole else ''} | "
            + " | ".join(
                f"{_value(r, 'ce', 3)} | {_share(r)} | {_value(r, 'ece', 1)}" for r in (row, half)
            )
            + " |"
        )
    return "\n".join(lines)


def _loss_table(results: dict[str, Any], group: str, start: str, teacher: str) -> str:
    wanted = [
        row
        for row in results["arms"]
        if row["start"] == start and row["teacher"] == teacher and row["group"] in (group, "text")
    ]
    lines = [
        "| learnt from | CE | KL | reverse KL | top-1, % | MOR@5, % | CR@5, % | ECE, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in wanted:
        columns = [
            ("ce", 3),
            ("kl", 3),
            ("reverse_kl", 3),
            ("top1", 1),
            ("mor@5", 1),
            ("cr@5", 2),
            ("ece", 1),
        ]
        name = TEXT if row["source"] == TEXT else row["name"]
        lines.append(
            f"| {name} | "
            + " | ".join(_value(row, metric, digits) for metric, digits in columns)
            + " |"
        )
    return "\n".join(lines)


def _noise_table(results: dict[str, Any]) -> str:
    lines = [
        "| learnt from | what differs | CE of three runs: mean, sd, range |",
        "| --- | --- | --- |",
    ]
    for row in results["noise"]:
        ce = row["ce"]
        lines.append(
            f"| {row['arm']} | {row['moved']} | {ce['mean']:.4f}, {ce['sd']:.4f}, {ce['min']:.4f} to {ce['max']:.4f} |"
        )
    return "\n".join(lines)


def _teachers_table(results: dict[str, Any]) -> str:
    figures = list(next(iter(results["teachers"].values())))
    lines = [f"| teacher | {' | '.join(figures)} |", "| --- |" + " --- |" * len(figures)]
    for name, values in results["teachers"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{values[figure]:.3f}" for figure in figures) + " |"
        )
    return "\n".join(lines)


def _value(row: Row | None, metric: str, digits: int) -> str:
    if row is None:
        return ""
    spread = row[metric]
    return f"{spread['mean']:.{digits}f} ± {spread['sd']:.{digits}f}"


def _share(row: Row | None) -> str:
    if row is None or row["recovered"] is None:
        return ""
    return f"{100 * row['recovered']['mean']:.0f} ± {100 * row['recovered']['sd']:.0f} %"
