"""A command of another package as a process: ``python -m logitcask.rounds.child COMMAND ...``.

On Linux it dies with the process that started it, so that a killed run of rounds leaves nothing
behind that still writes.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys

PROGRAMS = {
    "teacher-cache": "logitcask.pipeline.cli",
    "train-student": "logitcask.train.cli",
}
"""The modules of the commands."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs the command in the arguments. The first argument is the process that waits for it."""
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it has died already
            os._exit(1)
    sys.argv = [program, *arguments]
    importlib.import_module(PROGRAMS[program]).main()


if __name__ == "__main__":
    main()
