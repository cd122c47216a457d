"""What of the data counts at a step: the sequences, and the positions of each, from which there is
most to learn.

Everything here needs of the teacher what a cache stores of every position: the target's logprob,
and the entropy. Sequences are chosen by the student as it is, so the choice is part of training; it
draws no random numbers, and ties go to what comes first, so that a resumed run chooses alike.

Shapes: B sequences of a batch, P kept positions of all of them, Q chosen ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache_format import CachedSequence
from logitcask.train.data.batch import Place


def share_of(positions: int, share: float) -> int:
    """How many of a sequence's positions are kept: the share rounded up, so at least one."""
    return math.ceil(positions * share - 1e-9)


def highest_entropy(sequence: CachedSequence, share: float) -> CachedSequence:
    """The sequence with only those kept positions where the teacher's entropy is highest. Needs
    stored entropies.
    """
    assert sequence.entropy is not None
    order = np.argsort(-sequence.entropy, kind="stable")
    return sequence.at(np.sort(order[: share_of(len(order), share)]))


def largest_gaps(gap_P: Tensor, layout: Sequence[Place]) -> Tensor:
    """int64[Q], rising: of each sequence the ``chosen`` positions with the largest gap. Nothing
    waits for the device.
    """
    sequence_P = torch.repeat_interleave(
        torch.arange(len(layout)), torch.tensor([place.kept for place in layout])
    )
    # Sorted by sequence, and inside each by falling gap; where each sequence starts is known
    # beforehand.
    order = torch.argsort(gap_P, descending=True, stable=True)
    order = order[torch.argsort(sequence_P.to(gap_P.device)[order], stable=True)]
    starts = np.cumsum([0, *(place.kept for place in layout)])
    slots = np.concatenate(
        [start + np.arange(place.chosen) for start, place in zip(starts, layout, strict=False)]
    )
    return order[torch.from_numpy(slots).to(gap_P.device)].sort().values


def learnability(gap_P: Tensor, layout: Sequence[Place]) -> NDArray[np.float64]:
    """float64[B], nats: mean over each sequence's positions of student loss minus teacher loss on
    the next tokens.

    ACID (arXiv 2411.18674) keeps the examples where it is largest: not learnt yet by the student,
    and known to be learnable, since the teacher has learnt them. For next-token losses joint
    sampling of a batch falls apart into choosing singly.
    """
    kept = np.array([place.kept for place in layout])
    starts = np.cumsum([0, *kept[:-1]])
    return np.asarray(np.add.reduceat(gap_P.double().cpu().numpy(), starts) / kept)


def most_learnable(scores: NDArray[np.float64], count: int) -> list[int]:
    """The ``count`` sequences with the largest scores, in the order of the batch."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def only_sequences(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """A padded batch with only some of its B sequences, cut to the longest of these."""
    layout = batch["layout"]
    before, starts = batch["input_ids"].shape[1], np.cumsum([0, *(place.kept for place in layout)])
    longest = max(layout[row].tokens for row in rows)
    index = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
    moved = np.concatenate(
        [np.full(layout[row].kept, new * longest - row * before) for new, row in enumerate(rows)]
    )
    chosen = only_positions(batch, torch.from_numpy(index))
    device = batch["input_ids"].device
    for name in ("input_ids", "attention_mask"):
        chosen[name] = batch[name][torch.tensor(rows, device=device), :longest]
    chosen["kept"] = chosen["kept"] + torch.from_numpy(moved).to(device)
    chosen["layout"] = tuple(layout[row] for row in rows)
    return chosen


def only_positions(batch: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """A batch with only the kept positions [Q] at ``index``; the sequences stay."""
    index = index.to(batch["kept"].device)
    at = {name for name in batch if name in ("kept", "labels") or name.startswith("teacher_")}
    return {name: value[index] if name in at else value for name, value in batch.items()}
