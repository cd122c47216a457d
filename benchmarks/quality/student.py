"""The quality study's students: a lean training loop on a cache or on full logits, and exact
held-out metrics.

The loop uses the product's own reader, collator, losses and lm_head path; what it leaves out of
``train-student`` are checkpoints, reports and logs, because it runs some hundred times. Runs with
the same seed start from the same weights and see the same sequences in the same order, whatever
they learn from.

Shapes: B sequences, T tokens, P = B (T - 1) positions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from arms import Arm
from numpy.typing import NDArray
from teachers import Teacher
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from logitcask.cache_format import CachedSequence
from logitcask.train.config import TrainConfig
from logitcask.train.data.batch import collate, teacher_of
from logitcask.train.evaluation.metrics import Calibration, rank_agreement, top_k_overlap
from logitcask.train.head.chunked import PerChunk, head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES, SparseTeacher

K = 5
"""Of MOR@k and CR@k, as in the paper's Table 1."""
_DENSE_HEAD = 64
"""Entries of full logits that a ranking loss is shown."""
_WARM_UP, _LAST = 0.05, 0.1
"""The learning rate rises over this share of the steps, then falls along a cosine to this share
of its peak.
"""

Batch = tuple[Tensor, PerChunk]
"""Input ids [B, T], and the objective on the logits at its P positions."""
BatchOf = Callable[[NDArray[np.int64]], Batch]
"""Makes the batch of some sequences, by their indices."""


@dataclass(frozen=True)
class Schedule:
    """How a student is trained.

    batch: sequences per step. steps: of the optimiser (AdamW). lr: its peak.
    """

    steps: int
    batch: int
    lr: float


def train(
    model: PreTrainedModel,
    batch_of: BatchOf,
    sequences: int,
    schedule: Schedule,
    *,
    order: int,
    objective: Objective | None = None,
) -> float:
    """Trains ``model`` in place on ``sequences`` in a random order, epoch after epoch; returns
    seconds.

    ``objective`` is told where the training is, for losses that remember something from step to
    step.
    """
    model.train()
    head = LogitsHead(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, schedule.steps)
    )
    start = time.perf_counter()
    for step, indices in enumerate(_batches(sequences, schedule, order)):
        input_ids, per_chunk = batch_of(indices)
        hidden = head.hidden(input_ids=input_ids)[:, :-1].flatten(0, 1)
        losses = head_losses(head, hidden, per_chunk, chunk_size=len(hidden))
        (losses.objective / len(hidden)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if objective is not None:
            means = {name: losses.values[name].mean().item() for name in objective.stateful}
            objective.end(means, step + 1, schedule.steps)
            objective.begin(step + 1, schedule.steps)
    return time.perf_counter() - start


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return _LAST + (1 - _LAST) * 0.5 * (
        1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
    )


def _batches(sequences: int, schedule: Schedule, order: int) -> Iterator[NDArray[np.int64]]:
    random = np.random.default_rng(order)
    waiting = np.empty(0, np.int64)
    for _ in range(schedule.steps):
        while len(waiting) < schedule.batch:
            waiting = np.concatenate([waiting, random.permutation(sequences)])
        yield waiting[: schedule.batch]
        waiting = waiting[schedule.batch :]


def hard_labels(ids: NDArray[np.uint16], device: torch.device) -> BatchOf:
    """Batches whose objective is the cross-entropy with the text itself."""

    def batch_of(indices: NDArray[np.int64]) -> Batch:
        input_ids = torch.from_numpy(ids[indices].astype(np.int64)).to(device)
        labels = input_ids[:, 1:].flatten()

        def per_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return cross_entropy(logits, labels[rows], reduction="none"), {}

        return input_ids, per_chunk

    return batch_of


def from_cache(
    arm: Arm,
    sequences: list[CachedSequence],
    prior: Tensor | None,
    vocab_size: int,
    device: torch.device,
) -> tuple[BatchOf, Objective]:
    """Batches as training from a cache has them, and the product's own sum of losses, which is
    their objective.
    """
    objective = Objective(_config(arm))

    def batch_of(indices: NDArray[np.int64]) -> Batch:
        batch = {
            name: value.to(device)
            for name, value in collate([sequences[i] for i in indices]).items()
        }
        teacher = teacher_of(batch, vocab_size, None if prior is None else prior.to(device))
        return batch["input_ids"], objective.per_chunk(
            _renormalised(teacher) if arm.renormalise else teacher
        )

    return batch_of, objective


def _config(arm: Arm) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "cache": "in memory",
            "student": {"config": {}},
            "losses": list(arm.losses),
            "ce_weight": arm.ce,
            "training": {"output_dir": "nowhere"},
        }
    )


