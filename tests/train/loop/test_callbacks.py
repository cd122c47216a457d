"""What each callback tells, and when."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from logitcask.train.loop.callbacks import (
    FindBest,
    LogWhenSaving,
    Progress,
    TellEpoch,
    TellObjective,
)


def state(step=3, steps=10, **fields):
    return TrainerState(global_step=step, max_steps=steps, **fields)


def arguments(**fields):
    return SimpleNamespace(**{"save_strategy": SaveStrategy.STEPS, "disable_tqdm": False, **fields})


@pytest.mark.parametrize(
    ("control", "save_strategy", "step", "logged"),
    [
        ({}, SaveStrategy.STEPS, 3, False),
        ({"should_save": True}, SaveStrategy.STEPS, 3, True),
        ({"should_evaluate": True}, SaveStrategy.STEPS, 3, False),
        # The best student is saved, if it is one, after the evaluation: too late to log.
        ({"should_evaluate": True}, SaveStrategy.BEST, 3, True),
        ({}, SaveStrategy.STEPS, 10, True),
    ],
)
def test_losses_are_logged_before_anything_is_saved(control, save_strategy, step, logged):
    asked = TrainerControl(**control)
    LogWhenSaving().on_step_end(arguments(save_strategy=save_strategy), state(step), asked)
    assert asked.should_log == logged
    at_epochs_end = TrainerControl(**control)
    LogWhenSaving().on_epoch_end(arguments(save_strategy=save_strategy), state(3), at_epochs_end)
    assert at_epochs_end.should_log == (logged and bool(control))


class Recorded:
    """An objective that writes down what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, step, steps):
        self.told.append((step, steps))

    def load_state_dict(self, states):
        self.told.append(states)


def test_the_objective_goes_on_from_the_checkpoint_and_is_told_every_step():
    objective, ended = Recorded(), []
    tell = TellObjective(objective, lambda: ended.append(True))
    tell.on_train_begin(arguments(), state(), TrainerControl())
    assert objective.told == []
    resumed = state(stateful_callbacks={"objective": {"taid": {"t": 0.4}}})
    tell.on_train_begin(arguments(), resumed, TrainerControl())
    tell.on_step_begin(arguments(), state(7), TrainerControl())
    assert objective.told == [{"taid": {"t": 0.4}}, (7, 10)]
    assert not ended
    tell.on_step_end(arguments(), state(8), TrainerControl())
    assert ended == [True]


def test_the_loader_of_the_epoch_that_begins_is_told():
    told = []
    TellEpoch(told.append).on_epoch_begin(
        arguments(), state(), TrainerControl(), train_dataloader="the loader", eval_dataloader="x"
    )
    assert told == ["the loader"]


def test_the_best_student_is_looked_for_where_it_is_now():
    found = state(best_model_checkpoint="/before/the/move/checkpoint-4")
    FindBest("/now/checkpoint-4").on_train_begin(arguments(), found, TrainerControl())
    assert found.best_model_checkpoint == "/now/checkpoint-4"


def test_the_bar_goes_on_where_the_training_does_and_shows_the_losses(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress({"forward_kl": "unbiased"})
    bar.on_train_begin(arguments(), state(4), TrainerControl())
    bar.on_step_end(arguments(), state(6), TrainerControl())
    logs = {"loss": 1.0, "loss_forward_kl": 0.25, "data_wait": 0.5}
    bar.on_log(arguments(), state(6), TrainerControl(), logs)
    bar.on_train_end(arguments(), state(10), TrainerControl())
    shown = capsys.readouterr().err.split("\r")
    assert "4/10" in shown[1]
    assert "6/10" in shown[-1]
    assert "forward_kl 0.250 (estimate)]" in shown[-1]
    bar.close()  # again: nothing to do


@pytest.mark.parametrize(
    ("args", "fields"),
    [({"disable_tqdm": True}, {}), ({}, {"is_world_process_zero": False})],
)
def test_there_is_no_bar_where_nobody_looks(args, fields, capsys):
    bar = Progress()
    bar.on_train_begin(arguments(**args), state(**fields), TrainerControl())
    bar.on_step_end(arguments(), state(4), TrainerControl())
    bar.on_log(arguments(), state(4), TrainerControl(), {"loss": 1.0})
    bar.on_train_end(arguments(), state(), TrainerControl())
    assert capsys.readouterr().err == ""
