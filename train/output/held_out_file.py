"""The content of ``held_out.json``: a finished run on each held-out sequence, and in bins.

``train-student compare`` pairs two runs by these values, and the report draws them. Runs of older
versions lack the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from logitcask.cache_format.errors import UserError
from logitcask.train.evaluation.by_sequence import BySequence

if TYPE_CHECKING:
    # Import torch, which takes seconds.
    from logitcask.train.data.dataset import HeldOut
    from logitcask.train.evaluation.measured import Bins, Measured

HELD_OUT = "held_out.json"


class Part(TypedDict):
    """The sequences of one cache, by their index there, and the number of ids that are compared."""

    fingerprint: str
    ids: int
    sequences: list[int]


class HeldOutValues(TypedDict):
    """All of ``held_out.json``.

    parts:     the sequences, cache by cache. Two runs with the same parts can be paired.
    positions: kept positions of each sequence that has some.
    sums:      metric -> its sum over the kept positions of each of these sequences, after training.
    ece:       over all positions.
    before, after: bins of the student; teacher_calibration: the same of the teacher.
    """

    parts: list[Part]
    positions: list[int]
    sums: dict[str, list[float]]
    ece: float
    before: NotRequired[Bins]
    after: Bins
    teacher_calibration: list[list[float]] | None


def held_out_values(data: HeldOut, measured: Measured, before: Bins | None) -> HeldOutValues:
    """The values of the newest evaluation of a run. ``before``: the bins before the first step."""
    by_sequence = measured.by_sequence()
    found: HeldOutValues = {
        "parts": [
            {
                "fingerprint": part.cache.manifest.fingerprint,
                "ids": part.vocab_size,
                "sequences": [int(index) for index in part.indices],
            }
            for part in data.parts
        ],
        "positions": by_sequence.positions.tolist(),
        "sums": {name: values.tolist() for name, values in by_sequence.sums.items()},
        "ece": by_sequence.ece,
        "after": measured.bins(),
        "teacher_calibration": measured.teacher_calibration(),
    }
    return found if before is None else {**found, "before": before}


def read_held_out(run: Path) -> HeldOutValues | None:
    """The values of a finished run; None if it has none. Raises UserError for a damaged file."""
    try:
        found: HeldOutValues = json.loads((run / HELD_OUT).read_text(encoding="utf-8"))
        by_sequence_of(found)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run / HELD_OUT} is damaged ({type(error).__name__}); remove it to do without the values by sequence, or train "
            "the run again"
        ) from error
    return found


def by_sequence_of(values: HeldOutValues) -> BySequence:
    """The metrics by sequence. Raises ValueError for columns of different lengths."""
    positions = np.array(values["positions"], np.int64)
    sums = {name: np.array(each, np.float64) for name, each in values["sums"].items()}
    if any(each.shape != positions.shape for each in sums.values()) or not len(positions):
        raise ValueError("the columns differ in length")
    return BySequence(sums, positions, float(values["ece"]))
