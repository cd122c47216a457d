"""``train-student evaluate``: the options, and the tables of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import UserError
from logitcask.train.evaluation.figures import Figure
from logitcask.train.exactness_words import IN_A_WORD

if TYPE_CHECKING:
    # Imports torch and transformers, which take seconds.
    from logitcask.train.evaluation.judge import Judgement


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model (folder or hub name), the folder of a run, a checkpoint, or adapters.",
        ),
    ],
    cache: Annotated[
        str, typer.Option("--cache", help="Folder or URL of the cache to evaluate on.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="Another model: its metrics, and the differences of both, paired by sequence.",
        ),
    ] = None,
    held_out_of: Annotated[
        str | None,
        typer.Option(
            "--held-out-of",
            metavar="RUN",
            help="Only the sequences that this run held out. Default: all.",
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option("--max-sequences", min=1, help="Only the first of them. Default: all."),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="k of MOR@k, CR@k, rank correlation.")] = 5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences in a batch.")
    ] = 8,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16, as runs with training.bf16 do.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="Resamples of the bootstrap.")
    ] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the JSON to FILE.")
    ] = None,
) -> None:
    """Evaluates a saved model on the sequences of a cache: the metrics of a run, their spread over
    sequences, and 95 % bootstrap intervals.
    """
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out is {out}, expected a file in a folder that exists")
    from logitcask.train.evaluation.judge import Settings, judge, to_json

    settings = Settings(held_out_of, max_sequences, k, batch_size, bf16, seed, resamples)
    found = judge(model, cache, baseline, settings)
    if out is not None:
        write_durably(out, to_json(found))
    print_result(found, tables(found), summary=False)


def tables(found: Judgement) -> str:
    """The result as text of at most 80 columns, apart from long paths."""
    held_out = f" that {found['held_out_of']} held out" if found["held_out_of"] else ""
    lines = [
        f"model      {found['model']}",
        f"cache      {found['cache']} (teacher {found['teacher']['model']})",
        f"data       {found['sequences']:,} sequences{held_out}, {found['positions']:,} positions",
        f"intervals  95 %, {found['resamples']:,} bootstrap resamples of sequences, seed {found['seed']}",
        "",
        *figure_table(found["metrics"], "mean"),
        _row("teacher's ce", [number(found["teacher"]["ce"])], ""),
    ]
    if "difference" in found:
        lines += [
            "",
            f"baseline   {found['baseline_model']}",
            "",
            *figure_table(found["baseline"], "mean"),
        ]
        lines += ["", "model minus baseline, paired by sequence", ""]
        lines += figure_table(found["difference"], "difference")
    return "\n".join(lines)


def figure_table(figures: dict[str, Figure], value: str) -> list[str]:
    """A line for each metric, after a header; ``value`` names the column of the means."""
    lines = [_row("metric", [value, "from", "to", "sd"], "exactness")]
    for name, each in figures.items():
        numbers = [number(each[key]) for key in ("mean", "low", "high", "deviation")]
        lines.append(_row(name, numbers, IN_A_WORD.get(each["exactness"], "")))
    return lines


def _row(name: str, numbers: list[str], kind: str) -> str:
    columns = " ".join(f"{number:>11}" for number in numbers)
    return f"{name:14} {columns}  {kind}".rstrip()


def number(value: float | None) -> str:
    """A metric for a column of 11 characters; a dash if there is none."""
    if value is None:
        return "-"
    shown = f"{value:,.4f}"
    return shown if len(shown) <= 11 else f"{value:.4g}"
