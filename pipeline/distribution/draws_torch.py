"""Draws from the tail in torch, inside engines (``logitcask.pipeline.distribution.draws``).

A search in two levels keeps it cheap: one pass sums the probabilities of blocks of ids, and only
blocks with a draw are searched for the id. The main cost is one exponential per id, as much as the
engine's own log-softmax. On a GPU the launch of a small operation takes longer than the operation,
so the hash, which has many small ones, is computed once for all rows. If Triton is available,
kernels do the rest (``logitcask.pipeline.distribution.draws_triton``).
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from logitcask.cache_format.errors import one_line
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, LEAST_LOGPROB, SET_STRIDE, Draws, hashed

logger = logging.getLogger(__name__)

_BLOCK = 256
# Floats in a temporary: small enough for a CPU's cache, large enough to fill a GPU.
_CHUNK = {"cpu": 1 << 20, "gpu": 1 << 26}
# Rows for the comparison of the kernels with torch, and the part of the draws that rounding may
# change.
_COMPARED, _ROUNDED = 8, 0.2
# Whether the kernels agree with torch, by the parameters of their compilation.
_kernels_agree: dict[tuple[Any, ...], bool] = {}


def draw(
    scores: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture, *, logits: bool = False
) -> Draws:
    """The draws of ``capture``, as tensors, in chunks of positions for bounded memory.

    On a GPU they are made by Triton kernels, if these have given the same as torch for some rows.

    scores:     float[R, V], R >= 1: logprobs in nats (-inf is allowed), or with ``logits`` the
                same plus a constant per row.
    top_ids:    int64[R, K], K >= max(top_k, KEY_IDS): the most probable ids, by descending logprob.
    target_ids: int64[R], the next tokens.
    """
    if not (scores.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return _by_torch(scores, top_ids, target_ids, capture, logits)
    from logitcask.pipeline.distribution import draws_triton

    if not draws_triton.usable(scores):
        return _by_torch(scores, top_ids, target_ids, capture, logits)
    case = (scores.device, scores.dtype, scores.shape[1], capture, logits)
    if case not in _kernels_agree:
        few = (scores[:_COMPARED], top_ids[:_COMPARED], target_ids[:_COMPARED], capture, logits)
        reason = _why_not(few)
        _kernels_agree[case] = reason is None
        if reason is not None:
            logger.warning(
                "draws from the tail are made without Triton kernels, more slowly: %s", reason
            )
    by = _by_triton if _kernels_agree[case] else _by_torch
    return by(scores, top_ids, target_ids, capture, logits)


def _why_not(few: tuple[Tensor, Tensor, Tensor, Capture, bool]) -> str | None:
    """The reason not to use the kernels, from a few rows; None if they agree with torch."""
    try:
        found = _by_triton(*few)
        expected = _by_torch(*few)
        same = found.samples == expected.samples
        if not (
            torch.equal(found.head_size, expected.head_size)
            and torch.equal(found.samples < 0, expected.samples < 0)
            and same.double().mean() >= 1 - _ROUNDED
            and torch.allclose(
                found.sample_logprobs[same], expected.sample_logprobs[same], atol=1e-3, rtol=0
            )
            and torch.allclose(found.entropy, expected.entropy, atol=1e-2, rtol=0)
        ):
            return "they draw other ids"
    except Exception as error:  # compilers and drivers may raise anything
        return one_line(error)[:200]
    return None


def _by_triton(
    scores: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture, logits: bool
) -> Draws:
    from logitcask.pipeline.distribution import draws_triton as kernels

    top_ids, target_ids = top_ids.contiguous(), target_ids.contiguous()
    with torch.cuda.device_of(scores):  # Triton launches on the current device
        norms = (
            kernels.norms(scores)
            if logits
            else scores.new_zeros((len(scores), 2), dtype=torch.float32)
        )
        head = scores.gather(1, top_ids[:, : capture.top_k]).float() - norms[:, :1] - norms[:, 1:]
        head_size = _head_sizes(head, capture)
        tails = kernels.tails(scores, norms, top_ids, target_ids, head_size, capture)
        counts = _set_sizes(tails.sums.sum(dim=1, dtype=torch.float64), capture)
        samples, logprobs = kernels.find(scores, norms, tails, counts, capture)
    return Draws(head_size, samples, logprobs, tails.entropy)


def _by_torch(
    scores: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture, logits: bool
) -> Draws:
    per_row = max(scores.shape[1], capture.draws * _BLOCK)
    rows = max(1, _CHUNK["cpu" if scores.device.type == "cpu" else "gpu"] // per_row)
    chunks = [slice(start, start + rows) for start in range(0, len(scores), rows)]
    if logits and len(chunks) == 1:
        scores, logits = scores.log_softmax(dim=1, dtype=torch.float32), False

    def logprobs_of(chunk: slice) -> Tensor:
        """Logprobs of a chunk. They are computed twice, because those of all rows need too much
        memory. Both times give the same bits, on which the hash depends.
        """
        return scores[chunk].log_softmax(dim=1, dtype=torch.float32) if logits else scores[chunk]

    head_ids = top_ids[:, : capture.top_k]
    known_ids = torch.cat([head_ids, top_ids[:, :1], target_ids[:, None]], dim=1)
    known = torch.cat([logprobs_of(chunk).gather(1, known_ids[chunk]) for chunk in chunks])
    head_size = _head_sizes(known[:, :-2], capture)
    outside = torch.arange(capture.top_k, device=scores.device) >= head_size[:, None]
    uniforms = _uniforms(known[:, -2:], top_ids, target_ids, capture)
    parts = [
        _draw_chunk(logprobs_of(chunk), head_ids[chunk], outside[chunk], uniforms[chunk], capture)
        for chunk in chunks
    ]
    ids, logprobs, counts, entropy = map(torch.cat, zip(*parts, strict=True))
    shape = (len(scores), capture.sets, capture.samples)
    real = torch.arange(capture.samples, device=scores.device) < counts[:, None, None]
    return Draws(
        head_size=head_size,
        samples=torch.where(real, ids.view(shape), -1).to(torch.int32),
        sample_logprobs=torch.where(real, logprobs.view(shape), -torch.inf),
        entropy=entropy,
    )


def to_numpy(draws: Draws) -> Draws:
    """The same draws as numpy arrays on the host."""
    return Draws(
        head_size=draws.head_size.cpu().numpy(),
        samples=draws.samples.cpu().numpy(),
        sample_logprobs=draws.sample_logprobs.cpu().numpy(),
        entropy=draws.entropy.cpu().numpy(),
    )


def _draw_chunk(
    logprobs: Tensor, head_ids: Tensor, outside: Tensor, uniforms: Tensor, capture: Capture
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The drawn ids [R, T * S] and their logprobs, the number of valid draws per set, int64[R], and
    the entropy, float32[R].
    """
    rows, vocab_size = logprobs.shape
    blocks = math.ceil(vocab_size / _BLOCK)
    padded = logprobs.new_zeros((rows, blocks * _BLOCK))
    probabilities = padded[:, :vocab_size]
    torch.exp(logprobs, out=probabilities)
    entropy = -logprobs.clamp_min(LEAST_LOGPROB).mul_(probabilities).sum(dim=1)
    padded.scatter_(1, head_ids, padded.gather(1, head_ids).mul_(outside))

    ends = padded.view(rows, blocks, _BLOCK).sum(dim=2).double().cumsum(dim=1)
    mass = ends[:, -1:]
    counts = _set_sizes(mass, capture)
    points = _fractions(uniforms, counts[:, :, None], capture).flatten(1) * mass
    points = torch.minimum(points, _just_below(mass))
    block = torch.searchsorted(ends, points, right=True).clamp_max_(blocks - 1)
    # The CDF before a block is the end of the block before it.
    points -= torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    first = torch.arange(0, rows * blocks, blocks, device=logprobs.device)[:, None]
    hit = padded.view(-1, _BLOCK).index_select(0, (block + first).flatten()).double().cumsum(dim=1)
    # A block's sum is rounded in float32, so a point may be beyond its end. It must still find an
    # id with some probability.
    points = torch.minimum(points.reshape(-1, 1), _just_below(hit[:, -1:])).clamp_min_(0)
    within = torch.searchsorted(hit, points, right=True).view_as(block)
    ids = within.add_(block, alpha=_BLOCK).clamp_max_(vocab_size - 1)
    return ids, logprobs.gather(1, ids), counts[:, 0], entropy


