"""Finished caches, looked up by tokens: the teacher's rows for a text, or the reason for none."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import Header, Manifest
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence
from logitcask.pipeline.serve.index import PrefixIndex

logger = logging.getLogger(__name__)


class Missing(NamedTuple):
    """Why a cache cannot answer.

    nearness: 0 if the text is not there, 1 if positions are not stored, 2 if heads are too small.
    """

    nearness: int
    reason: str


NOT_THERE = Missing(0, "no sequence begins with these tokens")
UNMASKED = Missing(1, "some of its positions are outside the loss mask, so they are not stored")


@dataclass(frozen=True)
class ServedCache:
    """One cache and its index. Safe to use from several threads."""

    reader: CacheReader
    index: PrefixIndex
    lock: threading.Lock

    @classmethod
    def open(cls, path: str) -> ServedCache:
        """Raises the errors of opening the cache, and UserError for one that does not know all its
        values. Takes the time of reading all its tokens."""
        reader, start = CacheReader(path), time.monotonic()
        reader.require_known(
            "its numbers cannot stand for the teacher's; serve a cache that was built"
        )
        if (temperature := reader.manifest.teacher.temperature) != 1:
            raise UserError(
                f"{path} holds distributions at temperature {temperature:g}, and those at 1 are served; name another"
            )
        if not len(reader):
            raise UserError(f"{path} has no sequences, so there is nothing to serve; name another")
        index = PrefixIndex.of(reader)
        logger.info(
            "%s: %s sequences of %s, found by their tokens in %.1f s",
            path,
            f"{len(reader):,}",
            reader.manifest.teacher.model,
            time.monotonic() - start,
        )
        return cls(reader, index, threading.Lock())

    @property
    def manifest(self) -> Manifest:
        return self.reader.manifest

    def find(
        self, ids: NDArray[np.int32], k: int, *, nulls: bool = False
    ) -> CachedSequence | Missing:
        """The rows of ``ids`` (int32[n], n >= 2) with heads of at least ``k`` entries.

        nulls: whether rows may be missing, if the last one is there.
        """
        return find_in(self.index, self._sequence, ids, k, nulls=nulls)

    def _sequence(self, number: int) -> CachedSequence:
        with self.lock:
            return self.reader[number]


def find_in(
    index: PrefixIndex,
    sequence: Callable[[int], CachedSequence],
    ids: NDArray[np.int32],
    k: int,
    *,
    nulls: bool = False,
) -> CachedSequence | Missing:
    """``ServedCache.find`` for any numbered sequences.

    The rows of a beginning do not depend on what follows, so a longer sequence answers. A text that
    begins in the middle of a sequence has lost its left context: it is another text.
    """
    whole = index.find(ids)
    partial = [] if whole else index.find(ids, kept=0)
    missing = UNMASKED if partial else NOT_THERE
    for number in whole or (partial if nulls else []):
        found = beginning(sequence(number), len(ids))
        if not len(found.positions) or found.positions[-1] != len(ids) - 2:
            continue
        smallest = int((found.ids >= 0).sum(axis=1).min())
        if smallest >= k:
            return found
        missing = Missing(2, f"a stored head has {smallest} entries, fewer than the {k} asked for")
    return missing


def beginning(sequence: CachedSequence, tokens: int) -> CachedSequence:
    """The first tokens of a sequence, and its kept positions there."""
    first = sequence.at(np.flatnonzero(sequence.positions < tokens - 1))
    return replace(
        first,
        input_ids=first.input_ids[:tokens],
        loss_mask=first.loss_mask[:tokens],
        entropy=None,
        samples=None,
    )


def check_one_teacher(headers: dict[str, Header]) -> None:
    """Raises UserError unless the caches, by path, are of one teacher and one vocabulary."""
    (first, ours), *others = headers.items()
    for path, theirs in others:
        if difference := _difference(ours, theirs):
            raise UserError(
                f"{first} and {path} are not of one teacher: {difference}; serve them apart, on two ports"
            )


def _difference(one: Header, other: Header) -> str:
    sides = []
    hashed = one.teacher.weights_sha256 and other.teacher.weights_sha256
    for header in (one, other):
        teacher = header.teacher
        who = (
            {"weights_sha256": teacher.weights_sha256}
            if hashed
            else {"model": plain_name(teacher.model), "revision": teacher.revision}
        )
        sides.append(
            who
            | {
                "vocab_size": teacher.vocab_size,
                "vocab_sha256": header.tokenizer.vocab_sha256,
                "temperature": teacher.temperature,
            }
        )
    return "" if sides[0] == sides[1] else describe_difference(sides[0], sides[1])


def plain_name(name: str) -> str:
    """The last part of a hub name or a path, which does not depend on the model's place."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
