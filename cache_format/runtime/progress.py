"""Progress of long work: a bar on a terminal, elsewhere a line of the log every minute."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0


class ProgressBar(tqdm):
    """tqdm, if stderr is a terminal. Otherwise a log line every ``EVERY_SECONDS``, for files and
    schedulers, which show carriage returns as one endless line.

    It shows nothing where warnings are not logged (``--quiet``). Work that takes less than
    ``EVERY_SECONDS`` has no line.

    tqdm's own lock is shared with forked processes. If one of them is killed while it holds the
    lock, every other process waits for ever. The lock here is one of threads, new in each process.
    """

    _instances: ClassVar[WeakSet[Any]] = WeakSet()  # those that the lock guards
    monitor = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self._lines = not sys.stderr.isatty()
        self._said = time.monotonic()
        if self._lines:
            # Every update looks at the clock, because the speed may change.
            options |= {"mininterval": EVERY_SECONDS, "maxinterval": EVERY_SECONDS, "miniters": 0}
        hidden = not log.isEnabledFor(logging.WARNING)
        super().__init__(*args, **{**options, "disable": hidden or options.get("disable", False)})

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self._lines:
            return super().display(msg, pos)
        if (now := time.monotonic()) - self._said >= EVERY_SECONDS:
            self._said = now
            done = "{n_fmt} {unit}" if self.total is None else "{n_fmt} of {total_fmt} {unit}"
            left = "" if self.total is None else ", {remaining} left"
            self.bar_format = f"{{desc}}: {done}, {{rate_fmt}}, {{elapsed}} so far{left}{{postfix}}"
            log.info("%s", " ".join(str(self).split()))
        return True

    def close(self) -> None:
        if self._lines:
            self.sp = None  # tqdm then writes nothing: no last state, no carriage return
        super().close()


def _new_lock() -> None:
    ProgressBar.set_lock(threading.RLock())


_new_lock()
if hasattr(os, "register_at_fork"):  # a thread that exists only in the parent may hold it
    os.register_at_fork(after_in_child=_new_lock)
