"""The stored part of a teacher's rows: from ``Scored`` to ``CachedSequence``, alignment checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import (
    CachedSequence,
    ChosenIds,
    LogitcaskError,
    TailSamples,
    UserError,
)
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.schema import TAIL_MASS_FLOOR
from logitcask.pipeline.types import Scored, Sequence


class MisalignedScoresError(LogitcaskError):
    """The engine did not score the given tokens, so its rows must not be stored."""

    exit_code = 1


def check_alignment(sequence: Sequence, scored: Scored) -> None:
    """Raises MisalignedScoresError unless there are n - 1 rows and row i scored token i + 1."""
    n, rows = len(sequence.input_ids), len(scored.target_ids)
    expected = n - 1 if scored.positions is None else len(scored.positions)
    if rows != n - 1 or len(scored.ids) != expected:
        raise MisalignedScoresError(
            f"the engine returned {rows} rows for sequence {sequence.sequence_id!r} of {n} tokens; expected {n - 1}. "
            "This is a fault of the engine or of its settings: please report it with the engine's version"
        )
    wrong = np.flatnonzero(scored.target_ids != sequence.input_ids[1:])
    if len(wrong):
        at = int(wrong[0])
        raise MisalignedScoresError(
            f"row {at} of sequence {sequence.sequence_id!r} scores token {scored.target_ids[at]}, but token "
            f"{sequence.input_ids[at + 1]} follows there. This is a fault of the engine or of its settings: please report it"
        )


def not_a_number(place: str) -> UserError:
    """The error for a teacher with NaN or infinite logits at ``place``: causes and remedies."""
    return UserError(
        f"the teacher's logprobs are NaN {place}: its arithmetic overflows, as that of models made for bfloat16 does in float16 "
        "(set teacher.dtype to bfloat16 or float32), or its weights are damaged (fetch them again)"
    )


def check_numbers(scored: Scored, place: str) -> None:
    """Raises UserError if a logprob in ``scored`` is NaN. One NaN logit makes its whole row NaN."""
    parts = (scored.target_logprob, scored.logprobs, scored.chosen_logprobs)
    if any(part is not None and np.isnan(part).any() for part in parts):
        raise not_a_number(place)


def tail_logprob(
    logprobs: NDArray[np.float32], size: NDArray[np.int32], vocab_size: int
) -> NDArray[np.float32]:
    """float32[P]: log of the mass outside the first ``size`` of ``logprobs`` [P, K].

    Clamped (SPEC.md section 5); -inf if the head is the whole vocabulary.
    """
    inside = np.arange(logprobs.shape[1]) < size[:, None]
    head = np.where(inside, logprobs, -np.inf).astype(np.float64)
    with np.errstate(divide="ignore"):
        mass = np.maximum(-np.expm1(np.log(np.exp(head).sum(axis=1))), TAIL_MASS_FLOOR)
        # No id of the tail is more probable than the head's last entry; without a head there is no
        # such bound.
        last = head.min(axis=1, where=inside, initial=0)
        tail = np.minimum(
            np.log(mass), np.where(size == vocab_size, -np.inf, np.log(vocab_size - size) + last)
        )
    return tail.astype(np.float32)


def keep(sequence: Sequence, scored: Scored, store: StoreSettings) -> CachedSequence:
    """The kept positions of ``scored``: the heads, the mass of the tail, and the draws from it.

    Entries of probability 0 (ids that the engine masks) are never part of a head.
    """
    check_alignment(sequence, scored)
    check_numbers(scored, f"in sequence {sequence.sequence_id[:100]!r}")
    positions = sequence.positions()
    # If the engine's rows are already those of the kept positions, they are used unchanged.
    rows = positions if scored.positions is None else np.searchsorted(scored.positions, positions)
    draws = scored.draws
    size = draws.head_size[rows]
    width = int(size.max()) if len(size) else 0
    ids, logprobs = scored.ids[rows, :width], scored.logprobs[rows, :width]
    inside = (np.arange(width) < size[:, None]) & ~np.isneginf(logprobs)
    size = inside.sum(axis=1, dtype=np.int32)
    samples = None
    if store.tail_samples:
        drawn = draws.sample_logprobs[rows] if store.sample_logprobs else None
        samples = TailSamples(draws.samples[rows], drawn)
    return CachedSequence(
        sequence_id=sequence.sequence_id,
        input_ids=sequence.input_ids,
        loss_mask=sequence.loss_mask,
        positions=positions,
        ids=np.where(inside, ids, -1),
        logprobs=np.where(inside, logprobs, -np.inf).astype(np.float32),
        tail_logprob=tail_logprob(logprobs, size, store.vocab_size),
        target_logprob=scored.target_logprob[rows],
        target_rank=scored.target_rank[rows],
        entropy=draws.entropy[rows] if store.entropy and draws.entropy is not None else None,
        samples=samples,
        writer_logprob=sequence.writer_logprob if store.writer_logprobs else None,
        chosen=_chosen(sequence, scored) if store.chosen_ids else None,
    )


def _chosen(sequence: Sequence, scored: Scored) -> ChosenIds:
    """The ids that the writer has chosen, with the teacher's logprobs, without those of probability
    0. Raises MisalignedScoresError if the engine did not score them.
    """
    ids, logprobs = sequence.chosen_ids, scored.chosen_logprobs
    if ids is None or logprobs is None or ids.shape != logprobs.shape:
        found = [None if each is None else each.shape for each in (ids, logprobs)]
        raise MisalignedScoresError(
            f"sequence {sequence.sequence_id!r} has chosen ids of shape {found[0]}, and the engine returned scores of shape "
            f"{found[1]}. This is a fault of the engine or of its settings: please report it with the engine's version"
        )
    kept = (ids >= 0) & ~np.isneginf(logprobs)
    order = np.argsort(~kept, axis=1, kind="stable")
    return ChosenIds(
        np.take_along_axis(np.where(kept, ids, -1), order, axis=1).astype(np.int32),
        np.take_along_axis(np.where(kept, logprobs, -np.inf), order, axis=1).astype(np.float32),
    )


def keep_nothing(sequence: Sequence, store: StoreSettings) -> CachedSequence:
    """A sequence without kept positions: stored for its place in the data, never scored."""
    none = np.empty(0, np.float32)
    return CachedSequence(
        sequence_id=sequence.sequence_id,
        input_ids=sequence.input_ids,
        loss_mask=sequence.loss_mask,
        positions=np.empty(0, np.int32),
        ids=np.empty((0, 0), np.int32),
        logprobs=np.empty((0, 0), np.float32),
        tail_logprob=none,
        target_logprob=none,
        target_rank=np.empty(0, np.int32),
        entropy=none if store.entropy else None,
        samples=_no_samples(store) if store.tail_samples else None,
        writer_logprob=none if store.writer_logprobs else None,
        chosen=ChosenIds(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))
        if store.chosen_ids
        else None,
    )


def _no_samples(store: StoreSettings) -> TailSamples:
    shape = (0, store.sample_sets, 0)
    return TailSamples(
        np.empty(shape, np.int32), np.empty(shape, np.float32) if store.sample_logprobs else None
    )
