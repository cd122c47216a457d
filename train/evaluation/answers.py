"""Answers of the student, compared with the answers in the cache: readable text, and Rouge-L.

Teacher-forced metrics predict one token at a time. Here the student continues its own tokens. The
prompt consists of the tokens before the first kept token of a held-out sequence, and the reference
of the kept tokens after it: the teacher's own answer if the cache was made with ``data.generate``.
Documents have no such border, so their first tokens are the prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.train.config import AnswersConfig
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.same_text import LEAST_PROMPT

log = logging.getLogger(__name__)

_BATCH = 8


class Answer(NamedTuple):
    """prompt, reference, student: text.

    rouge_l: as of ``logitcask.train.evaluation.rouge.RougeL``.
    """

    prompt: str
    reference: str
    student: str
    rouge_l: float | None


def answers(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    settings: AnswersConfig,
) -> list[Answer]:
    """The student's greedy answers to the prompts of the first ``settings.sequences`` sequences.

    Sequences without a prompt and prompts that fill the student's context are left out. No answer
    exceeds the context.
    """
    # nltk and scipy take seconds to load, and most runs compare no answers.
    from logitcask.train.evaluation.rouge import RougeL

    context = getattr(student.config.get_text_config(), "max_position_embeddings", None) or math.inf
    pairs = [
        pair
        for pair in (split_at_prompt(sequence, settings) for sequence in _first(data, settings))
        if pair
    ]
    pairs = [(prompt, reference) for prompt, reference in pairs if len(prompt) < context]
    rouge_l = RougeL()
    found: dict[int, Answer] = {}
    # Prompts of similar length share a batch, for less padding.
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))
    for start in ProgressBar(
        range(0, len(order), _BATCH), desc="answer", unit="batch", leave=False, dynamic_ncols=True
    ):
        chosen = order[start : start + _BATCH]
        prompts = [pairs[index][0] for index in chosen]
        room = int(min(settings.max_new_tokens, context - max(map(len, prompts))))
        generated = _generate(student, tokenizer, prompts, room)
        for index, ids in zip(chosen, generated, strict=True):
            prompt, reference = (
                tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in pairs[index]
            )
            text = tokenizer.decode(ids, skip_special_tokens=True)
            score = rouge_l(reference, text)
            found[index] = Answer(prompt.strip(), reference.strip(), text.strip(), score)
    return [found[index] for index in sorted(found)]


def mean_rouge_l(found: list[Answer]) -> float | None:
    """Mean over all comparable answers; None if there are none. Logs the number of the others."""
    scores = [answer.rouge_l for answer in found if answer.rouge_l is not None]
    if len(scores) < len(found):
        log.warning(
            "%d of %d references have no words (no letters, no digits); Rouge-L is over the others",
            len(found) - len(scores),
            len(found),
        )
    return sum(scores) / len(scores) if scores else None


def split_at_prompt(
    sequence: CachedSequence, settings: AnswersConfig
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """(prompt, reference) of a sequence, int32 ids; None if no token follows the prompt."""
    mask = sequence.loss_mask
    start = int(mask.argmax())
    if start < LEAST_PROMPT:
        start = settings.prompt_tokens
        mask = np.ones_like(mask)
    after = mask[start:]
    length = int((~after).argmax()) if not after.all() else len(after)
    length = min(length, settings.max_new_tokens)
    return (
        (sequence.input_ids[:start], sequence.input_ids[start : start + length])
        if length > 0
        else None
    )


def _first(data: HeldOut, settings: AnswersConfig) -> list[CachedSequence]:
    return [data[index] for index in range(min(len(data), settings.sequences))]


@torch.no_grad()
def _generate(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[NDArray[np.int32]],
    new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations, without their prompts, up to and without the end token."""
    ends = {tokenizer.eos_token_id, *_ends_of(student)} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), padding, device=student.device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.from_numpy(prompt).to(input_ids)
        attention_mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=padding,
        eos_token_id=sorted(ends) or None,
    )
    was_training = student.training
    student.eval()
    with _only(config, student):
        output = student.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config
        )
    student.train(was_training)
    return [_before_end(row.tolist(), ends) for row in output[:, longest:]]


@contextmanager
def _only(config: GenerationConfig, student: PreTrainedModel) -> Iterator[None]:
    """Hides the student's own config (beams, penalties, several answers) from ``generate``, which
    would take defaults from it.
    """
    unwrap = getattr(student, "get_base_model", None)
    models = [student, unwrap()] if unwrap else [student]
    own = student.generation_config
    for model in models:
        model.generation_config = config
    try:
        yield
    finally:
        for model in models:
            model.generation_config = own


def _ends_of(student: PreTrainedModel) -> set[int]:
    ends: Any = getattr(student.generation_config, "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else {ends}


def _before_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[:at] for at, each in enumerate(ids) if each in ends), ids)
