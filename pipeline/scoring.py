"""Scoring planned shards: teacher -> estimator -> codec -> committed shards.

Everything here works on the shards it is given, with a teacher that is open and a writer of a cache that has begun, so one
process may do all shards of a plan, or many processes some of them each: the content is the same.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from cache_format import CachedSequence
from cache_format.manifest import StoreSettings
from cache_format.prior import TailPrior
from cache_format.shard_writer import ShardWriter
from cache_format.writer import CacheWorker
from pipeline.estimator import keep, keep_nothing
from pipeline.plan import Plan, read_sequences
from pipeline.sequence import Scored, Sequence
from pipeline.teachers import Teacher

# A sequence with what the teacher says of it; None where nothing of it is kept, so that it was not scored.
Pair = tuple[Sequence, Scored | None]

# The prior settles within some ten thousand positions; they are held in memory until it is known.
_PRIOR_POSITIONS = 32_768

# Sequences that may wait for the codec while the engine scores on.
_BEHIND = 64


def score_shard(teacher: Teacher, build_dir: Path, shard: int) -> Iterator[Pair]:
    """Each sequence of a shard with what the teacher says of it, in order. What has nothing to learn is never scored.

    The shard's plan is read twice side by side, so that the engine may take as much ahead as it likes.
    """
    scores = teacher.score(s for s in read_sequences(build_dir, shard) if s.loss_mask.any())
    for sequence in read_sequences(build_dir, shard):
        yield sequence, next(scores) if sequence.loss_mask.any() else None


def estimate_prior(pairs: Iterator[Pair], store: StoreSettings) -> tuple[TailPrior, Iterator[Pair]]:
    """The prior, from the first positions of ``pairs`` (those of shard 0), and all of ``pairs`` again, still to be used."""
    first: list[Pair] = []
    positions = 0
    while positions < _PRIOR_POSITIONS and (pair := next(pairs, None)) is not None:
        first.append(pair)
        positions += int(pair[0].loss_mask.sum())
    prior = TailPrior.estimate((_kept(pair, store) for pair in first), store.vocab_size)
    return prior, itertools.chain(first, pairs)


def score_shards(
    teacher: Teacher,
    writer: CacheWorker,
    plan: Plan,
    shards: Iterable[int],
    *,
    begun: Mapping[int, Iterator[Pair]] | None = None,
) -> int:
    """Scores and commits ``shards`` of the plan, which ``writer`` has not committed yet, one after the other.

    begun: pairs of shards of which some have been scored already, as ``estimate_prior`` returns them.

    Returns the tokens of all sequences that were scored.
    """
    shards = list(shards)
    store = writer.header().store
    scored = 0
    with tqdm(
        total=sum(plan.shards[index].tokens for index in shards),
        unit="tok",
        unit_scale=True,
        desc="teacher",
        dynamic_ncols=True,
    ) as bar:

        def counted(pairs: Iterator[Pair]) -> Iterator[Pair]:
            nonlocal scored
            for pair in pairs:
                bar.update(len(pair[0].input_ids))
                scored += 0 if pair[1] is None else len(pair[0].input_ids)
                yield pair

        for index in shards:
            pairs = (begun or {}).get(index) or score_shard(teacher, writer.build_dir, index)
            with writer.shard(index, sequences_per_batch=plan.shards[index].sequences_per_batch) as shard:
                _append_behind(shard, counted(pairs), store)
            entry = writer.committed[index]
            bar.set_postfix_str(f"{entry.bytes / max(1, entry.tokens):.1f} B/tok, shard {index + 1}/{len(plan.shards)}")
    return scored


def _append_behind(shard: ShardWriter, pairs: Iterator[Pair], store: StoreSettings) -> None:
    """Appends all pairs, encoding and writing in a thread of its own, while the engine scores on.

    At most _BEHIND sequences wait, so that memory stays flat where the disk is slower than the engine.
    """

    def append(pair: Pair) -> None:
        shard.append(_kept(pair, store))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as thread:
        waiting: deque[Future[None]] = deque()
        try:
            for pair in pairs:
                waiting.append(thread.submit(append, pair))
                while waiting and (waiting[0].done() or len(waiting) > _BEHIND):
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def _kept(pair: Pair, store: StoreSettings) -> CachedSequence:
    sequence, scored = pair
    return keep_nothing(sequence, store) if scored is None else keep(sequence, scored, store)
