"""The length of the learning rate's schedule, and the early end of the rounds."""

from __future__ import annotations

import logging
from pathlib import Path

from logitcask.cache_format.errors import ConfigError
from logitcask.rounds.config import StopConfig
from logitcask.rounds.state import State

log = logging.getLogger(__name__)


def horizon(given: object, steps: int, state: State, student_config: Path) -> int:
    """The steps of the learning rate's schedule, for a round that begins now.

    given: training.max_steps in the file ``student_config``, or None. steps: of all rounds.
    Raises ConfigError if the schedule ends before the rounds do.
    """
    if given is not None:
        if not isinstance(given, int) or given < steps:
            raise ConfigError(
                f"training.max_steps in {student_config} is {given}, but the rounds make {steps} steps; raise it, or remove it"
            )
        return given
    before = set(state.horizons.values()) - {steps}
    if before:
        log.warning(
            "the learning rate's schedule is now %d steps long; of earlier rounds it was %d (set training.max_steps in the "
            "student config for one length)",
            steps,
            max(before),
        )
    return steps


def is_over(stop: StopConfig | None, state: State) -> bool:
    """Whether the KL on held-out text has not improved for too long."""
    found = _held_out_kl(state)
    if stop is None or len(found) <= stop.patience:
        return False
    best = found[0]
    waited = 0
    for kl in found[1:]:
        waited = 0 if kl < best - stop.min_improvement else waited + 1
        best = min(best, kl)
        if waited >= stop.patience:
            break
    if waited >= stop.patience:
        log.info(
            "no more rounds: the held-out KL has not improved on %.4f for %d rounds (rounds.stop)",
            best,
            waited,
        )
    return waited >= stop.patience


def _held_out_kl(state: State) -> list[float]:
    """The held-out KL at the start and after each round."""
    return [each.figures["held_out"]["kl"] for each in state.done if each.is_training]
