"""Other layouts for the same distributions, re-created from what is published about them.

``Arrow`` and ``Parquet`` hold what a Logitcask cache holds, as a user would write it by hand. The
others hold what their owners store of a distribution and nothing more (no ids of the text, no mask,
no target), which favours them. The layouts are what the owners' documents say; the code is ours, in
numpy over whole arrays, and faster than some of the originals.

Shapes: P positions, K head entries, V vocabulary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence

ZSTD_LEVEL = 1
Heads = Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]
"""Per sequence: ids int32[P, K], padded with -1, and logprobs float32[P, K], padded with -inf."""


@dataclass(frozen=True)
class Peer:
    """One layout. ``decode`` returns arrays that a batch can be made of."""

    name: str
    layout: str
    k: int
    """Entries of the heads that ``encode`` is given; 0: it is given draws."""
    encode: Callable[[list[CachedSequence]], bytes]
    decode: Callable[[bytes], Heads]
    whole: bool = False
    """Whether it holds ids, mask, targets and tail masses as well."""


@dataclass(frozen=True)
class Quoted:
    """A figure that was measured elsewhere and is not repeated here."""

    name: str
    k: int
    bytes_per_token: float
    kl: float | None
    tv: float | None
    source: str


def peers(k: int, rows_per_batch: int, vocab_size: int) -> list[Peer]:
    """All layouts; those that leave it to the user store heads of ``k`` entries."""
    return [
        plain_arrow(k, rows_per_batch),
        plain_parquet(k),
        _megatron(64, rows_per_batch),
        _distillkit("DistillKit recommended", 128, 16, (0, 1, 2, 3, 4, "sqrt"), vocab_size),
        _distillkit("DistillKit budget", 50, 1, (0, 1, "sqrt"), vocab_size),
        _random_sampling(50),
        _json_lines("EasyDistill", 10, _as_objects, _from_objects),
        _json_lines("NeMo-Aligner", 100, _as_lists, _from_lists),
    ]


_EARLIER = "an earlier study: SmolLM2-135M, another small text sample, the original code"
QUOTED = [
    Quoted("DistillKit recommended, its own fp32 fit", 128, 312, 0.301, 0.102, _EARLIER),
    Quoted("DistillKit recommended, normalize_t", 128, 312, 0.205, 0.059, _EARLIER),
    Quoted("DistillKit budget", 50, 114, 0.412, 0.141, _EARLIER),
    Quoted("RS-KD, 12 unique of 50 draws", 0, 36, None, None, "arXiv 2503.16870"),
    Quoted("Megatron-LM, zstd", 64, 197, None, None, _EARLIER),
    Quoted("EasyDistill, JSON lines", 10, 291, None, None, _EARLIER),
    Quoted("NeMo-Aligner, JSON lines", 100, 2600, None, None, _EARLIER),
]


def plain_arrow(k: int, rows_per_batch: int) -> Peer:
    """One row a sequence, flat lists, ids int32 and logprobs float16, zstd as Arrow does it."""

    def encode(sequences: list[CachedSequence]) -> bytes:
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(
            compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL), use_threads=False
        )
        batches = [
            _table(sequences[at : at + rows_per_batch])
            for at in range(0, len(sequences), rows_per_batch)
        ]
        with pa.ipc.new_file(sink, batches[0].schema, options=options) as file:
            for batch in batches:
                file.write_batch(batch)
        return sink.getvalue()

    def decode(data: bytes) -> Heads:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        with pa.ipc.open_file(pa.BufferReader(data), options=options) as file:
            for at in range(file.num_record_batches):
                yield from _rows(file.get_batch(at))

    return Peer(
        "Arrow int32 + fp16", "record batches of flat lists, zstd", k, encode, decode, whole=True
    )


def plain_parquet(k: int) -> Peer:
    """The same columns in Parquet, with its defaults and zstd."""

    def encode(sequences: list[CachedSequence]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(
            pa.Table.from_batches([_table(sequences)]),
            sink,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
        )
        return sink.getvalue()

    def decode(data: bytes) -> Heads:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        for batch in table.to_batches():
            yield from _rows(batch)

    return Peer(
        "Parquet int32 + fp16", "one table of flat lists, zstd", k, encode, decode, whole=True
    )


def _table(sequences: list[CachedSequence]) -> pa.RecordBatch:
    def lists(name: str, dtype: Any) -> pa.ListArray:
        values = [getattr(s, name).reshape(-1).astype(dtype, copy=False) for s in sequences]
        ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(values)))

    columns = {
        "input_ids": np.int32,
        "loss_mask": np.bool_,
        "ids": np.int32,
        "logprobs": np.float16,
        "tail_logprob": np.float32,
        "target_logprob": np.float32,
        "target_rank": np.int32,
    }
    return pa.record_batch({name: lists(name, dtype) for name, dtype in columns.items()})


def _rows(batch: pa.RecordBatch) -> Heads:
    flat: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for name in batch.schema.names:
        column = batch.column(name)
        values = column.values.to_numpy(zero_copy_only=False)
        flat[name] = (column.offsets.to_numpy(), values)
    # All columns are turned into arrays that a batch is made of, as our reader does; the heads are
    # what is handed on.
    for row in range(batch.num_rows):
        own = {
            name: values[ends[row] : ends[row + 1]].copy() for name, (ends, values) in flat.items()
        }
        positions = len(own["target_rank"])
        yield (
            own["ids"].reshape(positions, -1),
            own["logprobs"].reshape(positions, -1).astype(np.float32),
        )


def _megatron(k: int, rows_per_payload: int) -> Peer:
    """Per training step: 16-bit logprobs, the low 16 bits of the ids, their 17th bits as bools;
    zstd over all of it.
    """
    codec = pa.Codec("zstd", compression_level=3)

    def encode(sequences: list[CachedSequence]) -> bytes:
        parts = []
        for at in range(0, len(sequences), rows_per_payload):
            group = sequences[at : at + rows_per_payload]
            ids = np.concatenate([s.ids for s in group])
            payload = b"".join(
                (
                    np.concatenate([s.logprobs for s in group]).astype(np.float16).tobytes(),
                    (ids & 0xFFFF).astype(np.uint16).tobytes(),
                    (ids >> 16).astype(np.bool_).tobytes(),
                )
            )
            parts.append(
                (
                    np.array([len(s.ids) for s in group]),
                    len(payload),
                    codec.compress(payload, asbytes=True),
                )
            )
        return _framed(parts)

    def decode(data: bytes) -> Heads:
        for lengths, size, packed in _unframed(data):
            raw = np.frombuffer(codec.decompress(packed, decompressed_size=size), np.uint8)
            entries = int(lengths.sum()) * k
            logprobs = raw[: 2 * entries].view(np.float16).astype(np.float32).reshape(-1, k)
            ids = raw[2 * entries : 4 * entries].view(np.uint16).astype(np.int32)
            ids |= raw[4 * entries :].astype(np.int32) << 16
            ends = np.cumsum(lengths)[:-1]
            yield from zip(
                np.split(ids.reshape(-1, k), ends), np.split(logprobs, ends), strict=True
            )

    return Peer(
        "Megatron-LM", "16-bit logprobs, 16 + 1 bits of ids, zstd per step", k, encode, decode
    )


def _framed(parts: list[tuple[NDArray[np.int64], int, bytes]]) -> bytes:
    """Lengths of sequences, size before compression, payload: what a tar file's headers would
    say.
    """
    return b"".join(
        np.array([len(lengths), *lengths, size, len(packed)], np.int32).tobytes() + packed
        for lengths, size, packed in parts
    )


def _unframed(data: bytes) -> list[tuple[NDArray[np.int32], int, bytes]]:
    parts, at = [], 0
    while at < len(data):
        (count,) = np.frombuffer(data, np.int32, 1, at)
        lengths = np.frombuffer(data, np.int32, count, at + 4)
        size, packed = np.frombuffer(data, np.int32, 2, at + 4 + 4 * count)
        at += 12 + 4 * int(count)
        parts.append((lengths, int(size), data[at : at + packed]))
        at += int(packed)
    return parts


def _distillkit(
    name: str, k: int, exact: int, terms: tuple[int | str, ...], vocab_size: int
) -> Peer:
    """Ids at the vocabulary's bits, the first logprobs in bfloat16, a polynomial in the rank for
    the others; uncompressed.

    The fit here is over ranks scaled to [0, 1], its better variant (``normalize_t``).
    """
    assert (vocab_size - 1).bit_length() == 16, "this re-creation packs ids of 16 bits"
    t = np.linspace(0, 1, k - exact)
    basis = np.stack([np.sqrt(t) if term == "sqrt" else t ** float(term) for term in terms], axis=1)
    solve = np.linalg.pinv(basis).T.astype(np.float32)
    curve = basis.T.astype(np.float32)
    width = 2 * k + 2 * exact + 4 * len(terms)

    def encode(sequences: list[CachedSequence]) -> bytes:
        parts = []
        for s in sequences:
            packed = np.empty((len(s.ids), width), np.uint8)
            packed[:, : 2 * k] = s.ids.astype(np.uint16).view(np.uint8)
            # bfloat16: the upper half of a float32, rounded.
            bits = np.ascontiguousarray(s.logprobs[:, :exact]).view(np.uint32) + np.uint32(0x8000)
            packed[:, 2 * k : 2 * k + 2 * exact] = (bits >> 16).astype(np.uint16).view(np.uint8)
            packed[:, 2 * k + 2 * exact :] = (s.logprobs[:, exact:] @ solve).view(np.uint8)
            parts.append((np.array([len(s.ids)]), packed.size, packed.tobytes()))
        return _framed(parts)

    def decode(data: bytes) -> Heads:
        for (positions,), _, raw in _unframed(data):
            packed = np.frombuffer(raw, np.uint8).reshape(positions, width)
            ids = np.ascontiguousarray(packed[:, : 2 * k]).view(np.uint16).astype(np.int32)
            first = (
                np.ascontiguousarray(packed[:, 2 * k : 2 * k + 2 * exact])
                .view(np.uint16)
                .astype(np.uint32)
                << 16
            )
            fitted = np.ascontiguousarray(packed[:, 2 * k + 2 * exact :]).view(np.float32) @ curve
            yield ids, np.concatenate([first.view(np.float32), fitted], axis=1)

    return Peer(
        name, f"16-bit ids, {exact} bfloat16, {len(terms)} fp32 coefficients", k, encode, decode
    )


def _random_sampling(draws: int) -> Peer:
    """RS-KD: 3 bytes per distinct draw, 17 bits of id and 7 of count; a byte per position says
    how many. Uncompressed.
    """

    def encode(sequences: list[CachedSequence]) -> bytes:
        parts = []
        for s in sequences:
            assert s.samples is not None
            ids = np.sort(s.samples.ids[:, 0], axis=1)
            first = np.ones(ids.shape, bool)
            first[:, 1:] = ids[:, 1:] != ids[:, :-1]
            counts = np.diff(np.flatnonzero(first), append=ids.size)
            words = (
                (ids[first].astype(np.uint32) << 7 | counts.astype(np.uint32))
                .view(np.uint8)
                .reshape(-1, 4)
            )
            data = first.sum(axis=1).astype(np.uint8).tobytes() + words[:, :3].tobytes()
            parts.append((np.array([len(ids)]), len(data), data))
        return _framed(parts)

    def decode(data: bytes) -> Heads:
        for (positions,), _, raw in _unframed(data):
            packed = np.frombuffer(raw, np.uint8)
            sizes = packed[:positions].astype(np.int64)
            octets = np.zeros((int(sizes.sum()), 4), np.uint8)
            octets[:, :3] = packed[positions:].reshape(-1, 3)
            words = octets.view(np.uint32)[:, 0]
            inside = np.arange(int(sizes.max())) < sizes[:, None]
            ids = np.full(inside.shape, -1, np.int32)
            ids[inside] = words >> 7
            logprobs = np.full(inside.shape, -np.inf, np.float32)
            logprobs[inside] = np.log((words & 127).astype(np.float32) / np.float32(draws))
            yield ids, logprobs

    return Peer(
        f"RS-KD, {draws} draws", "17-bit id + 7-bit count per distinct draw", 0, encode, decode
    )


def _json_lines(
    name: str, k: int, pack: Callable[[CachedSequence], Any], unpack: Callable[[Any, int], Any]
) -> Peer:
    """A JSON document per sequence and line, every number in decimal."""

    def encode(sequences: list[CachedSequence]) -> bytes:
        return "".join(json.dumps(pack(s)) + "\n" for s in sequences).encode()

    def decode(data: bytes) -> Heads:
        return (unpack(json.loads(line), k) for line in data.splitlines())

    return Peer(name, "JSON lines", k, encode, decode)


def _as_objects(s: CachedSequence) -> Any:
    rows = zip(s.ids.tolist(), s.logprobs.astype(np.float64).tolist(), strict=True)
    return [dict(zip(map(str, ids), logprobs, strict=True)) for ids, logprobs in rows]


def _from_objects(rows: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    ids = np.array([list(map(int, row)) for row in rows], np.int32).reshape(-1, k)
    return ids, np.array([list(row.values()) for row in rows], np.float32).reshape(-1, k)


def _as_lists(s: CachedSequence) -> Any:
    return {"token_ids": s.ids.tolist(), "logits": s.logprobs.astype(np.float64).tolist()}


def _from_lists(document: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    ids = np.array(document["token_ids"], np.int32).reshape(-1, k)
    return ids, np.array(document["logits"], np.float32).reshape(-1, k)
