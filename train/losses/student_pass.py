"""The student's side of all losses, computed once per chunk of logits.

The cost of a loss is a dense pass over ``[P, V]`` logits. Sparse losses need little from it: the
logits at the ids that the cache names and at the student's own top ids, and the mass of all other
ids. ``StudentPass`` makes this one pass. The losses then compute on tensors of about ``[P, K]`` by
autograd, and the gradient of all of them together is one more pass. On CUDA both passes are kernels
(``logitcask.train.losses.kernels``).

The mass of the tail is summed over the tail itself. Computed as ``1 - sum of q``, a small mass
would lose all digits.

Shapes: P positions, K head entries (padded), C chosen ids (padded), S draws (padded), E = K + C +
S + 1 + k ids that are gathered, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from logitcask.train.losses import kernels
from logitcask.train.losses.base import ChosenTail, SparseTeacher, TailDraws

# Bytes of logits processed at a time. On a CPU temporaries stay in its cache; on a GPU fewer
# launches matter more.
_SLAB_BYTES = {"cpu": 2 * 2**20}
_SLAB_BYTES_ELSEWHERE = 128 * 2**20


class StudentPass:
    """softmax(scale * logits) in a teacher's cells: head ids, tail, unpredictable ids.

    The unpredictable ids are those from ``teacher.vocab_size`` up (a padded student vocabulary).

    Args:
        logits: [P, V], any floating dtype; arithmetic is float32, or float64 for float64 logits.
        teacher: of the same P positions.
        top_k: number of the student's own most probable ids to gather.
        prior: whether to compute ``prior_dot``.
        scale: 1 / temperature.
        masses: whether to compute ``log_tail``, ``log_others`` and ``lse``. Losses that use only
            logits do not need them.
        may_overwrite: whether the backward pass may write the gradient over the logits. It does so
            unless a loss has read ``logits``, because that loss may still need them.

    Attributes:
        draws, chosen: the teacher's, or no columns of them.
        z_head, z_chosen, z_samples, z_target, z_top: scaled logits at head ids [P, K], chosen ids
            [P, C], draws [P, S], targets [P] and the student's top k [P, k], largest first; -inf for
            padding.
        top_ids:    int64[P, k].
        log_left:   [P], logsumexp of the scaled logits outside head and chosen ids; -inf if there
                    are none.
        log_others: [P], logsumexp of the scaled logits of the unpredictable ids.
        lse:        [P], logsumexp of all scaled logits.
        prior_dot:  [P], sum over the teacher's vocabulary of prior * scaled logits; None unless
                    ``prior``.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher: SparseTeacher,
        *,
        top_k: int = 0,
        prior: bool = False,
        masses: bool = True,
        scale: float = 1.0,
        may_overwrite: bool = False,
    ) -> None:
        self.teacher, self.scale, self.masses = teacher, scale, masses
        self._logits, self._overwrite = logits, [may_overwrite]
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.top_ids = logits.detach().topk(top_k, dim=1).indices
        nothing = TailDraws(teacher.ids[:, :0], teacher.logprobs[:, :0])
        self.draws = nothing if teacher.draws is None else teacher.draws
        none = ChosenTail(teacher.ids[:, :0], teacher.logprobs[:, :0], teacher.tail_logprob)
        self.chosen = none if teacher.chosen is None else teacher.chosen
        known = teacher.ids
        if teacher.chosen is not None:
            known = torch.cat([teacher.ids, teacher.chosen.ids], 1)
        # The known ids come first, as _Pass needs them.
        parts = [
            *(teacher.ids, self.chosen.ids, self.draws.ids),
            *(teacher.target_ids.unsqueeze(1), self.top_ids),
        ]
        b = teacher.prior.to(self.dtype) if prior and teacher.prior is not None else None
        ids_PE = torch.cat(parts, 1)
        z_PE, self.log_left, self.log_others, dot = _Pass.apply(  # type: ignore[no-untyped-call]
            logits, known, ids_PE, b, teacher.vocab_size, scale, masses, self._overwrite
        )
        z_PE = z_PE.masked_fill(ids_PE < 0, -torch.inf)
        self.z_head, self.z_chosen, self.z_samples, z_target, self.z_top = z_PE.split(
            [part.shape[1] for part in parts], 1
        )
        self.z_target = z_target.squeeze(1)
        self.prior_dot: Tensor | None = None if b is None else dot
        rest = [self.log_left.unsqueeze(1), self.log_others.unsqueeze(1)]
        self.lse: Tensor = torch.cat([self.z_head, self.z_chosen, *rest], 1).logsumexp(1)

    @classmethod
    def of(
        cls,
        student: Tensor | StudentPass,
        teacher: SparseTeacher,
        *,
        top_k: int = 0,
        prior: bool = False,
        masses: bool = True,
        scale: float | None = None,
    ) -> StudentPass:
        """``student`` itself if it is a StudentPass with the needed parts, else one made from the
        logits. Its scale is kept, or is 1.
        """
        if isinstance(student, Tensor):
            return cls(
                student, teacher, top_k=top_k, prior=prior, masses=masses, scale=scale or 1.0
            )
        scale = scale or student.scale
        serves = (
            student.teacher is teacher
            and student.scale == scale
            and student.top_ids.shape[1] >= top_k
            and (student.prior_dot is not None or not prior)
            and (student.masses or not masses)
        )
        return (
            student
            if serves
            else cls(student.logits, teacher, top_k=top_k, prior=prior, masses=masses, scale=scale)
        )

    @property
    def logits(self) -> Tensor:
        """[P, V] as given, for losses with their own dense pass."""
        self._overwrite[0] = False
        return self._logits

    def __len__(self) -> int:
        return len(self._logits)

    @property
    def log_head(self) -> Tensor:
        """[P, K] logprobs of the head ids, -inf for padding."""
        return self.z_head - self.lse.unsqueeze(1)

    @property
    def log_tail(self) -> Tensor:
        """[P] logsumexp of the scaled logits outside the head; -inf if there are none."""
        if not self.z_chosen.shape[1]:
            return self.log_left
        parts = torch.cat([self.z_chosen, self.log_left.unsqueeze(1)], 1)
        nothing = torch.isneginf(parts).all(1)
        # A sum of nothing has no gradient, which automatic differentiation does not know.
        return torch.where(
            nothing, self.log_left, parts.masked_fill(nothing.unsqueeze(1), 0).logsumexp(1)
        )

    @property
    def log_chosen(self) -> Tensor:
        """[P, C] logprobs of the chosen ids, -inf for padding."""
        return self.z_chosen - self.lse.unsqueeze(1)

    @property
    def log_rest(self) -> Tensor:
        """[P] log of the mass outside head and chosen ids."""
        return self.log_left - self.lse

    @property
    def log_samples(self) -> Tensor:
        """[P, S] logprobs of the draws, 0 for padding."""
        return (self.z_samples - self.lse.unsqueeze(1)).masked_fill(self.draws.ids < 0, 0)

    @property
    def log_target(self) -> Tensor:
        """[P] logprobs of the targets."""
        return self.z_target - self.lse

    @property
    def log_Q(self) -> Tensor:
        """[P] log of the mass in the tail."""
        return self.log_tail - self.lse

    @property
    def log_u(self) -> Tensor:
        """[P] log of the mass on unpredictable ids."""
        return self.log_others - self.lse


