"""Writes one shard: from sequences to a complete Arrow file and its entry in the manifest.

``logitcask.cache_format.writer`` decides the path of the file and commits it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pyarrow as pa

from logitcask.cache_format.schema import BATCH_BYTES
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.codec import Codec, ContentHash
from logitcask.cache_format.shards.validation import validate


class ShardWriter:
    """Writer of one Arrow file; all record batches but the last have equally many sequences."""

    def __init__(
        self,
        path: Path,
        codec: Codec,
        compression_level: int,
        sequences_per_batch: Callable[[float], int] | None,
        *,
        mass_slack: float,
    ) -> None:
        self.codec = codec
        self._mass_slack = mass_slack
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by close() or abort()
        self._path = path
        self._sink = _HashingFile(self._file)
        options = pa.ipc.IpcWriteOptions(
            compression=pa.Codec("zstd", compression_level=compression_level)
        )
        self._arrow = pa.ipc.new_file(
            pa.PythonFile(self._sink, mode="w"), codec.schema, options=options
        )
        self._content = ContentHash()
        self._waiting: list[CachedSequence] = []
        self._choose_rows = sequences_per_batch
        self._per_batch: int | None = None
        self._entries = self._draws = self._chosen = 0
        self.sequences = self.tokens = self.positions = 0
        self.flushed_tokens = 0
        """In complete record batches, which take ``flushed_bytes`` so far."""
        self._head_mass_sum = self._target_nll_sum = 0.0

    def append(self, sequence: CachedSequence, *, rounded: bool = False) -> None:
        """Adds one sequence; ``rounded``: it comes from another cache, so its logprobs have been
        rounded before. Raises UserError if it is invalid (see ``validation.validate``).
        """
        slack = self._mass_slack + (2 * self.codec.store.rounding if rounded else 0)
        validate(sequence, self.codec.store, mass_slack=slack)
        self._waiting.append(sequence)
        self._entries += int((sequence.ids >= 0).sum())
        self._draws += 0 if sequence.samples is None else int((sequence.samples.ids >= 0).sum())
        self._chosen += 0 if sequence.chosen is None else int((sequence.chosen.ids >= 0).sum())
        self.sequences += 1
        self.tokens += len(sequence)
        self.positions += len(sequence.positions)
        mass, nll = sequence.mass_and_nll()
        self._head_mass_sum += mass
        self._target_nll_sum += nll
        if self._per_batch is None and self._size() >= BATCH_BYTES:
            self._fix_rows()
        self._flush_full()

    def _size(self) -> int:
        return uncompressed_bytes(self.tokens, self.positions, self._all_entries)

    @property
    def _all_entries(self) -> int:
        """Entries of heads, draws and chosen ids."""
        return self._entries + self._draws + self._chosen

    def _fix_rows(self) -> None:
        rows = len(self._waiting)
        if self._choose_rows is not None:
            rows = self._choose_rows(self._all_entries / max(1, self.positions))
        self._per_batch = max(1, rows)

    def _flush_full(self) -> None:
        while self._per_batch is not None and len(self._waiting) >= self._per_batch:
            self._flush(self._per_batch)

    def _flush(self, rows: int) -> None:
        batch = self.codec.encode(self._waiting[:rows])
        self._content.update(batch)
        self._arrow.write_batch(batch)
        self.flushed_tokens += sum(map(len, self._waiting[:rows]))
        del self._waiting[:rows]

    @property
    def flushed_bytes(self) -> int:
        """Bytes written to the file so far, in complete record batches."""
        return self._sink.size

    def close(self) -> dict[str, object]:
        """Completes the file on disk (fsync). Returns its ShardEntry's fields except the path."""
        if self._per_batch is None:
            self._fix_rows()
        self._flush_full()
        if self._waiting:
            self._flush(len(self._waiting))
        self._arrow.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "bytes": self._sink.size,
            "sha256": self._sink.sha.hexdigest(),
            "content_sha256": self._content.hexdigest(),
            "sequences": self.sequences,
            "sequences_per_batch": self._per_batch,
            "tokens": self.tokens,
            "positions": self.positions,
            "entries": self._entries,
            "draws": self._draws,
            "head_mass_sum": self._head_mass_sum,
            "target_nll_sum": self._target_nll_sum,
        }

    def abort(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class _HashingFile:
    """A file that hashes the written bytes, so that no shard is read back for its sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(memoryview(data))
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def uncompressed_bytes(tokens: int, positions: int, entries: int) -> int:
    """Approximate bytes of a record batch with ``tokens`` tokens, ``positions`` kept positions and
    ``entries`` entries of heads, draws and chosen ids.
    """
    return 5 * tokens + 20 * positions + 3 * entries
