"""Identity of a model's weights on disk: one sha256 over all of them, remembered from run to run.

Reading them takes minutes where a model has hundreds of gigabytes, and GPUs would wait for it, in
every engine of a machine. So the digest of each file is kept in the user's cache folder, and taken
for what it is only while the file has the size, the times and the inode that it had. Engines that
start together wait for the first one to read.
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

# A file that was changed less than this before it was read may change again without new times, on a
# coarse clock; in ns.
_SETTLED = 2_000_000_000


class _Read(NamedTuple):
    """What a file was when it was read, and what was in it. A change of any kind sets ``ctime``,
    which nobody else can.
    """

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

    The config decides as much as the weights (RoPE, norms); what it says of its own origin does not
    count. Raises UserError where there are no weights.
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
    """The sha256 of each of the weight files of a folder, read only where that is not known."""
    note = _note(files[0].parent)
    known = _recall(note)
    if not all(_unchanged(file, known) for file in files):
        with _alone(note) as may_write:
            known = _recall(note)  # somebody else may have read them since
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
    """Where the digests of this folder are written down; None for a user without a home."""
    # By inode too: nodes that share the user's folder may have other models under the same path.
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
    # Of a file that was written while it was read this may be a digest of no state it was in: not
    # to be used again.
    settled = (size, mtime, ctime, inode) == before
    return _Read(size, mtime, ctime if settled else -1, inode, digest)


def _unchanged(file: Path, known: dict[str, _Read]) -> bool:
    return str(file) in known and known[str(file)][:4] == _stamp(file.stat())


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _recall(note: Path | None) -> dict[str, _Read]:
    """What is remembered, by path. A note that cannot be read says nothing."""
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
    """While this is entered nobody else reads these files or writes the note; gives whether it
    can be written at all.
    """
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
    ):  # a folder that is not ours, or a file system without locks
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
