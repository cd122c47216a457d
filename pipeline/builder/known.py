"""Sequences of a plan that finished caches hold: their rows are copied, only the others are scored.

The file ``.build/known/sources.json`` names the caches, and ``.build/known/shard-NNNNN.npy`` the
place of every planned sequence in them. They are written once, beside the plan, so a resumed build
and the workers of a cluster follow them, too.

A stored row has the teacher's numbers on the grid of the store. Decoding and encoding again gives
the same numbers under any prior, so the copied row is the row that a full build writes. The prior
itself is estimated from unrounded numbers of the first sequences. It is taken from a cache that
begins with the same ones; if there is none, the first sequences are scored again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.durable import load_state, sync, write_durably
from logitcask.cache_format.errors import CacheError, UserError, one_line
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.types import Sequence

_FOLDER = "known"


class KnownRowsLostError(UserError):
    """Rows that a build wanted to copy cannot be used; their sequences must be scored."""


class _Sources(BaseModel):
    model_config = ConfigDict(frozen=True)

    where: tuple[str, ...]
    fingerprints: tuple[str, ...]
    manifests: tuple[str, ...] = ()  # sha256 of each; builds of earlier versions have none
    teacher: TeacherIdentity
    prior: int | None
    missing: int
    known: int


class Known:
    """The known rows of one build. ``None`` of ``Known.load`` means that there are none."""

    def __init__(self, build_dir: Path, sources: _Sources) -> None:
        self._folder = build_dir / _FOLDER
        self._sources = sources
        self._readers: dict[int, CacheReader] = {}

    @classmethod
    def load(cls, build_dir: Path) -> Known | None:
        file = build_dir / _FOLDER / "sources.json"
        return cls(build_dir, load_state(_Sources, file)) if file.exists() else None

    @classmethod
    def save(
        cls,
        build_dir: Path,
        caches: list[CacheReader],
        places: list[NDArray[np.int64]],
        prior: int | None,
    ) -> Known:
        """Writes the known rows of a plan.

        caches: where they are; at least one.
        places: for each planned shard int64[n, 2]: index into ``caches``, or -1 for a sequence to
                score, and the index of the sequence there.
        prior:  index of the cache whose prior is that of the new one, or None.
        """
        cls.forget(build_dir)
        folder = build_dir / _FOLDER
        folder.mkdir()
        for shard, each in enumerate(places):
            np.save(folder / f"shard-{shard:05d}.npy", each)
            sync(folder / f"shard-{shard:05d}.npy")
        missing = sum(int((each[:, 0] < 0).sum()) for each in places)
        sources = _Sources(
            where=tuple(cache.path for cache in caches),
            fingerprints=tuple(cache.manifest.fingerprint for cache in caches),
            manifests=tuple(cache.manifest_sha256 for cache in caches),
            teacher=caches[0].manifest.teacher,
            prior=prior,
            missing=missing,
            known=sum(map(len, places)) - missing,
        )
        write_durably(folder / "sources.json", sources.model_dump_json())
        return cls(build_dir, sources)

    @staticmethod
    def forget(build_dir: Path) -> None:
        """Removes the known rows: all sequences that are not committed yet are scored."""
        (build_dir / _FOLDER / "sources.json").unlink(missing_ok=True)
        shutil.rmtree(build_dir / _FOLDER, ignore_errors=True)

    @property
    def where(self) -> tuple[str, ...]:
        """The caches, folders or URLs."""
        return self._sources.where

    @property
    def sequences(self) -> int:
        """Number of sequences whose rows are copied."""
        return self._sources.known

    @property
    def teacher(self) -> TeacherIdentity:
        return self._sources.teacher

    @property
    def complete(self) -> bool:
        """Whether the build needs no teacher: no sequence is missing, and the prior is known."""
        return self._sources.missing == 0 and self._sources.prior is not None

    def prior(self) -> TailPrior | None:
        """The prior of the new cache; None if it has to be estimated."""
        if self._sources.prior is None:
            return None
        return self._reader(self._sources.prior).prior

    def check_teacher(self, teacher: TeacherIdentity) -> None:
        """Raises KnownRowsLostError if the teacher that has started is not that of the rows."""
        if not same_numbers(self._sources.teacher, teacher):
            raise KnownRowsLostError(
                f"{' and '.join(self.where)}: scored by {_name(self._sources.teacher)}, and this teacher is {_name(teacher)}"
            )

    def rows(self, shard: int) -> KnownRows:
        return KnownRows(self, np.load(self._folder / f"shard-{shard:05d}.npy"))

    def read(self, cache: int, index: int) -> CachedSequence:
        """A stored sequence. Raises KnownRowsLostError."""
        try:
            return self._reader(cache)[index]
        except (CacheError, OSError, IndexError) as error:
            raise KnownRowsLostError(f"{self.where[cache]}: {one_line(error)}") from error

    def _reader(self, cache: int) -> CacheReader:
        if cache not in self._readers:
            where = self.where[cache]
            try:
                reader = CacheReader(where)
            except (CacheError, OSError) as error:
                raise KnownRowsLostError(f"{where}: {one_line(error)}") from error
            # The bytes are compared: a signature that was checked is over them.
            as_before = reader.manifest.fingerprint == self._sources.fingerprints[cache] and (
                not self._sources.manifests
                or reader.manifest_sha256 == self._sources.manifests[cache]
            )
            if not as_before:
                raise KnownRowsLostError(f"{where}: another cache is there now")
            self._readers[cache] = reader
        return self._readers[cache]


@dataclass(frozen=True)
class KnownRows:
    """The known rows of one planned shard."""

    known: Known
    places: NDArray[np.int64]

    def __contains__(self, row: int) -> bool:
        return bool(self.places[row, 0] >= 0)

    def get(self, row: int, sequence: Sequence) -> CachedSequence:
        """The row as the new cache stores it. Raises KnownRowsLostError if its text is another."""
        cache, index = map(int, self.places[row])
        found = self.known.read(cache, index)
        if not (
            np.array_equal(found.input_ids, sequence.input_ids)
            and np.array_equal(found.loss_mask, sequence.loss_mask)
        ):
            raise KnownRowsLostError(
                f"{self.known.where[cache]}: sequence {index} is not {sequence.sequence_id!r}"
            )
        return replace(
            found,
            sequence_id=sequence.sequence_id,
            writer_logprob=sequence.writer_logprob,
            chosen=None if sequence.chosen_ids is None else found.chosen,
        )


def same_numbers(one: TeacherIdentity, other: TeacherIdentity) -> bool:
    """Whether two teachers are the same in the sense of a cache's fingerprint."""
    return _identity(one) == _identity(other)


def _identity(teacher: TeacherIdentity) -> dict[str, Any]:
    unnamed = {"route"} if teacher.weights_sha256 is None else {"route", "model"}
    return teacher.model_dump(mode="json", exclude=unnamed)


def _name(teacher: TeacherIdentity) -> str:
    return f"{teacher.model} ({teacher.engine}, {teacher.dtype})"
