"""Ctrl-C and SIGTERM while a teacher scores: they take effect at the next safe point, not in the
middle of an engine's step.

Code that works in steps calls ``safe_point`` between them. A second signal takes effect at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked = threading.Event()


@contextlib.contextmanager
def at_safe_points() -> Iterator[None]:
    """A context, for the main thread, in which the first signal makes ``safe_point`` raise
    KeyboardInterrupt and has no other effect.
    """
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()

    before = [signal.signal(number, ask) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
        _asked.clear()


def safe_point() -> None:
    """A safe point: raises KeyboardInterrupt if a signal has arrived."""
    if _asked.is_set():
        raise KeyboardInterrupt
