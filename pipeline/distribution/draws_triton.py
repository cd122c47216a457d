"""Draws from the tail as Triton kernels: the same as
``logitcask.pipeline.distribution.draws_torch`` with fewer temporaries and launches.

The scores are read twice (once if they are logprobs), and no tensor of their size is written. One
program per row computes the log-sum. One program per row sums the probabilities of each block of
ids and the entropy, and hashes the position. One program per few draws finds the block of each
draw, and then the id in it. The bits of the hash are those of
``logitcask.pipeline.distribution.draws``.

The kernels are used for CUDA tensors. ``LOGITCASK_TRITON=0`` turns them off. With
``TRITON_INTERPRET=1``, set before triton is first imported, they run slowly on the CPU. The tests
use this.

Shapes: R positions, V vocabulary, B blocks of ids, T sets of S draws.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, LEAST_LOGPROB, SET_STRIDE, hashed_seed

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ENABLED = triton is not None and os.environ.get("LOGITCASK_TRITON", "1") != "0"
_BLOCK = 256
_WORDS = _BLOCK // 32  # of 32 bits, one an id
_GROUP = 16  # blocks at a time
_LANES = 4  # draws at a time: with twice as many, only one program fits a multiprocessor of an H100
_WARPS = {"norms": 8, "mark": 1, "tails": 8, "find": 8}


def usable(scores: Tensor) -> bool:
    """Whether the kernels support it: on CUDA or interpreted, rows contiguous, at most float32."""
    return (
        _ENABLED
        and (scores.is_cuda or INTERPRETED)
        and scores.stride(-1) == 1
        and scores.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def norms(scores_RV: Tensor) -> Tensor:
    """float32[R, 2]: each row's highest score, and the log of the sum of exp(score - highest).

    The scores minus the first and then minus the second are logprobs, as in ``log_softmax``.
    Subtracting their sum would round more.
    """
    out = scores_RV.new_empty((len(scores_RV), 2), dtype=torch.float32)
    _norms[(len(out),)](
        scores_RV,
        scores_RV.stride(0),
        out,
        scores_RV.shape[1],
        TILE=_GROUP * _BLOCK,
        num_warps=_WARPS["norms"],
    )
    return out


class Tails(NamedTuple):
    """The results of a pass over the scores.

    sums:    float32[R, B], the probability of each block of ids outside the head.
    bits:    int32[R, B * 8], the head, one bit per id.
    keys:    int64[R], the hash of the position.
    entropy: float32[R], nats.
    """

    sums: Tensor
    bits: Tensor
    keys: Tensor
    entropy: Tensor


def tails(
    scores_RV: Tensor,
    norms_R2: Tensor,
    top_ids: Tensor,
    target_ids: Tensor,
    head_size: Tensor,
    capture: Capture,
) -> Tails:
    """``top_ids``: int64[R, K], of which the first ``head_size`` (int32[R]) form the head;
    ``target_ids``: int64[R].
    """
    rows, size = scores_RV.shape
    blocks = triton.cdiv(size, _BLOCK)
    bits = torch.zeros(rows, blocks * _WORDS, dtype=torch.int32, device=scores_RV.device)
    if capture.top_k:
        _mark[(rows,)](
            bits,
            bits.shape[1],
            top_ids,
            top_ids.stride(0),
            head_size,
            WIDTH=triton.next_power_of_2(capture.top_k),
            num_warps=_WARPS["mark"],
        )
    sums = scores_RV.new_empty(rows, blocks, dtype=torch.float32)
    entropy = scores_RV.new_empty(rows, dtype=torch.float32)
    keys = torch.empty(rows, dtype=torch.int64, device=scores_RV.device)
    _tails[(rows,)](
        scores_RV,
        scores_RV.stride(0),
        norms_R2,
        bits,
        top_ids,
        top_ids.stride(0),
        target_ids,
        sums,
        entropy,
        keys,
        size,
        blocks,
        hashed_seed(capture.seed),
        KEYS=KEY_IDS,
        LEAST=LEAST_LOGPROB,
        GROUP=_GROUP,
        BLOCK=_BLOCK,
        num_warps=_WARPS["tails"],
    )
    return Tails(sums, bits, keys, entropy)


def find(
    scores_RV: Tensor, norms_R2: Tensor, tails: Tails, counts: Tensor, capture: Capture
) -> tuple[Tensor, Tensor]:
    """Draws int32[R, T, S], logprobs float32[R, T, S]; padded after ``counts`` (int64[R])."""
    rows, size = scores_RV.shape
    blocks = tails.sums.shape[1]
    shape = (rows, capture.sets, capture.samples)
    ids = torch.empty(shape, dtype=torch.int32, device=scores_RV.device)
    logprobs = scores_RV.new_empty(shape, dtype=torch.float32)
    _find[(rows, triton.cdiv(capture.draws, _LANES))](
        scores_RV,
        scores_RV.stride(0),
        norms_R2,
        tails.sums,
        tails.bits,
        tails.keys,
        counts,
        ids,
        logprobs,
        size,
        blocks,
        capture.draws,
        capture.samples,
        INDEPENDENT=capture.independent,
        STRIDE=SET_STRIDE,
        LANES=_LANES,
        BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=_BLOCK,
        num_warps=_WARPS["find"],
    )
    return ids, logprobs


if triton is not None:

    @triton.jit
    def _norms(scores, stride, out, size, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0)
        # 64 bits: there may be more than 2**31 scores.
        row = scores + at.to(tl.int64) * stride
        columns = tl.arange(0, TILE)
        # One running maximum and sum per lane; lanes are combined once, at the end.
        highest = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        for first in range(0, size, TILE):
            x = tl.load(row + first + columns, mask=first + columns < size, other=float("-inf")).to(
                tl.float32
            )
            new = tl.maximum(highest, x)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(highest - shift) + tl.exp(x - shift)
            highest = new
        most = tl.max(highest, 0)
        shift = tl.where(most == float("-inf"), 0.0, most)
        tl.store(out + 2 * at, shift)
        tl.store(out + 2 * at + 1, tl.log(tl.sum(total * tl.exp(highest - shift), 0)))

    @triton.jit
    def _mark(bits, words, top_ids, stride, head_size, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, WIDTH)
        inside = k < tl.load(head_size + at)
        ids = tl.load(top_ids + at * stride + k, mask=inside, other=0)
        bit = (tl.full((WIDTH,), 1, tl.int64) << (ids & 31)).to(tl.int32)
        tl.atomic_or(bits + at * words + (ids >> 5), bit, mask=inside)

    @triton.jit
    def _mix(bits):  # type: ignore[no-untyped-def]
        """``logitcask.pipeline.distribution.draws.mix`` with its constants minus 2**64 and its full
        masks.
        """
        bits = bits + (-7046029254386353131)
        bits = (bits ^ ((bits >> 30) & 17179869183)) * (-4658895280553007687)
        bits = (bits ^ ((bits >> 27) & 137438953471)) * (-7723592293110705685)
        return bits ^ ((bits >> 31) & 8589934591)

    @triton.jit
    def _tails(  # type: ignore[no-untyped-def]
        scores,
        stride,
        norms,
        bits,
        top_ids,
        top_stride,
        target_ids,
        sums,
        entropy,
        keys,
        size,
        blocks,
        seed,
        KEYS: tl.constexpr,
        LEAST: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64)
        row, words = scores + at * stride, bits + at * blocks * (BLOCK // 32)
        highest, log_total = tl.load(norms + 2 * at), tl.load(norms + 2 * at + 1)
        inside, group = tl.arange(0, BLOCK), tl.arange(0, GROUP)
        negative = tl.zeros((GROUP, BLOCK), tl.float32)
        for first in range(0, blocks, GROUP):
            block = first + group
            ids = block[:, None] * BLOCK + inside[None, :]
            x = (
                tl.load(row + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
                - highest
                - log_total
            )
            p = tl.exp(x)
            negative += p * tl.maximum(x, LEAST)
            word = tl.load(words + (ids >> 5), mask=ids < size, other=0)
            p = tl.where(((word >> (ids & 31)) & 1) == 0, p, 0.0)
            tl.store(sums + at * blocks + block, tl.sum(p, 1), mask=block < blocks)
        tl.store(entropy + at, -tl.sum(tl.sum(negative, 1), 0))

        target, top = tl.load(target_ids + at), tl.load(top_ids + at * top_stride)
        key = _mix(target + seed)
        for k in tl.static_range(KEYS):
            key = _mix(tl.load(top_ids + at * top_stride + k) + key)
        for k in tl.static_range(2):
            logprob = (
                tl.load(row + (top if k == 0 else target)).to(tl.float32) - highest - log_total
            )
            # In eighths, rounded to even: float32 does this if its last bit has the value 1.
            eighths = (tl.maximum(logprob, LEAST) * 8 + 12582912.0) - 12582912.0
            key = _mix(eighths.to(tl.int64) + key)
        tl.store(keys + at, key)

    @triton.jit
    def _find(  # type: ignore[no-untyped-def]
        scores,
        stride,
        norms,
        sums,
        bits,
        keys,
        counts,
        ids_out,
        logprobs_out,
        size,
        blocks,
        cells,
        samples,
        INDEPENDENT: tl.constexpr,
        STRIDE: tl.constexpr,
        LANES: tl.constexpr,
        BLOCKS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64)
        row = scores + at * stride
        highest, log_total = tl.load(norms + 2 * at), tl.load(norms + 2 * at + 1)
        cell = tl.program_id(1) * LANES + tl.arange(0, LANES)
        which, step = cell // samples, cell % samples
        count = tl.load(counts + at)
        wanted = (cell < cells) & (step < count)

        # The point of the tail's CDF.
        key = _mix(tl.load(keys + at) + which * STRIDE + (step if INDEPENDENT else 0))
        # Powers of two are exact in every float type of a constant; 1 - 2**-53 is not.
        fraction = ((key >> 11) & 9007199254740991).to(tl.float64) * 1.1102230246251565e-16
        if not INDEPENDENT:
            fraction = (step.to(tl.float64) + fraction) / tl.maximum(count, 1).to(tl.float64)

        # The block. The sums of a scan are rounded differently, so alone they might give an empty
        # block.
        block = tl.arange(0, BLOCKS)
        each = tl.load(sums + at * blocks + block, mask=block < blocks, other=0.0).to(tl.float64)
        mass = tl.sum(each, 0)
        point = tl.minimum(fraction * mass, mass - mass * 1.1102230246251565e-16)
        behind = (tl.cumsum(each, 0)[None, :] > point[:, None]) & (each > 0)[None, :]
        found = tl.min(tl.where(behind, block[None, :], BLOCKS), 1)
        hit = tl.minimum(found, tl.max(tl.where(each > 0, block, 0), 0))

        # The id in it.
        point = point - tl.sum(tl.where(block[None, :] < hit[:, None], each[None, :], 0.0), 1)
        inside = tl.arange(0, BLOCK)
        ids = hit[:, None] * BLOCK + inside[None, :]
        p = tl.exp(
            tl.load(row + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
            - highest
            - log_total
        )
        word = tl.load(bits + at * blocks * (BLOCK // 32) + (ids >> 5), mask=ids < size, other=0)
        p = tl.where(((word >> (ids & 31)) & 1) == 0, p, 0.0).to(tl.float64)
        # The block's sum was rounded in float32, so the point may be beyond its end.
        end = tl.sum(p, 1)
        point = tl.minimum(tl.maximum(point, 0.0), end - end * 1.1102230246251565e-16)
        behind = (tl.cumsum(p, 1) > point[:, None]) & (p > 0)
        found = tl.min(tl.where(behind, inside[None, :], BLOCK), 1)
        drawn = hit * BLOCK + tl.minimum(found, tl.max(tl.where(p > 0, inside[None, :], 0), 1))

        out = at * cells + cell
        tl.store(ids_out + out, tl.where(wanted, drawn, -1), mask=cell < cells)
        logprob = tl.load(row + drawn).to(tl.float32) - highest - log_total
        tl.store(logprobs_out + out, tl.where(wanted, logprob, float("-inf")), mask=cell < cells)
