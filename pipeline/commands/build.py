"""``teacher-cache build``: builds the cache that a config describes, or reuses a finished one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.describe import describe


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
    # Clusters stop jobs with this signal, so it is treated like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = build_cache(settings, restart=restart)
    if result.reused:
        totals = result.manifest.statistics
        print(
            f"{settings.output} is there already: reusing it ({totals.tokens:,} tokens, {totals.bytes:,} bytes)"
        )
        return
    print(describe(result.manifest, settings.output))
    if rejected := summary(result.manifest.data.counters, settings.rejects_file()):
        print(f"{'rejects':15} {rejected}")
    if result.tokens_scored:
        print(
            f"{'scored':15} {result.tokens_scored:,} tokens at {result.tokens_scored / result.seconds:,.0f} tokens/s"
        )
