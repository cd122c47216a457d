"""The student on held-out text, before, during and after its training."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers import TrainingArguments

from logitcask.train.config import TrainConfig
from logitcask.train.evaluation.answers import Answer, answers
from logitcask.train.evaluation.evaluate import evaluate, examples, teacher_reference
from logitcask.train.evaluation.measured import Measured
from logitcask.train.preparation import Parts


class Examination:
    """The current student on held-out text: its metrics, some positions, its answers."""

    def __init__(self, config: TrainConfig, arguments: TrainingArguments, parts: Parts) -> None:
        self._config, self._arguments, self._parts = config, arguments, parts

    @cached_property
    def teacher(self) -> dict[str, float | None]:
        """The teacher's own metrics."""
        return teacher_reference(self._parts.held_out)

    def measure(self) -> Measured:
        with self._parts.trainer.precision():
            return evaluate(
                self._parts.trainer.head,
                self._parts.held_out,
                k=self._config.evaluation.k,
                batch_size=self._arguments.per_device_eval_batch_size,
                logits_chunk=self._config.logits_chunk,
            )

    def show(self) -> list[dict[str, Any]]:
        tokenizer, trainer = self._parts.tokenizer, self._parts.trainer
        with trainer.precision():
            return (
                examples(trainer.head, self._parts.held_out, tokenizer)
                if tokenizer is not None
                else []
            )

    def answer(self) -> list[Answer]:
        wanted, tokenizer = self._config.evaluation.answers, self._parts.tokenizer
        if wanted is None or tokenizer is None:
            return []
        with self._parts.trainer.precision():
            return answers(self._parts.student, tokenizer, self._parts.held_out, wanted)


def before_and_now(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples of the untrained student and of the current one as one list."""
    return [
        {**then, "before": then["student"], "after": each["student"]}
        for then, each in zip(before, now, strict=True)
    ]
