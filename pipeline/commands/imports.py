"""``teacher-cache import``: a cache from data in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from logitcask.cache_format.cli.cache_commands import ShardTokens, give_options, options_of
from logitcask.cache_format.derive.write import SHARD_TOKENS
from logitcask.pipeline.imports.base import ImportOptions

_SUMMARIES = """distillkit-raw, distillkit-packed, distillkit-legacy, axolotl, axolotl-prepared,
sidecar, probabilities, torch or megatron (docs/layouts.md)."""


def import_(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help=" ".join(_SUMMARIES.split()))],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A file, a folder, a pattern, a URL or a hub data set."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new cache.")],
    columns: Annotated[
        list[str],
        typer.Option("--columns", metavar="NAME=COLUMN", help="Another name of a column; repeat."),
    ] = [],  # noqa: B006  Typer reads it
    shard_tokens: ShardTokens = SHARD_TOKENS,
    **options: Any,
) -> None:
    """Makes a cache from teacher logprobs in another layout. Resumes an interrupted import.

    Logits without all others of their position leave the mass outside the head unknown; the cache
    says so, and losses do.
    """
    from logitcask.cache_format.cli.config_file import parse_options
    from logitcask.cache_format.cli.result import print_result
    from logitcask.cache_format.describe import describe, facts
    from logitcask.cache_format.errors import ConfigError
    from logitcask.cache_format.runtime.progress import ProgressBar
    from logitcask.pipeline.imports.layouts import LAYOUTS
    from logitcask.pipeline.imports.run import import_cache

    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    given = {name: value for name, value in options.items() if value is not None}
    pairs = [each.partition("=") for each in columns]
    if wrong := [name for name, _, column in pairs if not (name and column)]:
        raise ConfigError(f"--columns is {wrong[0]!r}; expected NAME=COLUMN")
    given["columns"] = {name: column for name, _, column in pairs}
    asked = parse_options(ImportOptions, {k: v for k, v in given.items() if v != {}})
    with (
        ProgressBar(unit="tok", unit_scale=True, desc="check", leave=False) as checked,
        ProgressBar(unit="tok", unit_scale=True, desc="import", leave=False) as written,
    ):
        manifest = import_cache(
            layout,
            source,
            out,
            asked,
            shard_tokens=shard_tokens,
            on_checked=checked.update,
            on_written=written.update,
        )
    print_result(facts(manifest, out), describe(manifest, out))


give_options(
    import_,
    {name: kind for name, kind in options_of(ImportOptions).items() if name != "columns"},
)
