"""Scoring planned shards: teacher -> estimator -> codec -> committed shards.

The functions take shards, an open teacher, and a ``CacheWriter`` that has begun or a
``CacheWorker`` that has joined. One process may score all shards of a plan, or several processes
some of them each. The teacher's inputs and their order depend only on the shard.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.runtime.interruption import safe_point
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.writer import CacheWorker
from logitcask.pipeline.builder.known import Known, KnownRows
from logitcask.pipeline.builder.plan import Plan, read_sequences
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.writer_thread import Pair, WriterThread, kept
from logitcask.pipeline.memory import give_back
from logitcask.pipeline.teachers.base import Teacher, answers, bounded_groups
from logitcask.pipeline.types import PendingScores, Sequence

PRIOR_POSITIONS = 16_384
"""Positions for the estimate of the prior, which changes little after some ten thousand. They are
held in memory until it is known.
"""

# Tokens within which sequences are sorted by length. Results wait for the sequences before them in
# the plan.
_WINDOW_TOKENS = 16_384


def score_shard(
    teacher: Teacher | None,
    build_dir: Path,
    shard: int,
    progress: Progress | None = None,
    check: Callable[[], None] = safe_point,
) -> Iterator[Pair]:
    """Each sequence of a shard with its scores, in order; those without kept positions unscored,
    and those that another cache holds (``logitcask.pipeline.builder.known``) with their rows there.

    ``teacher`` is None if there is nothing to score. The teacher gets the sequences of a window by descending length, so that the sequences of a
    batch are similar. The shard's plan is read twice at the same time, so the engine may read ahead
    without a limit. ``check`` is called at every result, and may raise.
    """
    progress = progress or Progress()
    known = Known.load(build_dir)
    rows: KnownRows | tuple[()] = () if known is None else known.rows(shard)
    answered: Iterator[PendingScores] = iter(())
    if teacher is not None:
        given = (
            window[at]
            for first, window in _windows(build_dir, shard)
            for at in _by_length(window, first, rows)
        )
        answered = answers(teacher, given)
    for first, window in _windows(build_dir, shard):
        order = iter(_by_length(window, first, rows))
        early: dict[int, PendingScores] = {}
        for place, sequence in enumerate(window):
            if isinstance(rows, KnownRows) and first + place in rows:
                progress.answered(len(sequence.input_ids), scored=False, engine_seconds=0.0)
                check()
                yield sequence, rows.get(first + place, sequence)
                continue
            if not sequence.loss_mask.any():
                progress.answered(len(sequence.input_ids), scored=False, engine_seconds=0.0)
                yield sequence, None
                continue
            while place not in early:
                started = time.monotonic()
                at = next(order)
                early[at] = next(answered)
                progress.answered(
                    len(window[at].input_ids),
                    scored=True,
                    engine_seconds=time.monotonic() - started,
                )
                check()
            yield sequence, early.pop(place)
        give_back()


def estimate_prior(pairs: Iterator[Pair], store: StoreSettings) -> tuple[TailPrior, Iterator[Pair]]:
    """The prior, from the first positions of ``pairs`` (shard 0), and an iterator over all."""
    first: deque[Pair] = deque()
    positions = 0
    while positions < PRIOR_POSITIONS and (pair := next(pairs, None)) is not None:
        first.append(_read(pair))
        positions += int(pair[0].loss_mask.sum())
    prior = TailPrior.estimate((kept(pair, store) for pair in first), store.vocab_size)
    return prior, chain(_emptying(first), pairs)


def score_shards(
    teacher: Teacher | None,
    writer: CacheWorker,
    plan: Plan,
    shards: Iterable[int],
    *,
    progress: Progress | None = None,
    begun: Mapping[int, Iterator[Pair]] | None = None,
) -> None:
    """Scores and commits ``shards`` of the plan that ``writer`` has not committed, in order.

    progress: hears of everything done here; of what ``score_shard`` does for ``begun``, if it was
    given the same.
    begun:    pairs of shards of which some have been scored already, as ``estimate_prior`` returns
              them.

    Raises errors of the teacher and the writer at once, and KeyboardInterrupt at safe points
    (``logitcask.cache_format.runtime.interruption``).
    """
    begun, progress = begun or {}, progress or Progress()
    with WriterThread(writer, plan, writer.header().store, progress) as behind:
        try:
            for index in shards:
                behind.begin_shard(index)
                for pair in begun.get(index) or score_shard(
                    teacher, writer.build_dir, index, progress, behind.check
                ):
                    behind.append(pair)
        except Exception:
            # The same Ctrl-C kills engines in other processes.
            safe_point()
            raise


def _windows(build_dir: Path, shard: int) -> Iterator[tuple[int, list[Sequence]]]:
    """Consecutive sequences of a shard, with the index of the first one there."""
    first = 0
    for window in bounded_groups(read_sequences(build_dir, shard), _WINDOW_TOKENS):
        yield first, window
        first += len(window)


def _by_length(window: list[Sequence], first: int, rows: KnownRows | tuple[()]) -> list[int]:
    """Indices of the sequences that are scored, by descending length."""
    scored = (
        at
        for at, sequence in enumerate(window)
        if sequence.loss_mask.any() and first + at not in rows
    )
    return sorted(scored, key=lambda at: -len(window[at].input_ids))


def _emptying(pairs: deque[Pair]) -> Iterator[Pair]:
    # ``chain`` would hold a deque and its content until the whole shard has been scored.
    while pairs:
        yield pairs.popleft()


def _read(pair: Pair) -> Pair:
    sequence, answer = pair
    if not isinstance(answer, PendingScores):
        return pair
    scored = answer.scored()
    return sequence, PendingScores(answer.nbytes, lambda: scored)
