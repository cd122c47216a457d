"""What the pipeline asks of a teacher. One file per engine implements it, and only that file imports the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from cache_format.manifest import TeacherIdentity
from pipeline.sequence import Scored, Sequence


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
