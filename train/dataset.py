"""The cache as a map-style data set, and the split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib

import torch
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
    teacher_*:                 the fields of SparseTeacher, [P, ...].
    """
    input_ids = pad_sequence([torch.from_numpy(s.input_ids).long() for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    longest = input_ids.shape[1]
    kept = [torch.from_numpy(s.positions).long() + row * longest for row, s in enumerate(sequences)]
    width = max(s.ids.shape[1] for s in sequences)

    def padded(values: list[Tensor], filler: float) -> Tensor:
        return torch.cat(
            [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=filler) for v in values if v.shape[0]]
        )

    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "kept": torch.cat(kept),
        "labels": torch.cat([torch.from_numpy(s.target_ids).long() for s in sequences]),
        "teacher_ids": padded([torch.from_numpy(s.ids).long() for s in sequences], -1),
        "teacher_logprobs": padded([torch.from_numpy(s.logprobs) for s in sequences], -torch.inf),
        "teacher_tail_logprob": torch.cat([torch.from_numpy(s.tail_logprob) for s in sequences]),
        "teacher_target_logprob": torch.cat([torch.from_numpy(s.target_logprob) for s in sequences]),
    }


def teacher_of(batch: dict[str, Tensor], vocab_size: int) -> SparseTeacher:
    """The SparseTeacher of a collated batch."""
    return SparseTeacher(
        ids=batch["teacher_ids"],
        logprobs=batch["teacher_logprobs"],
        tail_logprob=batch["teacher_tail_logprob"],
        target_ids=batch["labels"],
        target_logprob=batch["teacher_target_logprob"],
        vocab_size=vocab_size,
    )
