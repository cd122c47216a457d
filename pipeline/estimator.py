"""What to keep of a teacher's rows: from ``Scored`` to ``CachedSequence``. Alignment is checked here, once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_format import CachedSequence, LogitcaskError
from cache_format.schema import TAIL_MASS_FLOOR
from pipeline.sequence import Scored, Sequence


class MisalignedScoresError(LogitcaskError):
    """The engine did not score the tokens it was given; nothing of it may be stored."""

    exit_code = 1


def check_alignment(sequence: Sequence, scored: Scored) -> None:
    """Raises MisalignedScoresError unless there are n - 1 rows and row i scored token i + 1."""
    n, rows = len(sequence.input_ids), len(scored.target_ids)
    if rows != n - 1 or len(scored.ids) != n - 1:
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


def tail_logprob(logprobs: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    """float32[P]: log of the mass outside each full head of ``logprobs`` [P, K], clamped as SPEC.md section 5 says."""
    top_k = logprobs.shape[1]
    if top_k == vocab_size:
        return np.full(len(logprobs), -np.inf, np.float32)
    exact = logprobs.astype(np.float64)
    mass = np.maximum(-np.expm1(np.log(np.exp(exact).sum(axis=1))), TAIL_MASS_FLOOR)
    most = (vocab_size - top_k) * np.exp(exact[:, -1])
    tail: NDArray[np.float32] = np.log(np.minimum(mass, most)).astype(np.float32)
    return tail


def keep_top_k(sequence: Sequence, scored: Scored, top_k: int, vocab_size: int) -> CachedSequence:
    """The kept positions of ``scored``, each with its first ``top_k`` entries and the exact mass of the rest."""
    check_alignment(sequence, scored)
    positions = sequence.positions()
    logprobs = scored.logprobs[positions, :top_k]
    return CachedSequence(
        sequence_id=sequence.sequence_id,
        input_ids=sequence.input_ids,
        loss_mask=sequence.loss_mask,
        positions=positions,
        ids=scored.ids[positions, :top_k],
        logprobs=logprobs,
        tail_logprob=tail_logprob(logprobs, vocab_size),
        target_logprob=scored.target_logprob[positions],
        target_rank=scored.target_rank[positions],
    )


def keep_nothing(sequence: Sequence) -> CachedSequence:
    """A sequence without kept positions: stored for its place in the data, never scored."""
    return CachedSequence(
        sequence_id=sequence.sequence_id,
        input_ids=sequence.input_ids,
        loss_mask=sequence.loss_mask,
        positions=np.empty(0, np.int32),
        ids=np.empty((0, 0), np.int32),
        logprobs=np.empty((0, 0), np.float32),
        tail_logprob=np.empty(0, np.float32),
        target_logprob=np.empty(0, np.float32),
        target_rank=np.empty(0, np.int32),
    )
