"""The planner: rows become sequences, sequences become the shards of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.durable import writing_to
from logitcask.cache_format.manifest import DataIdentity, GenerationIdentity
from logitcask.cache_format.redact import redacted
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.pipeline.builder.inputs import Inputs, check_top_k
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import Plan, PlannedShard, write_sequences
from logitcask.pipeline.builder.request import request_of, with_date
from logitcask.pipeline.builder.splices import check_writer, earlier_cache
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate import writer as other_writer
from logitcask.pipeline.generate.answers import Generations
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.identity import TextReader, check_unchanged, tokenizer_of
from logitcask.pipeline.teachers.base import Sampling, Teacher
from logitcask.pipeline.teachers.open import sampling_of
from logitcask.pipeline.text.rejects import Rejects
from logitcask.pipeline.text.sources import Row, RowSource
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence


class PlannedText(TextReader, Protocol):
    """The sequences of a plan: text of the data, or answers that the teacher has written.

    ``counters`` describes the latest ``sequences()``; ``stamp`` is that of the source before its
    first row was read.
    """

    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def stamp(self) -> str: ...

    def sequences(self, rows: Iterable[Row]) -> Iterator[Sequence]: ...

    def check_source(self) -> None:
        """Raises UserError if the data changed while ``sequences`` read it."""

    def identity(self) -> GenerationIdentity | None:
        """The manifest's identity of the answers; None for text of the data."""


class _GivenText:
    """Text of the data as a ``PlannedText``."""

    def __init__(
        self, text: Tokenization, source: RowSource, stamp: str, config: BuildConfig
    ) -> None:
        self.tokenizer = text.tokenizer
        self.template = text.template
        self.stamp = stamp
        self._text, self._source, self._config = text, source, config

    def sequences(self, rows: Iterable[Row]) -> Iterator[Sequence]:
        with Rejects(self._config.rejects_file()) as rejects:
            self._text.report = self._source.report = rejects.add
            yield from self._text.sequences(rows)

    @property
    def counters(self) -> dict[str, int]:
        return self._text.counters

    def check_source(self) -> None:
        check_unchanged(self._source, self.stamp, self._config)

    def identity(self) -> None:
        return None


def _written(
    prompts: Prompts,
    source: RowSource,
    build_dir: Path,
    config: BuildConfig,
    as_teacher: BuildConfig,
    request: dict[str, Any],
    inputs: Inputs,
    engine: LazyTeacher,
    earlier: Callable[[], CacheReader] | None = None,
) -> Generations:
    """The answers to ``prompts``, all on disk. ``as_teacher``, ``inputs`` and ``engine`` are those
    of the model that writes them. ``earlier`` opens the cache in which it has begun them.
    """
    assert config.data.generate is not None
    sampling = sampling_of(
        as_teacher.teacher,
        config.data.generate,
        prompts.tokenizer,
        prompts.template,
        inputs.model,
    )
    answers = Generations(prompts, config, sampling, build_dir, request, earlier)

    def start(sampling: Sampling) -> Teacher:
        writer = engine.start(sampling)
        if earlier is not None:
            check_writer(earlier(), writer.identity())
        return writer

    answers.complete(source, start)
    return answers


def make_plan(
    build_dir: Path,
    config: BuildConfig,
    request: dict[str, Any],
    inputs: Inputs,
    engine: LazyTeacher,
) -> Plan:
    """Writes the plan of a new build, which ``request`` describes. ``engine`` writes answers first
    if the config asks for them.

    Raises UserError for data, a tokenizer or a model that gives no plan, and if the data changes
    while it is read.
    """
    check_top_k(config, inputs)
    source = inputs.source
    stamp = source.stamp()
    text: PlannedText
    if config.data.generate is None:
        text = _GivenText(inputs.tokenization(config.data), source, stamp, config)
        request = with_date(request, text)
    else:
        prompts = inputs.prompts(config.data)
        request = with_date(request, prompts)
        if config.writer is None:
            text = _written(prompts, source, build_dir, config, config, request, inputs, engine)
        else:
            as_teacher = other_writer.as_teacher(config)
            writers = Inputs(as_teacher)
            other_writer.check_tokenizer(config, inputs.tokenizer, writers.tokenizer)
            earlier = partial(earlier_cache, config, inputs) if config.splice is not None else None
            with LazyTeacher(as_teacher, writers, build_dir, who="writer") as writer:
                text = _written(
                    prompts,
                    source,
                    build_dir,
                    config,
                    as_teacher,
                    request,
                    writers,
                    writer,
                    earlier,
                )
    if isinstance(text, Generations):
        engine.writing_seconds = text.seconds
    with ProgressBar(
        unit="tok", unit_scale=True, desc="tokenise", leave=False, total=config.data.max_tokens
    ) as bar:

        def counted() -> Iterator[Sequence]:
            for sequence in text.sequences(source):
                bar.update(len(sequence.input_ids))
                yield sequence

        with writing_to(config.folder):
            shards, digest = write_sequences(build_dir, counted(), config.store.shard_tokens)
    text.check_source()
    counters = {**source.counters, **text.counters}
    plan = _plan(config, request, text, shards, digest, counters, text.stamp, text.identity())
    with writing_to(config.folder):
        plan.save(build_dir)
    return plan


def plan_only(folder: Path, config: BuildConfig, inputs: Inputs) -> Plan:
    """The plan of a build of given text that is not started. Its sequences are in ``folder``.

    Raises UserError as ``make_plan`` does.
    """
    text = inputs.tokenization(config.data)
    stamp = inputs.source.stamp()
    with writing_to(folder):
        shards, digest = write_sequences(
            folder, text.sequences(inputs.source), config.store.shard_tokens
        )
    counters = {**inputs.source.counters, **text.counters}
    return _plan(config, request_of(config), text, shards, digest, counters, stamp, None)


def _plan(
    config: BuildConfig,
    request: dict[str, Any],
    text: TextReader,
    shards: tuple[PlannedShard, ...],
    digest: str,
    counters: dict[str, int],
    stamp: str,
    generation: GenerationIdentity | None,
) -> Plan:
    """The plan of these shards. Raises UserError if there is nothing to score or to learn."""
    if not shards:
        raise UserError(
            f"{config.data.where} gives no sequence to score; check its fields and max_tokens"
        )
    if not any(shard.positions for shard in shards):
        raise UserError(
            f"{config.data.where} gives no token to learn: every sequence is of one token, which nothing predicts; "
            f"raise data.max_length ({config.data.max_length})"
        )
    return Plan(
        request=request,
        tokenizer=tokenizer_of(text, config),
        data=DataIdentity.model_validate(
            {
                "source": redacted(config.data.where),
                "split": config.data.splits,
                "kind": config.data.kind,
                "mask_policy": config.data.mask_policy,
                "max_length": config.data.max_length,
                "overlong": config.data.overlong,
                "sha256": digest,
                "counters": counters,
                "stamp": stamp,
                "generation": generation,
            }
        ),
        shards=shards,
    )
