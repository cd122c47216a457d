"""Forward KL from what a cache holds: the head, the mass of the tail, and what is known of the tail beyond that.

Dropping the tail and renormalising the head would teach the student to be over-confident. There are three ways not to:

samples   draws from the tail stand for it: unbiased, and so is the gradient
prior     the tail is spread over its ids as the cache's prior says: a full distribution, near the teacher's
ghost     the tail is one cell of known mass: a lower bound

The gradients are written by hand, because autograd would keep several more ``[P, V]`` buffers, and because in the ghost's
``log(1 - sum q)`` it loses all digits once the student's tail is small.

Shapes: P positions, K head entries (padded), S draws (padded), E = K + S, V student vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cache_format.errors import UserError
from train.losses.base import SparseTeacher

Tail = Literal["samples", "prior", "ghost"]


def tail_of(teacher: SparseTeacher) -> Tail:
    """The best of the three that ``teacher`` allows: samples, else its prior, else the ghost."""
    if teacher.samples is not None and (teacher.entropy is not None or teacher.sample_logprobs is not None):
        return "samples"
    return "ghost" if teacher.prior is None else "prior"


def forward_kl(
    student_logits: Tensor, teacher: SparseTeacher, *, temperature: float = 1.0, tail: Tail | Literal["auto"] = "auto"
) -> Tensor:
    """KL(p || q) in nats per position, with p the teacher and q = softmax(student_logits).

    With head K, tail mass m, the student's tail mass Q, draws s (S of them), teacher entropy H and prior b::

        samples   - sum over K of p log q  -  m/S * sum over s of log q_s  -  H
        prior     sum over K of p log(p / q)  +  sum outside K of r log(r / q),   r = m b / (1 - sum over K of b)
        ghost     sum over K of p log(p / q)  +  m log(m / Q)

    ``samples`` is **unbiased**, and so is its gradient: over fresh draws its mean is the KL of the whole distribution.
    A single value may be negative. Where the cache has the draws' logprobs but no entropy, their own share of H is
    estimated from the draws. ``prior`` is **exact for the reconstruction**, which is not the teacher. ``ghost`` is a
    **lower bound** (data processing inequality), tight where q is proportional to p outside the head. All three are
    **exact** where the head is everything.

    Ids from ``teacher.vocab_size`` up, which the teacher cannot predict (a padded student vocabulary), have p = 0. They
    are no part of the tail, so mass put on them is always pushed down.

    Args:
        student_logits: [P, V], any floating dtype; arithmetic is float32, or float64 for float64 logits.
        teacher: the sparse teacher; padded entries contribute nothing, and k may differ by position.
        temperature: both distributions are softened by it (TRL's convention: the result is not scaled by its square).
            Anything but 1 needs every logit of the teacher, so every head must be everything.
        tail: ``"auto"`` takes the best that the cache allows, in the order above.

    Returns:
        float32[P] (float64 for float64 logits). The gradient in a logit is ``M q - p``, p being what stands for the
        teacher there and M its sum, which quantisation may move off 1; for the ghost it is ``M q - m q / Q`` in the tail.

    Raises:
        UserError: a temperature other than 1 on a teacher whose tail was not stored, or one that is not positive; a
            ``tail`` that is unknown or that the cache has nothing for.
    """
    if tail not in ("auto", "samples", "prior", "ghost"):
        raise UserError(f"forward_kl: tail is {tail!r}, expected auto, samples, prior or ghost")
    best = tail_of(teacher)
    if (tail == "samples" and best != "samples") or (tail == "prior" and teacher.prior is None):
        raise UserError(f"forward_kl: tail is {tail!r}, but the cache has no {tail} (it allows {best})")
    if temperature != 1.0:
        return _softened(student_logits, teacher, temperature)
    kind = best if tail == "auto" else tail
    if kind == "ghost":
        loss_P: Tensor = _GhostKL.apply(  # type: ignore[no-untyped-call]
            student_logits, teacher.ids, teacher.logprobs, teacher.tail_logprob, teacher.vocab_size
        )
        return loss_P
    return (_from_samples if kind == "samples" else _from_prior)(student_logits, teacher)


def _softened(student_logits: Tensor, teacher: SparseTeacher, temperature: float) -> Tensor:
    if not temperature > 0:
        raise UserError(f"forward_kl: temperature is {temperature}, expected a positive number; 1 is the default")
    if not bool(torch.isneginf(teacher.tail_logprob).all()):
        raise UserError(
            f"forward_kl: temperature is {temperature}, but the cache stores {teacher.ids.shape[1]} of "
            f"{teacher.vocab_size} ids and other temperatures need all of them; use temperature 1"
        )
    logprobs = torch.log_softmax(teacher.logprobs / temperature, dim=1)
    loss_P: Tensor = _GhostKL.apply(  # type: ignore[no-untyped-call]
        student_logits / temperature, teacher.ids, logprobs, teacher.tail_logprob, teacher.vocab_size
    )
    return loss_P


def _from_samples(student_logits: Tensor, teacher: SparseTeacher) -> Tensor:
    assert teacher.samples is not None
    p_PK, weight_PS = teacher.logprobs.exp(), teacher.sample_weights
    if teacher.entropy is not None:
        negentropy_P = -teacher.entropy
    else:
        assert teacher.sample_logprobs is not None
        negentropy_P = _p_log_p(p_PK, teacher.logprobs) + _p_log_p(weight_PS, teacher.sample_logprobs)
    ids_PE, weight_PE = torch.cat([teacher.ids, teacher.samples], 1), torch.cat([p_PK, weight_PS], 1)
    ce_P: Tensor = _SparseCrossEntropy.apply(student_logits, ids_PE, weight_PE, None, None)  # type: ignore[no-untyped-call]
    return ce_P + negentropy_P


def _from_prior(student_logits: Tensor, teacher: SparseTeacher) -> Tensor:
    assert teacher.prior is not None
    prior, ids_PK = teacher.prior, teacher.ids
    p_PK, m_P = teacher.logprobs.exp(), teacher.tail_logprob.exp()
    b_PK = prior[ids_PK.clamp_min(0)].masked_fill(ids_PK < 0, 0)
    # r = c b outside the head, c = m / (1 - mass of the prior in the head).
    outside_P = (1 - b_PK.sum(1)).clamp_min(torch.finfo(prior.dtype).tiny)
    c_P = m_P / outside_P
    log_b = prior.log()
    b_log_b_P = (prior * log_b).sum() - _p_log_p(b_PK, log_b[ids_PK.clamp_min(0)])
    negentropy_P = _p_log_p(p_PK, teacher.logprobs) + c_P * b_log_b_P + torch.where(m_P > 0, m_P * c_P.log(), 0)
    ce_P: Tensor = _SparseCrossEntropy.apply(  # type: ignore[no-untyped-call]
        student_logits, ids_PK, p_PK - c_P.unsqueeze(1) * b_PK, prior, c_P
    )
    return ce_P + negentropy_P


def _p_log_p(p: Tensor, log_p: Tensor) -> Tensor:
    """Sum of p log p along dimension 1, where 0 log 0 = 0."""
    return torch.where(p == 0, 0, p * log_p).sum(1)


class _SparseCrossEntropy(torch.autograd.Function):
    """``-sum over e of w_e log q_e  -  c * sum over v of b_v log q_v``: float32[P], for a target with few entries.

    ids [P, E] (padding: -1, weight 0; ids may repeat), weights [P, E], and optionally a dense b [V'] with scale c [P].
    """

    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, ids_PE: Tensor, weight_PE: Tensor, b: Tensor | None, c_P: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        ids_PE, weight_PE = ids_PE.clamp_min(0), weight_PE.to(dtype)
        lse_P = torch.logsumexp(logits_PV.to(dtype), 1)
        total_P = weight_PE.sum(1)
        loss_P = -(weight_PE * logits_PV.gather(1, ids_PE).to(dtype)).sum(1)
        if b is not None and c_P is not None:
            b, c_P = b.to(dtype), c_P.to(dtype)
            total_P = total_P + c_P * b.sum()
            loss_P = loss_P - c_P * (logits_PV[:, : len(b)].to(dtype) @ b)
        ctx.save_for_backward(logits_PV, ids_PE, weight_PE, lse_P, total_P, b, c_P)
        return loss_P + total_P * lse_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        logits_PV, ids_PE, weight_PE, lse_P, total_P, b, c_P = ctx.saved_tensors
        work_PV = logits_PV.to(weight_PE.dtype, copy=True)
        work_PV.sub_(lse_P.unsqueeze(1)).exp_().mul_((grad_P * total_P).unsqueeze(1))
        if b is not None:
            work_PV[:, : len(b)].addr_(grad_P * c_P, b, alpha=-1)
        work_PV.scatter_add_(1, ids_PE, -grad_P.unsqueeze(1) * weight_PE)
        return work_PV.to(logits_PV.dtype), None, None, None, None


def _exp_tail(logits_PV: Tensor, ids_PK: Tensor, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(work, shift, total): work[:, :vocab_size] is exp(logits - shift) with zeros in the head, total [P, 1] its sum.

    Columns from ``vocab_size`` up keep the logits as they are. ``work`` is a fresh [P, V] buffer, the only one made.
    """
    work_PV = logits_PV.to(dtype, copy=True)
    tail = work_PV[:, :vocab_size]
    # amin and not a plain scatter: padding has to point at some id, and +inf leaves that id's logit alone even where
    # the same id is also a head entry.
    out = torch.where(ids_PK < 0, torch.inf, -torch.inf).to(dtype)
    tail.scatter_reduce_(1, ids_PK.clamp_min(0), out, "amin")
    shift_P1 = tail.amax(1, keepdim=True)
    shift_P1 = torch.where(torch.isneginf(shift_P1), 0, shift_P1)
    tail.sub_(shift_P1).exp_()
    return work_PV, shift_P1, tail.sum(1, keepdim=True)


class _GhostKL(torch.autograd.Function):
    """The loss and its analytic gradient; nothing of size [P, V] is kept between the two but the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, ids_PK: Tensor, logp_PK: Tensor, log_m_P: Tensor, vocab_size: int
    ) -> Tensor:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        logp_PK, log_m_P1 = logp_PK.to(dtype), log_m_P.to(dtype).unsqueeze(1)
        work_PV, shift_P1, total_P1 = _exp_tail(logits_PV, ids_PK, vocab_size, dtype)
        log_tail_P1 = total_P1.log() + shift_P1
        z_PK = logits_PV.gather(1, ids_PK.clamp_min(0)).to(dtype)
        z_PK = z_PK.masked_fill(ids_PK < 0, -torch.inf)
        unpredictable_P1 = work_PV[:, vocab_size:].logsumexp(1, keepdim=True)
        # The normaliser is summed from the cells, so log_Q below has full relative precision however small Q is.
        lse_P1 = torch.cat([z_PK, log_tail_P1, unpredictable_P1], 1).logsumexp(1, keepdim=True)

        log_p = torch.cat([logp_PK, log_m_P1], 1)
        log_q = torch.cat([z_PK, log_tail_P1], 1) - lse_P1
        cells = torch.where(torch.isneginf(log_p), 0, log_p.exp() * (log_p - log_q))
        ctx.save_for_backward(logits_PV, ids_PK, log_p, log_q, lse_P1)
        ctx.vocab_size = vocab_size
        return cells.sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        logits_PV, ids_PK, log_p, log_q, lse_P1 = ctx.saved_tensors
        p, q, grad_P1 = log_p.exp(), log_q.exp(), grad_P.unsqueeze(1)
        mass_P1 = p.sum(1, keepdim=True)
        slope = grad_P1 * (mass_P1 * q - p)

        work_PV, _, total_P1 = _exp_tail(logits_PV, ids_PK, ctx.vocab_size, log_p.dtype)
        # Within the tail the slope of the ghost cell is shared out by softmax: M q - m q / Q, without dividing by Q.
        work_PV[:, : ctx.vocab_size].mul_(torch.where(total_P1 > 0, slope[:, -1:] / total_P1, 0))
        work_PV[:, ctx.vocab_size :].sub_(lse_P1).exp_().mul_(grad_P1 * mass_P1)
        # Padding has p = q = 0 and so adds nothing to the id it points at.
        work_PV.scatter_add_(1, ids_PK.clamp_min(0), slope[:, :-1])
        return work_PV.to(logits_PV.dtype), None, None, None, None
