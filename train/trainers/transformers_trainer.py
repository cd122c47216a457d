"""Trainers of transformers, and those built on them (TRL, axolotl), with a cache as the teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import is_datasets_available

from logitcask.cache_format.errors import UserError
from logitcask.train.trainers.distillation import Distillation, Numbered

_Base: Any = object
"""In its place a subclass names a trainer class after the mixin."""


class DistillationMixin(_Base):
    """Data and loss of a ``Distillation`` for a trainer class of transformers, named before it:

        class DistillingTrainer(DistillationMixin, SFTTrainer): ...

        DistillingTrainer(model, args, distillation=distillation, processing_class=tokenizer)

    The loss is the objective summed over kept positions and divided by their number in the whole
    (accumulated, global) batch. It does not depend on padding or on the division of the batch.

    The data set and the collator are those of ``distillation``, unless others are given. In
    ``args``, ``remove_unused_columns`` is switched off, and TRL's preparation of text is skipped.
    While the trainer evaluates, the loss of each batch is the mean over its positions.

    Raises UserError for arguments that would change the loss or the data without being seen.
    """

    distillation: Distillation | None = None
    """For subclasses that are not given one as an argument."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        found = distillation or type(self).distillation
        if found is None:
            raise UserError(
                "the trainer has no distillation; give distillation=Distillation(model, cache=...)"
            )
        if isinstance(model, str):
            raise UserError(
                f"the model is the name {model}; load it first (AutoModelForCausalLM.from_pretrained), since it is compared "
                "with the cache"
            )
        _refuse(args)
        found.check(model, kwargs.get("processing_class"))
        args.remove_unused_columns = False
        if hasattr(args, "dataset_kwargs"):  # of TRL
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        # After ``check``, which decides about the form of packed rows.
        data = {
            "train_dataset": _accepted(found.train),
            "eval_dataset": _accepted(found.held_out),
            "data_collator": found.collate,
        }
        found.begin_step(0, 1)
        super().__init__(model=model, args=args, **{**data, **kwargs})
        self.distillation = found
        self.add_callback(_TellStep(found))
        # So that the kept positions of all accumulated batches are counted, by their labels.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert self.distillation is not None
        outputs = model(**self.distillation.inputs(inputs))
        loss = self.distillation.loss(outputs, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes, but the divisor counts the positions of all.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class _TellStep(TrainerCallback):
    """Gives weights with a schedule their values."""

    def __init__(self, distillation: Distillation) -> None:
        self._distillation = distillation

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._distillation.begin_step(state.global_step, state.max_steps)


def _accepted(data: Numbered) -> Any:
    """As a ``datasets.Dataset`` where there is that package, since TRL takes nothing else."""
    return data.as_datasets() if is_datasets_available() else data


def _refuse(args: TrainingArguments) -> None:
    """Raises UserError for arguments whose effect would be lost."""
    for name in ("packing", "padding_free", "eval_packing", "sample_packing"):
        if getattr(args, name, None):
            raise UserError(
                f"{name} is set in the trainer's arguments, but the rows come from the cache; remove it, and give "
                "data={'packing': True} to the Distillation"
            )
    if args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor is {args.label_smoothing_factor:g}, and the losses of the cache do not smooth labels; "
            "remove it"
        )
    if getattr(args, "loss_type", "nll") not in (None, "nll"):
        raise UserError(
            f"loss_type is {args.loss_type}, but the loss is that of the Distillation; remove it"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"one process has {args.n_gpu} GPUs, and torch's DataParallel would tear batches apart; start one process for "
            "each with torchrun or accelerate launch"
        )
