"""``teacher-cache build``: source -> plan -> teacher -> shards -> manifest.

Every stop on the way is written down before the next one starts, so the command can be killed anywhere and run again: a
finished cache is reused, an unfinished one goes on at the first shard without a commit record.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from logitcask.cache_format import CacheReader, CacheWriter, Manifest, UserError
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import writing_to
from logitcask.cache_format.layout import BUILD_DIR, MANIFEST
from logitcask.cache_format.manifest import DataHash, DataIdentity, Header
from logitcask.cache_format.share.remote_writer import (
    RemoteCacheWriter,
    holds_cache,
    remove_remote_cache,
    remove_traces,
)
from logitcask.cache_format.writer import remove_cache
from logitcask.pipeline.audit.at_build_end import audit_build
from logitcask.pipeline.builder.plan import Plan, write_sequences
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.score import estimate_prior, score_shard, score_shards
from logitcask.pipeline.builder.writer_thread import Pair
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import Generations, prompts_sha256
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.identity import check_teacher, check_unchanged, tokenizer_changes, tokenizer_of
from logitcask.pipeline.interruption import at_safe_points
from logitcask.pipeline.teachers.base import Sampling, Teacher
from logitcask.pipeline.teachers.model import attention, check_context, resolve_model
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, sampling_of, vocab_size_of
from logitcask.pipeline.teachers.weights import weights_sha256
from logitcask.pipeline.text.sources import Source, open_source
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence

log = logging.getLogger(__name__)

_NOT_CONTENT: dict[str, Any] = {
    "output": True,
    "log": True,
    "audit": True,
    "scale": True,
    "teacher": {"route", "batch_tokens", "tensor_parallel_size", "server"},
    "store": {"shard_tokens", "compression_level"},
}


@dataclass(frozen=True)
class BuildResult:
    """What ``build`` did: the manifest, whether the cache was there already, and seconds spent scoring."""

    manifest: Manifest
    reused: bool
    seconds: float
    tokens_scored: int


def build(config: BuildConfig, *, restart: bool = False) -> BuildResult:
    """Makes the cache that ``config`` describes, or finds it made. ``restart`` removes what is there first.

    Raises UserError (and its kinds) for anything the user can mend: see each stop.
    """
    if restart:
        _check_before_removing(config)
        _remove(config.output)
    if _is_finished(config.output):
        manifest = _reuse(config)
        return BuildResult(manifest, reused=True, seconds=0.0, tokens_scored=0)

    with (
        _open_writer(config) as writer,
        _Engine(config, writer.build_dir) as engine,
    ):
        plan = Plan.load(writer.build_dir)
        if plan is None:
            written = Generations.request_in(writer.build_dir)
            config = _dated(config, written)
            request = _request(config)
            # Prompts of a version that knew fewer fields are compared as they were written.
            same = bool(written) and _as_of_today(written, config) == request
            plan = _make_plan(writer.build_dir, config, written if same else request, engine)
        else:
            config = _dated(config, plan.request)
            before, now = _as_of_today(plan.request, config), _request(config)
            if before != now:
                raise UserError(
                    f"{config.output} holds an unfinished build with other settings: "
                    f"{describe_difference(before, now)}; go back to them, start afresh with --restart, "
                    "or choose another output"
                )
        header, seconds, scored = _write_shards(writer, plan, config, engine)
        found = audit_build(config.output, header, writer.entries(), config.audit, config.teacher)
        manifest = writer.finish(header, len(plan.shards), audit=found)
    return BuildResult(manifest, reused=False, seconds=seconds, tokens_scored=scored)


class _Engine:
    """The teacher, started when something first needs it, and once: what it wrote it also scores."""

    def __init__(self, config: BuildConfig, build_dir: Path) -> None:
        self._config, self._build_dir = config, build_dir
        self._teacher: Teacher | None = None

    def start(self, sampling: Sampling | None = None) -> Teacher:
        """The teacher, able to write by ``sampling`` if it is started here with one."""
        if self._teacher is None:
            config = self._config
            log.info("starting the teacher: %s with %s", config.teacher.model, config.teacher.backend)
            self._teacher = open_teacher(
                config.teacher,
                max_length=config.data.max_length,
                capture=config.store.capture(),
                sampling=sampling,
                state=self._build_dir,
            )
        return self._teacher

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the teacher, for those that come after it."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None


def _open_writer(config: BuildConfig) -> CacheWriter:
    level = config.store.compression_level
    if isinstance(config.output, Path):
        return CacheWriter(config.output, compression_level=level)
    return RemoteCacheWriter(config.output, compression_level=level)


def _is_finished(output: Path | str) -> bool:
    return (output / MANIFEST).exists() if isinstance(output, Path) else holds_cache(output)


def _remove(output: Path | str) -> None:
    if isinstance(output, Path):
        remove_cache(output)
    else:
        remove_remote_cache(output)


def _request(config: BuildConfig) -> dict[str, Any]:
    """Everything in a config that decides what the cache holds, a template file by its content."""
    request = config.model_dump(mode="json", exclude=_NOT_CONTENT)
    template = config.data.chat_template
    if template is not None and template.is_file():
        request["data"]["chat_template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    return request


def _dated(config: BuildConfig, written: dict[str, Any]) -> BuildConfig:
    """With the date for the chat template that is written down in an earlier request, unless the config has its own."""
    day = written.get("data", {}).get("template_date")
    if day is None or config.data.template_date is not None:
        return config
    data = config.data.model_copy(update={"template_date": date.fromisoformat(day)})
    return config.model_copy(update={"data": data})


def _reuse(config: BuildConfig) -> Manifest:
    """The finished cache in the way, if it is the one asked for; UserError naming what differs if it is not."""
    manifest = CacheReader(config.output).manifest
    ways_out = "choose another output, or replace the cache with --restart"
    if manifest.derived_from is not None:
        raise UserError(
            f"{config.output} holds a cache that `teacher-cache {manifest.derived_from.command}` made; {ways_out}"
        )
    config = _dated(config, manifest.config)
    before, now = _as_of_today(manifest.config, config), _request(config)
    if before != now:
        raise UserError(
            f"{config.output} holds a finished cache with other settings: {describe_difference(before, now)}; {ways_out}"
        )
    if "template_date" not in manifest.config.get("data", {}):  # of a version that did not write it down
        config = _dated(config, {"data": {"template_date": manifest.created_at[:10]}})
    # A crash between manifest and clean-up leaves the build's state.
    if isinstance(config.output, Path):
        shutil.rmtree(config.output / BUILD_DIR, ignore_errors=True)
    else:
        remove_traces(config.output)
    _check_tokenizer(manifest, config, ways_out)
    _check_weights(manifest, config, ways_out)
    try:
        source = open_source(config.data)
    except UserError as error:
        # A cache outlives its source: it may have come from elsewhere, or its data may be out of reach for now.
        log.warning("whether the data has changed since cannot be checked: %s", error)
        return manifest
    if source.stamp() != manifest.data.stamp:
        log.info("%s may have changed since the cache was built; comparing", config.data.path)
        if _changed(manifest, config, source):
            raise UserError(f"{config.data.path} has changed since {config.output} was built; {ways_out}")
    return manifest


def _changed(manifest: Manifest, config: BuildConfig, source: Source) -> bool:
    """Whether the source now gives other sequences; other prompts, where the teacher wrote what came of them."""
    if manifest.data.generation is not None:
        return prompts_sha256(_prompts(config).prompts(source)) != manifest.data.generation.prompts_sha256
    digest = DataHash()
    for sequence in _tokenization(config).sequences(source):
        digest.update(sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
    return digest.hexdigest() != manifest.data.sha256


def _as_of_today(request: dict[str, Any], config: BuildConfig) -> dict[str, Any]:
    """An earlier request with the defaults of fields that this version has added, or as it is if it no longer parses."""
    try:
        # Which server scored is not part of a request.
        teacher = {**request["teacher"], "server": config.teacher.server}
        return _request(BuildConfig.model_validate({**request, "teacher": teacher, "output": config.output}))
    except ValueError:
        return request


def _check_weights(manifest: Manifest, config: BuildConfig, ways_out: str) -> None:
    """Raises UserError where the teacher's folder now holds another model. Built-in and hub models are pinned anyway."""
    folder = Path(config.teacher.model).expanduser()
    if (
        manifest.teacher.weights_sha256
        and folder.is_dir()
        and weights_sha256(folder) != manifest.teacher.weights_sha256
    ):
        raise UserError(f"the model in {folder} has changed since {config.output} was built; {ways_out}")


