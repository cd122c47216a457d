"""The disk space of a run's checkpoints, said before the first step."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint: its weights, and the optimizer's states, None if they are not known
    before the first step.
    """

    weights: int
    optimizer: int | None

    @property
    def bytes(self) -> int:
        return self.weights + (self.optimizer or 0)

    def __str__(self) -> str:
        states = "unknown" if self.optimizer is None else _size(self.optimizer)
        return f"{_size(self.bytes)} (weights {_size(self.weights)}, optimizer {states})"


def checkpoint_size(
    student: PreTrainedModel, optimizer: Optimizer, arguments: TrainingArguments
) -> CheckpointSize:
    """The size of a checkpoint of ``student``.

    optimizer: that of ``check_optimizer``, on a dummy weight, which this function trains for a
    step. For optimizers that need the model it is plain SGD, which says nothing.
    """
    whole = sum(each.nbytes for each in student.parameters())
    trained = sum(each.nbytes for each in student.parameters() if each.requires_grad)
    known = not isinstance(optimizer, SGD) or arguments.optim == OptimizerNames.SGD
    share = _states_per_byte(optimizer) if known else None
    return CheckpointSize(
        weights=trained if hasattr(student, "get_base_model") else whole,
        optimizer=None if share is None else round(share * trained),
    )


def say_disk_space(
    size: CheckpointSize, student: Any, arguments: TrainingArguments, steps: int, output: Path
) -> None:
    """Logs the space that the checkpoints take and the space that is free. Warns if it is not
    enough for a whole run.
    """
    count, free = checkpoints(arguments, steps), shutil.disk_usage(output).free
    kept = f"at most {count} at once" if count else "only after a signal"
    log.info("checkpoints: about %s each, %s; %s has %s free", size, kept, output, _size(free))
    needed = count * size.bytes + sum(each.nbytes for each in student.parameters())
    if needed > free:
        log.warning(
            "%s has %s free, and %d checkpoint(s) and the student are about %s; make room, or lower "
            "training.save_total_limit",
            output,
            _size(free),
            count,
            _size(needed),
        )


def checkpoints(arguments: TrainingArguments, steps: int) -> int:
    """Number of checkpoints that a run of ``steps`` steps holds at once; with a limit, one more,
    because an old one is removed last.
    """
    if arguments.save_strategy == SaveStrategy.NO:
        return 0
    count = 1
    if arguments.save_strategy == SaveStrategy.STEPS:
        count = math.ceil(
            steps / max(1, arguments.save_steps * (steps if arguments.save_steps < 1 else 1))
        )
    elif arguments.save_strategy == SaveStrategy.EPOCH and arguments.max_steps <= 0:
        count = math.ceil(arguments.num_train_epochs)
    return min(count, (arguments.save_total_limit or count) + 1)


def _states_per_byte(optimizer: Optimizer) -> float | None:
    """Bytes of states per byte of weights, after one step; None if the optimizer makes no step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    try:
        optimizer.step()
    except Exception:  # every optimizer raises its own error, and here only a size is unknown
        return None
    states = [value for state in optimizer.state.values() for value in state.values()]
    stored = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return stored / sum(weight.nbytes for weight in weights)


def _size(count: int) -> str:
    return f"{tqdm.format_sizeof(count)}B".replace(".0B", "B")
