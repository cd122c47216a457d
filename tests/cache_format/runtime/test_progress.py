"""A bar on a terminal, a line a minute elsewhere, nothing with --quiet."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from logitcask.cache_format.runtime import progress
from logitcask.cache_format.runtime.progress import ProgressBar

_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_a_minute(clock, caplog, capsys):
    """Whatever is updated, described or reset in between, and nothing at the end."""
    caplog.set_level(logging.INFO)
    with ProgressBar(total=1000, unit="seq", desc="audit") as bar:
        for _ in range(5):
            clock[0] += 20
            bar.update(100)
            bar.set_postfix_str("loss 0.5")
    assert caplog.messages == [
        "audit: 300 of 1000 seq, 5.00seq/s, 01:00 so far, 02:20 left, loss 0.5"
    ]
    assert capsys.readouterr().err == ""


def test_work_without_a_total(clock, caplog):
    caplog.set_level(logging.INFO)
    with ProgressBar(unit="tok", unit_scale=True, desc="tokenise") as bar:
        clock[0] += 100
        bar.update(250_000)
    assert caplog.messages == ["tokenise: 250k tok, 2.50ktok/s, 01:40 so far"]


def test_a_loop_and_a_new_total(clock, caplog):
    caplog.set_level(logging.INFO)
    for _ in ProgressBar(range(6), desc="loop", unit="round"):
        clock[0] += 30
    with ProgressBar(desc="push", unit="B") as bar:
        bar.reset(total=10)
        clock[0] += 61
        bar.update(4)
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "loop: 2 of 6 round",
        "loop: 4 of 6 round",
        "loop: 6 of 6 round",
        "push: 4 of 10 B",
    ]


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(total=10, desc="audit") as bar:
        bar.update(10)
    assert "audit: 100%" in capsys.readouterr().err
    assert not caplog.messages


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet(capsys, monkeypatch, clock, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    logger = logging.getLogger("logitcask")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ProgressBar(total=10) as bar:
            clock[0] += 2 * progress.EVERY_SECONDS
            bar.update(3)
        assert (bar.n, capsys.readouterr().err) == (0, "")
    finally:
        logger.setLevel(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_killed_in_a_bar_stops_no_other():
    child = _FORK.Process(target=lambda: (ProgressBar.get_lock().acquire(), _die()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    made = threading.Thread(target=lambda: ProgressBar(total=1).close(), daemon=True)
    made.start()
    made.join(60)
    assert not made.is_alive(), "the lock is held by a process that is dead"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_a_thread_draws_a_bar():
    with ProgressBar.get_lock():
        child = _FORK.Process(target=_draws_in_a_thread)
        child.start()
        child.join()
    assert child.exitcode == 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _draws_in_a_thread() -> None:
    """Ends with 0 once another thread than the one that was forked has made a bar."""
    made = threading.Thread(target=lambda: ProgressBar(total=1).close(), daemon=True)
    made.start()
    made.join(60)
    os._exit(made.is_alive())
