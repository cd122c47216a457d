"""What stands for the tail: the ways from a head, and what is known beyond it, to a value for the
whole vocabulary.

A divergence is written once, as a sum over cells: each cell has a log-probability of the teacher
and one of the student. The cells decide what the sum is:

samples       the head's ids are cells; draws from the tail estimate the sum over the rest, without bias
ghost         the head's ids are cells, and the tail is one more: a lower bound of any f-divergence (data processing)
prior         every id is a cell, the tail spread as the cache's prior says: a full distribution, near the teacher's
renormalised the head's ids are all there is, both sides scaled up to 1: teaches over-confidence;
for comparison only

``auto`` is samples where the cache has them, and the ghost elsewhere. The prior is there to be
asked for: students learn less from it in most cases (docs/quality.md).

Estimating a sum over the tail from draws of the *teacher* fails where the student has mass that the
teacher lacks: the ratio r = q/p is large there, and rarely drawn. Where the sum grows no faster
than linearly in r, as in JSD, TVD and the skewed KLs, its linear part is c Q, Q being the student's
tail mass, which is known exactly: what is left to the draws is bounded, or grows as log r. Reverse
KL grows as r log r and has no such estimate.

Shapes: P positions, K head entries (padded), S draws (padded), N cells, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher
from logitcask.train.losses.student_pass import StudentPass, slabs

Tail = Literal["samples", "ghost", "prior", "renormalised"]
TailOption = Tail | Literal["auto"]

NOTHING = -1e30
"""log of no mass, in cells: finite, so that neither 0 * log 0 nor its gradient is nan."""

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``divergence(log_p [P, N], log_q [P, N], log_u [P]) -> [P]``; u is the student's mass where the
teacher can have none.

The first K cells are the head's, by falling log_p.
"""


def tail_of(teacher: SparseTeacher, *, logprobs: bool = False) -> Tail:
    """The best that ``teacher`` allows: samples, else the ghost.

    Samples need the teacher's entropy or their logprobs; with ``logprobs`` only the latter will do.
    """
    if teacher.draws is not None and (
        teacher.draws.logprobs is not None or (teacher.entropy is not None and not logprobs)
    ):
        return "samples"
    return "ghost"


def choose_tail(
    name: str,
    teacher: SparseTeacher,
    tail: str,
    allowed: tuple[str, ...],
    *,
    logprobs: bool = False,
) -> Tail:
    """What the option ``tail`` of loss ``name`` comes to. Raises UserError where it is unknown,
    or the cache lacks it.
    """
    if tail not in ("auto", *allowed):
        raise UserError(
            f"{name}: tail is {tail!r}, expected {', '.join(('auto', *allowed[:-1]))} or {allowed[-1]}"
        )
    best = tail_of(teacher, logprobs=logprobs)
    if tail == "auto":
        return best
    if (tail == "samples" and best != "samples") or (tail == "prior" and teacher.prior is None):
        undated = tail == "samples" and teacher.draws is not None
        raise UserError(
            f"{name}: tail is {tail!r}, but the cache has no {'logprobs of its samples' if undated else tail} "
            f"(it allows {best})"
        )
    return tail  # type: ignore[return-value]


def softened(
    name: str, student: Tensor | StudentPass, teacher: SparseTeacher, temperature: float
) -> tuple[Tensor | StudentPass, SparseTeacher]:
    """Both sides at another temperature. Raises UserError unless every head is the whole
    vocabulary.
    """
    if temperature == 1.0:
        return student, teacher
    if not temperature > 0:
        raise UserError(
            f"{name}: temperature is {temperature}, expected a positive number; 1 is the default"
        )
    if not bool(torch.isneginf(teacher.tail_logprob).all()):
        raise UserError(
            f"{name}: temperature is {temperature}, but the cache stores {teacher.ids.shape[1]} of "
            f"{teacher.vocab_size} ids and other temperatures need all of them; use temperature 1"
        )
    softer = replace(
        teacher, logprobs=torch.log_softmax(teacher.logprobs / temperature, dim=1), draws=None
    )
    logits = student if isinstance(student, Tensor) else student.logits
    return StudentPass(logits, softer, scale=1 / temperature), softer


