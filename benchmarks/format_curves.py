"""The format benchmark's results as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

matplotlib.use("Agg")

OURS, OURS_TOP, PEER, PLAIN, INK, GRID = (
    "#0b6e6e",
    "#58a4a4",
    "#c2571a",
    "#6b6b6b",
    "#222222",
    "#e6e6e6",
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
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
}
STEP = 1 / 8
BYTES = [10, 20, 30, 60, 100, 200, 400, 1000, 2500]
TICKS = {"kl": [0.15, 0.2, 0.3, 0.5, 1, 1.5, 2], "tv": [0.05, 0.1, 0.15, 0.2, 0.3]}
LOWEST = {"kl": 0.14, "tv": 0.048}
GOALS = [(60, 0.30), (32, 0.50)]
"""Bytes per token and KL that the format is to stay below."""

_PEER_LABELS = {
    "Megatron-LM": ("Megatron-LM", (24, -3), "left"),
    "DistillKit recommended": ("DistillKit recommended", (7, -13), "left"),
    "DistillKit budget": ("DistillKit\nbudget", (0, -23), "center"),
    "RS-KD, 50 draws": ("RS-KD, 50 draws", (7, -3), "left"),
    "EasyDistill": ("EasyDistill\nJSON, k = 10", (7, -6), "left"),
    "NeMo-Aligner": ("NeMo-Aligner\nJSON, k = 100", (0, 8), "center"),
}


def draw_size(results: dict[str, Any], file: Path) -> None:
    """Bytes per token against KL and against TV."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained")
        for axis, measure in zip(axes, ("kl", "tv"), strict=True):
            _size_panel(axis, results["fidelity"], measure)
        axes[0].set_title("KL to the teacher's whole distribution, nats", fontsize=10.5, loc="left")
        axes[1].set_title("Total variation from it", fontsize=10.5, loc="left")
        for bytes_per_token, kl in GOALS:
            axes[0].plot(
                bytes_per_token, kl, marker="+", color=INK, markersize=9, markeredgewidth=1.4
            )
        axes[0].annotate("+ goals", GOALS[0], (9, 4), textcoords="offset points", fontsize=9)
        _save(figure, file)


def _size_panel(axis: Axes, fidelity: dict[str, Any], measure: str) -> None:
    derived = [row for row in fidelity["derived"] if row["step"] == STEP]
    top_k = [row for row in fidelity["ours"] if row["step"] == STEP and row["heads"] == "fixed"]
    plain = [row for row in fidelity["peers"] if row["name"].startswith("Arrow")]
    _line(
        axis,
        derived,
        f"prior_{measure}",
        OURS,
        "o",
        "Logitcask,\nheads cut\nto a budget",
        (-9, -30),
        "right",
        2,
    )
    _line(axis, top_k, f"prior_{measure}", OURS_TOP, "o", "Logitcask, top k", (-2, -16), "right", 5)
    _line(
        axis,
        plain,
        f"even_{measure}",
        PLAIN,
        "s",
        "Arrow int32 + fp16,\ntop k, zstd",
        (10, 2),
        "left",
        1,
    )
    for row in fidelity["peers"]:
        if not row["whole"] and row[f"even_{measure}"] is not None:
            where = (row["bytes_per_token"], row[f"even_{measure}"])
            axis.plot(*where, color=PEER, marker="D", markersize=5)
            text, offset, side = _PEER_LABELS[row["name"]]
            axis.annotate(
                text,
                where,
                offset,
                textcoords="offset points",
                color=PEER,
                fontsize=8.5,
                ha=side,
                linespacing=1,
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_xlim(3.5, 5000)
    axis.set_xticks(BYTES, [f"{value:,}" for value in BYTES])
    axis.set_yticks(TICKS[measure], [f"{value:g}" for value in TICKS[measure]])
    axis.minorticks_off()
    axis.set_ylim(bottom=LOWEST[measure])
    axis.set_xlabel("bytes per token")


def _line(
    axis: Axes,
    rows: list[dict[str, Any]],
    key: str,
    colour: str,
    marker: str,
    label: str,
    offset: tuple[float, float],
    side: str,
    at: int,
) -> None:
    """A curve, named beside its point ``at``."""
    points = [(row["bytes_per_token"], row[key]) for row in rows]
    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.8)
    axis.annotate(
        label,
        points[at],
        offset,
        textcoords="offset points",
        color=colour,
        fontsize=9.5,
        ha=side,
        fontweight="bold",
        linespacing=1.05,
    )


def draw_speed(results: dict[str, Any], file: Path) -> None:
    """Tokens per second and core of every format, decoding and encoding."""
    formats = results["speed"]["formats"]
    names = sorted(formats, key=lambda name: formats[name]["decode_tokens_per_second"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2, figsize=(10.5, 0.29 * len(names) + 0.9), sharey=True, layout="constrained"
        )
        for axis, kind, title in zip(
            axes, ("decode", "encode"), ("Decoding", "Encoding"), strict=True
        ):
            values = [formats[name][f"{kind}_tokens_per_second"] / 1e6 for name in names]
            axis.barh(
                range(len(names)), values, color=[_colour(name) for name in names], height=0.68
            )
            for row, value in enumerate(values):
                axis.annotate(
                    f"{value:.2f}",
                    (value, row),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            axis.set_title(
                f"{title}, million tokens per second and core", fontsize=10.5, loc="left"
            )
            axis.set_xlim(0, 1.14 * max(values))
            axis.set_ylim(-0.6, len(names) - 0.4)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(names)), [_bar_name(name) for name in names])
        _save(figure, file)


def _colour(name: str) -> str:
    if name.startswith("Logitcask"):
        return OURS_TOP if "on disk" in name else OURS
    return PLAIN if name.startswith(("Arrow", "Parquet")) else PEER


def _bar_name(name: str) -> str:
    return name.replace(", on disk with hashes", ", disk + hashes") + (
        " *" if _colour(name) == PEER else ""
    )


def _save(figure: Any, file: Path) -> None:
    # Without a date the same results give the same file.
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
