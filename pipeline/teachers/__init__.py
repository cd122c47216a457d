"""Teachers: models that score given text. ``open_teacher`` picks the engine that a config names.

An engine is heavy to import, so each lives in a file of its own that is loaded here only when asked for.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.capture import Capture
from pipeline.config import TeacherConfig
from pipeline.models import load_tokenizer, resolve_model, vocab_size
from pipeline.sequence import Sequence
from pipeline.teachers.base import Teacher, answers

__all__ = ["Teacher", "answers", "bounded_groups", "open_teacher", "open_tokenizer", "vocab_size_of"]

logger = logging.getLogger(__name__)


def open_teacher(config: TeacherConfig, *, max_length: int, capture: Capture) -> Teacher:
    """Starts the engine that ``config`` names, ready to score.

    max_length: longest sequence that will be scored, in tokens.
    capture:    what to return at every position; ``top_k`` is at most the vocabulary's size.

    Raises UserError where the model does not exist, or the engine cannot start with it or cannot draw.
    """
    if _is_synthetic(config):
        from pipeline.teachers.synthetic import SyntheticTeacher

        return SyntheticTeacher(config, capture)
    model = resolve_model(config.model, config.revision)
    if config.backend == "vllm":
        if importlib.util.find_spec("vllm") is not None:
            from pipeline.teachers.vllm import VllmTeacher

            return VllmTeacher(config, model, max_length=max_length, capture=capture)
        logger.warning(
            "vLLM is not installed, so transformers scores instead: right, but slow on a GPU; "
            "install logitcask[teacher] (NVIDIA GPU) or logitcask[teacher-cpu], or set teacher.backend=transformers"
        )
    from pipeline.teachers.transformers import TransformersTeacher

    return TransformersTeacher(config, model, max_length=max_length, capture=capture)


def open_tokenizer(config: TeacherConfig) -> Any:
    """The teacher's tokenizer: a transformers one, or the synthetic teacher's own.

    Raises UserError where the model does not exist or has no tokenizer.
    """
    if _is_synthetic(config):
        from pipeline.teachers.synthetic import SyntheticTokenizer

        return SyntheticTokenizer()
    return load_tokenizer(config.model, config.revision)


def vocab_size_of(config: TeacherConfig) -> int:
    """How many ids the teacher can predict, known without loading its weights."""
    if _is_synthetic(config):
        return config.vocab_size
    return vocab_size(resolve_model(config.model, config.revision))


def bounded_groups(sequences: Iterable[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Consecutive groups of at most ``tokens`` tokens, or of one sequence that is longer than that."""
    group: list[Sequence] = []
    held = 0
    for sequence in sequences:
        if group and held + len(sequence.input_ids) > tokens:
            yield group
            group, held = [], 0
        group.append(sequence)
        held += len(sequence.input_ids)
    if group:
        yield group


def _is_synthetic(config: TeacherConfig) -> bool:
    return config.backend == "synthetic" or config.model == "synthetic"
