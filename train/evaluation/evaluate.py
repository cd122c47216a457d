"""Held-out metrics: the distance of a student from the teacher and from the text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from logitcask.cache_format.export.token_text import TokenText
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.train import distributed
from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.evaluation.measured import Measured, MeasuredBatch, teacher_values
from logitcask.train.evaluation.metrics import (
    Calibration,
    perplexity,
    rank_agreement,
    rank_correlation,
)
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.losses import SparseTeacher, forward_kl, reverse_kl

SHOWN = 5
"""Most probable tokens shown per example."""


def evaluate(
    head: LogitsHead, data: HeldOut, *, k: int, batch_size: int, logits_chunk: int | None
) -> Measured:
    """The metrics at the kept positions of ``data``, as sums; ``Measured.means`` has their means.

    kl: KL(teacher || student), nats. reverse_kl: KL(student || teacher) with everything outside the
    head as one cell, nats. ``logitcask.train.evaluation.kinds`` has the exactness of both. ce,
    perplexity: of the data's own next tokens (nats, and exp of it). top1_agreement, mor@k, cr@k,
    spearman@k, ece: see ``logitcask.train.evaluation.metrics``; ece is of the data's own next
    tokens.

    The metrics that use the teacher's most probable ids (reverse_kl, top1_agreement, mor, cr,
    spearman) are left out if a cache of ``data`` has no heads.

    The batches are divided among the processes, and all processes get the same result.
    """
    found = Measured(len(data))
    for batch in _batches(head, data, k=k, batch_size=batch_size, logits_chunk=logits_chunk):
        found.add(batch)
    return Measured.merged(distributed.gathered(found))


@torch.no_grad()
def _batches(
    head: LogitsHead, data: HeldOut, *, k: int, batch_size: int, logits_chunk: int | None
) -> Iterator[MeasuredBatch]:
    """The metrics of ``evaluate`` at every kept position of ``data``, batch by batch: those of the
    batches that fall to this process.
    """
    heads = all(cached.cache.manifest.store.top_k for cached in data.parts)
    # A SparseTeacher belongs to one cache, so each cache has its own batches.
    before = itertools.accumulate((len(cached) for cached in data.parts), initial=0)
    batches = [
        (cached, offset, range(start, min(start + batch_size, len(cached))))
        for cached, offset in zip(data.parts, before, strict=False)
        for start in range(0, len(cached), batch_size)
    ]
    process, processes = distributed.processes()
    # Sharded models compute together, so every process takes the same number of batches. A surplus
    # batch does not count.
    rounds = range(process, -(-len(batches) // processes) * processes, processes)
    for at in ProgressBar(
        rounds,
        desc="evaluate",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=not distributed.is_main(),
    ):
        cached, offset, items = batches[at % len(batches)]
        batch = collate([cached[item] for item in items])
        with head.evaluated():
            values = head.inside(
                partial(_measured, head, cached, batch, k if heads else 0, logits_chunk)
            )
        if at < len(batches):
            sequence_P = batch["kept"] // batch["input_ids"].shape[1]
            teacher = teacher_values(cached, batch)
            yield MeasuredBatch(offset + items.start, sequence_P, values, teacher)


def _measured(
    head: LogitsHead,
    cached: CachedDataset,
    batch: dict[str, Tensor],
    k: int,
    logits_chunk: int | None,
) -> dict[str, Tensor]:
    """The metrics at each position; k = 0 for those that need no heads."""
    teacher, hidden_PH = _run(head, cached, batch)

    def measure(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        part = teacher[rows]
        values = {
            "kl": forward_kl(logits_CV, part),
            "ce": cross_entropy(logits_CV.float(), part.target_ids, reduction="none"),
            **_confidence(logits_CV, part.target_ids),
        }
        if k:
            agreement = rank_agreement(logits_CV, part, k)
            values |= {
                "reverse_kl": reverse_kl(logits_CV, part, tail=reverse_tail(part)),
                "top1_agreement": agreement.top_1.float(),
                f"mor@{k}": agreement.overlap,
                f"cr@{k}": agreement.identical.float(),
                f"spearman@{k}": rank_correlation(logits_CV, part, k),
            }
        return values["kl"], values

    return head_losses(head, hidden_PH, measure, chunk_size=logits_chunk).values


def reverse_tail(teacher: SparseTeacher) -> Literal["ghost", "renormalised"]:
    """The treatment of the tail in the metric ``reverse_kl``."""
    return "ghost" if teacher.tail_known else "renormalised"


def _confidence(logits_CV: Tensor, target_ids_C: Tensor) -> dict[str, Tensor]:
    """The probability of the most probable token, and whether it is the next token."""
    highest, at = logits_CV.float().max(1)
    return {
        "confidence": (highest - logits_CV.float().logsumexp(1)).exp(),
        "right": at == target_ids_C,
    }


def teacher_reference(data: HeldOut) -> dict[str, float | None]:
    """The teacher's own metrics on the same positions, from the cache: ce (nats), perplexity, ece;
    and the number of positions.

    There is no ece for a cache without heads, because it lacks the teacher's most probable token,
    nor for one that does not know the mass outside its heads. ce and perplexity are None if a cache
    does not know all targets' logprobs.
    ``left_out`` (if the student has fewer ids than a teacher): the mean share of the teacher's mass
    on ids that the student lacks.
    """
    total, positions = 0.0, 0
    calibration, heads = Calibration(), False
    lost: float | None = None
    stores = [part.cache.manifest.store for part in data.parts]
    known = all(s.tail_known for s in stores), all(s.targets_known for s in stores)
    for part in data.parts:
        for item in range(len(part)):
            sequence = part[item]
            total -= float(sequence.target_logprob.sum())
            positions += len(sequence.positions)
            if part.vocab_size < part.cache.manifest.store.vocab_size:
                lost = (lost or 0.0) + float(part.left_out(item).sum())
            if sequence.ids.shape[1] and known[0]:
                heads = True
                calibration.add(
                    torch.from_numpy(sequence.logprobs[:, 0]).exp(),
                    torch.from_numpy(sequence.target_rank == 0),
                )
    found: dict[str, float | None] = {
        "ce": total / positions if known[1] else None,
        "perplexity": perplexity(total / positions) if known[1] else None,
        "positions": positions,
    }
    if lost is not None:
        found["left_out"] = lost / positions
    return {**found, "ece": calibration.error()} if heads else found


@torch.no_grad()
def examples(
    head: LogitsHead, data: HeldOut, tokenizer: Any, *, count: int = 10
) -> list[dict[str, Any]]:
    """Some held-out positions with the predictions of both models.

    Each has ``context`` (the text before), ``target`` (the token that follows) and, as lists of
    (token, probability), ``teacher`` and ``student``.
    """
    part = data.parts[0]
    batch = collate([part[index] for index in range(min(len(part), 2))])

    def most_probable() -> tuple[SparseTeacher, Tensor, Tensor, Tensor]:
        teacher, hidden_PH = _run(head, part, batch)
        chosen = torch.linspace(0, len(teacher) - 1, min(count, len(teacher))).long()
        return teacher, chosen, *head.logits(hidden_PH[chosen]).float().softmax(-1).topk(SHOWN)

    with head.evaluated():
        teacher, chosen, probabilities, ids = head.inside(most_probable)
    longest = batch["input_ids"].shape[1]
    text = TokenText(tokenizer)
    shown = []
    for row, at in enumerate(chosen.tolist()):
        sequence, position = divmod(int(batch["kept"][at]), longest)
        context = batch["input_ids"][sequence, max(0, position - 24) : position + 1].tolist()
        shown.append(
            {
                # It may begin inside a character.
                "context": tokenizer.decode(context).lstrip("\N{REPLACEMENT CHARACTER}"),
                "target": text(int(batch["labels"][at])),
                "teacher": [
                    (text(int(i)), float(p))
                    for i, p in zip(
                        teacher.ids[at, :SHOWN], teacher.logprobs[at, :SHOWN].exp(), strict=True
                    )
                    if i >= 0
                ],
                "student": [
                    (text(int(i)), float(p))
                    for i, p in zip(ids[row], probabilities[row], strict=True)
                ],
            }
        )
    return shown


def _run(
    head: LogitsHead, data: CachedDataset, batch: dict[str, Tensor]
) -> tuple[SparseTeacher, Tensor]:
    """The teacher and the student's hidden states [P, H] at the kept positions of a batch."""
    device = next(head.backbone.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    hidden = head.hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return data.teacher(batch), hidden.flatten(0, 1)[batch["kept"]]
