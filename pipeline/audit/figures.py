"""The figures of an audit, summed over a few positions at a time.

Rounding hides a single difference of an engine, but not the mean difference. Let Q round to the
grid, let the reference's value be x and the engine's x + d. Q(x + d) - Q(x) has the sign of d, and
its mean is d if x is uniform between two grid points (dithered quantisation). The mean of |stored -
Q(x)| is therefore an unbiased estimate of the mean of |d| for any grid. A cache that was rounded
more than once does not have this property. There only the part above the bound of its rounding is
counted, which is a lower bound of |d|.

Shapes: R positions processed together, K head entries, V ids.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.audit.result import Audit, Difference, Distance, DrawsAudit
from logitcask.pipeline.distribution.draws import LEAST_LOGPROB
from logitcask.pipeline.distribution.keep import tail_logprob

# Smallest expected number of draws in each class of the chi-square test.
_LEAST_EXPECTED = 10

_Array = NDArray[Any]


class Tally:
    """Collects a ``Difference`` of values that a cache keeps on a grid."""

    def __init__(self, step: float, error: float | None = None) -> None:
        self._step = step
        self._error = step / 2 if error is None else error
        self._values = 0
        self._sums = np.zeros(4)
        self._largest = 0.0

    def add(self, stored: _Array, exact: _Array) -> None:
        """``exact``: the reference's values, in float32 like the engine's."""
        if not len(stored):
            return
        stored = np.maximum(stored.astype(np.float64), LEAST_LOGPROB)
        exact = exact.astype(np.float64)
        apart = np.abs(stored - exact)
        rounded = _on_grid(exact, self._step)
        engine = self.engine(stored, exact)
        self._values += len(stored)
        self._sums += np.array(
            [apart.sum(), np.abs(rounded - exact).sum(), (stored - exact).sum(), engine.sum()]
        )
        self._largest = max(self._largest, float(apart.max()))

    def engine(self, stored: _Array, exact: _Array) -> _Array:
        """|engine - exact|. Only its mean is meaningful, not a single value (see the module)."""
        if self._error > self._step / 2:
            return np.maximum(np.abs(stored - exact) - self._error, 0)
        return np.abs(stored - _on_grid(exact, self._step))

    def result(self) -> Difference:
        mean, rounding, signed, engine = (self._sums / max(1, self._values)).tolist()
        return Difference(self._values, mean, rounding, self._largest, self._error, signed, engine)


class Sums:
    """Sums the figures of ``Audit``, a few positions at a time."""

    def __init__(
        self, store: StoreSettings, prior: TailPrior | None, near_tie: float, *, derived: bool
    ) -> None:
        self._store = store
        self._near_tie = near_tie
        self._prior = None if prior is None else prior.probabilities()
        self.sequences = self._positions = 0
        self._target = Tally(store.scalar_step)
        self._head = head_tally(store)
        self._entropy = Tally(store.scalar_step)
        self._tail_mass = 0.0
        self._ids_outside = self._ranks_differ = self._ranks_wrong = 0
        self._loss = np.zeros(2)
        self._distances = {name: np.zeros(2) for name in ("codec", "stored", "even", "prior")}
        self._draws = _DrawSums(variance=2 if derived else 1) if store.tail_samples else None

    def add(self, part: CachedSequence, dense: NDArray[np.float32]) -> None:
        """Adds positions with the reference's [R, V] logprobs, none below LEAST_LOGPROB."""
        in_head = part.ids >= 0
        ids = np.where(in_head, part.ids, 0).astype(np.int64)
        exact = np.take_along_axis(dense, ids, axis=1)
        target = dense[np.arange(len(dense)), part.target_ids]
        self._positions += len(dense)
        self._target.add(part.target_logprob, target)
        self._head.add(part.logprobs[in_head], np.minimum(exact[in_head], 0))
        self._loss -= [part.target_logprob.sum(dtype=np.float64), target.sum(dtype=np.float64)]
        self._compare_order(part, dense, exact, target)

        p = np.exp(dense, dtype=np.float64)
        if part.entropy is not None:
            self._entropy.add(part.entropy, -np.einsum("rv,rv->r", p, dense))
        tail = p
        rows, columns = np.nonzero(in_head)
        tail[rows, ids[rows, columns]] = 0
        mass = tail.sum(axis=1)
        self._tail_mass += float(np.abs(np.exp(part.tail_logprob.astype(np.float64)) - mass).sum())
        self._compare_cells(part, in_head, exact, mass)
        self._compare_tails(in_head, ids, dense, tail, mass)
        if self._draws is not None:
            self._draws.add(part, dense, tail, mass)

    def _compare_order(
        self, part: CachedSequence, dense: _Array, exact: _Array, target: _Array
    ) -> None:
        """The head's ids and the target's rank, which near ties may change."""
        size = (part.ids >= 0).sum(axis=1)
        if part.ids.shape[1]:
            lowest = most_probable(dense, part.ids.shape[1])[np.arange(len(dense)), size - 1]
            self._ids_outside += int(
                ((exact < lowest[:, None] - self._near_tie) & (part.ids >= 0)).sum()
            )
        above, near = target[:, None], np.float32(self._near_tie)
        self._ranks_differ += int(((dense > above).sum(axis=1) != part.target_rank).sum())
        surely = (dense > above + near).sum(axis=1)
        perhaps = (dense > above - near).sum(axis=1) - 1
        self._ranks_wrong += int(((part.target_rank < surely) | (part.target_rank > perhaps)).sum())

    def _compare_cells(
        self, part: CachedSequence, in_head: _Array, exact: _Array, mass: _Array
    ) -> None:
        """Heads and tail masses. Both tails have the same form, so the form does not matter."""
        truth = np.concatenate(
            [np.where(in_head, np.exp(exact, dtype=np.float64), 0), mass[:, None]], axis=1
        )
        size = in_head.sum(axis=1, dtype=np.int32)
        tail = _on_grid(tail_logprob(exact, size, self._store.vocab_size), self._store.scalar_step)
        head = _on_grid(np.minimum(exact, 0), self._store.logprob_step)
        self._distances["codec"] += _cells_apart(truth, np.where(in_head, head, -np.inf), tail)
        self._distances["stored"] += _cells_apart(truth, part.logprobs, part.tail_logprob)

    def _compare_tails(
        self, in_head: _Array, ids: _Array, dense: _Array, tail: _Array, mass: _Array
    ) -> None:
        """The reference's tails, compared with an even tail and with the prior's."""
        log_mass = np.log(np.maximum(mass, 1e-300))
        p_log_p = np.einsum("rv,rv->r", tail, dense)
        outside = np.maximum(tail.shape[1] - in_head.sum(axis=1), 1)
        share = mass / outside
        apart = np.abs(tail - share[:, None]).sum(axis=1) - share * in_head.sum(axis=1)
        kl = p_log_p - mass * (log_mass - np.log(outside))
        self._distances["even"] += [kl.sum(), apart.sum() / 2]
        if self._prior is None:
            return
        of_head = np.where(in_head, self._prior[ids], 0).sum(axis=1)
        outside = np.maximum(1 - of_head, 1e-300)
        scale = mass / outside
        apart = np.abs(tail - scale[:, None] * self._prior).sum(axis=1) - scale * of_head
        kl = p_log_p - mass * (log_mass - np.log(outside)) - tail @ np.log(self._prior)
        self._distances["prior"] += [kl.sum(), apart.sum() / 2]

    def result(self, cache: str, sequences_in_cache: int, reference: str, limit: float) -> Audit:
        positions = max(1, self._positions)
        head = self._head.result()
        distances = {
            name: Distance(*(sums / positions).tolist()) for name, sums in self._distances.items()
        }
        cached_loss, reference_loss = (self._loss / positions).tolist()
        return Audit(
            cache=cache,
            reference=reference,
            sequences=self.sequences,
            sequences_in_cache=sequences_in_cache,
            positions=self._positions,
            limit=limit,
            target=self._target.result(),
            head=head,
            entropy=self._entropy.result() if self._store.entropy else None,
            tail_mass=self._tail_mass / positions,
            ids_outside=self._ids_outside / max(1, head.values),
            ranks_differ=self._ranks_differ / positions,
            ranks_wrong=self._ranks_wrong / positions,
            codec=distances["codec"],
            stored=distances["stored"],
            truncation_even=distances["even"],
            truncation_prior=None if self._prior is None else distances["prior"],
            draws=None if self._draws is None else self._draws.result(),
            cached_loss=cached_loss,
            reference_loss=reference_loss,
            cause=None,
            problems=(),
        )


