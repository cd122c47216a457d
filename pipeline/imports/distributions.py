"""What a layout holds of a sequence, as a sequence of a cache.

Shapes: R rows, P kept positions, K entries (padded).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.schema import UNKNOWN_RANK
from logitcask.pipeline.distribution.keep import tail_logprob
from logitcask.pipeline.imports.base import Held

_FARTHEST = 128.0  # nats below a row's first entry; what is lower is padding, which some layouts write as numbers
_SAME = 1e-6  # nats; an id that stands twice in a row must have the same value


def sorted_rows(held: Held) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, values), each [R, K], by falling value, padded with -1 and -inf; each id once.

    Raises UserError if an id stands twice in a row with different values, and for a value of +inf:
    padding would be the most probable entry then.
    """
    if np.isposinf(held.values).any():
        raise UserError(
            f"{held.name} has the value inf, expected logprobs or logits; numbers of 16 bits may have overflowed"
        )
    there = (held.ids >= 0) & np.isfinite(held.values)
    values = np.where(there, held.values, -np.inf)
    there &= values >= values.max(axis=1, initial=-np.inf, keepdims=True) - _FARTHEST
    values = np.where(there, values, -np.inf)
    order = np.argsort(-values, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1)
    ids = np.take_along_axis(np.where(there, held.ids, -1), order, axis=1)
    by_id = np.argsort(ids, axis=1, kind="stable")
    in_order = np.take_along_axis(ids, by_id, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        its = np.take_along_axis(values, by_id, axis=1)
        apart = np.abs(np.diff(its, axis=1, prepend=its[:, :1]))[:, 1:]
        if (apart[twice] > _SAME).any():
            raise UserError(
                f"{held.name}: an id stands twice in row {row}, with different values; the data is damaged, or the settings "
                "of its codec (vocab_size, k) are others"
            )
        repeated = np.zeros(ids.shape, np.bool_)
        np.put_along_axis(repeated, by_id[:, 1:], twice, axis=1)
        order = np.argsort(repeated, axis=1, kind="stable")
        ids = np.take_along_axis(np.where(repeated, -1, ids), order, axis=1)
        values = np.take_along_axis(np.where(repeated, -np.inf, values), order, axis=1)
    return ids, values


def positions_of(held: Held, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[P]: the rows that are kept: those with an entry, about a token that is learnt."""
    kept = (ids >= 0).any(axis=1)
    if held.learnt is not None:
        kept &= held.learnt[held.first + 1 : held.first + 1 + len(ids)]
    return np.flatnonzero(kept)


def log_masses(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[R]: log of the sum of exp over each row; rows have an entry."""
    largest = values.max(axis=1, initial=-np.inf, keepdims=True)
    sums = np.exp(values - largest).sum(axis=1)
    return np.asarray(np.log(sums) + largest[:, 0], np.float64)


def without_forced(
    ids: NDArray[np.int64], values: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """float64[P]: values of the targets that may have been forced into the rows, which are taken
    out of ``ids`` and ``values`` [P, K]; NaN for others.

    A target in the last place may be far from the most probable ids, and others between them may
    be missing. Targets in other places are among the most probable.
    """
    size = (ids >= 0).sum(axis=1)
    at, row = np.maximum(size - 1, 0), np.arange(len(ids))
    forced = (size > 1) & (ids[row, at] == targets)
    found = np.where(forced, values[row, at], np.nan)
    ids[row[forced], at[forced]] = -1
    values[row[forced], at[forced]] = -np.inf
    return found


def as_sequence(
    held: Held, name: str, store: StoreSettings, *, logits: bool, forced: bool
) -> CachedSequence:
    """The sequence ``name`` of a cache with these settings.

    logits: whether values are logits. A row that is no logits and has a mass above 1 is scaled to
    1. forced: as in ``Layout``.
    """
    ids, values = sorted_rows(held)
    kept = positions_of(held, ids)
    positions = (held.first + kept).astype(np.int32)
    ids, values = ids[kept], values[kept]
    n = len(held.input_ids)
    mask = np.zeros(n, np.bool_)
    mask[positions + 1] = True
    targets = held.input_ids[positions + 1]
    excess = log_masses(values) if len(values) else np.zeros(0)
    # Logits are scaled to a mass of 1, and so are logprobs whose rounding made more of it.
    values = values - (excess if logits else np.maximum(excess, 0))[:, None]
    of_target = np.full(len(ids), np.nan)
    if forced:
        of_target = without_forced(ids, values, targets)
    width = int((ids >= 0).sum(axis=1).max(initial=0))
    ids, logprobs = ids[:, :width], values[:, :width].astype(np.float32)
    size = (ids >= 0).sum(axis=1)
    hit = ids == targets[:, None]
    inside = hit.any(axis=1)
    in_head = np.where(hit, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    rank = (logprobs > in_head[:, None]).sum(axis=1)
    tail = np.full(len(ids), np.nan, np.float32)
    if store.tail_known:
        tail = tail_logprob(logprobs, size.astype(np.int32), store.vocab_size)
    return CachedSequence(
        sequence_id=name,
        input_ids=held.input_ids.astype(np.int32),
        loss_mask=mask,
        positions=positions,
        ids=ids.astype(np.int32),
        logprobs=logprobs,
        tail_logprob=tail,
        target_logprob=np.where(inside, in_head, of_target).astype(np.float32),
        target_rank=np.where(inside, rank, UNKNOWN_RANK).astype(np.int32),
    )
