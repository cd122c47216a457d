"""Treatments of the tail: ways to compute a divergence over all ids from a sparse teacher.

A divergence is written once, as a sum over cells. Each cell has a log-probability of the teacher
and one of the student. There are four choices of cells:

samples       the head's ids; draws from the tail estimate the sum over the rest without bias
ghost         the head's ids, and the tail as one more cell: a lower bound of any f-divergence
              (data processing inequality)
prior         every id, with the tail distributed by the cache's prior: exact for this
              reconstruction
renormalised  the head's ids, both sides scaled to a mass of 1: teaches over-confidence, for
              comparison only

``auto`` uses the samples if the cache has them, else the ghost. It never uses the prior, because
students learn less from it in most cases (docs/quality.md). If the cache does not know the tails'
masses, it uses the renormalised heads, and a loss without this treatment is refused.

An estimate of a sum over the tail from draws of the *teacher* fails at ids to which the student
gives much more mass than the teacher: there the ratio r = q/p is large, and such ids are rarely
drawn. If the sum grows at most linearly in r, as in JSD, TVD and the skewed KLs, its linear part is
c Q, with Q the student's tail mass, which is known exactly. The draws then estimate only a rest
that is bounded or grows as log r. Reverse KL grows as r log r and has no such estimate.

Chosen ids, those of the tail that the text's writer finds the most probable, are cells of their own
in all treatments but ``renormalised``, and the tail is what is left. More cells give a closer bound,
the more so because most of the student's mass is in them. Estimates from draws then are of the sum
over what is left: a draw keeps its weight, and counts if its id is not chosen. So each is unbiased
(Horvitz and Thompson 1952), whoever chose the ids, as long as the draws did not.

Shapes: P positions, K head entries (padded), C chosen ids (padded), S draws (padded), N cells, V
student vocabulary.
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

The first K cells are the head's, by falling log_p; the chosen ids are the next.
"""


def tail_of(teacher: SparseTeacher, *, logprobs: bool = False) -> Tail:
    """The tail of ``auto``: samples if ``teacher`` has what they need, else the ghost.

    Samples need the teacher's entropy or the logprobs of the draws; with ``logprobs`` they need the
    latter. If the tails' masses are not known, the heads alone can be compared.
    """
    if not teacher.tail_known:
        return "renormalised"
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
    """The treatment that option ``tail`` of loss ``name`` selects. Raises UserError if it is
    unknown or the cache cannot serve it.
    """
    if tail not in ("auto", *allowed):
        raise UserError(
            f"{name}: tail is {tail!r}, expected {', '.join(('auto', *allowed[:-1]))} or {allowed[-1]}"
        )
    best = tail_of(teacher, logprobs=logprobs)
    if not teacher.tail_known and ("renormalised" not in allowed or tail not in ("auto", best)):
        require_tail(name, teacher, "" if tail == "auto" else f" with tail {tail!r}")
    if tail == "auto":
        return best
    if (tail == "samples" and best != "samples") or (tail == "prior" and teacher.prior is None):
        undated = tail == "samples" and teacher.draws is not None
        raise UserError(
            f"{name}: tail is {tail!r}, but the cache has no {'logprobs of its samples' if undated else tail} "
            f"(it allows {best})"
        )
    return tail  # type: ignore[return-value]


def require_tail(name: str, teacher: SparseTeacher, how: str = "") -> None:
    """Raises UserError if the masses outside the heads, which loss ``name`` needs, are not known."""
    if not teacher.tail_known:
        raise UserError(
            f"{name}{how} needs the mass outside each head, which this cache does not know (it was imported from logits of "
            "the heads alone); use a loss on the order of the head, or forward_kl, reverse_kl, jsd, skew_kl or tvd, which "
            "then compare the heads scaled to 1"
        )


