"""Writing a cache so that a crash at any moment leaves it either incomplete or right (SPEC.md section 6).

``CacheWriter`` owns the folder, the lock and the commit protocol; ``ShardWriter`` one Arrow file. Neither knows a teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import filelock
import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from cache_format import card
from cache_format.codec import Codec, ContentHash
from cache_format.configuration import describe_difference
from cache_format.errors import CacheInUseError, DamagedCacheError, UserError
from cache_format.manifest import AuditSummary, Header, Manifest, ShardEntry, TailPriorEntry
from cache_format.prior import TailPrior
from cache_format.schema import BATCH_BYTES, FORMAT
from cache_format.sequence import CachedSequence
from cache_format.validation import validate

BUILD_DIR = ".build"
MANIFEST = "manifest.json"
PRIOR = "tail_prior.arrow"

_SHARD = re.compile(r"shard-\d{5,}\.arrow")
State = TypeVar("State", bound=BaseModel)


class CacheWriter:
    """The exclusive writer of the cache in ``path``; use it as a context manager.

    Opening takes the lock (CacheInUseError if another process holds it), removes what a crash left behind, and finds the
    shards that are committed already. ``begin`` states what the cache is, ``shard`` writes one shard, ``finish`` makes
    the cache complete. Raises UserError for a folder that cannot be written, and for a finished cache.
    """

    def __init__(self, path: str | Path, *, compression_level: int = 1) -> None:
        self.path = Path(path)
        self.build_dir = self.path / BUILD_DIR
        self.compression_level = compression_level
        self.committed: dict[int, ShardEntry] = {}
        self._codec: Codec | None = None
        self._mass_slack = 0.0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._refuse_finished()
        if not (self.build_dir).exists():
            refuse_other_files(self.path)
        with writing_to(self.path), ExitStack() as opening:
            opening.enter_context(_locked(self.path))
            self._refuse_finished()  # another process may have finished it since
            (self.build_dir / "commits").mkdir(exist_ok=True)
            (self.path / "data").mkdir(exist_ok=True)
            self._recover()
            self._exit = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _refuse_finished(self) -> None:
        if (self.path / MANIFEST).exists():
            raise UserError(f"{self.path} already holds a finished cache; remove it or choose another output")

    def _recover(self) -> None:
        """Reads the commit records and removes every file that none of them vouches for."""
        for record in sorted((self.build_dir / "commits").glob("*.json")):
            entry = load_state(ShardEntry, record)
            shard = self.path / entry.path
            if not shard.exists() or shard.stat().st_size != entry.bytes:
                raise DamagedCacheError(f"{shard} is not the file its commit record describes; remove {self.path}")
            self.committed[int(record.stem.removeprefix("shard-"))] = entry
        known = {self.path / entry.path for entry in self.committed.values()}
        for file in _shard_files(self.path):
            if file not in known:
                file.unlink()
        for file in self.build_dir.rglob("*.tmp"):
            file.unlink()

    def begin(self, header: Header, prior: TailPrior | None = None) -> Header:
        """Fixes what this cache is, and the prior by which its ids are ranked. Comes before the first shard.

        On a resumed build ``header`` must describe the same content as the first time, and the first prior stays.
        Returns the header with its fingerprint. Raises UserError naming the fields that differ.
        """
        header = header.with_fingerprint()
        if self.begun:
            first = self.header()
            if first.fingerprint != header.fingerprint:
                raise UserError(
                    f"{self.path} holds an unfinished build of something else: "
                    f"{describe_difference(first.content_identity(), header.content_identity())}; "
                    "go on with the old settings, start afresh with --restart, or choose another output"
                )
            header, prior = first, self._load_prior(first)
        else:
            with writing_to(self.path):
                if prior is not None:
                    data = prior.to_bytes()
                    header = header.model_copy(
                        update={"tail_prior": TailPriorEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
                    )
                    write_durably(self.path / PRIOR, data, scratch=self.build_dir)
                write_durably(self._header_file, header.model_dump_json(indent=2))
        self._codec = Codec(header.store, prior)
        # What comes from another cache has been rounded before.
        self._mass_slack = 1e-3 + (2 * header.store.rounding if header.derived_from else 0)
        return header

    @property
    def begun(self) -> bool:
        """Whether an earlier run has fixed what this cache is."""
        return self._header_file.exists()

    def _load_prior(self, header: Header) -> TailPrior | None:
        if header.tail_prior is None:
            return None
        data = (self.path / PRIOR).read_bytes() if (self.path / PRIOR).exists() else b""
        if hashlib.sha256(data).hexdigest() != header.tail_prior.sha256:
            raise DamagedCacheError(f"{self.path / PRIOR} is not the file the build wrote; start afresh with --restart")
        return TailPrior.from_bytes(data, header.store.vocab_size, str(self.path / PRIOR))

    @property
    def _header_file(self) -> Path:
        return self.build_dir / "header.json"

    def header(self) -> Header:
        """The header that ``begin`` fixed, now or in an earlier run."""
        return load_state(Header, self._header_file)

    @contextmanager
    def shard(self, index: int, *, sequences_per_batch: Callable[[float], int] | None = None) -> Iterator[ShardWriter]:
        """Writes shard ``index`` of a cache that has begun: committed when the block ends, gone if it raises.

        ``sequences_per_batch``: from entries (of heads and draws) per position to rows of each record batch, for a caller
        who knows how long sequences will be; by default as many as the first BATCH_BYTES hold.
        """
        if self._codec is None:
            raise ValueError("begin comes before the first shard")
        if index in self.committed:
            raise ValueError(f"shard {index} is committed already")
        name = f"shard-{index:05d}"
        temporary = self.build_dir / f"{name}.arrow.tmp"
        with writing_to(self.path):
            writer = ShardWriter(
                temporary, self._codec, self.compression_level, sequences_per_batch, mass_slack=self._mass_slack
            )
            try:
                yield writer
                totals = writer.close()
            except BaseException:
                writer.abort()
                raise
            final = self.path / "data" / f"{name}.arrow"
            os.replace(temporary, final)
            sync(final.parent)
            entry = ShardEntry(path=f"data/{name}.arrow", **totals)
            write_durably(self.build_dir / "commits" / f"{name}.json", entry.model_dump_json(indent=2))
        self.committed[index] = entry

    def entries(self) -> tuple[ShardEntry, ...]:
        """The committed shards in order."""
        return tuple(self.committed[index] for index in sorted(self.committed))

    def finish(self, header: Header, shards: int, *, audit: AuditSummary | None = None) -> Manifest:
        """Writes the manifest of a build of ``shards`` shards, which makes the cache complete, and cleans up."""
        if sorted(self.committed) != list(range(shards)):
            raise ValueError(f"{len(self.committed)} of {shards} shards are committed")
        manifest = Manifest.complete(header, self.entries(), datetime.now(UTC).isoformat(timespec="seconds"), audit)
        with writing_to(self.path):
            write_durably(self.path / "README.md", card.dataset_card(manifest), scratch=self.build_dir)
            write_durably(self.path / MANIFEST, manifest.to_json(), scratch=self.build_dir)
            shutil.rmtree(self.build_dir, ignore_errors=True)
        return manifest


class ShardWriter:
    """One Arrow file in the making. Every record batch but the last has the same number of sequences."""

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
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=compression_level))
        self._arrow = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), codec.schema, options=options)
        self._content = ContentHash()
        self._waiting: list[CachedSequence] = []
        self._choose_rows = sequences_per_batch
        self._per_batch: int | None = None
        self._entries = self._draws = 0
        self.sequences = self.tokens = self.positions = 0
        self._head_mass_sum = self._target_nll_sum = 0.0

    def append(self, sequence: CachedSequence) -> None:
        """Adds one sequence. Raises UserError if it is not one (see ``validation.validate``)."""
        validate(sequence, self.codec.store, mass_slack=self._mass_slack)
        self._waiting.append(sequence)
        self._entries += int((sequence.ids >= 0).sum())
        self._draws += 0 if sequence.samples is None else int((sequence.samples.ids >= 0).sum())
        self.sequences += 1
        self.tokens += len(sequence)
        self.positions += len(sequence.positions)
        self._head_mass_sum -= float(np.expm1(sequence.tail_logprob.astype(np.float64)).sum())
        self._target_nll_sum -= float(sequence.target_logprob.sum(dtype=np.float64))
        if self._per_batch is None and self._size() >= BATCH_BYTES:
            self._fix_rows()
        self._flush_full()

    def _size(self) -> int:
        return uncompressed_bytes(self.tokens, self.positions, self._entries + self._draws)

    def _fix_rows(self) -> None:
        rows = len(self._waiting)
        if self._choose_rows is not None:
            rows = self._choose_rows((self._entries + self._draws) / max(1, self.positions))
        self._per_batch = max(1, rows)

    def _flush_full(self) -> None:
        while self._per_batch is not None and len(self._waiting) >= self._per_batch:
            self._flush(self._per_batch)

    def _flush(self, rows: int) -> None:
        batch = self.codec.encode(self._waiting[:rows])
        self._content.update(batch)
        self._arrow.write_batch(batch)
        del self._waiting[:rows]

    def close(self) -> dict[str, object]:
        """Completes the file on disk (fsync) and returns the fields of its ShardEntry, but for the path."""
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
    """A file that hashes what passes through, so that no shard is read back for its sha256."""

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


def remove_cache(path: Path) -> None:
    """Removes a cache, finished or not, and nothing else that lies in its folder.

    Raises CacheInUseError while another process writes it, UserError where it cannot be removed.
    """
    if not path.exists():
        return
    if not (path / BUILD_DIR).exists() and not _is_cache(path):
        refuse_other_files(path)
    with writing_to(path), _locked(path):
        # The manifest goes first: half a cache must never be taken for a whole one.
        for name in (MANIFEST, "README.md", PRIOR):
            (path / name).unlink(missing_ok=True)
        for shard in _shard_files(path):
            shard.unlink()
        with suppress(OSError):
            (path / "data").rmdir()
        shutil.rmtree(path / BUILD_DIR, ignore_errors=True)


def refuse_other_files(path: Path) -> None:
    """Raises UserError where something that is not a cache has files of a cache's names, which a build would replace."""
    taken = [name for name in ("data", "README.md", PRIOR, MANIFEST) if (path / name).exists()]
    if taken:
        raise UserError(
            f"{path} is no cache, but has {' and '.join(taken)} of its own, where a cache puts its files; "
            "choose an empty or new folder as output"
        )


