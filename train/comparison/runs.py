"""Finished runs, read from their folders, and the text that each was judged on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from logitcask.cache_format.errors import UserError
from logitcask.train.output.held_out_file import HeldOutValues, read_held_out
from logitcask.train.output.metrics_file import RunMetrics
from logitcask.train.output.report import Log

_METRICS = "metrics.json"


class Judge(NamedTuple):
    """The held-out text of a run.

    key:   equal for runs that were judged on the same positions by the same distributions.
    words: the same for people.
    """

    key: str
    words: str


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run. label: the shortest end of its path that no other run has. log: the Trainer's
    log history. held_out: its values by sequence; None for runs of older versions.
    """

    label: str
    folder: Path
    metrics: RunMetrics
    log: Log
    held_out: HeldOutValues | None
    judge: Judge

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, or of all caches of a mixture."""
        cache = self.metrics["cache"]
        return round(cache["tokens"] * cache["bytes_per_token"])

    def judged_as(self, other: Run) -> bool:
        """Whether both runs were judged on the same text."""
        if self.judge.key != other.judge.key:
            return False
        if self.held_out is None or other.held_out is None:
            return True
        return self.held_out["parts"] == other.held_out["parts"]

    def paired_with(self, other: Run) -> bool:
        """Whether both runs have values of the same sequences."""
        known = self.held_out is not None and other.held_out is not None
        return known and self.judged_as(other)


def read_runs(names: Sequence[str]) -> list[Run]:
    """The runs in the folders ``names``. A folder of runs, such as that of a sweep or of rounds,
    stands for its finished runs. Raises UserError for others, and for less than two runs.
    """
    folders = [folder for name in names for folder in _folders(Path(name).expanduser())]
    places = [folder.resolve() for folder in folders]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise UserError(f"{folders[at]} is named twice; name each run once")
    if len(folders) < 2:
        raise UserError(
            f"found one run, {folders[0]}; expected two or more finished runs to compare"
        )
    return [_read(folder, label) for folder, label in zip(folders, labels_of(places), strict=True)]


def labels_of(places: Sequence[Path]) -> list[str]:
    """For each of different paths, its shortest end that no other path has."""
    found = []
    for place in places:
        length = 1
        while length < len(place.parts) and any(
            other.parts[-length:] == place.parts[-length:] for other in places if other != place
        ):
            length += 1
        found.append("/".join(place.parts[-length:]))
    return found


def chosen_base(name: str | None, runs: Sequence[Run]) -> int:
    """The number of the run ``name`` (a folder or a label); None: the first. Raises UserError if
    there is no such run.
    """
    if name is None:
        return 0
    place = Path(name).expanduser().resolve()
    for number, run in enumerate(runs):
        if run.folder.resolve() == place or run.label == name:
            return number
    raise UserError(
        f"--base is {name}, which is none of the compared runs; name one of {', '.join(run.label for run in runs)}"
    )


def _folders(folder: Path) -> list[Path]:
    if (folder / _METRICS).is_file():
        return [folder]
    below: Iterable[Path] = (*folder.glob(f"*/{_METRICS}"), *folder.glob(f"*/student/{_METRICS}"))
    found = sorted(file.parent for file in below)
    if found:
        return found
    if (folder / "run.json").is_file():
        raise UserError(
            f"{folder} is the folder of a run that is not finished (no {_METRICS}); end it with train-student first"
        )
    raise UserError(
        f"{folder} holds no finished run of train-student (no {_METRICS}); name the output_dir of a run"
    )


def _read(folder: Path, label: str) -> Run:
    try:
        metrics, log, identity = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in (_METRICS, "log.json", "run.json")
        )
        judge = _judge(metrics, identity)
        float(metrics["after"]["ce"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} holds no run that can be read ({type(error).__name__}: {error}); expected {_METRICS}, log.json and run.json "
            "as train-student writes them"
        ) from error
    return Run(label, folder, metrics, log, read_held_out(folder), judge)


def _judge(metrics: RunMetrics, identity: dict[str, Any]) -> Judge:
    evaluation, reference = metrics["config"]["evaluation"], metrics.get("reference")
    size = (
        f"{metrics['held_out_sequences']:,} sequences, {metrics['held_out_positions']:,} positions"
    )
    if reference is not None:
        source: Any = reference["fingerprint"]
        words = f"the reference cache {reference['path']} ({source[:16]}), {size}"
    else:
        share, caches = evaluation["held_out"], identity["cache"]
        if isinstance(caches, str):
            caches = [{"fingerprint": caches}]
        source = [[each["fingerprint"], each.get("held_out", share)] for each in caches]
        shown = ", ".join(each["fingerprint"][:16] for each in caches)
        words = f"held-out rows of its own cache {metrics['cache']['path']} ({shown}), {size}"
    key = {
        "source": source,
        "max_sequences": evaluation["max_sequences"],
        "sequences": metrics["held_out_sequences"],
        "positions": metrics["held_out_positions"],
        # A student with fewer ids than the teacher is compared with another distribution.
        "left_out": metrics["teacher"].get("left_out"),
    }
    return Judge(json.dumps(key, sort_keys=True), words)
