"""``teacher-cache export``: a cache in a form that other programs read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    """The form of the export."""

    parquet = "parquet"
    distillkit_raw = "distillkit-raw"
    axolotl_prepared = "axolotl-prepared"


def export(
    layout: Annotated[
        Layout,
        typer.Argument(
            metavar="LAYOUT",
            help="parquet: a row per token, plain columns. distillkit-raw, axolotl-prepared: a row per "
            "sequence, as these trainers read it (docs/layouts.md). All are one Parquet file.",
        ),
    ],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="The tokenizer, as a folder, a hub name or the teacher's MODULE:CLASS, if the one "
            "in the manifest cannot be loaded.",
        ),
    ] = None,
) -> None:
    """Exports a cache with plain columns for pandas, polars and duckdb (docs/store.md describes
    them), or in the layout of another trainer (docs/layouts.md).
    """
    from logitcask.cache_format import CacheReader
    from logitcask.cache_format.cli.result import print_result
    from logitcask.cache_format.export.other_layouts import write_axolotl, write_distillkit
    from logitcask.cache_format.export.parquet import refuse_existing, write_parquet
    from logitcask.cache_format.runtime.progress import ProgressBar
    from logitcask.pipeline.commands.sequence_table import exact_text

    refuse_existing(out)
    reader = CacheReader(cache)
    tokens = reader.manifest.statistics.tokens
    with ProgressBar(total=tokens, unit="tok", unit_scale=True, desc="export", leave=False) as bar:
        if layout is Layout.parquet:
            text = exact_text(reader, tokenizer)
            size = write_parquet(reader, out, text=text, on_tokens=bar.update)
        else:
            write = write_distillkit if layout is Layout.distillkit_raw else write_axolotl
            size = write(reader, out, on_tokens=bar.update)
    print_result(
        {"file": out, "tokens": tokens, "sequences": len(reader), "bytes": size},
        f"{out}: {tokens:,} tokens in {len(reader):,} sequences, {size:,} bytes",
    )
