"""What an audit says: the figures, what they mean, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """Stored values beside the reference's, in nats.

    values:          how many were compared.
    mean:            of |stored - reference|; most of it is rounding.
    rounding:        what ``mean`` would be if rounding were all: the mean of |rounded reference -
                     reference|.
    largest:         of |stored - reference|.
    largest_allowed: what rounding alone may make of it.
    signed:          mean of stored - reference, in which rounding averages out.
    engine:          mean of |engine - reference|, rounding taken out: an estimate without bias, or
                     a lower bound where the cache was rounded more than once (see
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
    """Means over positions of the KL (nats) and of the total variation between two
    distributions.
    """

    kl: float
    tv: float


@dataclass(frozen=True, slots=True)
class DrawsAudit:
    """Draws from the tail beside the reference's tails.

    draws:     looked at.
    in_head:   of them, lie in the head, where none may.
    p_value:   of Pearson's chi-square for how many draws fall between 0 and 1 nat of surprise, 1
               and 2, ... Systematic draws
              vary less than independent ones, so it is rarely small. None where there are too few
              draws.
    z_logprob: estimated less true sum over the tail of ``p f``, over all positions, in standard
    errors of independent draws;
              ``f`` is the reference's logprob. None without spread.
    z_id:      the same, ``f`` being the number of the id. (The cache's prior would not do: it was
               estimated from the draws.)
    """

    draws: int
    in_head: int
    p_value: float | None
    z_logprob: float | None
    z_id: float | None


@dataclass(frozen=True, slots=True)
class Audit:
    """What ``audit`` found. Every figure is a mean over the sampled positions unless it says
    otherwise.

    reference:         model and arithmetic that the cache was compared with.
    limit:             nats, of ``target.engine`` and ``head.engine``.
    target, head:      logprobs of the targets and of the head's entries.
    entropy:           None where the cache does not store it.
    tail_mass:         mean |stored - reference| of the mass outside the head.
    ids_outside:       share of head entries that are not among the reference's most probable ids,
                       beyond near ties.
    ranks_differ:      share of positions where the target's rank is not the reference's.
    ranks_wrong:       the same, where no near tie explains it.
    codec:             from the reference's own head and tail mass to the same after rounding, both
                       with the tail spread alike.
    stored:            from the reference's own head and tail mass to the stored ones: codec and
                       engine together.
    truncation_even:   from the reference's distribution to its own head and tail mass, the tail
                       spread evenly.
    truncation_prior:  the same, the tail spread as the cache's prior says; None without one.
    draws:             None where the cache holds none.
    cached_loss, reference_loss: mean -logprob of the targets, nats.
    cause:             what explains an engine difference above the limit: "shift", "temperature",
                       "ids" or "weights".
    problems:          one line each; empty where cache and reference agree.
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
