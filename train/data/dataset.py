"""The cache as a map-style data set, and its held-out sequences."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence as SequenceOf
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.catalog.home import note_use
from logitcask.cache_format.storage.files import is_local, open_filesystem
from logitcask.train.data.batch import teacher_of
from logitcask.train.data.vocabulary import left_out, restricted
from logitcask.train.distributed import gathered, machine, processes
from logitcask.train.losses import SparseTeacher


class CachedDataset(Dataset[CachedSequence]):
    """Some sequences of a cache, by their index there.

    rows: number of ids that the student predicts; other ids of the teacher are left out
        (``logitcask.train.data.vocabulary``). None: the student has all of the teacher's ids.
    """

    def __init__(
        self,
        cache: CacheReader,
        indices: SequenceOf[int] | NDArray[np.int64],
        rows: int | None = None,
    ) -> None:
        self.cache = cache
        self.indices = indices
        predicted = cache.manifest.store.vocab_size
        self.vocab_size = predicted if rows is None else min(rows, predicted)
        note_use(cache.path)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> CachedSequence:
        sequence, predicted = (
            self.cache[int(self.indices[item])],
            self.cache.manifest.store.vocab_size,
        )
        return (
            sequence
            if self.vocab_size == predicted
            else restricted(sequence, self.vocab_size, predicted)
        )

    def first(self, count: int | None) -> CachedDataset:
        """The first ``count`` of these sequences; None: all."""
        rows = None if self.vocab_size == self.cache.manifest.store.vocab_size else self.vocab_size
        return CachedDataset(self.cache, self.indices[:count], rows)

    def left_out(self, item: int) -> NDArray[np.float64]:
        """float64[P]: the share of the teacher's mass on ids that the student lacks."""
        return left_out(self.cache[int(self.indices[item])], self.vocab_size)

    def __getitems__(self, items: list[int]) -> list[CachedSequence]:
        """Several sequences, read in stored order, so that each record batch is decoded once."""
        found = {
            item: self[item] for item in sorted(items, key=lambda item: int(self.indices[item]))
        }
        return [found[item] for item in items]

    def teacher(self, batch: dict[str, Tensor]) -> SparseTeacher:
        """The teacher of a collated batch, on the batch's device."""
        device = batch["labels"].device
        prior = None if self._prior is None else self._prior.to(device)
        store = self.cache.manifest.store
        if store.top_k and not batch["teacher_ids"].shape[1]:
            # All heads of this batch are empty. Zero columns would mean a cache without heads.
            empty = batch["teacher_ids"].new_full((len(batch["labels"]), 1), -1)
            batch = {
                **batch,
                "teacher_ids": empty,
                "teacher_logprobs": torch.full_like(empty, -torch.inf, dtype=torch.float32),
            }
        return teacher_of(
            batch,
            self.vocab_size,
            prior,
            tail_known=store.tail_known,
            targets_known=store.targets_known,
            # Of the tail's mass and of the chosen ids' together.
            rounding=math.expm1(store.rounding) + math.expm1(store.scalar_step / 2),
        )

    @cached_property
    def _prior(self) -> Tensor | None:
        if self.cache.prior is None:
            return None
        known = self.cache.prior.probabilities()[: self.vocab_size]
        return torch.from_numpy(known / known.sum()).float()


class HeldOut(Dataset[CachedSequence]):
    """The held-out sequences of all caches, one cache after the other; ``parts``: one per cache."""

    def __init__(self, parts: list[CachedDataset]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, item: int) -> CachedSequence:
        for part in self.parts:
            if item < len(part):
                return part[item]
            item -= len(part)
        raise IndexError("past the last held-out sequence")


def check_shards(caches: list[CacheReader]) -> None:
    """Checks the sha256 of local shards once per machine if several processes train together.

    The processes of one machine that see the same folders divide the shards among them, and each
    relies on the checks of the others. If a shard is damaged, every process raises the error of the
    first process that found one. A single process checks shards when it reads them.
    """
    rank, count = processes()
    if count == 1:
        return
    here = machine(), [_folder(cache) for cache in caches]
    mates = [other for other, there in enumerate(gathered(here)) if there == here]
    shards = [(cache, shard) for cache in caches for shard in range(len(cache.manifest.shards))]
    error: Exception | None = None
    try:
        for cache, shard in shards[mates.index(rank) :: len(mates)]:
            cache.check_once(shard)
    except Exception as found:  # raised below, in every process
        error = found
    outcomes = gathered(([cache.checked for cache in caches], error))
    if (raised := next((error for _, error in outcomes if error is not None), None)) is not None:
        raise raised
    for mate in mates:
        for cache, checked in zip(caches, outcomes[mate][0], strict=True):
            cache.checked |= checked


def _folder(cache: CacheReader) -> tuple[int, int] | None:
    """Identity of a cache's folder on this machine, independent of its path; None if remote."""
    filesystem, root = open_filesystem(cache.path)
    if not is_local(filesystem):
        return None
    status = os.stat(root)
    return status.st_dev, status.st_ino
