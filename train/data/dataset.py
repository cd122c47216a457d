"""The cache as a map-style data set, and the split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.manifest import DataIdentity
from logitcask.cache_format.storage.files import is_local, open_filesystem
from logitcask.train.data.vocabulary import left_out, restricted
from logitcask.train.distributed import gathered, machine, processes
from logitcask.train.losses import SparseTeacher


class CachedDataset(Dataset[CachedSequence]):
    """Some sequences of a cache, by their index there.

    rows: ids that the student predicts; those of the teacher beyond them are left out (``logitcask.train.data.vocabulary``). None: the
        student has all of the teacher's.
    """

    def __init__(
        self, cache: CacheReader, indices: SequenceOf[int] | NDArray[np.int64], rows: int | None = None
    ) -> None:
        self.cache = cache
        self.indices = indices
        predicted = cache.manifest.store.vocab_size
        self.vocab_size = predicted if rows is None else min(rows, predicted)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> CachedSequence:
        sequence, predicted = self.cache[int(self.indices[item])], self.cache.manifest.store.vocab_size
        return sequence if self.vocab_size == predicted else restricted(sequence, self.vocab_size, predicted)

    def left_out(self, item: int) -> NDArray[np.float64]:
        """float64[P]: the share of the teacher's mass that a sequence has lost, being on ids that the student lacks."""
        return left_out(self.cache[int(self.indices[item])], self.vocab_size)

    def __getitems__(self, items: list[int]) -> list[CachedSequence]:
        """Several, read in the order in which they are stored, so that what lies together is decoded once."""
        found = {item: self[item] for item in sorted(items, key=lambda item: int(self.indices[item]))}
        return [found[item] for item in items]

    def teacher(self, batch: dict[str, Tensor]) -> SparseTeacher:
        """The teacher of a collated batch, on the batch's device."""
        device = batch["labels"].device
        prior = None if self._prior is None else self._prior.to(device)
        store = self.cache.manifest.store
        if store.top_k and not batch["teacher_ids"].shape[1]:
            # All heads of this batch are empty. No column at all would mean a cache without heads.
            empty = batch["teacher_ids"].new_full((len(batch["labels"]), 1), -1)
            batch = {
                **batch,
                "teacher_ids": empty,
                "teacher_logprobs": torch.full_like(empty, -torch.inf, dtype=torch.float32),
            }
        return teacher_of(batch, self.vocab_size, prior)

    @cached_property
    def _prior(self) -> Tensor | None:
        if self.cache.prior is None:
            return None
        known = self.cache.prior.probabilities()[: self.vocab_size]
        return torch.from_numpy(known / known.sum()).float()


class HeldOut(Dataset[CachedSequence]):
    """The held-out sequences of one cache after the other; ``parts`` are those of each."""

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


