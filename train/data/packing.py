"""Packing: several sequences in one row that do not attend to each other. It needs less padding and
gives the same loss as the separate sequences.

If there is no attention mask, transformers separates packed sequences by position ids that restart.
Eager, sdpa and flex attention then get a block-diagonal mask, and flash attention the lengths. Some
architectures do not support this: recurrent models carry state from one sequence to the next, and
others compute their own positions. The student is therefore tested before training.

Shapes: R rows, T tokens of the longest row, D sequences (documents).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from logitcask.cache_format import CachedSequence
from logitcask.train.data.batch import at_positions
from logitcask.train.data.order import Ints, Shuffle, Units

PACKED_TOGETHER = 4096
"""Sequences among which companions for a row are looked for: enough to fill rows, few enough to
keep neighbours near.
"""


def fill_rows(tokens: Ints, capacity: int) -> list[list[int]]:
    """Puts sequences into rows of at most ``capacity`` tokens: the longest first, each into the row
    that it fits best. Returns indices into ``tokens``.

    Raises ValueError for a sequence that is longer than a row.
    """
    if len(tokens) and tokens.max() > capacity:
        raise ValueError(f"a sequence of {tokens.max()} tokens for rows of {capacity}")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), by room
    for index in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[index])
        at = bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        if room > size:
            insort(open_rows, (room - size, row))
    return rows


def packed_units(single: Units, capacity: int, *, seed: tuple[int, ...], shuffle: Shuffle) -> Units:
    """Rows of ``single``'s sequences, made once, so every epoch has the same number of rows.

    With ``shuffle: all`` a row has random sequences. With ``shards`` or ``batches`` they come from
    the same shard or block.
    """
    count = len(single)
    order = (
        np.random.default_rng([*seed, 4]).permutation(count)
        if shuffle == "all"
        else np.arange(count)
    )
    border = {"shards": single.shard, "batches": single.block}.get(
        shuffle, np.zeros(count, np.int32)
    )[order]
    starts = [0, *(np.flatnonzero(np.diff(border)) + 1).tolist(), count]
    rows: list[Ints] = []
    for start, stop in pairwise(starts):
        for at in range(start, stop, PACKED_TOGETHER):
            part = order[at : min(at + PACKED_TOGETHER, stop)]
            rows += [part[row] for row in fill_rows(single.tokens[part], capacity)]
    members = np.concatenate(rows)
    first = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    sums = {
        name: np.add.reduceat(getattr(single, name)[members], first[:-1])
        for name in ("tokens", "kept")
    }
    leading = members[first[:-1]]
    return Units(first, members, **sums, shard=single.shard[leading], block=single.block[leading])


def collate_packed(rows: list[list[CachedSequence]], *, flat: bool = False) -> dict[str, Any]:
    """R rows of sequences as one batch; kept positions as in ``collate``.

    input_ids, position_ids: int64[R, T]; position ids start at 0 in every sequence, and are 0 in
          the padding.
    flat: one row [1, all tokens] without padding instead, for flash attention, with the borders of
          sequences in cu_seq_lens_q = cu_seq_lens_k, int32[D + 1], and max_length_q = max_length_k,
          int.
    """
    if flat:
        rows = [[sequence for row in rows for sequence in row]]
    longest = max(sum(len(s) for s in row) for row in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    position_ids = np.zeros_like(input_ids)
    sequences, kept = [], []
    for number, row in enumerate(rows):
        at = 0
        for sequence in row:
            n = len(sequence)
            input_ids[number, at : at + n] = sequence.input_ids
            position_ids[number, at : at + n] = np.arange(n)
            kept.append(sequence.positions.astype(np.int64) + (number * longest + at))
            sequences.append(sequence)
            at += n
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "kept": torch.from_numpy(np.concatenate(kept)),
        **at_positions(sequences),
    }
    return {**batch, **borders([len(s) for s in sequences])} if flat else batch


def borders(lengths: list[int]) -> dict[str, Any]:
    """Borders of sequences for flash attention's varlen kernels, computed once for all layers."""
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }
