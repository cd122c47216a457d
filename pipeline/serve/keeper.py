"""Answers of the upstream server that stay: looked up at once, committed to a growing cache by
shard.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.growing import GrowingCache
from logitcask.cache_format.manifest import (
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.codec import PackedBatch
from logitcask.pipeline.serve.index import PrefixIndex, leading
from logitcask.pipeline.serve.served import Missing, find_in

logger = logging.getLogger(__name__)

LOGPROB_STEP = 2.0**-8
"""Grid of kept logprobs, nats: as fine as that of the targets."""

SHARD_TOKENS = 200_000
SHARD_SECONDS = 60.0
_HEAD_BYTES = 64 << 20
"""Approximate size of the heads in one shard at most, which are in memory until it is committed."""


def header_of(
    teacher: TeacherIdentity, tokenizer: TokenizerIdentity, engine: str, top_k: int
) -> Header:
    """The header of a cache of what a server has said of requested texts."""
    return Header(
        created_by=f"logitcask {version('logitcask')}",
        teacher=teacher.model_copy(
            update={
                "backend": "server",
                "engine": engine,
                "dtype": "auto",
                "head_dtype": None,
                "route": "http",
            }
        ),
        tokenizer=tokenizer.model_copy(update={"chat_template_sha256": None}),
        data=DataIdentity(
            source="requests",
            split="served",
            kind="documents",
            mask_policy="all",
            max_length=0,
            overlong="as requested",
            sha256="",
        ),
        store=StoreSettings(
            vocab_size=teacher.vocab_size,
            top_k=top_k,
            capture_k=top_k,
            logprob_step=LOGPROB_STEP,
        ),
    )


class Keeper:
    """What has been kept. ``find`` is safe to use from several threads, also beside one thread that
    calls ``add`` and ``commit``.

    cache: open.
    """

    def __init__(self, cache: GrowingCache) -> None:
        self.cache = cache
        self.kept_tokens = 0
        self._lock = threading.RLock()
        self._index = PrefixIndex()
        self._open: list[PackedBatch] = []
        self._since = 0.0
        self._reader: CacheReader | None = None
        if cache.manifest is not None:
            self._reader = CacheReader(cache.path, manifest=cache.manifest)
            self._index = PrefixIndex.of(self._reader)
        self._committed = cache.sequences
        logger.info(
            "%s: %s sequences kept so far, heads of %d",
            cache.path,
            f"{self._committed:,}",
            self.top_k,
        )

    @property
    def top_k(self) -> int:
        return self.cache.header.store.top_k

    def find(
        self, ids: NDArray[np.int32], k: int, *, nulls: bool = False
    ) -> CachedSequence | Missing:
        """As ``ServedCache.find``; also in what is not committed yet."""
        with self._lock:
            return find_in(self._index, self._sequence, ids, k, nulls=nulls)

    def _sequence(self, number: int) -> CachedSequence:
        if number >= self._committed:
            return self._open[number - self._committed].decode(0)
        assert self._reader is not None
        return self._reader[number]

    def add(self, sequence: CachedSequence) -> CachedSequence:
        """Keeps a sequence, unless its tokens are kept already. Returns it as it will be read.

        Commits if the open shard is full. A sequence that cannot be kept, or a disk that is full,
        is logged: the answer stays right, and is asked again another time.
        """
        with self._lock:
            number = self._committed + len(self._open)
            try:
                if self._index.has(sequence.input_ids):
                    return sequence
                # First of all: what is kept and not found would be kept again.
                self._index.add(number, sequence.input_ids, leading(sequence.loss_mask))
                packed = self.cache.append(sequence)
            except (UserError, sqlite3.Error) as error:
                logger.warning("not kept: %s", one_line(error))
                self._forget(number)
                return sequence
            if not self._open:
                self._since = time.monotonic()
            self._open.append(packed)
        kept = packed.decode(0)
        entry_bytes = 4 * self.top_k
        if self.cache.open_tokens >= min(SHARD_TOKENS, _HEAD_BYTES // entry_bytes):
            self.commit()
        return kept

    @property
    def due(self) -> bool:
        """Whether the open shard has waited long enough."""
        return bool(self._open) and time.monotonic() - self._since >= SHARD_SECONDS

    def commit(self) -> None:
        """Puts the open shard on disk."""
        if not self._open:
            return
        tokens = self.cache.open_tokens
        try:
            manifest = self.cache.commit()
        except UserError as error:
            logger.error("%s tokens are not kept: %s", f"{tokens:,}", one_line(error))
            self._forget(self._committed)
            return
        reader = CacheReader(self.cache.path, manifest=manifest)
        if self._reader is not None:
            reader.checked = self._reader.checked
        with self._lock:
            self._reader, self._open, self._committed = reader, [], self.cache.sequences
        self.kept_tokens += tokens

    def _forget(self, number: int) -> None:
        """Forgets the sequence of this number and those after it; also all that was not committed,
        if the cache has lost it.
        """
        with self._lock:
            if not self.cache.open_tokens:
                number, self._open = self._committed, []
            self._index.remove_from(number)

    def close(self) -> None:
        """Commits the open shard."""
        self.commit()
        self._index.close()
