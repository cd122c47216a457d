"""Rows of one data file in a common text format, as a stream.

The file is a local path, taken literally, or an fsspec URL. Memory holds one record batch of a
Parquet or Arrow file, or one line of other files; only a JSON file that is one big array is held
whole. ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` behind a text suffix are unpacked while reading. Text
is UTF-8, with or without a byte order mark.

A row is a dict with at least the requested fields. A field that a JSON object or a short CSV line
lacks is None. Each line of a ``.txt`` file is a row with the field ``text``, as in ``datasets``.

A line that cannot be read is a ``BadRow``, and reading goes on after it. Content that leaves no
later rows, such as UTF-16 or the end of a truncated archive, raises ``Unreadable``.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from logitcask.cache_format.errors import LogitcaskError, UserError, one_line_and_kind
from logitcask.cache_format.storage.files import open_filesystem

_PEEK_ROWS = 1000  # objects of a JSON file that are read to learn its fields
_BATCH_ROWS = 256  # of a Parquet file; long documents make a larger batch a large one
_HEAD = 512  # bytes of a text file that show a wide encoding: a zero in every other one
_CHUNK = 1 << 18  # bytes of a compressed file that are unpacked at once
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


class BadRow(NamedTuple):
    """A line, or an element of a JSON array, that cannot be read.

    reason:     the end of a counter of ``Source``.
    message:    one line with the place.
    whole_file: path of a file of which the rest cannot be read; empty for a single row.
    """

    reason: str
    message: str
    whole_file: str = ""


class Unreadable(UserError):
    """The content of a data file cannot be read, from some place on. A failing network or disk
    raises other errors.
    """


def suffix_of(path: str) -> str:
    """The suffix of the format: ``.jsonl`` for ``a/b.JSONL.gz``."""
    name = PurePosixPath(_name_of(path))
    return name.with_suffix("").suffix if name.suffix in _UNPACKERS else name.suffix


def _name_of(path: str) -> str:
    """The path in lower case, without the query of a web address."""
    path = path.lower()
    return urlsplit(path).path if path.startswith(("http://", "https://")) else path


def read_columns(path: str, *, tolerant: bool = False) -> list[str]:
    """The names of the fields. Raises UserError for content that contradicts the suffix.

    tolerant: lines that cannot be read are passed over, and a file that cannot be read has none.
    """
    try:
        with _naming(path), open_data(path) as (file, _):
            return _FORMATS[suffix_of(path)].columns(file, path, tolerant)
    except Unreadable:
        if tolerant:
            return []
        raise


def read_rows(
    path: str, fields: list[str], *, tolerant: bool = False
) -> Iterator[dict[str, Any] | BadRow]:
    """Every row of the file, in order. Raises UserError for content that contradicts the suffix.

    tolerant: yields a ``BadRow`` for each line that cannot be read, and for the rest of a file that
    cannot be read, instead of raising.
    """
    count = 0
    with open_data(path) as (file, _):
        rows = _FORMATS[suffix_of(path)].rows(file, path, fields)
        while True:
            try:
                with _naming(path, count):
                    row = next(rows, None)
            except Unreadable as error:
                if not tolerant:
                    raise
                yield BadRow("unreadable", str(error), whole_file=path)
                return
            if row is None:
                return
            count += 1
            yield row if tolerant else _good(row)


def _good(row: dict[str, Any] | BadRow) -> dict[str, Any]:
    """The row. Raises UserError for a bad one."""
    if isinstance(row, BadRow):
        raise UserError(f"{row.message}; data.on_bad_rows=skip leaves such rows out")
    return row


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``path`` and its name there; without ``://`` a literal local path."""
    return open_filesystem(path) if "://" in path else (LocalFileSystem(), path)


