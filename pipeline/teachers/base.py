"""The teacher that the pipeline asks for. Each engine implements it, in a module or folder that
alone imports the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.types import PendingScores, Scored, Sequence


class Teacher(Protocol):
    """A model that scores given text, and answers the one ``Capture`` that it was opened for.

    ``score`` yields one ``Scored`` per sequence, in the order given; every sequence has at least 2
    tokens. It reads no more of ``sequences`` ahead than a group that it scores together, so they
    may be a stream.
    """

    vocab_size: int

    def identity(self) -> TeacherIdentity:
        """What produced the numbers, for the manifest (model, weights, engine, dtype, route)."""
        ...

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]: ...

    def close(self) -> None:
        """Frees the engine."""
        ...


@runtime_checkable
class AnsweringTeacher(Teacher, Protocol):
    """A teacher whose answers take work to read, which can be done while its engine goes on."""

    def answers(self, sequences: Iterable[Sequence]) -> Iterator[PendingScores]:
        """As ``score``, each sequence's answer still to be read, at its kept positions."""
        ...


def answers(teacher: Teacher, sequences: Iterable[Sequence]) -> Iterator[PendingScores]:
    """What ``teacher`` says of ``sequences``, in their order, read or still to be read."""
    if isinstance(teacher, AnsweringTeacher):
        return teacher.answers(sequences)
    return (_read(scored) for scored in teacher.score(sequences))


def _read(scored: Scored) -> PendingScores:
    held = (scored.ids, scored.logprobs, scored.draws.samples, scored.draws.sample_logprobs)
    return PendingScores(sum(each.nbytes for each in held), lambda: scored)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are written. An engine is opened for one of these.

    temperature: 0 takes the most probable token (lowest id or whichever of a tie the engine
    prefers), always.
    top_p:       sampling is among the most probable tokens that together hold this mass.
    end_tokens:  ids that end an answer, and belong to it.
    stop:        strings that end an answer. An engine may stop as soon as one is complete, or
                 later.
    """

    temperature: float
    top_p: float
    end_tokens: tuple[int, ...]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What one answer is asked for.

    input_ids:  int32[n], n >= 1.
    max_tokens: longest answer, in tokens, at least 1; the prompt and this many fit the engine's
    ``max_length``.
    seed:       of this answer alone, 63 bits.
    """

    input_ids: NDArray[np.int32]
    max_tokens: int
    seed: int


class Generator(Protocol):
    """A teacher that was opened with a ``Sampling``, and so can write text too.

    ``generate`` yields the ids of one answer per prompt, int32[m], 1 <= m <= ``max_tokens``, in the
    order given: as they were sampled, the end token included where one came. An answer depends on
    its own prompt and seed alone, as far as the engine's arithmetic does not change with the batch.
    Prompts are read no further ahead than a few hundred.
    """

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]: ...


def bounded_groups(sequences: Iterable[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Consecutive groups of at most ``tokens`` tokens, or of one sequence that is longer than
    that.
    """
    group: list[Sequence] = []
    held = 0
    for sequence in sequences:
        if group and held + len(sequence.input_ids) > tokens:
            yield group
            group, held = [], 0
        group.append(sequence)
        held += len(sequence.input_ids)
    if group:
        yield group
