"""The page of a comparison: its curves, tables and intervals, from ``compare.html.jinja``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from logitcask.cache_format.export.token_text import printable
from logitcask.cache_format.pages.charts import (
    STYLES,
    Cloud,
    LineChart,
    Point,
    Points,
    Series,
    Span,
    Spans,
    nice_ticks,
    style_of_cloud,
)
from logitcask.cache_format.pages.page import render, write_page
from logitcask.train.comparison.compare import Compared, Comparison, value_text, verdict
from logitcask.train.comparison.runs import Run
from logitcask.train.evaluation.figures import Figure
from logitcask.train.exactness_words import IN_A_WORD
from logitcask.train.output.report import METRICS, column, curve, shown

_HERE = Path(__file__).parent

_POINTS = 400
"""Points of a curve at most, so that a page of long runs stays small."""
_COSTS: list[tuple[str, str, Callable[[Compared], str]]] = [
    ("Training", "seconds", lambda each: f"{each['seconds']:,.1f} s"),
    ("Steps", "", lambda each: f"{each['steps']:,}"),
    ("Cache", "bytes per token", lambda each: f"{each['bytes_per_token']:,.1f}"),
    ("Cache", "bytes in all", lambda each: f"{each['bytes']:,}"),
    ("Student", "parameters", lambda each: f"{each['parameters']:,}"),
]
_COST_AXES: list[tuple[str, str, Callable[[Compared], float]]] = [
    ("bytes", "bytes per token of the cache", lambda each: each["bytes_per_token"]),
    ("training time", "seconds of training", lambda each: each["seconds"]),
]
"""Cost in a title, its axis, its value."""
_Numbered = tuple[int, Run]
_CURVES = ("kl", "ce", "top1_agreement", "mor", "ece")


def write_comparison(out: Path, runs: Sequence[Run], found: Comparison) -> int:
    """Writes the page to ``out``; returns its bytes. ``found``: the comparison of ``runs``."""
    charted = [*enumerate(runs)][:STYLES]
    groups = [
        [
            (run, each)
            for run, each in zip(runs, found["runs"], strict=True)
            if each["judged_on"] == number
        ]
        for number in range(len(found["judged_on"]))
    ]
    page = render(
        _HERE,
        "compare.html.jinja",
        styles=[_HERE / "compare.css"],
        found=found,
        groups=[
            {
                "judged_on": words,
                "runs": [each["run"] for _, each in group],
                "rows": _rows([each for _, each in group]),
                "charts": _held_out_charts(
                    [each for each in charted if any(each[1] is run for run, _ in group)],
                    f" (text {number})" if number > 1 else "",
                ),
                "costs": _cost_charts(
                    [
                        (n, each)
                        for n, each in enumerate(found["runs"][:STYLES])
                        if each["judged_on"] == number - 1
                    ],
                    f" (text {number})" if number > 1 else "",
                ),
            }
            for number, (words, group) in enumerate(zip(found["judged_on"], groups, strict=True), 1)
        ],
        differences=_differences(groups[0]),
        training=_training_charts(charted),
        seeds=[_seed_row(each) for each in found["seeds"]],
        config={name: _by_value(values, found["runs"]) for name, values in found["config"].items()},
        charted=STYLES,
        metrics=[run.metrics for run in runs],
    )
    return write_page(out, page)


def metric_title(name: str) -> str:
    """The title of a metric, with its @k."""
    metric, _, k = name.partition("@")
    return METRICS[metric][0].format(k=k)


def signed(value: float, unit: str) -> str:
    """A difference with its sign: nats with four decimals, shares in percentage points."""
    if unit == "%":
        return f"{100 * value:+.2f} points"
    return f"{value:+,.4f} {unit}".rstrip()


def _rows(group: list[Compared]) -> list[dict[str, Any]]:
    """A row for each metric and cost, with a cell for each run of ``group``."""
    rows = []
    for name in dict.fromkeys(name for each in group for name in each["metrics"]):
        _, unit, better = METRICS[name.partition("@")[0]]
        kind = next(each["metrics"][name]["exactness"] for each in group if name in each["metrics"])
        note = "; ".join(filter(None, [IN_A_WORD.get(kind, ""), better]))
        cells = [_cell(each["metrics"].get(name), unit, name in each["best"]) for each in group]
        rows.append({"title": metric_title(name), "note": note, "cells": cells})
    for title, note, text in _COSTS:
        cells = [{"value": text(each), "interval": "", "best": False} for each in group]
        rows.append({"title": title, "note": note, "cells": cells})
    return rows


def _cell(figure: Figure | None, unit: str, best: bool) -> dict[str, Any]:
    value = "" if figure is None else shown(figure["mean"], unit)
    return {"value": value, "interval": _interval(figure, unit), "best": best}


def _interval(figure: Figure | None, unit: str) -> str:
    """An interval without the words of its unit; empty if there is none."""
    if figure is None or figure["low"] is None or figure["high"] is None:
        return ""
    plain = "%" if unit == "%" else ""
    return f"{shown(figure['low'], plain)} to {shown(figure['high'], plain)}"


def _differences(group: list[tuple[Run, Compared]]) -> list[Spans]:
    others = [each for _, each in group if each["difference"] is not None]
    names = dict.fromkeys(name for each in others for name in each["difference"] or {})
    return [
        Spans(
            metric_title(name),
            _difference_label(name, others),
            [_span(name, each) for each in others if name in (each["difference"] or {})],
        )
        for name in names
    ]


def _difference_label(name: str, others: list[Compared]) -> str:
    _, unit, better = METRICS[name.partition("@")[0]]
    kinds = [
        each["difference"][name]["exactness"]
        for each in others
        if each["difference"] is not None and name in each["difference"]
    ]
    words = [
        "percentage points" if unit == "%" else unit,
        IN_A_WORD.get(kinds[0], ""),
        better,
    ]
    return "; ".join(filter(None, words))


def _span(name: str, run: Compared) -> Span:
    assert run["difference"] is not None
    unit, figure = METRICS[name.partition("@")[0]][1], run["difference"][name]
    low, high = figure["low"], figure["high"]
    words = verdict(name, figure)
    if low is not None and high is not None:
        scale, digits = (100, 2) if unit == "%" else (1, 4)
        words = f"{scale * low:+,.{digits}f} to {scale * high:+,.{digits}f}: {words}"
    return Span(
        printable(run["run"]), figure["mean"], low, high, signed(figure["mean"], unit), words
    )


def _held_out_charts(runs: list[_Numbered], text: str) -> list[LineChart]:
    """The held-out metrics of runs that were judged on one text, over each other. ``text``: the end
    of the titles, which tells texts apart.
    """
    charts = []
    for metric in _CURVES:
        names = [
            next((n for n in run.metrics["after"] if n.partition("@")[0] == metric), None)
            for _, run in runs
        ]
        series = [
            _line(run, *curve(name, run[1].metrics, run[1].log))
            for run, name in zip(runs, names, strict=True)
            if name is not None
        ]
        if series:
            title = " / ".join(dict.fromkeys(metric_title(name) for name in names if name))
            unit = METRICS[metric][1]
            share = unit == "%"
            label = "share of positions" if share and metric != "ece" else unit
            charts.append(
                LineChart(
                    title + text, "step", label, series, unit="%" if share else "", zero=share
                )
            )
    by_seconds = [_line(run, *_kl_by_seconds(run[1])) for run in runs]
    charts.append(
        LineChart(
            f"KL to the teacher against time{text}",
            "seconds of training",
            "nats",
            by_seconds,
            zero=False,
            note="Evaluations at steps whose time was logged.",
        )
    )
    return charts


def _kl_by_seconds(run: Run) -> tuple[list[float], list[float]]:
    """Held-out KL at the evaluations of a run whose time is known: those at steps with a training
    record, the one before training, and the last.
    """
    times = {r["step"]: r["seconds"] for r in run.log if "seconds" in r}
    times |= {0: 0.0, run.metrics["steps"]: run.metrics["seconds"]}
    found = [
        (times[step], value)
        for step, value in zip(*curve("kl", run.metrics, run.log), strict=True)
        if step in times
    ]
    return [x for x, _ in found], [y for _, y in found]


def _cost_charts(runs: Sequence[tuple[int, Compared]], text: str) -> list[Points]:
    """Quality beside what it costs: KL and cross-entropy after training against the cache's bytes per
    token and the seconds of training. A cost that all runs share, nearly, has no chart.
    """
    charts = []
    for cost, axis, of in _COST_AXES:
        values = [of(each) for _, each in runs]
        if len(values) < 2 or max(values) <= 1.01 * min(values):
            continue
        for name in ("kl", "ce"):
            clouds = [
                Cloud(label, [point], *style_of_cloud(number))
                for number, run in runs
                if name in run["metrics"]
                for label, figure in [(printable(run["run"]), run["metrics"][name])]
                for point in [Point(label, of(run), figure["mean"], figure["low"], figure["high"])]
            ]
            charts.append(
                Points(
                    f"{metric_title(name)} against {cost}{text}",
                    axis,
                    "nats",
                    clouds,
                    ticks=nice_ticks(0, max(values)),
                    zero=False,
                    x_name="run",
                    note="With the 95 % interval over held-out sequences.",
                )
            )
    return charts


def _training_charts(runs: Sequence[_Numbered]) -> list[LineChart]:
    """Losses that two or more runs have, without their weights, and the runs' schedules."""
    names = dict.fromkeys(
        name for _, run in runs for record in run.log for name in record if name.startswith("loss_")
    )
    note = ""
    if len({run.metrics["cache"]["fingerprint"] for _, run in runs}) > 1:
        note = "From different caches: values of one loss with different stores are different quantities."
    found = [
        _logged(
            f"Training loss: {printable(name.removeprefix('loss_'))}",
            "nats per position",
            name,
            runs,
            note,
        )
        for name in names
    ]
    found = [chart for chart in found if len(chart.series) > 1]
    schedule = [
        _logged("Learning rate", "", "learning_rate", runs),
        _logged("Gradient norm", "before clipping", "grad_norm", runs),
    ]
    return [*found, *(chart for chart in schedule if chart.series)]


