"""The invariants of SPEC.md, checked on every sequence before it is encoded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.schema import (
    MAX_DECODED_BYTES,
    MAX_DRAWS,
    TAIL_MASS_FLOOR,
    UNKNOWN_RANK,
)
from logitcask.cache_format.sequence import CachedSequence


def validate(sequence: CachedSequence, store: StoreSettings, *, mass_slack: float = 1e-3) -> None:
    """Raises UserError, naming sequence and problem, if it cannot be stored and read unchanged.

    ``mass_slack``: the amount by which the head mass may exceed 1, because of fp32 rounding, or,
    for logprobs that were stored before, because of the grid.
    """

    def require(holds: Any, what: str) -> None:
        if not holds:
            raise UserError(f"sequence {sequence.sequence_id[:100]!r} cannot be stored: {what}")

    n, p, vocab_size = len(sequence.input_ids), len(sequence.positions), store.vocab_size
    ids, logprobs = sequence.ids, sequence.logprobs
    require(n >= 1, "it has no tokens")
    require(
        sequence.loss_mask.shape == (n,),
        f"loss_mask has shape {sequence.loss_mask.shape}, expected ({n},)",
    )
    require(not sequence.loss_mask[0], "loss_mask[0] is set, but nothing predicts the first token")
    require(
        np.array_equal(sequence.positions, np.flatnonzero(sequence.loss_mask[1:])),
        "positions are not exactly those whose target is in the loss mask",
    )
    require(
        ids.ndim == 2 and ids.shape == logprobs.shape and len(ids) == p,
        f"head has shape {ids.shape}, {p} positions",
    )
    for name in ("tail_logprob", "target_logprob", "target_rank"):
        require(
            getattr(sequence, name).shape == (p,),
            f"{name} has shape {getattr(sequence, name).shape}, expected ({p},)",
        )
    in_range = int(sequence.input_ids.min()) >= 0 and int(sequence.input_ids.max()) < vocab_size
    require(in_range, f"token ids outside the vocabulary of {vocab_size}")
    require(
        (sequence.entropy is not None) == store.entropy,
        f"entropy is {'missing' if store.entropy else 'not asked for'}",
    )
    written = sequence.writer_logprob
    require(
        (written is not None) == store.writer_logprobs,
        f"the writer's logprobs are {'missing' if store.writer_logprobs else 'not asked for'}",
    )
    if written is not None:
        require(written.shape == (p,), f"writer_logprob has shape {written.shape}, expected ({p},)")
        require(
            (np.isfinite(written) & (written <= 1e-3)).all(),
            "a logprob of the writer is above 0 or not finite",
        )
    require(
        8 * max(1, ids.shape[1]) * p <= MAX_DECODED_BYTES,
        f"its head of {ids.shape} is larger than the format allows",
    )
    if p:
        _validate_head(sequence, store, mass_slack, require)
        _validate_targets(sequence, store, require)
    _validate_samples(sequence, store, require)
    _validate_chosen(sequence, store, mass_slack, require)


def _validate_head(
    sequence: CachedSequence, store: StoreSettings, mass_slack: float, require: Any
) -> None:
    ids, logprobs, tail = sequence.ids, sequence.logprobs, sequence.tail_logprob
    vocab_size, may_be_empty = store.vocab_size, store.tail_samples > 0
    stored = ids >= 0
    size = stored.sum(axis=1)
    require(may_be_empty or (size >= 1).all(), "a position has an empty head")
    if ids.size:
        full = bool(stored.all())
        require(full or (stored[:, 1:] <= stored[:, :-1]).all(), "head padding is not at the end")
        require(int(ids.max()) < vocab_size, f"head ids outside the vocabulary of {vocab_size}")
        # Padding is -inf at the end, so any rise in a row is a rise between stored entries.
        padded = logprobs if full else np.where(stored, logprobs, -np.inf)
        require(
            np.isfinite(logprobs if full else logprobs[stored]).all(),
            "a head logprob is not finite",
        )
        require((padded[:, 0] <= 1e-3).all(), "a head logprob is above 0")
        require((padded[:, 1:] <= padded[:, :-1]).all(), "head logprobs do not fall")
        require(
            (np.exp(padded).sum(axis=1, dtype=np.float64) <= 1 + mass_slack).all(),
            "a head's mass is above 1",
        )
    if not store.tail_known:
        require(np.isnan(tail).all(), "a tail has a mass, but the cache knows none")
        require((size < vocab_size).all(), "a head is everything, so the tail's mass is known")
        return
    require((tail <= 1e-3).all(), "a tail logprob is above 0 or not a number")
    require((np.isneginf(tail) == (size == vocab_size)).all(), "tail mass 0 without a full head")
    require((tail[~np.isneginf(tail)] > -255).all(), "a tail logprob is below -255 nats")


def _validate_targets(sequence: CachedSequence, store: StoreSettings, require: Any) -> None:
    vocab_size, target, ranks = store.vocab_size, sequence.target_logprob, sequence.target_rank
    unranked, unknown = ranks == UNKNOWN_RANK, np.isnan(target)
    if "targets" in store.unknown:
        require((unranked | ~unknown).all(), "a target has a rank, but no logprob")
        if "ranks" not in store.unknown:
            require((unknown | ~unranked).all(), "a target has a logprob, but no rank")
        target = target[~unknown]
    if {"targets", "ranks"} & set(store.unknown):
        ranks = ranks[~unranked]
    require(np.isfinite(target).all(), "a target logprob is not finite")
    require((target <= 1e-3).all(), "a target logprob is above 0")
    require(((ranks >= 0) & (ranks < vocab_size)).all(), "a target rank is outside the vocabulary")
    if sequence.entropy is not None:
        require(
            sequence.entropy.shape == sequence.target_rank.shape,
            f"entropy has shape {sequence.entropy.shape}",
        )
        within = (sequence.entropy >= -1e-3) & (sequence.entropy <= math.log(vocab_size) + 0.1)
        require(
            within.all(),
            "an entropy is negative, above that of the uniform distribution, or not a number",
        )


def _validate_samples(sequence: CachedSequence, store: StoreSettings, require: Any) -> None:
    samples, p = sequence.samples, len(sequence.positions)
    require(
        (samples is not None) == (store.tail_samples > 0),
        "its tail samples are not what the cache is to hold",
    )
    if samples is None:
        return
    shape = samples.ids.shape
    require(len(shape) == 3 and shape[:2] == (p, store.sample_sets), f"samples have shape {shape}")
    require(shape[2] <= MAX_DRAWS, f"{shape[2]} draws in a set; the format holds {MAX_DRAWS}")
    fits = store.bytes_per_draw * samples.ids.size <= MAX_DECODED_BYTES
    require(fits, f"its samples of {shape} are larger than the format allows")
    require(
        (samples.logprobs is not None) == store.sample_logprobs,
        "logprobs of samples are missing or not asked for",
    )
    drawn = samples.ids >= 0
    require((drawn[..., 1:] <= drawn[..., :-1]).all(), "sample padding is not at the end")
    highest = int(samples.ids.max(initial=0))
    require(highest < store.vocab_size, f"sample ids outside the vocabulary of {store.vocab_size}")
    draws = drawn.sum(axis=2)
    require((draws == draws[:, :1]).all(), "sets of one position have different numbers of draws")
    empty = ~draws.all(axis=1)
    tail = sequence.tail_logprob[empty]
    require(
        (tail <= math.log(TAIL_MASS_FLOOR) + 2 * store.scalar_step).all(),
        "a tail with mass has no draw in a set",
    )
    if samples.logprobs is not None:
        require(
            samples.logprobs.shape == shape,
            f"logprobs of samples have shape {samples.logprobs.shape}",
        )
        of_draws = samples.logprobs[drawn]
        require(
            (np.isfinite(of_draws) & (of_draws <= 1e-3)).all(),
            "a sample's logprob is above 0 or not finite",
        )


def _validate_chosen(
    sequence: CachedSequence, store: StoreSettings, mass_slack: float, require: Any
) -> None:
    chosen, p = sequence.chosen, len(sequence.positions)
    require(
        (chosen is not None) == (store.chosen_ids > 0),
        f"chosen ids are {'missing' if store.chosen_ids else 'not asked for'}",
    )
    if chosen is None:
        return
    ids, logprobs = chosen.ids, chosen.logprobs
    require(
        ids.ndim == 2 and ids.shape == logprobs.shape and len(ids) == p,
        f"chosen ids have shape {ids.shape}, their logprobs {logprobs.shape}, {p} positions",
    )
    stored = ids >= 0
    most = int(stored.sum(axis=1).max(initial=0))
    require(most <= store.chosen_ids, f"{most} ids are chosen, at most {store.chosen_ids} may be")
    fits = 8 * p * store.chosen_ids <= MAX_DECODED_BYTES
    require(fits, f"its chosen ids of {ids.shape} are larger than the format allows")
    require((stored[:, 1:] <= stored[:, :-1]).all(), "padding of chosen ids is not at the end")
    highest = int(ids.max(initial=0))
    require(highest < store.vocab_size, f"chosen ids outside the vocabulary of {store.vocab_size}")
    ordered = np.sort(np.where(stored, ids, -1 - np.arange(ids.shape[1])), axis=1)
    require((ordered[:, 1:] != ordered[:, :-1]).all(), "an id is chosen twice at a position")
    of_ids = logprobs[stored]
    require(
        (np.isfinite(of_ids) & (of_ids <= 1e-3)).all(),
        "a chosen id's logprob is above 0 or not finite",
    )
    others = chosen.outside(sequence.ids).logprobs.astype(np.float64)
    tail = np.exp(sequence.tail_logprob.astype(np.float64))
    room = tail * (2 * store.rounding + store.scalar_step) + mass_slack
    require(
        (np.exp(others).sum(axis=1) <= tail + room).all(),
        "chosen ids outside a head have more mass than its tail",
    )
