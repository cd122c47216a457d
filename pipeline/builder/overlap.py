"""Sequences of a plan that caches hold: compared by hashes of their tokens, and copied where they are.

A hash has 8 bytes. Whatever is taken by it is compared in full afterwards: a derived cache by the
sha256 of its data, a copied row by its tokens and mask.

Shapes: N sequences.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CacheReader
from logitcask.pipeline.builder.known import Known, same_numbers
from logitcask.pipeline.builder.plan import Plan, read_sequences
from logitcask.pipeline.builder.score import PRIOR_POSITIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Sequences, as hashes: text uint64[N] of tokens and mask, named uint64[N] also of the id.
    ``kept`` int64[N]: kept positions.
    """

    text: NDArray[np.uint64]
    named: NDArray[np.uint64]
    kept: NDArray[np.int64]

    @classmethod
    def of_plan(cls, plan: Plan, build_dir: Path) -> Rows:
        return cls.joined(
            _hashed(
                (sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
                for sequence in read_sequences(build_dir, shard)
            )
            for shard in range(len(plan.shards))
        )

    @classmethod
    def joined(cls, parts: Iterator[Rows]) -> Rows:
        every = list(parts)
        return cls(
            np.concatenate([each.text for each in every]),
            np.concatenate([each.named for each in every]),
            np.concatenate([each.kept for each in every]),
        )

    def holds_any(self, text: NDArray[np.uint64]) -> bool:
        return bool(np.isin(text, self._sorted_text).any())

    @cached_property
    def _sorted_text(self) -> NDArray[np.uint64]:
        return np.unique(self.text)

    def of_prior(self, of_first_shard: int) -> Rows:
        """The first sequences, from which a build with this first shard estimates its prior."""
        enough = int(np.searchsorted(self.kept[:of_first_shard].cumsum(), PRIOR_POSITIONS)) + 1
        end = min(enough, of_first_shard)
        return Rows(self.text[:end], self.named[:end], self.kept[:end])


@dataclass(frozen=True)
class Stored:
    """A cache with the hashes of its sequences."""

    reader: CacheReader
    rows: Rows

    def places(self, plan: Rows) -> NDArray[np.int64]:
        """int64[N]: index here of each sequence of a plan, whatever its id; -1 if it is absent."""
        order = np.argsort(self.rows.text, kind="stable")
        ordered = self.rows.text[order]
        at = np.minimum(np.searchsorted(ordered, plan.text), len(ordered) - 1)
        return np.where(ordered[at] == plan.text, order[at], -1)

    def shared(self, plan: Rows) -> int:
        return int((self.places(plan) >= 0).sum())

    def slice_of(self, plan: Rows) -> str | None:
        """The plan's sequences, ids included, as a slice of this cache: START:STOP or
        START:STOP:STEP.
        """
        order = np.argsort(self.rows.named, kind="stable")
        ordered = self.rows.named[order]
        at = np.minimum(np.searchsorted(ordered, plan.named), len(ordered) - 1)
        if not (ordered[at] == plan.named).all():
            return None
        index = order[at]
        steps = np.unique(np.diff(index))
        if len(steps) > 1 or (len(steps) and steps[0] < 1):
            return None
        step = int(steps[0]) if len(steps) else 1
        start, stop = int(index[0]), int(index[-1]) + 1
        return f"{start}:{stop}" if step == 1 else f"{start}:{stop}:{step}"

    def has_prior_of(self, first: Rows) -> bool:
        """Whether this cache's prior comes from the same first sequences, by the same program."""
        manifest = self.reader.manifest
        mine = self.rows.of_prior(manifest.shards[0].sequences)
        return (
            manifest.tail_prior is not None
            and manifest.created_by == f"logitcask {version('logitcask')}"
            and np.array_equal(mine.text, first.text)
        )


def stored_rows(reader: CacheReader, shards: list[int] | None = None) -> Iterator[Rows]:
    """The hashed sequences of each record batch."""
    columns = (
        reader.iter_column(name, shards) for name in ("sequence_id", "input_ids", "loss_mask")
    )
    for names, ids, masks in zip(*columns, strict=True):
        yield _hashed(
            (
                name,
                row_ids.values.to_numpy(),
                row_mask.values.to_numpy(zero_copy_only=False),
            )
            for name, row_ids, row_mask in zip(names.to_pylist(), ids, masks, strict=True)
        )


def _hashed(sequences: Iterator[tuple[str, Any, Any]]) -> Rows:
    text, named, kept = [], [], []
    for name, ids, mask in sequences:
        digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8)
        digest.update(mask.astype(np.uint8).tobytes())
        text.append(digest.digest())
        digest.update(name.encode())
        named.append(digest.digest())
        kept.append(int(mask[1:].sum()))

    def numbers(digests: list[bytes]) -> NDArray[np.uint64]:
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)

    return Rows(numbers(text), numbers(named), np.array(kept, np.int64))


def write_known(plan: Plan, build_dir: Path, rows: Rows, caches: list[Stored]) -> None:
    """Writes which rows are copied from which cache, the largest share first."""
    cache_of = np.full(len(rows.text), -1, np.int64)
    index_of = np.zeros(len(rows.text), np.int64)
    used: list[Stored] = []
    for stored in sorted(caches, key=lambda each: -each.shared(rows)):
        teacher = stored.reader.manifest.teacher
        if used and not same_numbers(used[0].reader.manifest.teacher, teacher):
            continue
        at = stored.places(rows)
        new = (at >= 0) & (cache_of < 0)
        if new.any():
            cache_of[new], index_of[new] = len(used), at[new]
            used.append(stored)
    if not used:
        return
    first = rows.of_prior(plan.shards[0].sequences)
    prior = next((at for at, each in enumerate(used) if each.has_prior_of(first)), None)
    found = int((cache_of >= 0).sum())
    if prior is None:
        cache_of[: len(first.text)] = -1
    known = int((cache_of >= 0).sum())
    names = " and ".join(each.reader.path for each in used)
    if not known:
        log.info(
            "%d of %d sequences are in %s, but they are those from which the ranks of ids are "
            "estimated, so all are scored",
            found,
            len(cache_of),
            names,
        )
        return
    ends = np.cumsum([shard.sequences for shard in plan.shards])[:-1]
    places = np.split(np.stack([cache_of, index_of], axis=1), ends)
    Known.save(build_dir, [each.reader for each in used], places, prior)
    again = found - known
    log.info(
        "%d of %d sequences are taken from %s%s",
        known,
        len(cache_of),
        names,
        f"; the first {again} are scored again, for the ranks of ids" if again else "",
    )
