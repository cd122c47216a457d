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
    cache.
    """
    from logitcask.pipeline.builder.run import build as build_cache
    from logitcask.pipeline.config import BuildConfig

    settings = load_config(BuildConfig, config, overrides or [])
    result = build_cache(settings, restart=restart)
    document = {
        **facts(result.manifest, settings.output),
        "reused": result.reused,
        "tokens_scored": result.tokens_scored,
        "seconds": result.seconds,
    }
    print_result(document, _summary(result, settings.output))


def _summary(result: BuildResult, output: Path | str) -> str:
    if result.reused:
        totals = result.manifest.statistics
        return f"{output} is there already: reusing it ({totals.tokens:,} tokens, {totals.bytes:,} bytes)"
    page = describe(result.manifest, output)
    if not result.tokens_scored:
        return page
    speed = result.tokens_scored / result.seconds
    return f"{page}\n{'scored':15} {result.tokens_scored:,} tokens at {speed:,.0f} tokens/s"
