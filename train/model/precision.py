"""The precision of training, for all code that runs the student.

With ``training.bf16`` (or ``fp16``) the optimizer updates weights in float32, and the student
computes in half precision. In one process and under DDP, autocast does this: accelerate enters it
around the student's forward, and ``like_training`` enters it for other calls. Under FSDP2 each
process gathers the weights in half precision.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments

from logitcask.cache_format.errors import ConfigError

log = logging.getLogger(__name__)


def computing_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """The half precision of training; None if it computes in the precision of the weights."""
    # As accelerate decides: float16 needs a GPU, and the launcher's setting counts if the config
    # has none.
    on_cpu = arguments.device.type == "cpu"
    return {"bf16": torch.bfloat16, "fp16": None if on_cpu else torch.float16}.get(
        arguments.mixed_precision
    )


def like_training(student: nn.Module, arguments: TrainingArguments) -> AbstractContextManager[Any]:
    """A context in which the student computes in the precision of training."""
    dtype = computing_dtype(arguments)
    # FSDP2 gathers its weights in that precision.
    if dtype is None or isinstance(student, FSDPModule):
        return nullcontext()
    return torch.autocast(arguments.device.type, dtype=dtype)


def attention_of(student: Any) -> str:
    """The student's attention implementation, by transformers' name."""
    return getattr(student.config.get_text_config(decoder=True), "_attn_implementation", None) or ""


def as_exact_as_it_can(student: Any, arguments: TrainingArguments) -> AbstractContextManager[Any]:
    """A context for start-up checks: full precision, which allows small tolerances, or training's
    precision if the attention supports no other.
    """
    return like_training(student, arguments) if "flash" in attention_of(student) else nullcontext()


def check_attention(student: Any, arguments: TrainingArguments) -> None:
    """Raises ConfigError for flash attention in float32: its kernels need half precision."""
    attention = attention_of(student)
    if (
        "flash" in attention
        and student.dtype == torch.float32
        and computing_dtype(arguments) is None
    ):
        raise ConfigError(
            f"student.attention is {attention!r}, which does not compute in float32; set training.bf16 to true: it computes in "
            "bfloat16 then, and the weights stay in float32"
        )


def shard_without_casts(plugin: Any) -> None:
    """Makes FSDP2 cast only weights. ``plugin`` is accelerate's. Raises ConfigError for FSDP1.

    accelerate's own policy also casts the inputs and outputs of the wrapped student, and the sums
    of gradients. Here these would be the teacher's logprobs, the logged losses, and sums over
    micro-batches.
    """
    # Evaluation calls the student's halves, whose weights FSDP1 has flattened.
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"the student is to be sharded by FSDP{plugin.fsdp_version}; set training.fsdp_config.version (or the launcher's "
            "fsdp_version) to 2"
        )
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def warn_of_lost_steps(student: nn.Module, *, widened: bool) -> None:
    """Warns if an optimizer updates bfloat16 weights; ``widened``: they become float32 first."""
    if not widened and any(
        weight.requires_grad and weight.dtype == torch.bfloat16 for weight in student.parameters()
    ):
        log.warning(
            "the student's weights are trained in bfloat16, where a step below 1/512 of a weight, as most of AdamW's are at a "
            "learning rate of 2e-5, changes nothing; set student.dtype to float32 and training.bf16 to true: it computes in "
            "bfloat16 then, and the weights stay in float32"
        )


def summed(values_P: torch.Tensor) -> torch.Tensor:
    """The sum in float64, precise enough for thousands of additions; in float32 on Apple's GPUs,
    which have no wider type.
    """
    return values_P.sum(dtype=torch.float32 if values_P.device.type == "mps" else torch.float64)
