"""What the processes of one training share: files are the first one's, sums are everyone's.

Processes are those that ``torchrun`` or ``accelerate launch`` started; ``TrainingArguments`` makes them know each other.
With one process all of this does nothing.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """(the number of this process, from 0; how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return processes()[0] == 0


def on_main(work: Callable[[], T]) -> T:
    """Calls ``work`` in the main process alone, and returns there and everywhere what it returned; raises what it raised."""
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


def leave() -> None:
    """Ends what joins the processes, once all of them are done; ``train`` may not be called again in them.

    A thread of gloo lets go of a collective's tensors a moment after the collective is over. If the interpreter is ending
    by then, taking its lock aborts the process, and the launcher calls a finished training failed. So this waits for it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_backend() == "gloo":
        last = torch.zeros(1)
        dist.all_reduce(last)
        held = weakref.ref(last)
        del last
        while held() is not None:
            time.sleep(0.001)
    dist.destroy_process_group()
