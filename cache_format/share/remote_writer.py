"""Builds of a cache at a URL: every shard is sent as soon as it is committed.

A local work folder holds the state of the build and the shard that is being written. Its name is
made from the URL, so the same command finds it again after a crash. Each shard is sent, checked and
then removed from the work folder. The manifest is sent last. While a build is unfinished, a marker
at the URL names its owner.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from logitcask.cache_format import card
from logitcask.cache_format.durable import load_state, write_durably, writing_to
from logitcask.cache_format.errors import CacheError, CacheInUseError, DamagedCacheError, UserError
from logitcask.cache_format.layout import (
    BUILD_DIR,
    CARD,
    MANIFEST,
    OWNER,
    PREVIEW,
    PRIOR,
    PUSH_MARK,
    SIGNATURE,
)
from logitcask.cache_format.manifest import (
    MAX_MANIFEST_BYTES,
    AuditSummary,
    CacheFile,
    Header,
    Manifest,
    ShardEntry,
)
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.share.destinations import MAX_MARK_BYTES, Store, place_at
from logitcask.cache_format.storage.files import open_filesystem, reaching
from logitcask.cache_format.storage.shard_cache import shard_cache_folder
from logitcask.cache_format.writer import CacheWriter, remove_cache

_CLAIM = "claim.json"


class _Owner(BaseModel):
    """Owner of a build, stored both at the URL and in the build's local state."""

    model_config = ConfigDict(frozen=True)

    build: str
    host: str
    since: str


def work_folder(url: str) -> Path:
    """Local state folder of the build at ``url``: ``builds/NAME-HASH`` beside cached shards."""
    filesystem, root = open_filesystem(url)
    whole = filesystem.unstrip_protocol(root)
    name = root.rsplit("/", 1)[-1] or "cache"
    return (
        shard_cache_folder()
        / "builds"
        / f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
    )


def holds_cache(url: str) -> bool:
    """Whether ``url`` has a finished cache. Raises CacheError if the place cannot be reached."""
    with reaching(url):
        return _store(url).read(MANIFEST, MAX_MANIFEST_BYTES) is not None


def remove_traces(url: str) -> None:
    """Removes the files of a build that was killed between its manifest and its clean-up."""
    store = _store(url)
    with reaching(url):
        store.remove([OWNER])
    _remove_work_folder(url)


def remove_remote_cache(url: str) -> None:
    """Removes the cache at ``url``, finished or not, its local work folder, and nothing else.

    Raises CacheInUseError while another process of this machine builds it, CacheError if the place
    cannot be reached, and UserError if there are shards that belong to no build, push or cache.
    """
    _remove_work_folder(url)
    store = _store(url)
    with reaching(url):
        shards = store.shards()
        manifest = store.read(MANIFEST, MAX_MANIFEST_BYTES)
        if manifest is None and all(
            store.read(name, MAX_MARK_BYTES) is None for name in (OWNER, PUSH_MARK)
        ):
            store.refuse_strangers(shards, b"")
        # The manifest is removed first, so that no reader takes the rest for a whole cache.
        store.remove([MANIFEST, SIGNATURE, *shards, PRIOR, CARD, PREVIEW, OWNER, PUSH_MARK])


