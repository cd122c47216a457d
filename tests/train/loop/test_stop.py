"""A signal saves the step at hand and stops, in all processes."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from logitcask.cache_format.runtime.interruption import Stopped
from logitcask.train.loop import stop as module
from logitcask.train.loop.stop import StopOnSignal, outlive_signals

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))


def state():
    return TrainerState(global_step=3, max_steps=10)


def test_without_a_signal_nothing_is_saved_and_nothing_stops():
    stop, control = StopOnSignal(), TrainerControl()
    with stop.watching():
        stop.on_step_end(ARGUMENTS, state(), control)
        stop.on_save(ARGUMENTS, state(), control)
    assert not control.should_save
    assert not stop.stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_the_step_is_logged_and_saved_and_then_it_stops(number, caplog):
    stop, control = StopOnSignal(), TrainerControl()
    caplog.set_level("INFO")
    with pytest.raises(Stopped) as stopped, stop.watching():
        os.kill(os.getpid(), number)
        stop.on_step_end(ARGUMENTS, state(), control)
        assert control.should_save
        assert control.should_log
        stop.on_save(ARGUMENTS, state(), control)
    assert (stopped.value.number, stopped.value.exit_code) == (number, 128 + number)
    assert caplog.messages == [f"{number.name}: the checkpoint of step 3 of 10 is saved"]


def test_a_signal_to_another_process_stops_this_one_too(monkeypatch):
    monkeypatch.setattr(module, "highest", lambda number, device: max(number, signal.SIGTERM))
    stop, control = StopOnSignal(), TrainerControl()
    stop.on_step_end(ARGUMENTS, state(), control)
    assert control.should_save
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.on_save(ARGUMENTS, state(), control)


def test_a_launcher_forwards_the_same_signal_and_a_later_one_ends_at_once(monkeypatch):
    monkeypatch.setattr(module, "processes", lambda: (0, 2))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(Stopped), StopOnSignal().watching():
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = 0.9
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 1.1
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


class Slow:
    """Batches that arrive while a signal comes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                # From another process than the loader's own, as a scheduler sends it.
                os.system(f"kill -{int(number)} {os.getpid()}")
            time.sleep(0.1)
        return index, os.getpid()


def test_a_loaders_worker_outlives_a_signal_to_the_group_and_not_its_parents():
    loader = DataLoader(
        Slow(), batch_size=1, num_workers=1, worker_init_fn=outlive_signals, prefetch_factor=2
    )
    batches = iter(loader)
    found = [next(batches) for _ in range(4)]
    assert [int(index) for index, _ in found] == [0, 1, 2, 3]
    (worker,) = batches._workers
    worker.terminate()
    worker.join(timeout=20)
    assert not worker.is_alive()
