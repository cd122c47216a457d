"""Identity of a model's weights on disk: one sha256 over all of them, stored between runs.

Reading a model of hundreds of gigabytes takes minutes, and GPUs would wait for it, in every engine
of a machine. The digest of each file is therefore stored in the user's cache folder. It is valid
only as long as the size, the times and the inode of the file are unchanged. If several engines
start together, the first one reads and the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.storage.shard_cache import shard_cache_folder

# In ns. If a file was changed less than this before it was read, a coarse clock may give a later
# change the same times.
_SETTLED = 2_000_000_000


class _Read(NamedTuple):
    """State and digest of a read file. Every change sets ``ctime``, which users cannot set."""

    size: int
    mtime: int
    ctime: int
    inode: int
    sha256: str


# By absolute path.
_known: dict[str, _Read] = {}


def weights_sha256(folder: Path) -> str:
    """sha256 over the (name, sha256) pairs of the weight files of a model folder, in order of name,
    and its config.

    The config is included because it changes the results, too (RoPE, norms); its fields about its
    own origin are not. Raises UserError if there are no weights.
    """
    files = weight_files(folder.resolve())
    if not files:
        raise UserError(f"{folder} holds no weights: expected *.safetensors or *.bin files")
    digests = _digests(files)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for origin in ("_name_or_path", "transformers_version"):
        config.pop(origin, None)
    content = [[file.name, digest] for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps([content, config], sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in {".safetensors", ".bin"})


def file_sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digests(files: list[Path]) -> list[str]:
    """The sha256 of each weight file of a folder. Files are read only if it is not known."""
    note = _note(files[0].parent)
    known = _recall(note)
    if not all(_unchanged(file, known) for file in files):
        with _alone(note) as may_write:
            known = _recall(note)  # another process may have read them since
            with ThreadPoolExecutor(max_workers=8) as pool:
                found = dict(
                    zip(
                        map(str, files),
                        pool.map(lambda file: _read(file, known), files),
                        strict=True,
                    )
                )
            kept = {
                path: each for path, each in found.items() if time.time_ns() - each.ctime > _SETTLED
            }
            _known.update(kept)
            if note is not None and may_write:
                with contextlib.suppress(OSError):  # a full disk
                    write_durably(note, json.dumps(kept))
            known = found
    return [known[str(file)].sha256 for file in files]


def _note(folder: Path) -> Path | None:
    """The file with the digests of this folder; None for a user without a home."""
    # Also by inode: nodes that share the user's folder may have other models under the same path.
    name = hashlib.sha256(f"{folder}\0{folder.stat().st_ino}".encode()).hexdigest()[:32]
    try:
        return shard_cache_folder() / "weights" / f"{name}.json"
    except RuntimeError:
        return None


def _read(file: Path, known: dict[str, _Read]) -> _Read:
    if _unchanged(file, known):
        return known[str(file)]
    with file.open("rb") as handle:
        before = _stamp(os.fstat(handle.fileno()))
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        size, mtime, ctime, inode = _stamp(os.fstat(handle.fileno()))
    # If a file was written while it was read, this digest may match no state of it, so it is not
    # stored.
    settled = (size, mtime, ctime, inode) == before
    return _Read(size, mtime, ctime if settled else -1, inode, digest)


def _unchanged(file: Path, known: dict[str, _Read]) -> bool:
    return str(file) in known and known[str(file)][:4] == _stamp(file.stat())


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _recall(note: Path | None) -> dict[str, _Read]:
    """The stored digests by path; empty if the file cannot be read."""
    if note is None:
        return dict(_known)
    try:
        found = {path: _Read(*each) for path, each in json.loads(note.read_text("utf-8")).items()}
        sound = all(
            [*map(type, each)] == [int, int, int, int, str] and len(each.sha256) == 64
            for each in found.values()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return dict(_known)
    return {**_known, **(found if sound else {})}


@contextlib.contextmanager
def _alone(note: Path | None) -> Iterator[bool]:
    """A lock on reading these files and writing the digests; yields whether they can be written."""
    if note is None:
        yield False
        return
    lock = FileLock(note.with_suffix(".lock"))
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (
        OSError,
        NotImplementedError,
    ):  # another user's folder, or a file system without locks
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
