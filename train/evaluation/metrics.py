"""Metrics of a student: agreement with the teacher's order of the top ids, and calibration.

Top-1, CR@k, MOR@k (arXiv 2409.12545) and the rank correlation are exact from a cache if the head
holds at least k entries. The teacher's order is the stored order, which was fixed before rounding,
so equal stored logprobs are not ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, no_grad

from logitcask.train.evaluation.names import MOST_NATS
from logitcask.train.losses.base import SparseTeacher
from logitcask.train.losses.ranking import ranking

BINS = 15
"""Of equal width, into which confidences are sorted for the calibration error."""


class RankAgreement(NamedTuple):
    """Per position; the mean of ``identical`` is CR@k, the mean of ``overlap`` is MOR@k.

    top_1:     bool[P], both have the same most probable id.
    overlap:   float32[P], share of the k most probable ids that both have.
    identical: bool[P], both have the same k most probable ids in the same order.
    """

    top_1: Tensor
    overlap: Tensor
    identical: Tensor


@no_grad()
def rank_agreement(student_logits: Tensor, teacher: SparseTeacher, k: int) -> RankAgreement:
    """Compares both top-k at each position; student_logits [P, V], 1 <= k <= V, no gradient.

    If a head holds fewer than k ids, ``overlap`` is a lower bound and ``identical`` is False.
    Without a head all are 0.
    """
    student_Pk, teacher_Pk = student_logits.topk(k, dim=1).indices, teacher.ids[:, :k]
    shared_P = (student_Pk.unsqueeze(2) == teacher_Pk.unsqueeze(1)).sum((1, 2))
    width = teacher_Pk.shape[1]
    same_Pk = student_Pk[:, :width] == teacher_Pk
    return RankAgreement(
        top_1=same_Pk[:, 0] if width else same_Pk.new_zeros(len(same_Pk)),
        overlap=shared_P.float() / k,
        identical=same_Pk.all(1) & (width == k),
    )


@no_grad()
def rank_correlation(student_logits: Tensor, teacher: SparseTeacher, k: int) -> Tensor:
    """float32[P]: Spearman's correlation over the union of both top-k, between -1 and 1 (RLKD's
    loss with hard ranks).

    Ids of the student's top-k outside the head share the ranks below it. Without a head the
    correlation is 0.
    """
    order = -torch.arange(
        teacher.ids.shape[1], device=teacher.ids.device, dtype=teacher.logprobs.dtype
    )
    ordered = replace(teacher, logprobs=torch.where(teacher.ids >= 0, order, -torch.inf))
    # Differences of logits are far above this strength. Exact ties share a rank.
    correlation = 1 - ranking(student_logits, ordered, k=k, strength=1e-6)
    return correlation.where((teacher.ids >= 0).any(1), 0)


class Calibration:
    """Expected calibration error of the most probable token (Guo et al. 2017, arXiv 1706.04599).

    Positions are sorted into ``BINS`` bins by the probability of the model's most probable token.
    The error is the mean over positions of |share of correct tokens in the bin - mean probability
    in the bin|. It is 0 for a calibrated model.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)

    @no_grad()
    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Adds positions: float[P] probabilities, and bool[P], whether the token is correct."""
        confidence = confidence.double().cpu()
        at = (confidence * BINS).long().clamp(0, BINS - 1)
        parts = torch.stack([torch.ones_like(confidence), confidence, right.double().cpu()])
        self._sums.index_add_(1, at, parts)

    @classmethod
    def merged(cls, parts: Iterable[Calibration]) -> Calibration:
        """A calibration with the positions of all ``parts``."""
        whole = cls()
        for part in parts:
            whole._sums += part._sums
        return whole

    def sums(self) -> list[list[float]]:
        """Of each bin: the number of positions, and the sums of their probabilities and of their
        correct tokens.
        """
        found: list[list[float]] = self._sums.tolist()
        return found

    def error(self) -> float:
        """Between 0 and 1; 0 without positions."""
        count, confidence, right = self._sums
        return float((right - confidence).abs().sum() / count.sum().clamp_min(1))


def top_k_overlap(student_logits: Tensor, teacher: SparseTeacher, k: int) -> Tensor:
    """float32[P], no gradient: the common share of the student's and the teacher's top-k.

    RLKD's dynamic form multiplies the logits loss of each position by it.
    """
    return rank_agreement(student_logits, teacher, k).overlap


def perplexity(cross_entropy: float) -> float:
    """exp of nats per token, capped at ``MOST_NATS``."""
    return math.exp(min(cross_entropy, MOST_NATS))