def cells(
    student: StudentPass, teacher: SparseTeacher, *, renormalised: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, log_u): the head and the ghost as cells, or the head alone, scaled up to 1."""
    log_p, log_q, log_u = teacher.logprobs.to(student.dtype), student.log_head, student.log_u
    if renormalised:
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_q = student.z_head - student.z_head.logsumexp(1, keepdim=True)
        log_u = torch.full_like(log_u, NOTHING)
    else:
        log_p = torch.cat([log_p, teacher.tail_logprob.to(student.dtype).unsqueeze(1)], 1)
        log_q = torch.cat([log_q, student.log_Q.unsqueeze(1)], 1)
    return as_cells(log_p, log_q, log_u)


def as_cells(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without infinities: padding becomes cells of no mass on either side."""
    empty = torch.isneginf(log_p)
    return (
        log_p.masked_fill(empty, NOTHING),
        log_q.masked_fill(empty, NOTHING).clamp_min(NOTHING),
        log_u.clamp_min(NOTHING),
    )


def over_the_prior(
    divergence: Divergence, student: Tensor | StudentPass, teacher: SparseTeacher
) -> Tensor:
    """``divergence`` with every id a cell, the tail spread by the prior: [P].

    The gradient is taken on the way, a few rows at a time, and is the only tensor of size [P, V]
    that is made; at another temperature than 1 there are the scaled logits, too.
    """
    logits = student if isinstance(student, Tensor) else student.logits
    if isinstance(student, StudentPass) and student.scale != 1.0:
        logits = logits * student.scale
    loss_P: Tensor = _Reconstruction.apply(logits, teacher, divergence)  # type: ignore[no-untyped-call]
    return loss_P


class _Reconstruction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, teacher: SparseTeacher, divergence: Divergence
    ) -> Tensor:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient_PV = torch.empty_like(logits_PV) if wanted else None
        loss_P = logits_PV.new_empty(len(logits_PV), dtype=dtype)
        for rows in slabs(logits_PV, dtype):
            with torch.enable_grad():
                z = logits_PV[rows].detach().to(dtype).requires_grad_(wanted)
                value = divergence(*_prior_cells(z, teacher[rows]))
                if gradient_PV is not None:
                    gradient_PV[rows] = torch.autograd.grad(value.sum(), z)[0].to(gradient_PV.dtype)
            loss_P[rows] = value.detach()
        ctx.save_for_backward(gradient_PV)
        return loss_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_PV,) = ctx.saved_tensors
        return (gradient_PV * grad_P.unsqueeze(1)).to(gradient_PV.dtype), None, None


def _prior_cells(z_rV: Tensor, teacher: SparseTeacher) -> tuple[Tensor, Tensor, Tensor]:
    assert teacher.prior is not None
    size, present = teacher.vocab_size, teacher.ids >= 0
    ids_rK = teacher.ids.clamp_min(0)
    log_q = z_rV.log_softmax(1)
    log_r = tail_by_prior(teacher).to(z_rV.dtype)
    return as_cells(
        torch.cat([teacher.logprobs.to(z_rV.dtype), log_r], 1),
        torch.cat([log_q.gather(1, ids_rK).masked_fill(~present, -torch.inf), log_q[:, :size]], 1),
        log_q[:, size:].logsumexp(1)
        if z_rV.shape[1] > size
        else torch.full_like(log_q[:, 0], NOTHING),
    )


