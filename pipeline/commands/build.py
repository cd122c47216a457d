"""``teacher-cache build``: builds the cache that a config describes, or reuses a finished one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logitcask.cache_format.catalog.home import home
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.describe import describe, facts

if TYPE_CHECKING:
    from logitcask.pipeline.builder.run import BuildResult


def build(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="YAML file of the build, e.g. pipeline/configs/quickstart.yaml."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]", help="Override fields of CONFIG, e.g. store.top_k=8."
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Remove the build or cache in the output and start again."),
    ] = False,
    no_reuse: Annotated[
        bool,
        typer.Option(
            "--no-reuse",
            help="Score everything, even if caches of the catalogue hold it (docs/catalog.md).",
        ),
    ] = False,
) -> None:
    """Builds the cache that CONFIG describes. Resumes an interrupted build, and reuses a finished
    cache, also one elsewhere on this machine or at a remote that holds the same or more. Rows that are left out or cut are named in OUTPUT.rejects.jsonl.
    """
    from logitcask.pipeline.builder.run import build as build_cache
    from logitcask.pipeline.config import BuildConfig
    from logitcask.pipeline.text.rejects import summary

    settings = load_config(BuildConfig, config, overrides or [])
    result = build_cache(settings, restart=restart, home=home(), reuse_known=not no_reuse)
    document = {
        **facts(result.manifest, settings.output),
        "reused": result.reused,
        "tokens_scored": result.tokens_scored,
        "seconds": result.seconds,
        "writing_seconds": result.writing_seconds,
        "taken": None if result.taken is None else asdict(result.taken),
    }
    rejects, here = settings.rejects_file(), Path.cwd()
    if rejects.is_relative_to(here):
        rejects = rejects.relative_to(here)
    rejected = summary(result.manifest.data.counters, rejects)
    print_result(document, _summary(result, settings.output, rejected))


def _summary(result: BuildResult, output: Path | str, rejected: str | None) -> str:
    totals, taken = result.manifest.statistics, result.taken
    if taken is not None and taken.how == "same":
        return (
            f"{output}: the same cache was at {taken.where[0]}: reusing it "
            f"({totals.tokens:,} tokens, {totals.bytes:,} bytes)"
        )
    if result.reused and taken is None:
        return f"{output} is there already: reusing it ({totals.tokens:,} tokens, {totals.bytes:,} bytes)"
    lines = [describe(result.manifest, output)]
    if rejected:
        lines.append(f"{'rejects':15} {rejected}")
    if taken is not None and taken.how == "derived":
        lines.append(f"{'reused':15} derived from {taken.where[0]}, without the teacher")
    if taken is not None and taken.how == "part":
        lines.append(
            f"{'reused':15} {taken.sequences:,} of {totals.sequences:,} sequences, from {' and '.join(taken.where)}"
        )
    if result.tokens_scored:
        speed = result.tokens_scored / result.seconds
        lines.append(f"{'scored':15} {result.tokens_scored:,} tokens at {speed:,.0f} tokens/s")
    return "\n".join(lines)
