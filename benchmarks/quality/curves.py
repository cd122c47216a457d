"""The quality study's plot: bytes per token against the share of full logits' gain that a store
recovers. The charts are those of reports and of ``train-student compare``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arms import FULL, HEADS, SCRATCH

from logitcask.cache_format.pages.charts import Cloud, Point, Points
from logitcask.cache_format.pages.picture import picture

_TITLES = {
    "strong": "Strong teacher: SmolLM2-135M",
    "weak": "Weak teacher: a Llama trained for minutes",
}
_KINDS = {
    "ragged head + draws": (0, 0),
    "fixed head + draws": (3, 5),
    "systematic draws": (2, 2),
    "independent draws (RS-KD)": (1, 2),
    "head alone, ghost": (5, 1),
    "head alone, prior": (5, 3),
    "head alone, renormalised": (5, 4),
}
"""Kind of store -> number of its colour and its shape."""
_TICKS = (10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 100.0)
_FLOOR = -0.5
"""Points below are drawn at the edge."""


def draw(results: dict[str, Any], file: Path) -> None:
    """Writes a chart for each teacher, below each other."""
    charts = [chart(results, teacher) for teacher in _TITLES]
    title = "Share of full logits' gain that each store recovers, against its bytes per token"
    file.write_text(picture(title, charts, width=760, height=1020), encoding="utf-8")


def chart(results: dict[str, Any], teacher: str) -> Points:
    """The stores' students of one teacher, from random weights; hollow: with half hard labels."""
    found: dict[tuple[str, bool], list[Point]] = {
        (kind, half): [] for half in (False, True) for kind in _KINDS
    }
    for row in results["arms"]:
        if (row["teacher"], row["group"], row["start"]) != (teacher, "bytes", SCRATCH):
            continue
        if not row["recovered"] or row["name"].removeprefix("half ") == FULL:
            continue
        mean, deviation = row["recovered"]["mean"], row["recovered"]["sd"]
        found[_kind(row), bool(row["ce_weight"])].append(
            Point(row["name"], row["bytes_per_token"], mean, mean - deviation, mean + deviation)
        )
    below = [point.y for points in found.values() for point in points if point.y < _FLOOR]
    return Points(
        _TITLES[teacher],
        "bytes per token on disk (logarithmic)",
        "share of the way from hard labels to full logits",
        [
            Cloud(kind, points, *_KINDS[kind], hollow=half)
            for (kind, half), points in found.items()
            if points
        ],
        ticks=_TICKS,
        log=True,
        zero=False,
        unit="%",
        x_name="store",
        floor=_FLOOR,
        guides=(0.0, 1.0),
        note="Hollow: half hard labels. Intervals: one standard deviation over seeds."
        + (
            f" A tick under a point: it is below the axis, down to {min(below):.0%}."
            if below
            else ""
        ),
    )


def _kind(row: dict[str, Any]) -> str:
    source: str = row["source"]
    if source in HEADS:
        return f"head alone, {row['name'].rsplit(', ', 1)[1]}"
    if "head" not in source and source.endswith("independent"):
        return "independent draws (RS-KD)"
    if "draws" in source and not source.startswith(("head", "p ")):
        return "systematic draws"
    return "fixed head + draws" if source.startswith("head") else "ragged head + draws"
