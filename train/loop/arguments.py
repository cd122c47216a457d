"""``training:`` of a config as ``transformers.TrainingArguments``, without the options that do not
work with a cache.
"""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any, cast, get_args, get_type_hints

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, DynamoBackend
from huggingface_hub import HfApi
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from logitcask.cache_format.errors import ConfigError, first_line
from logitcask.train.config import TrainConfig

log = logging.getLogger(__name__)

SAVE_TOTAL_LIMIT = 2
"""Checkpoints that a run keeps by default: the newest, and one in case that one is damaged."""
_UNSUPPORTED = {
    "label_smoothing_factor": "the hard labels are a loss of their own: ce_weight",
    "save_only_model": "a run could not go on exactly",
    "ignore_data_skip": "a run that goes on would read the beginning of its data again, and skipping costs nothing here",
    "group_by_length": "set data.group_by_length instead",
    "auto_find_batch_size": "it begins again with a smaller batch, but keeps the weights of the steps before; set "
    "per_device_train_batch_size and gradient_accumulation_steps instead",
}
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_RISING = ("top1_agreement", "mor@", "cr@", "spearman@")
_FALLING = ("kl", "reverse_kl", "ce", "perplexity", "ece")
_FIRST_CHOICE = "kl"
_CHECKPOINT_OPTIONS = {"preserve_rng_state"}  # taken from its keyword arguments
_OF_THE_MODEL = {"params", "model", "optimizer_dict"}
_LIGER_HEAD = "fused_linear_cross_entropy"


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The arguments of a config. Raises ConfigError, in one line, for a field that transformers
    does not know or that does not work here.
    """
    # Batches have fields that no model's signature has. Trackers are off by default, like
    # everything that sends data elsewhere. Without a GPU, pinned memory only gives a warning, and
    # workers take cores from the training.
    gpu = torch.cuda.is_available()
    defaults = {
        "report_to": "none",
        "save_total_limit": SAVE_TOTAL_LIMIT,
        # By default the verbosity of transformers decides.
        "disable_tqdm": False,
        "dataloader_pin_memory": gpu,
        "dataloader_num_workers": 2 if gpu else 0,
    }
    fields = {**defaults, **config.training, "remove_unused_columns": False}
    # Every run saves on SIGTERM (loop/stop.py). transformers' own way would stop inside a step and
    # count the run as finished.
    fields["enable_jit_checkpoint"] = False
    # YAML 1.1 reads an unquoted `no` as false.
    fields |= {
        name: "no"
        for name, value in fields.items()
        if name.endswith("_strategy") and value is False
    }
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
    if fields.get("use_liger_kernel"):
        fields["liger_kernel_config"] = _liger_without_head(fields.get("liger_kernel_config") or {})
    fields |= _best(fields, config.evaluation.k)
    try:
        arguments = TrainingArguments(**fields)
        if arguments.device.type == "cuda" and arguments.n_gpu > 1:
            # By default Trainer would wrap the student in nn.DataParallel, which cannot split
            # cached batches.
            log.info("training on one of %d GPUs", arguments.n_gpu)
            arguments._n_gpu = 1
    except TypeError as error:
        unknown = str(error).rpartition(" ")[2]
        raise ConfigError(
            f"training.{unknown.strip(chr(39))} is no field of transformers.TrainingArguments"
        ) from error
    except (ValueError, ImportError, RuntimeError, FileNotFoundError) as error:
        raise ConfigError(f"training: {first_line(error)}") from error
    for name in ("dispatch_batches", "split_batches"):
        if getattr(arguments.accelerator_config, name):
            raise ConfigError(
                f"training.accelerator_config.{name} would cut cached batches in the wrong places; remove it"
            )
    _check_trackers(arguments)
    _check_compilation(arguments)
    _check_loader(arguments)
    known = inspect.signature(checkpoint).parameters.keys() | _CHECKPOINT_OPTIONS
    if unheard := set(arguments.gradient_checkpointing_kwargs or {}) - known:
        raise ConfigError(
            f"training.gradient_checkpointing_kwargs sets {', '.join(sorted(unheard))}, which torch.utils.checkpoint does "
            "not know; remove it"
        )
    if arguments.push_to_hub:
        _check_hub(arguments)
    state = PartialState()
    if arguments.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"training.fsdp is set, but accelerate shards over several GPUs only, and here are {state.num_processes} processes "
            f"on {state.device.type}: every process would hold the whole student; remove it, or start it on GPUs with torchrun"
        )
    return arguments


def check_optimizer(arguments: TrainingArguments, student: PreTrainedModel) -> Optimizer:
    """Makes the optimizer on a dummy weight; Trainer makes its own at the first step.

    Raises ConfigError if ``training.optim`` needs a missing package or device, or if its numbers
    are invalid.
    """
    weight = [nn.Parameter(torch.zeros(64, 64, device=arguments.device))]
    optim = f"training.optim is {arguments.optim.value!r}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
        # Other optimizers need the model or its layers, and may leave hooks in it.
        if (
            not (isinstance(kind, type) and issubclass(kind, Optimizer))
            or options.keys() & _OF_THE_MODEL
        ):
            return torch.optim.SGD(weight, lr=arguments.learning_rate)
        optimizer = kind(weight, **options)
    except Exception as error:  # every optimizer raises its own error
        raise ConfigError(f"{optim}: {first_line(error)}") from error
    # transformers ignores arguments that it does not know.
    given = [
        pair.partition("=")[0].strip()
        for pair in (arguments.optim_args or "").split(",")
        if pair.strip()
    ]
    unknown = [name for name in given if name not in options]
    if unknown and kind.__module__.startswith("torch.optim"):
        raise ConfigError(
            f"training.optim_args sets {', '.join(unknown)}, and {optim}, which does not take it; remove it"
        )
    return optimizer


def check_schedule(arguments: TrainingArguments, optimizer: Optimizer, steps: int) -> None:
    """Raises ConfigError if ``training.lr_scheduler_kwargs`` do not fit the scheduler. Computes the
    rates of some steps.

    ``optimizer`` is the dummy of ``check_optimizer``, ``steps`` the number of steps of the
    training.
    """
    try:
        warmup = arguments.get_warmup_steps(steps)
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        for rate in getattr(scheduler, "lr_lambdas", ()):
            for step in sorted(
                {0, min(warmup, steps), min(warmup + 1, steps), steps // 2, steps - 1, steps}
            ):
                if not math.isfinite(factor := rate(step)):
                    raise ValueError(
                        f"the learning rate of step {step} is {factor} times training.learning_rate"
                    )
    except Exception as error:  # every scheduler raises its own error
        raise ConfigError(
            f"training.lr_scheduler_kwargs is {arguments.lr_scheduler_kwargs or {}}, with lr_scheduler_type "
            f"{str(arguments.lr_scheduler_type.value)!r}: {first_line(error)}"
        ) from error


def check_best(arguments: TrainingArguments, measured: dict[str, float]) -> None:
    """Raises ConfigError if ``training.metric_for_best_model`` is not a metric of this cache."""
    wanted = arguments.metric_for_best_model
    if wanted is not None and wanted.removeprefix("eval_") not in measured:
        raise ConfigError(
            f"training.metric_for_best_model is {wanted!r}, and what is measured on this cache is {', '.join(measured)}"
        )


def _best(fields: dict[str, Any], k: int) -> dict[str, Any]:
    """The metric that selects the best student, and whether larger is better. transformers' own
    guess assumes a loss.
    """
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
        raise ConfigError(
            f"training.metric_for_best_model is {name!r}; expected one of {', '.join(known)}"
        )
    rising = plain not in _FALLING
    given = fields.get("greater_is_better")
    return {"metric_for_best_model": plain, "greater_is_better": rising if given is None else given}


def _check_numbers(fields: dict[str, Any]) -> None:
    hints = get_type_hints(TrainingArguments)
    for name, value in fields.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        if (
            isinstance(value, str)
            and not {str, dict, list} & set(kinds)
            and {int, float} & set(kinds)
        ):
            raise ConfigError(f"training.{name} is {value!r}; expected a number")
        if (
            name in ("seed", "data_seed")
            and value is not None
            and not (type(value) is int and 0 <= value < 2**32)
        ):
            raise ConfigError(
                f"training.{name} is {value!r}; expected a whole number from 0 to {2**32 - 1}"
            )
        if name in _AT_LEAST_ONE and (not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"training.{name} is {value!r}; expected a whole number of at least 1"
            )


def _check_trackers(arguments: TrainingArguments) -> None:
    """Starts each tracker's callback once, because transformers checks its package only then."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"training.report_to: {first_line(error)}") from error


