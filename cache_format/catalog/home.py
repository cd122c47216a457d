"""The home of a user's caches: an entry for each finished cache, wherever it is on disk.

An entry is a small JSON file named after the path of the cache. The time of the file's last change
is the time of the cache's last use. The cache itself knows nothing of the home: it may be moved or
removed by hand, which the next listing shows.

    config.yaml     the remotes
    caches/         entries
    uses/           signs of life of processes that read a cache
    claims/         of builders (``logitcask.cache_format.catalog.claims``)
    remotes/        the latest listing of each remote
    temporary/      caches on their way to a store
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError

from logitcask.cache_format.catalog.presence import alive, marked
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.manifest import Manifest, sha256_of_json
from logitcask.cache_format.storage.files import is_local, open_filesystem
from logitcask.cache_format.storage.shard_cache import shard_cache_folder

log = logging.getLogger(__name__)

VERSION = 1

_MOST_BYTES = 1 << 16
"""Of an entry, which has one or two thousand."""

_MOST_LETTERS = 1000
"""Of a name in an entry: a mixture of many files has a long one."""


class Entry(BaseModel):
    """The catalogue's knowledge of one cache.

    where:   absolute path, or URL.
    request: sha256 of the manifest's ``config``.
    stamp:   size and time of change of the manifest file, or a store's facts about it.
    removal: whether a removal has begun.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    version: int = VERSION
    where: str
    fingerprint: str
    content_sha256: str
    request: str
    teacher: str
    engine: str
    dtype: str
    tokenizer: str
    tokenizer_sha256: str
    data: str
    data_sha256: str
    derived: bool
    sequences: int
    tokens: int
    bytes: int
    bytes_per_token: float
    created_at: str
    stamp: str
    removal: bool = False

    @classmethod
    def of(cls, where: str, manifest: Manifest, stamp: str) -> Entry:
        totals, teacher = manifest.statistics, manifest.teacher
        return cls(
            where=where,
            fingerprint=manifest.fingerprint,
            content_sha256=manifest.content_sha256,
            request=sha256_of_json(manifest.config),
            teacher=teacher.model[:_MOST_LETTERS],
            engine=teacher.engine,
            dtype=teacher.dtype,
            tokenizer=manifest.tokenizer.name[:_MOST_LETTERS],
            tokenizer_sha256=manifest.tokenizer.sha256,
            data=f"{manifest.data.source}, {manifest.data.split}"[:_MOST_LETTERS],
            data_sha256=manifest.data.sha256,
            derived=manifest.derived_from is not None,
            sequences=totals.sequences,
            tokens=totals.tokens,
            bytes=totals.bytes,
            bytes_per_token=totals.bytes_per_token,
            created_at=manifest.created_at,
            stamp=stamp,
        )

    @property
    def name(self) -> str:
        """The name of the entry's file, without its suffix."""
        return name_of(self.where)


