"""Distillation losses on a sparse teacher.

A loss is a pure function ``loss(student_logits, teacher, **options) -> float32[P]``: it sees the
student's logits at P kept positions and what the cache stored there, and returns one value per
position. It never reduces: weights, masks and means are the trainer's. ``LOSSES`` maps the names
that configs use to the functions, ``SPECS`` to what they say of themselves; docs/losses.md is the
table of both.
"""

from __future__ import annotations

from logitcask.train.losses.adaptive import adaptive_kl, self_evolution, taid, tail_aware
from logitcask.train.losses.alpha_beta import alpha_beta
from logitcask.train.losses.base import (
    LOSSES,
    SPECS,
    Loss,
    LossSpec,
    LossState,
    SparseTeacher,
    TailDraws,
)
from logitcask.train.losses.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from logitcask.train.losses.forward_kl import ce, forward_kl, random_sampling
from logitcask.train.losses.pairs import bild, dpkd_token, listmle, pairwise_logistic
from logitcask.train.losses.ranking import ranking
from logitcask.train.losses.student_pass import StudentPass

__all__ = [
    "LOSSES",
    "SPECS",
    "Loss",
    "LossSpec",
    "LossState",
    "SparseTeacher",
    "StudentPass",
    "TailDraws",
    "adaptive_kl",
    "alpha_beta",
    "bild",
    "ce",
    "dpkd_token",
    "forward_kl",
    "jsd",
    "listmle",
    "pairwise_logistic",
    "random_sampling",
    "ranking",
    "reverse_kl",
    "self_evolution",
    "skew_kl",
    "skew_reverse_kl",
    "taid",
    "tail_aware",
    "tvd",
]
