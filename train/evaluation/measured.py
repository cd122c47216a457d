"""The sums of one evaluation, added batch by batch: metrics by sequence, calibration, and agreement
by the teacher's entropy. Memory: a few numbers for each sequence.

Shapes: P positions of a batch, N sequences, B bins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from logitcask.train.data.dataset import CachedDataset
from logitcask.train.evaluation.by_sequence import BySequence, Floats
from logitcask.train.evaluation.metrics import Calibration

ENTROPY_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Nats between the bins of the teacher's entropy; the first begins at 0, the last has no end."""

EntropyKind = Literal["exact", "lower"]


class Bins(TypedDict):
    """Sums in bins, as JSON has them.

    calibration: number, confidence and correct tokens of the positions, by confidence
        (``Calibration``).
    entropy:     ``positions``, ``entropy`` (nats) and sums of metrics, by the teacher's entropy.
    entropy_kind: whether the entropies are exact or lower bounds; None: they are not known.
    """

    calibration: list[list[float]]
    entropy: dict[str, list[float]]
    entropy_kind: EntropyKind | None


class TeacherValues(NamedTuple):
    """The teacher at the P positions of a batch, as far as the cache knows it.

    entropy:    float32[P], nats: as stored, or from the head and everything outside it as one cell.
    kind:       whether it is exact; that of one cell is a lower bound.
    confidence, right: float32[P], bool[P], of its most probable id (``Calibration``).
    """

    entropy: Tensor | None
    kind: EntropyKind
    confidence: Tensor | None
    right: Tensor | None


class MeasuredBatch(NamedTuple):
    """The metrics at the P positions of a batch.

    first:    number of the batch's first sequence in the data.
    sequence: int64[P], the sequence of each position, from 0 for that one.
    values:   metric -> float32[P], and ``confidence`` and ``right`` (``Calibration``).
    """

    first: int
    sequence: Tensor
    values: dict[str, Tensor]
    teacher: TeacherValues


class Measured:
    """The metrics of a model on N sequences, as far as their batches were added."""

    def __init__(self, sequences: int) -> None:
        self._positions = np.zeros(sequences, np.int64)
        self._sums: dict[str, Floats] = {}
        self._calibration, self._of_teacher = Calibration(), Calibration()
        self._by_entropy: dict[str, Floats] = {}
        self._entropy_kinds: set[EntropyKind | None] = set()

    def add(self, batch: MeasuredBatch) -> None:
        values = {name: value.cpu().double() for name, value in batch.values.items()}
        self._calibration.add(values.pop("confidence"), values.pop("right"))
        count = torch.bincount(batch.sequence).numpy()
        here = slice(batch.first, batch.first + len(count))
        self._positions[here] = count
        for name, value in values.items():
            total = torch.bincount(batch.sequence, weights=value)
            self._sums.setdefault(name, np.zeros(len(self._positions)))[here] = total.numpy()
        teacher = batch.teacher
        if teacher.confidence is not None and teacher.right is not None:
            self._of_teacher.add(teacher.confidence, teacher.right)
        self._entropy_kinds.add(None if teacher.entropy is None else teacher.kind)
        if teacher.entropy is not None:
            entropy = teacher.entropy.double()
            at = torch.bucketize(entropy, torch.tensor(ENTROPY_EDGES).double(), right=True)
            values |= {"positions": torch.ones_like(entropy), "entropy": entropy}
            for name, value in values.items():
                total = torch.bincount(at, weights=value, minlength=len(ENTROPY_EDGES) + 1)
                bins = self._by_entropy.setdefault(name, np.zeros(len(ENTROPY_EDGES) + 1))
                bins += total.numpy()

    @classmethod
    def merged(cls, parts: Iterable[Measured]) -> Measured:
        """All ``parts`` of the same data, of which no two have a sequence in common."""
        parts = list(parts)
        whole = cls(len(parts[0]._positions))
        whole._positions = sum((part._positions for part in parts), whole._positions)
        for mine, theirs in (
            (whole._sums, [part._sums for part in parts]),
            (whole._by_entropy, [part._by_entropy for part in parts]),
        ):
            for sums in theirs:
                for name, values in sums.items():
                    mine[name] = mine[name] + values if name in mine else values
        whole._calibration = Calibration.merged(part._calibration for part in parts)
        whole._of_teacher = Calibration.merged(part._of_teacher for part in parts)
        whole._entropy_kinds = set().union(*(part._entropy_kinds for part in parts))
        return whole

    def by_sequence(self) -> BySequence:
        """The sequences that have kept positions."""
        some = self._positions > 0
        sums = {name: values[some] for name, values in self._sums.items()}
        return BySequence(sums, self._positions[some], self._calibration.error())

    def means(self) -> dict[str, float]:
        """Means over all positions, in the order of reports."""
        return self.by_sequence().means()

    def bins(self) -> Bins:
        kinds = self._entropy_kinds
        kind: EntropyKind | None = "lower" if "lower" in kinds else "exact"
        return {
            "calibration": self._calibration.sums(),
            "entropy": {name: sums.tolist() for name, sums in self._by_entropy.items()},
            "entropy_kind": None if None in kinds else kind,
        }

    def teacher_calibration(self) -> list[list[float]] | None:
        """The same of the teacher; None if a cache does not know its most probable ids."""
        found = self._of_teacher.sums()
        return found if sum(found[0]) == self._positions.sum() else None


def teacher_values(data: CachedDataset, batch: dict[str, Any]) -> TeacherValues:
    """The teacher at the positions of a collated batch of ``data``, on the CPU."""
    ids, logprobs = batch["teacher_ids"], batch["teacher_logprobs"]
    heads = bool(ids.shape[1]) and data.cache.manifest.store.tail_known
    entropy = batch.get("teacher_entropy")
    kind: EntropyKind = "lower" if entropy is None else "exact"
    if entropy is None and heads:
        cells = torch.cat([logprobs, batch["teacher_tail_logprob"][:, None]], 1).double()
        entropy = (-cells.exp() * cells.clamp_min(-1e4)).sum(1).clamp_min(0).float()
        if bool(torch.isinf(batch["teacher_tail_logprob"]).all()):
            kind = "exact"
    if not heads or bool((ids[:, 0] < 0).any()):  # an empty head hides the most probable id
        return TeacherValues(entropy, kind, None, None)
    return TeacherValues(entropy, kind, logprobs[:, 0].exp(), ids[:, 0] == batch["labels"])
