"""Ctrl-C and SIGTERM: a command ends at its next safe point, or at once if it has none.

Code that works in steps enters ``at_safe_points`` and calls ``safe_point`` between the steps. A
signal then takes effect there, not in the middle of an engine's or an optimizer's step. A second
signal takes effect at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_first: tuple[int, float] | None = None
"""Number and time of the first signal inside ``at_safe_points``."""


class Stopped(KeyboardInterrupt):
    """The end that a signal asks for. ``exit_code`` is 128 + its number, as shells report it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


@contextlib.contextmanager
def at_safe_points(forwarded_within: float = 0.0) -> Iterator[None]:
    """A context, for the main thread, in which the first signal makes ``safe_point`` raise Stopped
    and has no other effect. The end of the context is a safe point, too.

    forwarded_within: seconds after the first signal in which others count as the same one. A
    launcher forwards a signal that its processes have received already.
    """
    global _first

    def ask(number: int, frame: FrameType | None) -> None:
        global _first
        now = time.monotonic()
        if _first is None:
            _first = (number, now)
        elif now - _first[1] >= forwarded_within:
            raise Stopped(number)

    try:
        with _handling(ask, _SIGNALS):
            yield
            safe_point()
    finally:
        _first = None


@contextlib.contextmanager
def sigterm_at_once() -> Iterator[None]:
    """A context, for the main thread, in which SIGTERM raises Stopped, as Ctrl-C raises
    KeyboardInterrupt.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handling(stop, (signal.SIGTERM,)):
        yield


@contextlib.contextmanager
def signals_given_to(send: Callable[[int], object]) -> Iterator[None]:
    """A context, for the main thread, in which a signal calls ``send`` with its number and has no
    other effect, such as for a process that ends another one first. Its end raises Stopped if a
    signal has arrived.
    """
    first = 0

    def give(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = first or number
        send(number)

    with _handling(give, _SIGNALS):
        yield
    if first:
        raise Stopped(first)


def asked_to_stop() -> int:
    """Number of the signal that has arrived inside ``at_safe_points``; 0 if none has."""
    return _first[0] if _first else 0


def safe_point() -> None:
    """A safe point: raises Stopped if a signal has arrived."""
    if number := asked_to_stop():
        raise Stopped(number)


def exit_on_signal(code: int) -> None:
    """From here on, a signal ends the process with ``code``, for a process that is leaving."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    for number in _SIGNALS:
        signal.signal(number, leave)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any], signals: Any) -> Iterator[None]:
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield
    finally:
        for number, earlier in zip(signals, before, strict=True):
            signal.signal(number, earlier)
