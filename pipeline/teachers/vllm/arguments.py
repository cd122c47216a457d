"""The arguments of a vLLM engine that users may not set, and memory that vLLM does not count.

A prompt's logits are float32[rows, vocabulary]. Model runner V2 computes them for 1,024 rows at a
time, with any size of a step; V1 computes them for all rows of a request in the step. vLLM's
profiler counts neither, and gives the key-value cache the rest of ``gpu_memory_utilization``. The
logits must fit into the rest of the card.
"""

from __future__ import annotations

import math

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.config import TeacherConfig

# Other values of these would silently change or break the stored data: the reason, or the field to
# use instead.
_ELSEWHERE = (
    "a token whose keys and values come from elsewhere is not computed, so it has no logprobs"
)
_THE_TEACHERS = "weights, config and tokenizer are those of teacher.model"
_SAMPLED = "it changes what is sampled and nothing that is scored; answers are sampled as data.generate says"
_ALONE = "the teacher alone says what is scored and sampled"
_GENERATES = (
    "only a model that generates, from left to right, has a distribution for every next token"
)
_MERGED = "no adapter would be applied; merge it into the teacher first"
_RESERVED = {
    "model": "use teacher.model",
    "revision": "use teacher.revision",
    "dtype": "use teacher.dtype",
    "tensor_parallel_size": "use teacher.tensor_parallel_size",
    "max_num_batched_tokens": "use teacher.batch_tokens",
    "max_model_len": "use data.max_length",
    "max_logprobs": "use store.top_k",
    "logprobs_mode": "its value is part of how logprobs are captured",
    "kv_sharing_fast_prefill": "it skips layers for all tokens of a prompt but the last, whose logprobs are wrong then",
    "enable_prefix_caching": _ELSEWHERE,
    "kv_transfer_config": _ELSEWHERE,
    "kv_offloading_size": _ELSEWHERE,
    "hf_config_path": _THE_TEACHERS,
    "model_weights": _THE_TEACHERS,
    "tokenizer": _THE_TEACHERS,
    "tokenizer_revision": _THE_TEACHERS,
    "logits_processors": _SAMPLED,
    "override_generation_config": _SAMPLED,
    "watermark_config": _SAMPLED,
    "speculative_config": _ALONE,
    "spec_method": _ALONE,
    "spec_model": _ALONE,
    "spec_tokens": _ALONE,
    "runner": _GENERATES,
    "convert": _GENERATES,
    "diffusion_config": _GENERATES,
    "mm_encoder_only": _GENERATES,
    "enable_lora": _MERGED,
    "default_mm_loras": _MERGED,
}


def check_engine_args(config: TeacherConfig, where: str = "teacher.engine_args") -> None:
    """Raises ConfigError for engine arguments that have their own config field, or that would make
    the stored data wrong. ``where`` is their place in the user's config.
    """
    for key in config.engine_args:
        if key in _RESERVED:
            raise ConfigError(f"{where}.{key} cannot be set; {_RESERVED[key]}")


CHUNK_ROWS = 1024
"""Rows of logits that model runner V2 makes at a time."""

# Share of the card for memory that is not counted, mostly fragments of the allocator. vLLM's own
# default leaves twice as much.
_SPARE = 0.04
# On a GPU, logitcask.pipeline.distribution.draws_torch works in chunks of at most so many floats,
# and holds so many copies of a chunk.
_DRAWS_CHUNK, _DRAWS_COPIES = 1 << 26, 4


def logits_bytes(
    vocab_size: int,
    rows: int,
    *,
    chunked: bool,
    soft_capped: bool,
    draws: bool,
    tensor_parallel_size: int = 1,
) -> int:
    """Peak bytes on each GPU of turning hidden states into prompt logprobs.

    rows:        number of rows of logits at a time.
    chunked:     by model runner V2, which holds one chunk while it computes the next; else by V1,
                 which holds logits and logprobs.
    soft_capped: the model's final logits pass through tanh, which holds them twice.
    draws:       whether draws are made from them.
    tensor_parallel_size: ranks that compute a part each; the gathered logits are copied once.
    """
    fresh = 2.0 if soft_capped else 1.0
    if tensor_parallel_size > 1:
        fresh = max(fresh, 2 + 1 / tensor_parallel_size)
    making, held = (1 + fresh, 1) if chunked else (max(fresh, 2.25), 2)
    one = 4 * rows * vocab_size
    drawing = _DRAWS_COPIES * min(one, 4 * _DRAWS_CHUNK) if draws else 0
    return math.ceil(max(making * one, held * one + drawing))


def memory_utilization(card_bytes: int, logits: int, usual: float) -> float:
    """``gpu_memory_utilization`` that leaves room for ``logits`` bytes: ``usual``, or less, in
    hundredths.

    Raises UserError if they would take more than half of the card.
    """
    if logits > card_bytes / 2:
        raise UserError(
            f"the logits of a step take {logits / 2**30:.1f} GiB of the GPU's {card_bytes / 2**30:.1f} GiB; "
            "set a smaller teacher.batch_tokens (they are made for all its tokens, for 1,024 at most by model runner V2)"
        )
    return min(usual, math.floor(100 * (1 - _SPARE - logits / card_bytes)) / 100)
