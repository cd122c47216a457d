"""Scoring planned shards: teacher -> estimator -> codec -> committed shards.

Everything here works on the shards it is given, with a teacher that is open and a ``CacheWriter``
that has begun or a ``CacheWorker`` that has joined. So one process may do all shards of a plan, or
many processes some of them each: what the teacher is given, and in which order, is decided by the
shard alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.writer import CacheWorker
from logitcask.pipeline.builder.plan import Plan, read_sequences
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.writer_thread import Pair, WriterThread, kept
from logitcask.pipeline.interruption import safe_point
from logitcask.pipeline.memory import give_back
from logitcask.pipeline.teachers.base import Teacher, answers, bounded_groups
from logitcask.pipeline.types import PendingScores, Sequence

# The prior settles within some ten thousand positions; they are held in memory until it is known.
_PRIOR_POSITIONS = 16_384

# Sequences are put in order of length within so many tokens; answers wait for those before them in
# the plan.
_WINDOW_TOKENS = 16_384


def score_shard(
    teacher: Teacher,
    build_dir: Path,
    shard: int,
    progress: Progress | None = None,
    check: Callable[[], None] = safe_point,
) -> Iterator[Pair]:
    """Each sequence of a shard with what the teacher says of it, in order. What has nothing to
    learn is never scored.

    The teacher gets them by falling length within a window, so that what it batches is alike. The
    shard's plan is read twice side by side, so that the engine may take as much ahead as it likes.
    ``check`` is called at every answer, and may raise.
    """
    progress = progress or Progress()
    given = (window[at] for window in _windows(build_dir, shard) for at in _by_length(window))
    answered = answers(teacher, given)
    for window in _windows(build_dir, shard):
        order = iter(_by_length(window))
        early: dict[int, PendingScores] = {}
        for place, sequence in enumerate(window):
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
    """The prior, from the first positions of ``pairs`` (those of shard 0), and all of ``pairs``
    again, still to be used.
    """
    first: deque[Pair] = deque()
    positions = 0
    while positions < _PRIOR_POSITIONS and (pair := next(pairs, None)) is not None:
        first.append(_read(pair))
        positions += int(pair[0].loss_mask.sum())
    prior = TailPrior.estimate((kept(pair, store) for pair in first), store.vocab_size)
    return prior, chain(_emptying(first), pairs)


def score_shards(
    teacher: Teacher,
    writer: CacheWorker,
    plan: Plan,
    shards: Iterable[int],
    *,
    progress: Progress | None = None,
    begun: Mapping[int, Iterator[Pair]] | None = None,
) -> None:
    """Scores and commits ``shards`` of the plan, which ``writer`` has not committed yet, one after
    the other.

    progress: hears of everything done here; of what ``score_shard`` does for ``begun``, if it was
    given the same.
    begun:    pairs of shards of which some have been scored already, as ``estimate_prior`` returns
              them.

    Raises whatever the teacher or the writer does, as soon as it does, and KeyboardInterrupt as
    ``logitcask.pipeline.interruption`` says.
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
            # Engines in processes of their own die of the same Ctrl-C.
            safe_point()
            raise


def _windows(build_dir: Path, shard: int) -> Iterator[list[Sequence]]:
    return bounded_groups(read_sequences(build_dir, shard), _WINDOW_TOKENS)


def _by_length(window: list[Sequence]) -> list[int]:
    """Indices of the sequences that are scored, by falling length."""
    scored = (at for at, sequence in enumerate(window) if sequence.loss_mask.any())
    return sorted(scored, key=lambda at: -len(window[at].input_ids))


def _emptying(pairs: deque[Pair]) -> Iterator[Pair]:
    # ``chain`` would hold a deque, and all that is in it, until the whole shard has been scored.
    while pairs:
        yield pairs.popleft()


def _read(pair: Pair) -> Pair:
    sequence, answer = pair
    if answer is None:
        return pair
    scored = answer.scored()
    return sequence, PendingScores(answer.nbytes, lambda: scored)
