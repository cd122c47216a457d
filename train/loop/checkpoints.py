"""The cache of a checkpoint, and the checkpoint from which a run resumes.

``trainer_state.json``, the last file that Trainer writes, holds the fingerprints of the caches, so
every complete checkpoint has them. They are needed because optimiser states and data orders are
valid only for their own cache.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from logitcask.cache_format.errors import UserError
from logitcask.train.distributed import processes

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"


class CacheStamp(TrainerCallback, ExportableState):
    """Puts the fingerprints of a run's caches into each of its checkpoints."""

    def __init__(self, fingerprints: tuple[str, ...]) -> None:
        self._fingerprints = fingerprints

    def state(self) -> dict[str, Any]:
        """The state that Trainer saves under this class's name in ``stateful_callbacks``."""
        return {
            "args": {"fingerprints": list(self._fingerprints)},
            "attributes": {"processes": processes()[1]},
        }


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``. Removes incomplete ones."""
    last: tuple[int, Path] | None = None
    for folder in output.glob("checkpoint-*"):
        state = read_state(folder)
        if state is None:
            shutil.rmtree(folder)
            continue
        last = max(last or (state["global_step"], folder), (state["global_step"], folder))
    return last[1] if last else None


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint with all its files."""
    return read_state(folder) is not None


def named_checkpoint(name: str, fingerprints: tuple[str, ...], steps: int) -> Path:
    """The checkpoint that ``training.resume_from_checkpoint`` names, of a run on the same caches.

    Raises UserError if it is not a checkpoint, if it belongs to another cache, or if it has already
    made this run's ``steps``.
    """
    folder = Path(name).expanduser()
    state = read_state(folder)
    if state is None:
        raise UserError(
            f"training.resume_from_checkpoint is {name}, which is no complete checkpoint (no {_STATE}); "
            "name a checkpoint-N folder, or leave it out: a run goes on from its own last one"
        )
    stamp = _stamp(state).get("args", {}).get("fingerprints")
    if stamp is None:
        raise UserError(
            f"{name} does not say which cache it was trained from; only checkpoints of train-student do"
        )
    if tuple(stamp) != fingerprints:
        raise UserError(
            f"{name} was trained from another cache: fingerprint {_short(stamp)}, this run's is {_short(fingerprints)}; "
            "go on with that cache, or start from the checkpoint's weights with student.model"
        )
    if state["global_step"] >= steps:
        raise UserError(
            f"{name} has made {state['global_step']} steps, and this run is to make {steps} in all, so nothing is left to train; "
            "raise training.max_steps or training.num_train_epochs"
        )
    return folder


def best_checkpoint(recorded: str, output: Path) -> Path:
    """Path of the best student so far. ``recorded`` is its path at the time of saving; the run may
    have moved since then.

    Raises UserError if it is missing, because the run would end with another student.
    """
    for folder in (output / Path(recorded).name, Path(recorded)):
        if read_state(folder) is not None:
            return folder
    raise UserError(
        f"the best student so far was saved in {Path(recorded).name}, which is no complete checkpoint in {output}; put it back, "
        "begin afresh with --restart, or choose another training.output_dir without training.load_best_model_at_end"
    )


def warn_of_other_batches(checkpoint: Path) -> None:
    """Warns if ``checkpoint`` is of another number of processes: they divided the data."""
    before = _stamp(read_state(checkpoint) or {}).get("attributes", {}).get("processes")
    now = processes()[1]
    if before not in (None, now):
        log.warning(
            "%s was made by %d process(es), and %d go on: from there on the batches are others than they would have been",
            checkpoint,
            before,
            now,
        )


def _stamp(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state.get("stateful_callbacks", {}).get(CacheStamp.__name__, {})
    return found


def read_state(folder: Path) -> dict[str, Any] | None:
    """The content of trainer_state.json; None for an incomplete checkpoint."""
    try:
        state = json.loads((folder / _STATE).read_text())
        return state if "global_step" in state else None
    except (OSError, ValueError):
        return None


def _short(fingerprints: Any) -> str:
    return ", ".join(str(each)[:12] for each in fingerprints)
