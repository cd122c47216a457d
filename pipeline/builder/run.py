"""The steps of a build, in order: source -> plan -> teacher -> shards -> manifest.

Each step is on disk before the next one starts, so a build can be killed at any moment and run
again. A finished cache is reused, and so are the caches of the catalogue that hold what the plan asks
for (``logitcask.pipeline.builder.from_catalog``). An unfinished one is resumed at the first shard without a commit
record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitcask.cache_format import CacheWriter, Manifest, UserError
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.manifest import Header
from logitcask.cache_format.runtime.interruption import at_safe_points
from logitcask.cache_format.share.remote_writer import (
    RemoteCacheWriter,
    remove_remote_cache,
)
from logitcask.cache_format.writer import remove_cache
from logitcask.pipeline.audit.at_build_end import audit_build
from logitcask.pipeline.builder.from_catalog import Catalog, Found, Taken, clear
from logitcask.pipeline.builder.inputs import Inputs, check_before_removing
from logitcask.pipeline.builder.known import Known, KnownRowsLostError
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.planner import make_plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.request import as_of_today, dated, request_of
from logitcask.pipeline.builder.reuse import is_finished, reuse
from logitcask.pipeline.builder.score import estimate_prior, score_shard, score_shards
from logitcask.pipeline.builder.splices import (
    earlier_cache,
    request_of_earlier,
    write_known_answers,
)
from logitcask.pipeline.builder.writer_thread import Pair
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import Generations
from logitcask.pipeline.identity import check_teacher
from logitcask.pipeline.teachers.base import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """Result of ``build``: the manifest, whether the cache existed, seconds spent scoring, and
    seconds spent writing answers.

    taken: the caches of the catalogue that it comes from, if any.
    """

    manifest: Manifest
    reused: bool
    seconds: float
    tokens_scored: int
    taken: Taken | None = None
    writing_seconds: float = 0.0


def build(
    config: BuildConfig,
    *,
    restart: bool = False,
    home: Home | None = None,
    reuse_known: bool = True,
) -> BuildResult:
    """Makes the cache that ``config`` describes, or reuses it; ``restart`` removes it first.

    home:        the catalogue, in which the finished cache is registered; None: no catalogue.
    reuse_known: whether caches of the catalogue are used in place of scoring again, also one that
                 another process is building now; and the unchanged answers of the pass before.

    Raises UserError (and its subclasses) for every problem that the user can fix.
    """
    inputs = Inputs(config)
    if restart:
        check_before_removing(config, inputs)
        if config.splice is not None:
            earlier_cache(config, inputs)
        clear(config.output)
        _remove(config.output)
        inputs.reopen_source()
    catalog = Catalog(home, config, inputs) if home is not None and reuse_known else None
    if is_finished(config.output):
        result = _reuse(config, inputs)
    else:
        with nullcontext() if catalog is None else catalog.claim_request():
            # Another process may have finished it since.
            result = (
                _reuse(config, inputs)
                if is_finished(config.output)
                else _from_catalog(config, catalog)
                or _build(config, inputs, catalog, reuse_known=reuse_known)
            )
    if home is not None:
        home.register(config.output, result.manifest)
        for where in () if result.taken is None else result.taken.where:
            home.note_use(where)
    return result


def _reuse(config: BuildConfig, inputs: Inputs) -> BuildResult:
    return BuildResult(reuse(config, inputs), reused=True, seconds=0.0, tokens_scored=0)


def _from_catalog(config: BuildConfig, catalog: Catalog | None) -> BuildResult | None:
    """The cache of an earlier build with the same request; None if there is none."""
    if catalog is None or (config.folder / BUILD_DIR).exists():
        return None  # a build that has begun goes on
    while (found := catalog.same_request()) is not None:
        manifest = catalog.take(found, None)
        if manifest is not None:
            return _taken(found, manifest)
    return None


def _taken(found: Found, manifest: Manifest) -> BuildResult:
    how: Literal["same", "derived"] = "same" if found.options is None else "derived"
    taken = Taken(how, (found.entry.where,), manifest.statistics.sequences)
    return BuildResult(manifest, reused=True, seconds=0.0, tokens_scored=0, taken=taken)


def _build(
    config: BuildConfig, inputs: Inputs, catalog: Catalog | None, *, reuse_known: bool
) -> BuildResult:
    """Plans, looks for the plan's content in the catalogue or in the pass before, and scores what is
    not there.
    """
    clear(config.output)
    while True:
        with (
            ExitStack() as held,
            _open_writer(config) as writer,
            LazyTeacher(config, inputs, writer.build_dir) as engine,
        ):
            config, plan = _plan(writer, config, inputs, engine)
            inputs.forget_text()  # the next steps need only the plan
            found = None
            if config.splice is not None and reuse_known:
                if not writer.committed and Known.load(writer.build_dir) is None:
                    write_known_answers(plan, writer.build_dir, config, inputs)
            elif catalog is None:
                Known.forget(writer.build_dir)
            elif config.data.generate is None:
                held.enter_context(catalog.claim_plan(plan))
                if not writer.committed and Known.load(writer.build_dir) is None:
                    found = catalog.match(plan, writer.build_dir)
            if found is None:
                known = Known.load(writer.build_dir)
                if catalog is not None:
                    held.enter_context(catalog.in_use(known))
                return _scored(writer, plan, config, engine)
        assert catalog is not None
        _remove(config.output)
        manifest = catalog.take(found, plan)
        if manifest is not None:
            return _taken(found, manifest)


def _plan(
    writer: CacheWriter, config: BuildConfig, inputs: Inputs, engine: LazyTeacher
) -> tuple[BuildConfig, Plan]:
    """The plan of this build, of an earlier start or a new one, and the config with its date."""
    plan = Plan.load(writer.build_dir)
    if plan is None:
        written = Generations.request_in(writer.build_dir)
        config = dated(config, written or request_of_earlier(config))
        request = request_of(config)
        # Prompts of a version with fewer fields are compared as they were written.
        same = bool(written) and as_of_today(written, config) == request
        request = written if same else request
        return config, make_plan(writer.build_dir, config, request, inputs, engine)
    config = dated(config, plan.request)
    before, now = as_of_today(plan.request, config), request_of(config)
    if before != now:
        raise UserError(
            f"{config.output} holds an unfinished build with other settings: "
            f"{describe_difference(before, now)}; go back to them, start afresh with --restart, "
            "or choose another output"
        )
    return config, plan


def _scored(
    writer: CacheWriter, plan: Plan, config: BuildConfig, engine: LazyTeacher
) -> BuildResult:
    """Writes every shard, audits the cache and completes it."""
    try:
        header, seconds, scored = _write_shards(writer, plan, config, engine)
    except KnownRowsLostError as error:
        log.warning("the rest is scored, because rows cannot be copied: %s", error)
        engine.close()
        Known.forget(writer.build_dir)
        header, seconds, scored = _write_shards(writer, plan, config, engine)
    known = Known.load(writer.build_dir)
    found = audit_build(config.output, header, writer.entries(), config.audit, config.teacher)
    manifest = writer.finish(header, len(plan.shards), audit=found)
    return BuildResult(
        manifest,
        reused=False,
        seconds=seconds,
        tokens_scored=scored,
        taken=None if known is None else Taken("part", known.where, known.sequences),
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
    known = Known.load(writer.build_dir)
    try:
        if config.scale is None or (known is not None and known.complete):
            return _score_here(writer, plan, config, pending, engine, known)
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
    writer: CacheWriter,
    plan: Plan,
    config: BuildConfig,
    pending: list[int],
    engine: LazyTeacher,
    known: Known | None,
) -> tuple[Header, float, int]:
    """Scores and commits shards with a teacher in this process; known rows are copied."""
    teacher: Teacher | None = None
    if known is not None and known.complete:
        identity = known.teacher
    else:
        teacher = engine.start()
        identity = teacher.identity()
    if config.data.generate is not None and config.writer is None:
        check_teacher(writer.build_dir, identity)
    if known is not None:
        known.check_teacher(identity)
    tokens = sum(plan.shards[index].tokens for index in pending)
    try:
        header = plan.header(identity, config.store_settings(identity.vocab_size))
        with (
            Progress(tokens, len(pending), bar=True, file=config.log_file()) as progress,
            at_safe_points(),
        ):
            progress.started(config.output, header, len(writer.committed))
            begun: dict[int, Iterator[Pair]] = {}
            prior = known.prior() if known is not None and not writer.begun else None
            if not writer.begun and prior is None:
                prior, begun[0] = estimate_prior(
                    score_shard(teacher, writer.build_dir, 0, progress), header.store
                )
            header = writer.begin(header, prior)
            score_shards(teacher, writer, plan, pending, progress=progress, begun=begun)
        return header, progress.seconds, progress.counts.scored_tokens
    finally:
        engine.close()