class RemoteCacheWriter(CacheWriter):
    """A ``CacheWriter`` of the cache at ``url``, with local space for its plan and one shard.

    Opening takes a lock. On this machine it is the lock of the work folder. Against other machines
    it is the marker at the URL, which two machines that start at the same instant can both miss.
    Raises CacheInUseError, naming the other machine; UserError for a place with other files;
    CacheError if the place cannot be reached, and for a shard that did not arrive.
    """

    def __init__(self, url: str, *, compression_level: int = 1) -> None:
        super().__init__(work_folder(url), compression_level=compression_level)
        self.url = url
        self._store = _store(url)

    def __enter__(self) -> Self:
        with reaching(self.url):
            if self._store.read(MANIFEST, MAX_MANIFEST_BYTES) is not None:
                raise UserError(
                    f"{self.url} already holds a finished cache; remove it or choose another output"
                )
        super().__enter__()
        return self

    def _recover(self) -> None:
        with reaching(self.url):
            self._claim()
        super()._recover()

    def _claim(self) -> None:
        """Makes this build the owner of the place, or raises if it has another owner."""
        file = self.build_dir / _CLAIM
        if file.exists():
            self._owner = load_state(_Owner, file)
        else:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._owner = _Owner(build=uuid.uuid4().hex, host=socket.gethostname(), since=now)
            write_durably(file, self._owner.model_dump_json())
        with self._store.claimed():
            found = self._store.read(OWNER, MAX_MARK_BYTES)
            if found is None:
                if self._store.read(PUSH_MARK, MAX_MARK_BYTES) is not None:
                    raise UserError(
                        f"{self.url} holds half a copy of a cache; push that again to complete it, choose another output, or "
                        "start afresh with --restart"
                    )
                if not list((self.build_dir / "commits").glob("*.json")):
                    self._store.refuse_strangers(self._store.shards(), b"")
                self._store.prepare(BUILD_DIR)
                self._store.finish({OWNER: self._owner.model_dump_json().encode()})
            self._require_ours()

    def _require_ours(self) -> None:
        """Raises CacheInUseError if the place belongs to another build."""
        found = self._store.read(OWNER, MAX_MARK_BYTES)
        try:
            owner = None if found is None else _Owner.model_validate_json(found)
        except ValidationError:
            owner = None
        if owner is None or owner.build != self._owner.build:
            who = (
                f"from {owner.host}, since {owner.since}"
                if owner
                else "by a process that has removed this one's marker"
            )
            raise CacheInUseError(
                f"{self.url} is being built {who}; wait for it or go on there, choose another output, or, if that build is "
                "given up, start afresh with --restart"
            )

    def begin(self, header: Header, prior: TailPrior | None = None) -> Header:
        header = super().begin(header, prior)
        if header.tail_prior is not None:
            entry = header.tail_prior
            self._send(CacheFile(entry.path, entry.bytes, entry.sha256))
        return header

    def adopt(self, index: int) -> bool:
        record = self._record(index)
        if not record.exists():
            return False
        entry = load_state(ShardEntry, record)
        self._deliver(entry)
        self.committed[index] = entry
        return True

    def _commit(self, index: int, entry: ShardEntry) -> None:
        super()._commit(index, entry)
        self._deliver(entry)

    def _deliver(self, entry: ShardEntry) -> None:
        """Sends a committed shard unless it has arrived, then removes the local file."""
        file = CacheFile(entry.path, entry.bytes, entry.sha256)
        local = self.path / entry.path
        if local.exists():
            self._send(file)
            local.unlink()
        else:
            with reaching(self.url):
                if not self._store.holds(file, deep=False):
                    raise DamagedCacheError(
                        f"{self.url}/{entry.path} is gone or is not what was sent; start afresh with --restart"
                    )

    def _send(self, file: CacheFile) -> None:
        source, root = open_filesystem(str(self.path.absolute()))
        with reaching(self.url):
            self._require_ours()
            self._store.send(source, root, [file], lambda _: None)

    def finish(self, header: Header, shards: int, *, audit: AuditSummary | None = None) -> Manifest:
        manifest = self._complete(header, shards, audit)
        with reaching(self.url):
            self._require_ours()
            if self._store.read(MANIFEST, MAX_MANIFEST_BYTES) is not None:
                raise CacheInUseError(
                    f"{self.url} holds a finished cache now, which somebody else has put there; choose another output, or "
                    "replace it with --restart"
                )
            self._store.finish(
                {CARD: card.dataset_card(manifest).encode(), MANIFEST: manifest.to_json().encode()}
            )
            self._store.remove([OWNER])
        with writing_to(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        return manifest


def _remove_work_folder(url: str) -> None:
    remove_cache(work_folder(url))
    shutil.rmtree(work_folder(url), ignore_errors=True)


def _store(url: str) -> Store:
    place = place_at(url)
    if not isinstance(place, Store):
        raise CacheError(f"{url} is a local folder; expected the URL of a store")
    return place