class _DrawSums:
    """Collects a ``DrawsAudit``.

    ``variance``: upper limit of the draws' variance, as a multiple of that of independent draws.
    Draws from draws, as in a derived cache, have up to twice as much.
    """

    def __init__(self, *, variance: float) -> None:
        self._factor = variance
        self._seen: set[str] = set()
        self._draws = self._in_head = 0
        self._classes = np.zeros((2, int(-LEAST_LOGPROB) + 1))
        self._deviation, self._variance = np.zeros(2), np.zeros(2)

    def add(self, part: CachedSequence, dense: _Array, tail: _Array, mass: _Array) -> None:
        """``tail``: float64[R, V], probabilities, 0 in the head; ``mass``: their sums."""
        assert part.samples is not None
        ids = part.samples.ids.reshape(len(dense), -1)
        at = np.flatnonzero(self._new(part) & (ids >= 0).any(axis=1) & (mass > 0))
        ids = ids[at]
        drawn = ids >= 0
        row, chosen = np.nonzero(drawn)[0], ids[drawn]
        self._draws += len(chosen)
        self._in_head += int((tail[at[row], chosen] == 0).sum())

        logprobs, weights = dense[at], tail[at] / mass[at, None]
        draws = drawn.sum(axis=1)
        surprise = np.minimum(-logprobs, -LEAST_LOGPROB).clip(0).astype(np.int64)
        width = self._classes.shape[1]
        self._classes[0] += np.bincount(surprise[row, chosen], minlength=width)
        self._classes[1] += np.bincount(
            surprise.reshape(-1), (weights * draws[:, None]).reshape(-1), minlength=width
        )

        numbers = np.broadcast_to(np.arange(logprobs.shape[1]) / logprobs.shape[1], logprobs.shape)
        for which, f in enumerate((logprobs, numbers)):
            mean = np.einsum("rv,rv->r", weights, f)
            spread = np.einsum("rv,rv,rv->r", weights, f, f) - mean**2
            estimate = np.bincount(row, f[row, chosen], minlength=len(at)) / draws
            self._deviation[which] += (mass[at] * (estimate - mean)).sum()
            self._variance[which] += (mass[at] ** 2 * np.maximum(spread, 0) / draws).sum()

    def _new(self, part: CachedSequence) -> NDArray[np.bool_]:
        """bool[R]: positions that differ from all earlier ones. Equal positions have the same draws
        (``logitcask.pipeline.distribution.draws``), so they count once.
        """
        looks = zip(
            part.target_ids.tolist(),
            part.target_logprob.tolist(),
            part.ids[:, :4].tolist(),
            part.logprobs[:, :1].tolist(),
            strict=True,
        )
        new = np.zeros(len(part.positions), np.bool_)
        for at, look in enumerate(looks):
            key = repr(look)
            new[at] = key not in self._seen
            self._seen.add(key)
        return new

    def result(self) -> DrawsAudit:
        z = [
            float(deviation / math.sqrt(self._factor * variance)) if variance > 0 else None
            for deviation, variance in zip(self._deviation, self._variance, strict=True)
        ]
        return DrawsAudit(self._draws, self._in_head, self._p_value(), *z)

    def _p_value(self) -> float | None:
        pooled: list[_Array] = []
        waiting = np.zeros(2)
        for each in self._classes.T:
            waiting = waiting + each
            if waiting[1] >= _LEAST_EXPECTED:
                pooled.append(waiting)
                waiting = np.zeros(2)
        if len(pooled) < 2:
            return None
        pooled[-1] = pooled[-1] + waiting
        seen, expected = np.array(pooled).T
        statistic = float(((seen - expected) ** 2 / expected).sum()) / self._factor
        return _chi_square_p(statistic, len(pooled) - 1)


