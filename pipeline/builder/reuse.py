"""Reuse of a finished cache in the output's place, if it matches the config."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from logitcask.cache_format import CacheReader, Manifest, UserError
from logitcask.cache_format.cli.models_folder import local_model
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.layout import BUILD_DIR, MANIFEST
from logitcask.cache_format.manifest import DataHash
from logitcask.cache_format.share.remote_writer import (
    holds_cache,
    remove_traces,
)
from logitcask.cache_format.share.signature import check_signed
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.request import as_of_today, dated, request_of
from logitcask.pipeline.builder.splices import earlier_is
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import prompts_sha256
from logitcask.pipeline.identity import TextReader, tokenizer_changes, tokenizer_of
from logitcask.pipeline.teachers.built_in_model import BUILT_IN
from logitcask.pipeline.teachers.weights import weights_sha256

log = logging.getLogger(__name__)


def is_finished(output: Path | str) -> bool:
    return (output / MANIFEST).exists() if isinstance(output, Path) else holds_cache(output)


def reuse(config: BuildConfig, inputs: Inputs) -> Manifest:
    """The existing cache if it matches the config; else UserError naming the difference."""
    reader = CacheReader(config.output)
    manifest = reader.manifest
    if config.trusted_keys:
        check_signed(reader.path, reader.manifest_sha256, config.trusted_keys)
    ways_out = "choose another output, or replace the cache with --restart"
    if manifest.derived_from is not None and not manifest.answers_build:
        raise UserError(
            f"{config.output} holds a cache that `teacher-cache {manifest.derived_from.command}` made; {ways_out}"
        )
    config = dated(config, manifest.config)
    before, now = as_of_today(manifest.config, config), request_of(config)
    if before != now:
        raise UserError(
            f"{config.output} holds a finished cache with other settings: {describe_difference(before, now)}; {ways_out}"
        )
    # From a version that did not record it.
    if "template_date" not in manifest.config.get("data", {}):
        config = dated(config, {"data": {"template_date": manifest.created_at[:10]}})
    # A crash between manifest and clean-up leaves the build's state.
    if isinstance(config.output, Path):
        shutil.rmtree(config.output / BUILD_DIR, ignore_errors=True)
    else:
        remove_traces(config.output)
    _check_tokenizer(manifest, config, inputs, ways_out)
    _check_weights(manifest, config, ways_out)
    if config.splice is not None and earlier_is(manifest, config) == "other":
        raise UserError(
            f"{config.splice.cache}, with whose answers {config.output} goes on, has changed since it was built; {ways_out}"
        )
    try:
        source = inputs.source
    except UserError as error:
        # A cache may outlive its source: it may come from another place, or its data may be
        # unavailable now.
        log.warning("whether the data has changed since cannot be checked: %s", error)
        return manifest
    if source.stamp() != manifest.data.stamp:
        log.info("%s may have changed since the cache was built; comparing", config.data.where)
        if _changed(manifest, config, inputs):
            raise UserError(
                f"{config.data.where} has changed since {config.output} was built; {ways_out}"
            )
    return manifest


def answers_the_same(
    manifest: Manifest, config: BuildConfig, inputs: Inputs, *, same_place: bool
) -> bool:
    """Whether the data, the model that writes answers, and a local teacher's tokenizer are those of
    a cache with the same request. Without written answers, only data with an unchanged stamp counts
    as the same.

    same_place: whether the request's paths name the same files here as where the cache was built.
                If not, files of equal size and time may be others, and their text is compared.

    Raises UserError for data that cannot be read.
    """
    try:
        _check_tokenizer(manifest, config, inputs, "")
    except UserError:
        return False
    if not _same_writer(manifest, config):
        return False
    if config.splice is not None and earlier_is(manifest, config) != "same":
        return False
    if inputs.source.stamp() == manifest.data.stamp:
        return same_place or not _changed(manifest, config, inputs)
    return manifest.data.generation is not None and not _changed(manifest, config, inputs)


def _same_writer(manifest: Manifest, config: BuildConfig) -> bool:
    """Whether the folder of the writer, if there is one, has the model that wrote the answers."""
    if config.writer is None:
        return True
    generation = manifest.data.generation
    if generation is None or generation.writer is None:
        return False
    folder, written = Path(config.writer).expanduser(), generation.writer.weights_sha256
    if folder.is_dir():
        return weights_sha256(folder) == written
    return written is None


def _changed(manifest: Manifest, config: BuildConfig, inputs: Inputs) -> bool:
    """Whether the source now gives other sequences, or, for written answers, other prompts."""
    if manifest.data.generation is not None:
        prompts = inputs.prompts(config.data).prompts(inputs.source)
        return prompts_sha256(prompts) != manifest.data.generation.prompts_sha256
    digest = DataHash()
    for sequence in inputs.tokenization(config.data).sequences(inputs.source):
        digest.update(sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
    return digest.hexdigest() != manifest.data.sha256


def _check_weights(manifest: Manifest, config: BuildConfig, ways_out: str) -> None:
    """Raises UserError if the folder of the teacher or of the writer has another model; other
    models are pinned. A writer's folder may be gone.
    """
    found = [(config.teacher.model, manifest.teacher.weights_sha256)]
    generation = manifest.data.generation
    if config.writer is not None and generation is not None and generation.writer is not None:
        found.append((config.writer, generation.writer.weights_sha256))
    for name, before in found:
        folder = Path(name).expanduser()
        if before and folder.is_dir() and weights_sha256(folder) != before:
            raise UserError(
                f"the model in {folder} has changed since {config.output} was built; {ways_out}"
            )


def _check_tokenizer(
    manifest: Manifest, config: BuildConfig, inputs: Inputs, ways_out: str
) -> None:
    """Raises UserError if the teacher's folder now has another tokenizer or chat template."""
    name = config.teacher.model
    folder = Path(name).expanduser()
    if not folder.is_dir() and name not in BUILT_IN:
        folder = local_model(name) or folder
    if config.teacher.is_synthetic or not folder.is_dir():
        return
    text: TextReader
    text = (
        inputs.tokenization(config.data)
        if config.data.generate is None
        else inputs.prompts(config.data)
    )
    if changes := tokenizer_changes(manifest.tokenizer, tokenizer_of(text, config)):
        raise UserError(
            f"the tokenizer in {folder} has changed since {config.output} was built ({changes}); {ways_out}"
        )
