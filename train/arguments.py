"""``training:`` of a config as ``transformers.TrainingArguments``, and what of them a cache cannot serve."""

from __future__ import annotations

import logging
from typing import Any, get_args, get_type_hints

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from cache_format.errors import ConfigError
from train.config import TrainConfig

log = logging.getLogger(__name__)

_UNSUPPORTED = {
    "label_smoothing_factor": "the hard labels are a loss of their own: ce_weight",
    "save_only_model": "a run could not go on exactly",
    "group_by_length": "set data.group_by_length instead",
}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_RISING = ("top1_agreement", "mor@", "cr@", "spearman@")
_FALLING = ("kl", "reverse_kl", "ce", "perplexity", "ece")
_FIRST_CHOICE = "kl"
_LIGER_HEAD = "fused_linear_cross_entropy"


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Raises ConfigError, in one line, for a field that transformers does not know or that makes no sense here."""
    # Batches hold fields that no model signature knows; trackers are opted into, as everything that leaves the machine.
    # Without a GPU, pinned memory is a warning and nothing else, and workers take cores from the training.
    gpu = torch.cuda.is_available()
    defaults = {"report_to": "none", "dataloader_pin_memory": gpu, "dataloader_num_workers": 2 if gpu else 0}
    fields = {**defaults, **config.training, "remove_unused_columns": False}
    # YAML 1.1 reads an unquoted `no` as false.
    fields |= {name: "no" for name, value in fields.items() if name.endswith("_strategy") and value is False}
    for name in _UNSUPPORTED.keys() & {name for name, value in fields.items() if value}:
        raise ConfigError(
            f"training.{name} is {fields[name]}, which training from a cache does not support ({_UNSUPPORTED[name]}); remove it"
        )
    _check_numbers(fields)
    if (strategy := fields.get("train_sampling_strategy", "random")) != "random":
        raise ConfigError(
            f"training.train_sampling_strategy is {strategy!r}; the order of cached data is set by data.shuffle and "
            "data.group_by_length: remove it"
        )
    if fields.get("torch_compile") and config.selection.sequences is not None:
        raise ConfigError(
            "selection.sequences asks the student in between, which torch_compile does not allow; drop one of them"
        )
    if fields.get("use_liger_kernel"):
        fields["liger_kernel_config"] = _liger_without_head(fields.get("liger_kernel_config") or {})
    fields |= _best(fields, config.evaluation.k)
    try:
        arguments = TrainingArguments(**fields)
        if arguments.device.type == "cuda" and arguments.n_gpu > 1:
            # Left alone, Trainer would wrap the student in nn.DataParallel, which cannot cut up cached batches.
            log.info("training on one of %d GPUs", arguments.n_gpu)
            arguments._n_gpu = 1
    except TypeError as error:
        unknown = str(error).rpartition(" ")[2]
        raise ConfigError(f"training.{unknown.strip(chr(39))} is no field of transformers.TrainingArguments") from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from error
    for name in ("dispatch_batches", "split_batches"):
        if getattr(arguments.accelerator_config, name):
            raise ConfigError(
                f"training.accelerator_config.{name} would cut cached batches in the wrong places; remove it"
            )
    _check_trackers(arguments)
    state = PartialState()
    if arguments.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"training.fsdp is set, but accelerate shards over several GPUs only, and here are {state.num_processes} processes "
            f"on {state.device.type}: every process would hold the whole student; remove it, or start it on GPUs with torchrun"
        )
    return arguments


def check_optimizer(arguments: TrainingArguments, student: PreTrainedModel) -> None:
    """Raises ConfigError where ``training.optim`` needs what is not here; Trainer would say so at the first step."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"training.optim is {arguments.optim.value!r}: {str(error).strip().splitlines()[0]}"
        ) from error


def check_best(arguments: TrainingArguments, measured: dict[str, float]) -> None:
    """Raises ConfigError where ``training.metric_for_best_model`` is not among what was measured on this cache."""
    wanted = arguments.metric_for_best_model
    if wanted is not None and wanted.removeprefix("eval_") not in measured:
        raise ConfigError(
            f"training.metric_for_best_model is {wanted!r}, and what is measured on this cache is {', '.join(measured)}"
        )


def _best(fields: dict[str, Any], k: int) -> dict[str, Any]:
    """Which metric tells the best student, and whether a larger one is better; transformers' guesses are for a loss."""
    choosing = (
        fields.get("load_best_model_at_end")
        or fields.get("save_strategy") == "best"
        or fields.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )
    name = fields.get("metric_for_best_model") or (_FIRST_CHOICE if choosing else None)
    if name is None:
        return {}
    known = [*_FALLING, *(f"{each}{k}" if each.endswith("@") else each for each in _RISING)]
    plain = str(name).removeprefix("eval_")
    if plain not in known:
        raise ConfigError(f"training.metric_for_best_model is {name!r}; expected one of {', '.join(known)}")
    rising = plain not in _FALLING
    given = fields.get("greater_is_better")
    return {"metric_for_best_model": plain, "greater_is_better": rising if given is None else given}


def _check_numbers(fields: dict[str, Any]) -> None:
    hints = get_type_hints(TrainingArguments)
    for name, value in fields.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        if isinstance(value, str) and not {str, dict, list} & set(kinds) and {int, float} & set(kinds):
            raise ConfigError(f"training.{name} is {value!r}; expected a number")
        if name in _AT_LEAST_ONE and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"training.{name} is {value!r}; expected a whole number of at least 1")


def _check_trackers(arguments: TrainingArguments) -> None:
    """Starts each tracker's callback once: that is how transformers finds out whether its package is there."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"training.report_to: {str(error).strip().splitlines()[0]}") from error


def _liger_without_head(config: dict[str, bool]) -> dict[str, bool]:
    """Liger's kernels for everything below the lm_head, whose losses are computed here."""
    if config.get(_LIGER_HEAD):
        raise ConfigError(
            f"training.liger_kernel_config.{_LIGER_HEAD} computes its own loss in place of the cache's; remove it"
        )
    return {**config, _LIGER_HEAD: False}
