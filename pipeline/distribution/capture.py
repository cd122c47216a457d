"""The request to a teacher for every position: the size of the head, the draws from the tail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Capture:
    """The request, which every backend fulfils in the same way.

    top_k:           largest number of entries of a head; 0 means only draws (random-sampling
                     distillation).
    min_k:           entries that a head always keeps, regardless of the next two rules (never more
                     than ``top_k``).
    top_p:           a head ends with the entry at which its mass reaches this.
    min_probability: a head ends before the first entry less probable than this.
    samples:         draws from the tail in each set; 0 for none. At most 255.
    sets:            independent sets of draws.
    mass_per_sample: probability per draw: a tail of mass m gets ceil(m / mass_per_sample) draws per
                     set, at least 1 and at most ``samples``. None: always ``samples`` draws.
    independent:     draws are independent of each other; else systematic: evenly spaced points of
                     the tail's CDF.
    seed:            of the draws.
    chosen:          ids at most that a sequence names itself at each kept position
                     (``Sequence.chosen_ids``), to be scored, too; 0 for none.
    """

    top_k: int
    min_k: int = 1
    top_p: float | None = None
    min_probability: float | None = None
    samples: int = 0
    sets: int = 1
    mass_per_sample: float | None = None
    independent: bool = False
    seed: int = 0
    chosen: int = 0

    @property
    def ragged(self) -> bool:
        """Whether heads may differ in size."""
        return self.top_p is not None or self.min_probability is not None

    @property
    def draws(self) -> int:
        """Draws per position, over all sets."""
        return self.samples * self.sets


def head_sizes(logprobs: NDArray[np.float32], capture: Capture) -> NDArray[np.int32]:
    """int32[R]: number of first entries of each row of ``logprobs`` [R, top_k] (descending, nats)
    that form the head.

    The engine's copy of this rule (``logitcask.pipeline.distribution.draws_torch``) must give the
    same sizes for the same float32 values.
    """
    rows, width = logprobs.shape
    size = np.full(rows, width, np.int32)
    if capture.min_probability is not None:
        size = np.minimum(
            size,
            (logprobs >= np.float32(np.log(capture.min_probability))).sum(axis=1, dtype=np.int32),
        )
    if capture.top_p is not None and width:
        before = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=1)[:, :-1]
        size = np.minimum(size, 1 + (before < capture.top_p).sum(axis=1, dtype=np.int32))
    return np.maximum(size, min(capture.min_k, width)).astype(np.int32)
