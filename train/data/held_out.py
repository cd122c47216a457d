"""The split of a cache's sequences into training and held-out ones: by their row of the data, and by
the texts of a reference cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format import CacheReader
from logitcask.cache_format.manifest import DataIdentity
from logitcask.train.data.same_text import ReferenceTexts, TokenHashes, token_hashes


def is_held_out(sequence_id: str, data: DataIdentity, share: float) -> bool:
    """Whether a sequence is held out. It depends only on ``row_of``, so it is the same in every
    run, order and subset of the data.
    """
    # Salted, because data may be ordered by a hash of its ids.
    digest = hashlib.sha256(f"held out\0{row_of(sequence_id, data)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def row_of(sequence_id: str, data: DataIdentity) -> str:
    """The row of the data from which a sequence was made. Pieces of one document and answers to one
    prompt have the same row.

    The ids of such sequences are ``row/number``. For answers this is always so. Pieces are
    recognised by their rows, whose ids are ``split/number`` or end in ``#number``. With other ids
    each piece counts as a row. The rows of a part, such as ``train[:10%]``, have the split's name.
    """
    if data.mask_policy == "generated":
        return sequence_id.rpartition("/")[0]
    split = "[^/]+"
    if data.split != "mixed":
        split = "|".join(map(re.escape, {data.split, data.split.partition("[")[0]}))
    piece = re.fullmatch(rf"((?:\d+/)*(?:{split})/\d+|.*#\d+)/\d+", sequence_id, re.DOTALL)
    return piece[1] if piece else sequence_id


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference cache, as far as other caches are compared with it: its data and its texts."""

    data: DataIdentity
    texts: ReferenceTexts

    @classmethod
    def read(cls, cache: CacheReader) -> Reference:
        """Reads three columns of the whole cache once, shard by shard."""
        data = cache.manifest.data
        batches = (
            _hashed([row_of(each, data) for each in ids], tokens, lengths, positions)
            for ids, tokens, lengths, positions in _columns(cache)
        )
        return cls(data, ReferenceTexts.of(batches))

    def is_of_same_source(self, data: DataIdentity) -> bool:
        """Whether equal names of rows mean equal rows: one source, unchanged."""
        return (data.source, data.split, data.stamp) == (
            self.data.source,
            self.data.split,
            self.data.stamp,
        )


@dataclass(frozen=True, eq=False)
class CacheIndex:
    """The data about a cache's N sequences that is read before any is decoded.

    held_out: bool[N], by their row. in_reference: bool[N], those of rows whose text is in the
    reference. tokens: int32[N]. kept: int32[N], kept positions. largest: int32[N], the largest
    token id of each.
    """

    held_out: NDArray[np.bool_]
    in_reference: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    kept: NDArray[np.int32]
    largest: NDArray[np.int32]


def read_index(cache: CacheReader, share: float, reference: Reference | None = None) -> CacheIndex:
    """Reads three columns of the whole cache once, shard by shard. ``share``: the part of the
    data's rows that is held out.

    A row with one sequence whose text is in ``reference`` is in it with all its sequences.
    """
    data = cache.manifest.data
    held_out: list[bool] = []
    found, rows = [np.zeros(0, np.bool_)], [np.zeros(0, np.uint64)]
    tokens, kept, largest = ([np.zeros(0, np.int32)] for _ in range(3))
    for ids, inputs, lengths, positions in _columns(cache):
        held_out += [is_held_out(sequence_id, data, share) for sequence_id in ids]
        tokens.append(lengths)
        kept.append(positions.value_lengths().to_numpy())
        # One 0 more, so that every start is a valid index.
        largest.append(
            np.maximum.reduceat(np.append(inputs, np.int32(0)), np.cumsum(lengths) - lengths)
        )
        if reference is not None:
            names = [row_of(sequence_id, data) for sequence_id in ids]
            hashes = _hashed(names, inputs, lengths, positions)
            same = reference.is_of_same_source(data)
            found.append(reference.texts.holds(hashes, by_name=same))
            rows.append(hashes.row)
    if reference is None:
        in_reference = np.zeros(len(held_out), np.bool_)
    else:
        row = np.concatenate(rows)
        in_reference = np.isin(row, row[np.concatenate(found)])
    return CacheIndex(
        np.array(held_out, np.bool_), in_reference, *map(np.concatenate, (tokens, kept, largest))
    )


def _columns(
    cache: CacheReader,
) -> Iterator[tuple[list[str], NDArray[np.int32], NDArray[np.int32], pa.ListArray]]:
    """For each record batch of N sequences: N ids, the tokens of all, int32[N] their lengths, and
    the column of their kept positions.
    """
    columns = (cache.iter_column(name) for name in ("sequence_id", "input_ids", "positions"))
    for ids, inputs, positions in zip(*columns, strict=True):
        lengths = inputs.value_lengths().to_numpy()
        yield ids.to_pylist(), inputs.flatten().to_numpy(), lengths, positions


def _hashed(
    rows: list[str],
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    positions: pa.ListArray,
) -> TokenHashes:
    kept = positions.value_lengths().to_numpy()
    # One 0 more, for sequences without kept positions at the end.
    flat = np.append(positions.flatten().to_numpy(), np.int32(0))
    first = np.where(kept > 0, flat[np.cumsum(kept) - kept], 0)
    return token_hashes(tokens, lengths, first, rows)
