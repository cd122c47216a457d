"""What the processes of one training share: files are the first one's, sums are everyone's.

Processes are those that ``torchrun`` or ``accelerate launch`` started; ``TrainingArguments`` makes
them know each other. With one process all of this does nothing.
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

import torch.distributed as dist

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """(the number of this process, from 0; how many there are)."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return processes()[0] == 0


def on_main(work: Callable[[], T]) -> T:
    """Calls ``work`` in the main process alone, and returns there and everywhere what it
    returned; raises what it raised.
    """
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
    """``mine`` of every process, in their order, in every process."""
    count = processes()[1]
    if count == 1:
        return [mine]
    found: list[Any] = [None] * count
    dist.all_gather_object(found, mine)
    return found


def machine() -> tuple[str, str]:
    """Name of this machine and of what it has run since it was started, where it says: a name
    may be given twice.
    """
    try:
        return socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname(), ""


def leave(code: int = 0) -> None:
    """Ends a process that trained together with others, with exit code ``code``; returns if it
    trained alone.

    Threads of torch that move tensors between processes live as long as the process: DDP keeps them
    even beyond ``destroy_process_group``. One that drops a Python tensor while the interpreter
    shuts down cannot take its lock any more; CPython (3.13 and older) then ends the thread inside a
    C++ destructor, and that aborts the process. The launcher would call a finished training failed.
    So all that the interpreter does at its end for others is done here (threads joined, exit
    handlers called, streams flushed), and then the process ends without a shutdown of the
    interpreter.

    Call it last, once everything is saved. With code 0 it waits until all processes have come here.
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
