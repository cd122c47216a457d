"""Opens Arrow IPC files from untrusted sources: sizes are checked before memory is allocated.

Arrow allocates as many bytes as the eight bytes before a compressed buffer say. This module reads
these sizes first, through the file's own flatbuffers (arrow.apache.org/docs/format/Columnar.html,
Footer, Message and RecordBatch), and refuses sizes above a limit. Arrow also does not validate
decompressed data. This module validates offsets, lengths and text before they are used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from logitcask.cache_format.errors import DamagedCacheError
from logitcask.cache_format.schema import MAX_BATCH_BYTES

_MAGIC = b"ARROW1"
# Fields of the flatbuffer tables, by their numbers.
_FOOTER_VERSION, _FOOTER_SCHEMA, _FOOTER_DICTIONARIES, _FOOTER_BATCHES = 0, 1, 2, 3
_SCHEMA_ENDIANNESS = 0
_MESSAGE_VERSION, _MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_BYTES = 0, 1, 2, 3
_BATCH_BUFFERS, _BATCH_COMPRESSION = 2, 3
_RECORD_BATCH = 3
_METADATA_V5 = 4
_BLOCK_BYTES = 24
_MAX_BUFFERS = 1024
"""In a record batch: the widest schema of this format has about 60."""
_STORED = -1
"""Length prefix of a buffer that was left uncompressed."""


class BoundedFile:
    """An Arrow IPC file of one schema, in memory or memory-mapped, without dictionaries and with
    batches of bounded size.

    A mapped file takes memory only for the batch that is being read; pages that were read are
    released. ``columns``: indices of the columns to read; by default all. The constructor and every
    method raise DamagedCacheError, naming ``where``, for an invalid file or another schema.
    """

    def __init__(
        self,
        data: pa.Buffer | bytes | mmap.mmap,
        where: str,
        schema: pa.Schema,
        columns: list[int] | None = None,
    ) -> None:
        self._data = data
        self._view = memoryview(data)
        self._where = where
        # What Arrow shows of the file is then what was asked for.
        self._schema = (
            schema if columns is None else pa.schema([schema.field(index) for index in columns])
        )
        options = pa.ipc.IpcReadOptions(included_fields=columns)
        with self._named(where, "cannot be opened"):
            self._blocks, self._count = self._read_footer()
            self._file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data)), options=options)
            if self._file.num_record_batches != self._count:
                raise ValueError("its footer contradicts itself")
            if not self._file.schema.equals(self._schema):
                raise ValueError("it has another Arrow schema than the manifest asks for")

    def __len__(self) -> int:
        """Record batches."""
        return self._count

    def batch(self, index: int) -> pa.RecordBatch:
        """One record batch, decompressed and valid, without nulls at any level."""
        with self._named(f"{self._where}, batch {index}", "cannot be read"):
            size = self._decompressed_bytes(index)
            if size > MAX_BATCH_BYTES:
                raise ValueError(
                    f"it would take {size:,} bytes; a record batch has at most {MAX_BATCH_BYTES:,}"
                )
            batch = self._file.get_batch(index)
            self._give_back(index)
            batch.validate(full=True)
            if not batch.schema.equals(self._schema):
                raise ValueError("it has another Arrow schema than its file")
            if any(has_nulls(column) for column in batch.columns):
                raise ValueError("it has nulls")
            return batch

    def column_bytes(self, index: int) -> dict[str, int]:
        """The bytes of each column in a record batch as they are stored: compressed, without the
        padding between buffers.
        """
        with self._named(f"{self._where}, batch {index}", "cannot be read"):
            lengths = iter([length for _, length in self._buffers(index)[2]])
            # Validity and offsets, then the values; those of a list have a validity of their own.
            return {
                field.name: sum(
                    next(lengths) for _ in range(4 if pa.types.is_list(field.type) else 3)
                )
                for field in self._file.schema
            }

    def _give_back(self, index: int) -> None:
        """Drops the mapped pages of a batch. Uncompressed columns are mapped again on access."""
        if isinstance(self._data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            message, metadata, body_bytes = self._unpack(
                "<qi4xq", self._blocks + _BLOCK_BYTES * index
            )
            start = message // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, start, message + metadata + body_bytes - start)

    @staticmethod
    @contextmanager
    def _named(where: str, what: str) -> Iterator[None]:
        """Turns errors from bad bytes into a DamagedCacheError. A lack of memory is not damage."""
        try:
            yield
        except MemoryError:
            raise
        except (OSError, ValueError, struct.error, pa.ArrowException) as error:
            raise DamagedCacheError(
                f"{where}, {what}: {' '.join(str(error).split())[:500]}"
            ) from error

    def _read_footer(self) -> tuple[int, int]:
        """Start of the list of record batches, and their number."""
        if bytes(self._view[-6:]) != _MAGIC or len(self._view) < 24:
            raise ValueError("it is not an Arrow file")
        (size,) = self._unpack("<i", len(self._view) - 10)
        root = self._follow(len(self._view) - 10 - size)
        self._require_v5(root, _FOOTER_VERSION)
        # Arrow would swap the bytes of every buffer before its offsets are validated.
        endianness = self._field(
            self._follow(self._field(root, _FOOTER_SCHEMA)), _SCHEMA_ENDIANNESS
        )
        if endianness and self._unpack("<h", endianness) != (0,):
            raise ValueError("it is not little-endian")
        dictionaries = self._field(root, _FOOTER_DICTIONARIES)
        if dictionaries and self._vector(dictionaries)[1]:
            raise ValueError("it has dictionaries")
        batches = self._field(root, _FOOTER_BATCHES)
        return self._vector(batches) if batches else (0, 0)

    def _decompressed_bytes(self, index: int) -> int:
        body, compressed, buffers = self._buffers(index)
        total = 0
        for offset, length in buffers:
            size = length
            if compressed and length:
                (prefix,) = self._unpack("<q", body + offset)
                size = length if prefix == _STORED else prefix
            if size < 0:
                raise ValueError("a buffer has a negative size")
            total += size
        return total

    def _buffers(self, index: int) -> tuple[int, bool, list[tuple[int, ...]]]:
        """Of a record batch: the start of its body, whether it is compressed, and offset and length
        of each buffer in the body. Raises ValueError for what leaves the file.
        """
        message, metadata, body_bytes = self._unpack("<qi4xq", self._blocks + _BLOCK_BYTES * index)
        body = message + metadata
        (first,) = self._unpack("<i", message)
        root = self._follow(message + (8 if first == -1 else 4))
        self._require_v5(root, _MESSAGE_VERSION)
        kind = self._field(root, _MESSAGE_HEADER_TYPE)
        if not kind or self._unpack("<B", kind) != (_RECORD_BATCH,):
            raise ValueError("it is no record batch")
        # To read some columns only, Arrow allocates the whole body first.
        stated = self._field(root, _MESSAGE_BODY_BYTES)
        if (
            self._unpack("<q", stated)[0] if stated else 0
        ) != body_bytes or not 0 <= body_bytes <= len(self._view) - body:
            raise ValueError("its body leaves the file")
        if body_bytes > 2 * MAX_BATCH_BYTES:
            raise ValueError(f"its body has {body_bytes:,} bytes")
        batch = self._follow(self._field(root, _MESSAGE_HEADER))
        start, count = self._vector(self._field(batch, _BATCH_BUFFERS))
        if count > _MAX_BUFFERS:
            raise ValueError(f"it has {count} buffers")
        buffers = [self._unpack("<qq", start + 16 * buffer) for buffer in range(count)]
        for offset, length in buffers:
            if offset < 0 or length < 0 or body + offset + length > len(self._view):
                raise ValueError("a buffer leaves the file")
        return body, self._field(batch, _BATCH_COMPRESSION) != 0, buffers

    def _require_v5(self, table: int, number: int) -> None:
        """Raises ValueError for metadata of a version other than V5, Arrow's version since 1.0.

        In V4, custom metadata can declare buffers compressed although the record batch does not.
        """
        at = self._field(table, number)
        version = self._unpack("<h", at)[0] if at else 0
        if version != _METADATA_V5:
            raise ValueError(f"its metadata has version V{version + 1}; expected V5")

    def _unpack(self, layout: str, at: int) -> tuple[int, ...]:
        if not 0 <= at <= len(self._view) - struct.calcsize(layout):
            raise ValueError("an offset leaves the file")
        return struct.unpack_from(layout, self._view, at)

    def _follow(self, at: int) -> int:
        """Target of the offset stored at ``at``."""
        return at + self._unpack("<I", at)[0]

    def _field(self, table: int, number: int) -> int:
        """Place of a field of a flatbuffer table; 0 if the field is absent."""
        vtable = table - self._unpack("<i", table)[0]
        (size,) = self._unpack("<H", vtable)
        if 4 + 2 * number + 2 > size:
            return 0
        (offset,) = self._unpack("<H", vtable + 4 + 2 * number)
        return table + offset if offset else 0

    def _vector(self, at: int) -> tuple[int, int]:
        """Start of the elements of the vector referred to at ``at``, and their number."""
        if not at:
            raise ValueError("a list is missing")
        start = self._follow(at)
        (count,) = self._unpack("<I", start)
        if count > len(self._view):
            raise ValueError("a list leaves the file")
        return start + 4, count


def has_nulls(column: pa.Array) -> bool:
    """Whether a column has nulls, in itself or in its lists."""
    return bool(column.null_count or (pa.types.is_list(column.type) and column.values.null_count))
