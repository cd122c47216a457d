"""The types that travel through the teacher stage, and nothing else.

``Sequence`` comes out of tokenisation, ``Scored`` out of an engine (as ``PendingScores``, until it
is read), and ``logitcask.pipeline.distribution.keep`` turns a pair of them into what the cache
stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.distribution.draws import Draws


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
    target_ids:       int32[n-1], the tokens the engine says it scored; must equal
                      ``input_ids[1:]``.
    target_logprob:   float32[n-1], nats.
    target_rank:      int32[n-1], how many ids have a higher logprob than the target (0 = the
                      argmax).
    draws:            of n-1 rows, in numpy: how many of the ids form the head, what was drawn from
                      the tail, and the entropy.
    positions:        int32[R], rising: the only rows that are here, where not all are.
                      ``target_ids`` has all n - 1 even so.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    target_ids: NDArray[np.int32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    draws: Draws
    positions: NDArray[np.int32] | None = None

    def arrays(self) -> dict[str, Any]:
        """Its arrays by name, those of its draws included; None for what is not there."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        draws = own.pop("draws")
        return own | {field.name: getattr(draws, field.name) for field in fields(draws)}


@dataclass(frozen=True, slots=True, eq=False)
class PendingScores:
    """An engine's scores of one sequence, in the engine's own form: others may do the work of
    reading them.

    nbytes: about what they take in memory as they are.
    scored: reads them, once; at the kept positions alone where the engine can tell them apart.
    """

    nbytes: int
    scored: Callable[[], Scored]
