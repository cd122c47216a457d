"""``teacher-cache build``: builds the cache that a config describes, or reuses a finished one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
) -> None:
    """Builds the cache that CONFIG describes. Resumes an interrupted build, and reuses a finished
    cache. Rows that are left out or cut are named in OUTPUT.rejects.jsonl.
    """
    from logitcask.pipeline.builder.run import build as build_cache
    from logitcask.pipeline.config import BuildConfig
    from logitcask.pipeline.text.rejects import summary

    settings = load_config(BuildConfig, config, overrides or [])
    result = build_cache(settings, restart=restart)
    document = {
        **facts(result.manifest, settings.output),
        "reused": result.reused,
        "tokens_scored": result.tokens_scored,
        "seconds": result.seconds,
        "writing_seconds": result.writing_seconds,
    }
    rejects, here = settings.rejects_file(), Path.cwd()
    if rejects.is_relative_to(here):
        rejects = rejects.relative_to(here)
    rejected = summary(result.manifest.data.counters, rejects)
    print_result(document, _summary(result, settings.output, rejected))


def _summary(result: BuildResult, output: Path | str, rejected: str | None) -> str:
    if result.reused:
        totals = result.manifest.statistics
        return f"{output} is there already: reusing it ({totals.tokens:,} tokens, {totals.bytes:,} bytes)"
    lines = [describe(result.manifest, output)]
    if rejected:
        lines.append(f"{'rejects':15} {rejected}")
    if result.tokens_scored:
        speed = result.tokens_scored / result.seconds
        lines.append(f"{'scored':15} {result.tokens_scored:,} tokens at {speed:,.0f} tokens/s")
    return "\n".join(lines)
