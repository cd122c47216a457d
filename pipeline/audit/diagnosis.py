"""The cause of a difference between engine and reference that arithmetic does not explain: shift,
temperature, ids or weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.manifest import StoreSettings
from logitcask.pipeline.audit.figures import Tally, head_tally, most_probable
from logitcask.pipeline.audit.reference import Reference, at_temperature
from logitcask.pipeline.audit.result import Audit
from logitcask.pipeline.audit.sample import sample
from logitcask.pipeline.distribution.draws import LEAST_LOGPROB

# Largest numbers of logprobs and positions for the diagnosis.
_EVIDENCE_VALUES = 1 << 23
_EVIDENCE_POSITIONS = 256

_Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Evidence:
    """Positions of a sequence with two neighbours, and float32[R, V] around them, by offset."""

    part: CachedSequence
    dense: dict[int, NDArray[np.float32]]


class _Suspects:
    """Possible causes of a difference, each judged by the remainder after its correction.

    If the heads differ, they are compared, else the targets.
    """

    def __init__(self, evidence: list[_Evidence], store: StoreSettings, *, by_heads: bool) -> None:
        self._evidence = evidence
        self._by_heads = by_heads
        self._tally = head_tally(store) if by_heads else Tally(store.scalar_step)

    def shifted(self, by: int) -> float:
        """The remaining difference if row i belongs to row i + ``by``."""
        return self._left(lambda one: self._values(one, one.dense[by], by))

    def at_temperature(self, temperature: float) -> float:
        return self._left(
            lambda one: self._values(one, at_temperature(one.dense[0], temperature), 0)
        )

    def by_rank(self) -> float:
        """The remaining difference if only the head's ids are wrong."""
        if not self._by_heads:
            return math.inf
        return self._left(
            lambda one: most_probable(one.dense[0], one.part.ids.shape[1])[one.part.ids >= 0]
        )

    def best_temperature(self) -> tuple[float, float]:
        """(remaining difference, temperature), from a grid that narrows around its best point."""
        best, width = 0.0, 0.25
        found = (math.inf, 1.0)
        points = np.arange(-6, 7) * width
        for _ in range(5):
            for point in points.tolist():
                found = min(
                    found, (self.at_temperature(math.exp(best + point)), math.exp(best + point))
                )
            best = math.log(found[1])
            width /= 4
            points = np.arange(-4, 5) * width
        return found

    def _values(self, one: _Evidence, dense: _Array, offset: int) -> _Array:
        """The reference's values at the cache's head ids or targets."""
        if self._by_heads:
            stored = one.part.ids >= 0
            ids = np.where(stored, one.part.ids, 0).astype(np.int64)
            return np.minimum(np.take_along_axis(dense, ids, axis=1)[stored], 0)
        targets = one.part.input_ids[one.part.positions + 1 + offset]
        return dense[np.arange(len(dense)), targets]

    def _left(self, reference: Callable[[_Evidence], _Array]) -> float:
        total, values = 0.0, 0
        for one in self._evidence:
            stored = (
                one.part.logprobs[one.part.ids >= 0] if self._by_heads else one.part.target_logprob
            )
            total += float(self._tally.engine(stored, reference(one)).sum(dtype=np.float64))
            values += len(stored)
        return total / values if values else math.inf


def diagnose(
    reader: CacheReader, reference: Reference, result: Audit, sequences: int
) -> tuple[str, str]:
    """(cause, problem) of an engine difference above the limit."""
    store = reader.manifest.store
    by_heads = result.head.engine > result.limit
    differs = result.head.engine if by_heads else result.target.engine
    found = (
        f"the {'head' if by_heads else 'target'} logprobs are {differs:.2g} nats from those of {reference.name} on "
        f"average, rounding taken out; at most {result.limit:g} is expected"
    )
    suspects = _Suspects(_gather(reader, reference, sequences), store, by_heads=by_heads)
    unexplained = suspects.shifted(0)

    def explains(left: float) -> bool:
        return left <= max(result.limit, unexplained / 5) and left < unexplained / 2

    left, by = min((suspects.shifted(by), by) for by in (-1, 1))
    if explains(left):
        where = "after" if by > 0 else "before"
        return (
            "shift",
            f"{found}; the cache is shifted by one: its rows fit the position {where} theirs ({left:.2g} nats)",
        )
    left, temperature = suspects.best_temperature()
    if explains(left):
        stated = reader.manifest.teacher.temperature
        return "temperature", (
            f"{found}; the cache has another temperature: its rows fit {stated * temperature:.3g} ({left:.2g} nats), "
            f"its manifest says {stated:g}"
        )
    left = suspects.by_rank()
    if explains(left):
        return (
            "ids",
            f"{found}; the cache has other ids: rank by rank its heads' logprobs fit ({left:.2g} nats)",
        )
    return "weights", (
        f"{found}; neither a shift by one nor a temperature nor other ids explain it: the cache was built with other weights "
        f"or other arithmetic. Its token ids are in range; its teacher's loss on them is {result.cached_loss:.3f} nats, the "
        f"reference's {result.reference_loss:.3f}"
    )


def _gather(reader: CacheReader, reference: Reference, sequences: int) -> list[_Evidence]:
    """Some positions of the sample, spread over its first sequences."""
    wanted = min(_EVIDENCE_POSITIONS, max(16, _EVIDENCE_VALUES // reader.manifest.store.vocab_size))
    evidence: list[_Evidence] = []
    for sequence in sample(reader, sequences, reference.max_tokens):
        dense = reference.dense(sequence.input_ids)
        at = np.flatnonzero((sequence.positions >= 1) & (sequence.positions + 1 < len(dense)))
        at = at[np.linspace(0, len(at) - 1, min(len(at), wanted)).astype(int)]
        part = sequence.at(at)
        around = {
            by: np.maximum(dense[part.positions + by], LEAST_LOGPROB).astype(np.float32)
            for by in (-1, 0, 1)
        }
        evidence.append(_Evidence(part, around))
        wanted -= len(at)
        if wanted <= 0:
            break
    return evidence
