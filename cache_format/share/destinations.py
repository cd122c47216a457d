"""Destinations of a copy: a local folder, a store of files, a data set on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem

from logitcask.cache_format.durable import sync, write_durably, writing_to
from logitcask.cache_format.errors import CacheError, CacheInUseError, DamagedCacheError, UserError
from logitcask.cache_format.layout import BUILD_DIR, CARD, MANIFEST, PRIOR, PULL_DIR, PUSH_MARK
from logitcask.cache_format.manifest import CacheFile
from logitcask.cache_format.storage.files import (
    OnBytes,
    counted,
    download,
    has_content,
    is_local,
    open_filesystem,
    protocol_of,
    read_small,
    retrying,
    verified_chunks,
)
from logitcask.cache_format.storage.shard_cache import ShardCache
from logitcask.cache_format.writer import may_be_cache, refuse_other_files

MAX_CARD_BYTES = 16 << 20
MAX_MARK_BYTES = 1 << 16
HUB_COMMIT_FILES = 100
"""Shards per commit. The hub advises against many small commits and against very large ones."""

_SHARDS = "shard-*.arrow"
_FOLDERS = {
    "sftp",
    "ssh",
    "ftp",
    "smb",
    "hdfs",
    "webhdfs",
    "webdav",
}  # protocols in which a folder must exist before its files
_RENAMES = {"sftp", "ssh"}  # protocols in which a rename replaces a file in one step
_CHEAP_TO_HASH = {"memory", "hf"}  # the hub keeps the sha256 of large files


def ignore(count: int) -> None:
    """A callback that does nothing."""


def place_at(url: str) -> Folder | Store:
    """The destination at ``url``. Raises CacheError as ``open_filesystem`` does, and UserError if
    ``url`` cannot be written to.
    """
    filesystem, root = open_filesystem(url)
    protocol = protocol_of(filesystem)
    if is_local(filesystem):
        return Folder(Path(root or "/"))
    if protocol == "hf":
        return _Hub(filesystem, root, url)
    if protocol in ("http", "https"):
        raise UserError(
            f"{url} cannot be written to: a web server hands out files and takes none; push to a store"
        )
    return Store(filesystem, root, url)


class Folder:
    """A local folder, written like a new cache: lock, temporary file, fsync, rename, fsync of the
    folder.

    Names of files are relative to the cache, in all destinations.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder, self._scratch = folder, folder / PULL_DIR

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Locks out other copies and builds, and prepares the folder for writing."""
        if (self._folder / BUILD_DIR).exists():
            raise UserError(
                f"{self._folder} holds an unfinished build; finish it, or choose another folder"
            )
        if not self._scratch.exists() and not may_be_cache(self._folder):
            refuse_other_files(self._folder)
        with writing_to(self._folder):
            self._scratch.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._scratch / "lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise CacheInUseError(
                    f"another process is copying a cache to {self._folder}; wait for it, or choose another folder"
                ) from None
            try:
                (self._folder / "data").mkdir(exist_ok=True)
                for leftover in self._scratch.glob("*.tmp"):
                    leftover.unlink()
                yield
            finally:
                if (self._folder / MANIFEST).exists():
                    shutil.rmtree(self._scratch, ignore_errors=True)
                lock.release()

    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a small file; None if there is none."""
        return _small_file(LocalFileSystem(), str(self._folder / name), limit)

    def shards(self) -> list[str]:
        """The names of all shards present, also those of other caches."""
        return [f"data/{file.name}" for file in (self._folder / "data").glob(_SHARDS)]

    def holds(self, file: CacheFile, *, deep: bool) -> bool:
        """Whether the file is there, by its size and sha256. A local disk is fast enough to check
        the sha256 even without ``deep``.
        """
        return has_content(self._folder / file.path, file)

    def refuse_strangers(self, names: list[str], readme: bytes) -> None:
        """Does nothing: ``claimed`` has refused a folder without a manifest, or an earlier copy
        has left its mark there.
        """

    def mark(self, text: bytes) -> bool:
        """Records the copy in progress. Returns whether this destination keeps such a record."""
        return False  # the scratch folder is the record

    def remove(self, names: list[str]) -> None:
        """Removes the files of these names that exist, in this order."""
        for name in names:
            if (self._folder / name).exists():
                (self._folder / name).unlink()
                sync((self._folder / name).parent)

    def send(
        self,
        source: fsspec.AbstractFileSystem,
        root: str,
        files: list[CacheFile],
        on_bytes: OnBytes,
    ) -> None:
        """Copies files of the cache in ``root`` and verifies each."""
        for file in files:
            final = self._folder / file.path
            temporary = self._scratch / f"{final.name}.tmp"
            download(source, f"{root}/{file.path}", file, temporary, on_bytes)
            os.replace(temporary, final)
            sync(final.parent)

    def finish(self, texts: dict[str, bytes]) -> None:
        """Writes small files in this order. The last one completes the cache."""
        for name, text in texts.items():
            (self._folder / name).parent.mkdir(exist_ok=True)
            write_durably(self._folder / name, text, scratch=self._scratch)


