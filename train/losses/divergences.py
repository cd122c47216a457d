"""Divergences between teacher and student: reverse KL, JSD, the skewed KLs, total variation.

Each is written once, over cells (``logitcask.train.losses.tails``). A divergence that grows at most
linearly in r = q/p also has a form for draws from the tail. In all of them u is the student's mass
on ids that the teacher lacks (a padded student vocabulary). There p = 0, so the loss reduces u.
Options and their meaning follow TRL if TRL has them.

Shapes: P positions, N cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.forward_kl import forward_kl
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.losses.tails import (
    Divergence,
    Tail,
    TailOption,
    cells,
    choose_tail,
    over_the_draws,
    over_the_prior,
    refined,
    softened,
)

_TAILS = ("samples", "ghost", "prior", "renormalised")


def between(low: float, value: float, high: float, name: str, option: str) -> None:
    """Raises UserError unless low < value < high."""
    if not low < value < high:
        raise UserError(
            f"{name}: {option} is {value}, expected a number above {low:g} and below {high:g}"
        )


def _by_tail(
    name: str,
    divergence: Divergence,
    draws: tuple[Callable[[Tensor], Tensor], float] | None,
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    temperature: float,
    tail: str,
) -> Tensor:
    """``divergence`` with the treatment ``tail``; ``draws`` is (rest, slope) of ``over_the_draws``,
    or None for finer cells.
    """
    student_logits, teacher = softened(name, student_logits, teacher, temperature)
    kind: Tail = choose_tail(name, teacher, tail, _TAILS, logprobs=True)
    if kind == "prior":
        return over_the_prior(divergence, student_logits, teacher)
    student = StudentPass.of(student_logits, teacher)
    if kind == "samples":
        if draws is None:
            return divergence(*refined(teacher, student))
        return over_the_draws(divergence, student, teacher, *draws)
    return divergence(*cells(student, teacher, renormalised=kind == "renormalised"))


def reverse_kl_of_cells(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
    """KL(q' || p) - log(1 - u), where q' is q without u: [P]."""
    # log(1 - u). If u is most of the mass, the difference would lose all digits, so the remaining
    # mass is summed instead.
    by_difference = torch.log1p(-log_u.exp().clamp_max(0.9)).unsqueeze(1)
    log_known = torch.where(
        log_u.unsqueeze(1) < -1, by_difference, log_q.logsumexp(1, keepdim=True)
    )
    log_q = log_q - log_known
    return (log_q.exp() * (log_q - log_p)).sum(1) - log_known.squeeze(1)


@loss(
    source="arXiv 2306.08543 (MiniLLM), 2306.13649 (GKD, beta = 1)",
    formula="sum q log(q/p)",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="lower",
    use="a student too small to learn the whole teacher: it learns the tokens that the teacher "
    "finds likely",
    tails=_TAILS,
    needs_sample_logprobs=True,
)
def reverse_kl(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """KL(q || p) in nats per position.

    From a sparse head it is a **lower bound** in every form except the prior's: the teacher's
    probabilities of the ids that only the student prefers were not stored, and estimates from the
    teacher's draws have no useful finite variance.

        ghost     sum over K of q log(q / p)  +  Q log(Q / m)
        samples   the same with each drawn id a cell of its own: still a bound, a closer one
        prior     sum over all ids, the tail spread by the prior: **exact for the reconstruction**

    **Exact** if the head is everything. Unpredictable ids have p = 0 and would make it infinite.
    Therefore q is used without their mass u, and -log(1 - u) is added, which is also their
    contribution to forward KL.

    Args, returns, raises: as ``forward_kl``.
    """
    return _by_tail(
        "reverse_kl", reverse_kl_of_cells, None, student_logits, teacher, temperature, tail
    )


@loss(
    source="arXiv 2306.13649 (GKD)",
    formula="beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="a bounded compromise between forward and reverse KL; by definition forward KL at beta = "
    "0 and reverse KL at beta = 1",
    tails=_TAILS,
    needs_sample_logprobs=True,
    same_as=lambda options: {0: "forward_kl", 1: "reverse_kl"}.get(options.get("beta", 0.5)),
)
def jsd(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """Generalised Jensen-Shannon divergence in nats per position, beta as in TRL.

    ``beta KL(p || M) + (1 - beta) KL(q || M)`` with M = beta p + (1 - beta) q. At beta 0 it is
    defined as ``forward_kl`` and at 1 as ``reverse_kl`` (its limit would be 0). With samples and 0
    < beta < 1 **unbiased**: the part linear in q/p is known exactly, (1 - beta) log(1 / (1 - beta))
    Q, and the part estimated from the draws has a small variance. With the ghost a **lower bound**;
    with the prior exact for the reconstruction; **exact** if the head is everything.

    Args, returns, raises: as ``forward_kl``; UserError for a beta outside 0 to 1.
    """
    if beta == 0:
        return forward_kl(student_logits, teacher, temperature=temperature, tail=tail)
    if beta == 1:
        return reverse_kl(student_logits, teacher, temperature=temperature, tail=tail)
    if not 0 < beta < 1:
        raise UserError(
            f"jsd: beta is {beta}, expected a number from 0 (forward KL) to 1 (reverse KL)"
        )
    log_b, log_c = math.log(beta), math.log1p(-beta)

    def divergence(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
        log_M = torch.logaddexp(log_p + log_b, log_q + log_c)
        both = beta * log_p.exp() * (log_p - log_M) + (1 - beta) * log_q.exp() * (log_q - log_M)
        return both.sum(1) - (1 - beta) * log_c * log_u.exp()

    def rest(log_r: Tensor) -> Tensor:
        log_M = torch.logaddexp(torch.full_like(log_r, log_b), log_r + log_c)
        return -beta * log_M - (1 - beta) * log_r.exp() * softplus(log_b - log_c - log_r)

    draws = rest, -(1 - beta) * log_c
    return _by_tail("jsd", divergence, draws, student_logits, teacher, temperature, tail)


@loss(
    source="arXiv 2402.03898 (DistiLLM)",
    formula="sum p log(p / (alpha p + (1 - alpha) q))",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="student and teacher far apart: a forward KL with bounded gradients",
    tails=_TAILS,
    needs_sample_logprobs=True,
)
def skew_kl(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) in nats per position, between 0 and log(1 / alpha).

    With samples **unbiased**; with the ghost a **lower bound** (the tail's true part is between the
    ghost's and m log(1 / alpha)); with the prior exact for the reconstruction; **exact** if the
    head is everything.

    Args, returns, raises: as ``forward_kl``; UserError for an alpha not between 0 and 1.
    """
    between(0, alpha, 1, "skew_kl", "alpha")
    log_a, log_b = math.log(alpha), math.log1p(-alpha)

    def divergence(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - torch.logaddexp(log_p + log_a, log_q + log_b))).sum(1)

    def rest(log_r: Tensor) -> Tensor:
        return -torch.logaddexp(torch.full_like(log_r, log_a), log_r + log_b)

    return _by_tail("skew_kl", divergence, (rest, 0.0), student_logits, teacher, temperature, tail)


