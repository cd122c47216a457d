"""The way from a config to a teacher: ``open_teacher`` starts the engine that the config names.

Engines take long to import. Each has a module or folder of its own, imported only if it is used.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.base import Sampling, Teacher
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    check_weights,
    end_tokens,
    load_tokenizer,
    resolve_model,
    vocab_size,
)
from logitcask.pipeline.teachers.own import OwnTeacher, has_tokenizer, tokenizer_of
from logitcask.pipeline.text.chat_template import ChatTemplate
from logitcask.pipeline.text.config import GenerateConfig

logger = logging.getLogger(__name__)


def resolved(config: TeacherConfig) -> ResolvedModel | None:
    """The model that ``config`` names; None for the synthetic teacher, and for a backend with its
    own tokenizer.

    Raises what ``resolve_model`` raises.
    """
    if config.is_synthetic or has_tokenizer(config):
        return None
    return resolve_model(config.model, config.revision, trust_remote_code=config.trust_remote_code)


def open_teacher(
    config: TeacherConfig,
    model: ResolvedModel | None = None,
    *,
    max_length: int,
    capture: Capture,
    sampling: Sampling | None = None,
    state: Path | None = None,
) -> Teacher:
    """The teacher that ``config`` names, its engine started. With ``sampling`` it is also a
    ``Generator``.

    model:      the model of ``config``, if it is resolved already (also in the functions below).
    max_length: longest sequence to score, in tokens.
    capture:    the values to return at every position; ``top_k`` is at most the vocabulary's size.
    sampling:   the settings for writing text; None to score only.
    state:      folder of a build's records, which later starts of the build are checked against.

    Raises UserError if the model does not exist, or if the engine cannot start with it or cannot
    draw.
    """
    model = model or resolved(config)
    if config.has_own_backend:
        return OwnTeacher(config, model, max_length=max_length, capture=capture, sampling=sampling)
    if model is None:
        from logitcask.pipeline.teachers.synthetic import SyntheticTeacher

        return SyntheticTeacher(config, capture, sampling)
    if config.backend == "server":
        from logitcask.pipeline.teachers.server.teacher import ServerTeacher

        return ServerTeacher(config, model, max_length=max_length, capture=capture, state=state)
    check_weights(model)
    if config.backend == "vllm":
        if importlib.util.find_spec("vllm") is not None:
            from logitcask.pipeline.teachers.vllm.engine import VllmTeacher

            return VllmTeacher(
                config, model, max_length=max_length, capture=capture, sampling=sampling
            )
        logger.warning(
            "vLLM is not installed, so transformers scores instead: right, but slow on a GPU; "
            "install logitcask[teacher] (NVIDIA GPU) or logitcask[teacher-cpu], or set teacher.backend=transformers"
        )
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    return TransformersTeacher(
        config, model, max_length=max_length, capture=capture, sampling=sampling
    )


def check_choice(config: TeacherConfig, number: int) -> None:
    """Raises UserError if the engine of ``config`` cannot score ids that another model chooses, of
    which ``number`` are wanted at each position. Imports vLLM, but starts nothing.
    """
    if number and config.backend == "vllm" and importlib.util.find_spec("vllm") is not None:
        from logitcask.pipeline.teachers.vllm.choice import check_vllm
        from logitcask.pipeline.teachers.vllm.process import import_vllm

        check_vllm(import_vllm(), number)


def open_tokenizer(config: TeacherConfig, model: ResolvedModel | None = None) -> Any:
    """The teacher's tokenizer: a transformers one, or that of the synthetic teacher or of a backend
    outside this project.

    Raises UserError if the model does not exist or has no tokenizer.
    """
    if has_tokenizer(config):
        return tokenizer_of(config)
    model = model or resolved(config)
    if model is None:
        from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

        return SyntheticTokenizer()
    return load_tokenizer(model)


def sampling_of(
    config: TeacherConfig,
    settings: GenerateConfig,
    tokenizer: Any,
    template: ChatTemplate | None = None,
    model: ResolvedModel | None = None,
) -> Sampling:
    """The settings for writing text, with the teacher's own end tokens.

    The special token that ``template`` puts after an answer is always an end token, even if the
    model's configs do not list it. Without it, the teacher would go on to write the next question.

    A stop string that is a special token of the tokenizer becomes an end token, because special
    tokens do not appear in the decoded text.
    """
    model = model or resolved(config)
    ends = {tokenizer.eos_token_id}
    if model is not None:
        ends = end_tokens(model) | (ends - {None})
    special = {
        str(token): index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
    }
    behind = template.end_of_turn() if template is not None else ""
    written = next(
        (token for token in sorted(special, key=len, reverse=True) if behind.startswith(token)),
        None,
    )
    if written is not None and special[written] not in ends:
        logger.warning(
            "the chat template ends an answer with %s, which the model's configs do not name as an end token; answers end there",
            written,
        )
        ends |= {special[written]}
    ends |= {special[stop] for stop in settings.stop if stop in special}
    return Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        end_tokens=tuple(sorted(ends)),
        stop=tuple(stop for stop in settings.stop if stop not in special),
        top_ids=settings.writer_top_k or 0,
    )


def vocab_size_of(config: TeacherConfig, model: ResolvedModel | None = None) -> int:
    """The number of ids that the teacher can predict, found without loading its weights. A backend
    with its own tokenizer can predict at least that tokenizer's ids.
    """
    if has_tokenizer(config):
        return len(tokenizer_of(config))
    model = model or resolved(config)
    return config.vocab_size if model is None else vocab_size(model)
