"""The alpha-beta divergence (ABKD, arXiv 2505.04560): a sum of powers of probabilities.

Shapes: P positions, N cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.losses.tails import (
    NOTHING,
    TailOption,
    cells,
    choose_tail,
    over_the_prior,
    softened,
)

_TAILS = ("samples", "ghost", "prior")


@loss(
    source="arXiv 2505.04560 (ABKD)",
    formula="-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="a compromise with two parameters (alpha, beta): forward KL at (1, 0), reverse KL at (0, "
    "1); the paper uses (0.2, 0.7) for instruction data",
    tails=_TAILS,
    needs_sample_logprobs=True,
)
def alpha_beta(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """The alpha-beta divergence of ABKD per position; alpha and beta above 0. Dimensionless.

    With s = alpha + beta, the student's own sum of q^s over the tail is exact, from a second pass
    over the logits. With samples **unbiased**: draws weighted by 1/p estimate the sums of p^alpha
    q^beta and p^s. It is not an f-divergence, so the tail as one cell gives no bound. Instead
    (``ghost``) the loss uses the smallest value that the tail can have, by Hölder's inequality and
    the range that m and the head's last entry allow for the sum of p^s. This is a **lower bound**,
    equal to the ghost's at s = 1. With the prior exact for the reconstruction; **exact** if the
    head is everything.

    Args, returns, raises: as ``forward_kl``; UserError for an alpha or beta that is not above 0
    (forward_kl and
        reverse_kl are the limits).
    """
    for option, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < math.inf:
            raise UserError(
                f"alpha_beta: {option} is {value}, expected a positive number; its limits (1, 0) and (0, 1) are the losses "
                "forward_kl and reverse_kl"
            )
    student_logits, teacher = softened("alpha_beta", student_logits, teacher, temperature)
    kind = choose_tail("alpha_beta", teacher, tail, _TAILS, logprobs=True)
    student, s = StudentPass.of(student_logits, teacher), alpha + beta
    powers = StudentPass(student.logits, teacher, scale=s * student.scale)
    # log of the sums of q^s over the tail and over unpredictable ids. The latter have p = 0, so
    # this sum is their whole contribution.
    log_B = (powers.log_tail - s * student.lse).clamp_min(NOTHING)
    others = (powers.log_others - s * student.lse).exp() / (alpha * s)

    def divergence(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
        return _gap(alpha, beta, s * log_p, s * log_q).sum(1)

    if kind == "prior":
        return over_the_prior(divergence, student, teacher) + others
    # The tail has a bound of its own here, so chosen ids are a part of it.
    log_p, log_q, log_u = cells(student, teacher, chosen=False)
    rest = (
        _drawn_tail(student, teacher, alpha, beta, log_B)
        if kind == "samples"
        else _least_tail(teacher, alpha, beta, log_B)
    )
    return divergence(log_p[:, :-1], log_q[:, :-1], log_u) + rest + others


def _gap(alpha: float, beta: float, log_A: Tensor, log_B: Tensor) -> Tensor:
    """a/(a+b) A + b/(a+b) B - A^(a/(a+b)) B^(b/(a+b)), over ab: never negative (Young), 0 where
    A = B. For A = p^s, B = q^s.
    """
    a, b = alpha / (alpha + beta), beta / (alpha + beta)
    return (a * log_A.exp() + b * log_B.exp() - (a * log_A + b * log_B).exp()) / (alpha * beta)


def _drawn_tail(
    student: StudentPass, teacher: SparseTeacher, alpha: float, beta: float, log_B: Tensor
) -> Tensor:
    weight_PS = student.draws.weights(teacher.tail_logprob).to(student.dtype)
    log_p = student.draws.finite_logprobs.to(student.dtype)
    s = alpha + beta
    cross = (weight_PS * ((alpha - 1) * log_p + beta * student.log_samples).exp()).sum(1)
    own = (weight_PS * ((s - 1) * log_p).exp()).sum(1)
    return (alpha / s * own + beta / s * log_B.exp() - cross) / (alpha * beta)


def _least_tail(teacher: SparseTeacher, alpha: float, beta: float, log_B: Tensor) -> Tensor:
    """The smallest contribution of the tail: A, the teacher's sum of p^s there, is as near to B as
    m and the largest p allow.
    """
    s, log_m = alpha + beta, teacher.tail_logprob.to(log_B.dtype)
    count = (teacher.vocab_size - (teacher.ids >= 0).sum(1)).clamp_min(1)
    spread = s * log_m + (1 - s) * count.to(log_B.dtype).log()
    peaked = log_m + (s - 1) * torch.minimum(teacher.least.to(log_B.dtype), log_m)
    low, high = torch.minimum(spread, peaked), torch.maximum(spread, peaked)
    log_A = torch.minimum(torch.maximum(log_B.detach(), low), high)
    return _gap(alpha, beta, torch.where(torch.isneginf(log_m), NOTHING, log_A), log_B)
