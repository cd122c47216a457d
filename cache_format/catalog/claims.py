"""Claims of builders: of several that want the same cache, one builds and the others wait.

A claim is a lock, and a file that its owner touches. The lock ends with its process, at once. On a
network file system whose locks do not reach other machines, the file shows that another machine
holds the claim; it expires (``logitcask.cache_format.catalog.presence``). Claims save work. They
do not protect caches, which have locks of their own.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from logitcask.cache_format.catalog.presence import EXPIRES, beating, clock, signature

POLL = 0.5
"""Seconds between two attempts."""


@contextmanager
def claimed(
    folder: Path, key: str, what: str, on_wait: Callable[[dict[str, Any]], object]
) -> Iterator[bool]:
    """Holds the claim ``key`` while the context lasts, and waits for it first. Yields whether
    there was a wait.

    what:    what the owner makes, for the messages of those who wait.
    on_wait: called once, before the wait, with the owner's ``host``, ``pid``, ``what`` and
             ``since``; a field is missing if it is not known.

    In a folder that cannot be written there is no claim and no wait.
    """
    lock = filelock.FileLock(folder / f"{key}.lock")
    file = folder / f"{key}.json"
    waited = False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = _owner(_content(file))
        except (OSError, NotImplementedError):
            yield False
            return
        else:
            seen = _content(file)
            owner = _elsewhere(file, seen)
            try:
                if owner is None and (mine := _take(file, seen, what)):
                    break
            except OSError:
                lock.release()
                yield waited
                return
            lock.release()
        if not waited:
            waited = True
            on_wait(owner or {})
        time.sleep(POLL)
    try:
        with beating(file):
            yield waited
    finally:
        with suppress(OSError):
            _remove(file, mine)
        lock.release()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _owner(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _elsewhere(file: Path, content: bytes) -> dict[str, Any] | None:
    """The owner on another machine, if it is alive. The caller holds the lock."""
    owner = _owner(content)
    if owner is None or owner.get("host") == signature()["host"]:
        return None
    try:
        age = clock(file.parent) - file.stat().st_mtime
    except OSError:
        return None
    return owner if age < EXPIRES else None


def _take(file: Path, seen: bytes, what: str) -> bytes:
    """Writes the claim in place of ``seen``, that of a dead process, and returns it; empty if
    another machine was faster. The caller holds the lock.
    """
    if not _remove(file, seen):
        return b""
    draft = file.with_suffix(f".{uuid.uuid4().hex}")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    facts = {**signature(), "what": what, "since": now, "mark": uuid.uuid4().hex}
    mine = json.dumps(facts).encode()
    draft.write_bytes(mine)
    try:
        os.link(draft, file)  # fails if the file exists, on network file systems, too
    except FileExistsError:
        return b""
    except OSError:  # a file system without links
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return mine


def _remove(file: Path, content: bytes) -> bool:
    """Removes the claim if it is still this one; returns whether it is gone. It is renamed first,
    which of two machines only one can do.
    """
    gone = file.with_suffix(f".{uuid.uuid4().hex}")
    try:
        os.rename(file, gone)
    except FileNotFoundError:
        return True
    same = _content(gone) == content
    if not same:
        with suppress(OSError):
            os.link(gone, file)
    gone.unlink(missing_ok=True)
    return same
