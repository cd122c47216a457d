"""A random teacher whose rows are written in other layouts, and the distance of a cache from it.

The files are written here as their layouts are described in public, with code of their own: bits as
text, polynomials by numpy's least squares, plain Python lists.

Shapes: V vocabulary, K entries of a row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcask.cache_format import CacheReader, verify
from logitcask.pipeline.imports.base import ImportOptions
from logitcask.pipeline.imports.run import import_cache

V, K = 300, 8
ROWS = int(os.environ.get("LOGITCASK_IMPORT_ROWS", "200"))
"""Sequences of the main test of each layout; docs/layouts.md has the figures of 1,000."""

LAYOUTS = (
    "distillkit-raw",
    "distillkit-packed",
    "distillkit-legacy",
    "axolotl",
    "axolotl-prepared",
    "sidecar",
    "probabilities",
    "torch",
    "megatron",
)


@dataclass
class Text:
    """A sequence, and the teacher's logits at its positions, float64[n - 1, V]."""

    tokens: NDArray[np.int64]
    logits: NDArray[np.float64]

    @property
    def logprobs(self) -> NDArray[np.float64]:
        """float64[n - 1, V]."""
        return self.logits - np.log(np.exp(self.logits).sum(axis=1, keepdims=True))

    def top(self, values: NDArray[np.float64], k: int = K) -> tuple[NDArray[Any], NDArray[Any]]:
        """(ids, values) of the most probable ids, each [n - 1, k]."""
        ids = np.argsort(-self.logits, axis=1)[:, :k]
        return ids, np.take_along_axis(values, ids, axis=1)


@pytest.fixture
def texts(rng):
    return make_texts(rng, ROWS)


def make_texts(rng, count: int, length: int | None = None) -> list[Text]:
    """Sequences of 3 to 6 tokens; the teacher finds most next tokens probable."""
    found = []
    for _ in range(count):
        n = length or int(rng.integers(3, 7))
        tokens = rng.integers(0, V, n)
        logits = rng.normal(0, 2, (n - 1, V))
        likely = rng.random(n - 1) < 0.8
        logits[likely, tokens[1:][likely]] += 5
        found.append(Text(tokens, logits))
    return found


def imported(layout: str, source: Path, out: Path, **options: Any) -> CacheReader:
    """The cache that an import makes, every number of it verified."""
    asked = {"teacher": "m", "tokenizer": "synthetic", "vocab_size": V, **options}
    import_cache(layout, str(source), out, ImportOptions(**asked))
    assert verify(str(out), deep=True) == []
    return CacheReader(str(out))


def head_kl(
    ids: NDArray[np.int64], logprobs: NDArray[np.float64], sequence: Any, row: int, *, tail: bool
) -> float:
    """KL in nats from what a layout holds at a position, int64[K] and float64[K], to what the cache
    says there. The cells are the ids and, with ``tail``, the rest; without it both sides are scaled
    to 1. An entry that only the cache's target has counts there.
    """
    p = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
    q = dict(zip(sequence.ids[row].tolist(), sequence.logprobs[row].tolist(), strict=True))
    rest = float(np.exp(sequence.tail_logprob[row]))
    target = int(sequence.input_ids[sequence.positions[row] + 1])
    if target not in q and np.isfinite(sequence.target_logprob[row]):
        q[target] = float(sequence.target_logprob[row])
        rest = max(rest - np.exp(q[target]), 1e-9)
    q.pop(-1, None)
    assert set(p) == set(q)
    one, other = np.exp([p[i] for i in p]), np.exp([q[i] for i in p])
    if tail:
        one, other = np.append(one, max(1 - one.sum(), 2.0**-20)), np.append(other, rest)
    one, other = one / one.sum(), other / other.sum()
    return float((one * np.log(one / other)).sum())


def mean_kl(
    held: list[tuple[NDArray[Any], NDArray[Any]]], reader: CacheReader, *, tail: bool = True
) -> float:
    """Mean of ``head_kl`` over all positions of all sequences; ``held``: [R, K] of each."""
    found = []
    for (ids, logprobs), sequence in zip(held, reader, strict=True):
        assert len(ids) == len(sequence.positions)
        for row in range(len(ids)):
            there = ids[row] >= 0
            found.append(head_kl(ids[row][there], logprobs[row][there], sequence, row, tail=tail))
    mean = float(np.mean(found))
    print(f"{reader.manifest.teacher.engine}: KL {mean:.1e} over {len(found):,} positions")
    return mean


ROUNDING = 2.0**-6 / 2
"""Largest error of a logprob that an import stores, nats."""
KL_BY_ROUNDING = 3 * ROUNDING**2
"""Bound of the mean KL by rounding: half the variance of uniform errors is ROUNDING^2 / 6; forced
targets and tail masses have a coarser grid, 2^-9."""
