"""The teacher's own answers beside the students', and losses that apply to one of the two.

The mixture of a round has the names ``text`` (given text), ``teacher-N`` and ``round-N``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from logitcask.cache_format.errors import ConfigError
from logitcask.rounds.config import RoundsSettings

PAIRS = "dpkd_sequence"
"""The loss that compares the two answers to a prompt, so that they are read in pairs."""
OWN_TEXT = "policy_gradient"
"""The loss that learns from students' text alone."""
TEXT = "text"
"""The name of the cache of given text."""

Losses = list[tuple[str, dict[str, Any]]]
"""The losses of a student config: name and fields of each."""


def teacher(number: int) -> str:
    """The name of the teacher's answers of a round."""
    return f"teacher-{number}"


def student(number: int) -> str:
    """The name of the students' answers of a round."""
    return f"round-{number}"


WRITES = {
    "data.generate.writer": None,
    "data.generate.writer_engine": None,
    "data.generate.writer_top_k": None,
}
"""Changes of the teacher config with which the teacher itself writes."""


SEED = 1_000_000
"""The teacher's seed is larger by this than the student's of the same round. With one seed, two
models that are alike would write the same.
"""


def check(rounds: RoundsSettings, losses: Losses, *, hard_labels: bool) -> None:
    """Raises ConfigError for losses that do not go together with the texts of the rounds.

    hard_labels: whether the student learns the next tokens everywhere, beside the losses.
    """
    names = [name for name, _ in losses]
    if PAIRS in names and not rounds.teacher_text:
        raise ConfigError(
            f"{PAIRS} compares the teacher's answer to each prompt with the student's, but rounds.teacher_text is false; set it "
            "to true"
        )
    if PAIRS in names and rounds.on_policy_fraction != 0.5:
        raise ConfigError(
            f"rounds.on_policy_fraction is {rounds.on_policy_fraction:g}, but {PAIRS} reads a text of the teacher with each one of "
            "a student; set it to 0.5"
        )
    here = [student(1)] if rounds.on_policy_fraction else []
    if rounds.on_policy_fraction < 1:
        other = teacher(1) if rounds.teacher_text else TEXT
        here.append(other)
        if any(name == OWN_TEXT and applies(name, options, other) for name, options in losses):
            raise ConfigError(
                f"rounds.on_policy_fraction is {rounds.on_policy_fraction:g}, but {OWN_TEXT} learns from the students' own text "
                "alone; set it to 1, or give the loss caches: [round-*]"
            )
    for name, options in losses:
        if not any(applies(name, options, cache) for cache in here):
            raise ConfigError(
                f"the loss {name} has caches: {_shown(options)}, but the caches of a first round are {', '.join(sorted(here))}; "
                f"name some of them, such as {here[0].rpartition('-')[0]}-*"
            )
    for cache in here:
        if losses and not hard_labels and not any(applies(*each, cache) for each in losses):
            raise ConfigError(
                f"no loss applies to the cache {cache} of a round; name {cache.rpartition('-')[0] or cache}* in the caches of one"
            )


def applies(name: str, options: dict[str, Any], cache: str) -> bool:
    """Whether a loss applies to a cache of the rounds. The command checks the form of ``caches``."""
    if name == PAIRS:
        return cache != TEXT
    patterns = options.get("caches")
    if not isinstance(patterns, list):
        return True
    return any(fnmatchcase(cache, str(each)) for each in patterns)


def of_warm_up(losses: Losses) -> list[dict[str, Any]] | None:
    """The losses that can learn from given text; None if that is all of them. Forward KL if there
    are none.
    """
    here = [
        options for name, options in losses if name != OWN_TEXT and applies(name, options, TEXT)
    ]
    if len(here) == len(losses):
        return None
    return here or [{"name": "forward_kl"}]


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(map(str, options.get("caches") or []))
