"""The ranking loss of RLKD (arXiv 2409.12545): the student learns the teacher's order of top ids.

It is Spearman's correlation over the union of both top-k, made differentiable by soft ranks. Ranks
need no tail mass, and a constant added to all logits does not change them. Stored logprobs can
therefore replace logits.

Shapes: P positions, K head entries (padded), V student vocabulary, U = 2k slots for the union
(padded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.student_pass import StudentPass

SoftRank = Literal["sigmoid", "l2"]

# Smaller variances of ranks count as 0. Hard ranks of two ids have variance 1/4.
_NO_VARIANCE = 1e-6


@loss(
    source="arXiv 2409.12545 (RLKD)",
    formula="1 - Cov(R_p, R_q) / (sd R_p sd R_q), R soft ranks over both top-k",
    needs="head of several times k entries",
    from_head="biased",
    from_samples=None,
    use="in addition to another teacher loss, with weight 2: the student learns the teacher's top "
    "tokens and their order",
    top_k=lambda options: options.get("k", 5),
    masses=False,
    dynamic=True,
    by_overlap=False,
)
def ranking(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    k: int = 5,
    soft_rank: SoftRank = "sigmoid",
    strength: float = 1.0,
) -> Tensor:
    """1 - Spearman's correlation of soft ranks over both top-k, per position; dimensionless.

    ``1 - Cov(R_p, R_q) / (sd R_p * sd R_q)``, between 0 (same order) and 2 (reversed order). RLKD
    trains on ``2 * ranking + logits loss``; its dynamic form weights the logits loss of each
    position by ``logitcask.train.evaluation.metrics.top_k_overlap``. The trainer applies this
    weight.

    Both sides get soft ranks, as in the paper. The loss is then 0 if the student's logits equal the
    teacher's up to a constant. A near-tie of the teacher (for example within the quantisation)
    trains the student towards a near-tie and not towards an order. Hard teacher ranks would always
    separate near-ties, against any KL loss beside them.

    **Exact** if the head holds the student's top-k. Ids of the student's top-k that were not stored
    rank below all stored ids and share these ranks: two of them count as tied, and their distance
    from the head's ids, on which soft ranks depend, is assumed to be large. The loss is then
    **biased**. This is rare if the head is several times as long as k.

    Args:
        student_logits: [P, V], any floating dtype. The loss computes in float32, or in float64 for
            float64 logits.
        teacher: the sparse teacher. The first k entries of a head are the teacher's top-k, with
            ties in the stored order. Shorter heads make the union smaller.
        k: number of ids from each side; 1 <= k <= V. The paper uses 5 with a logits loss, and 10 to
            15 alone.
        soft_rank: ``"sigmoid"``: r_i = 1 + sum over j of sigmoid((z_j - z_i) / strength). At
            strength 1 this is the expected rank if each pair is ordered by a draw from its two
            probabilities. ``"l2"``: torchsort's soft rank (Blondel et al., arXiv 2002.08871), which
            the paper's authors use. If neighbouring logits are at least ``strength`` apart, it
            equals the hard rank and its gradient is **zero**, so badly ordered ids learn nothing
            from it. The default is therefore ``"sigmoid"``.
        strength: the difference of logits (nats) over which ranks change. Towards 0 ranks become
            hard.

    Returns:
        float32[P] (float64 for float64 logits). If the teacher gives no order at a position (fewer
        than two ids in the union, or all of them tied), loss and gradient are 0. If the student's
        ids are all tied, the loss is 1.

    Raises:
        UserError: an unknown ``soft_rank``, a ``strength`` that is not positive, or a cache without
            heads.
    """
    if soft_rank not in _SOFT_RANKS:
        raise UserError(
            f"ranking: soft_rank is {soft_rank!r}, expected one of {', '.join(map(repr, _SOFT_RANKS))}"
        )
    if teacher.ids.shape[1] == 0:
        raise UserError(
            "ranking: the cache stores no heads (top_k is 0), so the teacher's order is unknown; drop this loss"
        )
    if not strength > 0:
        raise UserError(
            f"ranking: strength is {strength}, expected a positive number; 1 is the default"
        )
    student = StudentPass.of(student_logits, teacher, top_k=k, masses=False)
    valid_PU, teacher_PU = _union(student.top_ids[:, :k], teacher, k)
    rank = _SOFT_RANKS[soft_rank]
    student_PU = torch.cat([student.z_head[:, :k], student.z_top[:, :k]], 1)
    ranks_q = rank(_sink(student_PU, valid_PU, strength), valid_PU, strength)
    with torch.no_grad():
        known_PU = valid_PU & ~torch.isneginf(teacher_PU)
        ranks_p = rank(_sink(teacher_PU.to(student.dtype), known_PU, strength), valid_PU, strength)
    return _one_minus_correlation(ranks_p, ranks_q, valid_PU)


def top_k_overlap(student: StudentPass, teacher: SparseTeacher, k: int) -> Tensor:
    """float32[P], no gradient: the common share of both top-k
    (``logitcask.train.evaluation.metrics.top_k_overlap`` for a StudentPass).
    """
    return (student.top_ids[:, :k].unsqueeze(2) == teacher.ids[:, :k].unsqueeze(1)).sum(
        (1, 2)
    ).float() / k


def _union(ours_Pk: Tensor, teacher: SparseTeacher, k: int) -> tuple[Tensor, Tensor]:
    """(valid, teacher logprobs), each [P, U], of both top-k side by side, the teacher's first.

    An id counts once: a student's id is invalid if the teacher has it, too. The logprob is -inf if
    the head lacks the id.
    """
    theirs_Pk, theirs_logprob = teacher.ids[:, :k], teacher.logprobs[:, :k]
    repeated_Pk = (ours_Pk.unsqueeze(2) == theirs_Pk.unsqueeze(1)).any(2)
    stored_PkK = ours_Pk.unsqueeze(2) == teacher.ids.unsqueeze(1)
    ours_logprob = torch.where(stored_PkK, teacher.logprobs.unsqueeze(1), -torch.inf).amax(2)
    return torch.cat([theirs_Pk >= 0, ~repeated_Pk], 1), torch.cat(
        [theirs_logprob, ours_logprob], 1
    )


def _sink(values_PU: Tensor, known_PU: Tensor, strength: float) -> Tensor:
    """The known values minus their mean. All others get one value, so far below that their soft
    ranks stay separate.
    """
    count_P1 = known_PU.sum(1, keepdim=True).clamp_min(1)
    mean_P1 = values_PU.detach().where(known_PU, 0).sum(1, keepdim=True) / count_P1
    centred = (values_PU - mean_P1).where(known_PU, 0)
    # l2 separates blocks that differ by twice the number of items; a sigmoid has no digits beyond
    # 20.
    gap = strength * (20 + 2 * values_PU.shape[1])
    return centred.where(known_PU, centred.detach().amin(1, keepdim=True) - gap)


def _rank_sigmoid(values_PU: Tensor, valid_PU: Tensor, strength: float) -> Tensor:
    """r_i = 1 + sum over valid j != i of sigmoid((v_j - v_i) / strength); 1 is the largest."""
    above_PUU = torch.sigmoid((values_PU.unsqueeze(1) - values_PU.unsqueeze(2)) / strength)
    # Every valid i was also compared with itself, which added 1/2.
    return 0.5 + above_PUU.where(valid_PU.unsqueeze(1), 0).sum(2)


def _rank_l2(values_PU: Tensor, valid_PU: Tensor, strength: float) -> Tensor:
    """The projection of -v / strength onto the permutahedron of (1, ..., U); 1 is the largest.
    Invalid slots rank last.

    Blondel et al. 2020, prop. 3: sort, isotonic regression, undo the sort. The regression uses the
    max-min formula v_i = max over j <= i of min over l >= i of mean(y_j..y_l), which is U x U per
    position and needs no loop.
    """
    size = values_PU.shape[1]
    # Invalid slots and unstored ids share the lowest value. Valid slots come first, so they get the
    # better ranks.
    lower_PU = torch.where(valid_PU, values_PU, values_PU - strength * 2 * size)
    sorted_PU, order_PU = (-lower_PU / strength).sort(dim=1, stable=True)
    hard_U = torch.arange(1, size + 1, device=values_PU.device, dtype=values_PU.dtype)
    sums = torch.nn.functional.pad((sorted_PU - hard_U).cumsum(1), (1, 0))
    first, last = (
        torch.arange(size, device=sums.device).unsqueeze(1),
        torch.arange(size, device=sums.device),
    )
    mean_PUU = (sums[:, 1:].unsqueeze(1) - sums[:, :-1].unsqueeze(2)) / (
        last - first + 1
    ).clamp_min(1)
    mean_PUU = mean_PUU.masked_fill(last < first, torch.inf)
    least_PUU = mean_PUU.flip(2).cummin(2).values.flip(2)
    fitted_PU = least_PUU.masked_fill(first > last, -torch.inf).amax(1)
    return torch.zeros_like(values_PU).scatter(1, order_PU, sorted_PU - fitted_PU)


_SOFT_RANKS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sigmoid": _rank_sigmoid,
    "l2": _rank_l2,
}


def _one_minus_correlation(x_PU: Tensor, y_PU: Tensor, valid_PU: Tensor) -> Tensor:
    """1 - Pearson's correlation over the valid slots; 0 where x does not vary. Finite gradients
    in y throughout.
    """
    count_P1 = valid_PU.sum(1, keepdim=True).clamp_min(1)
    x_PU = (x_PU - x_PU.where(valid_PU, 0).sum(1, keepdim=True) / count_P1).where(valid_PU, 0)
    y_PU = (y_PU - y_PU.where(valid_PU, 0).sum(1, keepdim=True) / count_P1).where(valid_PU, 0)
    count_P = count_P1.squeeze(1)
    covariance = (x_PU * y_PU).sum(1) / count_P
    var_x, var_y = x_PU.square().sum(1) / count_P, y_PU.square().sum(1) / count_P
    # Clamped and not shifted by an epsilon: exact if there is any variance. If y has none, the
    # gradient is the covariance's, which still has the right direction.
    correlation = (
        covariance / (var_x.clamp_min(_NO_VARIANCE) * var_y.clamp_min(_NO_VARIANCE)).sqrt()
    )
    return torch.where(var_x < _NO_VARIANCE, 0, 1 - correlation)
