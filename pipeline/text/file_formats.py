"""Rows of one data file in a common text format, as a stream.

The file is a local path, taken literally, or an fsspec URL. Memory holds one record batch of a
Parquet or Arrow file, or one line of other files; only a JSON file that is one big array is held
whole. ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` behind a text suffix are unpacked while reading. Text
is UTF-8, with or without a byte order mark.

A row is a dict with at least the requested fields. A field that a JSON object or a short CSV line
lacks is None. Each line of a ``.txt`` file is a row with the field ``text``, as in ``datasets``.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from logitcask.cache_format.errors import LogitcaskError, UserError, one_line_and_kind

_PEEK_ROWS = 1000  # objects of a JSON file that are read to learn its fields
_BATCH_ROWS = 256  # of a Parquet file; long documents make a larger batch a large one
_HEAD = 512  # bytes of a text file that show a wide encoding: a zero in every other one
_CHUNK = 1 << 18  # bytes of a compressed file that are unpacked at once
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


def suffix_of(path: str) -> str:
    """The suffix of the format: ``.jsonl`` for ``a/b.JSONL.gz``."""
    name = PurePosixPath(path.lower())
    return name.with_suffix("").suffix if name.suffix in _UNPACKERS else name.suffix


def read_columns(path: str) -> list[str]:
    """The names of the fields. Raises UserError for content that contradicts the suffix."""
    with _naming(path), open_data(path) as (file, _):
        return _FORMATS[suffix_of(path)].columns(file, path)


def read_rows(path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the file, in order. Raises UserError for content that contradicts the suffix."""
    count = 0
    with open_data(path) as (file, _):
        rows = _FORMATS[suffix_of(path)].rows(file, path, fields)
        while True:
            with _naming(path, count):
                row = next(rows, None)
            if row is None:
                return
            count += 1
            yield row


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``path`` and its name there; without ``://`` a literal local path."""
    if "://" in path:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(path)
        return found
    return LocalFileSystem(), path


