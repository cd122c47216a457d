"""Answers as vLLM's ``/v1/completions`` gives them: a dictionary ``{id: {logprob, rank,
decoded_token}}`` per position, the target first.
"""

from __future__ import annotations

from itertools import islice

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.sequence import CachedSequence

_MINUS_INFINITY = -9999.0
"""vLLM's replacement for -inf, which JSON does not have."""


# gc=False: many of these exist for a short time, and none refers to other objects.
class _Entry(msgspec.Struct, gc=False):
    logprob: float
    rank: int
    decoded_token: None = None


Rows = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def rows_of(sequence: CachedSequence, k: int) -> Rows:
    """The entries of all positions, one after another: ids, logprobs, ranks from 1 on; and
    int64[P], how many each position has.

    The target comes first. It has the rank of its place in the head, so that ranks are 1 to k; a
    target outside the ``k`` most probable ids is an entry more. Its logprob is the one that is
    stored for the target, on a finer grid than the head's, moved between its neighbours in the head
    where the two grids disagree: logprobs fall with the rank.
    """
    targets, p = sequence.target_ids.astype(np.int64), len(sequence.positions)
    width = sequence.ids.shape[1]
    at_target = sequence.ids == targets[:, None]
    inside = at_target.any(axis=1)
    size = (sequence.ids >= 0).sum(axis=1)
    place = np.where(inside, at_target.argmax(axis=1) if width else 0, size)
    logprobs = sequence.logprobs.astype(np.float64)
    rows = np.arange(p)
    padded = np.column_stack([np.zeros(p), logprobs, np.full(p, -np.inf)])
    # The neighbours above and below; 0 and -inf at the ends.
    lowest = np.where(inside, padded[rows, np.minimum(place + 2, width + 1)], -np.inf)
    target = np.clip(sequence.target_logprob.astype(np.float64), lowest, padded[rows, place])
    # Below the head no stored id is less probable; ties at its end may be.
    rank = np.where(inside, place, np.maximum(sequence.target_rank, size)) + 1
    head = np.broadcast_to(np.arange(1, width + 1), (p, width))[:, :k]
    others = ~at_target[:, :k]
    listed = np.column_stack([np.ones(p, bool), others])
    ids = np.column_stack([targets, sequence.ids[:, :k]])[listed]
    values = np.column_stack([target, logprobs[:, :k]])[listed]
    ranks = np.column_stack([rank, head])[listed]
    return ids, np.maximum(values, _MINUS_INFINITY), ranks, listed.sum(axis=1)


def prompt_logprobs(sequence: CachedSequence, k: int) -> bytes:
    """JSON of the field ``prompt_logprobs`` with heads of ``k`` entries: a dictionary per token;
    null for the first token, which nothing predicts, and for those whose position is not kept.
    """
    ids, logprobs, ranks, counts = rows_of(sequence, k)
    entries = zip(ids.tolist(), map(_Entry, logprobs.tolist(), ranks.tolist()), strict=True)
    rows: list[dict[int, _Entry] | None] = [None] * len(sequence)
    for position, count in zip(sequence.positions.tolist(), counts.tolist(), strict=True):
        rows[position + 1] = dict(islice(entries, count))
    return msgspec.json.encode(rows)
