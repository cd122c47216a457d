"""Shards taken apart and put together again, past everything that a writer checks."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa
from cases import Case
from numpy.typing import NDArray

from logitcask.cache_format.shards.codec import ContentHash

Columns = dict[str, tuple[NDArray[np.int64], NDArray[Any]]]
"""Of a shard's rows: how many values each has, and all the values."""


def metadata_of(data: bytes) -> list[tuple[int, int]]:
    """[start, stop) of the messages' metadata and of the footer."""
    (size,) = struct.unpack_from("<i", data, len(data) - 10)
    found = [(len(data) - 10 - size, len(data) - 6)]
    for at in range(8, len(data) - 8, 8):
        mark, length = struct.unpack_from("<ii", data, at)
        if mark == -1 and 0 < length < 8192:
            found.append((at, at + 8 + length))
    return found


def arrow_file(columns: list[tuple[str, pa.Array]], batches: int = 1) -> bytes:
    schema = pa.schema([pa.field(name, each.type, nullable=False) for name, each in columns])
    batch = pa.RecordBatch.from_arrays([each for _, each in columns], schema=schema)
    return written([batch] * batches, schema, "zstd")


def written(batches: list[pa.RecordBatch], schema: pa.Schema, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)
    result: bytes = sink.getvalue().to_pybytes()
    return result


def written_with_nulls(
    table: pa.Table, at: int, values: list[Any], compression: str | None
) -> bytes:
    """As the schema of a shard has it, with nulls in a column whose field allows none."""
    schema = table.schema
    arrays = [column.combine_chunks() for column in table.columns]
    arrays[at] = pa.array(values, schema.types[at])
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    return written(
        [batch.slice(start, 2) for start in range(0, len(batch), 2)], schema, compression
    )


def stream_of(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    result: bytes = sink.getvalue().to_pybytes()
    return result


def columns_of(data: bytes) -> tuple[pa.Schema, list[str], Columns]:
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        table = file.read_all().combine_chunks()
    columns = {}
    for name in table.schema.names[1:]:
        column = table.column(name).combine_chunks()
        if pa.types.is_binary(column.type):
            values = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
            lengths = np.array([len(each) for each in column.to_pylist()], np.int64)
        else:
            values = column.flatten().to_numpy(zero_copy_only=False)
            lengths = column.value_lengths().to_numpy().astype(np.int64)
        columns[name] = (lengths, values.copy())
    return table.schema, table.column("sequence_id").to_pylist(), columns


def put_columns(
    case: Case,
    entry: dict[str, Any],
    schema: pa.Schema,
    names: list[str],
    columns: Columns,
    rows_per_batch: int,
) -> None:
    """Writes the columns as the shard of ``entry``, and into that what they add up to."""
    arrays = [pa.array(names, pa.string())]
    for each in [*schema][1:]:
        lengths, values = columns[each.name]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        if pa.types.is_binary(each.type):
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
            arrays.append(pa.Array.from_buffers(pa.binary(), len(lengths), buffers))
        else:
            arrays.append(
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, each.type.value_type))
            )
    whole = pa.RecordBatch.from_arrays(arrays, schema=schema)
    batches = [whole.slice(start, rows_per_batch) for start in range(0, len(whole), rows_per_batch)]
    case.files[entry["path"]] = data = written(batches, schema, "zstd")
    content = ContentHash()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        for index in range(file.num_record_batches):
            content.update(file.get_batch(index))
    u = case.base.store.scalar_step
    tail, target = columns["tail_step"][1], columns["target_logprob"][1]
    counts = columns.get("sample_count_plane", (None, np.empty(0, np.uint8)))[1]
    entry |= {
        "sequences": len(names),
        "sequences_per_batch": rows_per_batch,
        "content_sha256": content.hexdigest(),
        "tokens": len(columns["input_ids"][1]),
        "positions": len(columns["positions"][1]),
        "entries": max(0, int(columns["head_size"][1].sum(dtype=np.int64))),
        "draws": int(counts.sum(dtype=np.int64)),
        "head_mass_sum": float((1 - np.where(tail == 65535, 0, np.exp(-u * tail))).sum()),
        "target_nll_sum": float(-np.where(np.isfinite(target), target, 0).sum(dtype=np.float64)),
    }
