"""The precision of training: half precision computes, and nothing else is in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from cache_format.errors import ConfigError


def shard_without_casts(plugin: Any) -> None:
    """Has FSDP2 cast weights, and nothing else. ``plugin`` is accelerate's. Raises ConfigError for FSDP1.

    accelerate's own policy also casts what goes into and comes out of the wrapped student, and the gradients as they are
    summed. Here that would be the teacher's logprobs, the losses that are logged, and sums over micro-batches.
    """
    if plugin.fsdp_version != 2:  # evaluation calls the student's halves, whose weights FSDP1 has flattened away
        raise ConfigError(
            f"the student is to be sharded by FSDP{plugin.fsdp_version}; set training.fsdp_config.version (or the launcher's "
            "fsdp_version) to 2"
        )
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def summed(values_P: torch.Tensor) -> torch.Tensor:
    """The sum in float64, to which thousands of others can be added; in float32 on Apple's GPUs, which have nothing wider."""
    return values_P.sum(dtype=torch.float32 if values_P.device.type == "mps" else torch.float64)