def _check_tokenizer(manifest: Manifest, config: BuildConfig, ways_out: str) -> None:
    """Raises UserError where the teacher's folder now holds another tokenizer or chat template, as ``_check_weights``."""
    folder = Path(config.teacher.model).expanduser()
    if config.teacher.is_synthetic or not folder.is_dir():
        return
    text = _tokenization(config) if config.data.generate is None else _prompts(config)
    if changes := tokenizer_changes(manifest.tokenizer, tokenizer_of(text, config)):
        raise UserError(
            f"the tokenizer in {folder} has changed since {config.output} was built ({changes}); {ways_out}"
        )


def _tokenization(config: BuildConfig) -> Tokenization:
    return Tokenization(open_tokenizer(config.teacher), config.data, vocab_size_of(config.teacher))


def _prompts(config: BuildConfig) -> Prompts:
    return Prompts(open_tokenizer(config.teacher), config.data, vocab_size_of(config.teacher))


def _check_top_k(config: BuildConfig) -> None:
    vocab_size = vocab_size_of(config.teacher)
    if config.store.top_k > vocab_size:
        raise UserError(
            f"store.top_k is {config.store.top_k}, but {config.teacher.model} can predict {vocab_size} ids; "
            "choose a smaller top_k"
        )


def _check_before_removing(config: BuildConfig) -> None:
    """Finds the mistakes that would make a restart fail at once: a cache is worth more than a mistyped name.

    Raises UserError, as what comes after the removal would: of the model, its tokenizer, the template and the data, up to
    the first sequence or prompt that comes of it.
    """
    _check_top_k(config)
    _check_engine(config)
    source = open_source(config.data)
    if config.data.generate is None:
        next(_tokenization(config).sequences(source), None)
    else:
        next(_prompts(config).prompts(source), None)


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


