"""The result of an audit: figures with their meaning, and problems."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences between stored values and the reference's, in nats.

    values:          number of compared values.
    mean:            of |stored - reference|; most of it is rounding.
    rounding:        the part of ``mean`` that rounding explains: the mean of |rounded reference -
                     reference|.
    largest:         of |stored - reference|.
    largest_allowed: the largest difference that rounding explains.
    signed:          mean of stored - reference, in which rounding averages out.
    engine:          mean of |engine - reference| without rounding: an unbiased estimate, or a lower
                     bound if the cache was rounded more than once (see
                     ``logitcask.pipeline.audit.figures``).
    """

    values: int
    mean: float
    rounding: float
    largest: float
    largest_allowed: float
    signed: float
    engine: float


@dataclass(frozen=True, slots=True)
class Distance:
    """Means over positions of the KL (nats) and the total variation of two distributions."""

    kl: float
    tv: float


@dataclass(frozen=True, slots=True)
class DrawsAudit:
    """Draws from the tail, compared with the reference's tails.

    draws:     number of compared draws.
    in_head:   number of draws that are in the head, which must be 0.
    p_value:   of Pearson's chi-square for the numbers of draws between 0 and 1 nat of surprise, 1
               and 2, ... Systematic draws vary less than independent ones, so it is rarely small.
               None if there are too few draws.
    z_logprob: estimated minus true sum over the tail of ``p f``, over all positions, in standard
               errors of independent draws; ``f`` is the reference's logprob. None without spread.
    z_id:      the same with ``f`` the number of the id. (The cache's prior cannot be ``f``, because
               it was estimated from the draws.)
    """

    draws: int
    in_head: int
    p_value: float | None
    z_logprob: float | None
    z_id: float | None


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of ``audit``. Figures are means over the sampled positions unless noted otherwise.

    reference:         model and arithmetic that the cache was compared with.
    limit:             nats, of ``target.engine`` and ``head.engine``.
    target, head:      logprobs of the targets and of the head's entries.
    entropy:           None if the cache does not store it.
    tail_mass:         mean |stored - reference| of the mass outside the head.
    ids_outside:       share of head entries that are not among the reference's most probable ids,
                       near ties excluded.
    ranks_differ:      share of positions at which the target's rank differs from the reference's.
    ranks_wrong:       the same, without ranks that a near tie explains.
    codec:             from the reference's own head and tail mass to the same after rounding, with
                       the same form of the tail.
    stored:            from the reference's own head and tail mass to the stored ones: codec and
                       engine together.
    truncation_even:   from the reference's distribution to its own head and tail mass, with an even
                       tail.
    truncation_prior:  the same with the tail distributed by the cache's prior; None without one.
    draws:             None if the cache has none.
    cached_loss, reference_loss: mean -logprob of the targets, nats.
    cause:             of an engine difference above the limit: "shift", "temperature", "ids" or
                       "weights".
    problems:          one line each; empty if cache and reference agree.
    """

    cache: str
    reference: str
    sequences: int
    sequences_in_cache: int
    positions: int
    limit: float
    target: Difference
    head: Difference
    entropy: Difference | None
    tail_mass: float
    ids_outside: float
    ranks_differ: float
    ranks_wrong: float
    codec: Distance
    stored: Distance
    truncation_even: Distance
    truncation_prior: Distance | None
    draws: DrawsAudit | None
    cached_loss: float
    reference_loss: float
    cause: str | None
    problems: tuple[str, ...]
