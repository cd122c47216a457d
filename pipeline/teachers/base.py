"""The interface of teachers. Each engine implements it in its own module or folder, and only this
module or folder imports the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.model import ResolvedModel
from logitcask.pipeline.types import PendingScores, Scored, Sequence


class Teacher(Protocol):
    """A model that scores given text, opened for one ``Capture``.

    ``score`` yields one ``Scored`` per sequence, in order; every sequence has at least 2 tokens. It
    reads only one group of ``sequences`` ahead, so they may be a stream.
    """

    vocab_size: int

    def identity(self) -> TeacherIdentity:
        """The source of the numbers, for the manifest (model, weights, engine, dtype, route)."""
        ...

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]: ...

    def close(self) -> None:
        """Frees the engine."""
        ...


@runtime_checkable
class AnsweringTeacher(Teacher, Protocol):
    """A teacher whose results can be converted later, while its engine continues."""

    def answers(self, sequences: Iterable[Sequence]) -> Iterator[PendingScores]:
        """As ``score``, each sequence's answer still to be read, at its kept positions."""
        ...


def answers(teacher: Teacher, sequences: Iterable[Sequence]) -> Iterator[PendingScores]:
    """The results of ``teacher`` for ``sequences``, in order, converted or not yet converted."""
    if isinstance(teacher, AnsweringTeacher):
        return teacher.answers(sequences)
    return (_read(scored) for scored in teacher.score(sequences))


def _read(scored: Scored) -> PendingScores:
    held = (scored.ids, scored.logprobs, scored.draws.samples, scored.draws.sample_logprobs)
    return PendingScores(sum(each.nbytes for each in held), lambda: scored)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the sampling of answers. An engine is opened for one of these.

    temperature: 0 takes the most probable token (lowest id or whichever of a tie the engine
    prefers), always.
    top_p:       sampling is among the most probable tokens that together hold this mass.
    end_tokens:  ids that end an answer, and belong to it.
    stop:        strings that end an answer. An engine may stop as soon as one is complete, or
                 later.
    top_ids:     number of the model's most probable ids to note at each token of an answer.
    """

    temperature: float
    top_p: float
    end_tokens: tuple[int, ...]
    stop: tuple[str, ...] = ()
    top_ids: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The prompt of one answer.

    input_ids:  int32[n], n >= 1.
    max_tokens: longest answer, in tokens, at least 1; the prompt and this many fit the engine's
    ``max_length``.
    seed:       of this answer alone, 63 bits.
    """

    input_ids: NDArray[np.int32]
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class SampledAnswer:
    """The tokens that a model has sampled, int32[m], and their logprobs, float32[m], nats: of its
    whole distribution at temperature 1, whatever it sampled with.

    top_ids: None, or int32[m, C], the most probable ids of that distribution at each token, C being
             ``Sampling.top_ids``, or all ids if the model has fewer.
    """

    input_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32] | None = None


class Generator(Protocol):
    """A teacher that was opened with a ``Sampling``, and so can write text too.

    ``generate`` yields the sampled ids of one answer per prompt, int32[m], 1 <= m <=
    ``max_tokens``, in order, including the end token if there is one. An answer depends only on its
    own prompt and seed, except for changes of the engine's arithmetic with the batch. Only a few
    hundred prompts are read ahead.
    """

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]: ...


@runtime_checkable
class Writer(Protocol):
    """A ``Generator`` that also tells the logprobs of its tokens: ``sample`` yields the answers of
    ``generate`` with them.
    """

    def sample(self, prompts: Iterable[Prompt]) -> Iterator[SampledAnswer]: ...


class Backend(Protocol):
    """A teacher backend outside this project, as ``teacher.backend`` names it: a class whose
    instances are a ``Teacher``, or a function that returns one.

    It is called with the config, the model that ``teacher.model`` names, the longest sequence in
    tokens, the capture, and the config's ``engine_args`` as keyword-only arguments. With a method
    ``generate`` it is also a ``Generator``, and is given the keyword argument ``sampling`` if
    answers are to be written.

    A backend without the attribute ``open_tokenizer`` is an engine for models of transformers:
    ``teacher.model`` is resolved, brings the tokenizer, and is what an audit compares with. A
    backend with ``open_tokenizer(config)`` has a model of its own: ``teacher.model`` may be any
    text, ``model`` is None, the tokenizer is the result, and audits have nothing to compare with.
    """

    def __call__(
        self,
        config: TeacherConfig,
        model: ResolvedModel | None,
        /,
        *,
        max_length: int,
        capture: Capture,
    ) -> Teacher: ...


def bounded_groups(sequences: Iterable[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Consecutive groups of at most ``tokens`` tokens, or of one longer sequence."""
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
