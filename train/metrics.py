"""How far the student orders the teacher's peaks as the teacher does: top-1, CR@k and MOR@k (arXiv 2409.12545).

All are exact from a cache wherever the head holds at least k entries. The teacher's order is the stored order, which
was fixed before anything was quantised; equal stored logprobs are no ties.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, no_grad

from train.losses.base import SparseTeacher


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

    Where a head holds fewer than k ids, ``overlap`` is a lower bound and ``identical`` is False; without a head all are 0.
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


def top_k_overlap(student_logits: Tensor, teacher: SparseTeacher, k: int) -> Tensor:
    """float32[P], no gradient: the share of the top-k that student and teacher have in common.

    RLKD's dynamic form multiplies the logits loss of each position by it.
    """
    return rank_agreement(student_logits, teacher, k).overlap
