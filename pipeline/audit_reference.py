"""What an audit compares a cache with: the teacher its manifest names, or another model, dense and in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_format import DamagedCacheError, Manifest, UserError
from cache_format.manifest import TeacherIdentity
from pipeline.capture import Capture
from pipeline.config import TeacherConfig
from pipeline.models import context_limit, resolve_model, vocab_size

MAX_TOKENS = 2048
"""Of a sequence, from its start: what a causal teacher says of them does not depend on the rest."""

# Logprobs in memory, of one sequence.
_SEQUENCE_VALUES = 1 << 28

Dense = Callable[[NDArray[np.int32]], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Reference:
    """The dense reference of a cache, which is a teacher of its own.

    name:       for people.
    dense:      int32[n] ids to [n-1, V] logprobs at the cache's temperature, nats; row ``i`` predicts token ``i + 1``.
    max_tokens: longest sequence it is given.
    problems:   what its identity already says against the cache, a line each.
    """

    name: str
    dense: Dense
    max_tokens: int
    problems: tuple[str, ...]


@contextmanager
def open_reference(
    manifest: Manifest, name: str | None = None, *, trust_remote_code: bool = False
) -> Iterator[Reference]:
    """The teacher that ``manifest`` names, or the model ``name``, as a dense reference in float32.

    Name, revision and eager attention, where the teacher had that, are taken from the manifest, and nothing else: engine
    options of a stranger's cache, such as leave to run a model's own code, are never passed on. Raises UserError where the model is not to be had or predicts other ids,
    DamagedCacheError for a temperature that no distribution has.
    """
    temperature = manifest.teacher.temperature
    if temperature <= 0:
        raise DamagedCacheError(f"the manifest says teacher.temperature {temperature:g}; expected one above 0")
    bounded = min(MAX_TOKENS, max(2, _SEQUENCE_VALUES // manifest.store.vocab_size))
    synthetic = name is None and manifest.teacher.backend == "synthetic"
    teacher, most = (
        _synthetic(manifest, bounded) if synthetic else _transformers(manifest, name, bounded, trust_remote_code)
    )

    def dense(input_ids: NDArray[np.int32]) -> NDArray[np.floating]:
        logprobs: NDArray[np.floating] = teacher.dense_logprobs(input_ids)
        return logprobs if temperature == 1 else at_temperature(logprobs, temperature)

    identity = teacher.identity()
    shown = f"{name or manifest.teacher.model} ({identity.engine}, {identity.dtype})"
    try:
        yield Reference(shown, dense, most, tuple(_other_identity(manifest.teacher, identity)))
    finally:
        teacher.close()


def _synthetic(manifest: Manifest, bounded: int) -> tuple[Any, int]:
    from pipeline.teachers.synthetic import SyntheticTeacher

    seed = (manifest.teacher.revision or "").removeprefix("seed-")
    try:
        config = TeacherConfig(
            model=manifest.teacher.model, backend="synthetic", vocab_size=manifest.store.vocab_size, seed=int(seed)
        )
    except ValueError as error:
        raise UserError(
            f"the manifest does not say which synthetic teacher this was: revision {manifest.teacher.revision!r}, "
            f"{manifest.store.vocab_size} ids; name a model with --teacher"
        ) from error
    return SyntheticTeacher(config, Capture(1)), bounded


def _transformers(manifest: Manifest, name: str | None, bounded: int, trust_remote_code: bool) -> tuple[Any, int]:
    from pipeline.teachers.transformers import TransformersTeacher

    wanted = manifest.teacher
    model_name = name or wanted.model
    try:
        revision = wanted.revision if model_name == wanted.model else None
        model = resolve_model(model_name, revision, trust_remote_code=trust_remote_code)
        found = vocab_size(model)
    except UserError as error:
        if name is not None:
            raise
        raise UserError(f"{error}; name the model that built the cache with --teacher") from error
    if found != manifest.store.vocab_size:
        raise UserError(
            f"{model_name} predicts {found} ids, the teacher of the cache {manifest.store.vocab_size}: it is another model; "
            "name the one that built the cache with --teacher"
        )
    most = min(bounded, context_limit(model) or bounded)
    config = TeacherConfig(
        model=model_name, backend="transformers", dtype="float32", engine_args=_eager_attention(manifest)
    )
    return TransformersTeacher(config, model, max_length=most, capture=Capture(1)), most


def _eager_attention(manifest: Manifest) -> dict[str, object]:
    """The engine option for eager attention, where the teacher had it: it may compute what other kinds leave out."""
    teacher = manifest.config.get("teacher")
    options = teacher.get("engine_args") if isinstance(teacher, dict) else None
    eager = isinstance(options, dict) and options.get("attn_implementation") == "eager"
    return {"attn_implementation": "eager"} if eager else {}


def _other_identity(cache: TeacherIdentity, reference: TeacherIdentity) -> Iterator[str]:
    """How the reference is not the cache's teacher, as far as both say what they are."""
    if cache.weights_sha256 and reference.weights_sha256 and cache.weights_sha256 != reference.weights_sha256:
        yield (
            f"the cache was built with other weights: their sha256 is {cache.weights_sha256[:12]}..., "
            f"that of {reference.model} is {reference.weights_sha256[:12]}..."
        )
    if cache.revision and reference.revision and cache.revision != reference.revision:
        yield (
            f"the cache was built with other weights: revision {cache.revision} of {cache.model}, "
            f"compared with {reference.revision} of {reference.model}"
        )
    if cache.backend == reference.backend == "synthetic" and cache.engine != reference.engine:
        yield f"the cache was built with {cache.engine}, compared with {reference.engine}"


def at_temperature(logprobs: NDArray[Any], temperature: float) -> NDArray[Any]:
    """[R, V] logprobs, sharpened or flattened and normalised again."""
    scaled = logprobs / logprobs.dtype.type(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
