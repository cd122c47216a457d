"""Distillation losses on a sparse teacher.

A loss is a pure function ``loss(student_logits, teacher, **options) -> float32[P]``: it sees the student's logits at P
kept positions and what the cache stored there, and returns one value per position. It never reduces: weights, masks and
means are the trainer's. ``LOSSES`` maps the names that configs use to the functions.

    forward_kl   KL(teacher || student)                  unbiased with tail samples, else a reconstruction's or a lower bound
    ranking      1 - Spearman over both top-k (RLKD)     exact up to ties among ids missing from the head
"""

from __future__ import annotations

from train.losses.base import Loss, SparseTeacher
from train.losses.forward_kl import forward_kl
from train.losses.ranking import ranking

LOSSES: dict[str, Loss] = {"forward_kl": forward_kl, "ranking": ranking}

__all__ = ["LOSSES", "Loss", "SparseTeacher", "forward_kl", "ranking"]
