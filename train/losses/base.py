"""What a loss sees of the teacher, and the shape every loss has.

Shapes: P kept positions, K head entries per position (padded), V vocabulary, S tail samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """The teacher's sparse next-token distributions at P positions, as tensors on one device.

    ids:            int64[P, K], head ids by falling logprob, padded with -1.
    logprobs:       float32[P, K], nats, padded with -inf.
    tail_logprob:   float32[P], log of the mass outside the head; -inf where the head is everything.
    target_ids:     int64[P], the tokens that really follow.
    target_logprob: float32[P], the teacher's logprob of them.
    vocab_size:     ids the teacher can predict; the student's V may be larger, never smaller.
    samples:        None, or int64[P, S] ids drawn from the tail (a format feature no release writes yet).
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    target_ids: Tensor
    target_logprob: Tensor
    vocab_size: int
    samples: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> SparseTeacher:
        """The same teacher at some of the positions (a view)."""
        return SparseTeacher(
            ids=self.ids[rows],
            logprobs=self.logprobs[rows],
            tail_logprob=self.tail_logprob[rows],
            target_ids=self.target_ids[rows],
            target_logprob=self.target_logprob[rows],
            vocab_size=self.vocab_size,
            samples=None if self.samples is None else self.samples[rows],
        )

    def to(self, device: torch.device | str) -> SparseTeacher:
        """The same teacher on another device."""
        return SparseTeacher(
            ids=self.ids.to(device),
            logprobs=self.logprobs.to(device),
            tail_logprob=self.tail_logprob.to(device),
            target_ids=self.target_ids.to(device),
            target_logprob=self.target_logprob.to(device),
            vocab_size=self.vocab_size,
            samples=None if self.samples is None else self.samples.to(device),
        )


Loss = Callable[..., Tensor]
"""``loss(student_logits [P, V], teacher, **options) -> float32[P]``, nats: a pure function, one value per position."""
