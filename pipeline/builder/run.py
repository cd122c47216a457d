"""The steps of a build, in order: source -> plan -> teacher -> shards -> manifest.

Each step is on disk before the next one starts, so a build can be killed at any moment and run
again. A finished cache is reused. An unfinished one is resumed at the first shard without a commit
record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcask.cache_format import CacheWriter, Manifest, UserError
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.manifest import Header
from logitcask.cache_format.runtime.interruption import at_safe_points
from logitcask.cache_format.share.remote_writer import (
    RemoteCacheWriter,
    remove_remote_cache,
)
from logitcask.cache_format.writer import remove_cache
from logitcask.pipeline.audit.at_build_end import audit_build
from logitcask.pipeline.builder.inputs import Inputs, check_before_removing
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.planner import make_plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.request import as_of_today, dated, request_of
from logitcask.pipeline.builder.reuse import is_finished, reuse
from logitcask.pipeline.builder.score import estimate_prior, score_shard, score_shards
from logitcask.pipeline.builder.writer_thread import Pair
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import Generations
from logitcask.pipeline.identity import check_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """Result of ``build``: the manifest, whether the cache existed, seconds spent scoring, and
    seconds spent writing answers.
    """

    manifest: Manifest
    reused: bool
    seconds: float
    tokens_scored: int
    writing_seconds: float = 0.0


def build(config: BuildConfig, *, restart: bool = False) -> BuildResult:
    """Makes the cache that ``config`` describes, or reuses it; ``restart`` removes it first.

    Raises UserError (and its subclasses) for every problem that the user can fix.
    """
    inputs = Inputs(config)
    if restart:
        check_before_removing(config, inputs)
        _remove(config.output)
        inputs.reopen_source()
    if is_finished(config.output):
        manifest = reuse(config, inputs)
        return BuildResult(manifest, reused=True, seconds=0.0, tokens_scored=0)

    with (
        _open_writer(config) as writer,
        LazyTeacher(config, inputs, writer.build_dir) as engine,
    ):
        plan = Plan.load(writer.build_dir)
        if plan is None:
            written = Generations.request_in(writer.build_dir)
            config = dated(config, written)
            request = request_of(config)
            # Prompts of a version with fewer fields are compared as they were written.
            same = bool(written) and as_of_today(written, config) == request
            plan = make_plan(writer.build_dir, config, written if same else request, inputs, engine)
        else:
            config = dated(config, plan.request)
            before, now = as_of_today(plan.request, config), request_of(config)
            if before != now:
                raise UserError(
                    f"{config.output} holds an unfinished build with other settings: "
                    f"{describe_difference(before, now)}; go back to them, start afresh with --restart, "
                    "or choose another output"
                )
        inputs.forget_text()  # the next steps need only the plan
        header, seconds, scored = _write_shards(writer, plan, config, engine)
        found = audit_build(config.output, header, writer.entries(), config.audit, config.teacher)
        manifest = writer.finish(header, len(plan.shards), audit=found)
    return BuildResult(
        manifest,
        reused=False,
        seconds=seconds,
        tokens_scored=scored,
        writing_seconds=engine.writing_seconds,
    )


def _open_writer(config: BuildConfig) -> CacheWriter:
    level = config.store.compression_level
    if isinstance(config.output, Path):
        return CacheWriter(config.output, compression_level=level)
    return RemoteCacheWriter(config.output, compression_level=level)


def _remove(output: Path | str) -> None:
    if isinstance(output, Path):
        remove_cache(output)
    else:
        remove_remote_cache(output)


def _write_shards(
    writer: CacheWriter, plan: Plan, config: BuildConfig, engine: LazyTeacher
) -> tuple[Header, float, int]:
    """Scores and commits every shard that is not committed yet."""
    pending = [index for index in range(len(plan.shards)) if index not in writer.committed]
    if not pending:
        return writer.header(), 0.0, 0
    if writer.committed:
        log.info(
            "%s: %d of %d shards are done already",
            config.output,
            len(writer.committed),
            len(plan.shards),
        )
    try:
        if config.scale is None:
            return _score_here(writer, plan, config, pending, engine)
        from logitcask.pipeline.builder.ray_driver import score_shards_on_ray

        engine.close()  # the workers have their own engines
        log.info("starting the teachers: %s with %s", config.teacher.model, config.teacher.backend)
        return score_shards_on_ray(writer, plan, config, config.scale, pending)
    except KeyboardInterrupt:
        for index in pending:
            writer.adopt(index)  # workers may have committed more than they have reported
        log.info(
            "%s: %d of %d shards are done and kept",
            config.output,
            len(writer.committed),
            len(plan.shards),
        )
        raise


def _score_here(
    writer: CacheWriter, plan: Plan, config: BuildConfig, pending: list[int], engine: LazyTeacher
) -> tuple[Header, float, int]:
    """Scores and commits shards with a teacher in this process."""
    teacher = engine.start()
    if config.data.generate is not None and config.writer is None:
        check_teacher(writer.build_dir, teacher.identity())
    tokens = sum(plan.shards[index].tokens for index in pending)
    try:
        header = plan.header(teacher.identity(), config.store_settings(teacher.vocab_size))
        with (
            Progress(tokens, len(pending), bar=True, file=config.log_file()) as progress,
            at_safe_points(),
        ):
            progress.started(config.output, header, len(writer.committed))
            begun: dict[int, Iterator[Pair]] = {}
            prior = None
            if not writer.begun:
                prior, begun[0] = estimate_prior(
                    score_shard(teacher, writer.build_dir, 0, progress), header.store
                )
            header = writer.begin(header, prior)
            score_shards(teacher, writer, plan, pending, progress=progress, begun=begun)
        return header, progress.seconds, progress.counts.scored_tokens
    finally:
        engine.close()