class Store:
    """A store that fsspec writes to, file by file. An object store shows a file only once it is
    complete.
    """

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, where: str) -> None:
        self.where = where
        self._filesystem, self._root = filesystem, root
        self._protocol = protocol_of(filesystem)

    def claimed(self) -> AbstractContextManager[None]:
        self._filesystem.invalidate_cache()
        self._make("data")
        return nullcontext()

    def prepare(self, folder: str) -> None:
        """Creates what ``folder`` needs before it can take files."""
        self._make(folder)

    def _make(self, folder: str) -> None:
        if self._protocol in _FOLDERS:
            path = f"{self._root}/{folder}"
            self._try(lambda: self._filesystem.makedirs(path, exist_ok=True))

    def read(self, name: str, limit: int) -> bytes | None:
        return _small_file(self._filesystem, f"{self._root}/{name}", limit)

    def shards(self) -> list[str]:
        try:
            listed = self._try(lambda: self._filesystem.ls(f"{self._root}/data", detail=False))
        except FileNotFoundError:
            return []
        names = [path.rsplit("/", 1)[-1] for path in listed]
        return [f"data/{name}" for name in names if fnmatch(name, _SHARDS)]

    def holds(self, file: CacheFile, *, deep: bool) -> bool:
        """Whether the file is there, by its size, or with ``deep`` by its sha256."""
        path = f"{self._root}/{file.path}"
        try:
            info = self._try(lambda: self._filesystem.info(path))
        except FileNotFoundError:
            return False
        if not deep or info["size"] != file.bytes:
            return bool(info["size"] == file.bytes)
        if info.get("lfs"):
            return bool(info["lfs"]["sha256"] == file.sha256)
        try:
            self._try(lambda: all(verified_chunks(self._filesystem, path, file)))
        except DamagedCacheError:
            return False
        return True

    def refuse_strangers(self, names: list[str], readme: bytes) -> None:
        """Raises UserError if files of these names or a card other than ``readme`` exist there."""
        shards = set(self.shards())
        taken = [
            name for name in names if name in shards or (name == PRIOR and self._exists(name))
        ][:1]
        if self.read(CARD, MAX_CARD_BYTES) not in (None, readme):
            taken.append(CARD)
        if taken:
            raise UserError(
                f"{self.where} is no cache, but has {' and '.join(taken)} of its own, where a cache puts its files; "
                "choose another place, or replace them with --force"
            )

    def mark(self, text: bytes) -> bool:
        self._write(PUSH_MARK, partial(iter, [text]), ignore)
        self._filesystem.invalidate_cache()
        return True

    def _exists(self, name: str) -> bool:
        return bool(self._try(lambda: self._filesystem.exists(f"{self._root}/{name}")))

    def _try(self, action: Callable[[], Any]) -> Any:
        return retrying(action, self._filesystem)

    def remove(self, names: list[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._try(partial(self._filesystem.rm_file, f"{self._root}/{name}"))
        self._filesystem.invalidate_cache()

    def send(
        self,
        source: fsspec.AbstractFileSystem,
        root: str,
        files: list[CacheFile],
        on_bytes: OnBytes,
    ) -> None:
        for file in files:
            chunks = partial(verified_chunks, source, f"{root}/{file.path}", file)
            self._write(file.path, chunks, on_bytes)
            self._filesystem.invalidate_cache()
            self._require(file)

    def _require(self, file: CacheFile) -> None:
        if not self.holds(file, deep=self._protocol in _CHEAP_TO_HASH):
            raise CacheError(f"{self.where}/{file.path} is not what was sent; run the same again")

    def _write(self, name: str, chunks: Callable[[], Iterator[bytes]], on_bytes: OnBytes) -> None:
        final = f"{self._root}/{name}"
        path = f"{final}.tmp" if self._protocol in _RENAMES else final

        def attempt() -> None:
            try:
                with counted(on_bytes) as count, self._filesystem.open(path, "wb") as handle:
                    for chunk in chunks():
                        handle.write(chunk)
                        count(len(chunk))
            except BaseException:
                with suppress(Exception):
                    # Closing the file has stored the bytes sent so far.
                    self._filesystem.rm_file(path)
                raise
            # A rename whose reply is lost has happened, so an attempt begins with the file.
            if path != final:
                self._filesystem.mv(path, final)

        self._try(attempt)

    def finish(self, texts: dict[str, bytes]) -> None:
        for name, text in texts.items():
            if "/" in name:
                self._make(name.rpartition("/")[0])
            self._write(name, partial(iter, [text]), ignore)
        self._filesystem.invalidate_cache()


class _Hub(Store):
    """A data set on the Hugging Face Hub, read through fsspec and written in commits. The hub shows
    a commit whole or not at all.
    """

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, where: str) -> None:
        from huggingface_hub import HfApi

        super().__init__(filesystem, root, where)
        parts = re.fullmatch(r"datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", root)
        if parts is None:
            raise UserError(
                f"{where} names no data set of the hub; push to hf://datasets/ORG/NAME or .../NAME@BRANCH"
            )
        self._api = HfApi(endpoint=filesystem.endpoint, token=filesystem.token)
        self._folder = f"{parts[3]}/" if parts[3] else ""
        branch = unquote(parts[2]) if parts[2] else None
        self._repo: dict[str, Any] = {
            "repo_id": parts[1],
            "repo_type": "dataset",
            "revision": branch,
        }

    def _create(self) -> None:
        repo = {"repo_id": self._repo["repo_id"], "repo_type": "dataset", "exist_ok": True}
        self._api.create_repo(**repo, private=True)
        if self._repo["revision"]:
            self._api.create_branch(**repo, branch=self._repo["revision"])

    def prepare(self, folder: str) -> None:
        self._create()

    def mark(self, text: bytes) -> bool:
        return False  # commits are whole, and the hub lists the hashes of an earlier push

    def _commit(self, operations: list[Any], message: str) -> None:
        self._api.create_commit(**self._repo, operations=operations, commit_message=message)
        self._filesystem.invalidate_cache()

    def remove(self, names: list[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        there = [name for name in names if self._exists(name)]
        if there:
            self._commit(
                [CommitOperationDelete(self._folder + name) for name in there],
                "Remove what is replaced",
            )

    def send(
        self,
        source: fsspec.AbstractFileSystem,
        root: str,
        files: list[CacheFile],
        on_bytes: OnBytes,
    ) -> None:
        from huggingface_hub import CommitOperationAdd

        self._create()
        for start in range(0, len(files), HUB_COMMIT_FILES):
            group, additions = files[start : start + HUB_COMMIT_FILES], []
            for file in group:
                addition = CommitOperationAdd(
                    self._folder + file.path, str(_local_copy(source, root, file))
                )
                self._api.preupload_lfs_files(**self._repo, additions=[addition])
                additions.append(addition)
                on_bytes(file.bytes)
            self._commit(additions, f"Shards {start + 1} to {start + len(group)} of {len(files)}")
            for file in group:
                self._require(file)

    def finish(self, texts: dict[str, bytes]) -> None:
        from huggingface_hub import CommitOperationAdd

        self._commit(
            [CommitOperationAdd(self._folder + name, text) for name, text in texts.items()],
            "Complete the cache",
        )


def _small_file(filesystem: fsspec.AbstractFileSystem, path: str, limit: int) -> bytes | None:
    try:
        return read_small(filesystem, path, limit)
    except FileNotFoundError:
        return None


def _local_copy(source: fsspec.AbstractFileSystem, root: str, file: CacheFile) -> Path:
    """A verified local file: the hub's client uploads only local files."""
    path = f"{root}/{file.path}"
    if not is_local(source):
        return ShardCache().get(source, path, file.bytes, file.sha256)
    if not has_content(Path(path), file):
        raise DamagedCacheError(f"{path} is damaged or missing; fetch or build the cache again")
    return Path(path)