class Home:
    """The home in ``folder``, which any number of processes and machines may share.

    Only ``begin_removal`` and ``forget`` raise errors of the file system. All other methods leave
    undone what the file system refuses: the catalogue is an aid, and no build or training fails
    because of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries_folder = folder / "caches"
        self.claims_folder = folder / "claims"
        self.uses_folder = folder / "uses"

    def register(self, where: str | Path, manifest: Manifest) -> None:
        """Writes the entry of the finished cache at a local folder; its last use is now. A folder
        whose name is no text, which JSON cannot hold, has no entry.
        """
        path = place_of(where)
        if path is not None:
            with suppress(OSError, ValueError):
                self._write(Entry.of(path, manifest, stamp_of(path)))

    def register_at(self, where: str | Path) -> None:
        """Notes a use of the cache at ``where``, and registers it if it has no entry."""
        path = place_of(where)
        if path is None or self.note_use(path):
            return
        with suppress(OSError, ValueError):
            text = (Path(path) / MANIFEST).read_bytes()
            self.register(path, Manifest.from_json(text, f"{path}/{MANIFEST}"))

    def note_use(self, where: str | Path) -> bool:
        """Makes now the last use of the cache at ``where``; returns whether it has an entry."""
        path = place_of(where)
        if path is None:
            return False
        try:
            now = time.time_ns()  # the file system's own clock may tick in milliseconds only
            os.utime(self._file(name_of(path)), ns=(now, now))
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        return True

    def in_use(self, where: str | Path) -> AbstractContextManager[None]:
        """A context in which no garbage collection removes the cache at ``where``."""
        path = place_of(where)
        return marked(self.uses_folder, name_of(str(where) if path is None else path))

    def used(self) -> set[str]:
        """The names of entries whose caches are in use."""
        return alive(self.uses_folder)

    def entries(self) -> Iterator[tuple[Entry, float]]:
        """Every entry with its last use, in seconds since 1970. Unreadable ones are left out."""
        with suppress(OSError), os.scandir(self.entries_folder) as found:
            for file in found:
                if file.name.endswith(".json") and (read := _read(file.path)) is not None:
                    yield read

    def begin_removal(self, entry: Entry) -> bool:
        """Records that the cache is being removed, unless it is in use. Returns whether it is."""
        with self._lock(entry.name):
            if entry.name in self.used():
                return False
            used = self._file(entry.name).stat().st_mtime
            self._write(entry.model_copy(update={"removal": True}), used)
        return True

    @contextmanager
    def reading(self, entry: Entry) -> Iterator[bool]:
        """A context in which the cache is in use. Yields whether it is there."""
        local = place_of(entry.where)
        with self.in_use(entry.where):
            if local is None:
                yield True  # a store, from which nothing here removes
                return
            with self._lock(entry.name):
                found = _read(str(self._file(entry.name)))
            removed = found is not None and found[0].removal
            yield not removed and os.path.exists(f"{local}/{MANIFEST}")

    def update(self, entry: Entry, last_use: float | None) -> None:
        """Writes a changed entry. The last use is now if ``last_use`` is None."""
        with suppress(OSError):
            self._write(entry, last_use)

    def forget(self, entry: Entry) -> None:
        """Removes the entry, and no cache."""
        self._file(entry.name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.entries_folder / f"{name}.json"

    def _write(self, entry: Entry, used: float | None = None) -> None:
        self.entries_folder.mkdir(parents=True, exist_ok=True)
        draft = self.entries_folder / f"{entry.name}.{uuid.uuid4().hex}.tmp"
        try:
            with open(draft, "w", encoding="utf-8") as file:
                file.write(entry.model_dump_json())
                file.flush()
                os.fsync(file.fileno())
            if used is not None:
                os.utime(draft, (used, used))
            os.replace(draft, self._file(entry.name))
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Excludes other processes from one entry; in a home that takes no files, nobody."""
        lock = filelock.FileLock(self.folder / "locks" / f"{name[:2]}.lock")
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError):
            yield
            return
        try:
            yield
        finally:
            lock.release()


def home() -> Home | None:
    """``$LOGITCASK_HOME``, or ``home`` in the user's cache folder. None for a user without one."""
    try:
        folder = os.environ.get("LOGITCASK_HOME") or shard_cache_folder() / "home"
        return Home(Path(folder).expanduser().absolute())
    except RuntimeError:
        return None


def note_use(cache: str) -> None:
    """Makes now the last use of a local cache, if it has an entry. It never fails."""
    here = home()
    if here is not None and "://" not in cache:
        here.note_use(cache)


def register(where: str | Path, manifest: Manifest) -> None:
    """Registers a new local cache in the home, if there is one. It never fails."""
    here = home()
    if here is not None:
        here.register(where, manifest)


@contextmanager
def using(caches: Iterable[str | Path]) -> Iterator[None]:
    """A context in which a training or a server reads ``caches``: they are in use, and this is
    their last use.

    It never fails, and costs some small files.
    """
    here = home()
    with ExitStack() as stack:
        if here is not None:
            for cache in caches:
                stack.enter_context(here.in_use(cache))
                here.register_at(cache)
        yield


def name_of(where: str) -> str:
    """The name of the entry of the cache at ``where``."""
    return hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def place_of(where: str | Path) -> str | None:
    """The absolute path of a local folder without links; None for a URL in a store."""
    text = str(where)
    if "://" not in text:
        return os.path.realpath(text)
    try:
        filesystem, root = open_filesystem(text)
    except Exception:  # a store that cannot be opened is none of this machine's folders
        return None
    return os.path.realpath(root) if is_local(filesystem) else None


def stamp_of(where: str) -> str:
    """The size and the time of change of a local cache's manifest. Raises OSError."""
    status = os.stat(f"{where}/{MANIFEST}")
    return f"{status.st_size} {status.st_mtime_ns}"


def is_there(entry: Entry) -> bool:
    """Whether a local cache is where its entry says, unchanged."""
    try:
        return stamp_of(entry.where) == entry.stamp
    except OSError:
        return False


def _read(file: str) -> tuple[Entry, float] | None:
    """An entry and its last use. A listing reads thousands: this is the fastest way."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            content, status = os.read(descriptor, _MOST_BYTES), os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return Entry.model_validate_json(content), status.st_mtime
    except (OSError, ValidationError):
        return None


def load_json(file: Path) -> Any:
    """The content of a JSON file; None if there is none or it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
