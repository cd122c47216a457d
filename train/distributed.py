"""Cooperation of the processes of one training: the first one writes files, sums include all.

``torchrun`` or ``accelerate launch`` starts the processes, and ``TrainingArguments`` connects them.
With one process the functions here do nothing.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """(number of this process, from 0; number of processes)."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return processes()[0] == 0


def on_main(work: Callable[[], T]) -> T:
    """Calls ``work`` in the main process only. All return its result or raise its error."""
    if processes()[1] == 1:
        return work()
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [(work(), None)]
        except Exception as error:  # raised again below, in every process
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    found, raised = outcome[0]
    if raised is not None:
        raise raised
    return found  # type: ignore[no-any-return]


def gathered(mine: T) -> list[T]:
    """A list of every process's ``mine``, in order, in every process."""
    count = processes()[1]
    if count == 1:
        return [mine]
    found: list[Any] = [None] * count
    dist.all_gather_object(found, mine)
    return found


def highest(number: int, device: torch.device) -> int:
    """The largest ``number`` of all processes, in every process. ``device``: that of the training."""
    if processes()[1] == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    if processes()[1] > 1:
        dist.barrier()


def machine() -> tuple[str, str]:
    """Name of this machine and, since names may repeat, the id of its boot, if available."""
    try:
        return socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname(), ""


def leave(code: int = 0) -> None:
    """Ends a process of a joint training with exit code ``code``; returns for a single process.

    Threads of torch that move tensors between processes exist until the process ends. DDP keeps
    them even after ``destroy_process_group``. If such a thread drops a Python tensor while the
    interpreter shuts down, it cannot take the interpreter's lock. CPython (3.13 and older) then
    ends the thread inside a C++ destructor, which aborts the process, and the launcher reports a
    finished training as failed. This function therefore does the work of the interpreter's shutdown
    for others (joins threads, calls exit handlers, flushes streams), and then ends the process
    without that shutdown.

    Call it last, after everything is saved. With code 0 it waits for all processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if code == 0:
        dist.barrier()
        dist.destroy_process_group()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()  # trackers finish their runs in such handlers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
