"""What a loss sees of the teacher, and the shape every loss has.

Shapes: P kept positions, K head entries per position (padded), V vocabulary, S tail samples (padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """The teacher's sparse next-token distributions at P positions, as tensors on one device.

    ids:             int64[P, K], head ids by falling logprob, padded with -1.
    logprobs:        float32[P, K], nats, padded with -inf.
    tail_logprob:    float32[P], log of the mass outside the head; -inf where the head is everything.
    target_ids:      int64[P], the tokens that really follow.
    target_logprob:  float32[P], the teacher's logprob of them.
    vocab_size:      ids the teacher can predict; the student's V may be larger, never smaller.
    samples:         None, or int64[P, S] ids drawn from the tail, repeats included, padded with -1. Each of a position's
                     draws stands for an equal share of its tail.
    sample_logprobs: None, or float32[P, S], padded with -inf.
    entropy:         None, or float32[P], nats, of the whole distribution.
    prior:           None, or float32[vocab_size], probabilities: how a tail may be spread where nothing is known of it.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    target_ids: Tensor
    target_logprob: Tensor
    vocab_size: int
    samples: Tensor | None = None
    sample_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    prior: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> SparseTeacher:
        """The same teacher at some of the positions (a view)."""
        return self._mapped(lambda name, value: value if name == "prior" else value[rows])

    def to(self, device: torch.device | str) -> SparseTeacher:
        """The same teacher on another device."""
        return self._mapped(lambda name, value: value.to(device))

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> SparseTeacher:
        tensors: dict[str, Any] = {
            field.name: change(field.name, value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    @property
    def sample_weights(self) -> Tensor:
        """float32[P, S]: the share of the whole distribution that each draw stands for, 0 for padding. Needs samples."""
        assert self.samples is not None
        drawn = self.samples >= 0
        share = self.tail_logprob.exp() / drawn.sum(1).clamp_min(1)
        return drawn * share.unsqueeze(1)


Loss = Callable[..., Tensor]
"""``loss(student_logits [P, V], teacher, **options) -> float32[P]``, nats: a pure function, one value per position."""
