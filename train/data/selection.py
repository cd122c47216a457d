"""Selection of the data of a step: the sequences and positions from which there is most to learn.

The selection uses the data that a cache stores at every position: the target's logprob and the
entropy. It also depends on the current student, so it is part of training. It uses no random
numbers, and the first of several equal candidates wins, so a resumed run selects the same.

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
    """Number of a sequence's positions to keep: the share rounded up, so at least one."""
    return math.ceil(positions * share - 1e-9)


def highest_entropy(sequence: CachedSequence, share: float) -> CachedSequence:
    """The sequence with only the kept positions of highest stored entropy of the teacher."""
    assert sequence.entropy is not None
    order = np.argsort(-sequence.entropy, kind="stable")
    return sequence.at(np.sort(order[: share_of(len(order), share)]))


def largest_gaps(gap_P: Tensor, layout: Sequence[Place]) -> Tensor:
    """int64[Q], ascending: the ``chosen`` positions of each sequence with the largest gap. Does not
    wait for the device.
    """
    sequence_P = torch.repeat_interleave(
        torch.arange(len(layout)), torch.tensor([place.kept for place in layout])
    )
    # Sorted by sequence, and inside each by descending gap. The start of each sequence is known
    # from the counts.
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

    ACID (arXiv 2411.18674) keeps the examples with the largest value. The student has not learnt
    them yet, and they can be learnt, because the teacher has learnt them. For next-token losses the
    joint sampling of a batch is the same as choosing each example on its own.
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
