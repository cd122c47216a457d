"""Readings: what another model predicts at the positions of a cache, as a file.

``train-student read`` writes one, and ``teacher-cache report`` shows it beside the teacher. The
file belongs to one cache, and is no part of it. It is a ``.npz`` of numpy:

    meta        a JSON object as text: the fields of ``ReadingsOf``
    index       int64[N], ascending: numbers of the sequences in the cache
    positions   int64[N]: their numbers of kept positions
    entries     int64[P]: the number of stored head entries at each position
    log_head    float32[E]: the model's logprobs at these entries, position by position; -inf where
                it lacks the id
    log_tail    float32[P]: its log mass on all other ids of the teacher
    log_target  float32[P]: its logprob of the token that follows
    kl          float32[P]: KL(teacher || model), nats; nan for a cache without heads
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import UserError, first_line
from logitcask.cache_format.manifest import Manifest
from logitcask.cache_format.sequence import CachedSequence

_MAGIC = "logitcask readings 1"
_COLUMNS = ("log_tail", "log_target", "kl")


class ReadingsOf(NamedTuple):
    """What a file is of.

    model:       as it was named.
    fingerprint, content_sha256: of the cache.
    kl:          what the KL is: ``exact``, ``lower`` (everything outside the head is one cell: a
                 lower bound), ``biased`` (the heads alone, scaled to 1) or ``none``.
    left_out:    mean share of the teacher's mass on ids that the model lacks, which are left out.
    """

    model: str
    fingerprint: str
    content_sha256: str
    kl: str
    left_out: float


class Reading(NamedTuple):
    """The values of one sequence: those of the file, of its positions."""

    log_head: NDArray[np.float32]
    log_tail: NDArray[np.float32]
    log_target: NDArray[np.float32]
    kl: NDArray[np.float32]


class Readings:
    """A file of readings, held in memory."""

    def __init__(self, file: Path, of: ReadingsOf, columns: dict[str, NDArray[Any]]) -> None:
        self.file, self.of, self._columns = file, of, columns
        self.indices: list[int] = columns["index"].tolist()
        self._place = {index: at for at, index in enumerate(self.indices)}
        self._first = np.concatenate([[0], np.cumsum(columns["positions"])])
        self._first_entry = np.concatenate([[0], np.cumsum(columns["entries"])])

    def reading(self, index: int, sequence: CachedSequence) -> Reading | None:
        """The values of the sequence with this number in the cache; None if it was not read.

        Raises UserError if it is another sequence.
        """
        if index not in self._place:
            return None
        at = self._place[index]
        rows = slice(int(self._first[at]), int(self._first[at + 1]))
        sizes = (sequence.ids >= 0).sum(axis=1)
        if not np.array_equal(self._columns["entries"][rows], sizes):
            raise UserError(
                f"{self.file} has other positions or heads of sequence {index} than the cache; make it again with train-student read"
            )
        head = slice(int(self._first_entry[rows.start]), int(self._first_entry[rows.stop]))
        return Reading(
            self._columns["log_head"][head], *(self._columns[name][rows] for name in _COLUMNS)
        )


def write_readings(
    out: Path,
    of: ReadingsOf,
    read: Iterable[tuple[int, NDArray[np.int64], Reading]],
) -> None:
    """Writes a file. ``read``: the number of each sequence, ascending, the numbers of stored head
    entries at its positions, and its values.
    """
    found = list(read)
    columns: dict[str, NDArray[Any]] = {
        "meta": np.array(json.dumps({"is": _MAGIC, **of._asdict()})),
        "index": np.array([index for index, _, _ in found], np.int64),
        "positions": np.array([len(sizes) for _, sizes, _ in found], np.int64),
        "entries": np.concatenate([np.zeros(0, np.int64), *(sizes for _, sizes, _ in found)]),
    }
    for name in ("log_head", *_COLUMNS):
        parts = [getattr(values, name) for _, _, values in found]
        columns[name] = np.concatenate([np.zeros(0, np.float32), *parts])
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **columns)
    write_durably(out, content.getvalue())


def read_readings(file: Path, cache: str, manifest: Manifest) -> Readings:
    """The readings in ``file``, of the cache with this manifest. Raises UserError for another file,
    and for readings of another cache.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            meta = json.loads(str(opened["meta"]))
            if meta.pop("is") != _MAGIC:
                raise ValueError("of another version")
            of = ReadingsOf(**meta)
            columns = {
                name: opened[name]
                for name in ("index", "positions", "entries", "log_head", *_COLUMNS)
            }
            _check(columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file} holds no readings ({first_line(error)}); expected a file that train-student read has written, or a run or model "
            "as --student"
        ) from error
    if (of.fingerprint, of.content_sha256) != (manifest.fingerprint, manifest.content_sha256):
        raise UserError(
            f"{file} is of the cache with the fingerprint {of.fingerprint[:16]}, and that of {cache} is {manifest.fingerprint[:16]}"
            f"{', with other content' if of.fingerprint == manifest.fingerprint else ''}; read this cache with train-student read"
        )
    return Readings(file, of, columns)


def _check(columns: dict[str, NDArray[Any]]) -> None:
    """Raises ValueError unless the columns belong together."""
    index, positions, entries = (columns[name] for name in ("index", "positions", "entries"))
    for name, column in columns.items():
        whole = name in ("index", "positions", "entries")
        if column.dtype != (np.int64 if whole else np.float32) or column.ndim != 1:
            raise ValueError(f"its {name} has another type")
    counts = len(positions) == len(index) and bool((positions >= 0).all() and (entries >= 0).all())
    ascending = bool((np.diff(index) > 0).all())
    sums = positions.sum() == len(entries) and entries.sum() == len(columns["log_head"])
    if not (
        counts and ascending and sums and all(len(columns[n]) == len(entries) for n in _COLUMNS)
    ):
        raise ValueError("its columns do not belong together")
