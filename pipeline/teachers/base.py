"""What the pipeline asks of a teacher. One file per engine implements it, and only that file imports the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from cache_format.manifest import TeacherIdentity
from pipeline.sequence import Answer, Scored, Sequence


class Teacher(Protocol):
    """A model that scores given text, and answers the one ``Capture`` that it was opened for.

    ``score`` yields one ``Scored`` per sequence, in the order given; every sequence has at least 2 tokens. It reads no
    more of ``sequences`` ahead than a group that it scores together, so they may be a stream.
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

    def answers(self, sequences: Iterable[Sequence]) -> Iterator[Answer]:
        """As ``score``, each sequence's answer still to be read, at its kept positions."""
        ...


def answers(teacher: Teacher, sequences: Iterable[Sequence]) -> Iterator[Answer]:
    """What ``teacher`` says of ``sequences``, in their order, read or still to be read."""
    if isinstance(teacher, AnsweringTeacher):
        return teacher.answers(sequences)
    return (_read(scored) for scored in teacher.score(sequences))


def _read(scored: Scored) -> Answer:
    held = (scored.ids, scored.logprobs, scored.samples, scored.sample_logprobs)
    return Answer(sum(each.nbytes for each in held), lambda: scored)