def softened(
    name: str, student: Tensor | StudentPass, teacher: SparseTeacher, temperature: float
) -> tuple[Tensor | StudentPass, SparseTeacher]:
    """Both sides at a temperature. Raises UserError unless heads are the whole vocabulary."""
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
        teacher,
        logprobs=torch.log_softmax(teacher.logprobs / temperature, dim=1),
        draws=None,
        chosen=None,
    )
    logits = student if isinstance(student, Tensor) else student.logits
    return StudentPass(logits, softer, scale=1 / temperature), softer


def cells(
    student: StudentPass, teacher: SparseTeacher, *, renormalised: bool = False, chosen: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, log_u): the head, the chosen ids and the ghost as cells, or the head alone,
    scaled to 1. ``chosen`` False: chosen ids are a part of the ghost.
    """
    log_p, log_q, log_u = teacher.logprobs.to(student.dtype), student.log_head, student.log_u
    if renormalised:
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_q = student.z_head - student.z_head.logsumexp(1, keepdim=True)
        log_u = torch.full_like(log_u, NOTHING)
    elif chosen:
        log_p, log_q, log_m, log_Q = known_cells(student, teacher)
        log_p = torch.cat([log_p, log_m.unsqueeze(1)], 1)
        log_q = torch.cat([log_q, log_Q.unsqueeze(1)], 1)
    else:
        log_p = torch.cat([log_p, teacher.tail_logprob.to(student.dtype).unsqueeze(1)], 1)
        log_q = torch.cat([log_q, student.log_Q.unsqueeze(1)], 1)
    return as_cells(log_p, log_q, log_u)


def known_cells(
    student: StudentPass, teacher: SparseTeacher
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_p [P, K + C], log_q [P, K + C], log_m [P], log_Q [P]): head and chosen ids, and the
    masses of teacher and student outside them.
    """
    log_p, log_m = teacher.logprobs.to(student.dtype), teacher.tail_logprob.to(student.dtype)
    if teacher.chosen is None:
        return log_p, student.log_head, log_m, student.log_Q
    return (
        torch.cat([log_p, teacher.chosen.logprobs.to(student.dtype)], 1),
        torch.cat([student.log_head, student.log_chosen], 1),
        teacher.chosen.left_logprob.to(student.dtype),
        student.log_rest,
    )


def with_chosen(teacher: SparseTeacher) -> SparseTeacher:
    """The teacher with its chosen ids as further entries of the heads, which are then not by falling
    logprob.
    """
    if teacher.chosen is None:
        return teacher
    return replace(
        teacher,
        ids=torch.cat([teacher.ids, teacher.chosen.ids], 1),
        logprobs=torch.cat([teacher.logprobs, teacher.chosen.logprobs], 1),
        tail_logprob=teacher.chosen.left_logprob,
        chosen=None,
    )


