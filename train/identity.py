"""The identity of a run, and whether the run of a config is finished.

Imports neither transformers nor accelerate, so that a finished run is recognised in the time that
torch takes to be imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from logitcask.cache_format import CacheReader
from logitcask.cache_format.redact import without_secrets
from logitcask.cache_format.share.signature import check_signed
from logitcask.train.config import TrainConfig
from logitcask.train.losses.others import code_of
from logitcask.train.output.metrics_file import RunMetrics
from logitcask.train.output.run_folder import begun, exclusive, refuse_other_files


def finished(config: TrainConfig) -> RunMetrics | None:
    """Content of metrics.json if the run of ``config`` is finished, else None. Always None in a
    process of a launcher, where all have to find the same.

    Raises UserError if the folder holds another run or files of others, or if a cache cannot be
    read.
    """
    output = config.output_dir
    if "RANK" in os.environ or not (output / "metrics.json").exists():
        return None
    with exclusive(output):
        caches, reference = open_caches(config)
        return found(output, identity(config, caches, reference))[1]


def open_caches(config: TrainConfig) -> tuple[list[CacheReader], CacheReader | None]:
    """The caches to learn from, and the reference cache, if there is one."""
    judge = config.evaluation.cache
    caches = [CacheReader(entry.cache) for entry in config.caches]
    reference = None if judge is None else CacheReader(judge)
    if config.trusted_keys:
        for cache in caches if reference is None else [*caches, reference]:
            check_signed(cache.path, cache.manifest_sha256, config.trusted_keys)
    return caches, reference


def found(
    output: Path, run: dict[str, Any], *, restart: bool = False
) -> tuple[dict[str, Any] | None, RunMetrics | None]:
    """(measurements before the first step, content of metrics.json) of this run, or None."""
    refuse_other_files(output)
    before = None if restart else begun(output, run)
    if before is None or not (output / "metrics.json").exists():
        return before, None
    return before, json.loads((output / "metrics.json").read_text())


def identity(
    config: TrainConfig, caches: list[CacheReader], reference: CacheReader | None
) -> dict[str, Any]:
    """The identity of a run, as ``run.json`` has it."""
    run = {"config": identity_of_config(config), "cache": _identity_of_caches(config, caches)}
    if reference is not None:
        run["reference"] = reference.manifest.fingerprint
    return cast("dict[str, Any]", without_secrets(run))


def identity_of_config(config: TrainConfig) -> dict[str, Any]:
    """The identity of a run, without the places of the caches and the output. A loss outside this
    package is identified by its code, too.
    """
    apart: Any = {
        "cache": True,
        "cache_config": True,
        "trusted_keys": True,
        "evaluation": {"cache"},
    }
    if config.part is not None:
        apart |= {"part": {"start"}}
    identity = config.model_dump(mode="json", exclude=apart)
    if config.part is None:
        del identity["part"]  # as before there were parts
    for term in identity["losses"]:
        if term["caches"] is None:
            del term["caches"]  # as before losses had them
    # The settings of the workers do not change the batches.
    identity["training"] = {
        key: value
        for key, value in config.training.items()
        if key != "output_dir"
        and (key == "dataloader_drop_last" or not key.startswith("dataloader_"))
    }
    code = {term.name: code_of(term.name) for term in config.losses}
    code = {name: sha256 for name, sha256 in code.items() if sha256 is not None}
    return {**identity, "code_sha256": code} if code else identity


def _identity_of_caches(config: TrainConfig, caches: list[CacheReader]) -> Any:
    """The fingerprint of the cache. For a mixture, each cache's fingerprint with its weight and
    name, because seeds and logs depend on them.
    """
    if isinstance(config.cache, str):
        return caches[0].manifest.fingerprint
    return [
        {"fingerprint": cache.manifest.fingerprint, "weight": entry.weight, "name": entry.label}
        | ({} if entry.held_out is None else {"held_out": entry.held_out})
        | ({} if entry.preferred is None else {"preferred": entry.preferred})
        for entry, cache in zip(config.caches, caches, strict=True)
    ]
