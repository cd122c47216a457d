"""Distillation losses on a sparse teacher.

A loss is a pure function ``loss(student_logits, teacher, **options) -> float32[P]``. It gets the
student's logits at P kept positions and the stored teacher there, and returns one value per
position. It never reduces: the trainer applies weights, masks and means. ``LOSSES`` maps the names
in configs to the functions, and ``SPECS`` maps them to their descriptions. docs/losses.md has both
in tables.
"""

from __future__ import annotations

from logitcask.train.losses.adaptive import adaptive_kl, self_evolution, taid, tail_aware
from logitcask.train.losses.alpha_beta import alpha_beta
from logitcask.train.losses.base import (
    LOSSES,
    SPECS,
    ChosenTail,
    Loss,
    LossSpec,
    LossState,
    PairTexts,
    SparseTeacher,
    TailDraws,
    loss,
)
from logitcask.train.losses.divergences import jsd, reverse_kl, skew_kl, skew_reverse_kl, tvd
from logitcask.train.losses.forward_kl import ce, forward_kl, random_sampling
from logitcask.train.losses.pairs import bild, dpkd_token, listmle, pairwise_logistic
from logitcask.train.losses.policy_gradient import policy_gradient
from logitcask.train.losses.preference import dpkd_sequence
from logitcask.train.losses.ranking import ranking
from logitcask.train.losses.student_pass import StudentPass

__all__ = [
    "LOSSES",
    "SPECS",
    "ChosenTail",
    "Loss",
    "LossSpec",
    "LossState",
    "PairTexts",
    "SparseTeacher",
    "StudentPass",
    "TailDraws",
    "adaptive_kl",
    "alpha_beta",
    "bild",
    "ce",
    "dpkd_sequence",
    "dpkd_token",
    "forward_kl",
    "jsd",
    "listmle",
    "loss",
    "pairwise_logistic",
    "policy_gradient",
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
