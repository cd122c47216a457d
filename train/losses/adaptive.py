"""Losses whose target or weights depend on the student: AKL, TAD, TAID, Self-Evolution KD.

These targets and weights never have a gradient. Shapes: P positions, K head entries (padded), N
cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.divergences import between, reverse_kl_of_cells
from logitcask.train.losses.forward_kl import forward_kl, kl_of_cells
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.losses.tails import (
    NOTHING,
    TailOption,
    as_cells,
    cells,
    choose_tail,
    log_ratio,
    over_the_prior,
    refined,
    require_tail,
    softened,
)


def _needs_heads(name: str, teacher: SparseTeacher) -> None:
    if teacher.ids.shape[1] == 0:
        raise UserError(
            f"{name}: the cache stores no heads (top_k is 0), and this loss is about them; drop it"
        )


@loss(
    source="arXiv 2404.02657 (AKL)",
    formula="w KL(p || q) + (1 - w) KL(q || p), w = the share of the teacher's top tokens in sum "
    "abs(p - q)",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="biased",
    from_samples="biased",
    use="a mix that follows the errors: forward KL if they are at the teacher's top tokens, "
    "reverse KL if they are elsewhere",
    tails=("samples", "ghost", "prior"),
    needs_sample_logprobs=True,
)
def adaptive_kl(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    threshold: float = 0.5,
    temperature: float = 1.0,
    tail: TailOption = "auto",
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p) in nats per position.

    The region of peaks is the top id and the ids whose cumulative p, from the top, is at most
    ``threshold``. w is its share of the sum of abs(p - q), without gradient. The region never goes
    beyond the stored head.

    **Biased** from a sparse head: both KLs are lower bounds (with samples, forward KL is unbiased
    and the other bound closer), and w treats the tail as one cell (with samples, as several). With
    the prior exact for the reconstruction; **exact** if the head is everything.

    Args, returns, raises: as ``forward_kl``; UserError for a threshold not between 0 and 1, or a
    cache without heads.
    """
    between(0, threshold, 1, "adaptive_kl", "threshold")
    _needs_heads("adaptive_kl", teacher)
    student_logits, teacher = softened("adaptive_kl", student_logits, teacher, temperature)
    kind = choose_tail("adaptive_kl", teacher, tail, ("samples", "ghost", "prior"), logprobs=True)
    size = teacher.ids.shape[1]

    def divergence(
        log_p: Tensor, log_q: Tensor, log_u: Tensor, forward: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            p, q = log_p.exp(), log_q.exp()
            in_peaks = p[:, :size].cumsum(1) <= threshold
            in_peaks[:, 0] = True
            apart = (p - q).abs()
            peaks = apart[:, :size].where(in_peaks, 0).sum(1)
            total = apart.sum(1) + log_u.exp()
            w = torch.where(total > 0, peaks / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
        forward = kl_of_cells(log_p, log_q, log_u) if forward is None else forward
        return w * forward + (1 - w) * reverse_kl_of_cells(log_p, log_q, log_u)

    if kind == "prior":
        return over_the_prior(divergence, student_logits, teacher)
    student = StudentPass.of(student_logits, teacher)
    if kind == "samples":
        return divergence(*refined(teacher, student), forward_kl(student, teacher, tail="samples"))
    return divergence(*cells(student, teacher))


def _tail_mass(teacher: SparseTeacher, k: int) -> Tensor:
    """float32[P]: log of the teacher's mass outside its top k."""
    return torch.cat([teacher.logprobs[:, k:], teacher.tail_logprob.unsqueeze(1)], 1).logsumexp(1)


def _mean_tail_mass(teacher: SparseTeacher, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("mean_tail_mass") is not None:
        return {}
    return {"mean_tail_mass": _tail_mass(teacher, options.get("k", 10)).exp().mean()}


@loss(
    source="arXiv 2602.20816 (TAD)",
    formula="KL on top k + 1 cells + (beta m_k / mean m_k) KL(p_tail || q_tail)",
    needs="head of at least k entries; optionally tail samples with entropy or logprobs, or the "
    "prior",
    from_head="lower",
    from_samples="unbiased",
    use="more weight on the teacher's less likely tokens than in forward KL",
    tails=("samples", "ghost", "prior"),
    prepare=_mean_tail_mass,
    prior_product=True,
    head_k=lambda options: options.get("k", 10),
)
def tail_aware(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    k: int = 10,
    beta: float = 2.0,
    mean_tail_mass: float | None = None,
    tail: TailOption = "auto",
) -> Tensor:
    """Tail-aware distillation in nats per position: forward KL, split at the top k, with more
    weight below it.

    KL(p || q) is the KL on k + 1 cells (the top k, and m_k, the mass of all others) plus m_k times
    the KL below the top k, with both sides scaled to a mass of 1. Here the second weight is beta
    m_k / mean m_k. Reconstructed from the paper's text.

    The mean is over the whole batch of a forward pass on one process, with any chunks. If
    ``mean_tail_mass`` gives it, the loss does not depend on the composition of a batch. The KL
    below the top k is that of ``forward_kl``: with samples **unbiased**, with the ghost a **lower
    bound**, with the prior exact for the reconstruction; **exact** if the head is everything. A
    head of less than k entries is split at its end (**biased**).

    Args, returns, raises: as ``forward_kl``; UserError for a negative beta, or a cache without
    heads.
    """
    _needs_heads("tail_aware", teacher)
    if not 0 <= beta < math.inf:
        raise UserError(f"tail_aware: beta is {beta}, expected a number from 0")
    kind = choose_tail("tail_aware", teacher, tail, ("samples", "ghost", "prior"))
    student = StudentPass.of(student_logits, teacher, prior=kind == "prior")
    mean = (
        _mean_tail_mass(teacher, {"k": k})["mean_tail_mass"]
        if mean_tail_mass is None
        else mean_tail_mass
    )
    log_m = _tail_mass(teacher, k).to(student.dtype)
    log_Q = torch.cat([student.log_head[:, k:], student.log_Q.unsqueeze(1)], 1).logsumexp(1)
    log_p, log_q, log_u = as_cells(
        torch.cat([teacher.logprobs[:, :k].to(student.dtype), log_m.unsqueeze(1)], 1),
        torch.cat([student.log_head[:, :k], log_Q.unsqueeze(1)], 1),
        student.log_u,
    )
    whole, coarse = forward_kl(student, teacher, tail=kind), kl_of_cells(log_p, log_q, log_u)
    # whole - coarse is m_k times the KL of the tails; without a tail it is rounding error.
    inside = torch.where(torch.isneginf(log_m), 0, whole - coarse)
    return coarse + inside * beta / torch.as_tensor(
        mean, dtype=inside.dtype, device=inside.device
    ).clamp_min(torch.finfo(inside.dtype).tiny)


@dataclass
class TaidState:
    """TAID's schedule of t, faster while the loss falls (algorithm 1, the authors' defaults).

    t starts at ``t_start`` and never falls. It rises at least linearly over the training, and by
    ``alpha * sigmoid(momentum) * (1 - t)`` per step. The momentum, with decay ``beta``, is that of
    the relative decrease of the loss.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    t: float = field(init=False)
    momentum: float = field(init=False, default=0.0)
    previous: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise UserError(
                f"taid: t_start is {self.t_start} and t_end {self.t_end}; expected 0 <= t_start <= t_end <= 1"
            )
        if not (0 <= self.alpha <= 1 and 0 <= self.beta < 1):
            raise UserError(
                f"taid: alpha is {self.alpha} and beta {self.beta}; expected 0 <= alpha <= 1 and 0 <= beta < 1"
            )
        self.t = self.t_start

    def options(self) -> dict[str, Any]:
        return {"t": self.t}

    def update(self, mean: float, progress: float) -> None:
        if self.previous is not None:
            fall = (self.previous - mean) / (self.previous + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * fall
            # sigmoid, for any momentum
            step = self.alpha * 0.5 * (1 + math.tanh(self.momentum / 2)) * (1 - self.t)
            linear = self.t_start + (self.t_end - self.t_start) * progress
            self.t = min(self.t_end, max(linear, self.t + step))
        self.previous = mean

    def state_dict(self) -> dict[str, float | None]:
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        t, momentum = state["t"], state["momentum"]
        assert t is not None
        assert momentum is not None
        self.t, self.momentum, self.previous = t, momentum, state["previous"]


@loss(
    source="arXiv 2501.16937 (TAID)",
    formula="-sum p_t log q, p_t ~ sg(q)^(1 - t) p^t",
    needs="head; optionally tail samples with logprobs, or the prior",
    from_head="biased",
    from_samples="biased",
    use="a teacher much better than the student: the target moves from the student to the teacher "
    "during training",
    tails=("samples", "ghost", "prior"),
    needs_sample_logprobs=True,
    state=TaidState,
)
def taid(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    t: float = 0.4,
    tail: TailOption = "auto",
) -> Tensor:
    """Cross-entropy to a target between student (t = 0) and teacher (t = 1), in nats per position.

    The target's logits are (1 - t) times the student's, without gradient, plus t times the
    teacher's. From the head alone the tail is one cell of the same form, and its target is
    distributed as the student distributes its tail. This is **biased**: the cell is larger than the
    sum that it replaces (Hölder). With samples the target's sums are estimated from the draws and
    scaled to 1, which is **biased**, too, but consistent, and unbiased at t = 1. With the prior
    exact for the reconstruction; **exact** if the head is everything.

    In training, t comes from ``TaidState``, whose options (t_start, t_end, alpha, beta) are given
    with this loss's own.

    Args, returns, raises: as ``forward_kl``; UserError for a t outside 0 to 1.
    """
    if not 0 <= t <= 1:
        raise UserError(f"taid: t is {t}, expected a number from 0 to 1")
    kind = choose_tail("taid", teacher, tail, ("samples", "ghost", "prior"), logprobs=True)

    def divergence(log_p: Tensor, log_q: Tensor, log_u: Tensor) -> Tensor:
        target = ((1 - t) * log_q.detach() + t * log_p).softmax(1)
        return -(target * log_q).sum(1)

    if kind == "prior":
        return over_the_prior(divergence, student_logits, teacher)
    student = StudentPass.of(student_logits, teacher)
    if kind == "ghost":
        return divergence(*cells(student, teacher))
    log_p, log_q, _ = as_cells(teacher.logprobs.to(student.dtype), student.log_head, student.log_u)
    weights = student.draws.weights(teacher.tail_logprob).to(student.dtype)
    drawn = weights.log().clamp_min(NOTHING) + (1 - t) * log_ratio(student).detach()
    target = torch.cat([(1 - t) * log_q.detach() + t * log_p, drawn], 1).softmax(1)
    return -(target * torch.cat([log_q, student.log_samples.clamp_min(NOTHING)], 1)).sum(1)


@loss(
    source="arXiv 2412.15303 (Self-Evolution KD), reconstructed from its abstract",
    formula="d = KL(t || q), t = g onehot(y) + (1 - g) p; if d > threshold: KL(t || l t + (1 - l) "
    "q)",
    needs="head and the target's logprob",
    from_head="biased",
    from_samples=None,
    use="noisy or hard data: tokens on which the student is still far from the target get less "
    "weight",
)
def self_evolution(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    ground_truth: float = 0.5,
    mix: float = 0.5,
    threshold: float = 1.0,
) -> Tensor:
    """Self-Evolution KD in nats per position. **A reconstruction**: the paper's formulas and values
    were not available.

    The target t mixes the data's token y (share ``ground_truth``) with p. A position's difficulty
    is KL(t || q). If it is above ``threshold`` nats, the target is mixed into the student (share
    ``mix``) as prior knowledge before the two are compared. (Mixing the student into the target
    without gradient would only scale the gradient by ``mix``.)

    The cells are the head's ids, y, and one for the rest. Each of the two forms is then a lower
    bound. A bound may also select the other form, so the loss is **biased**. **Exact** if the head
    and y are everything.

    Args, returns: as ``forward_kl``. Raises UserError for shares outside 0 to 1 (``mix``: below 1)
    or a negative threshold, and if the cache does not know a tail's mass or a target's logprob.
    """
    for option, value in (("ground_truth", ground_truth), ("mix", mix)):
        if not 0 <= value <= 1 or (option == "mix" and value == 1):
            raise UserError(
                f"self_evolution: {option} is {value}, expected a number from 0 to 1{', below 1' * (option == 'mix')}"
            )
    if not threshold >= 0:
        raise UserError(
            f"self_evolution: threshold is {threshold}, expected a number of nats from 0"
        )
    require_tail("self_evolution", teacher)
    if not teacher.targets_known:
        raise UserError(
            "self_evolution needs the teacher's logprob of every next token, and this cache does not know some of them (the "
            "layout that it was imported from holds none outside the heads); use another loss"
        )
    student = StudentPass.of(student_logits, teacher)
    log_p, log_q, _ = _with_target(student, teacher)
    is_target = torch.zeros_like(log_p)
    hit = teacher.ids == teacher.target_ids.unsqueeze(1)
    is_target[:, : hit.shape[1]] = hit.to(log_p.dtype)
    is_target[:, -2] = (~hit.any(1)).to(log_p.dtype)
    target = ground_truth * is_target + (1 - ground_truth) * log_p.exp()
    log_t = target.log().clamp_min(NOTHING)
    difficulty = (target * (log_t - log_q)).sum(1)
    mixed = torch.logaddexp(log_t + (math.log(mix) if mix else NOTHING), log_q + math.log1p(-mix))
    return torch.where(difficulty > threshold, (target * (log_t - mixed)).sum(1), difficulty)


def _with_target(student: StudentPass, teacher: SparseTeacher) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, log_u) over the head, the target if the head lacks it, and the rest."""
    outside_P = ~(teacher.ids == teacher.target_ids.unsqueeze(1)).any(1)
    log_m, log_Q = teacher.tail_logprob.to(student.dtype), student.log_Q
    log_py = torch.minimum(teacher.target_logprob.to(student.dtype), log_m)

    def without(log_all: Tensor, log_one: Tensor) -> Tensor:
        # A difference of masses has no digits below about a millionth of them.
        left = log_all + torch.log1p(-(log_one - log_all).exp().clamp_max(1 - 1e-6))
        return torch.where(outside_P, left, log_all)

    log_all_q = torch.where(outside_P, log_Q, 0)
    rest_p = torch.where(
        outside_P,
        without(torch.where(outside_P, log_m, 0), torch.where(outside_P, log_py, -1)),
        log_m,
    )
    rest_q = torch.where(
        outside_P, without(log_all_q, torch.where(outside_P, student.log_target, -1)), log_Q
    )
    log_py = log_py.masked_fill(~outside_P, -torch.inf)
    return as_cells(
        torch.cat(
            [teacher.logprobs.to(student.dtype), log_py.unsqueeze(1), rest_p.unsqueeze(1)], 1
        ),
        torch.cat([student.log_head, student.log_target.unsqueeze(1), rest_q.unsqueeze(1)], 1),
        student.log_u,
    )