def _logged(
    title: str, unit: str, name: str, runs: Sequence[_Numbered], note: str = ""
) -> LineChart:
    series = [_line(run, *column(name, run[1].log)) for run in runs]
    return LineChart(title, "step", unit, [each for each in series if each.x], note=note)


def _line(run: _Numbered, x: list[float], y: list[float]) -> Series:
    """A run's curve: the first point, every n-th so that there are at most ``_POINTS``, and the last.
    A run has one style in all charts.
    """
    number, label = run[0], printable(run[1].label)
    stride = -(-len(x) // _POINTS)
    if stride < 2:
        return Series(label, x, y, number)
    at = [*range(0, len(x) - 1, stride), len(x) - 1]
    return Series(label, [x[i] for i in at], [y[i] for i in at], number)


def _by_value(values: list[Any], runs: list[Compared]) -> list[tuple[str, list[str]]]:
    """Each value of a field, and the runs that have it."""
    found: dict[str, list[str]] = {}
    for value, run in zip(values, runs, strict=True):
        found.setdefault(value_text(value), []).append(run["run"])
    return [*found.items()]


def _seed_row(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "runs": group["runs"],
        "figures": [
            {
                "title": metric_title(name),
                "mean": shown(figure["mean"], METRICS[name.partition("@")[0]][1]),
                "deviation": shown(figure["deviation"], METRICS[name.partition("@")[0]][1]),
            }
            for name, figure in group["after"].items()
        ],
    }
