"""The inputs of a build: data, tokenizer, vocabulary and model, each opened when first needed, and once."""

from __future__ import annotations

from logitcask.cache_format import UserError
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.model import attention, check_context, resolve_model
from logitcask.pipeline.teachers.open import open_tokenizer, vocab_size_of
from logitcask.pipeline.text.sources import open_source
from logitcask.pipeline.text.tokenize import Tokenization


def tokenization(config: BuildConfig) -> Tokenization:
    return Tokenization(open_tokenizer(config.teacher), config.data, vocab_size_of(config.teacher))


def prompts_from(config: BuildConfig) -> Prompts:
    return Prompts(open_tokenizer(config.teacher), config.data, vocab_size_of(config.teacher))


def check_top_k(config: BuildConfig) -> None:
    vocab_size = vocab_size_of(config.teacher)
    if config.store.top_k > vocab_size:
        raise UserError(
            f"store.top_k is {config.store.top_k}, but {config.teacher.model} can predict {vocab_size} ids; "
            "choose a smaller top_k"
        )


def check_before_removing(config: BuildConfig) -> None:
    """Finds the mistakes that would make a restart fail at once: a cache is worth more than a mistyped name.

    Raises UserError, as what comes after the removal would: of the model, its tokenizer, the template and the data, up to
    the first sequence or prompt that comes of it.
    """
    check_top_k(config)
    _check_engine(config)
    source = open_source(config.data)
    if config.data.generate is None:
        next(tokenization(config).sequences(source), None)
    else:
        next(prompts_from(config).prompts(source), None)


def _check_engine(config: BuildConfig) -> None:
    """What an engine refuses before it reads the weights."""
    teacher = config.teacher
    if teacher.is_synthetic:
        return
    model = resolve_model(teacher.model, teacher.revision, trust_remote_code=teacher.trust_remote_code)
    check_context(model, config.data.max_length)
    if teacher.backend == "transformers":
        attention(model, teacher.engine_args.get("attn_implementation"))
    if teacher.backend == "vllm":
        from logitcask.pipeline.teachers.vllm.arguments import check_engine_args
        from logitcask.pipeline.teachers.vllm.engine import check_location

        check_engine_args(teacher)
        check_location(model)