def slabs(logits_PV: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Cuts P rows into slices of bounded size in ``dtype``."""
    bound = _SLAB_BYTES.get(logits_PV.device.type, _SLAB_BYTES_ELSEWHERE)
    rows = max(1, bound // (dtype.itemsize * logits_PV.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits_PV), rows))


class _Pass(torch.autograd.Function):
    """(z [P, E], log_tail [P], log_others [P], prior_dot [P]) of scaled logits. The logits are the
    only tensor of size [P, V] that it keeps.

    Here the head is all known ids: the head's and the chosen ones, in this order, both padded. They
    are the first ones of the E ids. ``log_tail`` is of all ids but these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        head_PK: Tensor,
        ids_PE: Tensor,
        b: Tensor | None,
        vocab_size: int,
        scale: float,
        masses: bool,
        overwrite: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Logits at the named ids.
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        z_PE = logits_PV.gather(1, ids_PE.clamp_min(0)).to(dtype)
        log_tail_P, log_others_P, dot_P = (z_PE.new_zeros(len(logits_PV)) for _ in range(3))
        # Log-sums of the tail and of unpredictable ids: by kernels, or by slabs of rows, where the
        # head's logits are -inf.
        fused = masses and kernels.usable(logits_PV)
        if fused:
            log_tail_P, log_others_P = _log_sums(logits_PV.data, head_PK, vocab_size, scale)
            if b is not None:
                dot_P = _dot(logits_PV[:, :vocab_size].to(dtype), b) * scale
        for rows in slabs(logits_PV, dtype) if masses and not fused else ():
            work = logits_PV[rows].to(dtype, copy=True)
            if scale != 1.0:
                work.mul_(scale)
            log_others_P[rows] = work[:, vocab_size:].logsumexp(1)
            tail = work[:, :vocab_size]
            if b is not None:
                dot_P[rows] = _dot(tail, b)
            _fill_head(tail, head_PK[rows], -torch.inf)
            shift = tail.amax(1, keepdim=True)
            shift = torch.where(torch.isneginf(shift), 0, shift)
            log_tail_P[rows] = tail.sub_(shift).exp_().sum(1).log() + shift.squeeze(1)
        ctx.save_for_backward(logits_PV, head_PK, ids_PE, b, log_tail_P, log_others_P)
        ctx.vocab_size, ctx.scale, ctx.masses, ctx.overwrite = vocab_size, scale, masses, overwrite
        ctx.set_materialize_grads(True)
        return z_PE * scale, log_tail_P, log_others_P, dot_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_z_PE: Tensor, grad_tail_P: Tensor, grad_others_P: Tensor, grad_dot_P: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits_PV, head_PK, ids_PE, b, log_tail_P, log_others_P = ctx.saved_tensors
        dtype, scale, size = log_tail_P.dtype, ctx.scale, ctx.vocab_size
        # The gradient of an id in the tail (or of an unpredictable id) is its softmax in that part
        # times the gradient of the part's log-sum. The gradients at the named ids and of the prior
        # are added. All of it is scaled.
        shifts = [
            torch.where(torch.isneginf(log), 0, log).unsqueeze(1)
            for log in (log_tail_P, log_others_P)
        ]
        grad_z_PE = (grad_z_PE * scale).masked_fill(ids_PE < 0, 0)
        ids_PE = ids_PE.clamp_min(0)
        # Without masses there are only the named ids.
        if not ctx.masses:
            grad_PV = (
                torch.zeros_like(logits_PV, dtype=dtype)
                .scatter_add_(1, ids_PE, grad_z_PE)
                .to(logits_PV.dtype)
            )
            return grad_PV, None, None, None, None, None, None, None
        # By kernels: softmax and prior in one pass, written over the logits; then the named ids.
        if kernels.usable(logits_PV):
            grad_PV = logits_PV.data if ctx.overwrite[0] else logits_PV.clone()
            _fill_head(grad_PV[:, :size], head_PK, -torch.inf)
            slopes = (grad_tail_P * scale, grad_others_P * scale)
            slope_prior = None if b is None else grad_dot_P * scale
            if b is not None and slope_prior is not None:
                # The prior's part at head ids is added to the head's own gradient, so that terms
                # cancel before rounding.
                of_head_PK = b[head_PK.clamp_min(0)].masked_fill(
                    head_PK < 0, 0
                ) * slope_prior.unsqueeze(1)
                grad_z_PE[:, : head_PK.shape[1]] += of_head_PK
            kernels.spread(
                grad_PV,
                size,
                log_tail_P,
                slopes[0],
                log_others_P,
                slopes[1],
                scale,
                prior=b,
                slope_prior=slope_prior,
            )
            _add_entries(grad_PV, ids_PE, grad_z_PE)
            return grad_PV, None, None, None, None, None, None, None
        # In torch, by slabs of rows; ``work`` is the gradient in ``dtype``.
        grad_PV = logits_PV if ctx.overwrite[0] else torch.empty_like(logits_PV)
        for rows in slabs(logits_PV, dtype):
            if grad_PV.dtype == dtype:
                work = grad_PV[rows]
                if not ctx.overwrite[0]:
                    work.copy_(logits_PV[rows])
            else:
                work = logits_PV[rows].to(dtype)
            if scale != 1.0:
                work.mul_(scale)
            # The softmax of each part times the gradient of its log-sum.
            for part, shift, grad_P in (
                (work[:, :size], shifts[0], grad_tail_P),
                (work[:, size:], shifts[1], grad_others_P),
            ):
                part.sub_(shift[rows]).exp_().mul_((grad_P[rows] * scale).unsqueeze(1))
            tail = work[:, :size]
            # Head ids are not part of this softmax: the values there, even inf, are overwritten.
            _fill_head(tail, head_PK[rows], 0.0)
            # The prior, then the named ids.
            if b is not None:
                tail.addr_(grad_dot_P[rows] * scale, b)
            work.scatter_add_(1, ids_PE[rows], grad_z_PE[rows])
            if grad_PV.dtype != dtype:
                grad_PV[rows] = work
        return grad_PV, None, None, None, None, None, None, None


def _log_sums(
    logits_PV: Tensor, head_PK: Tensor, vocab_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(log_tail, log_others) by the kernels; meanwhile the logits of the head are -inf."""
    if not head_PK.shape[1]:
        return kernels.log_sums(logits_PV, vocab_size, scale)
    first_P1 = head_PK.amax(1, keepdim=True)
    at_PK = torch.where(head_PK < 0, first_P1, head_PK).clamp_min(0)
    z_PK = logits_PV.gather(1, at_PK)
    _fill_head(logits_PV[:, :vocab_size], head_PK, -torch.inf)
    found = kernels.log_sums(logits_PV, vocab_size, scale)
    logits_PV.scatter_(1, at_PK, z_PK)
    return found


def _dot(z_PV: Tensor, b_V: Tensor) -> Tensor:
    """``z_PV @ b_V`` in the precision of its factors, which autocast would lower."""
    with torch.autocast(z_PV.device.type, enabled=False):
        return z_PV @ b_V


def _add_entries(grad_PV: Tensor, ids_PE: Tensor, grad_PE: Tensor) -> None:
    """grad[p, ids[p, e]] += grad_PE[p, e] for ids that may repeat. The values of equal ids are
    summed before they are rounded.
    """
    if grad_PV.dtype == grad_PE.dtype:
        grad_PV.scatter_add_(1, ids_PE, grad_PE)
        return
    ids_PE, order_PE = ids_PE.sort(dim=1)
    # Equal ids are neighbours now; group_PE numbers the distinct ids from 0 in each row.
    group_PE = torch.nn.functional.pad((ids_PE[:, 1:] != ids_PE[:, :-1]).cumsum(1), (1, 0))
    sums_PE = torch.zeros_like(grad_PE).scatter_add_(1, group_PE, grad_PE.gather(1, order_PE))
    total_PE = sums_PE.gather(1, group_PE) + grad_PV.gather(1, ids_PE)
    grad_PV.scatter_(1, ids_PE, total_PE.to(grad_PV.dtype))


def _fill_head(tail_rV: Tensor, head_rK: Tensor, value: float) -> None:
    """Writes ``value`` at the head ids, in place. Padding repeats an id of the row, or changes
    nothing if the head is empty.
    """
    if not head_rK.shape[1]:
        return
    first_r1 = head_rK.amax(1, keepdim=True)
    keep_r1 = torch.where(first_r1 < 0, tail_rV[:, :1], value)
    tail_rV.scatter_(
        1, torch.where(head_rK < 0, first_r1, head_rK).clamp_min(0), keep_r1.expand(head_rK.shape)
    )
