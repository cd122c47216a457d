"""A part of a longer training, as ``part`` of a config asks for it: it begins at a checkpoint of the
part before, has caches of its own, and ends at a step with a checkpoint for the next part.

Optimizer, schedule and random state are those of the checkpoint. How far each cache has been read
is in the checkpoint too, so a cache that occurs in several parts is read on where it was left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from logitcask.cache_format.errors import UserError, first_line
from logitcask.train.config import PartConfig
from logitcask.train.loop.checkpoints import last_checkpoint, read_state


@dataclass(frozen=True)
class Part:
    """A part of a training.

    start:  the checkpoint of the part before; None for the first part. It is needed only until the
            part has a checkpoint of its own.
    first:  steps made before this part. until: steps made at its end.
    read:   number of units (sequences, or rows) read before this part, by the cache's fingerprint.
    """

    start: Path | None
    first: int
    until: int
    read: dict[str, int]


def part_of(config: PartConfig, output: Path, *, restart: bool) -> Part:
    """The part that ``config`` describes, in the run folder ``output``.

    Raises UserError if its checkpoint is missing, is not of a part, or is past this part's end.
    """
    start = config.start if config.start is None else config.start.expanduser()
    own = None if restart else last_checkpoint(output)
    if own is not None:
        stamp = _stamp(own)
        if stamp is not None:
            return Part(start, stamp["first"], config.until, dict(stamp["read"]))
    if start is None:
        return Part(None, 0, config.until, {})
    state = read_state(start)
    if state is None:
        raise UserError(
            f"part.start is {start}, which is no complete checkpoint; name the checkpoint-N folder in which the part before has ended"
        )
    stamp = _stamp(start)
    if stamp is None or state["global_step"] != stamp["until"]:
        raise UserError(
            f"part.start is {start}, a checkpoint of step {state['global_step']}, which is not the end of a part; name the "
            "checkpoint in which the part before has ended"
        )
    if state["global_step"] > config.until:
        raise UserError(
            f"part.start is {start}, which has made {state['global_step']} steps already, and part.until is {config.until}; "
            "raise part.until"
        )
    read = dict(stamp["read"])
    for fingerprint, units in stamp["drawn"].items():
        read[fingerprint] = read.get(fingerprint, 0) + units
    return Part(start, state["global_step"], config.until, read)


class PartEnd(TrainerCallback, ExportableState):
    """Ends the training at the last step of the part, with a log record and a checkpoint, and puts
    into each checkpoint what the next part needs of this one.

    drawn: units that the whole part reads, by the cache's fingerprint. units: those of the cache.
    """

    def __init__(self, part: Part, drawn: dict[str, int], units: dict[str, int]) -> None:
        self._part, self._drawn, self._units = part, drawn, units

    def state(self) -> dict[str, Any]:
        part = self._part
        attributes = {"first": part.first, "until": part.until, "read": part.read}
        read = {"drawn": self._drawn, "units": self._units}
        return {"args": {}, "attributes": {**attributes, **read}}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step >= self._part.until:
            control.should_log = control.should_save = control.should_training_stop = True


def check_weights(checkpoint: Path, student: nn.Module) -> None:
    """Raises UserError unless the weights of ``checkpoint`` have the names and shapes of the
    student's. Weights of adapters are left to peft.
    """
    files = sorted(checkpoint.glob("model*.safetensors"))
    own = student.state_dict()
    stored: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                names = list(weights.keys())
                shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is damaged ({first_line(error)}); put the checkpoint back, or begin the part before afresh"
            ) from error
        for name, shape in shapes.items():
            if name not in own or tuple(own[name].shape) != shape:
                found = "no such weight" if name not in own else str(tuple(own[name].shape))
                raise UserError(
                    f"{checkpoint} is a checkpoint of another architecture: its {name} has the shape {shape}, and the student "
                    f"has {found}; put the right checkpoint there, or begin the part before afresh"
                )
        stored |= shapes.keys()
    # Tied weights are stored once.
    held = {own[name].data_ptr() for name in stored}
    missing = [name for name, weight in own.items() if weight.data_ptr() not in held]
    if files and missing:
        raise UserError(
            f"{checkpoint} is a checkpoint of another architecture: it has no {missing[0]}; put the right checkpoint there, "
            "or begin the part before afresh"
        )


def _stamp(checkpoint: Path) -> dict[str, Any] | None:
    """What ``PartEnd`` put into a checkpoint; None if it is not of a part."""
    state = read_state(checkpoint) or {}
    found = state.get("stateful_callbacks", {}).get(PartEnd.__name__, {})
    return found.get("attributes")
