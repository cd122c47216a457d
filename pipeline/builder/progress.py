"""Progress and speed of a build: a line on the terminal, and JSON lines in a log file.

Every record of the log has ``event`` and ``time`` (ISO 8601, UTC). ``start`` describes the work and
the engine, ``progress`` comes every few seconds, and ``shard`` comes with every commit. The last
event is ``finish``, ``interrupted`` or ``failed``. A build that was killed has no last event, and
the next build appends to the same file.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from logitcask.cache_format import UserError
from logitcask.cache_format.manifest import Header, ShardEntry
from logitcask.cache_format.redact import without_secrets
from logitcask.cache_format.runtime.progress import ProgressBar

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
# The time left is computed from the speed of the last records.
_RECENT = 12


@dataclass
class Counts:
    """Counts since the start of this run, by the engine's thread (first three) and the writer's."""

    tokens: int = 0
    scored_tokens: int = 0
    engine_seconds: float = 0.0
    queued_sequences: int = 0
    queued_bytes: int = 0
    written_tokens: int = 0
    written_bytes: int = 0
    shards: int = 0


class Progress:
    """Progress of a run that scores ``tokens`` tokens in ``shards`` shards. It is a context
    manager, which writes the last event of the log.

    bar: whether there is a line on the terminal. file: the log to append to, or None. Raises
    UserError, on entering, if the log cannot be opened.
    """

    def __init__(
        self, tokens: int = 0, shards: int = 0, *, bar: bool = False, file: Path | None = None
    ) -> None:
        self.tokens, self.shards = tokens, shards
        self.counts = Counts()
        self._started = self._last = self._last_shard = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._started, 0)], maxlen=_RECENT)
        self._file: IO[str] | None = None
        self._path = file
        self._bar = ProgressBar(
            total=tokens,
            unit="tok",
            unit_scale=True,
            desc="teacher",
            dynamic_ncols=True,
            disable=not bar,
            leave=True,
        )

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"cannot write the log {self._path}: {error.strerror}; set log=FILE, or log=false for none"
                ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if error is None:
            self.record("finish", **self._figures())
        elif isinstance(error, KeyboardInterrupt):
            self.record("interrupted", **self._figures())
        else:
            self.record("failed", error=str(error), **self._figures())
        if self._file is not None:
            self._file.close()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def answered(self, tokens: int, *, scored: bool, engine_seconds: float) -> None:
        """Counts a sequence, scored after a wait of ``engine_seconds`` or not scored."""
        counts = self.counts
        counts.tokens += tokens
        counts.scored_tokens += tokens if scored else 0
        counts.engine_seconds += engine_seconds
        self._bar.update(tokens)
        if (now := time.monotonic()) - self._last >= EVERY_SECONDS:
            self._last = now
            self._recent.append((now, counts.tokens))
            self.record("progress", **self._figures())
            self._bar.set_postfix_str(self._line(), refresh=False)

    def started(self, output: Path | str, header: Header, shards_done: int) -> None:
        """Logs the start of a build; ``shards_done`` shards come from earlier runs."""
        self.record(
            "start",
            output=str(output),
            created_by=header.created_by,
            teacher=header.teacher.model_dump(mode="json"),
            tokens=self.tokens,
            shards=self.shards,
            shards_done=shards_done,
        )

    def committed(self, index: int, entry: ShardEntry) -> None:
        """Logs that shard ``index`` is committed."""
        self.counts.shards += 1
        now = time.monotonic()
        self.record(
            "shard",
            shard=index,
            sequences=entry.sequences,
            tokens=entry.tokens,
            positions=entry.positions,
            bytes=entry.bytes,
            seconds=round(now - self._last_shard, 3),
        )
        self._last_shard = now
        self._bar.set_postfix_str(self._line(), refresh=False)

    def record(self, event: str, **fields: Any) -> None:
        """Appends a line to the log. If that fails, the log ends, and the build continues."""
        if self._file is None:
            return
        line = {
            "event": event,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **fields,
        }
        try:
            self._file.write(json.dumps(without_secrets(line)) + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None
            log.warning("the log %s ends here: %s", self._path, error.strerror)

    def _figures(self) -> dict[str, Any]:
        counts, seconds = self.counts, self.seconds
        (then, before), now = self._recent[0], time.monotonic()
        speed = (counts.tokens - before) / max(now - then, 1e-9)
        return {
            "seconds": round(seconds, 3),
            "tokens": counts.tokens,
            "tokens_total": self.tokens,
            "scored_tokens": counts.scored_tokens,
            "tokens_per_second": round(speed, 1),
            "eta_seconds": round((self.tokens - counts.tokens) / speed, 1) if speed else None,
            "shards": counts.shards,
            "shards_total": self.shards,
            "queue_sequences": counts.queued_sequences,
            "queue_bytes": counts.queued_bytes,
            "bytes_per_token": round(counts.written_bytes / counts.written_tokens, 2)
            if counts.written_tokens
            else None,
            "engine_share": round(counts.engine_seconds / max(seconds, 1e-9), 4),
            "peak_rss_bytes": _peak_rss(),
        }

    def _line(self) -> str:
        """The figures that the bar does not show itself: it shows tokens, speed and time left."""
        figures = self._figures()
        size = (
            ""
            if figures["bytes_per_token"] is None
            else f"{figures['bytes_per_token']:.1f} B/tok, "
        )
        return (
            f"{size}engine {figures['engine_share']:.0%}, {figures['queue_sequences']} queued, "
            f"shard {figures['shards']}/{figures['shards_total']}"
        )


def _peak_rss() -> int:
    """Peak resident memory in bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
