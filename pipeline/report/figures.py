"""The figures of a report: sums over sequences, each of which is seen once.

The memory does not grow with the number of sequences.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence
from logitcask.pipeline.report.token_class import Classes

BINS = 20
"""Of each histogram."""

EXTREMES = 10
"""Sequences in each list of the longest and the strangest."""

FEWEST = 16
"""Kept positions of a sequence that may be called strange: means of fewer say little."""

GROUPS = 1000
"""Sources that are counted one by one; the rest is one group."""

LONGEST_TEXT = 400
"""Characters of a name or a token that a page holds; of a longer one its beginning and its end."""

_NUMBERS = re.compile(r"(?:\d+[/#])+")  # of a name that is read from its end: in linear time
_OTHERS = "all others"


class Mean:
    """A running mean of values in nats."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        self.count += len(values)
        self.sum += float(values.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        """nan without values."""
        return self.sum / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class SequenceFigures:
    """A sequence in a list: its index in the cache, its tokens, kept positions and the teacher's
    mean loss, in nats (nan without kept positions).
    """

    index: int
    sequence_id: str
    tokens: int
    positions: int
    loss: float


class Coverage(NamedTuple):
    """The first ``k`` entries of every head: the mean of the mass that they hold, of their number,
    and the share of positions whose target is among the teacher's first k ids.
    """

    k: int
    mass: float
    entries: float
    target: float


def sequence_figures(index: int, sequence: CachedSequence) -> SequenceFigures:
    """The figures of one sequence."""
    loss = -sequence.target_logprob.astype(np.float64)
    mean = float(loss.mean()) if len(loss) else math.nan
    name = shortened(sequence.sequence_id)
    return SequenceFigures(index, name, len(sequence), len(loss), mean)


def shortened(text: str) -> str:
    """A text for a page: whole, or its beginning, its end and its length."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} … ({len(text):,} characters) … {text[-half:]}"


def source_of(sequence_id: str) -> str:
    """The source of a sequence: its id without the numbers of the row and the piece."""
    numbers = _NUMBERS.match(sequence_id[::-1])
    return shortened(sequence_id[: len(sequence_id) - numbers.end()] if numbers else sequence_id)


class Figures:
    """The sums over the sequences that ``add`` has seen.

    vocab_size: ids of the teacher, which bound the entropy.
    top_k:      entries of the largest head.
    classes:    from ids to classes; None without a tokenizer.
    """

    def __init__(self, vocab_size: int, top_k: int, classes: Classes | None = None) -> None:
        self._classes = classes
        self.sequences = self.tokens = self.positions = self.entries = self.draws = 0
        self.loss, self.head_mass, self.entropy = Mean(), Mean(), Mean()
        self.mass_edges = np.linspace(0, 1, BINS + 1)
        self.entropy_edges = np.linspace(0, math.ceil(math.log(vocab_size)), BINS + 1)
        self.loss_edges = np.linspace(0, BINS, BINS + 1)
        self.mass_counts, self.entropy_counts, self.loss_counts = np.zeros((3, BINS), np.int64)
        self.by_source: dict[str, Mean] = defaultdict(Mean)
        self.by_place: dict[int, Mean] = defaultdict(Mean)
        self.by_class: dict[str, Mean] = defaultdict(Mean)
        self._ks = sizes_up_to(top_k)
        self._covered = np.zeros((3, len(self._ks)))
        self._longest = _Top(EXTREMES)
        self._hardest, self._easiest = _Top(EXTREMES), _Top(EXTREMES)

    def add(self, index: int, sequence: CachedSequence) -> None:
        """Counts a sequence; ``index`` is its place in the cache."""
        positions, loss = len(sequence.positions), -sequence.target_logprob.astype(np.float64)
        self.sequences += 1
        self.tokens += len(sequence)
        self.positions += positions
        self.entries += int((sequence.ids >= 0).sum())
        if sequence.samples is not None:
            self.draws += int((sequence.samples.ids >= 0).sum())
        mass = 1 - np.exp(sequence.tail_logprob.astype(np.float64))
        self.loss.add(loss)
        self.head_mass.add(mass)
        self.mass_counts += _counts(mass, self.mass_edges)
        self.loss_counts += _counts(loss, self.loss_edges)
        if sequence.entropy is not None:
            self.entropy.add(sequence.entropy)
            self.entropy_counts += _counts(sequence.entropy, self.entropy_edges)
        self._cover(sequence)
        source = source_of(sequence.sequence_id)
        known = source in self.by_source or len(self.by_source) < GROUPS
        self.by_source[source if known else _OTHERS].add(loss)
        _add_by(self.by_place, [at.bit_length() for at in (sequence.positions + 1).tolist()], loss)
        if self._classes is not None:
            classes = [self._classes(token).value for token in sequence.target_ids.tolist()]
            _add_by(self.by_class, classes, loss)
        found = sequence_figures(index, sequence)
        self._longest.add(found.tokens, found)
        if positions >= FEWEST:
            self._hardest.add(found.loss, found)
            self._easiest.add(-found.loss, found)

    def _cover(self, sequence: CachedSequence) -> None:
        """Adds to mass, entries and targets of the first k of each head."""
        p = np.where(sequence.ids >= 0, np.exp(sequence.logprobs.astype(np.float64)), 0)
        mass = np.concatenate([np.zeros((len(p), 1)), np.cumsum(p, axis=1)], axis=1)
        size = (sequence.ids >= 0).sum(axis=1)
        for at, k in enumerate(self._ks):
            within = np.minimum(size, k)
            self._covered[0, at] += mass[np.arange(len(p)), within].sum()
            self._covered[1, at] += within.sum()
            self._covered[2, at] += (sequence.target_rank < k).sum()

    def coverage(self) -> list[Coverage]:
        """For each k that is a power of two, up to the largest head."""
        means = self._covered / max(1, self.positions)
        return [Coverage(k, *map(float, means[:, at])) for at, k in enumerate(self._ks)]

    def sources(self, most: int) -> list[tuple[str, Mean]]:
        """The sources with the most kept positions, the largest first, and the rest as one."""
        ordered = sorted(
            ((name, each) for name, each in self.by_source.items() if name != _OTHERS),
            key=lambda item: (-item[1].count, item[0]),
        )
        left = [each for _, each in ordered[most:]]
        left += [self.by_source[_OTHERS]] if _OTHERS in self.by_source else []
        if not left:
            return ordered
        rest = Mean()
        rest.count, rest.sum = sum(each.count for each in left), sum(each.sum for each in left)
        return [*ordered[:most], (_OTHERS, rest)]

    def places(self) -> list[tuple[int, int, Mean]]:
        """Loss by the place of the predicted token: first and last place of a bin, and its mean.
        Places count from 0; a bin ends before a power of two.
        """
        return [
            (1 << bits - 1, (1 << bits) - 1, mean) for bits, mean in sorted(self.by_place.items())
        ]

    @property
    def longest(self) -> list[SequenceFigures]:
        return self._longest.best()

    @property
    def hardest(self) -> list[SequenceFigures]:
        """The sequences with the largest mean loss."""
        return self._hardest.best()

    @property
    def easiest(self) -> list[SequenceFigures]:
        """The sequences with the smallest mean loss."""
        return self._easiest.best()


def sizes_up_to(top_k: int) -> list[int]:
    """Powers of two below ``top_k``, and ``top_k`` itself unless it is 0."""
    return [
        *(1 << bits for bits in range(top_k.bit_length()) if 1 << bits < top_k),
        *([top_k] * (top_k > 0)),
    ]


def _counts(values: NDArray[np.floating], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts between ``edges``; values outside belong to the first or the last bin."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _add_by(means: dict[Any, Mean], keys: Sequence[Any], values: NDArray[np.float64]) -> None:
    """Adds each value to the mean of its key."""
    if not len(keys):
        return
    found, at = np.unique(np.asarray(keys), return_inverse=True)
    counts, sums = np.bincount(at), np.bincount(at, values)
    for key, count, total in zip(found.tolist(), counts.tolist(), sums.tolist(), strict=True):
        means[key].count += count
        means[key].sum += total


class _Top:
    """The ``most`` items with the largest value; of equal ones the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, SequenceFigures]] = []

    def add(self, value: float, item: SequenceFigures) -> None:
        entry = (value, -item.index, item)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def best(self) -> list[SequenceFigures]:
        return [item for *_, item in sorted(self._heap, reverse=True)]


def choose(total: int, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64, ascending: a random choice of ``share`` of ``total`` sequences, at least one."""
    count = min(total, max(1, math.floor(total * share)))
    return np.sort(rng.choice(total, count, replace=False)) if count < total else np.arange(total)
