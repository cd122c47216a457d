"""The two passes over a chunk of logits as Triton kernels: each row's log-sums, and the gradient
written in place.

``logitcask.train.losses.student_pass`` has the same in plain torch, as the reference and for other
devices. In torch every operation is a pass over the logits, and several make a float32 copy. Here
the first pass reads the logits once (the online logsumexp of Milakov and Gimelshein, arXiv
1805.02867). The second reads and writes them once. Both keep the dtype of the logits and compute in
float32 in registers.

The kernels are used for CUDA tensors. ``LOGITCASK_TRITON=0`` turns them off. With
``TRITON_INTERPRET=1``, set before triton is first imported, they run slowly on the CPU. The tests
use this.

Shapes: C positions, V vocabulary.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ENABLED = triton is not None and os.environ.get("LOGITCASK_TRITON", "1") != "0"
_BLOCK = 4096
_WARPS = 8


def usable(logits: Tensor) -> bool:
    """Whether the kernels support it: on CUDA or interpreted, rows contiguous, at most float32."""
    return (
        _ENABLED
        and (logits.is_cuda or INTERPRETED)
        and logits.stride(-1) == 1
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and len(logits) > 0
    )


def log_sums(logits_CV: Tensor, split: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """float32[C] each: logsumexp of scale * a row's columns below ``split`` and from it up; -inf if
    all columns are -inf.
    """
    low, high = logits_CV.new_empty((2, len(logits_CV)), dtype=torch.float32)
    _log_sums[(len(logits_CV),)](
        logits_CV,
        logits_CV.stride(0),
        low,
        high,
        split,
        logits_CV.shape[1],
        scale,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return low, high


def spread(
    logits_CV: Tensor,
    split: int,
    low: Tensor,
    slope_low: Tensor,
    high: Tensor,
    slope_high: Tensor,
    scale: float = 1.0,
    *,
    prior: Tensor | None = None,
    slope_prior: Tensor | None = None,
) -> None:
    """Overwrites logits: ``exp(scale * z - low) * slope_low`` in columns below ``split``, likewise
    ``high`` from it up.

    With ``low`` and ``high`` from ``log_sums`` this is each part's softmax times a slope per row,
    float32[C] each. With ``prior``, float32[split], ``prior * slope_prior`` is added below
    ``split`` before rounding, except where z is -inf.
    """
    b, slope_b = (
        (prior, slope_prior) if prior is not None and slope_prior is not None else (low, low)
    )
    _spread[(len(logits_CV),)](
        logits_CV,
        logits_CV.stride(0),
        low,
        slope_low.contiguous(),
        high,
        slope_high.contiguous(),
        b.contiguous(),
        slope_b.contiguous(),
        split,
        logits_CV.shape[1],
        scale,
        PRIOR=prior is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


if triton is not None:

    @triton.jit
    def _log_sum_of(row, start, end, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        columns = tl.arange(0, BLOCK)
        # One running maximum and sum per lane; lanes are combined once, at the end.
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            z = (
                tl.load(row + at + columns, mask=at + columns < end, other=float("-inf")).to(
                    tl.float32
                )
                * scale
            )
            new = tl.maximum(highest, z)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(highest - shift) + tl.exp(z - shift)
            highest = new
        most = tl.max(highest, 0)
        shift = tl.where(most == float("-inf"), 0.0, most)
        return tl.log(tl.sum(total * tl.exp(highest - shift), 0)) + shift

    @triton.jit
    def _log_sums(logits, stride, low, high, split, size, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0)
        # 64 bits: a chunk may hold more than 2**31 logits.
        row = logits + at.to(tl.int64) * stride
        tl.store(low + at, _log_sum_of(row, 0, split, scale, BLOCK))
        tl.store(high + at, _log_sum_of(row, split, size, scale, BLOCK))

    @triton.jit
    def _spread_part(  # type: ignore[no-untyped-def]
        row,
        start,
        end,
        scale,
        log_sum,
        slope,
        prior,
        slope_prior,
        PRIOR: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK)
        shift = tl.where(log_sum == float("-inf"), 0.0, log_sum)
        for at in range(start, end, BLOCK):
            inside = at + columns < end
            z = tl.load(row + at + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
            value = tl.exp(z - shift) * slope
            if PRIOR:
                b = tl.load(prior + at + columns, mask=inside, other=0.0)
                value += tl.where(z == float("-inf"), 0.0, b * slope_prior)
            tl.store(row + at + columns, value, mask=inside)

    @triton.jit
    def _spread(  # type: ignore[no-untyped-def]
        logits,
        stride,
        low,
        slope_low,
        high,
        slope_high,
        prior,
        slope_prior,
        split,
        size,
        scale,
        PRIOR: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0)
        row = logits + at.to(tl.int64) * stride
        _spread_part(
            row,
            0,
            split,
            scale,
            tl.load(low + at),
            tl.load(slope_low + at),
            prior,
            tl.load(slope_prior + at),
            PRIOR,
            BLOCK,
        )
        _spread_part(
            row,
            split,
            size,
            scale,
            tl.load(high + at),
            tl.load(slope_high + at),
            prior,
            0.0,
            False,
            BLOCK,
        )
