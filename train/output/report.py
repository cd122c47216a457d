"""``report.html``: one self-contained page with the curves and examples of a run."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, Template, select_autoescape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from logitcask.cache_format.errors import UserError
from logitcask.train.output.metrics_file import RunMetrics, kind_of, of_teacher

METRICS = {
    "kl": ("KL to the teacher", "nats", "less is better"),
    "reverse_kl": ("Reverse KL", "nats", "less is better"),
    "ce": ("Cross-entropy on the text", "nats", "less is better"),
    "perplexity": ("Perplexity", "", "less is better"),
    "top1_agreement": ("Top-1 agreement", "%", "more is better"),
    "mor": ("Overlap of both top-{k} (MOR@{k})", "%", "more is better"),
    "cr": ("Identical top-{k} (CR@{k})", "%", "more is better"),
    "spearman": ("Rank correlation over both top-{k}", "", "more is better"),
    "ece": ("Calibration error (ECE)", "%", "less is better"),
}
"""Metric, without its @k -> (title, unit, which way is better)."""

_INK, _ACCENT, _SECOND, _THIRD, _QUIET = "#1f2933", "#0b6e99", "#c2571a", "#5b7f2b", "#9aa5b1"


def write_report(
    path: Path,
    metrics: RunMetrics,
    log: list[dict[str, float]],
    examples: list[dict[str, Any]],
    answers: list[dict[str, Any]],
) -> None:
    """Writes the page.

    metrics:  the content of metrics.json.
    log:      the Trainer's log history: training records have ``loss``, evaluations ``eval_kl`` and
              so on, all ``step``.
    examples: held-out positions as ``logitcask.train.evaluation.evaluate.examples`` gives them.
    answers:  as ``logitcask.train.evaluation.answers.answers`` gives them.
    """
    k = metrics["k"]
    page = _template().render(
        metrics=metrics,
        rows=[_row(name, k, metrics) for name in metrics["before"]],
        loss_chart=_loss_chart(log),
        held_out_chart=_held_out_chart(metrics, log),
        agreement_chart=_agreement_chart(metrics, log)
        if "top1_agreement" in metrics["before"]
        else "",
        examples=examples,
        answers=answers,
    )
    path.write_text(page, encoding="utf-8")


@functools.cache
def _template() -> Template:
    """The page's template, compiled once a process: a sweep writes many pages."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "jinja"]),
    )
    return environment.get_template("report.html.jinja")


def _row(name: str, k: int, metrics: RunMetrics) -> dict[str, str]:
    title, unit, better = METRICS[name.partition("@")[0]]
    before, after = metrics["before"][name], metrics["after"][name]
    teacher = of_teacher(metrics, name)
    return {
        "title": title.format(k=k),
        "before": _number(before, unit),
        "after": _number(after, unit),
        "teacher": "" if teacher is None else _number(teacher, unit),
        "better": better,
        "kind": kind_of(metrics, name),
        "improved": "yes" if (after < before) == better.startswith("less") else "no",
    }


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.3f} {unit}".strip() if value < 1e4 else f"{value:,.0f} {unit}".strip()


def _loss_chart(log: list[dict[str, float]]) -> str:
    records = [record for record in log if "loss" in record]
    figure, axes = _canvas("training loss", "step", "nats per position (weighted sum in black)")
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color=_INK, linewidth=2, label="total")
    parts = sorted({key for record in records for key in record if key.startswith("loss_")})
    for part, colour in zip(parts, (_ACCENT, _SECOND, _THIRD, _QUIET), strict=False):
        points = [(record["step"], record[part]) for record in records if part in record]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linewidth=1.3,
            label=part.removeprefix("loss_"),
        )
    if records:
        axes.legend(frameon=False)
    return _svg(figure)


def _held_out_chart(metrics: RunMetrics, log: list[dict[str, float]]) -> str:
    figure, axes = _canvas("held-out text", "step", "nats per position")
    kind = kind_of(metrics, "kl")
    for key, colour, label in (
        ("kl", _ACCENT, f"KL to the teacher{f' ({kind})' if kind else ''}"),
        ("ce", _SECOND, "cross-entropy on the text"),
    ):
        steps, values = _curve(key, metrics, log)
        axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    if (of_teacher := metrics["teacher"]["ce"]) is not None:
        axes.axhline(
            of_teacher,
            color=_QUIET,
            linestyle="--",
            linewidth=1.3,
            label="the teacher's cross-entropy",
        )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _agreement_chart(metrics: RunMetrics, log: list[dict[str, float]]) -> str:
    k = metrics["k"]
    figure, axes = _canvas("agreement with the teacher, held-out text", "step", "% of positions")
    for key, colour, label in (
        ("top1_agreement", _ACCENT, "top-1 agreement"),
        (f"mor@{k}", _SECOND, f"overlap of both top-{k} (MOR@{k})"),
        (f"cr@{k}", _THIRD, f"identical top-{k} (CR@{k})"),
    ):
        steps, values = _curve(key, metrics, log)
        axes.plot(
            steps,
            [100 * v for v in values],
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set_ylim(0, min(100, axes.get_ylim()[1] * 1.15))
    axes.legend(frameon=False)
    return _svg(figure)


def _curve(
    key: str, metrics: RunMetrics, log: list[dict[str, float]]
) -> tuple[list[float], list[float]]:
    """The values of a held-out metric from before the first step to after the last."""
    points = {0.0: metrics["before"][key]}
    points |= {record["step"]: record[f"eval_{key}"] for record in log if f"eval_{key}" in record}
    points[metrics["steps"]] = metrics["after"][key]
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _canvas(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an SVG element with real text, in the page's font and searchable."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logitcask"}):
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def rewrite_report(output: Path) -> Path:
    """Writes ``report.html`` of a finished run again. Raises UserError if there is no such run."""
    try:
        metrics, history, shown, answered = (
            json.loads((output / name).read_text(encoding="utf-8"))
            for name in ("metrics.json", "log.json", "examples.json", "answers.json")
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{output} holds no finished run (no {Path(error.filename).name}); train it first"
        ) from None
    write_report(output / "report.html", metrics, history, shown, answered)
    return output / "report.html"
