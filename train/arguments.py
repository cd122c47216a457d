"""``training:`` of a config as ``transformers.TrainingArguments``, and what of them a cache cannot serve."""

from __future__ import annotations

import logging

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from cache_format.errors import ConfigError
from train.config import TrainConfig

log = logging.getLogger(__name__)

_UNSUPPORTED = {
    "label_smoothing_factor": "the hard labels are a loss of their own: ce_weight",
    "save_only_model": "a run could not go on exactly",
    "group_by_length": "set data.group_by_length instead",
}


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
    if (strategy := fields.get("train_sampling_strategy", "random")) != "random":
        raise ConfigError(
            f"training.train_sampling_strategy is {strategy!r}; the order of cached data is set by data.shuffle and "
            "data.group_by_length: remove it"
        )
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
    state = PartialState()
    if arguments.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"training.fsdp is set, but accelerate shards over several GPUs only, and here are {state.num_processes} processes "
            f"on {state.device.type}: every process would hold the whole student; remove it, or start it on GPUs with torchrun"
        )
    return arguments
