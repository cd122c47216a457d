"""``report.html``: one self-contained page with the curves and examples of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.pages.charts import LineChart, Series
from logitcask.cache_format.pages.page import render, write_page
from logitcask.train.evaluation.figures import Bootstrap, Figure, figures_of
from logitcask.train.output.held_out_charts import held_out_charts
from logitcask.train.output.held_out_file import HeldOutValues, by_sequence_of, read_held_out
from logitcask.train.output.metrics_file import RunMetrics, kind_of, of_teacher

Log = list[dict[str, float]]

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

_HERE = Path(__file__).parent


class Running(NamedTuple):
    """A run that is going on. step: of its newest evaluation, of all ``steps``. written: the time,
    in UTC.
    """

    step: int
    steps: int
    written: str


def write_report(
    path: Path,
    metrics: RunMetrics,
    log: Log,
    examples: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    held_out: HeldOutValues | None = None,
    running: Running | None = None,
) -> None:
    """Writes the page. An existing one is replaced once the new one is complete.

    metrics:  the content of metrics.json.
    log:      the Trainer's log history: training records have ``loss``, evaluations ``eval_kl`` and
              so on, all ``step``.
    examples: held-out positions as ``logitcask.train.evaluation.evaluate.examples`` gives them.
    answers:  as ``logitcask.train.evaluation.answers.answers`` gives them.
    held_out: the content of held_out.json; runs of older versions have none.
    running:  of a run that is not finished: ``metrics`` are then of its newest evaluation.
    """
    k = metrics["k"]
    spread: dict[str, Figure] = {}
    if held_out is not None and "kinds" in metrics:
        spread = figures_of(by_sequence_of(held_out), metrics["kinds"], Bootstrap())
    page = render(
        _HERE,
        "report.html.jinja",
        styles=[_HERE / "report.css"],
        scripts=[] if running is None else [_HERE / "watch.js"],
        metrics=metrics,
        running=running,
        rows=[_row(name, k, metrics) | _spread(name, spread) for name in metrics["before"]],
        held_out_charts=[] if held_out is None else held_out_charts(held_out, k),
        charts=[
            chart
            for chart in (
                _held_out(metrics, log),
                _agreement(metrics, log),
                _losses(log),
                _logged("Learning rate", "", "learning_rate", log),
                _logged("Gradient norm", "before clipping", "grad_norm", log),
                _speed(log),
            )
            if any(each.x for each in chart.series)
        ],
        examples=examples,
        answers=answers,
    )
    write_page(path, page, replace=True)


def _row(name: str, k: int, metrics: RunMetrics) -> dict[str, str]:
    title, unit, better = METRICS[name.partition("@")[0]]
    before, after = metrics["before"][name], metrics["after"][name]
    teacher = of_teacher(metrics, name)
    return {
        "title": title.format(k=k),
        "before": shown(before, unit),
        "after": shown(after, unit),
        "teacher": "" if teacher is None else shown(teacher, unit),
        "better": better,
        "kind": kind_of(metrics, name),
        "improved": _improved(before, after, less=better.startswith("less")),
    }


def _spread(name: str, figures: dict[str, Figure]) -> dict[str, str]:
    """The interval and the deviation of a metric after training; empty where there is none."""
    found, unit = figures.get(name), METRICS[name.partition("@")[0]][1]
    if found is None or found["low"] is None or found["high"] is None:
        return {"interval": "", "deviation": ""}
    plain = "%" if unit == "%" else ""
    deviation = found["deviation"]
    return {
        "interval": f"{shown(found['low'], plain)} to {shown(found['high'], plain)}",
        "deviation": "" if deviation is None else shown(deviation, plain),
    }


def _improved(before: float, after: float, *, less: bool) -> str:
    if after == before:
        return "unchanged"
    return "better" if (after < before) == less else "worse"


def shown(value: float, unit: str) -> str:
    """A metric with its unit: nats with three decimals, shares in percent."""
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.3f} {unit}".strip() if value < 1e4 else f"{value:,.0f} {unit}".strip()


def _held_out(metrics: RunMetrics, log: Log) -> LineChart:
    kind = kind_of(metrics, "kl")
    teacher = metrics["teacher"]["ce"]
    series = [
        Series(f"KL to the teacher{f' ({kind})' if kind else ''}", *curve("kl", metrics, log)),
        Series("cross-entropy on the text", *curve("ce", metrics, log)),
    ]
    if teacher is not None:
        steps = [0.0, float(metrics["steps"])]
        series.append(Series("the teacher's cross-entropy", steps, [float(teacher)] * 2))
    return LineChart("Held-out text", "step", "nats per position", series)


def _agreement(metrics: RunMetrics, log: Log) -> LineChart:
    k = metrics["k"]
    labels = {
        "top1_agreement": "top-1 agreement",
        f"mor@{k}": f"overlap of both top-{k} (MOR@{k})",
        f"cr@{k}": f"identical top-{k} (CR@{k})",
    }
    return LineChart(
        "Agreement with the teacher, held-out text",
        "step",
        "share of positions",
        [
            Series(label, *curve(name, metrics, log))
            for name, label in labels.items()
            if name in metrics["before"]
        ],
        unit="%",
    )


def _losses(log: Log) -> LineChart:
    """The weighted sum of all losses, and each of them without its weight."""
    parts = sorted({name for record in log for name in record if name.startswith("loss_")})
    labels = {"loss": "weighted sum"} | {name: name.removeprefix("loss_") for name in parts}
    series = [Series(label, *column(name, log)) for name, label in labels.items()]
    return LineChart("Training losses", "step", "nats per position", series)


def _logged(title: str, unit: str, name: str, log: Log) -> LineChart:
    return LineChart(title, "step", unit, [Series(title.lower(), *column(name, log))])


def _speed(log: Log) -> LineChart:
    """Kept positions per second between two records. Both are logged as sums over the run."""
    records = [record for record in log if {"positions", "seconds"} <= record.keys()]
    steps, speeds, before = [], [], {"positions": 0.0, "seconds": 0.0}
    for record in records:
        seconds = record["seconds"] - before["seconds"]
        if seconds > 0:
            steps.append(record["step"])
            speeds.append((record["positions"] - before["positions"]) / seconds)
        before = record
    return LineChart("Speed", "step", "kept positions per second", [Series("speed", steps, speeds)])


def column(name: str, log: Log) -> tuple[list[float], list[float]]:
    """Steps and values of a name in the training records; a value that is not a number is a gap."""
    records = [record for record in log if name in record and "loss" in record]
    return [record["step"] for record in records], [_number(record[name]) for record in records]


def curve(key: str, metrics: RunMetrics, log: Log) -> tuple[list[float], list[float]]:
    """The values of a held-out metric from before the first step to after the last."""
    points = {record["step"]: record[f"eval_{key}"] for record in log if f"eval_{key}" in record}
    points[metrics.get("first_step", 0)] = metrics["before"][key]
    points[metrics["steps"]] = metrics["after"][key]
    steps = sorted(points)
    return steps, [_number(points[step]) for step in steps]


def _number(value: float | None) -> float:
    """A value of the log, where null stands for what is not finite."""
    return math.nan if value is None else float(value)


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
    held_out = read_held_out(output)
    write_report(output / "report.html", metrics, history, shown, answered, held_out)
    return output / "report.html"
