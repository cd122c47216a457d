"""Rows out of one data file, as a stream: the formats people keep text in, and nothing else about the data.

Any fsspec URL will do. Memory: one record batch of a Parquet or Arrow file, one line of the others; only a JSON file
that is one big array is held whole. ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` behind a text suffix are unpacked on the way.

A row is a dict with at least the fields asked for; a field that a JSON object or a short CSV line lacks is None. Each
line of a ``.txt`` file is a row with the one field ``text``, as in ``datasets``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cache_format.errors import UserError

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PEEK_ROWS = 1000  # objects of a JSON file that are read to learn its fields
_BATCH_ROWS = 256  # of a Parquet file; long documents make a larger batch a large one


def suffix_of(path: str) -> str:
    """The suffix that names the format: ``.jsonl`` for ``a/b.JSONL.gz``."""
    name = PurePosixPath(path.lower())
    return name.with_suffix("").suffix if name.suffix in _COMPRESSED else name.suffix


def read_columns(path: str) -> list[str]:
    """The names of the fields. Raises UserError for content that is not what the suffix says."""
    with fsspec.open(path, "rb", compression="infer") as file:
        return _FORMATS[suffix_of(path)].columns(file, path)


def read_rows(path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the file, in order. Raises UserError for content that is not what the suffix says."""
    with fsspec.open(path, "rb", compression="infer") as file:
        yield from _FORMATS[suffix_of(path)].rows(file, path, fields)


class _Format(NamedTuple):
    columns: Callable[[IO[bytes], str], list[str]]
    rows: Callable[[IO[bytes], str, list[str]], Iterator[dict[str, Any]]]


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _json_objects(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    """One array, or an object per line; ``.json`` and ``.jsonl`` are used for both, so the first character decides."""
    text = _text(file, newline="\n")  # newline="\n": a lone \r does not end a line
    lines = enumerate(text, 1)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        # No seek to the start, which a zstd stream refuses. Empty lines for those that were read keep the parser's count.
        array = _parse("\n" * (first[0] - 1) + first[1] + text.read(), path)
        yield from (_object(value, f"{path}, element {index}") for index, value in enumerate(array))
        return
    for number, line in chain([first], lines):
        if line.strip():
            yield _object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{place}: not JSON ({found}); expected one object per line, or one array of objects") from None


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: found a {type(value).__name__}, expected an object with named fields")
    return value


def _json_columns(file: IO[bytes], path: str) -> list[str]:
    return list({key: None for value in islice(_json_objects(file, path), _PEEK_ROWS) for key in value})


def _json_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    for value in _json_objects(file, path):
        yield {field: value.get(field) for field in fields}


def _csv_reader(file: IO[bytes], path: str) -> csv.DictReader[str]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    return csv.DictReader(_text(file, newline=""), delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)


def _csv_columns(file: IO[bytes], path: str) -> list[str]:
    return list(_csv_reader(file, path).fieldnames or [])


def _csv_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    reader = _csv_reader(file, path)
    _require(fields, list(reader.fieldnames or []), path)
    yield from reader


def _line_columns(file: IO[bytes], path: str) -> list[str]:
    return ["text"]


def _line_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    for line in _text(file):
        yield {"text": line.rstrip("\n")}


def _parquet_columns(file: IO[bytes], path: str) -> list[str]:
    return list(pq.read_schema(file).names)


def _parquet_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    # ParquetFile and not pyarrow.dataset: a scan that is left early may abort the process at exit
    # (https://github.com/apache/arrow/issues/45214).
    table = pq.ParquetFile(file)
    _require(fields, table.schema_arrow.names, path)
    for batch in table.iter_batches(_BATCH_ROWS, columns=fields):
        yield from batch.to_pylist()


def _arrow_batches(file: IO[bytes]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """``.arrow`` is either the IPC file format, which starts with its magic, or the stream that ``datasets`` writes."""
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)


def _arrow_columns(file: IO[bytes], path: str) -> list[str]:
    return list(_arrow_batches(file)[0].names)


def _arrow_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    schema, batches = _arrow_batches(file)
    _require(fields, schema.names, path)
    for batch in batches:
        yield from batch.select(fields).to_pylist()


def _require(fields: list[str], columns: list[str], path: str) -> None:
    missing = [field for field in fields if field not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; the files of a data set need the same columns")


_JSON = _Format(_json_columns, _json_rows)
_CSV = _Format(_csv_columns, _csv_rows)
_FORMATS = {
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    ".csv": _CSV,
    ".tsv": _CSV,
    ".txt": _Format(_line_columns, _line_rows),
    ".parquet": _Format(_parquet_columns, _parquet_rows),
    ".arrow": _Format(_arrow_columns, _arrow_rows),
}
SUFFIXES = tuple(_FORMATS)