def tail_by_prior(teacher: SparseTeacher) -> Tensor:
    """float32[P, vocab_size]: log of the tail spread by the prior, m b(v) / (1 - sum of b over
    the head); -inf in the head.
    """
    assert teacher.prior is not None
    b_PK = teacher.prior[teacher.ids.clamp_min(0)].masked_fill(teacher.ids < 0, 0)
    outside_P = (1 - b_PK.sum(1)).clamp_min(torch.finfo(b_PK.dtype).tiny)
    log_r = (teacher.tail_logprob - outside_P.log()).unsqueeze(1) + teacher.prior.log()
    hit = torch.where(teacher.ids < 0, torch.inf, -torch.inf).to(log_r.dtype)
    return log_r.scatter_reduce(1, teacher.ids.clamp_min(0), hit, "amin")


def log_ratio(student: StudentPass) -> Tensor:
    """[P, S]: log(q / p) at the draws, 0 for padding. Needs their logprobs."""
    return student.log_samples - student.draws.finite_logprobs.to(student.dtype)


def over_the_draws(
    divergence: Divergence,
    student: StudentPass,
    teacher: SparseTeacher,
    rest: Callable[[Tensor], Tensor],
    slope: float,
) -> Tensor:
    """``divergence`` over head and unpredictable ids, plus an unbiased estimate of the sum over the
    tail: [P].

    The tail's sum is that of ``p g(q/p)``. ``rest(log r) = g(r) - slope * r`` is what the draws
    estimate.
    """
    log_p, log_q, log_u = as_cells(
        teacher.logprobs.to(student.dtype), student.log_head, student.log_u
    )
    value = divergence(log_p, log_q, log_u) + slope * student.log_Q.exp()
    # Beyond e^60 and e^-80 the rest is at its limit, or its logarithm is; float32 ends at e^88.
    weights = student.draws.weights(teacher.tail_logprob).to(student.dtype)
    estimate = weights * rest(log_ratio(student).clamp(-80, 60))
    return value + estimate.sum(1)


def refined(teacher: SparseTeacher, student: StudentPass) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, log_u) with each drawn id a cell of its own beside the head, and a ghost for
    what is left.

    Any cells give a lower bound, and finer ones a closer one. A position whose draws make up nearly
    all of its tail keeps the plain ghost, because the mass that is left would be what rounding
    leaves of it.
    """
    ids_PS, order_PS = student.draws.ids.sort(1)
    first_PS = torch.ones_like(ids_PS, dtype=torch.bool)
    first_PS[:, 1:] = ids_PS[:, 1:] != ids_PS[:, :-1]
    log_p_PS = student.draws.finite_logprobs.to(student.dtype).gather(1, order_PS)
    used_PS = first_PS & (ids_PS >= 0)
    m_P = teacher.tail_logprob.to(student.dtype).exp()
    covered_P = log_p_PS.exp().where(used_PS, 0).sum(1)
    used_PS = used_PS & (covered_P < 0.75 * m_P).unsqueeze(1)
    log_q_PS = student.log_samples.gather(1, order_PS)
    left_P = m_P - log_p_PS.exp().where(used_PS, 0).sum(1)
    # What the student has left is a difference, too; its floor is of the size of the rounding
    # error.
    Q_P = student.log_Q.exp()
    eps = torch.finfo(student.dtype).eps
    q_left_P = (Q_P - log_q_PS.exp().where(used_PS, 0).sum(1)).clamp_min(
        4 * eps * Q_P.detach().clamp_min(eps)
    )
    left = [left_P.log(), torch.where(used_PS.any(1), q_left_P.log(), student.log_Q)]
    empty = ~used_PS
    return as_cells(
        torch.cat(
            [
                teacher.logprobs.to(student.dtype),
                log_p_PS.masked_fill(empty, -torch.inf),
                left[0].unsqueeze(1),
            ],
            1,
        ),
        torch.cat(
            [student.log_head, log_q_PS.masked_fill(empty, NOTHING), left[1].unsqueeze(1)], 1
        ),
        student.log_u,
    )
