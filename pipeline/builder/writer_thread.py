"""The writer thread: reads the engine's scores, keeps what the store asks for, encodes and commits
shards while the engine runs.

The engine waits only if the codec or the disk is slower than the engine. It then waits at a queue
that is bounded in bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Self

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.runtime.interruption import safe_point
from logitcask.cache_format.writer import CacheWorker
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.distribution.keep import keep, keep_nothing
from logitcask.pipeline.types import PendingScores, Sequence

# A sequence with its scores, or its row of another cache; None if it has no kept position and was not
# scored.
Pair = tuple[Sequence, PendingScores | CachedSequence | None]

QUEUE_BYTES = 32 << 20
"""Answers that may wait: sixty thousand positions of 64 entries."""

_POLL_SECONDS = 0.2


class _Abandoned(Exception):
    """Ends the thread if the engine's side has failed or was interrupted."""


class WriterThread:
    """Writes the pairs of one shard after another. It is a context manager, which commits all
    shards, or, if the engine's side fails, the complete ones.

    Call ``begin_shard`` before a shard's pairs. The next call here raises an error of the thread.
    """

    def __init__(
        self, writer: CacheWorker, plan: Plan, store: StoreSettings, progress: Progress
    ) -> None:
        self._writer, self._plan, self._store, self._progress = writer, plan, store, progress
        self._changed = threading.Condition()
        # Indices of shards, each followed by its pairs; None is the end.
        self._queue: deque[int | Pair | None] = deque()
        self._held = 0
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            if error is None:
                self._queue.append(None)
            else:
                # Shards whose pairs have all arrived are still committed.
                complete = max(
                    (at for at, item in enumerate(self._queue) if isinstance(item, int)), default=-1
                )
                while len(self._queue) > complete + 1:
                    self._queue.pop()
                self._abandoned = True
            self._changed.notify_all()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def begin_shard(self, index: int) -> None:
        """Begins shard ``index`` for the next pairs; the one before is complete."""
        self._put(index)

    def append(self, pair: Pair) -> None:
        """Adds a pair, waiting while the queue is full."""
        self._put(pair)

    def check(self) -> None:
        """A safe point; also raises an error of the thread."""
        safe_point()
        if self._error is not None:
            raise self._error

    def _put(self, item: int | Pair) -> None:
        size = _size(item)
        with self._changed:
            # A result larger than the whole queue must pass, too.
            while self._held and self._held + size > QUEUE_BYTES and self._error is None:
                self._changed.wait(_POLL_SECONDS)
                safe_point()
            self.check()
            self._queue.append(item)
            self._held += size
            if not isinstance(item, int):
                self._progress.counts.queued_sequences += 1
            self._progress.counts.queued_bytes = self._held
            self._changed.notify_all()

    def _take(self) -> int | Pair | None:
        with self._changed:
            while not self._queue and not self._abandoned:
                self._changed.wait()
            if not self._queue:
                raise _Abandoned
            return self._queue.popleft()

    def _done(self, pair: Pair) -> None:
        with self._changed:
            self._held -= _size(pair)
            self._progress.counts.queued_sequences -= 1
            self._progress.counts.queued_bytes = self._held
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            item = self._take()
            while item is not None:
                assert isinstance(item, int)
                item = self._write_shard(item)
        except _Abandoned:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._queue.clear()
                self._changed.notify_all()

    def _write_shard(self, index: int) -> int | None:
        """Writes and commits a shard; returns the item after its last pair."""
        counts = self._progress.counts
        tokens, size = counts.written_tokens, counts.written_bytes
        rows = self._plan.shards[index].sequences_per_batch
        with self._writer.shard(index, sequences_per_batch=rows) as shard:
            while isinstance(pair := self._take(), tuple):
                shard.append(kept(pair, self._store), rounded=isinstance(pair[1], CachedSequence))
                counts.written_tokens, counts.written_bytes = (
                    tokens + shard.flushed_tokens,
                    size + shard.flushed_bytes,
                )
                self._done(pair)
        entry = self._writer.committed[index]
        counts.written_tokens, counts.written_bytes = tokens + entry.tokens, size + entry.bytes
        self._progress.committed(index, entry)
        return pair


def kept(pair: Pair, store: StoreSettings) -> CachedSequence:
    """The stored form of a sequence."""
    sequence, answer = pair
    if isinstance(answer, CachedSequence):
        return answer
    return (
        keep_nothing(sequence, store) if answer is None else keep(sequence, answer.scored(), store)
    )


def _size(item: int | Pair) -> int:
    if not isinstance(item, tuple) or item[1] is None:
        return 0
    return _bytes(item[1]) if isinstance(item[1], CachedSequence) else item[1].nbytes


def _bytes(row: CachedSequence) -> int:
    """Approximate bytes of a row of another cache in memory."""
    return row.ids.nbytes + row.logprobs.nbytes + 32 * len(row.input_ids)
