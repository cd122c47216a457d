"""``teacher-cache inspect`` and ``generations``: a cache as readable text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.result import as_json, print_result


def inspect(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    sequence: Annotated[
        int, typer.Option("--sequence", "-s", help="Index of the sequence. -1 is the last one.")
    ] = 0,
    top: Annotated[
        int, typer.Option("--top", min=1, help="Number of head entries to show for each token.")
    ] = 5,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="The tokenizer, as a folder, a hub name or the teacher's MODULE:CLASS, if the one "
            "in the manifest cannot be loaded.",
        ),
    ] = None,
) -> None:
    """Shows one sequence token by token, with the teacher's predictions at each."""
    from rich.console import Console

    from logitcask.cache_format import CacheReader, UserError
    from logitcask.pipeline.commands.sequence_table import document, table, token_text

    reader = CacheReader(cache)
    if not -len(reader) <= sequence < len(reader):
        raise UserError(f"{cache} has sequences 0 to {len(reader) - 1}; there is no {sequence}")
    text = token_text(reader, tokenizer)
    if as_json():
        print_result(document(reader[sequence], text, top), "")
    else:
        console = Console()
        console.print(table(reader[sequence], text, top, console.width))


def generations(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: standard output.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="The tokenizer, as a folder, a hub name or the teacher's MODULE:CLASS, if the one "
            "in the manifest cannot be loaded.",
        ),
    ] = None,
) -> None:
    """Exports the answers that the teacher wrote (data.generate) as JSON lines: id, prompt,
    answer, tokens, finish. With --json they are one list, or with --out their number.
    """
    from logitcask.cache_format import CacheReader
    from logitcask.pipeline.commands.json_lines import write_lines
    from logitcask.pipeline.commands.sequence_table import generations as answers

    write_lines(answers(CacheReader(cache), tokenizer), out, "answers")
