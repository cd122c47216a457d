"""Losses with a fixed target: forward KL from a cache, its form for random samples, hard labels.

A renormalised head without the tail would make the student over-confident. There are three ways to
avoid this: draws from the tail, a prior for it, or one cell of known mass
(``logitcask.train.losses.tails``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, TailDraws, loss
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.losses.tails import Tail, TailOption, cells, choose_tail, softened, tail_of

__all__ = ["Tail", "ce", "forward_kl", "random_sampling", "tail_of"]

_TAILS = ("samples", "ghost", "prior", "renormalised")


@loss(
    source="arXiv 1503.02531, T = 1",
    formula="sum p log(p/q)",
    needs="head; optionally tail samples with entropy or logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="the default: the student learns to cover every token that the teacher finds possible",
    tails=_TAILS,
    prior_product=True,
)
def forward_kl(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """KL(p || q) in nats per position, with p the teacher and q = softmax(student_logits).

    With head K, tail mass m, the student's tail mass Q, draws s (S of them), teacher entropy H and
    prior b::

        samples   - sum over K of p log q  -  m/S * sum over s of log q_s  -  H
        prior     sum over K of p log(p / q)  +  sum outside K of r log(r / q),   r = m b / (1 - sum over K of b)
        ghost     sum over K of p log(p / q)  +  m log(m / Q)

    ``samples`` is **unbiased**, and so is its gradient: its mean over fresh draws is the KL of the
    whole distribution. A single value may be negative. If the cache has the draws' logprobs but no
    entropy, the tail's part of H is estimated from the draws. ``prior`` is **exact for the
    reconstruction**, which is not the teacher. ``ghost`` is a **lower bound** (data processing
    inequality), tight if q is proportional to p outside the head. All three are **exact** if the
    head is everything. ``renormalised`` compares the heads alone, both scaled to a mass of 1. It
    exists for comparisons.

    Ids from ``teacher.vocab_size`` up, which the teacher cannot predict (a padded student
    vocabulary), have p = 0. They are not part of the tail, so the loss always reduces their mass.

    Args:
        student_logits: [P, V], any floating dtype. The loss computes in float32, or in float64 for
            float64 logits.
        teacher: the sparse teacher. Padded entries contribute nothing, and k may differ by
            position.
        temperature: softens both distributions (TRL's convention: the result is not scaled by its
            square). A value other than 1 needs every logit of the teacher, so every head must be
            everything.
        tail: ``"auto"`` uses the samples if the cache has them, else the ghost.

    Returns:
        float32[P] (float64 for float64 logits). The gradient in a logit is ``M q - p``, with p the
        teacher's value at this id and M the sum of p, which may differ from 1 after quantisation.
        For the ghost it is ``M q - m q / Q`` in the tail.

    Raises:
        UserError: a temperature other than 1 for a teacher whose tail was not stored; a temperature
            that is not positive; a ``tail`` that is unknown or that the cache cannot serve.
    """
    student_logits, teacher = softened("forward_kl", student_logits, teacher, temperature)
    kind = choose_tail("forward_kl", teacher, tail, _TAILS)
    student = StudentPass.of(student_logits, teacher, prior=kind == "prior")
    if kind == "samples":
        return _cross_entropy(student, teacher) - _entropy(teacher, student.draws).to(student.dtype)
    if kind == "prior":
        return _from_prior(student, teacher)
    return kl_of_cells(*cells(student, teacher, renormalised=kind == "renormalised"))


def kl_of_cells(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
    """Sum of p log(p/q) over cells: [P]. Mass on unpredictable ids is missing in the sum of q."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _entropy(teacher: SparseTeacher, draws: TailDraws) -> Tensor:
    """float32[P], nats: the stored entropy, or an unbiased estimate from the draws."""
    if teacher.entropy is not None:
        return teacher.entropy
    return -_p_log_p(teacher.logprobs.exp(), teacher.logprobs) - _p_log_p(
        draws.weights(teacher.tail_logprob), draws.finite_logprobs
    )


