"""The inputs of a build: source, tokenizer, vocabulary and resolved model.

Each is opened once, when it is first needed, so that errors appear in the order of the steps.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from logitcask.cache_format import UserError
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.model import ResolvedModel, attention, check_context
from logitcask.pipeline.teachers.open import (
    check_choice,
    open_tokenizer,
    resolved,
    vocab_size_of,
)
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.mixed import open_rows
from logitcask.pipeline.text.sources import RowSource
from logitcask.pipeline.text.tokenize import Tokenization


class Inputs:
    """The inputs from the sections ``teacher`` and ``data`` of a config.

    The first access to an input raises UserError if it does not exist or cannot be read.
    """

    def __init__(self, config: BuildConfig) -> None:
        self.teacher: TeacherConfig = config.teacher
        self.data: DataConfig = config.data

    @cached_property
    def source(self) -> RowSource:
        return open_rows(self.data)

    @cached_property
    def tokenizer(self) -> Any:
        return open_tokenizer(self.teacher, self.model)

    @cached_property
    def vocab_size(self) -> int:
        return vocab_size_of(self.teacher, self.model)

    @cached_property
    def model(self) -> ResolvedModel | None:
        """The resolved model; None for the synthetic teacher."""
        return resolved(self.teacher)

    def reopen_source(self) -> None:
        """Finds the data again, because some of its files may be gone."""
        self.__dict__.pop("source", None)

    def forget_text(self) -> None:
        """Frees the source and the tokenizer, which only a plan needs. A tokenizer is large."""
        for name in ("source", "tokenizer"):
            self.__dict__.pop(name, None)

    def tokenization(self, data: DataConfig) -> Tokenization:
        """A new Tokenization. ``data`` equals this object's, except for an earlier start's date."""
        return Tokenization(self.tokenizer, data, self.vocab_size)

    def prompts(self, data: DataConfig) -> Prompts:
        """A new Prompts, with ``data`` as in ``tokenization``."""
        return Prompts(self.tokenizer, data, self.vocab_size)


def check_top_k(config: BuildConfig, inputs: Inputs) -> None:
    if config.store.top_k > inputs.vocab_size:
        raise UserError(
            f"store.top_k is {config.store.top_k}, but {config.teacher.model} can predict {inputs.vocab_size} ids; "
            "choose a smaller top_k"
        )
    if config.chosen_ids > inputs.vocab_size:
        raise UserError(
            f"data.generate.writer_top_k is {config.chosen_ids}, but {config.teacher.model} can predict {inputs.vocab_size} ids; "
            "choose a smaller writer_top_k"
        )
    if config.scale is None:  # the engines of a cluster may have what this machine has not
        check_choice(config.teacher, config.chosen_ids)


def check_before_removing(config: BuildConfig, inputs: Inputs) -> None:
    """Checks the inputs before a restart removes a cache, so that a mistyped name does not cost
    one.

    Raises the UserError that a step after the removal would raise: about the model, its tokenizer,
    the template or the data, up to the first sequence or prompt.
    """
    check_top_k(config, inputs)
    _check_engine(config, inputs.model)
    source = inputs.source
    if config.data.generate is None:
        next(inputs.tokenization(config.data).sequences(source), None)
    else:
        next(inputs.prompts(config.data).prompts(source), None)


def _check_engine(config: BuildConfig, model: ResolvedModel | None) -> None:
    """Raises the errors that an engine raises before it reads the weights."""
    teacher = config.teacher
    if model is None:
        return
    check_context(model, config.data.max_length)
    if teacher.backend == "transformers":
        attention(model, teacher.engine_args.get("attn_implementation"))
    if teacher.backend == "vllm":
        from logitcask.pipeline.teachers.vllm.arguments import check_engine_args
        from logitcask.pipeline.teachers.vllm.engine import check_location

        check_engine_args(teacher)
        check_location(model)
