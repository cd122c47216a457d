"""The quality study's plot: bytes per token against the share of full logits' gain that a store
recovers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from arms import FULL, HEADS, SCRATCH
from matplotlib.axes import Axes

matplotlib.use("Agg")

OURS, OURS_TOP, PEER, PLAIN, INK, GRID = (
    "#0b6e6e",
    "#58a4a4",
    "#c2571a",
    "#6b6b6b",
    "#222222",
    "#d9d9d9",
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "logitcask",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}

_TITLES = {
    "strong": "Strong teacher: SmolLM2-135M",
    "weak": "Weak teacher: a Llama trained for minutes",
}
_FLOOR = -0.6
"""What lies below is drawn at the edge, with its value."""


def draw(results: dict[str, Any], file: Path) -> None:
    """One panel per teacher; filled: the teacher alone, hollow: half hard labels."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
        for axis, teacher in zip(axes, _TITLES, strict=True):
            _panel(axis, results, teacher)
        axes[0].set_ylabel("share of the way from hard labels to full logits")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _panel(axis: Axes, results: dict[str, Any], teacher: str) -> None:
    rows = [
        row
        for row in results["arms"]
        if row["teacher"] == teacher
        and row["group"] == "bytes"
        and row["start"] == SCRATCH
        and row["recovered"]
    ]
    axis.axhline(1, color=INK, linewidth=1)
    axis.axhline(0, color=INK, linewidth=1, linestyle=":")
    axis.axhline(0.95, color=GRID, linewidth=1.5, linestyle="--")
    axis.axvline(20, color=GRID, linewidth=1.5, linestyle="--")
    named = set()
    for row in rows:
        if row["name"].removeprefix("half ") == FULL:
            continue
        half = bool(row["ce_weight"])
        kind, colour, marker = _kind(row)
        share = row["recovered"]
        y = max(share["mean"], _FLOOR)
        axis.errorbar(
            row["bytes_per_token"],
            y,
            yerr=None if y > share["mean"] else share["sd"],
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor="white" if half else colour,
            linewidth=1,
            label=None if kind in named or half else kind,
        )
        if not half:
            named.add(kind)
        if y > share["mean"]:
            axis.annotate(
                f"{share['mean']:.1f}",
                (row["bytes_per_token"], y),
                (4, 4),
                textcoords="offset points",
                fontsize=7.5,
            )
    axis.set_xscale("log")
    axis.minorticks_off()
    ticks = [10, 15, 20, 30, 40, 60, 100]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_ylim(_FLOOR - 0.08, 1.25)
    axis.set_xlabel("bytes per token on disk")
    axis.set_title(f"{_TITLES[teacher]}; hollow: half hard labels", fontsize=10.5, loc="left")
    axis.legend(fontsize=8, loc="lower right", frameon=False)


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["source"] in HEADS:
        tail = row["name"].rsplit(", ", 1)[1]
        return f"head alone, {tail}", PLAIN, {"ghost": "s", "prior": "^", "renormalised": "v"}[tail]
    if row["source"].endswith("independent") and "head" not in row["source"]:
        return "independent draws (RS-KD)", PEER, "D"
    if "draws" in row["source"] and not row["source"].startswith(("head", "p ")):
        return "systematic draws", "#d9a441", "D"
    if row["source"].startswith("head"):
        return "fixed head + draws", OURS_TOP, "o"
    return "ragged head + draws", OURS, "o"
