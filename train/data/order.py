"""The order of the training data: seeded, the same on every machine, known without reading data.

A *unit* is a sequence, or a row of several packed sequences. The order of an epoch depends only on
the seed, the epoch's number, and the sizes and places of the units. A run that resumes in the
middle of an epoch therefore continues at its place without decoding the skipped units. Workers get
finished lists, so their number changes nothing.

Shapes: U units of one cache, M sequences in them (each once).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler

Shuffle = Literal["all", "shards", "batches", "none"]
Epoch = Literal["first", "all"]
Ints = NDArray[np.integer]

GROUPED_BATCHES = 64
"""Batches of all processes together among which ``group_by_length`` sorts: bounds how far it
moves a sequence.
"""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one cache.

    first:   int64[U + 1], start of each unit in ``members``.
    members: int64[M], the sequences, by their number in their data set.
    tokens:  int64[U].
    kept:    int64[U], kept positions.
    shard:   int32[U], the shard of a unit's first sequence.
    block:   int32[U], its run of record batches; blocks of different shards have different numbers.
    """

    first: Ints
    members: Ints
    tokens: Ints
    kept: Ints
    shard: Ints
    block: Ints

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, unit: int) -> list[int]:
        found: list[int] = self.members[self.first[unit] : self.first[unit + 1]].tolist()
        return found


def single_units(tokens: Ints, kept: Ints, shard: Ints, block: Ints) -> Units:
    """One unit per sequence."""
    numbers = np.arange(len(tokens) + 1, dtype=np.int64)
    return Units(numbers, numbers[:-1], tokens, kept, shard, block)


class CacheOrder:
    """The endless stream of one cache's units: pass after pass over all units, each in a new order.

    ``shuffle: all`` is a random order, and ``none`` the stored order. With ``shards`` the shards
    come in random order, and the units of ``window`` shards at a time are mixed. With ``batches``
    the blocks inside such a window are shuffled too, and only the units of one block are mixed, so
    each record batch is decoded once.
    """

    def __init__(self, units: Units, seed: tuple[int, ...], shuffle: Shuffle, window: int) -> None:
        self.units, self.seed, self.shuffle, self.window = units, seed, shuffle, window
        self._pass: tuple[int, Ints] | None = None

    def take(self, start: int, count: int) -> Ints:
        """int64[count]: the units from number ``start`` of the stream on."""
        parts = []
        while count > 0:
            number, at = divmod(start, len(self.units))
            parts.append(self._one_pass(number)[at : at + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _one_pass(self, number: int) -> Ints:
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, self._shuffled(np.random.default_rng([*self.seed, number])))
        return self._pass[1]

    def _shuffled(self, rng: np.random.Generator) -> Ints:
        count = len(self.units)
        if self.shuffle == "none":
            return np.arange(count)
        if self.shuffle == "all":
            return rng.permutation(count)
        group = _ranks(self.units.shard, rng) // self.window
        chance = rng.random(count)
        if self.shuffle == "shards":
            return np.lexsort((chance, group))
        return np.lexsort((chance, _ranks(self.units.block, rng), group))


def _ranks(labels: Ints, rng: np.random.Generator) -> Ints:
    """int64[U]: the place of each label in a random order of all labels that occur."""
    found, number = np.unique(labels, return_inverse=True)
    return rng.permutation(len(found))[number]


class Plan:
    """The units of each epoch, drawn from one or several caches, and their order.

    Without weights, an epoch is every unit once. With weights, which are shares of the kept
    positions, an epoch draws from every cache in proportion, until the first cache
    (``epoch="first"``) or the last one (``"all"``) is exhausted. Each cache is a stream, and an
    epoch continues it at the place where the last one stopped, so every unit comes once before any
    comes twice.

    The units of all caches have consecutive numbers; those of cache c begin at ``first_unit[c]``.
    """

    def __init__(
        self,
        caches: list[Units],
        weights: list[float] | None,
        *,
        seed: int,
        shuffle: Shuffle,
        window: int,
        epoch: Epoch,
    ) -> None:
        self.seed, self.shuffle = seed, shuffle
        self.orders = [
            CacheOrder(units, (seed, 1, n), shuffle, window) for n, units in enumerate(caches)
        ]
        sizes = [len(units) for units in caches]
        self.first_unit = np.concatenate([[0], np.cumsum(sizes)])
        self.tokens = np.concatenate([units.tokens for units in caches])
        self.counts = sizes
        if weights is not None:
            rates = [
                weight / units.kept.mean() for weight, units in zip(weights, caches, strict=True)
            ]
            whole = [size / rate for size, rate in zip(sizes, rates, strict=True)]
            length = min(whole) if epoch == "first" else max(whole)
            self.counts = [max(1, round(rate * length)) for rate in rates]

    def __len__(self) -> int:
        """Units of an epoch."""
        return sum(self.counts)

    def locate(self, unit: int) -> tuple[int, int]:
        """(cache, unit in the cache) of a unit's number among all caches."""
        cache = int(np.searchsorted(self.first_unit, unit, side="right")) - 1
        return cache, unit - int(self.first_unit[cache])

    def epoch(self, number: int) -> Ints:
        """int64[len(self)]: the units of an epoch in order."""
        drawn = [
            order.take(number * count, count) + first
            for order, count, first in zip(
                self.orders, self.counts, self.first_unit[:-1], strict=True
            )
        ]
        return self._mixed(drawn, number)

    def _mixed(self, drawn: list[Ints], number: int) -> Ints:
        """The units of all caches in one order; ``number`` seeds it."""
        if len(drawn) == 1:
            return drawn[0]
        # The n units of a cache divide the epoch into n intervals, and each unit gets a random time
        # in its interval. Every batch then comes close to the shares of the weights.
        rng = np.random.default_rng([self.seed, 2, number])
        wobble = (
            np.full(len(each), 0.5) if self.shuffle == "none" else rng.random(len(each))
            for each in drawn
        )
        when = [
            (np.arange(len(each)) + at) / len(each) for each, at in zip(drawn, wobble, strict=True)
        ]
        return np.concatenate(drawn)[np.argsort(np.concatenate(when), kind="stable")]


class PartPlan(Plan):
    """The units of a part of a longer training. Each cache is a stream, which is read on from where
    earlier parts have left it.

    keys:   the seed of each cache's stream, the same in every part.
    read:   units of each cache that earlier parts have read.
    first:  steps made before this part, which seed the order of its units.
    """

    def __init__(
        self,
        caches: list[Units],
        weights: list[float] | None,
        *,
        keys: list[tuple[int, ...]],
        read: list[int],
        first: int,
        seed: int,
        shuffle: Shuffle,
        window: int,
    ) -> None:
        super().__init__(caches, None, seed=seed, shuffle=shuffle, window=window, epoch="first")
        self.orders = [
            CacheOrder(units, (seed, 1, *key), shuffle, window)
            for units, key in zip(caches, keys, strict=True)
        ]
        self.read, self.first = read, first
        kept = [float(units.kept.sum()) for units in caches] if weights is None else weights
        self._rates = np.array(
            [
                each / units.kept.mean() if each > 0 else 0.0
                for each, units in zip(kept, caches, strict=True)
            ]
        )

    def shares(self, count: int) -> list[int]:
        """The units of each cache among ``count``: as the weights say, rounded down, and the rest
        to those whose share lost most by it.
        """
        exact = count * self._rates / self._rates.sum()
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: count - int(shares.sum())]] += 1
        found: list[int] = shares.tolist()
        return found

    def draw(self, count: int) -> Ints:
        """int64[count]: the units of the part, in order."""
        return self._mixed(
            [
                order.take(read, share) + first
                for order, read, share, first in zip(
                    self.orders,
                    self.read,
                    self.shares(count),
                    self.first_unit[:-1],
                    strict=True,
                )
            ],
            self.first,
        )


