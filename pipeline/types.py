"""The types that the steps of the teacher stage pass on.

Tokenisation yields a ``Sequence``. An engine yields ``PendingScores``, which are read into a
``Scored``. ``logitcask.pipeline.distribution.keep`` makes a cached sequence from a ``Sequence`` and
its ``Scored``.
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
    loss_mask:   bool[n]; token ``t`` is learnt if ``loss_mask[t]``. ``loss_mask[0]`` is always
                 False, because no position predicts the first token.
    writer_logprob: float32[P], nats, of the targets of the kept positions, by the model that wrote
                 the text, if it is not the teacher; else None.
    chosen_ids:  int32[P, C], at the kept positions, ids that this model finds the most probable,
                 padded at the end with -1; None if they are not noted. The teacher scores them.
    """

    sequence_id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    writer_logprob: NDArray[np.float32] | None = None
    chosen_ids: NDArray[np.int32] | None = None

    def positions(self) -> NDArray[np.int32]:
        """int32[P]: the kept positions, ascending: every ``i`` with token ``i + 1`` in the loss
        mask.
        """
        return np.flatnonzero(self.loss_mask[1:]).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The engine's scores of one sequence: ``n - 1`` rows, of which row ``i`` predicts token
    ``i + 1``.

    ids:              int32[n-1, K], the teacher's K most probable ids, by falling logprob.
    logprobs:         float32[n-1, K], nats, at temperature 1.
    target_ids:       int32[n-1], the tokens that the engine reports as scored; must equal
                      ``input_ids[1:]``.
    target_logprob:   float32[n-1], nats.
    target_rank:      int32[n-1], number of ids with a higher logprob than the target (0 = the
                      argmax).
    draws:            n-1 rows, in numpy: the head's size, the draws from the tail, the entropy.
    positions:        None, or int32[R], ascending: the rows present, if only some are.
                      ``target_ids`` has n - 1 entries in either case.
    chosen_logprobs:  None, or float32[P, C], nats, of the sequence's ``chosen_ids``, at its kept
                      positions; -inf for padding.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    target_ids: NDArray[np.int32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    draws: Draws
    positions: NDArray[np.int32] | None = None
    chosen_logprobs: NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, Any]:
        """All arrays by name, also those of the draws; None for an absent one."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        draws = own.pop("draws")
        return own | {field.name: getattr(draws, field.name) for field in fields(draws)}


@dataclass(frozen=True, slots=True, eq=False)
class PendingScores:
    """An engine's scores of one sequence in the engine's own form, so that another thread can read
    them.

    nbytes: their approximate size in memory.
    scored: reads them; can be called once. It reads the kept positions only, if the engine can
            separate them.
    """

    nbytes: int
    scored: Callable[[], Scored]
