"""Teachers: models that score given text. ``open_teacher`` picks the engine that a config names.

An engine is heavy to import, so each lives in a module or folder of its own that is loaded here
only when it is asked for.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from logitcask.pipeline.config import GenerateConfig, TeacherConfig
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
from logitcask.pipeline.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)


def resolved(config: TeacherConfig) -> ResolvedModel | None:
    """The model that ``config`` names; None for the synthetic teacher. Raises as
    ``resolve_model``.
    """
    if config.is_synthetic:
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
    """Starts the engine that ``config`` names, ready to score: a ``Teacher``; with ``sampling`` a
    ``Generator`` too.

    model:      that of ``config``, if it has been resolved already; here and below.
    max_length: longest sequence that will be scored, in tokens.
    capture:    what to return at every position; ``top_k`` is at most the vocabulary's size.
    sampling:   how it will write, if it will.
    state:      folder in which a build keeps what a later start of it must agree with.

    Raises UserError where the model does not exist, or the engine cannot start with it or cannot
    draw.
    """
    model = model or resolved(config)
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


def open_tokenizer(config: TeacherConfig, model: ResolvedModel | None = None) -> Any:
    """The teacher's tokenizer: a transformers one, or the synthetic teacher's own.

    Raises UserError where the model does not exist or has no tokenizer.
    """
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
    """How the teacher is to write: by the settings, until one of its own end tokens.

    The special token that ``template`` puts behind an answer is one of them, whatever the model's
    configs name: a teacher that writes on behind it writes the next question itself.

    A stop string that is a special token of the tokenizer, which would not show in the text, counts
    as an end token.
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
    )


def vocab_size_of(config: TeacherConfig, model: ResolvedModel | None = None) -> int:
    """How many ids the teacher can predict, known without loading its weights."""
    model = model or resolved(config)
    return config.vocab_size if model is None else vocab_size(model)
