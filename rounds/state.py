"""``state.json``: what a run of rounds has finished. It is written at every hand-over, after the
stage's own files are on disk.

A stage that was killed is run again. Its command goes on where it was, or finds itself finished.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from logitcask.cache_format import CacheReader
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import load_state, write_durably
from logitcask.cache_format.errors import LogitcaskError, UserError

STATE = "state.json"

_MAY_CHANGE = (
    *("teacher.route", "teacher.batch_tokens", "teacher.tensor_parallel_size"),
    *("store.shard_tokens", "store.compression_level", "data.on_bad_rows"),
    "data.generate.writer_engine.tensor_parallel_size",
)
"""Fields of the teacher config that change no cache, such as those that a message about too little
memory advises to lower.
"""


class Done(BaseModel):
    """A finished stage, and what it is recognised by.

    stage:       ``text``, ``start``, ``write-1``, ``splice-1-2``, ``train-1``, ...
    fingerprint: of its cache, and content_sha256 of that; or, of a training, the sha256 of the
                 last checkpoint's trainer_state.json; or of the prompts, that of their file.
    seconds:     of its command. handover: from the end of the command before. starts: how often the
                 command was started. figures: of the report.
    weights_sha256: of the student that a training has left; None in a state of an earlier version.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    fingerprint: str
    content_sha256: str | None = None
    seconds: float
    handover: float
    starts: int
    peak_bytes: int
    figures: dict[str, Any]
    weights_sha256: str | None = None

    @property
    def is_training(self) -> bool:
        return self.stage == "start" or self.stage.startswith("train-")


class State(BaseModel):
    """settings: everything that may not change between starts. horizons: the length of the
    schedule in each round, fixed when the round begins. starts: of the unfinished stage.
    """

    settings: dict[str, Any]
    horizons: dict[str, int] = {}
    done: list[Done] = []
    starts: dict[str, int] = {}

    def of(self, stage: str) -> Done | None:
        """The finished stage of this name."""
        return next((each for each in self.done if each.stage == stage), None)

    @property
    def rounds(self) -> int:
        """Number of finished rounds."""
        return sum(each.stage.startswith("train-") for each in self.done)

    @property
    def begun(self) -> int:
        """Number of rounds that have begun."""
        return sum(name != "0" for name in self.horizons)

    def save(self, folder: Path) -> None:
        write_durably(folder / STATE, self.model_dump_json(indent=1))


def load(folder: Path, settings: dict[str, Any]) -> State:
    """The state in ``folder``, or a new one. Raises UserError for a run with other settings."""
    if not (folder / STATE).exists():
        ours = {f"{STATE}.tmp"}  # of a run that was killed at its first write
        taken = sorted(
            each.name
            for each in folder.iterdir()
            if not each.name.startswith(".") and each.name not in ours
        )
        if taken:
            raise UserError(
                f"{folder} has files that are not of a run of rounds ({', '.join(taken[:3])}); choose an empty or new folder as "
                "output"
            )
        return State(settings=settings)
    state = load_state(State, folder / STATE)
    before, now = _compared(state.settings), _compared(settings)
    if before != now:
        raise UserError(
            f"{folder} holds rounds with other settings: {describe_difference(before, now)}; go back to them, "
            "begin afresh with --restart, or choose another output"
        )
    return state


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` without the fields that may change between starts, and those of the rounds that
    are unset, which an earlier version may not have had.
    """
    found = deepcopy(settings)
    found["rounds"] = {name: each for name, each in found["rounds"].items() if each is not None}
    for name in _MAY_CHANGE:
        *parts, last = name.split(".")
        inside = found["teacher_config"]
        for part in parts:
            inside = inside.get(part) if isinstance(inside, dict) else None
        if isinstance(inside, dict):
            inside.pop(last, None)
    return found


def check_cache(done: Done, path: str | Path, folder: Path) -> None:
    """Raises UserError if the cache of a finished stage is gone, or another one is in its place."""
    ways_out = f"put it back, or begin afresh with --restart ({folder})"
    try:
        manifest = CacheReader(path).manifest
    except LogitcaskError as error:
        raise UserError(
            f"the cache of {done.stage}, {path}, with the fingerprint {done.fingerprint[:16]}, cannot be read: {error}; {ways_out}"
        ) from error
    found = (manifest.fingerprint, manifest.content_sha256)
    if found != (done.fingerprint, done.content_sha256):
        what = (
            f"its fingerprint is {found[0][:16]}, expected {done.fingerprint[:16]}"
            if found[0] != done.fingerprint
            else f"with the fingerprint {found[0][:16]}, but other content ({found[1][:16]}, expected "
            f"{(done.content_sha256 or '')[:16]})"
        )
        raise UserError(f"{path} is another cache than {done.stage} has made: {what}; {ways_out}")


def file_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_file(done: Done, file: Path, folder: Path) -> None:
    """Raises UserError if the file of a finished stage is gone, or another one is in its place."""
    ways_out = f"put it back, or begin afresh with --restart ({folder})"
    if not file.is_file():
        raise UserError(f"the file of {done.stage}, {file}, is gone; {ways_out}")
    if (found := file_sha256(file)) != done.fingerprint:
        raise UserError(
            f"{file} is not as {done.stage} has written it: its sha256 is {found[:16]}, expected {done.fingerprint[:16]}; {ways_out}"
        )


def checkpoint_sha256(checkpoint: Path) -> str:
    """What a checkpoint is recognised by: the sha256 of its log and counters."""
    return file_sha256(checkpoint / "trainer_state.json")


def check_checkpoint(done: Done, checkpoint: Path, folder: Path) -> None:
    """Raises UserError if the checkpoint of a finished training is gone, or is another one."""
    ways_out = f"put it back, or begin afresh with --restart ({folder})"
    if not (checkpoint / "trainer_state.json").is_file():
        raise UserError(
            f"{checkpoint}, from which the training goes on, is gone or incomplete; {ways_out}"
        )
    if checkpoint_sha256(checkpoint) != done.fingerprint:
        raise UserError(
            f"{checkpoint} is not the checkpoint in which {done.stage} has ended: its trainer_state.json differs; {ways_out}"
        )


def weights_sha256(model: Path) -> str:
    """sha256 over the names and the hashes of a student's weight files and its config."""
    files = sorted([*model.glob("*.safetensors"), *model.glob("config.json")])
    names = "".join(f"{each.name} {file_sha256(each)}\n" for each in files)
    return hashlib.sha256(names.encode()).hexdigest()


def check_student(done: Done, model: Path, folder: Path) -> None:
    """Raises UserError if the student of a finished training has other weights now."""
    if done.weights_sha256 is not None and weights_sha256(model) != done.weights_sha256:
        raise UserError(
            f"{model} has other weights than those that {done.stage} has left; put them back, or begin afresh with --restart "
            f"({folder})"
        )