def _chi_square_p(statistic: float, freedom: int) -> float:
    """Probability of at least ``statistic`` under chi-square, by Wilson and Hilferty's cube root
    (PNAS 17, 1931).
    """
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2


def _on_grid(values: _Array, step: float) -> _Array:
    return np.rint(values / step) * step


def head_tally(store: StoreSettings) -> Tally:
    """A tally for the head's logprobs with the rounding of ``store``."""
    return Tally(store.logprob_step, store.rounding)


def most_probable(dense: _Array, count: int) -> _Array:
    """[R, count]: the largest values of each row, descending."""
    largest = np.partition(dense, dense.shape[1] - count, axis=1)[:, -count:]
    return -np.sort(-largest, axis=1)


def _cells_apart(truth: _Array, head: _Array, tail: _Array) -> _Array:
    """float64[2], sums over rows of the KL and the TV from ``truth`` [R, K + 1], the tail last, to
    head and tail logprobs.

    Rounded masses do not add up to 1, so both sides are normalised, as a reader does.
    """
    p = truth / truth.sum(axis=1, keepdims=True)
    q = np.exp(np.concatenate([head, tail[:, None]], axis=1), dtype=np.float64)
    q /= q.sum(axis=1, keepdims=True)
    ratio = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))
    return np.array([(p * ratio).sum(), np.abs(p - q).sum() / 2])
