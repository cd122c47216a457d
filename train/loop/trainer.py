"""``transformers.Trainer`` with a cached teacher instead of labels alone. Everything Trainer does, it does here too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from logitcask.cache_format.errors import UserError
from logitcask.train.config import DataConfig, SelectionConfig
from logitcask.train.data.batch import Place
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.mixture import Collator, Mixture, by_source
from logitcask.train.data.order import Batches
from logitcask.train.data.selection import largest_gaps, learnability, most_learnable, only_positions, only_sequences
from logitcask.train.distributed import gathered
from logitcask.train.evaluation.evaluate import evaluate
from logitcask.train.head.chunked import PerChunk, chosen_head_losses, head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.callbacks import (
    FindBest,
    LogWhenSaving,
    Progress,
    StopAfterSaving,
    TellEpoch,
    TellObjective,
)
from logitcask.train.loop.checkpoints import best_checkpoint
from logitcask.train.loop.objective import Objective
from logitcask.train.model.divergence import check_finite
from logitcask.train.model.isolation import check_isolation, wants_flat
from logitcask.train.model.precision import (
    as_exact_as_it_can,
    computing_dtype,
    like_training,
    shard_without_casts,
    summed,
    warn_of_lost_steps,
)
from logitcask.train.model.unused import may_go_unused

MODEL_INPUTS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""What of a batch the student's backbone is given, as far as the batch has it."""


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
        train_data: Mixture,
        held_out: HeldOut,
        tokenizer: Any,
        *,
        k: int,
        logits_chunk: int | None,
        data: DataConfig,
        selection: SelectionConfig,
    ) -> None:
        with as_exact_as_it_can(student, args):
            self.head = LogitsHead(student)
            if data.packing:
                check_isolation(self.head)
            if args.world_size > 1 and args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = may_go_unused(self.head)
        self.objective = objective
        self.data, self.selection = data, selection
        self._mixture = train_data
        self._batches: Batches | None = None
        self._cache_sums: dict[int, Tensor | float] = {}
        self._cache_positions: dict[int, int] = {}
        self._waited = 0.0
        self._last_log = time.monotonic()
        self.k = k
        self.logits_chunk = logits_chunk
        self._sums: dict[str, Tensor] = {}
        self._positions = 0
        self._step_sums: Tensor | None = None
        self._progress = Progress()
        _route_forward(student, self._distil, self._gaps)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_data,
            eval_dataset=held_out,
            data_collator=Collator(
                packed=data.packing, flat=data.packing and wants_flat(self.head), positions=selection.positions
            ),
            processing_class=tokenizer,
            callbacks=[
                LogWhenSaving(),
                self._progress,
                TellEpoch(self.tell_epoch),
                TellObjective(objective, self.end_step),
            ],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if args.enable_jit_checkpoint:
            self.add_callback(StopAfterSaving(self.pop_callback(JITCheckpointCallback)))
        if self.is_fsdp_enabled:
            shard_without_casts(self.accelerator.state.fsdp_plugin)
        warn_of_lost_steps(student, widened=self.is_fsdp_enabled and computing_dtype(args) is not None)
        self._read = self.head.hidden
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo.backend != DynamoBackend.NO:
            # accelerate would compile all of the student's forward, the losses' buffers and hand-made gradients included.
            options = {name: value for name, value in dynamo.to_dict().items() if name != "use_regional_compilation"}
            self._read = torch.compile(self.head.hidden, **options)
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        # Batches carry one label per kept position, shifted already; Trainer counts them for the mean.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._resumed_seconds = 0.0
        self._resumed_positions = 0
        self._started = time.monotonic()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        objective, values = model(**inputs)
        positions = _chosen(inputs)
        if len(self._mixture.sources) > 1:
            self._sum_by_cache(inputs["layout"], values.pop("objective"))
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + summed(value)
        self._positions = self._positions + positions
        if self.objective.stateful:
            count = torch.tensor(positions, device=objective.device)
            sums = torch.stack([*(summed(values[name]) for name in self.objective.stateful), summed(count)])
            self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        loss = objective / (num_items_in_batch if num_items_in_batch is not None else max(1, positions))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP takes the mean of gradients over processes; the divisor above counts the positions of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def precision(self) -> AbstractContextManager[None]:
        """Inside it, the student computes as it does in training, though not called through its wrapped forward."""
        return like_training(self.model, self.args)

    def _sum_by_cache(self, layout: tuple[Place, ...], objective: Tensor) -> None:
        """Adds what was minimised at each position to the sums of its cache."""
        start = 0
        for source, places in groupby(layout, lambda place: place.source):
            stop = start + sum(place.chosen for place in places)
            self._cache_positions[source] = self._cache_positions.get(source, 0) + stop - start
            self._cache_sums[source] = self._cache_sums.get(source, 0) + summed(objective[start:stop])
            start = stop

    def _distil(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_PH = self._hidden(batch)
        if all(place.chosen == place.kept for place in batch["layout"]):
            return head_losses(self.head, hidden_PH, self._losses(batch), chunk_size=self.logits_chunk)

        def choose(values: dict[str, Tensor]) -> tuple[Tensor, PerChunk]:
            index = largest_gaps(_gap(values, batch), batch["layout"])
            chosen = only_positions(batch, index)
            chosen["layout"] = tuple(replace(place, kept=place.chosen) for place in batch["layout"])
            return index, self._losses(chosen)

        return chosen_head_losses(self.head, hidden_PH, _next_token_loss(batch), choose, chunk_size=self.logits_chunk)

    def _losses(self, batch: dict[str, Any]) -> PerChunk:
        teachers, per_chunk = self._mixture.teachers(batch), self.objective.per_chunk
        return by_source(per_chunk, teachers) if len(self._mixture.sources) > 1 else per_chunk(teachers[0][1])

    def _hidden(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states [P, H] at the kept positions of a batch."""
        hidden = self._read(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        return hidden.flatten(0, 1)[batch["kept"]]

    @torch.no_grad()
    def _gaps(self, batch: dict[str, Any]) -> Tensor:
        """``_gap`` of a batch by the student in evaluation mode: no dropout, no random numbers."""
        with self.head.evaluated():
            found = head_losses(self.head, self._hidden(batch), _next_token_loss(batch), chunk_size=self.logits_chunk)
            return _gap(found.values, batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Trainer's own, with the time that it waits for data measured, and with what ``selection`` leaves out gone."""
        asked = time.monotonic()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.monotonic() - asked
        if self.selection.sequences is not None:
            batches = [self._most_learnable(batch) for batch in batches]
        if self.selection.sequences is not None or self.selection.positions is not None:
            counted = [{"labels": torch.zeros(_chosen(batch), dtype=torch.int64)} for batch in batches]
            items = self._get_num_items_in_batch(counted, device)
        return batches, items

    def _most_learnable(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.selection.sequences is not None
        scores = learnability(self.model_wrapped(**batch, gaps=True), batch["layout"])
        kept = max(1, round(len(scores) * (1 - self.selection.sequences.filter_ratio)))
        return only_sequences(batch, most_learnable(scores, kept))

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the plan's order. Which they are is known beforehand: skipping costs nothing, workers change nothing."""
        size = self._train_batch_size
        if self.selection.sequences is not None:
            size = round(size / (1 - self.selection.sequences.filter_ratio))
        self._batches = Batches(
            self._mixture.plan,
            size,
            drop_last=self.args.dataloader_drop_last,
            group_by_length=self.data.group_by_length,
            processes=self.args.world_size,
        )
        if not len(self._batches):
            raise UserError(
                f"an epoch has {len(self._mixture)} sequences or rows, and training.dataloader_drop_last leaves out a batch that "
                f"has less than {size}; lower training.per_device_train_batch_size"
            )
        loader: DataLoader = DataLoader(
            self._mixture,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return cast(DataLoader, self.accelerator.prepare(loader))

    def tell_epoch(self, loader: DataLoader) -> None:
        """Sets the epoch whose order comes next. Trainer's own call misses samplers that accelerate has wrapped twice."""
        assert self._batches is not None
        steps = -(-len(loader) // self.args.gradient_accumulation_steps)
        self._batches.set_epoch(self.state.global_step // max(1, steps))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics (``logitcask.train.evaluation.evaluate``), logged under ``metric_key_prefix``."""
        began = time.monotonic()
        with self.precision():
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
        self._last_log += time.monotonic() - began  # no part of the time in which data is waited for
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, to training records, the mean of each loss since the last one, and totals over all resumed runs.

        Raises UserError where a mean is not finite, before such weights become a checkpoint (see ``LogWhenSaving``).
        ``Trainer`` shows the last finite loss in its place and goes on.
        """
        if "loss" in logs and self._sums:
            totals = self._totals()
            positions = totals["positions"]["all"]
            means = {f"loss_{name}": total / positions for name, total in totals["losses"].items()}
            check_finite(means, f"at step {self.state.global_step}")
            logs |= means
            self._resumed_positions += int(positions)
            logs["positions"] = self._resumed_positions
            logs["seconds"] = self._resumed_seconds + time.monotonic() - self._started
            logs |= {
                f"cache_{self._mixture.names[source]}": total / totals["cache_positions"][source]
                for source, total in sorted(totals["caches"].items())
            }
            now = time.monotonic()
            logs["data_wait"] = self._waited / max(now - self._last_log, 1e-9)
            self._sums, self._positions, self._cache_sums, self._cache_positions = {}, 0, {}, {}
            self._waited, self._last_log = 0.0, now
        super().log(logs, start_time)

    def end_step(self) -> None:
        """Tells losses that remember something their means over the positions of all processes in this optimizer step."""
        if self._step_sums is not None:
            *sums, count = self.accelerator.reduce(self._step_sums, "sum").tolist()
            means = {name: total / max(1, count) for name, total in zip(self.objective.stateful, sums, strict=True)}
            self.objective.end(means, self.state.global_step, self.state.max_steps)
            self.state.stateful_callbacks["objective"] = self.objective.state_dict()
            self._step_sums = None

    def _totals(self) -> dict[str, dict[Any, float]]:
        """What was summed since the last record, over all processes."""
        mine: dict[str, dict[Any, Any]] = {
            "losses": self._sums,
            "positions": {"all": self._positions},
            "caches": self._cache_sums,
            "cache_positions": self._cache_positions,
        }
        totals: dict[str, dict[Any, float]] = {kind: {} for kind in mine}
        for part in gathered({kind: {name: float(x) for name, x in sums.items()} for kind, sums in mine.items()}):
            for kind, sums in part.items():
                for name, value in sums.items():
                    totals[kind][name] = totals[kind].get(name, 0.0) + value
        return totals

    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def run(self, checkpoint: str | None) -> None:
        """Trains from the start, or on from a checkpoint; ``positions`` and ``seconds`` of the log go on where it stopped."""
        self._started = self._last_log = time.monotonic()
        try:
            self._run(checkpoint)
        finally:
            self._progress.close()  # whose last state comes before the line of an error, then

    def _run(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        records = [record for record in state.log_history if "positions" in record]
        if records:
            self._resumed_positions = int(records[-1]["positions"])
            self._resumed_seconds = records[-1]["seconds"]
        best: str | None = None
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = str(best_checkpoint(state.best_model_checkpoint, Path(self.args.output_dir)))
            self.add_callback(FindBest(best))
        if state.global_step >= self.total_steps():
            # Killed after the last step. Trainer itself would take one step more.
            self._load_from_checkpoint(best or checkpoint)
            self.state = state
            return
        self.train(resume_from_checkpoint=checkpoint)


def _next_token_loss(batch: dict[str, Any]) -> PerChunk:
    """The student's loss on each next token, in nats; nothing to minimise."""

    def measure(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        loss = cross_entropy(logits_CV.float(), batch["labels"][rows], reduction="none")
        return loss, {"ce": loss}

    return measure


def _gap(values: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """float32[P], nats: the student's loss on each next token minus the teacher's."""
    return values["ce"] + batch["teacher_target_logprob"]


def _chosen(batch: dict[str, Any]) -> int:
    """Positions of a batch that are in the loss."""
    return sum(place.chosen for place in batch["layout"])


def _route_forward(student: PreTrainedModel, distil: Any, gaps: Any) -> None:
    """Sends cached batches through the student's own ``forward``.

    DDP and FSDP arm their hooks there and nowhere else, so the loss has to be computed inside it.
    """
    plain = student.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        if inputs.pop("gaps", False):
            return gaps(inputs)
        return distil(inputs) if "kept" in inputs else plain(*args, **inputs)

    student.forward = forward  # type: ignore[method-assign]
