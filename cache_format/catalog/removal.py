"""Removal of caches from the disk: by name, or the longest unused ones until some space is free.

A removal is recorded in the entry first, so that an interrupted one is completed by the next. A
cache in use is never removed: one that a training or a build reads, or that a process writes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from logitcask.cache_format.catalog.home import Entry, Home
from logitcask.cache_format.catalog.listing import Listed
from logitcask.cache_format.errors import CacheInUseError, UserError
from logitcask.cache_format.layout import BUILD_DIR, MANIFEST, PRIOR
from logitcask.cache_format.writer import remove_cache, shard_files

log = logging.getLogger(__name__)

_OLD = 86_400.0
"""Age in seconds at which files that interrupted processes have left are removed."""


@dataclass(frozen=True)
class Garbage:
    """The caches to remove, the longest unused first.

    freed: bytes of shards that their removal frees. Shards that other caches share are not freed.
    total: bytes of the shards of all caches of the home now, shared ones counted once.
    """

    lines: list[Listed]
    freed: int
    total: int


def garbage(
    lines: list[Listed], *, max_bytes: int | None = None, unused_for: float | None = None
) -> Garbage:
    """Chooses what to remove: all that was not used for ``unused_for`` seconds, then the longest
    unused caches until all take at most ``max_bytes``.
    """
    here = [line for line in lines if not line.gone or line.entry.removal]
    files = {line.entry.name: _files(Path(line.entry.where)) for line in here}
    links = {inode: (size, count) for each in files.values() for inode, size, count in each}
    total = sum(size for size, _ in links.values())
    removed = Counter[tuple[int, int]]()
    freed, now = 0, time.time()
    chosen: list[Listed] = []
    for line in sorted(here, key=lambda each: each.last_use or 0):
        old = unused_for is not None and now - (line.last_use or 0) > unused_for
        large = max_bytes is not None and total - freed > max_bytes
        if line.in_use or not (old or large or line.entry.removal):
            continue
        chosen.append(line)
        for inode, size, count in files[line.entry.name]:
            removed[inode] += 1
            freed += size if removed[inode] == count else 0
    # A cache whose shards all stay, because others share them, is not removed for its size.
    kept = [
        line
        for line in chosen
        if line.entry.removal
        or (unused_for is not None and now - (line.last_use or 0) > unused_for)
        or any(removed[inode] == count for inode, _, count in files[line.entry.name])
    ]
    return Garbage(kept, freed, total)


def remove(home: Home, entry: Entry) -> bool:
    """Removes a cache and its entry. Returns False, and removes nothing, if it is in use.

    Raises UserError if it cannot be removed.
    """
    try:
        if not home.begin_removal(entry):
            return False
    except FileNotFoundError:
        return True  # another process has removed it since
    folder = Path(entry.where)
    if not (folder / MANIFEST).exists() and not (folder / BUILD_DIR).exists():
        home.forget(entry)  # removed by hand; other files may be there now
        return True
    try:
        remove_cache(folder)
    except CacheInUseError:
        home.update(entry.model_copy(update={"removal": False}), None)
        return False
    except UserError:
        if (folder / MANIFEST).exists():
            home.update(entry.model_copy(update={"removal": False}), None)
        raise
    with suppress(OSError):
        folder.rmdir()
    home.forget(entry)
    return True


def tidy(home: Home, lines: list[Listed]) -> int:
    """Forgets caches that are gone, and removes what killed processes have left in the home.
    Returns the number of forgotten caches.
    """
    gone = [line.entry for line in lines if line.gone and not line.entry.removal]
    for entry in gone:
        home.forget(entry)
    old = time.time() - _OLD
    for folder in ("caches", "claims", "uses", "temporary"):
        with suppress(OSError):
            for file in (home.folder / folder).iterdir():
                if file.suffix != ".json" and file.stat().st_mtime < old:
                    if file.is_dir():
                        shutil.rmtree(file, ignore_errors=True)
                    elif file.suffix != ".lock":
                        file.unlink()
    return len(gone)


def _files(folder: Path) -> list[tuple[tuple[int, int], int, int]]:
    """(inode, bytes, links) of every shard of a cache, and of its prior."""
    found = []
    for file in (folder / PRIOR, *shard_files(folder)):
        with suppress(OSError):
            status = file.lstat()
            inode = (status.st_dev, status.st_ino)
            found.append((inode, status.st_size, status.st_nlink))
    return found