def _is_cache(path: Path) -> bool:
    try:
        return bool(json.loads((path / MANIFEST).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _shard_files(path: Path) -> list[Path]:
    """The files in ``data/`` that a writer may have put there."""
    return [file for file in (path / "data").glob("shard-*.arrow") if _SHARD.fullmatch(file.name)]


def load_state(model: type[State], file: Path) -> State:
    """Reads a file of ``.build``. Raises UserError where it is not what this version writes."""
    try:
        return model.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} was not written by this version of logitcask; start afresh with --restart") from error


def uncompressed_bytes(tokens: int, positions: int, entries: int) -> int:
    """About what sequences take in a record batch: ``tokens`` tokens, ``positions`` kept, ``entries`` of heads and draws."""
    return 5 * tokens + 20 * positions + 3 * entries


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the writer's lock on the cache at ``path``. Raises CacheInUseError at once if another process has it."""
    (path / BUILD_DIR).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / BUILD_DIR / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise CacheInUseError(
            f"{path} is being written by another process; wait for it, or choose another output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_durably(file: Path, content: str | bytes, *, scratch: Path | None = None) -> None:
    """Temporary file, fsync, rename, fsync of the folder: afterwards ``file`` is there whole, or as it was before."""
    temporary = (scratch or file.parent) / f"{file.name}.tmp"
    with open(temporary, "wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a power cut (Windows cannot open folders: no-op there)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into one line that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}; make room or permit it, then run the same command again: "
            "finished shards are kept"
        ) from error
