"""The local cache of remote shards: verified downloads, limited in bytes, shared by processes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import fsspec
import platformdirs

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import CacheFile
from logitcask.cache_format.storage.files import download, has_content, map_file, room_for

DEFAULT_CACHE_BYTES = 32 << 30


class ShardCache:
    """Shards of remote caches on the local disk, named by their sha256, ``max_bytes`` in all.

    folder:    by default ``$LOGITCASK_CACHE``, or ``logitcask`` in the user's cache folder.
    max_bytes: by default ``$LOGITCASK_CACHE_BYTES``, or 32 GiB.

    Any number of processes can share a folder. A shard that several of them need is fetched once.
    The limit holds for all processes together and includes shards still being fetched; other files
    do not count. The least recently used shard is removed first. On POSIX, a process that has a
    removed shard mapped can still read it. An object can be pickled and forked. Raises UserError
    for a folder that cannot be written.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        self.folder = shard_cache_folder() if folder is None else Path(folder)
        self.max_bytes = _bytes_from_environment() if max_bytes is None else max_bytes
        self._verified: set[str] = set()
        self._shards, self._locks = self.folder / "shards", self.folder / "locks"
        with room_for(self._shards):
            self._shards.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
            with self._lock("room"):
                self._remove_leftovers()

    def get(self, filesystem: fsspec.AbstractFileSystem, path: str, size: int, sha256: str) -> Path:
        """The local copy of the remote shard at ``path``, fetched if there is none.

        Its sha256 is checked during the download. For a copy fetched by an earlier process, it is
        checked at this object's first call. Another process may remove the copy at any time;
        ``memory_map`` handles that. Raises what ``download`` raises, and UserError for a shard
        above the limit, or if no room can be made for it.
        """
        file, target = CacheFile(path, size, sha256), self._shards / f"{sha256}.arrow"
        if not self._is_here(file, target):
            with self._lock(sha256[:2]):
                if not self._is_here(file, target):  # another process may have fetched it since
                    self._fetch(filesystem, file, target)
                    self._verified.add(sha256)
        return target

    def memory_map(
        self, filesystem: fsspec.AbstractFileSystem, path: str, size: int, sha256: str
    ) -> mmap.mmap:
        """The shard, mapped for reading. It stays readable if its file is removed. Raises what
        ``get`` raises.
        """
        while True:
            with suppress(FileNotFoundError):  # removed by another process since ``get`` returned
                return map_file(self.get(filesystem, path, size, sha256))

    def _is_here(self, file: CacheFile, target: Path) -> bool:
        if file.sha256 not in self._verified and not has_content(target, file):
            return False
        try:
            with suppress(PermissionError):  # a folder that another user fills
                os.utime(target)
        except FileNotFoundError:
            return False
        self._verified.add(file.sha256)
        return True

    def _fetch(self, filesystem: fsspec.AbstractFileSystem, file: CacheFile, target: Path) -> None:
        if file.bytes > self.max_bytes:
            raise UserError(
                f"{filesystem.unstrip_protocol(file.path)} has {file.bytes:,} bytes, the local cache of shards may have "
                f"{self.max_bytes:,}; set LOGITCASK_CACHE_BYTES to more, or use `teacher-cache pull`"
            )
        part = target.with_suffix(".part")
        try:
            with room_for(part):
                while not self._reserve(part, file.bytes):
                    time.sleep(0.1)  # other processes are fetching shards
            download(filesystem, file.path, file, part)
            with room_for(part), self._lock("room"):
                os.replace(part, target)
        except BaseException:
            with self._lock("room"):
                part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: Path, size: int) -> bool:
        """Removes old shards until ``size`` bytes are free, and reserves them: ``part`` gets that
        size.

        Returns False if shards that others are fetching take the room: the caller then waits. The
        caller holds the shard's lock.
        """
        with self._lock("room"):
            self._remove_leftovers(ours=part.name[:2])
            found = [
                (each.stat(), each)
                for each in self._shards.iterdir()
                if each.suffix in (".arrow", ".part")
            ]
            total = sum(status.st_size for status, _ in found) + size
            for status, each in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
                if total > self.max_bytes and each.suffix == ".arrow":
                    with suppress(PermissionError):  # Windows keeps a file that is mapped
                        each.unlink()
                        total -= status.st_size
            if total > self.max_bytes:
                if any(each.suffix == ".part" for _, each in found):
                    return False
                raise UserError(
                    f"{self.folder} has no room for {size:,} bytes: of the {self.max_bytes:,} it may have, "
                    f"{total - size:,} are taken by shards that cannot be removed; permit it, end what reads them, or set "
                    "LOGITCASK_CACHE_BYTES to more"
                )
            with open(part, "wb") as handle:
                handle.truncate(size)
        return True

    def _remove_leftovers(self, ours: str | None = None) -> None:
        """Removes unfinished downloads of killed processes: parts whose lock is free.

        ``ours``: the name of the lock that the caller holds. A process cannot take a lock twice.
        """
        for part in self._shards.glob("*.part"):
            if part.name[:2] == ours:
                part.unlink(missing_ok=True)
                continue
            with suppress(filelock.Timeout), self._lock(part.name[:2], timeout=0):
                part.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str, timeout: float = -1) -> Iterator[None]:
        # Lock files are never removed, so shards share 256 of them, by the start of their hash.
        lock = filelock.FileLock(self._locks / f"{name}.lock")
        with room_for(self._locks / name):
            lock.acquire(timeout=timeout)
        try:
            yield
        finally:
            lock.release()


def shard_cache_folder() -> Path:
    """``$LOGITCASK_CACHE``, or ``logitcask`` in the user's cache folder.

    Raises RuntimeError for a user without a home folder.
    """
    # Without the two folders that Windows paths have by convention, for the author and the cache.
    return Path(
        os.environ.get("LOGITCASK_CACHE")
        or platformdirs.user_cache_dir("logitcask", appauthor=False, opinion=False)
    )


def _bytes_from_environment() -> int:
    value = os.environ.get("LOGITCASK_CACHE_BYTES")
    if not value:
        return DEFAULT_CACHE_BYTES
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"LOGITCASK_CACHE_BYTES is {value!r}; it has to be a number of bytes"
        ) from None
