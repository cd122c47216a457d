"""``transformers.Trainer`` with a cached teacher instead of labels alone. Everything Trainer does, it does here too."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from train.dataset import CachedDataset, collate
from train.evaluate import evaluate
from train.linear import LogitsHead, head_losses
from train.objective import Objective


class DistillationTrainer(Trainer):
    """Trains a causal language model on batches of cached sequences.

    The loss is the objective summed over kept positions and divided by their number in the whole (accumulated, global)
    batch, so that neither padding nor how a batch is cut up changes it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        args: TrainingArguments,
        objective: Objective,
        train_data: CachedDataset,
        held_out: CachedDataset,
        tokenizer: Any,
        *,
        k: int,
        logits_chunk: int,
    ) -> None:
        self.head = LogitsHead(student)
        self.objective = objective
        self._teacher_of = train_data.teacher
        self.k = k
        self.logits_chunk = logits_chunk
        self._sums: dict[str, Tensor] = {}
        self._positions = 0
        _route_forward(student, self._distil)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_data,
            eval_dataset=held_out,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[_LogWhenSaving(), _Progress()],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        # Batches carry one label per kept position, shifted already; Trainer counts them for the mean.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._resumed_seconds = 0.0
        self._resumed_positions = 0
        self._started = time.monotonic()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        objective, values = model(**inputs)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.sum()
        self._positions = self._positions + len(inputs["labels"])
        loss = objective / (num_items_in_batch if num_items_in_batch is not None else max(1, len(inputs["labels"])))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP takes the mean of gradients over processes; the divisor above counts the positions of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _distil(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.head.hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        teacher = self._teacher_of(batch)
        return head_losses(
            self.head,
            hidden.flatten(0, 1)[batch["kept"]],
            self.objective.per_chunk(teacher),
            chunk_size=self.logits_chunk,
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics (``train.evaluate``), logged under ``metric_key_prefix``."""
        found = evaluate(
            self.head,
            eval_dataset or self.eval_dataset,
            k=self.k,
            batch_size=self.args.per_device_eval_batch_size,
            logits_chunk=self.logits_chunk,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, to training records, the mean of each loss since the last one, and totals over all resumed runs."""
        if "loss" in logs and self._positions:
            logs |= {f"loss_{name}": (value / self._positions).item() for name, value in self._sums.items()}
            self._resumed_positions += self._positions
            logs["positions"] = self._resumed_positions
            logs["seconds"] = self._resumed_seconds + time.monotonic() - self._started
            self._sums, self._positions = {}, 0
        super().log(logs, start_time)

    def run(self, checkpoint: str | None) -> None:
        """Trains from the start, or on from a checkpoint; ``positions`` and ``seconds`` of the log go on where it stopped."""
        self._started = time.monotonic()
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        records = [record for record in state.log_history if "positions" in record]
        if records:
            self._resumed_positions = int(records[-1]["positions"])
            self._resumed_seconds = records[-1]["seconds"]
        if state.global_step >= state.max_steps:
            # Killed after the last step. Trainer itself would take one step more.
            best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(best or checkpoint)
            self.state = state
            return
        self.train(resume_from_checkpoint=checkpoint)


def _route_forward(student: PreTrainedModel, distil: Any) -> None:
    """Sends cached batches through the student's own ``forward``.

    DDP and FSDP arm their hooks there and nowhere else, so the loss has to be computed inside it.
    """
    plain = student.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        return distil(inputs) if "kept" in inputs else plain(*args, **inputs)

    student.forward = forward  # type: ignore[method-assign]


class _LogWhenSaving(TrainerCallback):
    """Closes the window of averaged losses at every checkpoint and at the end, so that a resumed log is the same log."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            control.should_log = True


class _Progress(TrainerCallback):
    """One bar for the whole training, with the newest losses beside it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            parts = {name.removeprefix("loss_"): value for name, value in logs.items() if name.startswith("loss_")}
            self._bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in parts.items()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
