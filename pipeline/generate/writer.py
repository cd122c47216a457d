"""The model that writes answers in the teacher's place, such as a student: ``data.generate.writer``.

It runs before the teacher is started, with the engine settings of the teacher unless
``data.generate.writer_engine`` has others.
"""

from __future__ import annotations

import re
from typing import Any

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.cache_format.manifest import TeacherIdentity, WriterIdentity
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.pipeline.config import BuildConfig, StoreConfig, TeacherConfig
from logitcask.pipeline.teachers.vllm.arguments import check_engine_args
from logitcask.pipeline.text.config import GenerateConfig

_SYNTHETIC = re.compile(r"synthetic:(\d+)")


def as_teacher(config: BuildConfig) -> BuildConfig:
    """``config`` with the writer in place of the teacher, and the smallest store: its engine scores
    nothing.

    Raises ConfigError for a name that the teacher's backend cannot run, and for engine arguments
    that would make the stored data wrong.
    """
    name, teacher = config.writer, config.teacher
    assert name is not None
    if teacher.is_synthetic:
        found = _SYNTHETIC.fullmatch(name)
        if found is None:
            raise ConfigError(
                f"data.generate.writer is {name!r}; beside the synthetic teacher it is synthetic:SEED, such as synthetic:1"
            )
        writer = teacher.model_copy(update={"seed": int(found[1])})
    elif teacher.backend in ("vllm", "transformers"):
        writer = teacher.model_copy(update={"model": name, "revision": None, "route": "auto"})
    else:  # a server, or a backend outside this project: neither tells logprobs of its own text
        writer = TeacherConfig(model=name, dtype=teacher.dtype)
    assert config.data.generate is not None
    if (engine := config.data.generate.writer_engine) is not None:
        writer = writer.model_copy(update=engine.model_dump(exclude_none=True))
        if writer.backend == "vllm":
            check_engine_args(writer, "data.generate.writer_engine.engine_args")
    least = StoreConfig(top_k=1, min_k=1, min_probability=None, tail_samples=0)
    # Checked already as a part of ``config``; a copy keeps paths as they are. The writer notes its
    # most probable ids, and scores none.
    generate = config.data.generate.model_copy(update={"writer_top_k": None})
    data = config.data.model_copy(update={"generate": generate})
    return config.model_copy(update={"teacher": writer, "store": least, "data": data})


def check_tokenizer(config: BuildConfig, teachers: Any, writers: Any) -> None:
    """Raises UserError unless the writer's tokenizer is the teacher's, naming a difference."""
    ours, theirs = tokenizer_identity(teachers, None), tokenizer_identity(writers, None)
    if ours["sha256"] == theirs["sha256"]:
        return
    raise UserError(
        f"the tokenizer of the writer {config.writer} is not that of the teacher {config.teacher.model}: "
        f"{_difference(teachers.get_vocab(), writers.get_vocab())}; the teacher scores the ids that the writer samples, so "
        "use a writer with the teacher's tokenizer"
    )


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """The first difference of two vocabularies, by id."""
    if ours == theirs:
        return "the same tokens have the same ids, but texts are split by other rules"
    by_id = [{index: token for token, index in each.items()} for each in (ours, theirs)]
    first = min(
        index
        for index in by_id[0].keys() | by_id[1].keys()
        if by_id[0].get(index) != by_id[1].get(index)
    )
    words = ["no token" if (token := each.get(first)) is None else repr(token) for each in by_id]
    return f"id {first} is {words[0]} for the teacher ({len(ours):,} tokens) and {words[1]} for the writer ({len(theirs):,})"


def identity(model: TeacherIdentity, settings: GenerateConfig) -> WriterIdentity:
    """The writer and its sampling, for the manifest."""
    return WriterIdentity(
        **model.model_dump(
            include={
                *("model", "revision", "weights_sha256", "backend", "engine", "dtype"),
                "vocab_size",
            }
        ),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
