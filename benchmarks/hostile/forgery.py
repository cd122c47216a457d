"""Forged files: every hash fits, so that nothing but the decoder stands between the bytes and
the user.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from cases import Case
from damage import change_bytes, edit_manifest, flip_bits
from shards import arrow_file, metadata_of, stream_of, written, written_with_nulls

from logitcask.cache_format.shards.prior import TailPrior


def forge_manifest(case: Case) -> None:
    edit_manifest(case)
    case.seal()


def forge_bytes(case: Case) -> None:
    entry, data = case.shard()
    case.files[entry["path"]] = case.pick([flip_bits, change_bytes])(case, data)
    case.seal()


def forge_metadata(case: Case) -> None:
    """Words of the footer's and the messages' flatbuffers: offsets, vtables, lengths, counts,
    types.
    """
    entry, data = case.shard()
    changed = bytearray(data)
    for _ in range(case.pick([1, 1, 1, 2, 4])):
        start, stop = case.pick(metadata_of(data))
        put_word(case, changed, start, stop)
    case.files[entry["path"]] = bytes(changed)
    case.seal()


def put_word(case: Case, data: bytearray, start: int, stop: int) -> None:
    width = int(case.pick([1, 2, 4, 4, 8, 8]))
    at = start + width * int(case.rng.integers(0, max(1, (stop - start) // width)))
    if at + width > len(data):
        return
    old = int.from_bytes(data[at : at + width], "little")
    near = old + int(case.pick([-64, -24, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 24, 64]))
    new = case.pick(
        [
            near,
            near,
            0,
            1,
            -1,
            -2,
            2**7,
            2**15,
            2**31 - 1,
            2**31,
            2**40,
            2**62,
            2**63 - 1,
            2**63,
            old ^ 8,
        ]
    )
    data[at : at + width] = (new % 256**width).to_bytes(width, "little")


def forge_sizes(case: Case) -> None:
    """The eight bytes before compressed buffers, which say what they decompress to."""
    entry, data = case.shard()
    changed = bytearray(data)
    places = []
    for at in range(metadata_of(data)[1][1], len(data) - 8, 8):
        (value,) = struct.unpack_from("<q", data, at)
        if value == -1 or 0 < value < 1 << 20:
            places.append(at)
    for _ in range(case.pick([1, 1, 2, 40])):
        at = case.pick(places)
        (old,) = struct.unpack_from("<q", data, at)
        new = case.pick(
            [
                old + 1,
                old - 1,
                old * 2,
                0,
                1,
                -1,
                -2,
                -(2**63),
                2**20,
                2**28,
                2**31,
                2**34,
                2**62,
                2**63 - 1,
                8,
            ]
        )
        struct.pack_into("<q", changed, at, new)
    case.files[entry["path"]] = bytes(changed)
    case.seal()


def forge_prior(case: Case) -> None:
    """Another prior, or none, or one for a cache that had none."""
    size = case.base.store.vocab_size
    steps = case.rng.integers(0, 256, size).astype(np.uint8)
    sound = TailPrior(steps).to_bytes()
    column = pa.array(steps)
    data: bytes = case.pick(
        [
            lambda: sound,
            lambda: TailPrior(np.zeros(size, np.uint8)).to_bytes(),
            lambda: TailPrior(
                case.pick([steps[:-1], steps[:0], np.append(steps, 1).astype(np.uint8)])
            ).to_bytes(),
            lambda: flip_bits(case, sound),
            lambda: change_bytes(case, sound),
            lambda: case.shard()[1],
            lambda: arrow_file([("step", pa.array([None, *steps[1:].tolist()], pa.uint8()))]),
            lambda: arrow_file([("step", column.cast(pa.int32()))]),
            lambda: arrow_file([("step", column), ("more", column)]),
            lambda: arrow_file([("step", column.dictionary_encode())]),
            lambda: arrow_file([("step", column)], batches=case.pick([0, 2])),
            lambda: forged_words(case, sound),
            lambda: forged_words(case, sound),
            lambda: forged_words(case, sound),
        ]
    )()
    case.files["tail_prior.arrow"] = data
    case.manifest["tail_prior"] = {"path": "tail_prior.arrow", "bytes": 0, "sha256": "0" * 64}
    case.seal()


def forged_words(case: Case, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(case.pick([1, 2])):
        put_word(case, changed, *case.pick(metadata_of(data)))
    return bytes(changed)


def forge_structure(case: Case) -> None:
    """Valid Arrow files that are not shards, or shards of other rows than the manifest says."""
    entry, data = case.shard()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
    schema, first = batches[0].schema, batches[0]
    table = pa.Table.from_batches(batches).combine_chunks()
    compression = case.pick(["zstd", "zstd", "lz4", None])
    at = int(case.rng.integers(len(schema)))
    name = schema.names[at]

    def with_column(array: pa.Array, *, nullable: bool = False) -> bytes:
        changed = pa.schema(
            [*list(schema)[:at], pa.field(name, array.type, nullable), *list(schema)[at + 1 :]]
        )
        arrays = [*table.columns[:at], pa.chunked_array([array]), *table.columns[at + 1 :]]
        return whole(pa.Table.from_arrays(arrays, schema=changed))

    def whole(changed: pa.Table) -> bytes:
        cut = changed.to_batches(max_chunksize=2)
        return written(cut, changed.schema, compression)

    column = table.column(at).combine_chunks()
    values = column.to_pylist()
    with_null = [None, *values[1:]]
    inner_null = [[None, *each[1:]] if isinstance(each, list) and each else each for each in values]
    larger = {
        "list": lambda kind: pa.large_list(kind.value_type),
        "binary": lambda _: pa.large_binary(),
        "string": lambda _: pa.large_string(),
    }["list" if pa.types.is_list(column.type) else str(column.type)](column.type)
    choices: list[Callable[[], bytes]] = [
        lambda: with_column(column.cast(larger)),
        lambda: with_column(pa.array(with_null, column.type), nullable=True),
        lambda: written_with_nulls(table, at, with_null, compression),
        lambda: written_with_nulls(table, at, inner_null, compression),
        lambda: written_with_nulls(table, at, inner_null, compression),
        lambda: with_column(pa.array([[each] for each in values], pa.list_(column.type))),
        lambda: with_column(
            pa.array([{"x": each} for each in values], pa.struct([("x", column.type)]))
        ),
        lambda: with_column(pa.array([str(each) for each in values]).dictionary_encode()),
        lambda: with_column(pa.array(range(len(values)), pa.int64())),
        lambda: with_column(pa.nulls(len(values)), nullable=True),
        lambda: with_column(pa.array([str(each) for each in values], pa.string_view())),
        lambda: whole(table.append_column("more", [pa.array(range(len(table)))])),
        lambda: whole(table.drop_columns([name])),
        lambda: whole(table.select(list(reversed(schema.names)))),
        lambda: whole(
            table.rename_columns([each + "_" if each == name else each for each in schema.names])
        ),
        lambda: whole(table.replace_schema_metadata({"a": "b" * 1000})),
        lambda: written(table.to_batches(), schema, compression),
        lambda: written(table.to_batches(max_chunksize=1), schema, compression),
        lambda: written([*batches, first.slice(0, 0)], schema, compression),
        lambda: written([first.slice(0, 0), *batches], schema, compression),
        lambda: written([*batches, batches[-1]], schema, compression),
        lambda: written(batches[:-1], schema, compression),
        lambda: written([], schema, compression),
        lambda: written([first] * 300, schema, compression),
        lambda: written(list(reversed(batches)), schema, compression),
        lambda: written(batches, schema, compression),
        lambda: stream_of(batches),
    ]
    case.files[entry["path"]] = case.pick(choices)()
    if case.rng.random() < 0.3:
        entry["sequences"] = int(case.pick([0, 1, 2, 4, 600]))
    case.seal()