def _head_sizes(head: Tensor, capture: Capture) -> Tensor:
    """int32[R]: ``logitcask.pipeline.distribution.capture.head_sizes``."""
    rows, width = head.shape
    size = torch.full((rows,), width, dtype=torch.int32, device=head.device)
    if capture.min_probability is not None:
        # Rounded to float32 by torch, as there.
        enough = head >= math.log(capture.min_probability)
        size = torch.minimum(size, enough.sum(dim=1, dtype=torch.int32))
    if capture.top_p is not None and width:
        before = head.double().exp().cumsum(dim=1)[:, :-1]
        size = torch.minimum(size, 1 + (before < capture.top_p).sum(dim=1, dtype=torch.int32))
    return size.clamp_min_(min(capture.min_k, width))


def _set_sizes(tail_mass: Tensor, capture: Capture) -> Tensor:
    """int64, of the shape of ``tail_mass``: ``logitcask.pipeline.distribution.draws.set_sizes``."""
    wanted = torch.full_like(tail_mass, capture.samples)
    if capture.mass_per_sample is not None:
        wanted = (tail_mass / capture.mass_per_sample).ceil_().clamp_(1, capture.samples)
    return torch.where(tail_mass > 0, wanted, 0).long()


def _uniforms(named: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture) -> Tensor:
    """float64[R, T, S or 1]: the random numbers of
    ``logitcask.pipeline.distribution.draws.fractions``, one per draw or one per set.
    """
    eighths = (named.clamp_min(LEAST_LOGPROB) * 8).round_().long()
    columns = [target_ids, *top_ids[:, :KEY_IDS].unbind(1), *eighths.unbind(1)]
    steps = torch.arange(capture.samples if capture.independent else 1, device=named.device)
    cells = torch.arange(capture.sets, device=named.device)[:, None] * SET_STRIDE + steps
    bits = hashed(columns, cells, capture.seed)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _fractions(uniforms: Tensor, counts: Tensor, capture: Capture) -> Tensor:
    """float64[R, T, S]: ``logitcask.pipeline.distribution.draws.fractions``."""
    if capture.independent:
        return uniforms
    return (torch.arange(capture.samples, device=uniforms.device) + uniforms) / counts.clamp_min(1)


def _just_below(ends: Tensor) -> Tensor:
    return torch.nextafter(ends, torch.zeros_like(ends))
