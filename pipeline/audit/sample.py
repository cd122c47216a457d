"""The sample of an audit: the beginnings of some sequences, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from logitcask.cache_format import CachedSequence, CacheReader, UserError
from logitcask.pipeline.distribution.draws import mix

# Sequences without a kept position among their first tokens are skipped, at most this many per
# sequence of the sample.
_LOOKS = 16


def sample(reader: CacheReader, count: int, tokens: int) -> Iterator[CachedSequence]:
    """The beginnings, of at most ``tokens`` tokens, of ``count`` sequences with a kept position
    there, one at a time.

    They are ordered by a hash of the cache's fingerprint and their index. Raises UserError if there
    is none.
    """
    seed = np.array([int(reader.manifest.fingerprint[:16], 16)], np.uint64).view(np.int64)
    order = np.argsort(mix(mix(seed) + np.arange(len(reader))), kind="stable")
    found = 0
    for index in order[: _LOOKS * count].tolist():
        sequence = _beginning(reader[index], tokens)
        if not len(sequence.positions):
            continue
        found += 1
        yield sequence
        if found == count:
            return
    if not found:
        raise UserError(
            f"there is nothing to compare: none of {min(len(reader), _LOOKS * count):,} sequences of {reader.path} has "
            f"a kept position among its first {tokens:,} tokens; look at more with --sequences"
        )


def _beginning(sequence: CachedSequence, tokens: int) -> CachedSequence:
    kept = int(np.searchsorted(sequence.positions, tokens - 1))
    beginning = sequence.at(slice(0, kept))
    return replace(
        beginning, input_ids=sequence.input_ids[:tokens], loss_mask=sequence.loss_mask[:tokens]
    )


def parts(sequence: CachedSequence, positions: int) -> Iterator[CachedSequence]:
    """``sequence``, at most ``positions`` kept positions at a time."""
    for start in range(0, len(sequence.positions), positions):
        yield sequence.at(slice(start, start + positions))
