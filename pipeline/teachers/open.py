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


def open_teacher(
    config: TeacherConfig,
    *,
    max_length: int,
    capture: Capture,
    sampling: Sampling | None = None,
    state: Path | None = None,
) -> Teacher:
    """Starts the engine that ``config`` names, ready to score: a ``Teacher``; with ``sampling`` a
    ``Generator`` too.

    max_length: longest sequence that will be scored, in tokens.
    capture:    what to return at every position; ``top_k`` is at most the vocabulary's size.
    sampling:   how it will write, if it will.
    state:      folder in which a build keeps what a later start of it must agree with.

    Raises UserError where the model does not exist, or the engine cannot start with it or cannot
    draw.
    """
    if config.is_synthetic:
        from logitcask.pipeline.teachers.synthetic import SyntheticTeacher

        return SyntheticTeacher(config, capture, sampling)
    model = _resolve(config)
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


def open_tokenizer(config: TeacherConfig) -> Any:
    """The teacher's tokenizer: a transformers one, or the synthetic teacher's own.

    Raises UserError where the model does not exist or has no tokenizer.
    """
    if config.is_synthetic:
        from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

        return SyntheticTokenizer()
    return load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)


def sampling_of(
    config: TeacherConfig,
    settings: GenerateConfig,
    tokenizer: Any,
    template: ChatTemplate | None = None,
) -> Sampling:
    """How the teacher is to write: by the settings, until one of its own end tokens.

    The special token that ``template`` puts behind an answer is one of them, whatever the model's
    configs name: a teacher that writes on behind it writes the next question itself.

    A stop string that is a special token of the tokenizer, which would not show in the text, counts
    as an end token.
    """
    ends = {tokenizer.eos_token_id} if config.is_synthetic else _ends_of_turns(config, tokenizer)
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


def _ends_of_turns(config: TeacherConfig, tokenizer: Any) -> set[int]:
    named = end_tokens(_resolve(config))
    return named | ({tokenizer.eos_token_id} - {None})


def vocab_size_of(config: TeacherConfig) -> int:
    """How many ids the teacher can predict, known without loading its weights."""
    if config.is_synthetic:
        return config.vocab_size
    return vocab_size(_resolve(config))


def _resolve(config: TeacherConfig) -> ResolvedModel:
    return resolve_model(config.model, config.revision, trust_remote_code=config.trust_remote_code)
