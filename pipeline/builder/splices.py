"""The cache of the pass before, with whose answers a build goes on (``data.generate.splice``): its
checks, and its rows, which are copied where an answer has not changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from logitcask.cache_format import CacheReader, Manifest, UserError
from logitcask.cache_format.errors import DamagedCacheError, LogitcaskError, one_line
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.cache_format.share.signature import check_signed
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.overlap import Rows, Stored, stored_rows, write_known
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.same_teacher import same_teacher
from logitcask.pipeline.config import BuildConfig

log = logging.getLogger(__name__)

_FIELD = "data.generate.splice.cache"


def earlier_cache(config: BuildConfig, inputs: Inputs) -> CacheReader:
    """The cache that ``config`` names. Raises UserError unless it holds answers of a writer to which
    the config's teacher has given ranks, and heads to draw from.

    inputs: of the teacher.
    """
    reader = open_earlier(config)
    manifest, where = reader.manifest, reader.path
    generation, store = manifest.data.generation, manifest.store

    def require(holds: bool, found: str) -> None:
        if not holds:
            raise UserError(
                f"{where} {found}; name in {_FIELD} a cache that this teacher has scored, with answers of this writer"
            )

    require(
        generation is not None and generation.writer is not None,
        "has no answers of another model than the teacher",
    )
    require(manifest.derived_from is None, "was made of other caches, which hold rounded numbers")
    require(same_teacher(config, inputs, manifest), "was scored by another teacher")
    shortest = store.min_k if store.ragged else store.top_k
    require(
        min(shortest, store.top_k) >= 1,
        f"may have positions without a head (its store has top_k {store.top_k} and min_k {store.min_k}), so no token of the "
        "teacher can be drawn there",
    )
    assert config.splice is not None
    warn_of_ties(reader, config.splice.top_k)
    return reader


def warn_of_ties(reader: CacheReader, top_k: int) -> None:
    """Warns if ids that tie with a token may count as more probable than it at the last accepted
    rank: vLLM's ranks below the ids that it was asked for (``logitcask.pipeline.teachers.rows``).
    """
    manifest = reader.manifest
    if manifest.teacher.backend in ("vllm", "server") and manifest.store.capture_k < top_k:
        log.warning(
            "%s: the engine was asked for %d ids, and %d are accepted; below the first %d a token that ties with others may be "
            "rejected (store.top_k=%d)",
            reader.path,
            manifest.store.capture_k,
            top_k,
            manifest.store.capture_k,
            top_k,
        )


def open_earlier(config: BuildConfig) -> CacheReader:
    """The cache that ``config`` names. Raises UserError if it is not there, or is not signed by one
    of the config's trusted keys, and DamagedCacheError.
    """
    assert config.splice is not None
    try:
        reader = CacheReader(config.splice.cache)
    except DamagedCacheError:
        raise
    except (LogitcaskError, OSError) as error:
        raise UserError(
            f"{_FIELD} is {config.splice.cache}, which cannot be read: {one_line(error)}; build it first, or put it back"
        ) from error
    if config.trusted_keys:
        check_signed(reader.path, reader.manifest_sha256, config.trusted_keys)
    return reader


def request_of_earlier(config: BuildConfig) -> dict[str, Any]:
    """The request of the pass before, whose date the prompts have; empty if there is none."""
    return {} if config.splice is None else open_earlier(config).manifest.config


def check_writer(earlier: CacheReader, writer: TeacherIdentity) -> None:
    """Raises UserError if another model has begun the answers than the one that would go on."""
    generation = earlier.manifest.data.generation
    assert generation is not None
    assert generation.writer is not None
    before = generation.writer
    named = ("weights_sha256",) if before.weights_sha256 is not None else ("model", "revision")
    if any(getattr(before, name) != getattr(writer, name) for name in named):
        raise UserError(
            f"the answers in {earlier.path} are of {before.model}, and {writer.model} has other weights; an answer is written by one "
            f"model: name the same writer, or another cache in {_FIELD}"
        )


def earlier_is(manifest: Manifest, config: BuildConfig) -> Literal["same", "other", "gone"]:
    """What is now in the place of the cache with whose answers ``manifest`` goes on."""
    assert config.splice is not None
    try:
        found = CacheReader(config.splice.cache).manifest
    except (LogitcaskError, OSError):
        return "gone"
    generation = manifest.data.generation
    splice = None if generation is None else generation.splice
    same = splice is not None and (splice.fingerprint, splice.content_sha256) == (
        found.fingerprint,
        found.content_sha256,
    )
    return "same" if same else "other"


def write_known_answers(plan: Plan, build_dir: Path, config: BuildConfig, inputs: Inputs) -> None:
    """Writes which rows of a plan are those of the pass before: the answers without a rejected
    token. None if that cache is gone, or its store keeps other numbers.
    """
    try:
        earlier = open_earlier(config)
    except UserError as error:
        log.warning("all answers are scored: %s", one_line(error))
        return
    generation, manifest = plan.data.generation, earlier.manifest
    assert generation is not None
    assert generation.splice is not None
    # The teacher's tokens have nothing of the writer. Everything else is compared.
    stored = manifest.store.model_copy(update={"writer_logprobs": False, "chosen_ids": 0})
    as_planned = (generation.splice.fingerprint, generation.splice.content_sha256) == (
        manifest.fingerprint,
        manifest.content_sha256,
    )
    if not as_planned or stored != config.store_settings(inputs.vocab_size):
        log.info("all answers are scored: %s has changed, or has another store", earlier.path)
        return
    rows = Stored(earlier, Rows.joined(stored_rows(earlier)))
    write_known(plan, build_dir, Rows.of_plan(plan, build_dir), [rows])
