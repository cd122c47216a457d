"""The split of a cache's sequences into training and held-out ones, by their row of the data."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CacheReader
from logitcask.cache_format.manifest import DataIdentity


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
class CacheIndex:
    """The data about a cache's N sequences that is read before any is decoded.

    held_out: bool[N]. tokens: int32[N]. kept: int32[N], kept positions. largest: int32[N], the
    largest token id of each.
    """

    held_out: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    kept: NDArray[np.int32]
    largest: NDArray[np.int32]


def read_index(cache: CacheReader, share: float) -> CacheIndex:
    """Reads three columns of the whole cache once, shard by shard. ``share``: the part of the
    data's rows that is held out.
    """
    data = cache.manifest.data
    held_out: list[bool] = []
    tokens, kept, largest = ([np.zeros(0, np.int32)] for _ in range(3))
    columns = (cache.iter_column(name) for name in ("sequence_id", "input_ids", "positions"))
    for ids, inputs, positions in zip(*columns, strict=True):
        held_out += [is_held_out(sequence_id, data, share) for sequence_id in ids.to_pylist()]
        tokens.append(inputs.value_lengths().to_numpy())
        kept.append(positions.value_lengths().to_numpy())
        # One 0 more, so that every start is a valid index.
        ids, starts = (
            np.append(inputs.flatten().to_numpy(), np.int32(0)),
            np.cumsum(tokens[-1]) - tokens[-1],
        )
        largest.append(np.maximum.reduceat(ids, starts))
    return CacheIndex(np.array(held_out, np.bool_), *map(np.concatenate, (tokens, kept, largest)))
