"""Callbacks of the trainer, which notify parts of a training of steps, epochs and saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.train.exactness_words import IN_A_WORD
from logitcask.train.loop.objective import Objective
from logitcask.train.losses.base import Exactness


class LogWhenSaving(TrainerCallback):
    """Writes the averaged losses to the log at every checkpoint and at the end, so that a resumed
    log equals an uninterrupted one.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _may_save(args, control) or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _may_save(args, control):
            control.should_log = True


def _may_save(args: TrainingArguments, control: TrainerControl) -> bool:
    # Only the evaluation, which comes after logging, shows whether a student is the best so far.
    return control.should_save or (
        args.save_strategy == SaveStrategy.BEST and control.should_evaluate
    )


class TellEpoch(TrainerCallback):
    """Sets the epoch of the data's order, also if the training resumes inside an epoch."""

    def __init__(self, tell: Callable[[DataLoader], None]) -> None:
        self._tell = tell

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(kwargs["train_dataloader"])


class TellEvaluation(TrainerCallback):
    """Calls ``tell`` after every evaluation, in every process."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell()


class FindBest(TrainerCallback):
    """Sets the path of the best student, which Trainer forgets if the recorded path is gone."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.best_model_checkpoint = self._folder


class TellObjective(TrainerCallback):
    """Tells the objective the current step, and saves its state in trainer_state.json."""

    def __init__(self, objective: Objective, end_step: Callable[[], None]) -> None:
        self._objective, self._end_step = objective, end_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "objective" in state.stateful_callbacks:
            self._objective.load_state_dict(state.stateful_callbacks["objective"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._objective.begin(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_step()


class Progress(TrainerCallback):
    """One progress bar for the whole training, with the newest losses and their ``exactness``."""

    def __init__(self, exactness: dict[str, Exactness] | None = None) -> None:
        self._kinds = {name: f" ({IN_A_WORD[kind]})" for name, kind in (exactness or {}).items()}
        self._bar: ProgressBar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = ProgressBar(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            parts = {
                name.removeprefix("loss_"): value
                for name, value in logs.items()
                if name.startswith("loss_")
            }
            self._bar.set_postfix_str(
                ", ".join(
                    f"{name} {value:.3f}{self._kinds.get(name, '')}"
                    for name, value in parts.items()
                )
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
