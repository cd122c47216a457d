"""``transformers.Trainer`` with a cached teacher instead of labels alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
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

from logitcask.cache_format.durable import permit_as_umask
from logitcask.cache_format.errors import UserError
from logitcask.train.config import DataConfig, SelectionConfig
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.mixture import Collator, Mixture
from logitcask.train.data.order import Batches, PartBatches, PartPlan
from logitcask.train.data.pairs import number_of_pairs, positions_of_pairs
from logitcask.train.data.selection import learnability, most_learnable, only_sequences
from logitcask.train.distributed import on_main
from logitcask.train.evaluation.evaluate import evaluate
from logitcask.train.evaluation.measured import Measured
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.batch_loss import BatchLoss, chosen_positions
from logitcask.train.loop.callbacks import (
    FindBest,
    LogWhenSaving,
    Progress,
    TellEpoch,
    TellObjective,
)
from logitcask.train.loop.checkpoints import best_checkpoint, is_complete
from logitcask.train.loop.objective import Objective
from logitcask.train.loop.part import Part, PartEnd
from logitcask.train.loop.stop import StopOnSignal, outlive_signals
from logitcask.train.loop.totals import LogTotals, StepTotals
from logitcask.train.losses.base import Exactness
from logitcask.train.model.isolation import check_isolation, wants_flat
from logitcask.train.model.precision import (
    as_exact_as_it_can,
    computing_dtype,
    like_training,
    shard_without_casts,
    warn_of_lost_steps,
)
from logitcask.train.model.unused import may_go_unused


class DistillationTrainer(Trainer):
    """Trains a causal language model on batches of cached sequences.

    The loss is the objective summed over kept positions and divided by their number in the whole
    (accumulated, global) batch. It does not depend on padding or on the division of the batch.
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
        exactness: dict[str, Exactness] | None = None,
        part: Part | None = None,
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
        self.measured: Measured | None = None  # by the newest evaluation
        self.k = k
        self.logits_chunk = logits_chunk
        self._totals = LogTotals(train_data.names)
        self._step_totals = StepTotals(objective.stateful)
        self._progress = Progress(exactness)
        self._stop = StopOnSignal()
        batch_loss = BatchLoss(self.head, train_data, objective, logits_chunk)
        batch_loss.route(student)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_data,
            eval_dataset=held_out,
            data_collator=Collator(
                packed=data.packing,
                flat=data.packing and wants_flat(self.head),
                positions=selection.positions,
            ),
            processing_class=tokenizer,
            callbacks=[
                LogWhenSaving(),
                self._progress,
                TellEpoch(self.tell_epoch),
                TellObjective(objective, self.end_step),
            ],
        )
        self._part = part
        if part is not None:
            self.add_callback(PartEnd(part, *self._drawn_by_cache(part)))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(self._stop)
        if self.is_fsdp_enabled:
            shard_without_casts(self.accelerator.state.fsdp_plugin)
        warn_of_lost_steps(
            student, widened=self.is_fsdp_enabled and computing_dtype(args) is not None
        )
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo.backend != DynamoBackend.NO:
            # accelerate would compile the student's whole forward, including the buffers and custom
            # gradients of the losses.
            options = {
                name: value
                for name, value in dynamo.to_dict().items()
                if name != "use_regional_compilation"
            }
            batch_loss.compile(**options)
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        # Batches have one label per kept position, already shifted. Trainer counts them for the
        # mean.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        objective, values = model(**inputs)
        positions = chosen_positions(inputs)
        if len(self._mixture.sources) > 1:
            self._totals.add_by_cache(inputs["layout"], values.pop("objective"))
        self._totals.add(values, positions)
        self._step_totals.add(values, objective.device)
        loss = objective / (
            num_items_in_batch if num_items_in_batch is not None else max(1, positions)
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes, but the divisor above counts the positions of
            # all processes.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def precision(self) -> AbstractContextManager[None]:
        """A context with training's precision, for calls outside the student's wrapped forward."""
        return like_training(self.model, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Trainer's own batches, without the data that ``selection`` leaves out. Measures the time
        of waiting for data.
        """
        asked = time.monotonic()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._totals.waited(time.monotonic() - asked)
        if self.selection.sequences is not None:
            batches = [self._most_learnable(batch) for batch in batches]
        if self.objective.of_pairs:
            self.objective.positions_per_pair = self._positions_per_pair(batches, device)
        if self.selection.sequences is not None or self.selection.positions is not None:
            items = self._total([chosen_positions(batch) for batch in batches], device)
        return batches, items

    def _positions_per_pair(self, batches: list[Any], device: torch.device) -> Tensor | float:
        """The mean number of positions of a pair in the optimizer step of all processes."""
        layouts = [batch["layout"] for batch in batches]
        positions = self._total([positions_of_pairs(each) for each in layouts], device)
        pairs = self._total([number_of_pairs(each) for each in layouts], device)
        if positions is None or pairs is None:
            return 1.0
        return positions / (pairs.clamp_min(1) if isinstance(pairs, Tensor) else max(1, pairs))

    def _total(self, counts: list[int], device: torch.device) -> Tensor | int | None:
        """The sum of the counts of an optimizer step's batches, over the processes over which the
        positions are counted.
        """
        counted = [{"labels": torch.zeros(count, dtype=torch.int64)} for count in counts]
        total: Tensor | int | None = self._get_num_items_in_batch(counted, device)
        return total

    def _most_learnable(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.selection.sequences is not None
        scores = learnability(self.model_wrapped(**batch, gaps=True), batch["layout"])
        kept = max(1, round(len(scores) * (1 - self.selection.sequences.filter_ratio)))
        return only_sequences(batch, most_learnable(scores, kept))

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the plan's order. They are known beforehand, so skipping costs nothing, and
        workers change nothing.
        """
        size = self._sequences_per_batch()
        self._batches = self._batches_of(size)
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
            worker_init_fn=outlive_signals,
        )
        return cast(DataLoader, self.accelerator.prepare(loader))

    def _sequences_per_batch(self) -> int:
        size: int = self._train_batch_size
        if self.selection.sequences is not None:
            size = round(size / (1 - self.selection.sequences.filter_ratio))
        return size

    def _batches_of(self, size: int) -> Batches:
        if self._part is not None:
            return self._part_batches(self._part, size)
        return Batches(
            self._mixture.plan,
            size,
            drop_last=self.args.dataloader_drop_last,
            group_by_length=self.data.group_by_length,
            processes=self.args.world_size,
        )

    def _part_batches(self, part: Part, size: int) -> PartBatches:
        plan = self._mixture.plan
        assert isinstance(plan, PartPlan)
        return PartBatches(
            plan,
            size,
            steps=(part.first, part.until),
            per_step=self.args.gradient_accumulation_steps * self.args.world_size,
            group_by_length=self.data.group_by_length,
            processes=self.args.world_size,
        )

    def _drawn_by_cache(self, part: Part) -> tuple[dict[str, int], dict[str, int]]:
        """Units that the whole part reads of each cache, and all that it has to learn from, by the
        cache's fingerprint.
        """
        plan = self._mixture.plan
        assert isinstance(plan, PartPlan)
        shares = plan.shares(self._part_batches(part, self._sequences_per_batch()).units)
        drawn, sizes = {}, {}
        for stream, share, units in zip(
            self._mixture.streams, shares, self._mixture.units, strict=True
        ):
            for number in stream:
                name = self._mixture.sources[number].cache.manifest.fingerprint
                drawn[name], sizes[name] = share, len(units)
        return drawn, sizes

    def start_from(self, checkpoint: Path) -> None:
        """Loads the weights of a checkpoint, before anything is measured. ``run`` loads the rest."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer does. The first step then has the learning rate of this run's schedule: that
        of the checkpoint is another one if its schedule was shorter, at its end usually 0.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return
        for group, base, share in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * share(schedule.last_epoch)

    def tell_epoch(self, loader: DataLoader) -> None:
        """Sets the epoch of the data's order. Trainer's own call does not reach samplers that
        accelerate has wrapped twice.
        """
        assert self._batches is not None
        steps = -(-len(loader) // self.args.gradient_accumulation_steps)
        self._batches.set_epoch(self.state.global_step // max(1, steps))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of ``logitcask.train.evaluation.evaluate``, logged with ``metric_key_prefix``."""
        began = time.monotonic()
        with self.precision():
            self.measured = evaluate(
                self.head,
                eval_dataset or self.eval_dataset,
                k=self.k,
                batch_size=self.args.per_device_eval_batch_size,
                logits_chunk=self.logits_chunk,
            )
        found = self.measured.means()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._totals.leave_out(time.monotonic() - began)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds mean losses since the last record and totals over all runs to training records.

        Raises UserError if a mean is not finite, before such weights become a checkpoint (see
        ``LogWhenSaving``). ``Trainer`` itself would show the last finite loss and continue.
        """
        if "loss" in logs:
            logs |= self._totals.record(self.state.global_step)
        super().log(logs, start_time)

    def end_step(self) -> None:
        """Gives stateful losses their means over all positions of this optimizer step."""
        means = self._step_totals.means(lambda sums: self.accelerator.reduce(sums, "sum"))
        if means is not None:
            self.objective.end(means, self.state.global_step, self.state.max_steps)
            self.state.stateful_callbacks["objective"] = self.objective.state_dict()

    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def run(self, checkpoint: str | None) -> None:
        """Trains from the start or from a checkpoint. ``positions`` and ``seconds`` of the log
        continue from the checkpoint.

        Raises Stopped if a signal has arrived, after a checkpoint has been saved.
        """
        self._totals.start()
        with self._stop.watching():
            try:
                self._run(checkpoint)
            finally:
                self._progress.close()  # whose last state comes before the line of an error, then
            if self._stop.asked(self.args):  # after the last step
                self._save_last()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student, for all whom the umask lets read it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            permit_as_umask(Path(output_dir or self.args.output_dir))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy "best", the result decides whether a checkpoint is saved.
        better: bool = super()._determine_best_metric(metrics, trial)
        return better or self._stop.stopping

    def _save_last(self) -> None:
        """Saves a checkpoint of the last step, if there is none, and stops."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not on_main(lambda: is_complete(folder)):
            self._save_checkpoint(self.model, trial=None)
        self._stop.now(self.state)

    def _run(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        self._totals.resume(state.log_history)
        best: str | None = None
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = str(best_checkpoint(state.best_model_checkpoint, Path(self.args.output_dir)))
            self.add_callback(FindBest(best))
        last = self.total_steps() if self._part is None else self._part.until
        if state.global_step >= last:
            # Killed after the last step. Trainer itself would make one more step.
            self._load_from_checkpoint(best or checkpoint)
            self.state = state
            return
        self.train(resume_from_checkpoint=checkpoint)
