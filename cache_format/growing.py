"""A growing cache: complete and readable after each shard, and open for more (SPEC.md section 7).

Shards never change. A commit writes one more shard, then replaces the manifest by one that lists
it. A reader holds the state of the manifest that it has read, whatever is added later.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from logitcask.cache_format import card
from logitcask.cache_format.derive.write import Part
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import sync, write_durably, writing_to
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.layout import BUILD_DIR, CARD, GROW_DIR, MANIFEST, SIGNATURE
from logitcask.cache_format.manifest import DataHash, Header, Manifest, ShardEntry
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.schema import MAX_SHARDS
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.codec import Codec, PackedBatch
from logitcask.cache_format.shards.shard_writer import ShardWriter
from logitcask.cache_format.shards.validation import validate
from logitcask.cache_format.storage.files import local_folder
from logitcask.cache_format.writer import locked, refuse_other_files

logger = logging.getLogger(__name__)

_GROWING = "growing"
_MASS_SLACK = 1e-3


def is_growing(manifest: Header) -> bool:
    """Whether a manifest is one of a growing cache."""
    return bool((manifest.model_extra or {}).get(_GROWING))


class GrowingCache:
    """The exclusive writer of the growing cache in ``path``; use it as a context manager.

    header: teacher, tokenizer, data and store of a new cache. Its ``data.sha256`` and
            ``data.max_length`` follow from the sequences. A cache that is there already must agree
            with it in the teacher's model, the tokenizer and the store.

    Opening takes the lock (CacheInUseError if another process holds it) and removes the remains of
    a crash: each shard that no manifest lists. Raises UserError for a cache that is not a growing
    one, for an unfinished build, for another header, and for a folder that cannot be written.
    """

    def __init__(self, path: str | Path, header: Header) -> None:
        self.path = local_folder(
            Path(path), "keep answers in a folder, then copy that with `teacher-cache push`"
        )
        self.header = _marked(header)
        self.manifest: Manifest | None = None
        """The last one committed; None before the first shard."""
        self.codec = Codec(self.header.store, None)
        self._entries: list[ShardEntry] = []
        self._data = DataHash()
        self._longest = 0
        self._shard: ShardWriter | None = None
        self._names: list[tuple[str, Any, Any]] = []
        self._exit = ExitStack()

    @property
    def _scratch(self) -> Path:
        return self.path / GROW_DIR / "shard.arrow.tmp"

    @property
    def sequences(self) -> int:
        """Committed sequences."""
        return sum(entry.sequences for entry in self._entries)

    @property
    def open_tokens(self) -> int:
        """Tokens that the next commit will add."""
        return 0 if self._shard is None else self._shard.tokens

    def __enter__(self) -> Self:
        with writing_to(self.path), ExitStack() as opening:
            if (self.path / BUILD_DIR).exists():
                raise UserError(
                    f"{self.path} is an unfinished build; finish it with `teacher-cache build`, or choose another folder"
                )
            if not (self.path / MANIFEST).exists() and not (self.path / GROW_DIR).exists():
                refuse_other_files(self.path)
            self._refuse_finished()
            # First of all: it marks the folder as a growing cache's.
            opening.enter_context(locked(self.path, GROW_DIR))
            (self.path / "data").mkdir(exist_ok=True)
            self._take_up()
            self._exit = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Releases the lock. Sequences since the last commit are lost."""
        self.drop()
        self._exit.close()

    def _refuse_finished(self) -> None:
        """Before anything is written there."""
        if (self.path / MANIFEST).exists() and not is_growing(CacheReader(self.path).manifest):
            raise UserError(
                f"{self.path} is a finished cache, which does not grow; choose another folder for what is kept"
            )

    def _take_up(self) -> None:
        """Reads the manifest that is there, and removes what it does not list."""
        if (self.path / MANIFEST).exists():
            reader = CacheReader(self.path)
            found = reader.manifest
            ours, theirs = _common_ground(found), _common_ground(self.header)
            if ours != theirs:
                raise UserError(
                    f"{self.path} was begun with other settings: {describe_difference(ours, theirs)}; "
                    "go on with the old ones, or choose another folder"
                )
            self.manifest, self.header = found, _header_of(found)
            self._entries = list(found.shards)
            for _, name, ids, mask in Part(reader).chosen():
                self._data.update(name, ids, mask)
                self._longest = max(self._longest, len(ids))
        known = {self.path / entry.path for entry in self._entries}
        for file in (self.path / "data").glob("shard-*.arrow"):
            if file not in known:
                file.unlink()
        self._scratch.unlink(missing_ok=True)

    def append(self, sequence: CachedSequence) -> PackedBatch:
        """Adds a sequence to the open shard. Returns it as it will be read: one row, rounded.

        Raises UserError if it cannot be stored (``shards.validation``); nothing is added then. Also
        raises UserError if the disk refuses it; the open shard is lost then.
        """
        validate(sequence, self.header.store, mass_slack=_MASS_SLACK)
        packed = self.codec.open(self.codec.encode([sequence]), "a sequence to be kept")
        with writing_to(self.path):
            try:
                if self._shard is None:
                    self._shard = ShardWriter(
                        self._scratch, self.codec, 1, None, mass_slack=_MASS_SLACK
                    )
                self._shard.append(sequence)
            except OSError:
                self.drop()
                raise
        self._names.append((sequence.sequence_id, sequence.input_ids, sequence.loss_mask))
        return packed

    def commit(self) -> Manifest | None:
        """Completes the open shard: when this returns, its sequences are on disk and in the cache.
        Without new sequences nothing happens.

        Raises UserError if it cannot be written; the open shard is lost then, and the cache is as
        before.
        """
        if self._shard is None or not self._names:
            return self.manifest
        try:
            if len(self._entries) >= MAX_SHARDS:
                raise UserError(
                    f"{self.path} has {MAX_SHARDS:,} shards, the most that a manifest can list; go on in another folder"
                )
            with writing_to(self.path):
                return self._commit(self._shard)
        finally:
            self.drop()

    def _commit(self, shard: ShardWriter) -> Manifest:
        path = f"data/shard-{len(self._entries):05d}.arrow"
        entry = ShardEntry.model_validate({"path": path, **shard.close()})
        os.replace(self._scratch, self.path / path)
        sync(self.path / "data")
        digest, longest = self._data.copy(), self._longest
        for name, ids, mask in self._names:
            digest.update(name, ids, mask)
            longest = max(longest, len(ids))
        header = self.header.model_copy(
            update={
                "data": self.header.data.model_copy(
                    update={"sha256": digest.hexdigest(), "max_length": longest}
                )
            }
        ).with_fingerprint()
        manifest = Manifest.complete(
            header,
            (*self._entries, entry),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        scratch = self.path / GROW_DIR
        write_durably(self.path / CARD, card.dataset_card(manifest), scratch=scratch)
        text = manifest.to_json()
        (self.path / SIGNATURE).unlink(missing_ok=True)  # of the state before
        try:
            write_durably(self.path / MANIFEST, text, scratch=scratch)
        except OSError as error:
            # Renamed, but not flushed: readers see it, so its shard may not be written again.
            if (self.path / MANIFEST).read_text("utf-8") != text:
                raise
            logger.warning(
                "%s is written, but not flushed to disk: %s", self.path / MANIFEST, error
            )
        self._data, self._longest, self.manifest = digest, longest, manifest
        self._entries.append(entry)
        return manifest

    def drop(self) -> None:
        """Gives up the sequences since the last commit."""
        if self._shard is not None:
            self._shard.abort()
        self._shard, self._names = None, []


def _marked(header: Header) -> Header:
    return Header.model_validate({**header.model_dump(), _GROWING: True})


def _header_of(manifest: Manifest) -> Header:
    own = {"created_at", "statistics", "shards", "content_sha256", "audit"}
    return Header.model_validate(manifest.model_dump(exclude=own))


def _common_ground(header: Header) -> dict[str, Any]:
    """The part of the header that stays the same while a cache grows.

    The engine's version may change; whether its numbers did is for the caller to check.
    """
    identity = header.content_identity()
    for field in ("engine", "dtype", "head_dtype", "backend"):
        identity["teacher"].pop(field, None)
    return {
        "teacher": identity["teacher"],
        "tokenizer": header.tokenizer.vocab_sha256,
        "store": identity["store"],
    }
