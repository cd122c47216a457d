"""What a teacher is asked to return at every position: how large a head, how many draws from the
tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Capture:
    """The request that every backend answers in the same way.

    top_k:           entries of the head at most; 0 asks for draws alone (random-sampling
                     distillation).
    min_k:           entries that a head keeps whatever the two rules below say (never more than
                     ``top_k``).
    top_p:           a head ends with the entry at which its mass reaches this.
    min_probability: a head ends before the first entry less probable than this.
    samples:         draws from the tail in each set; 0 for none. At most 255.
    sets:            independent sets of draws.
    mass_per_sample: probability that one draw should stand for: a tail of mass m gets ceil(m /
    mass_per_sample) draws
                     per set, at least 1 and at most ``samples``. None: ``samples`` draws
                     everywhere.
    independent:     draws are independent of each other; else systematic: evenly spaced points of
                     the tail's CDF.
    seed:            of the draws.
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

    @property
    def ragged(self) -> bool:
        """Whether heads may differ in size."""
        return self.top_p is not None or self.min_probability is not None

    @property
    def draws(self) -> int:
        """Draws per position, over all sets."""
        return self.samples * self.sets


def head_sizes(logprobs: NDArray[np.float32], capture: Capture) -> NDArray[np.int32]:
    """int32[R]: how many of the first entries of each row of ``logprobs`` [R, top_k] (falling,
    nats) form the head.

    The engine's own copy of this rule (``logitcask.pipeline.distribution.draws``) must come to the
    same sizes from the same float32 values.
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
