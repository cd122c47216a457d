"""An estimate of the number of rows of a data set from sizes and the start of one file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow.parquet as pq

from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.data_files import find_files, is_saved
from logitcask.pipeline.text.file_formats import (
    DELIMITERS,
    JSON_SUFFIXES,
    locate,
    open_data,
    suffix_of,
)
from logitcask.pipeline.text.own_sources import is_own
from logitcask.pipeline.text.python_docs import BUILT_IN

_HEAD_BYTES = 1 << 22
_LINES = (*JSON_SUFFIXES, ".txt")


def count_rows(config: DataConfig) -> float | None:
    """Approximate number of rows; None if sizes do not give it. Opens only the first file of each
    source.
    """
    counts = [_in_slice(_rows_of_split(part), part) for part in config.parts()]
    return None if None in counts else sum(filter(None, counts))


def _in_slice(rows: float | None, config: DataConfig) -> float | None:
    """The part of ``rows`` that ``config.split`` names."""
    if rows is None:
        return None
    start, stop = config.slice.bounds(round(rows))
    return max(0.0, (rows if stop is None else min(rows, stop)) - start)


def _rows_of_split(config: DataConfig) -> float | None:
    if config.path in BUILT_IN:
        return len(BUILT_IN[config.path]())
    if is_own(config):
        return None
    local = Path(config.path).expanduser()
    if is_saved(local):
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(local))
        return len(saved[config.slice.name] if isinstance(saved, DatasetDict) else saved)
    files = find_files(config).files
    try:
        sizes = [filesystem.size(path) for filesystem, path in map(locate, files)]
        density = _rows_per_byte(files[0], sizes[0]) if all(sizes) else None
    except OSError:  # the server refuses more requests; the estimate works without them
        return None
    return None if density is None else density * sum(sizes)


def _rows_per_byte(file: str, size: int) -> float | None:
    """Rows per byte on disk: from Parquet's metadata, or counted in the first megabytes of text."""
    suffix = suffix_of(file)
    with open_data(file) as (stream, packed):
        if suffix == ".parquet":
            return pq.ParquetFile(stream).metadata.num_rows / size
        if suffix not in (*_LINES, *DELIMITERS):
            return None
        head = stream.read(_HEAD_BYTES)
        # The file below a decompressor knows how far it has been read.
        consumed = size if len(head) < _HEAD_BYTES else packed.tell()
    if suffix in DELIMITERS:
        records = csv.reader(
            io.StringIO(head.decode("utf-8", "replace"), newline=""),
            delimiter=DELIMITERS[suffix],
        )
        return max(1, sum(1 for _ in records) - 1) / consumed
    if suffix != ".txt" and head.lstrip().startswith(b"["):
        return None  # one array, whose elements may take any number of lines
    return (head.count(b"\n") + (not head.endswith(b"\n"))) / consumed
