"""``teacher-cache``: build caches, and look at them. The commands that need only a cache come from ``logitcask.cache_format.cli.cache_commands``."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli import cache_commands
from logitcask.cache_format.cli import share_commands as share_cli
from logitcask.cache_format.cli.app import new_app, run
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.describe import describe
from logitcask.pipeline.commands import audit as audit_cli
from logitcask.pipeline.commands import estimate as estimate_cli
from logitcask.pipeline.memory import use_huge_pages

app = new_app("Runs a teacher LLM once over a data set and keeps its next-token distributions in a cache.")
app.command()(cache_commands.info)
app.command()(cache_commands.verify)
app.command()(cache_commands.derive)
app.command()(cache_commands.merge)
app.command()(audit_cli.audit)
app.command()(estimate_cli.estimate)
app.command()(share_cli.push)
app.command()(share_cli.pull)


@app.command()
def build(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. pipeline/configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override fields, e.g. store.top_k=8.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what the output holds and begin afresh.")] = False,
) -> None:
    """Builds the cache that CONFIG describes; goes on where an interrupted build stopped; reuses a finished one."""
    from logitcask.pipeline.builder.run import build as build_cache
    from logitcask.pipeline.config import BuildConfig

    settings = load_config(BuildConfig, config, overrides or [])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops a job in a cluster is Ctrl-C, too
    result = build_cache(settings, restart=restart)
    if result.reused:
        totals = result.manifest.statistics
        print(f"{settings.output} is there already: reusing it ({totals.tokens:,} tokens, {totals.bytes:,} bytes)")
        return
    print(describe(result.manifest, settings.output))
    if result.tokens_scored:
        print(f"{'scored':15} {result.tokens_scored:,} tokens at {result.tokens_scored / result.seconds:,.0f} tokens/s")


@app.command()
def inspect(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    sequence: Annotated[
        int, typer.Option("--sequence", "-s", help="Which sequence, by its index; -1 is the last.")
    ] = 0,
    top: Annotated[int, typer.Option("--top", min=1, help="How many entries of each head to show.")] = 5,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or hub name, where the manifest's is not to be had.")
    ] = None,
) -> None:
    """Shows one sequence token by token, with what the teacher expected at each."""
    from rich.console import Console

    from logitcask.cache_format import CacheReader, UserError
    from logitcask.pipeline.commands.sequence_table import table, token_text

    reader = CacheReader(cache)
    if not -len(reader) <= sequence < len(reader):
        raise UserError(f"{cache} has sequences 0 to {len(reader) - 1}; there is no {sequence}")
    Console().print(table(reader[sequence], token_text(reader, tokenizer), top))


@app.command()
def generations(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; standard output otherwise.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or hub name, where the manifest's is not to be had.")
    ] = None,
) -> None:
    """Exports what the teacher wrote (data.generate) as JSON lines: id, prompt, answer, tokens, finish."""
    import json
    import sys

    from logitcask.cache_format import CacheReader
    from logitcask.cache_format.durable import writing_to
    from logitcask.pipeline.commands.sequence_table import generations as answers

    rows = answers(CacheReader(cache), tokenizer)
    with (
        writing_to(out or Path("standard output")),
        out.open("w", encoding="utf-8") if out else nullcontext(sys.stdout) as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@app.command()
def model(name: Annotated[str, typer.Argument(help="A built-in model, such as smollm2-135m.")]) -> None:
    """Fetches a built-in model into the local models folder and says where it is."""
    from logitcask.pipeline.teachers.model import prepare_model

    print(prepare_model(name, None))


def main() -> None:
    """Entry point of the console script."""
    use_huge_pages()
    run(app, extra="teacher")