def as_cells(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same cells without infinities: padding becomes cells without mass on both sides."""
    empty = torch.isneginf(log_p)
    return (
        log_p.masked_fill(empty, NOTHING),
        log_q.masked_fill(empty, NOTHING).clamp_min(NOTHING),
        log_u.clamp_min(NOTHING),
    )


def over_the_prior(
    divergence: Divergence, student: Tensor | StudentPass, teacher: SparseTeacher
) -> Tensor:
    """``divergence`` with every id a cell and the tail distributed by the prior: [P].

    The gradient is computed in the forward pass, a few rows at a time. It is the only new tensor of
    size [P, V], except for the scaled logits at a temperature other than 1.
    """
    logits = student if isinstance(student, Tensor) else student.logits
    if isinstance(student, StudentPass) and student.scale != 1.0:
        logits = logits * student.scale
    loss_P: Tensor = _Reconstruction.apply(logits, with_chosen(teacher), divergence)  # type: ignore[no-untyped-call]
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
    """float32[P, vocab_size]: log of the tail distributed by the prior, m b(v) / (1 - sum of b over
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

    The tail's sum is that of ``p g(q/p)``. The draws estimate the sum of ``rest(log r) = g(r) -
    slope * r``.
    """
    log_p, log_q, log_m, log_Q = known_cells(student, teacher)
    log_p, log_q, log_u = as_cells(log_p, log_q, student.log_u)
    value = divergence(log_p, log_q, log_u) + slope * log_Q.exp()
    weights = student.draws.weights(teacher.tail_logprob).to(student.dtype)
    if teacher.chosen is None:
        return value + (weights * _limited(rest, log_ratio(student))).sum(1)
    # Draws of chosen ids do not count, so the weights of the others add up to what is left of the
    # tail only in the mean. The rest at the mean ratio of what is left takes most of this variance
    # away, and nothing from the mean (a control variate).
    weights = weights.masked_fill(teacher.chosen.has(student.draws.ids), 0)
    known = teacher.chosen.logprobs.to(student.dtype).exp().sum(1)
    left = teacher.tail_logprob.to(student.dtype).exp() - known
    some = torch.isfinite(log_m) & torch.isfinite(log_Q)
    mean = _limited(rest, torch.where(some, log_Q, 0) - torch.where(some, log_m, 0))
    mean = torch.where(some, mean, 0)
    at_draws = _limited(rest, log_ratio(student)) - mean.unsqueeze(1)
    return value + (weights * at_draws).sum(1) + left * mean


def _limited(rest: Callable[[Tensor], Tensor], log_r: Tensor) -> Tensor:
    """``rest`` between e^-80 and e^60, beyond which it or its logarithm is at its limit; float32
    ends at e^88.
    """
    return rest(log_r.clamp(-80, 60))


def refined(teacher: SparseTeacher, student: StudentPass) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, log_u): the head's ids, the chosen ids, each other distinct drawn id, and a
    ghost for the rest.

    Any cells give a lower bound, and finer cells a closer one. If the draws make up nearly all of a
    position's tail, the position keeps the plain ghost, because the remaining mass would be mostly
    rounding error.
    """
    log_p, log_q, log_m, log_Q = known_cells(student, teacher)
    # Distinct drawn ids: the first of each run of equal ids after sorting, without padding.
    ids_PS, order_PS = student.draws.ids.sort(1)
    first_PS = torch.ones_like(ids_PS, dtype=torch.bool)
    first_PS[:, 1:] = ids_PS[:, 1:] != ids_PS[:, :-1]
    log_p_PS = student.draws.finite_logprobs.to(student.dtype).gather(1, order_PS)
    used_PS = first_PS & (ids_PS >= 0)
    if teacher.chosen is not None:
        used_PS = used_PS & ~teacher.chosen.has(ids_PS)
    # Only positions whose draws cover less than 0.75 of the tail's mass get these cells.
    m_P = log_m.exp()
    covered_P = log_p_PS.exp().where(used_PS, 0).sum(1)
    used_PS = used_PS & (covered_P < 0.75 * m_P).unsqueeze(1)
    # The ghost: the mass of the tail outside the drawn ids, on both sides.
    log_q_PS = student.log_samples.gather(1, order_PS)
    left_P = m_P - log_p_PS.exp().where(used_PS, 0).sum(1)
    # The student's remaining mass is a difference, too. Its lower limit is the size of the rounding
    # error.
    Q_P = log_Q.exp()
    eps = torch.finfo(student.dtype).eps
    q_left_P = (Q_P - log_q_PS.exp().where(used_PS, 0).sum(1)).clamp_min(
        4 * eps * Q_P.detach().clamp_min(eps)
    )
    left = [left_P.log(), torch.where(used_PS.any(1), q_left_P.log(), log_Q)]
    # Cells: the known ids, the drawn ids (no mass if unused), the ghost.
    empty = ~used_PS
    return as_cells(
        torch.cat(
            [log_p, log_p_PS.masked_fill(empty, -torch.inf), left[0].unsqueeze(1)],
            1,
        ),
        torch.cat([log_q, log_q_PS.masked_fill(empty, NOTHING), left[1].unsqueeze(1)], 1),
        student.log_u,
    )