def _check_loader(arguments: TrainingArguments) -> None:
    try:
        DataLoader(  # which starts no workers yet
            cast(Any, [0]),
            num_workers=arguments.dataloader_num_workers,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training's dataloader fields: {first_line(error)}") from error


def _check_compilation(arguments: TrainingArguments) -> None:
    if arguments.torch_compile:
        try:
            DynamoBackend(str(arguments.torch_compile_backend or "inductor").upper())
            compiled = torch.compile(
                torch.sin,
                backend=arguments.torch_compile_backend,
                mode=arguments.torch_compile_mode,
            )
            # Needs the backend's own requirements: a C++ compiler, Triton.
            compiled(torch.zeros(2, device=arguments.device))
        except Exception as error:  # every backend raises its own error
            raise ConfigError(f"training.torch_compile: {first_line(error)}") from error


def _check_hub(arguments: TrainingArguments) -> None:
    try:
        HfApi(token=arguments.hub_token).whoami()
    except Exception as error:  # a missing or wrong token, no network
        raise ConfigError(
            f"training.push_to_hub is set, and the hub does not know you ({first_line(error)}); run `hf auth login`, or "
            "remove it"
        ) from error


def _liger_without_head(config: dict[str, bool]) -> dict[str, bool]:
    """Liger's kernels for the layers below the lm_head. The losses are our own."""
    if config.get(_LIGER_HEAD):
        raise ConfigError(
            f"training.liger_kernel_config.{_LIGER_HEAD} computes its own loss in place of the cache's; remove it"
        )
    return {**config, _LIGER_HEAD: False}