def is_held_out(sequence_id: str, data: DataIdentity, share: float) -> bool:
    """Whether a sequence is held out: by what ``row_of`` says, so that it is in every run, order and subset of the data."""
    # Salted, since data may well lie in the order of some hash of its ids.
    digest = hashlib.sha256(f"held out\0{row_of(sequence_id, data)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def row_of(sequence_id: str, data: DataIdentity) -> str:
    """The row of the data that a sequence was made of: pieces of one document and answers to one prompt have the same.

    Such sequences are called ``row/number``. Answers are known to be; pieces are told by their rows, which are called
    ``split/number``, or end in ``#number``, unless the data has ids of its own: then each piece counts as a row.
    """
    if data.mask_policy == "generated":
        return sequence_id.rpartition("/")[0]
    split = "[^/]+" if data.split == "mixed" else re.escape(data.split)
    piece = re.fullmatch(rf"((?:\d+/)*{split}/\d+|.*#\d+)/\d+", sequence_id, re.DOTALL)
    return piece[1] if piece else sequence_id


@dataclass(frozen=True, eq=False)
class CacheIndex:
    """What is known of a cache's N sequences before any is decoded.

    held_out: bool[N]. tokens: int32[N]. kept: int32[N], kept positions. largest: int32[N], the largest id of its tokens.
    """

    held_out: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    kept: NDArray[np.int32]
    largest: NDArray[np.int32]


def check_shards(caches: list[CacheReader]) -> None:
    """Checks the sha256 of local shards once a machine, where several processes train together.

    Processes of one machine that see the same folders share them out: each checks its part and takes the others' word for
    theirs. Raises, in every process, what the first of them that found something wrong has raised. A process that trains
    alone checks shards as it reads them.
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
    """Which folder of this machine a cache lies in, whatever its path; None for a remote one."""
    filesystem, root = open_filesystem(cache.path)
    if not is_local(filesystem):
        return None
    status = os.stat(root)
    return status.st_dev, status.st_ino


def read_index(cache: CacheReader, share: float) -> CacheIndex:
    """Reads three columns of the whole cache, once, shard after shard; ``share`` of the data's rows are held out."""
    data = cache.manifest.data
    held_out: list[bool] = []
    tokens, kept, largest = ([np.zeros(0, np.int32)] for _ in range(3))
    columns = (cache.iter_column(name) for name in ("sequence_id", "input_ids", "positions"))
    for ids, inputs, positions in zip(*columns, strict=True):
        held_out += [is_held_out(sequence_id, data, share) for sequence_id in ids.to_pylist()]
        tokens.append(inputs.value_lengths().to_numpy())
        kept.append(positions.value_lengths().to_numpy())
        # One 0 more, so that every start is the index of something.
        ids, starts = np.append(inputs.flatten().to_numpy(), np.int32(0)), np.cumsum(tokens[-1]) - tokens[-1]
        largest.append(np.maximum.reduceat(ids, starts))
    return CacheIndex(np.array(held_out, np.bool_), *map(np.concatenate, (tokens, kept, largest)))


def collate(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """Pads B sequences to the longest, T tokens; P is the number of kept positions of all of them together.

    input_ids, attention_mask: int64[B, T].
    kept:                      int64[P], indices into the flattened [B * T] positions.
    labels, teacher_*:         see ``at_positions``.
    """
    input_ids = pad_sequence([torch.from_numpy(s.input_ids).long() for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    longest = input_ids.shape[1]
    kept = [torch.from_numpy(s.positions).long() + row * longest for row, s in enumerate(sequences)]
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "kept": torch.cat(kept),
        **at_positions(sequences),
    }


def at_positions(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """What a batch holds of each of its P kept positions, sequence after sequence.

    labels:    int64[P], the token that follows each kept position: the hard labels. Nothing shifts after this.
    teacher_*: the fields of SparseTeacher, [P, ...]; all sets of tail samples pooled. A field that only some sequences have
               (they are of different caches) is padded for the others, an entropy with NaN: see ``Mixture.teachers``.
    """
    batch = {
        "labels": torch.cat([torch.from_numpy(s.target_ids).long() for s in sequences]),
        "teacher_ids": _stacked([s.ids for s in sequences], -1).long(),
        "teacher_logprobs": _stacked([s.logprobs for s in sequences], -torch.inf),
        "teacher_tail_logprob": torch.cat([torch.from_numpy(s.tail_logprob) for s in sequences]),
        "teacher_target_logprob": torch.cat([torch.from_numpy(s.target_logprob) for s in sequences]),
    }
    if any(s.entropy is not None for s in sequences):
        unknown = [np.full(len(s.positions), np.nan, np.float32) if s.entropy is None else s.entropy for s in sequences]
        batch["teacher_entropy"] = torch.cat([torch.from_numpy(values) for values in unknown])
    samples = [s.samples for s in sequences]
    if any(s is not None for s in samples):
        ids = [
            np.zeros((len(each.positions), 0), np.int32) if s is None else _pooled(s.ids)
            for s, each in zip(samples, sequences, strict=True)
        ]
        batch["teacher_samples"] = _stacked(ids, -1).long()
        if any(s is not None and s.logprobs is not None for s in samples):
            logprobs = [
                np.full(drawn.shape, -np.inf, np.float32) if s is None or s.logprobs is None else _pooled(s.logprobs)
                for s, drawn in zip(samples, ids, strict=True)
            ]
            batch["teacher_sample_logprobs"] = _stacked(logprobs, -torch.inf)
    return batch


def _pooled(sets: NDArray[Any]) -> NDArray[Any]:
    """[P, T, S] -> [P, T * S]: all sets as one. Every set of a position has as many draws, so their mean is the pool's."""
    positions, count, draws = sets.shape  # any of them may be 0
    return sets.reshape(positions, count * draws)


def _stacked(parts: list[NDArray[Any]], filler: float) -> Tensor:
    """Parts [P_i, width_i] as one [sum of P_i, widest]."""
    width = max(part.shape[1] for part in parts)
    whole = np.full((sum(len(part) for part in parts), width), filler, parts[0].dtype)
    at = 0
    for part in parts:
        whole[at : at + len(part), : part.shape[1]] = part
        at += len(part)
    return torch.from_numpy(whole)


def teacher_of(batch: dict[str, Tensor], vocab_size: int, prior: Tensor | None = None) -> SparseTeacher:
    """The SparseTeacher of a collated batch; ``prior`` is the cache's, float32[vocab_size], where it has one."""
    return SparseTeacher(
        ids=batch["teacher_ids"],
        logprobs=batch["teacher_logprobs"],
        tail_logprob=batch["teacher_tail_logprob"],
        target_ids=batch["labels"],
        target_logprob=batch["teacher_target_logprob"],
        vocab_size=vocab_size,
        samples=batch.get("teacher_samples"),
        sample_logprobs=batch.get("teacher_sample_logprobs"),
        entropy=batch.get("teacher_entropy"),
        prior=prior,
    )
