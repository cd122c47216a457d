"""A signal takes effect at the next safe point, a second one at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from logitcask.cache_format.runtime.interruption import (
    Stopped,
    asked_to_stop,
    at_safe_points,
    exit_on_signal,
    safe_point,
    sigterm_at_once,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_for_a_safe_point(number):
    before = handlers()
    with pytest.raises(Stopped) as stopped, at_safe_points():
        safe_point()
        os.kill(os.getpid(), number)
        assert asked_to_stop() == number
        safe_point()
        pytest.fail("no safe point")
    assert (stopped.value.number, stopped.value.exit_code) == (number, 128 + number)
    assert handlers() == before
    assert asked_to_stop() == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_the_end_is_a_safe_point(number):
    with pytest.raises(Stopped, match=number.name), at_safe_points():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_does_not_wait(second):
    with pytest.raises(Stopped, match=second.name), at_safe_points():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
        pytest.fail("it has waited")


def test_sigterm_at_once():
    before = handlers()
    with pytest.raises(Stopped, match="SIGTERM"), sigterm_at_once():
        assert handlers()[0] == before[0]
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it has waited")
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_leaving_process_keeps_its_exit_code(fork, number):
    def leaving():
        exit_on_signal(143)
        os.kill(os.getpid(), number)

    child = fork(leaving)
    child.join()
    assert child.exitcode == 143


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
