"""Common part of ``derive`` and ``merge``: the resumable writing of a new cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import DamagedCacheError, UserError
from logitcask.cache_format.manifest import (
    ANSWERS_BUILD,
    DataHash,
    DataIdentity,
    DerivedFrom,
    Header,
    Manifest,
    StoreSettings,
)
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.schema import MAX_SHARDS
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.writer import CacheWriter

SHARD_TOKENS = 1_000_000
_SAMPLE_POSITIONS = 32_768
"""Positions from which a prior is estimated and a budget is met."""

PUSH_IT = "write to a folder, then copy that with `teacher-cache push`"
OnTokens = Callable[[int], object]
"""Called with the tokens of every sequence that is done."""


@dataclass(frozen=True)
class Answers:
    """A build that a derived cache answers: its request, and its data with their sha256."""

    request: dict[str, Any]
    data: DataIdentity


@dataclass(frozen=True)
class Part:
    """One source of a new cache: its kept sequences, their new ids, and the change made to each."""

    cache: CacheReader
    keeps: Callable[[int, str], bool] = lambda index, sequence_id: True
    rename: Callable[[str], str] = lambda sequence_id: sequence_id
    change: Callable[[CachedSequence], CachedSequence] = lambda sequence: sequence

    def chosen(self) -> Iterator[tuple[int, str, NDArray[np.int32], NDArray[np.bool_]]]:
        """(index, new id, input ids, loss mask) of every kept sequence. Heads stay compressed."""
        index = 0
        columns = (
            self.cache.iter_column(name) for name in ("sequence_id", "input_ids", "loss_mask")
        )
        for names, ids, masks in zip(*columns, strict=True):
            for name, row_ids, row_mask in zip(names.to_pylist(), ids, masks, strict=True):
                if self.keeps(index, name):
                    mask = row_mask.values.to_numpy(zero_copy_only=False)
                    yield index, self.rename(name), row_ids.values.to_numpy(), mask
                index += 1

    def sequence(self, index: int) -> CachedSequence:
        sequence = self.cache[index]
        return replace(self.change(sequence), sequence_id=self.rename(sequence.sequence_id))


def spread(parts: list[Part]) -> list[CachedSequence]:
    """An even sample of the sources' sequences, with about _SAMPLE_POSITIONS positions."""
    kept = sum(1 for part in parts for _ in part.chosen())
    positions = sum(part.cache.manifest.statistics.positions for part in parts)
    sequences = sum(len(part.cache) for part in parts)
    count = min(kept, max(1, _SAMPLE_POSITIONS * sequences // max(1, positions)))
    wanted = set(np.linspace(0, kept - 1, count).astype(int).tolist())
    every = ((part, index) for part in parts for index, *_ in part.chosen())
    return [part.cache[index] for at, (part, index) in enumerate(every) if at in wanted]


def _data_sha256(parts: list[Part], shard_tokens: int) -> str:
    """sha256 of the new cache's data.

    Raises UserError for an id that occurs twice, for a cache without sequences, and for more shards
    than a manifest can list.
    """
    digest, seen = DataHash(), set[str]()
    shards = tokens = 0
    for part in parts:
        for _, name, ids, mask in part.chosen():
            if name in seen:
                raise UserError(
                    f"sequence id {name!r} occurs twice, the second time in {part.cache.path}; ids are unique in a cache: "
                    "number them (`merge --number-ids`)"
                )
            seen.add(name)
            digest.update(name, ids, mask)
            if tokens and tokens + len(ids) <= shard_tokens:
                tokens += len(ids)
            else:
                shards, tokens = shards + 1, len(ids)
    if not seen:
        raise UserError("no sequence is left; choose others")
    if shards > MAX_SHARDS:
        raise UserError(
            f"shards of {shard_tokens:,} tokens would be {shards:,}, of which a manifest can list {MAX_SHARDS:,}; set a larger "
            "--shard-tokens"
        )
    return digest.hexdigest()


def write(
    output: Path,
    parts: list[Part],
    store: StoreSettings,
    data: DataIdentity,
    made_of: DerivedFrom,
    shard_tokens: int,
    on_tokens: OnTokens,
    answers: Answers | None = None,
) -> Manifest:
    """The sequences of all parts as one cache at ``output``, perhaps as the answer to a build."""
    first = parts[0].cache.manifest
    data_sha256 = _data_sha256(parts, shard_tokens)
    if answers is not None:
        data = answers.data
        if data.sha256 != data_sha256:
            raise DamagedCacheError(
                f"{parts[0].cache.path} does not hold the sequences that {output} asks for; build it with --no-reuse"
            )
    header = Header(
        required_features=store.features,
        created_by=f"logitcask {version('logitcask')}",
        teacher=first.teacher,
        tokenizer=first.tokenizer,
        data=data.model_copy(
            update={
                "sha256": data_sha256,
                "stamp": None if answers is None else answers.data.stamp,
            }
        ),
        store=store,
        config=first.config if answers is None else answers.request,
        derived_from=made_of,
        **({} if answers is None else {ANSWERS_BUILD: True}),
    )
    with CacheWriter(output, afresh=f"remove {output} to start afresh") as writer:
        header = writer.begin(
            header, None if writer.begun else TailPrior.estimate(spread(parts), store.vocab_size)
        )
        # Shards are filled in order, so the committed ones are the first ones.
        sequences = _sequences(parts, skip=sum(entry.sequences for entry in writer.entries()))
        shards = len(writer.committed)
        sequence = next(sequences, None)
        while sequence is not None:
            with writer.shard(shards) as shard:
                while sequence is not None and (
                    shard.tokens == 0 or shard.tokens + len(sequence) <= shard_tokens
                ):
                    shard.append(sequence)
                    on_tokens(len(sequence))
                    sequence = next(sequences, None)
            shards += 1
        return writer.finish(header, shards)


def _sequences(parts: list[Part], skip: int) -> Iterator[CachedSequence]:
    for part in parts:
        for index, *_ in part.chosen():
            if skip:
                skip -= 1
            else:
                yield part.sequence(index)
