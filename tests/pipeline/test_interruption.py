"""A signal takes effect at the next safe point, a second one at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from logitcask.pipeline.interruption import at_safe_points, safe_point

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_for_a_safe_point(number):
    before = handlers()
    with at_safe_points():
        safe_point()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            safe_point()
    assert handlers() == before


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_does_not(second):
    with at_safe_points():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)


def test_it_is_forgotten_at_the_end():
    """Whatever raised: a later build in this process begins without it."""
    before = handlers()
    with pytest.raises(ZeroDivisionError), at_safe_points():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    assert handlers() == before
    safe_point()


def test_another_thread_leaves_signals_alone():
    found = []
    before = handlers()

    def work():
        with at_safe_points():
            found.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
