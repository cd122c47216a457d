"""Signs of life: small files that running processes touch, on a disk that machines may share.

A file counts as alive for ``EXPIRES`` seconds after its last touch. Both times come from the file
system, so the clocks of the machines do not matter. A killed process leaves its file behind, which
then expires.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 15.0
"""Seconds between two touches."""

EXPIRES = 120.0
"""Seconds without a touch after which a process counts as gone."""


def signature() -> dict[str, str | int]:
    """The process that writes a file, for messages and for comparing machines."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Touches ``file``, which exists, until the end of the context, in a thread."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(BEAT):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def marked(folder: Path, name: str) -> Iterator[None]:
    """A sign of life named ``NAME.UUID`` in ``folder`` while the context lasts. Without the right
    or the room to write there, there is none.
    """
    file = folder / f"{name}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(signature()))
    except OSError:
        yield
        return
    try:
        with beating(file):
            yield
    finally:
        with suppress(OSError):
            file.unlink()


def alive(folder: Path) -> set[str]:
    """The names for which ``marked`` signs in ``folder`` are alive. Expired ones are removed."""
    now, names = clock(folder), set[str]()
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                if now - file.stat().st_mtime < EXPIRES:
                    names.add(file.name.partition(".")[0])
                else:
                    file.unlink()
    return names


def clock(folder: Path) -> float:
    """The time by the clock of the file system of ``folder``; the machine's if it takes no file."""
    probe = folder / f".clock.{uuid.uuid4().hex}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now