@contextmanager
def open_data(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of ``path``, unpacked, and the file itself, which knows how far it was read.

    Raises UserError if a package to unpack it is missing, and the errors of the file system.
    """
    filesystem, name = locate(path)
    with open(name, "rb") if "://" not in path else filesystem.open(name, "rb") as file:
        unpack = _UNPACKERS.get(PurePosixPath(path.lower()).suffix)
        if unpack is None:
            yield file, file
            return
        with unpack(file) as content:
            yield content, file


def _unpack_zstd(file: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(
            "files that end in .zst need the package zstandard, which is not installed; pip install 'logitcask[text]'"
        ) from None
    return io.BufferedReader(
        _Frames(file, zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)), _CHUNK
    )


class _Frames(io.RawIOBase):
    """All frames of a zstd file in order; zstandard's own reader ignores a truncated end."""

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready, self._packed = memoryview(self._frame.decompress(self._packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)


_UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unpack_zstd,
}


@contextmanager
def _naming(path: str, rows: int = 0) -> Iterator[None]:
    """Turns errors of file systems, decoders and the network into one line about ``path``."""
    try:
        yield
    except LogitcaskError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(_undecodable(path, error)) from error
    except Exception as error:
        after = f" after row {rows}" if rows else ""
        raise UserError(f"cannot read {path}{after}: {one_line_and_kind(error)}") from error


def _undecodable(path: str, error: UnicodeDecodeError) -> str:
    """The first place where ``path`` is not UTF-8, found by reading it again, because a decoder
    knows only the place in its buffer.
    """
    with open_data(path) as (file, _):
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                return (
                    f"{path}, line {number}: byte {wrong.start + 1} of the line (0x{line[wrong.start]:02x}) is not UTF-8; "
                    "convert the file to UTF-8, for instance with iconv"
                )
    return f"cannot read {path}: {' '.join(str(error).split())}; expected UTF-8"


class _Format(NamedTuple):
    columns: Callable[[IO[bytes], str], list[str]]
    rows: Callable[[IO[bytes], str, list[str]], Iterator[dict[str, Any]]]


def _text(file: IO[bytes], path: str, newline: str | None = None) -> io.TextIOWrapper:
    if not hasattr(file, "peek"):  # a remote file
        file = io.BufferedReader(file)  # type: ignore[type-var]
    head = file.peek(_HEAD)[:_HEAD]  # type: ignore[attr-defined]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4:
        raise UserError(
            f"{path} is UTF-16 or UTF-32 text, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        )
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _json_objects(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    """Objects of one array or of lines, decided by the first character, not by the suffix."""
    text = _text(file, path, newline="\n")  # newline="\n": a lone \r does not end a line
    lines = enumerate(text, 1)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        # A zstd stream cannot seek to the start. Empty lines replace those already read, so that
        # the parser's line numbers stay right.
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
        raise UserError(
            f"{place}: not JSON ({found}); expected one object per line, or one array of objects"
        ) from None


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{place}: found a {type(value).__name__}, expected an object with named fields"
        )
    return value


def _json_columns(file: IO[bytes], path: str) -> list[str]:
    return list(
        {key: None for value in islice(_json_objects(file, path), _PEEK_ROWS) for key in value}
    )


def _json_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    for value in _json_objects(file, path):
        yield {field: value.get(field) for field in fields}


def _csv_reader(file: IO[bytes], path: str) -> Any:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    return csv.reader(
        _text(file, path, newline=""),
        delimiter=DELIMITERS[suffix_of(path)],
        strict=True,
    )


def _csv_records(reader: Any, path: str) -> Iterator[list[str]]:
    """The non-empty lines, as lists of cells."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; expected a table as RFC 4180 has it"
            ) from error
        if cells is None:
            return
        if cells:
            yield cells


def _csv_columns(file: IO[bytes], path: str) -> list[str]:
    return next(_csv_records(_csv_reader(file, path), path), [])


def _csv_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    reader = _csv_reader(file, path)
    records = _csv_records(reader, path)
    header = next(records, [])
    if not header:
        return
    _require(fields, header, path)
    wanted = {field: header.index(field) for field in fields}
    for cells in records:
        if len(cells) > len(header) and any(cells[len(header) :]):
            raise UserError(
                f"{path}, line {reader.line_num}: found {len(cells)} cells, expected {len(header)} as in the header; put "
                "quotes around text that holds a separator"
            )
        yield {field: cells[at] if at < len(cells) else None for field, at in wanted.items()}


def _line_columns(file: IO[bytes], path: str) -> list[str]:
    return ["text"]


def _line_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    for line in _text(file, path):
        yield {"text": line.rstrip("\n")}


def _parquet_columns(file: IO[bytes], path: str) -> list[str]:
    return list(pq.read_schema(file).names)


def _parquet_rows(file: IO[bytes], path: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    # ParquetFile and not pyarrow.dataset: an unfinished scan may abort the process at exit
    # (https://github.com/apache/arrow/issues/45214).
    table = pq.ParquetFile(file)
    _require(fields, table.schema_arrow.names, path)
    for batch in table.iter_batches(_BATCH_ROWS, columns=fields):
        yield from _objects_in(batch)


def _arrow_batches(file: IO[bytes]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Batches of an ``.arrow`` file: the IPC format with its magic, or ``datasets``' stream."""
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
        yield from _objects_in(batch.select(fields))


def _objects_in(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of ``batch``. Maps, which Spark writes for objects, become dicts. Raises KeyError
    for a repeated key.
    """
    return batch.to_pylist(maps_as_pydicts="strict")


def _require(fields: list[str], columns: list[str], path: str) -> None:
    for field in fields:
        if field not in columns:
            raise UserError(
                f"{path} has no column {field!r}; the files of a data set need the same columns"
            )
        if columns.count(field) > 1:
            raise UserError(
                f"{path} has {columns.count(field)} columns of the name {field!r}, so which is meant cannot be told; "
                "rename all but one"
            )


_JSON = _Format(_json_columns, _json_rows)
_CSV = _Format(_csv_columns, _csv_rows)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Between the cells of a table, by the suffix of its file."""
_FORMATS = {
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    **dict.fromkeys(DELIMITERS, _CSV),
    ".txt": _Format(_line_columns, _line_rows),
    ".parquet": _Format(_parquet_columns, _parquet_rows),
    ".arrow": _Format(_arrow_columns, _arrow_rows),
}
SUFFIXES = tuple(_FORMATS)
JSON_SUFFIXES = tuple(suffix for suffix, each in _FORMATS.items() if each is _JSON)
