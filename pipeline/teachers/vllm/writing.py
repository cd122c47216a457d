"""Answers of a vLLM engine: it gets prompts as others finish, and returns the sampled ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.teachers.base import Prompt, SampledAnswer, Sampling

# Answers in the engine or waiting for earlier ones, as a multiple of the engine's batch.
_AHEAD = 4


def engine_arguments(
    sampling: Sampling | None, *, on_cpu: bool, step_tokens: int
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for writing with ``sampling``; ``step_tokens`` is at least the
    length of the longest sequence.
    """
    if sampling is None:
        return {}
    # The engine searches stop strings in text.
    arguments: dict[str, Any] = {"skip_tokenizer_init": not sampling.stop}
    if on_cpu:
        # On a CPU, a seeded request whose prompt is read in several steps fails: torch's CPU
        # generators have no offset.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": step_tokens}
    return arguments


def write(
    engine: Any,
    params: Any,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    step: Callable[[], Iterable[Any]],
    *,
    logprobs: bool = False,
) -> Iterator[SampledAnswer]:
    """One answer per prompt, in order; with NaN for its logprobs unless ``logprobs``. ``params`` is ``vllm.SamplingParams``; ``step``
    runs a step of the engine.

    The engine gets a prompt whenever it finishes another, so it never waits for the longest answer
    of a group. Each request has its own seed, so an answer is the same in any batch, unless
    rounding changes a near tie.
    """
    noted = sampling.top_ids if logprobs else None
    ahead = _AHEAD * engine.vllm_config.scheduler_config.max_num_seqs
    prompts = iter(prompts)
    finished: dict[int, SampledAnswer] = {}
    asked = given = 0
    try:
        while True:
            for prompt in itertools.islice(prompts, ahead - (asked - given)):
                ids = {"prompt_token_ids": prompt.input_ids.tolist()}
                engine.add_request(
                    f"answer-{asked}", ids, _sampling_params(params, prompt, sampling, noted)
                )
                asked += 1
            if given == asked:
                return
            if given not in finished:
                for output in step():
                    number = int(output.request_id.removeprefix("answer-"))
                    finished[number] = _answer(output.outputs[0], noted)
            while given in finished:
                yield finished.pop(given)
                given += 1
    finally:
        left = [f"answer-{number}" for number in range(given, asked) if number not in finished]
        if left:
            engine.abort_request(left)


def _answer(output: Any, noted: int | None) -> SampledAnswer:
    """A finished request's tokens. vLLM names each sampled token in the dict of its logprobs, beside
    the ``noted`` most probable ids. None: no logprobs are asked for.

    Raises UserError if a dict has less.
    """
    ids = np.array(output.token_ids, np.int32)
    if noted is None:
        return SampledAnswer(ids, np.full(len(ids), np.nan, np.float32))
    try:
        found = [
            each[token].logprob
            for token, each in zip(output.token_ids, output.logprobs, strict=True)
        ]
        # A sampled token beyond the most probable ids has a lower logprob than they.
        top = [
            sorted(each, key=lambda token, each=each: -each[token].logprob)[:noted]  # type: ignore[misc]
            for each in output.logprobs
        ]
        top_ids = np.array(top, np.int32).reshape(len(ids), noted)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"this vLLM does not say the logprobs of the tokens that it samples ({type(error).__name__}); "
            "set teacher.backend=transformers"
        ) from error
    return SampledAnswer(ids, np.array(found, np.float32), top_ids if noted else None)


def _sampling_params(params: Any, prompt: Prompt, sampling: Sampling, noted: int | None) -> Any:
    from vllm.sampling_params import RequestOutputKind

    return params(
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        max_tokens=prompt.max_tokens,
        seed=prompt.seed,
        stop_token_ids=list(sampling.end_tokens),
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        logprobs=noted,  # beside that of the sampled token
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
