"""Forward KL from the stored head, everything outside it being one "ghost" cell.

Dropping the tail and renormalising the head would teach the student to be over-confident. One extra cell that holds the
tail mass keeps the head's probabilities what they are and costs one logsumexp. The gradient is written by hand because
autograd through ``log(1 - sum q)`` loses all digits once the student's tail is small, and because it needs several more
``[P, V]`` buffers.

Shapes: P positions, K head entries (padded), V student vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache_format.errors import UserError
from train.losses.base import SparseTeacher


def forward_kl(student_logits: Tensor, teacher: SparseTeacher, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) in nats per position, with p the teacher and q = softmax(student_logits).

    With head K, teacher tail mass m and student tail mass Q::

        sum over K of p log(p / q)  +  m log(m / Q)

    This is a **lower bound** of the true KL (data processing inequality), tight where q is proportional to p outside
    the head, and the **exact** value iff the head is everything (``tail_logprob`` = -inf, m = 0). ``teacher.samples``
    are not used.

    Ids from ``teacher.vocab_size`` up, which the teacher cannot predict (a padded student vocabulary), have p = 0. They
    are no part of the tail: Q is the student's mass on predictable ids only, so mass put on them is always pushed down.

    Args:
        student_logits: [P, V], any floating dtype; arithmetic is float32, or float64 for float64 logits.
        teacher: the sparse teacher; padded entries contribute nothing, and k may differ by position.
        temperature: both distributions are softened by it (TRL's convention: the result is not scaled by its square).
            Anything but 1 needs every logit of the teacher, so every head must be everything.

    Returns:
        float32[P] (float64 for float64 logits). The gradient in a logit is ``M q - p`` in the head and
        ``M q - m q / Q`` in the tail, with M the teacher's stored mass, which quantisation may move off 1.

    Raises:
        UserError: a temperature other than 1 on a teacher whose tail was not stored, or one that is not positive.
    """
    logprobs, tail_logprob = teacher.logprobs, teacher.tail_logprob
    if temperature != 1.0:
        if not temperature > 0:
            raise UserError(f"forward_kl: temperature is {temperature}, expected a positive number; 1 is the default")
        if not bool(torch.isneginf(tail_logprob).all()):
            raise UserError(
                f"forward_kl: temperature is {temperature}, but the cache stores {teacher.ids.shape[1]} of "
                f"{teacher.vocab_size} ids and other temperatures need all of them; use temperature 1"
            )
        logprobs = torch.log_softmax(logprobs / temperature, dim=1)
        student_logits = student_logits / temperature
    loss_P: Tensor = _GhostKL.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher.ids, logprobs, tail_logprob, teacher.vocab_size
    )
    return loss_P


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