class Batches(BatchSampler):
    """The batches of an epoch, each a list of units; ``set_epoch`` sets the epoch.

    With ``processes`` > 1 these are the batches of all processes in turn, and accelerate gives
    every process its own. With ``group_by_length`` the units of a batch, and of the batches that
    the processes compute at the same time, have similar lengths. Such groups come in random order.
    GROUPED_BATCHES groups at a time are sorted.
    """

    def __init__(
        self,
        plan: Plan,
        batch_size: int,
        *,
        drop_last: bool = False,
        group_by_length: bool = False,
        processes: int = 1,
    ) -> None:
        self.plan, self.batch_size, self.drop_last = plan, batch_size, drop_last
        self.group_by_length, self.processes = group_by_length, processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return (
            len(self.plan) // self.batch_size
            if self.drop_last
            else -(-len(self.plan) // self.batch_size)
        )

    def __iter__(self) -> Iterator[list[int]]:
        units = self.plan.epoch(self._epoch)
        if self.group_by_length:
            units = self._grouped(units)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield units[start : start + self.batch_size].tolist()

    def _grouped(self, units: Ints) -> Ints:
        rng = np.random.default_rng([self.plan.seed, 3, self._epoch])
        together = self.batch_size * self.processes
        grouped = []
        for start in range(0, len(units), GROUPED_BATCHES * together):
            # Sort a window by length, longest first.
            window = units[start : start + GROUPED_BATCHES * together]
            window = window[np.argsort(-self.plan.tokens[window], kind="stable")]
            # Cut it into whole groups, one per step of all processes, and shuffle the groups.
            full = len(window) // together
            groups = window[: full * together].reshape(full, together)[rng.permutation(full)]
            # Distribute the units of a group in turn, so that every process gets as many long ones.
            dealt = groups.reshape(full, self.batch_size, self.processes).transpose(0, 2, 1)
            # The rest of the window is an incomplete group at its end.
            grouped += [dealt.reshape(-1), window[full * together :]]
        return np.concatenate(grouped)


class PartBatches(Batches):
    """The batches of a part of a longer training, as the end of one long epoch. Those of the steps
    before the part are placeholders, which a resumed training skips unread.

    steps: (before the part, at its end). per_step: batches of all processes in an optimizer step.
    """

    plan: PartPlan

    def __init__(
        self,
        plan: PartPlan,
        batch_size: int,
        *,
        steps: tuple[int, int],
        per_step: int,
        group_by_length: bool = False,
        processes: int = 1,
    ) -> None:
        super().__init__(plan, batch_size, group_by_length=group_by_length, processes=processes)
        self._before, self._all = (each * per_step for each in steps)

    @property
    def units(self) -> int:
        """Units that the part reads."""
        return (self._all - self._before) * self.batch_size

    def __len__(self) -> int:
        return self._all

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._before):
            yield [0] * self.batch_size
        units = self.plan.draw(self.units)
        if self.group_by_length:
            units = self._grouped(units)
        for start in range(0, len(units), self.batch_size):
            yield units[start : start + self.batch_size].tolist()