@loss(
    source="arXiv 2402.03898 (DistiLLM)",
    formula="sum q log(q / ((1 - alpha) p + alpha q))",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="a form of reverse KL that is unbiased with tail samples",
    tails=_TAILS,
    needs_sample_logprobs=True,
)
def skew_reverse_kl(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) in nats per position, between 0 and log(1 / alpha).

    With samples **unbiased**: for q far above p the sum is log(1 / alpha) Q, which is known
    exactly, and the draws estimate the rest. With the ghost a **lower bound** (the tail's true part
    is between the ghost's and Q log(1 / alpha)); with the prior exact for the reconstruction;
    **exact** if the head is everything.

    Args, returns, raises: as ``forward_kl``; UserError for an alpha not between 0 and 1.
    """
    between(0, alpha, 1, "skew_reverse_kl", "alpha")
    log_a, log_b = math.log(alpha), math.log1p(-alpha)

    def divergence(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
        mixed = torch.logaddexp(log_p + log_b, log_q + log_a)
        return (log_q.exp() * (log_q - mixed)).sum(1) - log_a * log_u.exp()

    def rest(log_r: Tensor) -> Tensor:
        return -log_r.exp() * softplus(log_b - log_a - log_r)

    return _by_tail(
        "skew_reverse_kl", divergence, (rest, -log_a), student_logits, teacher, temperature, tail
    )


def tvd_of_cells(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
    """Half the sum of abs(p - q): [P]."""
    return ((log_p.exp() - log_q.exp()).abs().sum(1) + log_u.exp()) / 2


def _shortfall(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).relu().sum(1)


@loss(
    source="arXiv 2307.15190 (f-DISTILL), 2402.03898",
    formula="sum abs(p - q) / 2",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="lower",
    from_samples="unbiased",
    use="teachers with errors, to which it is robust; its gradients are weak if the student is "
    "far from the teacher",
    tails=_TAILS,
    needs_sample_logprobs=True,
)
def tvd(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """Total variation distance, half the sum of abs(p - q), per position: between 0 and 1.

    With samples **unbiased**: it is the sum of max(0, p - q), and the draws estimate the tail's
    part as m max(0, 1 - q/p), which is never above m. With the ghost a **lower bound**, at most (m
    + Q - abs(m - Q)) / 2 below the true value; with the prior exact for the reconstruction;
    **exact** if the head is everything.

    Args, returns, raises: as ``forward_kl``.
    """
    softer_logits, softer = softened("tvd", student_logits, teacher, temperature)
    if choose_tail("tvd", softer, tail, _TAILS, logprobs=True) == "samples":
        student = StudentPass.of(softer_logits, softer)
        return over_the_draws(
            _shortfall, student, softer, lambda log_r: (1 - log_r.exp()).relu(), 0.0
        )
    return _by_tail("tvd", tvd_of_cells, None, softer_logits, softer, 1.0, tail)
