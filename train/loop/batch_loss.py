"""The loss of a cached batch, computed inside the student's own forward.

Shapes: P kept positions, C positions of one chunk of logits, H hidden size, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from logitcask.train.data.mixture import Mixture, by_source
from logitcask.train.data.pairs import pair_texts
from logitcask.train.data.selection import largest_gaps, only_positions
from logitcask.train.head.chunked import PerChunk, chosen_head_losses, head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective

MODEL_INPUTS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""Batch keys passed to the student's backbone, if present."""


class BatchLoss:
    """The objective of cached batches for the student of ``head``.

    logits_chunk: number of positions with logits at a time; None: a number that suits the device.
    """

    def __init__(
        self, head: LogitsHead, mixture: Mixture, objective: Objective, logits_chunk: int | None
    ) -> None:
        self._head, self._mixture, self._objective = head, mixture, objective
        self._logits_chunk = logits_chunk
        self._read: Callable[..., Tensor] = head.hidden

    def compile(self, **options: Any) -> None:
        """Compiles the backbone, with options of ``torch.compile``."""
        self._read = torch.compile(self._head.hidden, **options)

    def route(self, student: PreTrainedModel) -> None:
        """Sends cached batches through the student's own ``forward``.

        DDP and FSDP run their hooks only there, so the loss must be computed inside it.
        """
        plain = student.forward

        def forward(*args: Any, **inputs: Any) -> Any:
            if inputs.pop("gaps", False):
                return self.gaps(inputs)
            return self.distil(inputs) if "kept" in inputs else plain(*args, **inputs)

        student.forward = forward  # type: ignore[method-assign]

    def distil(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the objective summed over the chosen positions, the losses at each of them by name)."""
        hidden_PH = self._hidden(batch)
        if self._objective.of_pairs:
            # The whole texts' logprobs first, then the losses, at the same positions.
            def compare(values: dict[str, Tensor]) -> tuple[slice, PerChunk]:
                return slice(None), self._losses(batch, log_q=-values["ce"])

            return chosen_head_losses(
                self._head,
                hidden_PH,
                _next_token_loss(batch),
                compare,
                chunk_size=self._logits_chunk,
            )
        if all(place.chosen == place.kept for place in batch["layout"]):
            return head_losses(
                self._head, hidden_PH, self._losses(batch), chunk_size=self._logits_chunk
            )

        def choose(values: dict[str, Tensor]) -> tuple[Tensor, PerChunk]:
            index = largest_gaps(_gap(values, batch), batch["layout"])
            chosen = only_positions(batch, index)
            chosen["layout"] = tuple(replace(place, kept=place.chosen) for place in batch["layout"])
            return index, self._losses(chosen)

        return chosen_head_losses(
            self._head, hidden_PH, _next_token_loss(batch), choose, chunk_size=self._logits_chunk
        )

    @torch.no_grad()
    def gaps(self, batch: dict[str, Any]) -> Tensor:
        """``_gap`` of a batch by the student in evaluation mode: no dropout, no random numbers."""
        with self._head.evaluated():
            found = head_losses(
                self._head,
                self._hidden(batch),
                _next_token_loss(batch),
                chunk_size=self._logits_chunk,
            )
            return _gap(found.values, batch)

    def _losses(self, batch: dict[str, Any], log_q: Tensor | None = None) -> PerChunk:
        """``log_q``: float32[P], the student's logprobs of the targets, for losses of pairs."""
        teachers, per_chunk = self._mixture.teachers(batch), self._objective.per_chunk
        if log_q is not None:
            pairs = pair_texts(
                batch["layout"],
                log_q,
                batch["teacher_target_logprob"],
                self._objective.positions_per_pair,
            )
            teachers = [
                each._replace(teacher=replace(each.teacher, pairs=pairs[each.rows]))
                for each in teachers
            ]
        return (
            by_source(per_chunk, teachers)
            if len(self._mixture.sources) > 1
            else per_chunk(teachers[0].teacher, teachers[0].source)
        )

    def _hidden(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states [P, H] at the kept positions of a batch."""
        hidden = self._read(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        return hidden.flatten(0, 1)[batch["kept"]]


def chosen_positions(batch: dict[str, Any]) -> int:
    """The number of a batch's positions that are in the loss."""
    return sum(place.chosen for place in batch["layout"])


def _next_token_loss(batch: dict[str, Any]) -> PerChunk:
    """The student's loss on each next token, in nats, as a value that is not minimised."""

    def measure(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = torch.promote_types(logits_CV.dtype, torch.float32)
        loss = cross_entropy(logits_CV.to(dtype), batch["labels"][rows], reduction="none")
        return loss, {"ce": loss}

    return measure


def _gap(values: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """float32[P], nats: the student's loss on each next token minus the teacher's."""
    return values["ce"] + batch["teacher_target_logprob"]
