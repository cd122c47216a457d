"""Cached sequences as tensors: the padded batch, and the teacher of its positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logitcask.cache_format import CachedSequence, ChosenIds
from logitcask.train.losses import ChosenTail, SparseTeacher, TailDraws


def collate(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """Pads B sequences to the longest, T tokens. P is the total number of their kept positions.

    input_ids, attention_mask: int64[B, T].
    kept:                      int64[P], indices into the flattened [B * T] positions.
    labels, teacher_*:         see ``at_positions``.
    """
    input_ids = pad_sequence(
        [torch.from_numpy(s.input_ids).long() for s in sequences], batch_first=True
    )
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
    """The fields of a batch at each of its P kept positions, sequence by sequence.

    labels:    int64[P], the token after each kept position: the hard labels. Nothing is shifted
               after this.
    teacher_*: the fields of SparseTeacher, [P, ...]; teacher_samples and teacher_sample_logprobs
               are those of its draws, with all sets pooled; teacher_chosen and
               teacher_chosen_logprobs the chosen ids of the tail. If only some sequences have a
               field (they come from different caches), it is padded for the others, an entropy and
               a writer's logprob with NaN (see ``Mixture.teachers``).
    """
    batch = {
        "labels": torch.cat([torch.from_numpy(s.target_ids).long() for s in sequences]),
        "teacher_ids": _stacked([s.ids for s in sequences], -1).long(),
        "teacher_logprobs": _stacked([s.logprobs for s in sequences], -torch.inf),
        "teacher_tail_logprob": torch.cat([torch.from_numpy(s.tail_logprob) for s in sequences]),
        "teacher_target_logprob": torch.cat(
            [torch.from_numpy(s.target_logprob) for s in sequences]
        ),
    }
    for name in ("entropy", "writer_logprob"):
        values = [getattr(s, name) for s in sequences]
        if any(each is not None for each in values):
            known = [
                np.full(len(s.positions), np.nan, np.float32) if each is None else each
                for s, each in zip(sequences, values, strict=True)
            ]
            batch[f"teacher_{name}"] = torch.cat([torch.from_numpy(each) for each in known])
    samples = [s.samples for s in sequences]
    if any(s is not None for s in samples):
        ids = [
            np.zeros((len(each.positions), 0), np.int32) if s is None else _pooled(s.ids)
            for s, each in zip(samples, sequences, strict=True)
        ]
        batch["teacher_samples"] = _stacked(ids, -1).long()
        if any(s is not None and s.logprobs is not None for s in samples):
            logprobs = [
                np.full(drawn.shape, -np.inf, np.float32)
                if s is None or s.logprobs is None
                else _pooled(s.logprobs)
                for s, drawn in zip(samples, ids, strict=True)
            ]
            batch["teacher_sample_logprobs"] = _stacked(logprobs, -torch.inf)
    if any(s.chosen is not None for s in sequences):
        chosen = [
            ChosenIds(s.ids[:, :0], s.logprobs[:, :0])
            if s.chosen is None
            else s.chosen.outside(s.ids)
            for s in sequences
        ]
        batch["teacher_chosen"] = _stacked([each.ids for each in chosen], -1).long()
        batch["teacher_chosen_logprobs"] = _stacked([each.logprobs for each in chosen], -torch.inf)
    return batch


def _pooled(sets: NDArray[Any]) -> NDArray[Any]:
    """[P, T, S] -> [P, T * S]: all sets as one. The sets of a position have the same size, so the
    mean of the sets is the mean of the pool.
    """
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


def teacher_of(
    batch: dict[str, Tensor],
    vocab_size: int,
    prior: Tensor | None = None,
    *,
    tail_known: bool = True,
    targets_known: bool = True,
    rounding: float = 0.0,
) -> SparseTeacher:
    """The SparseTeacher of a batch; ``prior``: the cache's, float32[vocab_size], or None.

    tail_known, targets_known: as the cache's manifest has them.
    rounding: as for ``ChosenTail.of``.
    """
    drawn = batch.get("teacher_samples")
    chosen = None
    if (ids := batch.get("teacher_chosen")) is not None:
        chosen = ChosenTail.of(
            ids,
            batch["teacher_chosen_logprobs"],
            head_ids=batch["teacher_ids"],
            tail_logprob=batch["teacher_tail_logprob"],
            vocab_size=vocab_size,
            rounding=rounding,
        )
    return SparseTeacher(
        ids=batch["teacher_ids"],
        logprobs=batch["teacher_logprobs"],
        tail_logprob=batch["teacher_tail_logprob"],
        target_ids=batch["labels"],
        target_logprob=batch["teacher_target_logprob"],
        vocab_size=vocab_size,
        draws=None if drawn is None else TailDraws(drawn, batch.get("teacher_sample_logprobs")),
        entropy=batch.get("teacher_entropy"),
        writer_logprob=batch.get("teacher_writer_logprob"),
        prior=prior,
        tail_known=tail_known,
        targets_known=targets_known,
        chosen=chosen,
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Sizes of one sequence of a batch, known without a transfer from the batch's device.

    It is not a tuple, because the code that moves batches to devices and through wrappers takes
    tuples apart.

    source: number of its cache. tokens, kept: numbers of its tokens and kept positions. chosen:
    number of kept positions in the loss. pair: None, or the number of its pair in the batch, and
    whether it is the preferred one of the two.
    """

    source: int
    tokens: int
    kept: int
    chosen: int
    pair: tuple[int, bool] | None = None
