"""The end of a training on SIGTERM (a scheduler's notice) or Ctrl-C: a checkpoint of the step at
hand, in all processes of a joint training.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import AbstractContextManager

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitcask.cache_format.runtime.interruption import Stopped, asked_to_stop, at_safe_points
from logitcask.train.distributed import highest, is_main, processes, wait_for_all

log = logging.getLogger(__name__)

_FORWARDED_SECONDS = 1.0
"""Ctrl-C and some schedulers reach all processes. torchrun then forwards the signal to its own."""


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint at the end of the step in which a signal arrives, and raises Stopped.

    The processes agree at each step's end. If one of them has the signal, all of them save and stop
    at that step.
    """

    def __init__(self) -> None:
        self._number = 0

    def watching(self) -> AbstractContextManager[None]:
        """The context in which signals wait for the end of a step."""
        return at_safe_points(_FORWARDED_SECONDS if processes()[1] > 1 else 0.0)

    @property
    def stopping(self) -> bool:
        """Whether the processes have agreed to stop at this step."""
        return self._number > 0

    def asked(self, args: TrainingArguments) -> bool:
        """Whether a signal has reached one of the processes; all of them call this together."""
        self._number = highest(asked_to_stop(), args.device)
        return self.stopping

    def now(self, state: TrainerState) -> None:
        """Raises Stopped, in all processes together, after a checkpoint has been saved."""
        # A launcher kills the others as soon as one process has left.
        wait_for_all()
        if is_main():
            log.info(
                "%s: the checkpoint of step %d of %d is saved",
                signal.Signals(self._number).name,
                state.global_step,
                state.max_steps,
            )
        raise Stopped(self._number)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.asked(args):
            # The log of a resumed run equals that of an undisturbed one if it has a record here.
            control.should_log = control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.stopping:
            self.now(state)


def outlive_signals(worker: int) -> None:
    """Lets a loader's worker process outlive a signal to all processes of its group, since the main
    process needs batches until the end of its step. A signal of the main process still ends it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()
