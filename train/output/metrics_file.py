"""The content of ``metrics.json``, the results of a finished run.

Held-out metrics are dicts, because their names depend on the cache
(``logitcask.train.evaluation.evaluate``).
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from logitcask.train.exactness_words import IN_A_WORD


class TeacherMetrics(TypedDict):
    """The teacher: its name, its engine, and its held-out metrics, as far as the cache has them.

    left_out: the share of its mass on ids that the student lacks.
    """

    model: str
    engine: str
    ce: float | None
    perplexity: float | None
    positions: int
    left_out: NotRequired[float]
    ece: NotRequired[float]


class RougeL(TypedDict):
    """Mean Rouge-L of the student's answers with the cached ones; None if no cached answer has
    words.
    """

    before: float | None
    after: float | None
    answers: int


class StudentFacts(TypedDict):
    """Numbers of parameters and of trained parameters, and the name of the model's class."""

    parameters: int
    trained: int
    architecture: str


class CacheFacts(TypedDict):
    """The cache, or all caches of a mixture together, with their names joined by commas."""

    path: str
    fingerprint: str
    source: str
    tokens: int
    bytes_per_token: float


class ReferenceFacts(TypedDict):
    """The reference cache on which a run is evaluated, and its teacher.

    not_learnt_from: number of sequences that training leaves out because their texts are in it.
    """

    path: str
    fingerprint: str
    teacher: str
    not_learnt_from: int


class RunMetrics(TypedDict):
    """All of ``metrics.json``.

    kinds:     of each held-out metric, its exactness (``logitcask.train.losses.base.Exactness``).
               Runs of older versions have none.
    reference: of runs with ``evaluation.cache``.
    losses:    (name, weight as text) of every term.
    exactness: of each loss with this cache, in words.
    seconds, positions_trained: over all starts of the run.
    first_step: of a part of a longer training, the step at which ``before`` was measured.
    """

    before: dict[str, float]
    after: dict[str, float]
    teacher: TeacherMetrics
    rouge_l: RougeL
    k: int
    kl_tail: str
    kl_kind: str
    kinds: NotRequired[dict[str, str]]
    reference: NotRequired[ReferenceFacts]
    steps: int
    first_step: NotRequired[int]
    final_loss: float | None
    seconds: float
    positions_trained: int
    train_sequences: int
    held_out_sequences: int
    held_out_positions: int
    losses: list[list[str]]
    exactness: dict[str, str]
    student: StudentFacts
    cache: CacheFacts
    run: str
    seed: int
    created_by: str
    config: dict[str, Any]


def kind_of(metrics: RunMetrics, name: str) -> str:
    """The exactness of a held-out metric in a word; empty for runs of older versions."""
    kind = metrics.get("kinds", {}).get(name)
    return "" if kind is None else IN_A_WORD[kind]


def of_teacher(metrics: RunMetrics, name: str) -> float | None:
    """The teacher's value of a held-out metric; None if there is none."""
    return cast("dict[str, float]", metrics["teacher"]).get(name)
