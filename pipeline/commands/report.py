"""``teacher-cache report``: a cache as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def report(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    out: Annotated[
        Path, typer.Option("--out", help="The HTML file. A report that is there is replaced.")
    ],
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=0, help="Tokens in the token view at most. 0 leaves it out."),
    ] = 200_000,
    sequences: Annotated[
        str | None,
        typer.Option(
            "--sequences",
            help="Sequences of the token view, by index: START:STOP or START:STOP:STEP. Default: a "
            "random sample if they have more than --tokens tokens.",
        ),
    ] = None,
    sample: Annotated[
        int,
        typer.Option(
            "--sample",
            min=1,
            help="Tokens that the figures are computed from at most. A larger cache is sampled.",
        ),
    ] = 5_000_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the samples.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="The tokenizer, as a folder, a hub name or the teacher's MODULE:CLASS, if the one "
            "in the manifest cannot be loaded.",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="RUN",
            help="Show a student beside the teacher in the token view: the folder of a run, a model, a "
            "checkpoint or adapters, which `train-student read` then reads; or a file that it has written.",
        ),
    ] = None,
) -> None:
    """Writes a report on a cache: one HTML file that opens without a network, with the text coloured
    by the teacher's surprise, the distribution at each token, and figures of the whole cache.
    """
    from logitcask.cache_format import CacheReader
    from logitcask.cache_format.cli.result import print_result
    from logitcask.cache_format.derive.derive import parse_slice
    from logitcask.cache_format.errors import ConfigError
    from logitcask.cache_format.pages.page import refuse_foreign
    from logitcask.cache_format.runtime.progress import ProgressBar
    from logitcask.pipeline.commands.sequence_table import tokenizer_if_here
    from logitcask.pipeline.report.student import Student
    from logitcask.pipeline.report.write import ReportOptions, write_report

    refuse_foreign(out)
    reader = CacheReader(cache)
    try:
        chosen: Sequence[int] | None = (
            None if sequences is None else range(len(reader))[parse_slice(sequences)]
        )
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    beside = None if student is None else Student(student, reader)
    if beside is not None and chosen is None:
        chosen = beside.indices  # of a file: those that it has
    options = ReportOptions(sample=sample, tokens=tokens, sequences=chosen, seed=seed)
    found = tokenizer_if_here(reader, tokenizer, "showing ids")
    total = min(sample, reader.manifest.statistics.tokens)
    with ProgressBar(total=total, unit="tok", unit_scale=True, desc="report", leave=False) as bar:
        written = write_report(reader, out, options, found, on_tokens=bar.update, student=beside)
    print_result(
        {
            "file": out,
            "bytes": written.bytes,
            "sequences": written.sequences,
            "tokens": written.tokens,
            "view_sequences": written.view_sequences,
            "view_tokens": written.view_tokens,
        },
        f"{out}: figures of {written.tokens:,} tokens in {written.sequences:,} sequences, "
        f"token view of {written.view_tokens:,}, {written.bytes:,} bytes",
    )
