"""Teachers with more ids than the student: ids that the student lacks are removed.

An lm_head is padded to a round number of rows, and models of one family are padded differently:
Qwen2.5-7B has 152,064 rows, Qwen2.5-0.5B 151,936, and their tokenizer uses 151,665 ids. No text has
the id of a padding row, and a trained teacher gives such ids almost no mass. But heads and draws
may contain them.

Let C be the ids that both models have, and e the teacher's mass on the others. A position then has
p / (1 - e) on C. Every loss and metric is that between dense distributions over C. The part of e in
the head is known. The part in the tail is estimated from the draws. Without draws the whole tail
counts as part of C.

Shapes: P positions, K head entries (padded), T sets of S draws (padded).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, ChosenIds, TailSamples

MOST_LEFT_OUT = 0.01
"""Mean share of the teacher's mass that may be left out. Padding rows of trained models hold far
less.
"""


def rows_of(student: Any) -> int:
    """Ids that a causal language model both reads and predicts."""
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    return min(int(end.weight.shape[0]) for end in ends)


def left_out(sequence: CachedSequence, rows: int) -> NDArray[np.float64]:
    """float64[P]: the share of the teacher's mass on ids from ``rows`` up, from head and draws."""
    outside = np.exp(sequence.logprobs.astype(np.float64)).sum(axis=1, where=sequence.ids >= rows)
    if sequence.samples is not None:
        drawn, lost = _draws(sequence.samples, rows)
        outside += np.exp(sequence.tail_logprob.astype(np.float64)) * lost / np.maximum(drawn, 1)
    return outside


def _draws(samples: TailSamples, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64[P] each: numbers of all draws of a position, and of its draws from ``rows`` up."""
    return (samples.ids >= 0).sum(axis=(1, 2)), (samples.ids >= rows).sum(axis=(1, 2))


def restricted(sequence: CachedSequence, rows: int, vocab_size: int) -> CachedSequence:
    """The sequence with the teacher's distributions restricted to ids below ``rows``; the teacher
    predicts ``vocab_size`` ids.

    A target's rank is reduced by the removed head ids above it. Removed ids in the tail are
    unknown. ``input_ids`` must be below ``rows``.
    """
    in_samples = sequence.samples is not None and bool((sequence.samples.ids >= rows).any())
    in_chosen = sequence.chosen is not None and bool((sequence.chosen.ids >= rows).any())
    if not (in_samples or in_chosen or (sequence.ids >= rows).any()):
        return sequence
    head_lost = sequence.ids >= rows
    tail = np.exp(sequence.tail_logprob.astype(np.float64))
    ids, logprobs = _dropped(sequence.ids, sequence.logprobs, head_lost)
    size = int((ids >= 0).sum(axis=1).max(initial=0))
    samples, tail_share = sequence.samples, np.ones_like(tail)
    if samples is not None:
        drawn, lost = _draws(samples, rows)
        # If every draw of a tail was removed, the tail is small but not empty: as a cell it must
        # have some mass.
        tail_share = np.where(drawn > 0, np.maximum(drawn - lost, 0.5) / np.maximum(drawn, 1), 1)
    # 1 - e. If e is most of the mass, the difference would lose all digits, so the remaining mass
    # is summed instead.
    outside = left_out(sequence, rows)
    inside = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.nan_to_num(tail) * tail_share
    log_inside = np.where(
        outside < 0.5,
        np.log1p(-np.minimum(outside, 0.5)),
        np.log(np.maximum(inside, np.finfo(np.float64).tiny)),
    )

    def scaled(values: NDArray[Any]) -> NDArray[np.float32]:
        shift = log_inside.reshape(-1, *[1] * (values.ndim - 1))
        return np.minimum(values - shift, 0).astype(np.float32)

    if samples is not None:
        sample_ids, sample_logprobs = _dropped(samples.ids, samples.logprobs, samples.ids >= rows)
        samples = TailSamples(
            sample_ids, None if sample_logprobs is None else scaled(sample_logprobs)
        )
    chosen = sequence.chosen
    if chosen is not None:
        chosen_ids, chosen_logprobs = _dropped(chosen.ids, chosen.logprobs, chosen.ids >= rows)
        chosen = ChosenIds(chosen_ids, scaled(chosen_logprobs))
    entropy = sequence.entropy
    if entropy is not None:
        lost_entropy = _entropy_outside(sequence, rows, vocab_size)
        entropy = np.maximum((entropy - lost_entropy) * np.exp(-log_inside) + log_inside, 0).astype(
            np.float32
        )
    above = np.arange(head_lost.shape[1]) < sequence.target_rank[:, None]
    return replace(
        sequence,
        ids=ids[:, :size],
        logprobs=scaled(logprobs[:, :size]),
        tail_logprob=scaled(sequence.tail_logprob + np.log(tail_share)),
        target_logprob=scaled(sequence.target_logprob),
        target_rank=(sequence.target_rank - (head_lost & above).sum(axis=1)).astype(np.int32),
        entropy=entropy,
        samples=samples,
        chosen=chosen,
    )


def _dropped(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32] | None, lost: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], Any]:
    """Both [..., N] without the removed entries; the others move up, followed by padding."""
    order = np.argsort(lost | (ids < 0), axis=-1, kind="stable")
    kept = np.take_along_axis(np.where(lost, -1, ids), order, axis=-1)
    if logprobs is None:
        return kept, None
    return kept, np.take_along_axis(np.where(lost, np.float32(-np.inf), logprobs), order, axis=-1)


def _entropy_outside(sequence: CachedSequence, rows: int, vocab_size: int) -> NDArray[np.float64]:
    """float64[P], nats: the contribution of ids from ``rows`` up to the entropy, -p log p.

    Draws without logprobs count as if their mass were spread evenly over all these ids.
    """
    lost = sequence.ids >= rows
    log_p = np.where(lost, sequence.logprobs, 0).astype(np.float64)
    total = -(np.exp(log_p) * log_p).sum(axis=1, where=lost)
    if sequence.samples is None:
        return total
    drawn, count = _draws(sequence.samples, rows)
    # The mass that a draw represents.
    share = np.exp(sequence.tail_logprob.astype(np.float64)) / np.maximum(drawn, 1)
    if sequence.samples.logprobs is None:
        even = np.log(vocab_size - rows) - np.log(np.where(count > 0, share * count, 1))
        return np.asarray(total + share * count * even)
    surprise = np.where(sequence.samples.ids >= rows, -sequence.samples.logprobs, 0).astype(
        np.float64
    )
    return np.asarray(total + share * surprise.sum(axis=(1, 2)))
