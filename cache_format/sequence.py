"""``CachedSequence``: what a reader returns and a writer takes, the same type both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class CachedSequence:
    """One sequence and the teacher's sparse distribution at each of its P kept positions.

    sequence_id:    stable, unique name.
    input_ids:      int32[n].
    loss_mask:      bool[n], by token.
    positions:      int32[P], the kept positions, rising; position i predicts token i + 1.
    ids:            int32[P, K], head ids by falling logprob, padded with -1; K is the largest k here.
    logprobs:       float32[P, K], nats, padded with -inf.
    tail_logprob:   float32[P], log of the mass outside the head; -inf where the head is everything.
    target_logprob: float32[P], the teacher's logprob of token i + 1.
    target_rank:    int32[P], 0 = the teacher's argmax.
    samples:        None; tail samples are a reserved feature of the format.
    """

    sequence_id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprob: NDArray[np.float32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    samples: Any = None

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return len(self.input_ids)

    @property
    def target_ids(self) -> NDArray[np.int32]:
        """int32[P]: the tokens that really follow the kept positions."""
        return self.input_ids[self.positions + 1]
