"""A stage of a round: one command in a process of its own, which has ended before the next stage
starts. So the memory and the devices of one model are free before another is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.runtime.interruption import signals_given_to

_KILOBYTE = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


class StageFailed(SystemExit):
    """A command has failed, and said why. ``code`` is its exit code."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended well.

    document: its JSON document. seconds: from its start to its end. peak_bytes: the largest
    resident memory of a process of it.
    """

    document: dict[str, Any]
    seconds: float
    peak_bytes: int

    def and_then(self, other: Ended) -> Ended:
        """This command and the one after it as one, with the document of this one."""
        seconds = self.seconds + other.seconds
        return Ended(self.document, seconds, max(self.peak_bytes, other.peak_bytes))


def run_stage(command: list[str], options: list[str]) -> Ended:
    """Runs ``command`` with ``--json`` and ``options``, and waits for its end. Its log goes to
    stderr.

    A signal to this process goes on to the command, which ends at its next safe point. Raises
    StageFailed if the command fails, and Stopped after a signal.
    """
    started = time.monotonic()
    arguments = [sys.executable, "-m", "logitcask.rounds.child", str(os.getpid()), *command]
    process: subprocess.Popen[bytes] | None = None
    waiting: list[int] = []  # signals that have not reached the command yet

    def send(*numbers: int) -> None:
        waiting.extend(numbers)
        # A signal may arrive in this very loop. The process is there until it has been waited for.
        with suppress(IndexError, ProcessLookupError):
            while process is not None and process.returncode is None:
                os.kill(process.pid, waiting.pop(0))

    with signals_given_to(send):
        # In a group of its own: Ctrl-C at a terminal reaches it once, from here.
        process = subprocess.Popen(
            [*arguments, "--json", *options], stdout=subprocess.PIPE, process_group=0
        )
        send()
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        raise UserError(
            f"{command[0]} was killed by {signal.Signals(-process.returncode).name}, which is how a machine without memory ends a "
            "process; run the same command again to go on"
        )
    if process.returncode:
        raise StageFailed(process.returncode)
    return Ended(json.loads(output), time.monotonic() - started, usage.ru_maxrss * _KILOBYTE)
