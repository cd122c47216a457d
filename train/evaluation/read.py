"""``train-student read``: what a saved model predicts at the positions of a cache, position by
position, as a file (``logitcask.cache_format.readings``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.readings import Reading, ReadingsOf, write_readings
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.mixture import sequences_of
from logitcask.train.data.vocabulary import rows_of
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.losses import SparseTeacher, forward_kl
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.exactness import exactness_of, shortest_head
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.model import compat
from logitcask.train.model.saved import load_saved

_CHUNK = 256
"""Positions with logits, in float64, at any time."""


class Read(NamedTuple):
    """The result. kl: mean KL(teacher || model) over the positions, nats; None for a cache without
    heads. exactness: of the KL; ``none`` then.
    """

    sequences: int
    positions: int
    kl: float | None
    exactness: str


def read_cache(
    model: str, cache: str, out: Path, indices: Sequence[int] | None, batch_size: int
) -> Read:
    """Reads the sequences ``indices`` (None: all) of a cache with a model, and writes ``out``. The
    values of all of them are in memory: 4 bytes for each stored head entry and 12 for a position.

    The logits are the model's own, in float32; everything after them is in float64. The KL is over
    the head's ids and all others as one cell (``forward_kl`` with ``tail="ghost"``): a lower bound
    of that over the whole vocabulary, and the KL itself where the head is everything. Sequences
    without kept positions, or with ids that the model lacks, are left out.

    Raises UserError and its subclasses for a model that does not fit the cache, and for indices
    that the cache does not have.
    """
    reader = CacheReader(cache)
    chosen = None if indices is None else _chosen(reader, indices)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    student, tokenizer = load_saved(model)
    compat.check_model(cache, reader.manifest, student, tokenizer)
    data = sequences_of(reader, rows_of(student), chosen)
    compat.check_vocabulary(data)
    student.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    head = LogitsHead(student)
    kind, tail = _kind(data)
    found = list(_readings(head, data, tail, batch_size))
    restricted = data.vocab_size < reader.manifest.store.vocab_size
    lost = [data.left_out(item) for item in range(len(data))] if restricted else []
    of = ReadingsOf(
        model,
        reader.manifest.fingerprint,
        reader.manifest.content_sha256,
        kind,
        float(np.concatenate(lost).mean()) if lost else 0.0,
    )
    kl = np.concatenate([values.kl for _, _, values in found]).astype(np.float64)
    if not np.isfinite(kl).all() and kind != "none":
        raise UserError(
            f"{model}: its KL is not a number at {int((~np.isfinite(kl)).sum()):,} of {len(kl):,} positions; its weights or its logits are "
            "not finite: use another checkpoint"
        )
    write_readings(out, of, found)
    return Read(len(found), len(kl), None if kind == "none" else float(kl.mean()), kind)


def _chosen(reader: CacheReader, indices: Sequence[int]) -> NDArray[np.bool_]:
    """bool[N]: the sequences with these numbers."""
    outside = [index for index in indices if not 0 <= index < len(reader)]
    if outside or not len(indices):
        raise UserError(
            f"{reader.path} has sequences 0 to {len(reader) - 1}; {outside[0] if outside else 'none'} was asked for"
        )
    found = np.zeros(len(reader), np.bool_)
    found[list(indices)] = True
    return found


def _kind(data: CachedDataset) -> tuple[Exactness | str, str]:
    """The exactness of the KL, ``none`` without heads, and the treatment of the tail."""
    store = data.cache.manifest.store
    tail = "ghost" if store.tail_known else "renormalised"
    if not store.top_k:
        return "none", tail
    teacher = data.teacher(collate([data[0]]))
    return exactness_of("forward_kl", {"tail": tail}, teacher, shortest_head(store)), tail


@torch.no_grad()
def _readings(
    head: LogitsHead, data: CachedDataset, tail: str, batch_size: int
) -> Iterator[tuple[int, NDArray[np.int64], Reading]]:
    """The number of each sequence, its numbers of stored head entries, and its values."""
    device = next(head.backbone.parameters()).device
    for start in ProgressBar(
        range(0, len(data), batch_size), desc="read", unit="batch", leave=False, dynamic_ncols=True
    ):
        items = range(start, min(start + batch_size, len(data)))
        sequences = [data[item] for item in items]
        batch = {name: value.to(device) for name, value in collate(sequences).items()}
        teacher = data.teacher(batch)

        def values(
            batch: dict[str, Tensor] = batch, teacher: SparseTeacher = teacher
        ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
            hidden = head.hidden(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
            hidden_PH = hidden.flatten(0, 1)[batch["kept"]]
            return [
                _of_chunk(head.logits(hidden_PH[rows]), teacher[rows], tail)
                for rows in (slice(at, at + _CHUNK) for at in range(0, len(hidden_PH), _CHUNK))
            ]

        with head.evaluated():
            parts = head.inside(values)
        log_head, log_tail, log_target, kl = (
            torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)
        )
        at = 0
        for item, sequence in zip(items, sequences, strict=True):
            rows = slice(at, at + len(sequence.positions))
            at = rows.stop
            index = int(data.indices[item])
            stored = data.cache[index]
            yield (
                index,
                (stored.ids >= 0).sum(axis=1),
                Reading(
                    _at_stored(log_head[rows], sequence, stored, data.vocab_size),
                    log_tail[rows],
                    log_target[rows],
                    kl[rows] if data.cache.manifest.store.top_k else np.full_like(kl[rows], np.nan),
                ),
            )


def _of_chunk(
    logits_CV: Tensor, teacher: SparseTeacher, tail: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_head [C, K], log_tail, log_target, kl), float64."""
    student = StudentPass(logits_CV.double(), teacher)
    kl = forward_kl(student, teacher, tail=tail)  # type: ignore[arg-type]
    return student.log_head, student.log_Q, student.log_target, kl


def _at_stored(
    log_head: NDArray[np.float32], sequence: CachedSequence, stored: CachedSequence, rows: int
) -> NDArray[np.float32]:
    """[E]: the logprobs at the stored entries, in order. ``sequence``: as the model sees it, without
    the ids from ``rows`` up; the model's columns are of its entries.
    """
    entries = stored.ids[stored.ids >= 0]
    found = np.full(len(entries), -np.inf, np.float32)
    seen = sequence.ids >= 0
    found[entries < rows] = log_head[:, : seen.shape[1]][seen]
    return found
