"""The reference of an audit: the manifest's teacher, or another model, dense, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import DamagedCacheError, Manifest, UserError
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    activation_bits,
    context_limit,
    empty_model,
    has_experts,
    resolve_model,
    vocab_size,
)

MAX_TOKENS = 2048
"""Of a sequence, from its start: what a causal teacher says of them does not depend on the rest."""

# Number of logprobs of one sequence in memory.
_SEQUENCE_VALUES = 1 << 28
_FLOAT32_BYTES = 4
# Share of the free memory for weights. The rest is for activations and the logprobs of one
# sequence.
_SHARE_FOR_WEIGHTS = 0.7

Dense = Callable[[NDArray[np.int32]], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Reference:
    """The dense reference of a cache.

    name:       for people.
    dense:      int32[n] ids to [n-1, V] logprobs at the cache's temperature, nats; row ``i``
                predicts token ``i + 1``.
    max_tokens: length of its longest input.
    problems:   differences of its identity from the cache's teacher, one line each.
    bits:       precision to which the layers of the cache's teacher rounded their inputs; None if
                its dtype is the precision.
    experts:    whether a router of the model chooses among experts.
    """

    name: str
    dense: Dense
    max_tokens: int
    problems: tuple[str, ...]
    bits: int | None = None
    experts: bool = False


@contextmanager
def open_reference(
    manifest: Manifest, name: str | None = None, *, trust_remote_code: bool = False
) -> Iterator[Reference]:
    """The teacher that ``manifest`` names, or the model ``name``, as a dense reference in float32.

    Only the name, the revision and eager attention (if the teacher used it) come from the manifest.
    Other engine options of a cache from a stranger, such as the permission to run a model's own
    code, are never used. Raises UserError if the model cannot be found, predicts other ids or does
    not fit into memory, and DamagedCacheError for an impossible temperature.
    """
    temperature = manifest.teacher.temperature
    if temperature <= 0:
        raise DamagedCacheError(
            f"the manifest says teacher.temperature {temperature:g}; expected one above 0"
        )
    bounded = min(MAX_TOKENS, max(2, _SEQUENCE_VALUES // manifest.store.vocab_size))
    synthetic = name is None and manifest.teacher.backend == "synthetic"
    bits, experts = None, False
    if synthetic:
        teacher, most = _synthetic(manifest, bounded)
    else:
        model = _resolve(manifest, name, trust_remote_code)
        most = min(bounded, context_limit(model) or bounded)
        check_memory(model, most)
        bits, experts = _bits(manifest, model), has_experts(model)
        teacher = _transformers(manifest, model, most)

    def dense(input_ids: NDArray[np.int32]) -> NDArray[np.floating]:
        logprobs: NDArray[np.floating] = teacher.dense_logprobs(input_ids)
        return logprobs if temperature == 1 else at_temperature(logprobs, temperature)

    identity = teacher.identity()
    shown = f"{name or manifest.teacher.model} ({identity.engine}, {identity.dtype})"
    try:
        yield Reference(
            shown, dense, most, tuple(_other_identity(manifest.teacher, identity)), bits, experts
        )
    finally:
        teacher.close()


def _synthetic(manifest: Manifest, bounded: int) -> tuple[Any, int]:
    from logitcask.pipeline.teachers.synthetic import SyntheticTeacher

    seed = (manifest.teacher.revision or "").removeprefix("seed-")
    try:
        config = TeacherConfig(
            model=manifest.teacher.model,
            backend="synthetic",
            vocab_size=manifest.store.vocab_size,
            seed=int(seed),
        )
    except ValueError as error:
        raise UserError(
            f"the manifest does not say which synthetic teacher this was: revision {manifest.teacher.revision!r}, "
            f"{manifest.store.vocab_size} ids; name a model with --teacher"
        ) from error
    return SyntheticTeacher(config, Capture(1)), bounded


def _resolve(manifest: Manifest, name: str | None, trust_remote_code: bool) -> ResolvedModel:
    """The model to compare with."""
    wanted = manifest.teacher
    if name is None and manifest.tokenizer.name == wanted.backend:
        raise UserError(
            f"its teacher {wanted.backend} is a model of its own, which nothing else can run; name a model to compare with "
            "by --teacher"
        )
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
    return model


def _transformers(manifest: Manifest, model: ResolvedModel, most: int) -> Any:
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    config = TeacherConfig(
        model=model.name,
        backend="transformers",
        dtype="float32",
        engine_args=_eager_attention(manifest),
    )
    return TransformersTeacher(config, model, max_length=most, capture=Capture(1))


def check_memory(model: ResolvedModel, tokens: int) -> None:
    """Raises UserError if the model in float32 does not fit into the memory of the GPU and the
    host, or, without a GPU, of the host.

    Weights go to a GPU one by one, so the host only holds a few of the largest weights, and the
    logprobs of a sequence of ``tokens``.
    """
    try:
        lm = empty_model(model)
    except UserError:
        return  # loading the model reports the reason
    weights = _FLOAT32_BYTES * lm.num_parameters()
    host, device = free_memory()
    if device is None:
        _fits(weights, host, "GB are free here", "takes")
        return
    _fits(weights, device, "GB of the GPU's memory are free here", "takes")
    largest = _FLOAT32_BYTES * max(parameter.numel() for parameter in lm.parameters())
    logprobs = _FLOAT32_BYTES * tokens * vocab_size(model)
    _fits(
        2 * (largest + logprobs),
        host,
        "GB are free here",
        "passes through the host's memory in pieces of",
    )


def _fits(needed: int, free: int, where: str, how: str) -> None:
    if needed > _SHARE_FOR_WEIGHTS * free:
        raise UserError(
            f"its teacher {how} {needed / 1e9:,.1f} GB in float32, and {free / 1e9:,.1f} {where}; "
            "run `teacher-cache audit` where there is room, or build with audit.sequences=0"
        )


def free_memory() -> tuple[int, int | None]:
    """Free bytes of the host's memory, and of the memory of the GPU that a reference would use."""
    import psutil
    import torch

    device = int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    return int(psutil.virtual_memory().available), device


def _eager_attention(manifest: Manifest) -> dict[str, object]:
    """The teacher's engine option for eager attention; other kinds may ignore config fields."""
    return (
        {"attn_implementation": "eager"}
        if _option(manifest, "attn_implementation") == "eager"
        else {}
    )


def _bits(manifest: Manifest, model: ResolvedModel) -> int | None:
    """Bits to which the teacher rounded, by its quantised checkpoint or its engine."""
    asked = (_option(manifest, "quantization"), _option(manifest, "kv_cache_dtype"))
    found = [8] if any(str(one).startswith("fp8") for one in asked) else []
    found += [bits for bits in [activation_bits(model)] if bits is not None]
    return min(found, default=None)


def _option(manifest: Manifest, name: str) -> object:
    """An engine option of the teacher, from the manifest."""
    teacher = manifest.config.get("teacher")
    options = teacher.get("engine_args") if isinstance(teacher, dict) else None
    return options.get(name) if isinstance(options, dict) else None


def _other_identity(cache: TeacherIdentity, reference: TeacherIdentity) -> Iterator[str]:
    """Differences between the identities of the reference and the cache's teacher."""
    if (
        cache.weights_sha256
        and reference.weights_sha256
        and cache.weights_sha256 != reference.weights_sha256
    ):
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
    """[R, V] logprobs at another temperature, normalised again."""
    scaled = logprobs / logprobs.dtype.type(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
