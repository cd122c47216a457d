"""The KL between the teacher and a cache's distributions, computed from the cache itself.

A cache with entropies has the teacher's term of the KL exactly. The KL from truncated heads can
therefore be computed without the teacher, for the stored heads and for any smaller ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.prior import TailPrior


def reconstruction_kl(
    sequence: CachedSequence, size: NDArray[np.int64], vocab_size: int, prior: TailPrior | None
) -> NDArray[np.float64]:
    """float64[P], nats: KL of the teacher to its reconstruction from heads of ``size`` entries.

    The reconstruction is the head, and the remaining mass distributed by ``prior``, or evenly if
    that is None. An even tail gives the KL exactly, up to rounding. With a prior, its value on the
    stored tail is estimated from the tail samples. The estimate is unbiased if the prior was not
    made from these samples (with a prior from all draws of 30 thousand tokens, the KL is 3 % too
    small). Raises UserError for a sequence without entropies, or with a prior and without samples.
    """
    if sequence.entropy is None or (prior is not None and sequence.samples is None):
        raise UserError(
            "how near a reconstruction comes can be told only of a cache with entropies and tail samples"
        )
    stored = sequence.ids >= 0
    inside = (np.arange(sequence.ids.shape[1]) < size[:, None]) & stored
    p = np.where(stored, np.exp(sequence.logprobs.astype(np.float64)), 0)
    p_log_p = np.where(inside, p * np.where(stored, sequence.logprobs, 0), 0).sum(axis=1)
    old_tail = np.exp(sequence.tail_logprob.astype(np.float64))
    mass = old_tail + np.where(inside, 0, p).sum(axis=1)
    if prior is None:
        even = np.where(
            mass > 0, np.log(np.maximum(mass, 1e-300) / np.maximum(vocab_size - size, 1)), 0
        )
        return np.asarray(-sequence.entropy - p_log_p - mass * even, np.float64)
    assert sequence.samples is not None
    b = prior.probabilities()
    log_b = np.log(b)
    ids, drawn = np.where(stored, sequence.ids, 0), sequence.samples.ids >= 0
    of_draws = np.where(drawn, log_b[np.where(drawn, sequence.samples.ids, 0)], 0).sum(axis=(1, 2))
    expected = old_tail * of_draws / np.maximum(drawn.sum(axis=(1, 2)), 1)
    expected += np.where(inside, 0, p * log_b[ids]).sum(axis=1)
    outside = np.maximum(1 - np.where(inside, b[ids], 0).sum(axis=1), 1e-300)
    scale = np.where(mass > 0, np.log(np.maximum(mass, 1e-300) / outside), 0)
    return np.asarray(-sequence.entropy - p_log_p - mass * scale - expected, np.float64)
