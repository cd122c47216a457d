"""Logprobs at ids of our choice (``prompt_logprob_token_ids``, vLLM 0.32): the request, its answer,
and the refusal of engines without it.

Only model runner V2, on GPUs, scores them. The ids of a request are int32[n - 1, C]; row ``i`` is of
the prediction of token ``i + 1``, and -1 pads a row. The answer is float32[n - 1, C] in
``RequestOutput.prompt_token_id_logprobs``, with -inf for padding.

Shapes: n tokens, P kept positions, C chosen ids.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.types import Sequence

_FIELD = "prompt_logprob_token_ids"
# Nats by which two numbers of one engine for one id may differ.
_TOLERANCE = 1e-3


def check_vllm(vllm: Any, number: int) -> None:
    """Raises UserError if this vLLM, here, does not score ids of our choice, of which ``number`` are
    wanted. ``vllm``: the module.
    """
    if _FIELD not in signature(vllm.SamplingParams).parameters:
        raise refusal(number, f"vLLM {vllm.__version__} cannot score them (0.32 and later can)")
    if vllm.platforms.current_platform.is_cpu():
        raise refusal(number, f"vLLM {vllm.__version__} scores them on GPUs only")
    if vllm.envs.VLLM_USE_V2_MODEL_RUNNER is False:
        raise refusal(
            number, "vLLM's model runner V1, which VLLM_USE_V2_MODEL_RUNNER=0 selects, cannot"
        )


def refusal(number: int, why: str) -> UserError:
    """The error for an engine that cannot score ``number`` chosen ids at each position."""
    return UserError(
        f"data.generate.writer_top_k is {number}, so the teacher has to score ids that another model chooses, and {why}; "
        "set teacher.backend=transformers, or remove writer_top_k"
    )


def rows_of(sequence: Sequence) -> NDArray[np.int32] | None:
    """int32[n-1, C]: the ids to score in each row of a prompt; None if it has none."""
    if sequence.chosen_ids is None or not sequence.chosen_ids.shape[1]:
        return None
    rows = np.full((len(sequence.input_ids) - 1, sequence.chosen_ids.shape[1]), -1, np.int32)
    rows[sequence.positions()] = sequence.chosen_ids
    return rows


def parameters(rows: NDArray[np.int32] | None) -> dict[str, Any]:
    """The arguments of ``SamplingParams`` that ask for these ids.

    ``skip_reading_prefix_cache`` must not be among the others: set to False, it makes vLLM drop the
    scores of a text whose beginning it finds in its cache.
    """
    return {} if rows is None else {_FIELD: rows}


def scores_of(output: Any, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32[n-1, C], nats: the logprobs of the ids in ``rows``, from a finished request.

    Raises UserError if they are not there.
    """
    found = getattr(output, "prompt_token_id_logprobs", None)
    shape = None if found is None else np.shape(found)
    if found is None or shape != rows.shape:
        raise refusal(
            rows.shape[1], f"this vLLM returned scores of shape {shape} for ids of {rows.shape}"
        )
    return np.where(rows >= 0, np.asarray(found, np.float32), np.float32(-np.inf))


def check_scores(scores: NDArray[np.float32], targets: NDArray[np.float32]) -> None:
    """Raises UserError unless an engine gives the same logprobs for the tokens of a text, float32[n-1],
    whether it is asked for the next tokens or for these ids, float32[n-1, C]; the first of the C is
    the next token.
    """
    if not np.allclose(scores[:, 0], targets, atol=_TOLERANCE, rtol=0):
        most = float(np.abs(scores[:, 0] - targets).max())
        raise refusal(
            scores.shape[1], f"this vLLM gives other logprobs for them, by {most:.3g} nats"
        )


def with_next_token(prompt: list[int], number: int) -> NDArray[np.int32]:
    """int32[n-1, C]: for ``check_scores``, the next token in each row, padded to ``number``."""
    rows = np.full((len(prompt) - 1, number), -1, np.int32)
    rows[:, 0] = prompt[1:]
    return rows
