"""The student of a report: its readings of the sequences shown, from a file of ``train-student
read``, or by that command in a process of its own, so that a report itself needs no torch.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from logitcask.cache_format import CacheReader
from logitcask.cache_format.readings import Readings, read_readings


class StudentFailed(SystemExit):
    """``train-student read`` has failed, and said why. ``code`` is its exit code."""


class Student:
    """The student that is named by ``--student``: a file of readings, or a run or model.

    Raises UserError for a file that is not of the cache.
    """

    def __init__(self, name: str, reader: CacheReader) -> None:
        self.name, self._reader = name, reader
        file = Path(name).expanduser()
        self._readings = (
            read_readings(file, reader.path, reader.manifest) if file.is_file() else None
        )

    @property
    def indices(self) -> list[int] | None:
        """Numbers of the sequences that a file has; None: any can be read."""
        return None if self._readings is None else self._readings.indices

    def readings(self, indices: Sequence[int]) -> Readings:
        """The readings of these sequences. Raises StudentFailed if the command fails."""
        if self._readings is not None:
            return self._readings
        with tempfile.TemporaryDirectory(prefix="logitcask-") as folder:
            chosen, out = Path(folder) / "indices.json", Path(folder) / "readings.npz"
            chosen.write_text(json.dumps(sorted(indices)), encoding="utf-8")
            command = [sys.executable, "-m", "logitcask.train", "read", self.name]
            command += ["--cache", self._reader.path, "--indices", str(chosen), "--out", str(out)]
            # Its result is the file. Its messages and its error go to stderr, like those of a report.
            ended = subprocess.run([*command, *_options()], stdout=subprocess.DEVNULL, check=False)
            if ended.returncode:
                raise StudentFailed(ended.returncode if ended.returncode > 0 else 1)
            return read_readings(out, self._reader.path, self._reader.manifest)


def _options() -> list[str]:
    """The options of this command that the other one is given, too."""
    level = logging.getLogger("logitcask").level
    if level == logging.DEBUG:
        return ["--debug"]
    return ["--quiet"] if level == logging.ERROR else []
