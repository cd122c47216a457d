"""Draws from the tail of a distribution, in torch: what ``pipeline.draws`` says, where the distributions are.

A search in two levels keeps it cheap: one pass sums the probabilities of blocks of ids, and only in the blocks that are
hit are ids looked at. The costly part is one exponential per id, which is as much as the engine's own log-softmax takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.capture import Capture
from pipeline.draws import KEY_IDS, LEAST_LOGPROB, SET_STRIDE, Draws, hashed

_BLOCK = 256
# Floats in a temporary: small enough for a CPU's cache, large enough to fill a GPU.
_CHUNK = {"cpu": 1 << 20, "gpu": 1 << 25}


def draw(scores: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture, *, logits: bool = False) -> Draws:
    """The draws that ``capture`` asks for, as tensors, in chunks of positions so that memory stays bounded.

    scores:     float[R, V], R >= 1: logprobs in nats (-inf is allowed), or with ``logits`` anything a constant apart.
    top_ids:    int64[R, K], K >= max(top_k, KEY_IDS): the most probable ids, by falling logprob.
    target_ids: int64[R], the tokens that follow.
    """
    per_row = max(scores.shape[1], capture.draws * _BLOCK)
    rows = max(1, _CHUNK["cpu" if scores.device.type == "cpu" else "gpu"] // per_row)
    parts: list[Draws] = []
    for chunk, top, target in zip(scores.split(rows), top_ids.split(rows), target_ids.split(rows), strict=True):
        logprobs = chunk.log_softmax(dim=1, dtype=torch.float32) if logits else chunk
        parts.append(_draw_chunk(logprobs, top, target, capture))
    return Draws(
        head_size=torch.cat([part.head_size for part in parts]),
        samples=torch.cat([part.samples for part in parts]),
        sample_logprobs=torch.cat([part.sample_logprobs for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
    )


def to_numpy(draws: Draws) -> Draws:
    """The same on the host, as numpy arrays."""
    return Draws(
        head_size=draws.head_size.cpu().numpy(),
        samples=draws.samples.cpu().numpy(),
        sample_logprobs=draws.sample_logprobs.cpu().numpy(),
        entropy=draws.entropy.cpu().numpy(),
    )


def _draw_chunk(logprobs: Tensor, top_ids: Tensor, target_ids: Tensor, capture: Capture) -> Draws:
    rows, vocab_size = logprobs.shape
    blocks = math.ceil(vocab_size / _BLOCK)
    padded = logprobs.new_zeros((rows, blocks * _BLOCK))
    probabilities = padded[:, :vocab_size]
    torch.exp(logprobs, out=probabilities)
    entropy = -logprobs.clamp_min(LEAST_LOGPROB).mul_(probabilities).sum(dim=1)

    head_ids = top_ids[:, : capture.top_k]
    head_size = _head_sizes(logprobs.gather(1, head_ids), capture)
    inside = torch.arange(capture.top_k, device=logprobs.device) < head_size[:, None]
    padded.scatter_(1, head_ids, padded.gather(1, head_ids).masked_fill_(inside, 0))

    ends = padded.view(rows, blocks, _BLOCK).sum(dim=2).double().cumsum(dim=1)
    mass = ends[:, -1]
    counts = _set_sizes(mass, capture)
    named = logprobs.gather(1, torch.stack([top_ids[:, 0], target_ids], dim=1))
    points = _fractions(named, top_ids, target_ids, counts, capture).flatten(1) * mass[:, None]
    points = torch.minimum(points, _just_below(mass)[:, None])
    block = torch.searchsorted(ends, points, right=True).clamp_max_(blocks - 1)
    points -= torch.where(block > 0, ends.gather(1, (block - 1).clamp_min_(0)), 0)
    first = torch.arange(rows, device=logprobs.device)[:, None] * blocks
    hit = padded.view(-1, _BLOCK).index_select(0, (block + first).flatten()).double().cumsum(dim=1)
    # A block's sum is rounded in float32, so a point may lie beyond its end; it must find an id that is there.
    points = torch.minimum(points.reshape(-1, 1), _just_below(hit[:, -1:])).clamp_min_(0)
    within = torch.searchsorted(hit, points, right=True).view_as(block)
    ids = (block * _BLOCK + within).clamp_max_(vocab_size - 1)

    shape = (rows, capture.sets, capture.samples)
    real = torch.arange(capture.samples, device=logprobs.device) < counts[:, None, None]
    return Draws(
        head_size=head_size,
        samples=torch.where(real, ids.view(shape), -1).to(torch.int32),
        sample_logprobs=torch.where(real, logprobs.gather(1, ids).view(shape), -torch.inf),
        entropy=entropy,
    )


def _head_sizes(head: Tensor, capture: Capture) -> Tensor:
    """int32[R]: ``pipeline.capture.head_sizes``."""
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
    """int64[R]: ``pipeline.draws.set_sizes``."""
    wanted = torch.full_like(tail_mass, capture.samples)
    if capture.mass_per_sample is not None:
        wanted = (tail_mass / capture.mass_per_sample).ceil_().clamp_(1, capture.samples)
    return torch.where(tail_mass > 0, wanted, 0).long()


def _fractions(named: Tensor, top_ids: Tensor, target_ids: Tensor, counts: Tensor, capture: Capture) -> Tensor:
    """float64[R, T, S]: ``pipeline.draws.fractions``."""
    eighths = (named.clamp_min(LEAST_LOGPROB) * 8).round_().long()
    columns = [target_ids, *top_ids[:, :KEY_IDS].unbind(1), *eighths.unbind(1)]
    draws = torch.arange(capture.samples, device=named.device)
    steps = draws if capture.independent else draws[:1]
    cells = torch.arange(capture.sets, device=named.device)[:, None] * SET_STRIDE + steps
    bits = hashed(columns, cells, capture.seed)
    u = (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53
    if capture.independent:
        return u
    return (draws + u) / counts.clamp_min(1)[:, None, None]


def _just_below(ends: Tensor) -> Tensor:
    return torch.nextafter(ends, torch.zeros_like(ends))
