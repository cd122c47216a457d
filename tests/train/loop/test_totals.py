"""Running sums against means over the same numbers, computed at once."""

from __future__ import annotations

import math

import pytest
import torch

from logitcask.cache_format.errors import UserError
from logitcask.train.data.batch import Place
from logitcask.train.loop import totals
from logitcask.train.loop.totals import LogTotals, StepTotals


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test adds some."""
    now = [100.0]
    monkeypatch.setattr(totals.time, "monotonic", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


@pytest.fixture
def second_process(monkeypatch):
    """Another process that has the same sums, three times as large."""

    def gathered(mine):
        theirs = {
            kind: {name: 3 * value for name, value in sums.items()} for kind, sums in mine.items()
        }
        return [mine, theirs]

    monkeypatch.setattr(totals, "gathered", gathered)


def test_a_record_is_of_what_came_since_the_last(draw, clock):
    log = LogTotals(["a"])
    parts = [torch.rand(n, generator=draw) for n in (3, 5, 4)]
    for part in parts[:2]:
        log.add({"kl": part}, len(part))
    record = log.record(1)
    assert record["loss_kl"] == pytest.approx(torch.cat(parts[:2]).double().mean().item())
    assert record["positions"] == 8
    assert log.record(2) == {}
    log.add({"kl": parts[2]}, 4)
    record = log.record(3)
    assert record["loss_kl"] == pytest.approx(parts[2].double().mean().item())
    assert record["positions"] == 12


def test_means_are_over_all_positions_of_all_processes(clock, second_process):
    log = LogTotals(["a"])
    log.add({"kl": torch.tensor([1.0, 2.0])}, 2)
    record = log.record(1)
    assert record["loss_kl"] == pytest.approx((3 + 9) / (2 + 6))
    assert record["positions"] == 8


def test_positions_of_a_batch_go_to_the_cache_that_they_are_of(clock):
    log = LogTotals(["a", "b", "c"])
    layout = (Place(0, 9, 4, 2), Place(0, 9, 4, 1), Place(2, 9, 4, 3))
    objective = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    log.add({"kl": objective}, 6)
    log.add_by_cache(layout, objective)
    log.add_by_cache((Place(2, 5, 1, 1),), torch.tensor([30.0]))
    record = log.record(1)
    assert record["cache_a"] == pytest.approx(3)
    assert record["cache_c"] == pytest.approx(30)
    assert "cache_b" not in record


def test_a_resumed_log_counts_on_from_the_last_training_record(clock):
    log = LogTotals(["a"])
    history = [{"positions": 40, "seconds": 7.0}, {"positions": 90, "seconds": 20.0}, {"kl": 3.0}]
    log.resume(history)
    log.start()
    clock(5)
    log.add({"kl": torch.ones(10)}, 10)
    record = log.record(3)
    assert (record["positions"], record["seconds"]) == (100, 25.0)


def test_the_wait_for_data_is_a_share_of_the_time_since_the_last_record(clock):
    log = LogTotals(["a"])
    clock(10)
    log.waited(2)
    log.add({"kl": torch.ones(1)}, 1)
    assert log.record(1)["data_wait"] == pytest.approx(0.2)
    clock(30)
    log.leave_out(20)  # an evaluation
    log.waited(5)
    log.add({"kl": torch.ones(1)}, 1)
    assert log.record(2)["data_wait"] == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_ends_the_training(clock, value):
    log = LogTotals(["a"])
    log.add({"kl": torch.tensor([1.0]), "ce": torch.tensor([value])}, 1)
    with pytest.raises(UserError, match=f"loss_ce is {value} at step 7"):
        log.record(7)


def test_a_step_has_the_means_of_its_batches_over_all_processes():
    step = StepTotals(["taid"])
    device = torch.device("cpu")
    assert step.means(lambda sums: sums) is None
    step.add({"taid": torch.tensor([1.0, 2.0]), "ce": torch.ones(2)}, device)
    step.add({"taid": torch.tensor([6.0])}, device)
    other = torch.tensor([11.0, 2.0])
    assert step.means(lambda sums: sums + other) == {"taid": pytest.approx(20 / 5)}
    assert step.means(lambda sums: sums) is None


def test_a_step_without_positions_has_no_mean():
    step = StepTotals(["taid"])
    step.add({"taid": torch.ones(0)}, torch.device("cpu"))
    assert step.means(lambda sums: sums) == {}


def test_without_stateful_losses_nothing_is_added():
    step = StepTotals([])
    step.add({"ce": torch.ones(2)}, torch.device("cpu"))
    assert step.sums is None
