"""Sequences with smaller heads and fewer draws, made without a teacher.

Entries that leave a head join the tail: their mass is added to it. New draws are taken from these
entries and from the old draws, each of which has the weight of its share of the old tail. Estimates
from such draws stay unbiased.

Shapes: P kept positions, K head entries, T sets of S draws, C candidates for a new draw.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.sequence import CachedSequence, TailSamples


def narrow(sequence: CachedSequence, store: StoreSettings, source: str) -> CachedSequence:
    """The sequence with the settings ``store``, which must not need more than the sequence has.

    ``source``: fingerprint of the sequence's cache. New draws depend on it. If two derivations in a
    row used the same random points, the second would choose among the results of the same points,
    which is biased.
    """
    ids, logprobs = sequence.ids, sequence.logprobs
    size = head_sizes(logprobs, store)
    leaves = (np.arange(ids.shape[1]) >= size[:, None]) & (ids >= 0)
    width = int(size.max(initial=0))
    mass = np.where(leaves, np.exp(logprobs.astype(np.float64)), 0).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.minimum(np.logaddexp(sequence.tail_logprob.astype(np.float64), np.log(mass)), 0)
    return replace(
        sequence,
        ids=np.where(leaves, -1, ids)[:, :width],
        logprobs=np.where(leaves, -np.inf, logprobs)[:, :width].astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        entropy=sequence.entropy if store.entropy else None,
        samples=_redraw(sequence, leaves, tail, store, source) if store.tail_samples else None,
    )


def head_sizes(logprobs: NDArray[np.float32], store: StoreSettings) -> NDArray[np.int64]:
    """int64[P]: entries of each padded head [P, K] that a cache with these settings keeps."""
    stored = ~np.isneginf(logprobs)
    keep = stored & (np.arange(logprobs.shape[1]) < store.top_k)
    if store.min_probability is not None:
        # Half a step of tolerance: an entry that was above the bound before rounding is kept.
        keep &= logprobs >= np.log(store.min_probability) - store.logprob_step / 2
    if store.top_p is not None and store.top_p < 1:
        mass = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=1)
        keep[:, 1:] &= mass[:, :-1] < store.top_p
    size: NDArray[np.int64] = np.maximum(
        keep.sum(axis=1), np.minimum(stored.sum(axis=1), min(store.min_k, store.top_k))
    )
    return size


def _redraw(
    sequence: CachedSequence,
    leaves: NDArray[np.bool_],
    tail: NDArray[np.float64],
    store: StoreSettings,
    source: str,
) -> TailSamples:
    """Draws from the new tails. A position keeps its old draws if its head is unchanged and it
    needs as many draws as before.
    """
    assert sequence.samples is not None
    old = sequence.samples.ids[:, : store.sample_sets]
    draws = (old >= 0).sum(axis=2)
    wanted = _draws_wanted(tail, store)
    same = ~leaves.any(axis=1) & (draws[:, 0] == wanted)
    p, sets, _ = old.shape

    def candidates(
        of_head: NDArray[np.generic], of_draws: NDArray[np.generic]
    ) -> NDArray[np.generic]:
        return np.concatenate(
            [np.broadcast_to(of_head[:, None], (p, sets, of_head.shape[1])), of_draws], axis=2
        )

    share = (
        np.exp(sequence.tail_logprob.astype(np.float64))[:, None, None]
        / np.maximum(draws, 1)[..., None]
    )
    weights = candidates(
        np.where(leaves, np.exp(sequence.logprobs.astype(np.float64)), 0),
        np.where(old >= 0, share, 0),
    ).astype(np.float64)
    key = f"{store.seed} {source} {sequence.sequence_id}"
    at = _choose(weights.reshape(p * sets, weights.shape[2]), np.repeat(wanted, sets), key, store)
    at = at.reshape(p, sets, at.shape[1])

    def chosen(
        values: NDArray[np.generic], former: NDArray[np.generic], filler: float
    ) -> NDArray[np.generic]:
        new = (
            np.take_along_axis(values, np.maximum(at, 0), axis=2)
            if values.shape[2]
            else np.zeros(at.shape)
        )
        result = np.full((p, sets, max(at.shape[2], former.shape[2])), filler, former.dtype)
        result[:, :, : at.shape[2]] = np.where(at < 0, filler, new)
        result[same] = filler
        result[same, :, : former.shape[2]] = former[same]
        return result

    ids = chosen(candidates(sequence.ids, old), old, -1).astype(np.int32)
    used = int((ids >= 0).sum(axis=2).max(initial=0))
    logprobs = None
    if store.sample_logprobs:
        assert sequence.samples.logprobs is not None
        former = sequence.samples.logprobs[:, : store.sample_sets]
        logprobs = chosen(candidates(sequence.logprobs, former), former, -np.inf).astype(
            np.float32
        )[..., :used]
    return TailSamples(ids[..., :used], logprobs)


def _draws_wanted(tail: NDArray[np.float64], store: StoreSettings) -> NDArray[np.int64]:
    """int64[P]: draws per set of a tail with this logprob."""
    wanted = np.full(len(tail), store.tail_samples)
    if store.mass_per_sample is not None:
        wanted = np.clip(
            np.ceil(np.exp(tail) / store.mass_per_sample), 1, store.tail_samples
        ).astype(np.int64)
    return np.where(np.isneginf(tail), 0, wanted)


def _choose(
    weights: NDArray[np.float64], wanted: NDArray[np.int64], key: str, store: StoreSettings
) -> NDArray[np.int64]:
    """int64[R, most]: indices into each row of ``weights`` [R, C], drawn in proportion to them, and
    padded with -1.

    The method is the inverse CDF. Its random points depend only on ``key``, so a resumed run
    repeats them.
    """
    rows, count = weights.shape
    cdf = np.cumsum(weights, axis=1)
    total = cdf[:, -1:] if count else np.zeros((rows, 1))
    wanted = np.where(total[:, 0] > 0, wanted, 0)
    most = int(wanted.max(initial=0))
    digest = hashlib.sha256(key.encode()).digest()[:16]
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    number = np.arange(most)
    if store.draws == "independent":
        points = random.random((rows, most))
    else:
        points = (number + random.random((rows, 1))) / np.maximum(wanted, 1)[:, None]
    # One search over all rows at once: the CDF of row r goes from r to r + 1.
    row = np.arange(rows)[:, None]
    flat = (cdf / np.where(total > 0, total, 1) + row).reshape(-1)
    at = np.searchsorted(
        flat, (np.minimum(points, 1 - 1e-9) + row).reshape(-1), side="right"
    ).reshape(rows, most)
    # Rounding may put a point past the row's last candidate with weight.
    last = (
        count - 1 - np.argmax(weights[:, ::-1] > 0, axis=1) if count else np.zeros(rows, np.int64)
    )
    at = np.clip(at - row * count, 0, last[:, None])
    return np.where(number < wanted[:, None], at, -1)
