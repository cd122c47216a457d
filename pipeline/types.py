"""The types that travel through the teacher stage, and nothing else.

``Sequence`` comes out of tokenisation, ``Scored`` out of an engine (as ``PendingScores``, until it
is read), and ``logitcask.pipeline.distribution.keep`` turns a pair of them into what the cache
stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One tokenised example.

    sequence_id: stable name of the example, unique in its data set.
    input_ids:   int32[n], n >= 1.
    loss_mask:   bool[n]; token ``t`` is learnt where ``loss_mask[t]``. ``loss_mask[0]`` is always
                 False: nothing predicts the first token.
    """

    sequence_id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def positions(self) -> NDArray[np.int32]:
        """int32[P]: the kept positions, rising: every ``i`` whose target token ``i + 1`` is in
        the loss mask.
        """
        return np.flatnonzero(self.loss_mask[1:]).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One sequence as the engine scored it: ``n - 1`` rows, row ``i`` being the prediction of token
    ``i + 1``.

    ids:              int32[n-1, K], the teacher's K most probable ids, by falling logprob.
    logprobs:         float32[n-1, K], nats, at temperature 1.
    head_size:        int32[n-1], how many of them form the head
                      (``logitcask.pipeline.distribution.capture``); the tail is everything else.
    target_ids:       int32[n-1], the tokens the engine says it scored; must equal
                      ``input_ids[1:]``.
    target_logprob:   float32[n-1], nats.
    target_rank:      int32[n-1], how many ids have a higher logprob than the target (0 = the
                      argmax).
    samples:          int32[n-1, T, S], ids drawn from the tail in proportion to their probability:
                      T sets of up to S draws, padded at the end with -1; repeats are draws too. T
                      and S are 0 where none were asked for.
    sample_logprobs:  float32[n-1, T, S], their logprobs, padded with -inf.
    entropy:          float32[n-1], nats, of the whole distribution; None where the engine was asked
                      for no draws.
    positions:        int32[R], rising: the only rows that are here, where not all are.
                      ``target_ids`` has all n - 1 even so.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    head_size: NDArray[np.int32]
    target_ids: NDArray[np.int32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    samples: NDArray[np.int32]
    sample_logprobs: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None
    positions: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PendingScores:
    """An engine's scores of one sequence, in the engine's own form: others may do the work of
    reading them.

    nbytes: about what they take in memory as they are.
    scored: reads them, once; at the kept positions alone where the engine can tell them apart.
    """

    nbytes: int
    scored: Callable[[], Scored]