def _make_plan(build_dir: Path, config: BuildConfig, request: dict[str, Any], engine: _Engine) -> Plan:
    _check_top_k(config)
    source: Source = open_source(config.data)
    stamp = source.stamp()
    text: Tokenization | Generations
    if config.data.generate is None:
        text = _tokenization(config)
        request = _with_date(request, text)
    else:
        prompts = _prompts(config)
        request = _with_date(request, prompts)
        sampling = sampling_of(config.teacher, config.data.generate, prompts.tokenizer, prompts.template)
        text = Generations(prompts, config, sampling, build_dir, request)
        text.complete(source, engine.start)
    with tqdm(unit="tok", unit_scale=True, desc="tokenise", leave=False, total=config.data.max_tokens) as bar:

        def counted() -> Iterator[Sequence]:
            for sequence in text.sequences(source):
                bar.update(len(sequence.input_ids))
                yield sequence

        with writing_to(config.folder):
            shards, digest = write_sequences(build_dir, counted(), config.store.shard_tokens)
    if not isinstance(text, Generations):  # those have read it before, perhaps days ago
        check_unchanged(source, stamp, config)
    if not shards:
        raise UserError(f"{config.data.path} gives no sequence to score; check its fields and max_tokens")
    if not any(shard.positions for shard in shards):
        raise UserError(
            f"{config.data.path} gives no token to learn: every sequence is of one token, which nothing predicts; "
            f"raise data.max_length ({config.data.max_length})"
        )
    plan = Plan(
        request=request,
        tokenizer=tokenizer_of(text, config),
        data=DataIdentity.model_validate(
            {
                "source": config.data.path,
                "split": config.data.split,
                "kind": config.data.kind,
                "mask_policy": config.data.mask_policy,
                "max_length": config.data.max_length,
                "overlong": config.data.overlong,
                "sha256": digest,
                "counters": {**source.counters, **text.counters},
                "stamp": text.stamp if isinstance(text, Generations) else stamp,
                "generation": text.identity() if isinstance(text, Generations) else None,
            }
        ),
        shards=shards,
    )
    with writing_to(config.folder):
        plan.save(build_dir)
    return plan


def _with_date(request: dict[str, Any], text: Tokenization | Prompts) -> dict[str, Any]:
    """The request with the day that the chat template writes, if it writes one: what is resumed or compared later has it."""
    if text.template is None or text.template.date is None:
        if request["data"].get("template_date") is not None:
            log.warning("data.template_date changes nothing: the chat template writes no date of today")
        return request
    day = text.template.date.isoformat()
    log.info("the chat template writes today's date: it is %s for all of this cache (data.template_date)", day)
    return {**request, "data": {**request["data"], "template_date": day}}


def _write_shards(writer: CacheWriter, plan: Plan, config: BuildConfig, engine: _Engine) -> tuple[Header, float, int]:
    """Scores and commits every shard that is not committed yet."""
    pending = [index for index in range(len(plan.shards)) if index not in writer.committed]
    if not pending:
        return writer.header(), 0.0, 0
    if writer.committed:
        log.info("%s: %d of %d shards are done already", config.output, len(writer.committed), len(plan.shards))
    try:
        if config.scale is None:
            return _score_here(writer, plan, config, pending, engine)
        from logitcask.pipeline.builder.ray_driver import score_shards_on_ray

        engine.close()  # the workers have engines of their own
        log.info("starting the teachers: %s with %s", config.teacher.model, config.teacher.backend)
        return score_shards_on_ray(writer, plan, config, config.scale, pending)
    except KeyboardInterrupt:
        for index in pending:
            writer.adopt(index)  # workers may have committed more than they have told
        log.info("%s: %d of %d shards are done and kept", config.output, len(writer.committed), len(plan.shards))
        raise


def _score_here(
    writer: CacheWriter, plan: Plan, config: BuildConfig, pending: list[int], engine: _Engine
) -> tuple[Header, float, int]:
    """Scores and commits shards with a teacher in this process."""
    teacher = engine.start()
    if config.data.generate is not None:
        check_teacher(writer.build_dir, teacher.identity())
    tokens = sum(plan.shards[index].tokens for index in pending)
    try:
        header = plan.header(teacher.identity(), config.store.settings(teacher.vocab_size))
        with Progress(tokens, len(pending), bar=True, file=config.log_file()) as progress, at_safe_points():
            progress.started(config.output, header, len(writer.committed))
            begun: dict[int, Iterator[Pair]] = {}
            prior = None
            if not writer.begun:
                prior, begun[0] = estimate_prior(score_shard(teacher, writer.build_dir, 0, progress), header.store)
            header = writer.begin(header, prior)
            score_shards(teacher, writer, plan, pending, progress=progress, begun=begun)
        return header, progress.seconds, progress.counts.scored_tokens
    finally:
        engine.close()
