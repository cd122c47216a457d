"""Pairs of texts: the sequences of two caches that answer the same prompts, read together.

Shapes: P kept positions of a batch, B its sequences, N the pairs of two caches, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.train.data.batch import Place
from logitcask.train.data.order import Units
from logitcask.train.losses import PairTexts

log = logging.getLogger(__name__)


def same_ids(
    caches: tuple[CacheReader, CacheReader], chosen: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(int64[N], int64[N]): the sequences of the first and the second cache that have one id, in
    the order of the second. ``chosen``: the usable ones of each, by index.

    Logs the number of sequences without a partner, which are left out. Raises UserError if no two
    have the same id.
    """
    names = [_ids(cache) for cache in caches]
    first = {names[0][index]: index for index in chosen[0].tolist()}
    both = [index for index in chosen[1].tolist() if names[1][index] in first]
    if not both:
        raise UserError(
            f"{caches[0].path} and {caches[1].path} are to be read in pairs (preferred), but no sequence of one has the id of a "
            "usable one of the other; use two caches of the same prompts"
        )
    if len(both) < max(len(chosen[0]), len(chosen[1])):
        log.warning(
            "%s of %s sequences of %s and %s of %s of %s are left out: they have no partner in the other cache",
            f"{len(chosen[0]) - len(both):,}",
            f"{len(chosen[0]):,}",
            caches[0].path,
            f"{len(chosen[1]) - len(both):,}",
            f"{len(chosen[1]):,}",
            caches[1].path,
        )
    partners = [first[names[1][index]] for index in both]
    return np.array(partners, np.int64), np.array(both, np.int64)


def _ids(cache: CacheReader) -> list[str]:
    return [each for column in cache.iter_column("sequence_id") for each in column.to_pylist()]


def pair_units(preferred: Units, other: Units) -> Units:
    """A unit for each pair of ``same_ids``: the two sequences of one number, the preferred first.
    A pair has the place of its second sequence.
    """
    count = len(other)
    return Units(
        first=np.arange(0, 2 * count + 1, 2),
        members=np.repeat(np.arange(count), 2),
        tokens=preferred.tokens + other.tokens,
        kept=preferred.kept + other.kept,
        shard=other.shard,
        block=other.block,
    )


def number_of_pairs(layout: Sequence[Place]) -> int:
    """The pairs of a batch."""
    return sum(place.pair is not None and place.pair[1] for place in layout)


def positions_of_pairs(layout: Sequence[Place]) -> int:
    """The kept positions of a batch that are of pairs."""
    return sum(place.kept for place in layout if place.pair is not None)


def pair_texts(
    layout: Sequence[Place], log_q_P: Tensor, log_p_P: Tensor, per_pair: Tensor | float
) -> PairTexts:
    """The pair of each of the P positions of a batch. At the positions of no pair it is made of the
    position's own text alone, which no loss reads.

    log_q_P, log_p_P: nats, the student's and the teacher's logprobs of the targets, float[P].
    per_pair: the mean number of positions of a pair in the whole optimizer step.
    """
    device = log_q_P.device
    # For each sequence: its own number, and the numbers of its pair's preferred and other text.
    of_pair: dict[tuple[int, bool], int] = {
        place.pair: number for number, place in enumerate(layout) if place.pair is not None
    }
    texts: NDArray[np.int64] = np.array(
        [
            (number, number)
            if place.pair is None
            else (of_pair[place.pair[0], True], of_pair[place.pair[0], False])
            for number, place in enumerate(layout)
        ],
        np.int64,
    ).reshape(-1, 2)
    preferred = [place.pair is not None and place.pair[1] for place in layout]
    kept_B = torch.tensor([place.kept for place in layout])
    sequence_P = torch.repeat_interleave(torch.arange(len(layout)), kept_B).to(device)
    # Sums over each sequence, then those of the two texts of a pair at each of its positions. Rows
    # are added up, because the order of additions to an index differs from run to run on a GPU.
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums_B = [
        pad_sequence(each.to(wide).split(kept_B.tolist()), batch_first=True).sum(1)
        for each in (log_q_P.detach(), log_p_P)
    ]
    texts_P2 = torch.from_numpy(texts).to(device)[sequence_P]
    tokens_P2 = kept_B.to(device)[texts_P2].to(log_q_P.dtype)
    log_q_P2, log_p_P2 = (each[texts_P2].to(log_q_P.dtype) for each in sums_B)
    return PairTexts(
        preferred=torch.tensor(preferred, dtype=torch.bool, device=device)[sequence_P],
        log_q=log_q_P2,
        log_p=log_p_P2,
        tokens=tokens_P2,
        share=per_pair / tokens_P2.sum(1),
    )
