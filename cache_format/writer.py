"""Writes a cache so that a crash at any moment leaves it incomplete or right (SPEC.md section 7).

``CacheWriter`` owns the folder, the lock and the manifest; ``CacheWorker`` writes and commits
shards, in the same process or in others. Neither knows a teacher.

Unfinished files are in a folder of the run that writes them,
``.build/runs/<run>/<shard>.<attempt>/``. They leave it only by a rename. Removing such a folder
stops its writer, on any machine and at any later time: the writer finds no file to rename and no
folder for new files. A new run therefore first removes the folders of all earlier runs, and a new
attempt at a shard those of all earlier attempts. Only then do they read the commit records.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

import filelock

from logitcask.cache_format import card
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import RESTART, load_state, sync, write_durably, writing_to
from logitcask.cache_format.errors import CacheInUseError, DamagedCacheError, UserError
from logitcask.cache_format.layout import (
    BUILD_DIR,
    CARD,
    GROW_DIR,
    MANIFEST,
    PREVIEW,
    PRIOR,
    SIGNATURE,
)
from logitcask.cache_format.manifest import (
    AuditSummary,
    Header,
    Manifest,
    ShardEntry,
    TailPriorEntry,
)
from logitcask.cache_format.schema import FORMAT
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.shards.shard_writer import ShardWriter

_SHARD = re.compile(r"shard-\d{5,}\.arrow")
# Seconds after which a folder that cannot be removed counts as in use by another process.
_REVOKE_TIMEOUT = 60.0


class CacheWorker:
    """Writes shards of a build that has begun, beside other workers. A ``CacheWriter`` in this or
    another process holds the lock.

    path: the cache, on a file system that all workers share.
    run:  the ``CacheWriter.run`` of the process with the lock.
    afresh: the advice in messages if the build cannot be resumed.
    sent_away: whether the process with the lock sends committed shards to a store and removes them
          from ``path``.

    Call ``join`` first, then ``shard`` for every shard of this worker. The methods raise
    CacheInUseError if the run is over, or if the shard has been given to another worker.
    """

    def __init__(
        self,
        path: str | Path,
        run: str,
        *,
        compression_level: int = 1,
        afresh: str = RESTART,
        sent_away: bool = False,
    ) -> None:
        self.path = Path(path)
        self.build_dir = self.path / BUILD_DIR
        self.run = run
        self.afresh = afresh
        self.compression_level = compression_level
        self.sent_away = sent_away
        self.committed: dict[int, ShardEntry] = {}
        self._scratch: Path | None = None
        self._codec: Codec | None = None
        self._mass_slack = 0.0

    @property
    def _run_dir(self) -> Path:
        return self.build_dir / "runs" / self.run

    @property
    def _header_file(self) -> Path:
        return self.build_dir / "header.json"

    @property
    def begun(self) -> bool:
        """Whether ``begin`` has fixed the header, now or in an earlier run."""
        return self._header_file.exists()

    def header(self) -> Header:
        """The header that ``begin`` fixed, now or in an earlier run."""
        return load_state(Header, self._header_file, self.afresh)

    def join(self, header: Header) -> Header:
        """Joins a build that has begun, if ``header`` has the same content; returns its header.

        Raises UserError naming the fields that differ.
        """
        header, first = header.with_fingerprint(), self.header()
        if first.fingerprint != header.fingerprint:
            raise UserError(
                f"{self.path} holds an unfinished build of something else: "
                f"{describe_difference(first.content_identity(), header.content_identity())}; "
                f"go on with the old settings, {self.afresh}, or choose another output"
            )
        self._take_up(first, self._load_prior(first))
        return first

    def _take_up(self, header: Header, prior: TailPrior | None) -> None:
        self._codec = Codec(header.store, prior)
        # Logprobs from another cache have been rounded before.
        self._mass_slack = 1e-3 + (2 * header.store.rounding if header.derived_from else 0)

    def _load_prior(self, header: Header) -> TailPrior | None:
        if header.tail_prior is None:
            return None
        data = (self.path / PRIOR).read_bytes() if (self.path / PRIOR).exists() else b""
        if hashlib.sha256(data).hexdigest() != header.tail_prior.sha256:
            raise DamagedCacheError(
                f"{self.path / PRIOR} is not the file the build wrote; {self.afresh}"
            )
        return TailPrior.from_bytes(data, header.store.vocab_size, str(self.path / PRIOR))

    def check(self) -> None:
        """Raises CacheInUseError if the shard that is being written can no longer be committed."""
        if not (self._scratch or self._run_dir).is_dir():
            raise CacheInUseError(
                f"{self.path} is being written by another process now; this one stops"
            )

    def adopt(self, index: int) -> bool:
        """Adds shard ``index`` to ``committed`` if a worker has committed it, and returns whether.

        Raises DamagedCacheError if the shard contradicts its commit record.
        """
        record = self._record(index)
        if not record.exists():
            return False
        entry = load_state(ShardEntry, record, self.afresh)
        shard = self.path / entry.path
        gone = self.sent_away and not shard.exists()
        if not gone and (not shard.exists() or shard.stat().st_size != entry.bytes):
            raise DamagedCacheError(
                f"{shard} is not the file its commit record describes; remove {self.path}"
            )
        self.committed[index] = entry
        return True

    def _record(self, index: int) -> Path:
        return self.build_dir / "commits" / f"{_name(index)}.json"

    @contextmanager
    def shard(
        self, index: int, *, sequences_per_batch: Callable[[float], int] | None = None
    ) -> Iterator[ShardWriter]:
        """Writes shard ``index`` of a cache that has begun. It is committed when the block ends,
        and removed if the block raises.

        ``sequences_per_batch``: a function from entries (of heads and draws) per position to rows
        per record batch, for a caller who knows the lengths of the sequences. By default a batch
        has as many rows as fit into the first BATCH_BYTES.
        """
        if self._codec is None:
            raise ValueError("begin or join comes before the first shard")
        if index in self.committed:
            raise ValueError(f"shard {index} is committed already")
        with writing_to(self.path), self._attempt(index) as scratch:
            temporary = scratch / f"{_name(index)}.arrow.tmp"
            writer = ShardWriter(
                temporary,
                self._codec,
                self.compression_level,
                sequences_per_batch,
                mass_slack=self._mass_slack,
            )
            try:
                yield writer
                totals = writer.close()
            except BaseException:
                writer.abort()
                raise
            # An earlier attempt may have committed just before it was stopped. Then its shard
            # stays.
            if not self.adopt(index):
                final = self.path / "data" / f"{_name(index)}.arrow"
                os.replace(temporary, final)
                sync(final.parent)
                entry = ShardEntry(path=f"data/{_name(index)}.arrow", **totals)
                write_durably(self._record(index), entry.model_dump_json(indent=2), scratch=scratch)
                self._commit(index, entry)

    def _commit(self, index: int, entry: ShardEntry) -> None:
        """Called when a shard and its record are on disk."""
        self.committed[index] = entry

    @contextmanager
    def _attempt(self, index: int) -> Iterator[Path]:
        """A folder for this attempt at a shard, removed at the end; ends all earlier attempts."""
        scratch = self._run_dir / f"{_name(index)}.{uuid.uuid4().hex}"
        try:
            # Of two simultaneous attempts, the one that makes its folder later sees the other's.
            scratch.mkdir()
            self._scratch = scratch
            for other in self._run_dir.glob(f"{_name(index)}.*"):
                if other != scratch:
                    _revoke(other)
            yield scratch
        except FileNotFoundError:
            self.check()
            raise
        finally:
            self._scratch = None
            shutil.rmtree(scratch, ignore_errors=True)


class CacheWriter(CacheWorker):
    """The exclusive writer of the cache in ``path``; use it as a context manager.

    Opening takes the lock (CacheInUseError if another process holds it), stops the workers of
    earlier runs, removes the remains of a crash, and finds the committed shards. ``begin`` fixes
    the header of the cache, ``shard`` writes one shard, ``finish`` makes the cache complete. Raises
    UserError for a folder that cannot be written, and for a finished cache.
    """

    def __init__(
        self, path: str | Path, *, compression_level: int = 1, afresh: str = RESTART
    ) -> None:
        super().__init__(path, uuid.uuid4().hex, compression_level=compression_level, afresh=afresh)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._refuse_finished()
        if not (self.build_dir).exists():
            refuse_other_files(self.path)
        with writing_to(self.path), ExitStack() as opening:
            opening.enter_context(locked(self.path))
            self._refuse_finished()  # another process may have finished it since
            _revoke(self.build_dir / "runs")
            (self.build_dir / "commits").mkdir(exist_ok=True)
            (self.path / "data").mkdir(exist_ok=True)
            self._run_dir.mkdir(parents=True)
            opening.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
            self._recover()
            self._exit = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _refuse_finished(self) -> None:
        if (self.path / MANIFEST).exists():
            raise UserError(
                f"{self.path} already holds a finished cache; remove it or choose another output"
            )

    def _recover(self) -> None:
        """Reads the commit records and removes every file that belongs to none of them."""
        for record in sorted((self.build_dir / "commits").glob("*.json")):
            self.adopt(int(record.stem.removeprefix("shard-")))
        known = {self.path / entry.path for entry in self.committed.values()}
        for file in shard_files(self.path):
            if file not in known:
                file.unlink()
        for file in self.build_dir.rglob("*.tmp"):
            file.unlink()

    def begin(self, header: Header, prior: TailPrior | None = None) -> Header:
        """Fixes the header and the prior that ranks ids. Call it before the first shard.

        In a resumed build ``header`` must describe the same content as the first time, and the
        first prior is used. Returns the header with its fingerprint. Raises UserError naming the
        fields that differ.
        """
        if self.begun:
            return self.join(header)
        header = header.with_fingerprint()
        with writing_to(self.path):
            if prior is not None:
                data = prior.to_bytes()
                header = header.model_copy(
                    update={
                        "tail_prior": TailPriorEntry(
                            bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
                        )
                    }
                )
                write_durably(self.path / PRIOR, data, scratch=self.build_dir)
            write_durably(self._header_file, header.model_dump_json(indent=2))
        self._take_up(header, prior)
        return header

    def entries(self) -> tuple[ShardEntry, ...]:
        """The committed shards in order."""
        return tuple(self.committed[index] for index in sorted(self.committed))

    def finish(self, header: Header, shards: int, *, audit: AuditSummary | None = None) -> Manifest:
        """Writes the manifest of ``shards`` shards, which completes the cache, and cleans up."""
        manifest = self._complete(header, shards, audit)
        with writing_to(self.path):
            _revoke(self.build_dir / "runs")
            write_durably(self.path / CARD, card.dataset_card(manifest), scratch=self.build_dir)
            write_durably(self.path / MANIFEST, manifest.to_json(), scratch=self.build_dir)
            shutil.rmtree(self.build_dir, ignore_errors=True)
        return manifest

    def _complete(self, header: Header, shards: int, audit: AuditSummary | None) -> Manifest:
        if sorted(self.committed) != list(range(shards)):
            raise ValueError(f"{len(self.committed)} of {shards} shards are committed")
        return Manifest.complete(
            header, self.entries(), datetime.now(UTC).isoformat(timespec="seconds"), audit
        )


def remove_cache(path: Path) -> None:
    """Removes a cache, finished or not, and no other files in its folder.

    Raises CacheInUseError while another process writes it, UserError if it cannot be removed.
    """
    if not path.exists():
        return
    if not (path / BUILD_DIR).exists() and not _is_cache(path):
        refuse_other_files(path)
    growing = (path / GROW_DIR).exists()
    with writing_to(path), locked(path), locked(path, GROW_DIR) if growing else nullcontext():
        _revoke(path / BUILD_DIR / "runs")
        # The manifest is removed first, so that no reader takes the rest for a whole cache.
        for name in (MANIFEST, SIGNATURE, CARD, PREVIEW, PRIOR):
            (path / name).unlink(missing_ok=True)
        for shard in shard_files(path):
            shard.unlink()
        for folder in ("data", PurePath(PREVIEW).parent):
            with suppress(OSError):
                (path / folder).rmdir()
        for folder in (GROW_DIR, BUILD_DIR):
            shutil.rmtree(path / folder, ignore_errors=True)


def refuse_other_files(path: Path) -> None:
    """Raises UserError if ``path`` is not a cache but has files with the names of cache files: a
    build would replace them.
    """
    taken = [name for name in ("data", CARD, PRIOR, MANIFEST) if (path / name).exists()]
    if taken:
        raise UserError(
            f"{path} is no cache, but has {' and '.join(taken)} of its own, where a cache puts its files; "
            "choose an empty or new folder as output"
        )


def may_be_cache(path: Path) -> bool:
    """Whether a manifest there is a cache's; a damaged one counts if the cache's card is there."""
    return _is_cache(path) or ((path / MANIFEST).exists() and card.is_card(path / CARD))


def _is_cache(path: Path) -> bool:
    try:
        return bool(json.loads((path / MANIFEST).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _name(index: int) -> str:
    return f"shard-{index:05d}"


def _revoke(folder: Path) -> None:
    """Removes a folder, so that no file in it can be committed any more.

    Raises CacheInUseError if it cannot be removed because a process keeps files in it open (on
    network file systems and on Windows).
    """
    give_up = time.monotonic() + _REVOKE_TIMEOUT
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        if time.monotonic() > give_up:
            raise CacheInUseError(
                f"{folder} cannot be removed: a process of an earlier run still writes there; "
                "end it, then run the same command again"
            )
        time.sleep(0.1)


def shard_files(path: Path) -> list[Path]:
    """The files in ``data/`` that a writer may have put there."""
    return [file for file in (path / "data").glob("shard-*.arrow") if _SHARD.fullmatch(file.name)]


@contextmanager
def locked(path: Path, state: str = BUILD_DIR) -> Iterator[None]:
    """Holds the writer's lock on the cache at ``path``, in its folder ``state``. Raises
    CacheInUseError if another process has it, without waiting.
    """
    (path / state).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / state / "lock")
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
