"""Rows of tables as numpy arrays: Parquet, Arrow and the text formats of a build, streamed.

Shapes: R rows of a table's cell, K entries of a row (padded).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, one_line
from logitcask.pipeline.imports.base import Source
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.data_files import find_files, is_saved
from logitcask.pipeline.text.file_formats import (
    SUFFIXES,
    locate,
    read_columns,
    read_rows,
    suffix_of,
)

_BATCH_ROWS = 16
"""Rows in memory: a row of 8,192 tokens with 128 entries takes megabytes."""

Row = dict[str, pa.Scalar]


def rows(source: Source) -> Iterator[tuple[str, Row]]:
    """(name for messages, cells by the layout's own column names) of every row of the data.

    Raises UserError for a file that lacks the layout's columns.
    """
    renamed = {column: name for name, column in source.options.columns.items()}
    options, layout = source.options, source.layout.name
    for name, row in _table_rows(source.path, options.split, layout, _check_of(source)):
        yield name, {renamed.get(column, column): cell for column, cell in row.items()}


def token_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """The rows of ``--tokens``, as ``rows``."""
    options = source.options
    assert options.tokens is not None
    return _table_rows(options.tokens, options.split, "of --tokens", _has_tokens)


def _table_rows(
    path: str, split: str, layout: str, check: Callable[[str, list[str]], None]
) -> Iterator[tuple[str, Row]]:
    """(name, cells) of every row of the tables at ``path``. ``check``: called with the path and the
    columns of each file.
    """
    for file in _files(path, split, layout):
        short = file.rsplit("/", 1)[-1]
        number = 0
        for batch in _batches(file, check):
            for at in range(batch.num_rows):
                cells = {name: batch.column(name)[at] for name in batch.schema.names}
                yield f"{short}, row {number}", cells
                number += 1


def _check_of(source: Source) -> Any:
    wanted = {source.column(name) for name in source.layout.columns}

    def check(file: str, columns: list[str]) -> None:
        missing = sorted(wanted - set(columns))
        if missing:
            from logitcask.pipeline.imports.layouts import recognised

            other = recognised(columns)
            hint = (
                f"its columns are those of {other}"
                if other
                else f"it has {', '.join(columns[:8])}; --columns NAME=COLUMN names columns"
            )
            raise UserError(
                f"{file} is not in the layout {source.layout.name}: it lacks {' and '.join(missing)}; {hint}"
            )

    return check


def _has_tokens(file: str, columns: list[str]) -> None:
    if "input_ids" not in columns:
        raise UserError(
            f"{file} has no column input_ids, which --tokens needs; it has {', '.join(columns[:8])}"
        )


def _files(path: str, split: str, layout: str) -> list[str]:
    """The data files of a file, folder, pattern, URL or hub data set, in order."""
    folder = Path(path).expanduser()
    files = folder.rglob("*") if folder.is_dir() else [folder] if folder.is_file() else []
    suffixes = {suffix_of(file.name) for file in files}
    if suffixes and not suffixes & {*SUFFIXES}:
        raise UserError(
            f"{path} is not in the layout {layout}: expected a table (.parquet, .arrow, .jsonl, ...), or a folder of them"
        )
    if folder.is_dir() and is_saved(folder):
        if (folder / "dataset_dict.json").is_file():
            folder = folder / split
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            return [str(folder / each["filename"]) for each in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no saved data set ({one_line(error)}); name another, or another --split"
            ) from error
    return find_files(DataConfig(path=path, split=split)).files


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}; fetch it again") from error


def _batches(file: str, check: Any) -> Iterator[pa.RecordBatch]:
    kind = suffix_of(file)
    if kind not in (".parquet", ".arrow"):
        fields = read_columns(file)
        check(file, fields)
        found = read_rows(file, fields)
        while some := list(islice(found, _BATCH_ROWS)):
            with _reading(file):
                yield pa.RecordBatch.from_pylist(some)
        return
    filesystem, name = locate(file)
    with _reading(file), filesystem.open(name, "rb") as handle:
        if kind == ".parquet":
            table = pq.ParquetFile(handle)
            check(file, table.schema_arrow.names)
            yield from table.iter_batches(batch_size=_BATCH_ROWS)
            return
        try:
            reader = pa.ipc.open_file(handle)
            batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            handle.seek(0)
            reader = batches = pa.ipc.open_stream(handle)
        check(file, reader.schema.names)
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)


def vector(cell: pa.Scalar, dtype: Any, name: str) -> NDArray[Any]:
    """A cell that is a list of numbers. Raises UserError if it is none."""
    values = _values(cell, name)
    if not _is_number(values.type):
        raise UserError(f"{name} is {cell.type}, expected a list of numbers")
    if values.null_count:
        raise UserError(f"{name} has a null, expected numbers")
    return as_numbers(np.asarray(values.to_numpy(zero_copy_only=False)), dtype, name)


def matrix(cell: pa.Scalar, dtype: Any, filler: float, name: str) -> NDArray[Any]:
    """[R, K]: a cell that is a list of lists of numbers, padded with ``filler``, as nulls are; a
    null row is empty.
    """
    lengths, values = ragged(cell, name)
    if not _is_number(values.type):
        raise UserError(f"{name} is {cell.type}, expected a list of lists of numbers")
    flat = np.asarray(values.to_numpy(zero_copy_only=False))
    if values.null_count:
        flat = np.where(values.is_null().to_numpy(zero_copy_only=False), filler, flat)
    return padded(lengths, as_numbers(flat, dtype, name), filler)


def as_numbers(values: NDArray[Any], dtype: Any, name: str) -> NDArray[Any]:
    """``values`` as ``dtype``. Raises UserError for numbers that an integer cannot hold."""
    if np.issubdtype(dtype, np.integer) and np.issubdtype(values.dtype, np.floating):
        whole = np.isfinite(values) & (np.trunc(values) == values) & (np.abs(values) < 2.0**53)
        if not whole.all():
            raise UserError(f"{name} has {values[~whole][0]:g}, expected integers")
    return values.astype(dtype)


def ragged(cell: pa.Scalar, name: str) -> tuple[NDArray[np.int64], pa.Array]:
    """(lengths int64[R], all values): a cell that is a list of lists."""
    rows = _values(cell, name)
    if pa.types.is_null(rows.type):  # an empty list, or one of nulls
        return np.zeros(len(rows), np.int64), pa.array([], pa.float64())
    if not _is_list(rows.type):
        raise UserError(f"{name} is {cell.type}, expected a list of lists")
    lengths = pc.list_value_length(rows).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(rows)


def padded(lengths: NDArray[np.int64], flat: NDArray[Any], filler: float) -> NDArray[Any]:
    """[R, K]: rows of these lengths, with ``filler`` at their ends."""
    width = int(lengths.max(initial=0))
    if (lengths == width).all():
        return flat.reshape(len(lengths), width)
    result = np.full((len(lengths), width), filler, flat.dtype)
    result[np.arange(width) < lengths[:, None]] = flat
    return result


def _values(cell: pa.Scalar, name: str) -> pa.Array:
    if not _is_list(cell.type):
        raise UserError(f"{name} is {cell.type}, expected a list")
    if cell.values is None:
        raise UserError(f"{name} is null")
    return cell.values


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )
