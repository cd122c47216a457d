"""Draws from the tail of a distribution: the algorithm, in numpy.
``logitcask.pipeline.distribution.draws_torch`` is the same for engines, and
``logitcask.pipeline.distribution.draws_triton`` for GPUs.

The head of a position is its most probable ids (``logitcask.pipeline.distribution.capture``), the
tail everything else, with mass ``m``. Draw ``d`` of ``S`` is the id at which the tail's cumulative
probability, in the order of ids, passes ``fraction * m`` (inverse CDF), so id ``v`` comes up ``S *
p_v / m`` times in expectation:

systematic   fraction = (d + u) / S with one u per set: each id comes up the floor or the ceiling of that number of times
             (Madow 1949), and what is estimated from the draws varies less.
independent  fraction = u, one u per draw.

``u`` is a hash of the position's content and not of its place, so scoring a text again gives the
same draws in any batch. The content is the target, the four most probable ids, and the logprobs of
the target and of the top id in eighths of a nat. Engines round differently from batch to batch. A
draw may therefore differ if two of these ids are tied, if a logprob is halfway between two eighths,
or if a fraction is at the border of two ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.distribution.capture import Capture, head_sizes

# Number of most probable ids in the hash.
KEY_IDS = 4
# Smaller logprobs are raised to this before they are hashed, and before they are multiplied by
# their probability of 0.
LEAST_LOGPROB = -200.0
# Numbers of draws in a set are below this.
SET_STRIDE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What an engine says of R positions beside their most probable ids; numpy arrays, or torch
    tensors inside an engine.

    head_size:       int32[R], number of the most probable ids that form the head
                     (``logitcask.pipeline.distribution.capture``); the tail is everything else.
    samples:         int32[R, T, S], ids drawn from the tail in proportion to their probability: T
                     sets of up to S draws, padded at the end with -1; repeats are draws too. T and
                     S are 0 if none are asked for.
    sample_logprobs: float32[R, T, S], the logprobs of the draws, padded with -inf.
    entropy:         float32[R], nats, of the whole distribution; None without draws.
    """

    head_size: Any
    samples: Any
    sample_logprobs: Any
    entropy: Any


def draw(
    logprobs: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    target_ids: NDArray[np.int32],
    capture: Capture,
) -> Draws:
    """The draws of ``capture``: the reference for all other implementations.

    logprobs:   float32[R, V], whole distributions, nats; -inf is allowed.
    top_ids:    int32[R, K], K >= max(top_k, KEY_IDS): the most probable ids, by descending logprob.
    target_ids: int32[R], the next tokens.
    """
    head_ids = top_ids[:, : capture.top_k].astype(np.int64)
    head_size = head_sizes(np.take_along_axis(logprobs, head_ids, axis=1), capture)
    ends = _tail(logprobs, head_ids, head_size).cumsum(axis=1)
    mass = ends[:, -1]
    counts = set_sizes(mass, capture)
    points = fractions(_named(logprobs, top_ids, target_ids), top_ids, target_ids, counts, capture)
    # Kept below the end of the tail in spite of rounding, so that an id with some probability is
    # found.
    points = np.minimum(points * mass[:, None, None], np.nextafter(mass, 0)[:, None, None])
    found = [np.searchsorted(*each, side="right") for each in zip(ends, points, strict=True)]
    ids = np.minimum(np.array(found, np.int64).reshape(points.shape), logprobs.shape[1] - 1)
    drawn = np.take_along_axis(logprobs, ids.reshape(len(ids), -1), axis=1).reshape(ids.shape)
    return padded(head_size, ids, drawn, counts, entropy(logprobs))


def entropy(logprobs: NDArray[Any]) -> NDArray[np.float32]:
    """float32[R], nats, of distributions given as logprobs [R, V]."""
    exact = logprobs.astype(np.float64)
    result: NDArray[np.float32] = (
        -(np.exp(exact) * np.maximum(exact, LEAST_LOGPROB)).sum(axis=1).astype(np.float32)
    )
    return result


def no_draws(head: NDArray[np.float32], capture: Capture) -> Draws:
    """``Draws`` without draws: only the head sizes of float32[R, top_k] logprobs."""
    nothing = np.empty((len(head), 0, 0))
    return Draws(
        head_sizes(head, capture), nothing.astype(np.int32), nothing.astype(np.float32), None
    )


def set_sizes(tail_mass: NDArray[np.float64], capture: Capture) -> NDArray[np.int64]:
    """int64[R]: draws per set at positions whose tails have these masses; 0 without a tail."""
    if capture.mass_per_sample is None:
        return np.where(tail_mass > 0, capture.samples, 0)
    wanted = np.ceil(tail_mass / capture.mass_per_sample).clip(1, capture.samples)
    return np.where(tail_mass > 0, wanted, 0).astype(np.int64)


def fractions(
    named: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    target_ids: NDArray[np.int32],
    counts: NDArray[np.int64],
    capture: Capture,
) -> NDArray[np.float64]:
    """float64[R, T, S] in [0, 1): the CDF's points of the first ``counts`` [R] draws.

    named: float32[R, 2], the logprobs of the top id and of the target. Other arguments as for
    ``draw``.
    """
    eighths = np.rint(np.maximum(named, LEAST_LOGPROB) * 8).astype(np.int64)
    columns = [target_ids.astype(np.int64), *top_ids[:, :KEY_IDS].astype(np.int64).T, *eighths.T]
    steps = np.arange(capture.samples if capture.independent else 1)
    bits = hashed(columns, np.arange(capture.sets)[:, None] * SET_STRIDE + steps, capture.seed)
    u: NDArray[np.float64] = (bits >> 11 & (1 << 53) - 1) * 2.0**-53
    if capture.independent:
        return u
    return (np.arange(capture.samples) + u) / np.maximum(counts, 1)[:, None, None]


def padded(
    head_size: NDArray[np.int32],
    ids: NDArray[np.integer],
    logprobs: NDArray[np.float32],
    counts: NDArray[np.int64],
    entropy: NDArray[np.float32],
) -> Draws:
    """``Draws`` with all but the first ``counts`` [R] of each set of ``ids`` [R, T, S] blanked."""
    real = np.arange(ids.shape[2]) < counts[:, None, None]
    return Draws(
        head_size=head_size,
        samples=np.where(real, ids, -1).astype(np.int32),
        sample_logprobs=np.where(real, logprobs, -np.inf).astype(np.float32),
        entropy=entropy,
    )


def mix(bits: Any) -> Any:
    """One step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64 bits.

    ``bits``: int64, a numpy array or a torch tensor. Both wrap around, and masks turn their
    arithmetic shifts into logical ones.
    """
    bits = bits + (0x9E3779B97F4A7C15 - (1 << 64))
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def hashed(columns: list[Any], cells: Any, seed: int) -> Any:
    """int64[R, T, S]: a hash of ``seed``, each row of ``columns`` (int64[R] each) and each of
    ``cells`` (int64[T, S]).

    Numpy arrays or torch tensors: the bits are the same.
    """
    bits: Any = hashed_seed(seed)
    for column in columns:
        bits = mix(column + bits)
    return mix(bits[:, None, None] + cells)


def hashed_seed(seed: int) -> int:
    """The start value of ``hashed``: 64 bits, signed."""
    return int(mix(np.array([seed % 2**64], np.uint64).view(np.int64))[0])


def first_difference(
    found: Draws,
    logprobs: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    target_ids: NDArray[np.int32],
    capture: Capture,
    tolerance: float = 1e-3,
) -> str | None:
    """The reason, in a few words, why ``found`` cannot be the result of ``draw`` for ``logprobs``;
    None if it can.

    Arguments as for ``draw``. Engines round differently from run to run. ``tolerance`` is the
    largest difference of two logprobs, in nats. It also limits the distance of a draw from its
    point of the CDF, as a part of the tail.
    """
    if found.samples.shape != (len(logprobs), capture.sets, capture.samples):
        return f"draws of shape {found.samples.shape} came"
    head_ids = top_ids[:, : capture.top_k].astype(np.int64)
    if not np.array_equal(
        found.head_size, head_sizes(np.take_along_axis(logprobs, head_ids, axis=1), capture)
    ):
        return "the heads have other sizes"
    tail = _tail(logprobs, head_ids, found.head_size)
    ends = tail.cumsum(axis=1)
    mass = ends[:, -1]
    real = found.samples >= 0
    counts = real[:, 0].sum(axis=1)
    fewest, most = (set_sizes(mass * factor, capture) for factor in (1 - tolerance, 1 + tolerance))
    in_front = np.arange(capture.samples) < counts[:, None, None]
    if (
        not np.array_equal(real, np.broadcast_to(in_front, real.shape))
        or ((counts < fewest) | (counts > most)).any()
    ):
        return "there are too many draws or too few"
    if (found.samples >= logprobs.shape[1]).any():
        return "a draw is not an id"
    row, ids = np.nonzero(real)[0], found.samples[real]
    if (tail[row, ids] == 0).any():
        return "a draw lies in the head, or has no probability"
    if not np.allclose(found.sample_logprobs[real], logprobs[row, ids], atol=tolerance, rtol=0):
        return "the draws have other logprobs"
    points = (
        fractions(_named(logprobs, top_ids, target_ids), top_ids, target_ids, counts, capture)[real]
        * mass[row]
    )
    above, room = points - ends[row, ids], tolerance * mass[row]
    if ((above > room) | (above < -tail[row, ids] - room)).any():
        return "other ids were drawn"
    # The derivative of -p log p is at most a few units for all relevant p, and the errors of many
    # ids add up.
    if not np.allclose(found.entropy, entropy(logprobs), atol=20 * tolerance, rtol=0):
        return "the entropy is wrong"
    return None


def _tail(
    logprobs: NDArray[np.float32], head_ids: NDArray[np.int64], head_size: NDArray[np.int32]
) -> NDArray[np.float64]:
    """float64[R, V]: probabilities, 0 in the head. Exponentials are float32, so that the same
    values underflow everywhere.
    """
    probabilities = np.exp(logprobs)
    outside = np.arange(head_ids.shape[1]) >= head_size[:, None]
    kept = np.take_along_axis(probabilities, head_ids, axis=1) * outside
    np.put_along_axis(probabilities, head_ids, kept, axis=1)
    return probabilities.astype(np.float64)


def _named(
    logprobs: NDArray[np.float32], top_ids: NDArray[np.int32], target_ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """float32[R, 2]: the logprobs of the top id and of the target."""
    return np.take_along_axis(
        logprobs, np.stack([top_ids[:, 0], target_ids], axis=1).astype(np.int64), axis=1
    )
