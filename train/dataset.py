"""The cache as a map-style data set, and the split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cache_format import CachedSequence, CacheReader
from train.losses import SparseTeacher


class CachedDataset(Dataset[CachedSequence]):
    """Some sequences of a cache, by their index there."""

    def __init__(self, cache: CacheReader, indices: list[int]) -> None:
        self.cache = cache
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> CachedSequence:
        return self.cache[self.indices[item]]

    def teacher(self, batch: dict[str, Tensor]) -> SparseTeacher:
        """The teacher of a collated batch, on the batch's device."""
        device = batch["labels"].device
        prior = None if self._prior is None else self._prior.to(device)
        return teacher_of(batch, self.cache.manifest.store.vocab_size, prior)

    @cached_property
    def _prior(self) -> Tensor | None:
        prior = self.cache.prior
        return None if prior is None else torch.from_numpy(prior.probabilities()).float()


def is_held_out(sequence_id: str, share: float) -> bool:
    """Whether a sequence is held out: by its id alone, so that it is in every run, order and subset of the data."""
    return int.from_bytes(hashlib.sha256(sequence_id.encode()).digest()[:8], "big") < share * 2**64


def split(cache: CacheReader, share: float) -> tuple[list[int], list[int]]:
    """Indices of the sequences to train on and of those held out; sequences without kept positions are in neither."""
    train: list[int] = []
    held_out: list[int] = []
    index = 0
    for ids, positions in zip(cache.iter_column("sequence_id"), cache.iter_column("positions"), strict=True):
        for sequence_id, kept in zip(ids.to_pylist(), positions.value_lengths().to_pylist(), strict=True):
            if kept:
                (held_out if is_held_out(sequence_id, share) else train).append(index)
            index += 1
    return train, held_out


def collate(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """Pads B sequences to the longest, T tokens; P is the number of kept positions of all of them together.

    input_ids, attention_mask: int64[B, T].
    kept:                      int64[P], indices into the flattened [B * T] positions.
    labels:                    int64[P], the token that follows each kept position: the hard labels. Nothing shifts after this.
    teacher_*:                 the fields of SparseTeacher, [P, ...]; all sets of tail samples pooled.
    """
    input_ids = pad_sequence([torch.from_numpy(s.input_ids).long() for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    longest = input_ids.shape[1]
    kept = [torch.from_numpy(s.positions).long() + row * longest for row, s in enumerate(sequences)]
    batch = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "kept": torch.cat(kept),
        "labels": torch.cat([torch.from_numpy(s.target_ids).long() for s in sequences]),
        "teacher_ids": _stacked([s.ids for s in sequences], -1).long(),
        "teacher_logprobs": _stacked([s.logprobs for s in sequences], -torch.inf),
        "teacher_tail_logprob": torch.cat([torch.from_numpy(s.tail_logprob) for s in sequences]),
        "teacher_target_logprob": torch.cat([torch.from_numpy(s.target_logprob) for s in sequences]),
    }
    entropy = [s.entropy for s in sequences if s.entropy is not None]
    if entropy:
        batch["teacher_entropy"] = torch.cat([torch.from_numpy(values) for values in entropy])
    samples = [s.samples for s in sequences if s.samples is not None]
    if samples:
        batch["teacher_samples"] = _stacked([_pooled(s.ids) for s in samples], -1).long()
    logprobs = [_pooled(s.logprobs) for s in samples if s.logprobs is not None]
    if logprobs:
        batch["teacher_sample_logprobs"] = _stacked(logprobs, -torch.inf)
    return batch


def _pooled(sets: NDArray[Any]) -> NDArray[Any]:
    """[P, T, S] -> [P, T * S]: all sets as one. Every set of a position has as many draws, so their mean is the pool's."""
    return sets.reshape(len(sets), -1)


def _stacked(parts: list[NDArray[Any]], filler: float) -> Tensor:
    """Parts [P_i, width_i] as one [sum of P_i, widest]."""
    width = max(part.shape[1] for part in parts)
    return torch.cat(
        [
            torch.nn.functional.pad(torch.from_numpy(part), (0, width - part.shape[1]), value=filler)
            for part in parts
            if part.shape[0]
        ]
    )


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
