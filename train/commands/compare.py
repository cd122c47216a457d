"""``train-student compare``: the options, and the tables of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.export.token_text import printable
from logitcask.cache_format.pages.page import refuse_foreign
from logitcask.train.commands.evaluate import figure_table, number
from logitcask.train.comparison.compare import Compared, Comparison, compare, value_text
from logitcask.train.comparison.runs import chosen_base, read_runs
from logitcask.train.evaluation.figures import Bootstrap
from logitcask.train.exactness_words import IN_A_WORD

_COLUMNS = 4
"""Runs beside each other, so that a table has 80 columns."""
_COSTS = ("steps", "seconds", "parameters", "bytes_per_token", "bytes")


def compare_runs(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN ...",
            help="Folders of finished runs; a folder of runs, such as that of a sweep, stands for "
            "all of them.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="Also write a page: curves, metrics, differences, configs.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="RUN", help="The run to take differences from. Default: the first."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="Resamples of the bootstrap.")
    ] = 1000,
) -> None:
    """Compares finished runs: metrics with the best of each, differences from a base with 95 %
    bootstrap intervals paired by held-out sequence, costs and configs. Runs that were not judged on
    the same text are told apart and not compared.
    """
    if out is not None:
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out is {out}, expected a file in a folder that exists")
        refuse_foreign(out)
    read = read_runs(runs)
    found = compare(read, chosen_base(base, read), Bootstrap(seed, resamples))
    text = tables(found)
    if out is not None:
        from logitcask.train.comparison.page import write_comparison

        write_comparison(out, read, found)
        text = f"{text}\n\npage: {out}"
    print_result({**found, "page": out}, text, summary=False)


def tables(found: Comparison) -> str:
    """The result as text of at most 80 columns, apart from long paths and notes."""
    runs = [*enumerate(found["runs"], 1)]
    lines = [
        f"run {at:<3} {printable(run['run'])}{' (base)' if run['run'] == found['base'] else ''}"
        for at, run in runs
    ]
    lines += ["", *(f"note: {printable(note)}" for note in found["notes"])]
    for group, words in enumerate(found["judged_on"]):
        mine = [(at, run) for at, run in runs if run["judged_on"] == group]
        lines += [""] * bool(lines[-1]) + [f"judged on {printable(words)}"]
        for start in range(0, len(mine), _COLUMNS):
            lines += ["", *_metrics(mine[start : start + _COLUMNS])]
    base = next(at for at, run in runs if run["run"] == found["base"])
    for at, run in runs:
        if run["difference"] is not None:
            paired = any(each["low"] is not None for each in run["difference"].values())
            how = f", paired by sequence, {found['resamples']:,} resamples" if paired else ""
            lines += ["", f"run {at} minus run {base}{how}", ""]
            lines += figure_table(run["difference"], "difference")
    if found["seeds"]:
        lines += ["", "over seeds: mean and standard deviation"]
    for each in found["seeds"]:
        lines.append(f"  of {', '.join(map(printable, each['runs']))}")
        lines += [
            f"  {name:14} {number(figure['mean']):>11} ± {number(figure['deviation'])}"
            for name, figure in each["after"].items()
        ]
    return "\n".join([*lines, "", *_config(found)]).rstrip()


def _metrics(runs: list[tuple[int, Compared]]) -> list[str]:
    """Rows of metrics and costs, a column for each run; a star marks the best."""
    kinds = {name: each["exactness"] for _, run in runs for name, each in run["metrics"].items()}
    lines = [_row("metric", [f"run {at}" for at, _ in runs], "exactness (* best)")]
    for name, kind in kinds.items():
        values = [
            number(run["metrics"][name]["mean"]) + "*" * (name in run["best"])
            if name in run["metrics"]
            else "-"
            for _, run in runs
        ]
        lines.append(_row(name, values, IN_A_WORD.get(kind, "")))
    for name in _COSTS:
        values = [_cost(run[name]) for _, run in runs]  # type: ignore[literal-required]
        lines.append(_row(name.replace("_", " "), values, ""))
    return lines


def _row(name: str, values: list[str], kind: str) -> str:
    # A star stands beside its number, so that the digits of a column are below each other.
    cells = " ".join(f"{value:>11}" if value.endswith("*") else f"{value:>10} " for value in values)
    return f"{name:15} {cells}  {kind}".rstrip()


def _cost(value: float) -> str:
    if value >= 1e9:
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _config(found: Comparison) -> list[str]:
    """The fields in which the configs differ: each value, and the runs that have it."""
    if not found["config"]:
        return ["the configs are equal"]
    lines = ["configs differ in"]
    for name, values in found["config"].items():
        lines.append(f"  {printable(name)}")
        runs_of: dict[str, list[str]] = {}
        for at, value in enumerate(values, 1):
            runs_of.setdefault(value_text(value), []).append(str(at))
        lines += [
            f"    {printable(value)}  (run {', '.join(runs)})" for value, runs in runs_of.items()
        ]
    return lines