def _renormalised(teacher: SparseTeacher) -> SparseTeacher:
    """The head scaled up to be a whole distribution, as many distillation pipelines do."""
    whole = torch.log_softmax(teacher.logprobs, 1)
    return replace(
        teacher,
        logprobs=whole,
        tail_logprob=torch.full_like(teacher.tail_logprob, -torch.inf),
        prior=None,
    )


def from_full_logits(
    arm: Arm, teacher: Teacher, ids: NDArray[np.uint16], device: torch.device
) -> BatchOf:
    """Batches with every logit of the teacher: forward or reverse KL as they are defined,
    ranking on the largest ones.
    """

    def batch_of(indices: NDArray[np.int64]) -> Batch:
        input_ids = torch.from_numpy(ids[indices].astype(np.int64)).to(device)
        labels = input_ids[:, 1:].flatten()
        log_p = torch.from_numpy(np.array(teacher.train[indices])).to(device).float().flatten(0, 1)
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        head = (
            _largest(log_p, labels, _DENSE_HEAD)
            if any(t["name"] == "ranking" for t in arm.losses)
            else None
        )

        def per_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            log_q = torch.log_softmax(logits.float(), 1)
            total = arm.ce * -log_q.gather(1, labels[rows, None]).squeeze(1)
            overlap: Tensor | float = 1.0
            for term in arm.losses:
                if term.get("dynamic") and head is not None:
                    overlap = top_k_overlap(logits, head[rows], term.get("k", K))
            for term in arm.losses:
                weight = term.get("weight", 1.0)
                if term["name"] == "ranking":
                    assert head is not None
                    options = {
                        name: term[name]
                        for name in term
                        if name not in ("name", "weight", "dynamic")
                    }
                    total = total + weight * LOSSES["ranking"](logits, head[rows], **options)
                else:
                    total = total + weight * overlap * _DENSE[term["name"]](log_p[rows], log_q)
            return total, {}

        return input_ids, per_chunk

    return batch_of


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1)


_DENSE = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl}


def _largest(log_p: Tensor, targets: Tensor, k: int) -> SparseTeacher:
    """The k most probable ids of whole distributions [P, V]."""
    largest = log_p.topk(min(k, log_p.shape[1]), 1)
    tail = torch.log1p(-largest.values.exp().sum(1).clamp_max(1 - 1e-6))
    target = log_p.gather(1, targets[:, None]).squeeze(1)
    return SparseTeacher(largest.indices, largest.values, tail, targets, target, log_p.shape[1])


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    teacher: Teacher,
    ids: NDArray[np.uint16],
    device: torch.device,
    *,
    batch: int = 8,
) -> dict[str, float]:
    """Means over every position of ``ids`` [N, T], with the teacher's whole distributions.

    ce: of the text, nats. kl, reverse_kl: to and from the teacher, nats. top1, mor@5, cr@5:
    ``logitcask.train.evaluation.metrics``, in percent. ece:
    ``logitcask.train.evaluation.metrics.Calibration``, in percent; confidence: mean probability of
    that id less how often it is right, in percent (positive: over-confident).
    """
    model.eval()
    sums: dict[str, float] = {}
    calibration, positions = Calibration(), 0
    for start in range(0, len(ids), batch):
        input_ids = torch.from_numpy(ids[start : start + batch].astype(np.int64)).to(device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = input_ids[:, 1:].flatten()
        log_p = (
            torch.from_numpy(np.array(teacher.held_out[start : start + batch]))
            .to(device)
            .float()
            .flatten(0, 1)
        )
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_q = torch.log_softmax(logits.float(), 1)
        best = log_q.max(1)
        right = best.indices == labels
        calibration.add(best.values.exp(), right)
        positions += len(labels)
        agreement = rank_agreement(logits, _largest(log_p, labels, K), K)
        values = {
            "ce": -log_q.gather(1, labels[:, None]),
            "kl": _forward_kl(log_p, log_q),
            "reverse_kl": _reverse_kl(log_p, log_q),
            "top1": 100 * agreement.top_1.float(),
            f"mor@{K}": 100 * agreement.overlap,
            f"cr@{K}": 100 * agreement.identical.float(),
            "confidence": 100 * (best.values.exp() - right.float()),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
    means = {name: value / positions for name, value in sums.items()}
    means["ece"] = 100 * calibration.error()
    return {name: round(value, 5) for name, value in means.items()}