def _cross_entropy(student: StudentPass, teacher: SparseTeacher) -> Tensor:
    """-sum of p log q, the tail's share from the draws: [P]."""
    p_PK, weight_PS = (
        teacher.logprobs.exp().to(student.dtype),
        student.draws.weights(teacher.tail_logprob).to(student.dtype),
    )
    # Uses raw logits and one lse for all ids, so a row has one large sum instead of many that
    # cancel.
    z_PK = student.z_head.masked_fill(teacher.ids < 0, 0)
    z_PS = student.z_samples.masked_fill(weight_PS == 0, 0)
    total_P = p_PK.sum(1) + weight_PS.sum(1)
    return total_P * student.lse - (p_PK * z_PK).sum(1) - (weight_PS * z_PS).sum(1)


def _from_prior(student: StudentPass, teacher: SparseTeacher) -> Tensor:
    assert teacher.prior is not None
    assert student.prior_dot is not None
    prior, ids_PK = teacher.prior, teacher.ids
    p_PK, m_P = teacher.logprobs.exp(), teacher.tail_logprob.exp()
    b_PK = prior[ids_PK.clamp_min(0)].masked_fill(ids_PK < 0, 0)
    # r = c b outside the head, c = m / (1 - mass of the prior in the head).
    outside_P = (1 - b_PK.sum(1)).clamp_min(torch.finfo(prior.dtype).tiny)
    c_P = m_P / outside_P
    log_b = prior.log()
    b_log_b_P = (prior * log_b).sum() - _p_log_p(b_PK, log_b[ids_PK.clamp_min(0)])
    negentropy_P = (
        _p_log_p(p_PK, teacher.logprobs)
        + c_P * b_log_b_P
        + torch.where(m_P > 0, m_P * c_P.log(), 0)
    )
    weight_PK = (p_PK - c_P.unsqueeze(1) * b_PK).to(student.dtype)
    z_PK = student.z_head.masked_fill(ids_PK < 0, 0)
    c_P = c_P.to(student.dtype)
    total_P = weight_PK.sum(1) + c_P * prior.sum().to(student.dtype)
    return (
        total_P * student.lse
        - (weight_PK * z_PK).sum(1)
        - c_P * student.prior_dot
        + negentropy_P.to(student.dtype)
    )


def _p_log_p(p: Tensor, log_p: Tensor) -> Tensor:
    """Sum of p log p along dimension 1, where 0 log 0 = 0."""
    return torch.where(p == 0, 0, p * log_p).sum(1)


@loss(
    source="arXiv 2503.16870",
    formula="-sum_K p log q - m/S sum_s log q_s",
    needs="tail samples (ids are enough), or a head that is the whole vocabulary",
    from_head="biased",
    from_samples="unbiased",
    use="caches whose draws have no logprobs and no entropy; the gradient is that of forward_kl",
)
def random_sampling(student_logits: Tensor | StudentPass, teacher: SparseTeacher) -> Tensor:
    """Cross-entropy to draws from the teacher, in nats per position (RS-KD, arXiv 2503.16870).

    ``- sum over K of p log q - m/S * sum over s of log q_s``. The paper has only draws: 50 at T =
    1, each of weight 1/50, which is this loss with an empty head (``store.top_k: 0``). A head needs
    no draws for its ids, and reduces the variance. **Unbiased** for the cross-entropy -sum p log q,
    which is forward KL plus the teacher's entropy. The entropy is constant, so the gradients are
    the same. **Exact** if the head is everything. Without draws the tail is left out.

    Args, returns: as ``forward_kl``. Raises UserError if the cache has neither draws nor whole
    distributions.
    """
    if teacher.draws is None:
        if not bool(torch.isneginf(teacher.tail_logprob).all()):
            raise UserError(
                "random_sampling: the cache has no tail samples, expected some; build it with store.tail_samples above 0, "
                "or use forward_kl"
            )
        teacher = replace(teacher, draws=TailDraws(teacher.ids[:, :0]))
    return _cross_entropy(StudentPass.of(student_logits, teacher), teacher)


@loss(
    source="hard labels: the next tokens in the data",
    formula="-log q(y)",
    needs="the data's tokens only",
    from_head="exact",
    from_samples=None,
    use="in addition to a teacher loss (same as ce_weight), or alone as a baseline without a "
    "teacher",
    by_overlap=False,
)
def ce(student_logits: Tensor | StudentPass, teacher: SparseTeacher) -> Tensor:
    """-log q of the target: cross-entropy with hard labels, in nats per position. **Exact**; does
    not use the teacher.

    Args, returns: as ``forward_kl``.
    """
    return -StudentPass.of(student_logits, teacher).log_target