@contextmanager
def open_data(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of ``path``, unpacked, and the file itself, which knows how far it was read.

    Raises UserError if a package to unpack it is missing, and the errors of the file system.
    """
    filesystem, name = locate(path)
    with open(name, "rb") if "://" not in path else filesystem.open(name, "rb") as file:
        unpack = _UNPACKERS.get(PurePosixPath(_name_of(path)).suffix)
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
        raise Unreadable(_undecodable(path)) from error
    except Exception as error:
        after = f" after row {rows}" if rows else ""
        kind = Unreadable if _is_of_content(error) else UserError
        raise kind(f"cannot read {path}{after}: {one_line_and_kind(error)}") from error


def _is_of_content(error: Exception) -> bool:
    """Whether a decoder raised ``error`` about the bytes of a file. Errors of disks and networks
    have a number or a class of their own.
    """
    if isinstance(error, MemoryError):
        return False
    if type(error) in (OSError, gzip.BadGzipFile):
        return error.errno is None  # type: ignore[attr-defined]
    decoders = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, KeyError)
    return isinstance(error, decoders) or type(error).__name__ == "ZstdError"


def _undecodable(path: str) -> str:
    """A message with the first place where ``path`` is not UTF-8, found by reading it again."""
    with open_data(path) as (file, _):
        for number, line in enumerate(file, 1):
            if (wrong := _wrong_bytes(line, f"{path}, line {number}")) is not None:
                return wrong
    return f"cannot read {path}: some of its text is not UTF-8; expected UTF-8"


def _wrong_bytes(line: bytes, place: str) -> str | None:
    """A message with the first byte of ``line`` that is not UTF-8; None if all of it is."""
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return (
            f"{place}: byte {wrong.start + 1} of the line (0x{line[wrong.start]:02x}) is not UTF-8; "
            "convert the file to UTF-8, for instance with iconv"
        )
    return None


def _wrong_text(line: str, place: str) -> str | None:
    """``_wrong_bytes`` of a line that ``_text`` has decoded."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return _wrong_bytes(line.encode(errors="surrogateescape"), place)
    return None


_Rows = Iterator[dict[str, Any] | BadRow]


class _Format(NamedTuple):
    """Readers of the fields, with ``tolerant``, and of the rows, with the wanted fields."""

    columns: Callable[[IO[bytes], str, bool], list[str]]
    rows: Callable[[IO[bytes], str, list[str]], _Rows]


def _text(file: IO[bytes], path: str, newline: str | None = None) -> io.TextIOWrapper:
    """The text of ``file``. Bytes that are not UTF-8 are half surrogates, which UTF-8 cannot
    encode, so that one wrong line does not end the reading.
    """
    if not hasattr(file, "peek"):  # a remote file
        file = io.BufferedReader(file)  # type: ignore[type-var]
    head = file.peek(_HEAD)[:_HEAD]  # type: ignore[attr-defined]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4:
        raise Unreadable(
            f"{path} is UTF-16 or UTF-32 text, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        )
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _json_objects(file: IO[bytes], path: str) -> _Rows:
    """Objects of one array or of lines, decided by the first character, not by the suffix."""
    text = _text(file, path, newline="\n")  # newline="\n": a lone \r does not end a line
    lines = enumerate(text, 1)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        # A zstd stream cannot seek to the start. Empty lines replace those already read, so that
        # the parser's line numbers stay right.
        whole = "\n" * (first[0] - 1) + first[1] + text.read()
        if _wrong_text(whole, path) is not None:
            raise Unreadable(_undecodable(path))
        array = _parse(whole, path)
        if isinstance(array, BadRow):
            raise Unreadable(array.message)
        yield from (_object(value, f"{path}, element {index}") for index, value in enumerate(array))
        return
    for number, line in chain([first], lines):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        if (wrong := _wrong_text(line, place)) is not None:
            yield BadRow("not_utf8", wrong)
        else:
            value = _parse(line, place)
            yield value if isinstance(value, BadRow) else _object(value, place)


def _parse(text: str, place: str) -> Any:
    """The JSON value, or a ``BadRow``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else error
        return BadRow(
            "not_json",
            f"{place}: not JSON ({found}); expected one object per line, or one array of objects",
        )


def _object(value: object, place: str) -> dict[str, Any] | BadRow:
    if not isinstance(value, dict):
        return BadRow(
            "not_an_object",
            f"{place}: found a {type(value).__name__}, expected an object with named fields",
        )
    return value


def _json_columns(file: IO[bytes], path: str, tolerant: bool) -> list[str]:
    rows = islice(_json_objects(file, path), _PEEK_ROWS)
    read = (row for row in rows if not (tolerant and isinstance(row, BadRow)))
    return list({key: None for row in read for key in _good(row)})


def _json_rows(file: IO[bytes], path: str, fields: list[str]) -> _Rows:
    for row in _json_objects(file, path):
        yield row if isinstance(row, BadRow) else {field: row.get(field) for field in fields}


class _CsvRecords:
    """The non-empty lines of a table, as lists of cells, and a ``BadRow`` for each that cannot be
    read.
    """

    def __init__(self, file: IO[bytes], path: str) -> None:
        csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
        self._path = path
        self._wrong: str | None = None
        text = _text(file, path, newline="")
        self._reader = csv.reader(
            self._lines(text), delimiter=DELIMITERS[suffix_of(path)], strict=True
        )

    @property
    def place(self) -> str:
        return f"{self._path}, line {self._reader.line_num}"

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        for number, line in enumerate(text, 1):
            self._wrong = self._wrong or _wrong_text(line, f"{self._path}, line {number}")
            yield line

    def __iter__(self) -> Iterator[list[str] | BadRow]:
        while True:
            self._wrong, begin = None, self._reader.line_num + 1
            try:
                cells = next(self._reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # a quote has taken in all later rows
                    raise Unreadable(
                        f"{self._path}, line {begin}: {error}; expected a table as RFC 4180 has it, where every quote is closed"
                    ) from None
                yield BadRow(
                    "not_csv", f"{self.place}: {error}; expected a table as RFC 4180 has it"
                )
                continue
            if cells is None:
                return
            if self._wrong is not None:
                yield BadRow("not_utf8", self._wrong)
            elif cells:
                yield cells

    def header(self) -> list[str]:
        """The first record; empty in an empty file. Raises Unreadable if it cannot be read."""
        cells = next(iter(self), [])
        if isinstance(cells, BadRow):
            raise Unreadable(cells.message)
        return cells


def _csv_columns(file: IO[bytes], path: str, tolerant: bool) -> list[str]:
    return _CsvRecords(file, path).header()


def _csv_rows(file: IO[bytes], path: str, fields: list[str]) -> _Rows:
    records = _CsvRecords(file, path)
    header = records.header()
    if not header:
        return
    _require(fields, header, path)
    wanted = {field: header.index(field) for field in fields}
    for cells in records:
        if isinstance(cells, BadRow):
            yield cells
        elif len(cells) > len(header) and any(cells[len(header) :]):
            yield BadRow(
                "too_many_cells",
                f"{records.place}: found {len(cells)} cells, expected {len(header)} as in the header; put "
                "quotes around text that holds a separator",
            )
        else:
            yield {field: cells[at] if at < len(cells) else None for field, at in wanted.items()}


def _line_columns(file: IO[bytes], path: str, tolerant: bool) -> list[str]:
    return ["text"]


def _line_rows(file: IO[bytes], path: str, fields: list[str]) -> _Rows:
    for number, line in enumerate(_text(file, path), 1):
        wrong = _wrong_text(line, f"{path}, line {number}")
        yield {"text": line.rstrip("\n")} if wrong is None else BadRow("not_utf8", wrong)


def _parquet_columns(file: IO[bytes], path: str, tolerant: bool) -> list[str]:
    return list(pq.read_schema(file).names)


def _parquet_rows(file: IO[bytes], path: str, fields: list[str]) -> _Rows:
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


def _arrow_columns(file: IO[bytes], path: str, tolerant: bool) -> list[str]:
    return list(_arrow_batches(file)[0].names)


def _arrow_rows(file: IO[bytes], path: str, fields: list[str]) -> _Rows:
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
            raise Unreadable(
                f"{path} has no column {field!r}; the files of a data set need the same columns"
            )
        if columns.count(field) > 1:
            raise Unreadable(
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
