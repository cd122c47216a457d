"""A cache as one Parquet file, for pandas, polars, duckdb and the like."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from logitcask.cache_format.durable import sync
from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.export.tables import ROWS, SCHEMA, Text, iter_tables
from logitcask.cache_format.reader import CacheReader


def write_parquet(
    reader: CacheReader,
    out: Path,
    *,
    rows: int = ROWS,
    text: Text | None = None,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> int:
    """Writes the whole cache to the Parquet file ``out``, compressed by zstd. Returns its bytes.
    Only one row group, a table of ``iter_tables``, is in memory at a time.

    The file has its name only once it is complete. Its metadata have the cache's fingerprint.
    A row group has at least ``rows`` tokens. ``on_tokens`` receives the number of tokens of each.

    Raises UserError if ``out`` exists or cannot be written.
    """
    schema = SCHEMA.with_metadata({"cache_fingerprint": reader.manifest.fingerprint})

    def tables() -> Iterator[pa.Table]:
        for table in iter_tables(reader, rows=rows, text=text):
            yield table
            on_tokens(table.num_rows)

    return write_tables(out, schema, tables())


def write_tables(out: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Writes a Parquet file, compressed by zstd, of one row group for each table; returns its bytes.
    The file has its name only once it is complete.

    Raises UserError if ``out`` exists or cannot be written.
    """
    refuse_existing(out)
    # A name of its own: another export to the same file writes beside it, not into it.
    temporary = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table, row_group_size=table.num_rows)
        sync(temporary)
        os.replace(temporary, out)
        sync(out.absolute().parent)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or one_line(error)}; make room or permit it, or choose another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return out.stat().st_size


def refuse_existing(out: Path) -> None:
    """Raises UserError if ``out`` exists."""
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another file")
