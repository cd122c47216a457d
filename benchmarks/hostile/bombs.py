"""Bombs: small files that ask for a great deal."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa
from cases import Case
from shards import Columns, columns_of, metadata_of, put_columns

from logitcask.cache_format.schema import MAX_DECODED_BYTES


def forge_bomb(case: Case) -> None:
    entry, data = case.shard()
    case.pick(
        [
            bomb_planes,
            bomb_padding,
            bomb_samples,
            bomb_mask,
            bomb_name,
            bomb_manifest,
            bomb_prefixes,
        ]
    )(case, entry, data)


def one_row(schema: pa.Schema, tokens: int, kept: int) -> tuple[list[str], Columns]:
    """A row of ``tokens`` tokens whose last ``kept`` are learnt; everything but the mask and the
    positions is 0.
    """
    mask = np.zeros(tokens, np.bool_)
    mask[tokens - kept :] = True
    per_position = (
        "target_logprob",
        "target_rank",
        "tail_step",
        "head_size",
        "entropy_step",
        "sample_size",
    )
    columns: Columns = {}
    for each in [*schema][1:]:
        length = tokens if each.name == "input_ids" else kept if each.name in per_position else 0
        kind = np.uint8 if pa.types.is_binary(each.type) else each.type.value_type.to_pandas_dtype()
        columns[each.name] = np.array([length]), np.zeros(length, kind)
    columns["loss_mask"] = np.array([tokens]), mask
    columns["positions"] = (
        np.array([kept]),
        np.arange(tokens - kept - 1, tokens - 1, dtype=np.int32),
    )
    return ["bomb"], columns


def fill(columns: Columns, prefix: str, entries: int, value: int = 0) -> None:
    for name in columns:
        if name.startswith(prefix) and "plane" in name:
            columns[name] = np.array([entries]), np.full(entries, value, np.uint8)


def bomb_planes(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Heads that take hundreds of MiB on disk, below and above what a batch may have."""
    schema = columns_of(data)[0]
    kept = int(case.pick([1, 7, 300]))
    names, columns = one_row(schema, kept + 1, kept)
    each = int(case.pick([10_000_000, 60_000_000, 90_000_000, 200_000_000])) // kept
    columns["head_size"][1][:] = each
    fill(columns, "head_", each * kept, int(case.pick([0, 1])))
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_padding(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """One wide head among narrow ones: little on disk, up to the limit and more once it is
    padded.
    """
    schema = columns_of(data)[0]
    width = min(case.base.store.vocab_size, 65_000)
    kept = int(MAX_DECODED_BYTES * case.pick([0.2, 0.99, 1.01, 40]) / 8 / width)
    kept = min(kept, 3_000_000)
    names, columns = one_row(schema, kept + 1, kept)
    columns["head_size"][1][:] = 1
    columns["head_size"][1][kept // 2] = width
    fill(columns, "head_", width + kept - 1)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_samples(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """One large set of draws among empty ones."""
    schema = columns_of(data)[0]
    sets, kept = case.base.store.sample_sets, int(case.pick([1000, 200_000, 300_000, 3_000_000]))
    names, columns = one_row(schema, kept + 1, kept)
    if "sample_size" in columns:
        columns["sample_size"] = np.array([kept * sets]), np.zeros(kept * sets, np.int32)
        columns["sample_size"][1][5] = 1
        fill(columns, "sample_", 1)
        columns["sample_count_plane"] = np.array([1]), np.array([255], np.uint8)
    else:
        columns["head_size"][1][:] = 1
        fill(columns, "head_", kept)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_mask(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Flags take a bit in the file and a byte in memory."""
    schema = columns_of(data)[0]
    names, columns = one_row(schema, 2, 0)
    flags = int(case.pick([10_000_000, 800_000_000]))
    columns["loss_mask"] = np.array([flags]), np.zeros(flags, np.bool_)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_name(case: Case, entry: dict[str, Any], data: bytes) -> None:
    schema = columns_of(data)[0]
    _, columns = one_row(schema, 2, 1)
    name = "x" * int(case.pick([1_000_000, 100_000_000])) + case.pick(["", "\U0001f600"])
    put_columns(case, entry, schema, [name], columns, 1)
    case.seal()


def bomb_manifest(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Up to 65 MiB of JSON whose values take many times that in memory."""
    text = case.base.files["manifest.json"]
    size = int(case.pick([1 << 20, 63 << 20, 65 << 20]))
    unit = case.pick([b"[],", b"{},", b"1.5,", b'"",', b"1,", b" ", b'{"a":[]},', b"[[[]]],"])
    filler = unit * (size // len(unit))
    case.files["manifest.json"] = text.replace(
        b'"config": {', b'"config": {"x": [' + filler + b"1],", 1
    )


def bomb_prefixes(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """All buffers together claim to decompress to about what a batch may have."""
    changed = bytearray(data)
    for at in range(metadata_of(data)[1][1], len(data) - 8, 8):
        (value,) = struct.unpack_from("<q", data, at)
        # zstd's magic number.
        if 0 < value < 1 << 20 and data[at + 8 : at + 12] == b"\x28\xb5\x2f\xfd":
            struct.pack_into(
                "<q", changed, at, int(case.pick([1 << 20, 10 << 20, 20 << 20, 200 << 20]))
            )
    case.files[entry["path"]] = bytes(changed)
    case.seal()
