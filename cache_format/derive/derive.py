"""``derive``: a smaller cache from a finished one, without the teacher."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from logitcask.cache_format.derive.fidelity import reconstruction_kl
from logitcask.cache_format.derive.narrow import head_sizes, narrow
from logitcask.cache_format.derive.write import (
    PUSH_IT,
    SHARD_TOKENS,
    Answers,
    OnTokens,
    Part,
    spread,
    write,
)
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import DerivedFrom, Manifest, StoreSettings, check_step
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.schema import MAX_DRAWS
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.storage.files import local_folder

log = logging.getLogger(__name__)

_SMALL_FILES = 5_000
"""About what manifest and card take, bytes."""


class DeriveOptions(BaseModel):
    """The changes of ``derive``; None leaves a setting of the source unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(
        None, ge=0, description="Maximum number of head entries. 0 keeps only draws from the tail."
    )
    min_k: int | None = Field(
        None,
        ge=0,
        description="Minimum number of head entries, whatever top-p and min-probability say.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="A head ends as soon as its entries add up to this probability.",
    )
    min_probability: float | None = Field(
        None, gt=0, lt=1, description="A head ends before the first entry less probable than this."
    )
    max_bytes_per_token: float | None = Field(
        None,
        gt=0,
        description="Set min-probability so that the cache has about this size, within 5 % or so. "
        "Values are tried on a sample.",
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        description="Set min-probability so that the KL between the teacher and its "
        "reconstruction is at most this, in nats.",
    )
    tail_samples: int | None = Field(
        None,
        ge=0,
        le=MAX_DRAWS,
        description="Maximum number of draws from the tail per set. 0 drops all draws.",
    )
    mass_per_sample: float | None = Field(
        None, gt=0, lt=1, description="Tail mass per draw: a larger tail gets more draws."
    )
    sample_sets: int | None = Field(None, ge=1, description="Number of sets of draws to keep.")
    draws: Literal["systematic", "independent"] | None = Field(
        None, description="Method of new draws."
    )
    seed: int | None = Field(None, description="Seed of new draws.")
    sample_logprobs: bool | None = Field(None, description="Whether to keep the logprobs of draws.")
    entropy: bool | None = Field(
        None, description="Whether to keep entropies. Default: as long as there are draws."
    )
    logprob_step: float | None = Field(
        None, description="Step of stored logprobs, in nats, a power of two."
    )
    sequences: str | None = Field(
        None, description="Keep only these sequences, by index: START:STOP or START:STOP:STEP."
    )
    match: str | None = Field(
        None, description="Keep only sequences whose id matches this pattern (*, ?, [...])."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bounds = ("min_probability", "max_bytes_per_token", "max_kl")
        given = [name for name in bounds if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are set; each decides where heads end: set one"
            )
        if self.logprob_step is not None:
            check_step(self.logprob_step)
        if self.sequences is not None:
            parse_slice(self.sequences)
        return self


def derive(
    source: str | CacheReader,
    output: Path,
    options: DeriveOptions,
    *,
    shard_tokens: int = SHARD_TOKENS,
    on_tokens: OnTokens = lambda _: None,
    answers: Answers | None = None,
) -> Manifest:
    """Writes a smaller cache made from the one at ``source``, or from an opened one; resumes an
    interrupted run.

    answers: the build that the new cache answers; None: the cache keeps the source's config.

    Raises UserError if the source does not hold the requested data, if no sequence would be left,
    and for a URL as output. Also raises the errors of opening and writing caches.
    """
    output = local_folder(output, PUSH_IT)
    cache = source if isinstance(source, CacheReader) else CacheReader(source)
    store = derived_settings(cache.manifest.store, options, cache.path)
    part = Part(cache, keeps=_selection(options, len(cache)))
    if options.max_bytes_per_token is not None or options.max_kl is not None:
        store = _within_budget(part, store, options)
    part = replace(
        part, change=lambda sequence: narrow(sequence, store, cache.manifest.fingerprint)
    )
    asked = options.model_dump(mode="json", exclude_none=True)
    made_of = DerivedFrom(
        command="derive", fingerprints=(cache.manifest.fingerprint,), options=asked
    )
    data = cache.manifest.data
    return write(output, [part], store, data, made_of, shard_tokens, on_tokens, answers)


def _selection(options: DeriveOptions, total: int) -> Callable[[int, str], bool]:
    chosen = (
        range(total) if options.sequences is None else range(total)[parse_slice(options.sequences)]
    )
    pattern = options.match
    return lambda index, name: index in chosen and (pattern is None or fnmatchcase(name, pattern))


def parse_slice(text: str) -> slice:
    """The slice START:STOP or START:STOP:STEP. Raises ValueError for other texts."""
    try:
        parts = [int(part) if part.strip() else None for part in text.split(":")]
        if len(parts) in (2, 3) and 0 not in parts[2:]:
            return slice(*parts)
    except ValueError:
        pass
    raise ValueError(
        f"sequences is {text!r}; expected START:STOP or START:STOP:STEP, such as 0:1000 or ::10"
    )


def derived_settings(had: StoreSettings, options: DeriveOptions, source: str) -> StoreSettings:
    """The settings of the new cache. Raises UserError if they need more than the source holds."""
    changes = {
        name: value
        for name, value in options.model_dump(exclude_none=True).items()
        if name in StoreSettings.model_fields and name != "entropy"
    }

    def refuse_if(lacking: Any, what: str) -> None:
        if lacking:
            raise UserError(
                f"{source} {what}; the teacher would have to be asked again: build a cache that has it"
            )

    samples = changes.get("tail_samples", had.tail_samples)
    refuse_if(
        changes.get("top_k", 0) > had.top_k,
        f"holds at most {had.top_k} entries a head, not {changes.get('top_k')}",
    )
    refuse_if(samples and not had.tail_samples, "has no tail samples")
    refuse_if(
        changes.get("sample_sets", 0) > had.sample_sets,
        f"has {had.sample_sets} sets of tail samples",
    )
    refuse_if(
        changes.get("sample_logprobs") and not had.sample_logprobs,
        "has no logprobs of its tail samples",
    )
    refuse_if(options.entropy and not had.entropy, "has no entropies")
    for name, is_more in (("min_probability", operator.lt), ("top_p", operator.gt)):
        bound, wanted = getattr(had, name), changes.get(name)
        refuse_if(
            wanted is not None and bound is not None and is_more(wanted, bound),
            f"holds heads that end by {name} {bound}, not {wanted}",
        )
    least = min(changes.get("min_k", 0), changes.get("top_k", had.top_k))
    refuse_if(
        had.ragged and least > had.min_k, f"holds at least {had.min_k} entries a head, not {least}"
    )
    refuse_if(
        changes.get("logprob_step", 1) < had.logprob_step,
        f"has logprobs on a grid of {had.logprob_step:g}",
    )
    if not samples:
        changes |= {
            "tail_samples": 0,
            "sample_sets": 1,
            "sample_logprobs": False,
            "mass_per_sample": None,
        }
    if changes.get("logprob_step", had.logprob_step) != had.logprob_step:
        changes["logprob_error"] = had.rounding + changes["logprob_step"] / 2
    top_k = changes.get("top_k", had.top_k)
    changes["min_k"] = min(changes.get("min_k", had.min_k), top_k)
    changes["entropy"] = had.entropy and (
        samples > 0 if options.entropy is None else options.entropy
    )
    try:
        return StoreSettings.model_validate(had.model_dump() | changes)
    except ValidationError as error:
        raise UserError(
            f"{source} cannot be derived so: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from None


def _within_budget(part: Part, store: StoreSettings, options: DeriveOptions) -> StoreSettings:
    """``store`` with a chosen ``min_probability``: the heads that meet the budget on a sample of
    the sequences, as large as ``max_bytes_per_token`` allows or as small as ``max_kl`` allows.
    """
    sample = spread([part])
    if not any(len(sequence.positions) for sequence in sample):
        raise UserError("no kept position is left to meet the budget with; choose more sequences")
    prior = TailPrior.estimate(sample, store.vocab_size)
    # The prior for the KL comes from half of the sample, and the KL from the other half: measured
    # on its own draws, a prior would look better than it is.
    apart = TailPrior.estimate(sample[::2], store.vocab_size)
    # Bytes per token of the files without shards: the prior, the manifest, the card.
    shared = (len(prior.to_bytes()) + _SMALL_FILES) / sum(
        len(ids) for _, _, ids, _ in part.chosen()
    )

    # Limits of the search. A larger bound on the probability gives smaller heads, fewer bytes, and
    # a larger KL.
    floor = store.min_probability or 1e-7
    everything = math.log(floor)
    least = max(everything, math.log(0.5))
    judged = [sequence for sequence in sample[1::2] if len(sequence.positions)] or sample

    def at(log_bound: float) -> StoreSettings:
        # Rounded to 4 digits, but never below the source's bound: its heads lack such entries.
        bound = (
            floor if log_bound == everything else max(floor, float(f"{math.exp(log_bound):.4g}"))
        )
        return store.model_copy(update={"min_probability": bound})

    def size(log_bound: float) -> float:
        return shared + bytes_per_token(
            sample, Codec(at(log_bound), prior), part.cache.manifest.fingerprint
        )

    def distance(log_bound: float) -> float:
        return _mean_kl(judged, at(log_bound), apart)

    # Small heads meet a budget of bytes, and large heads meet a budget of KL: ``good`` is the end
    # of the search that meets the budget if any bound does.
    if options.max_bytes_per_token is not None:
        budget, measure, unit, good, bad = (
            options.max_bytes_per_token,
            size,
            "bytes per token",
            least,
            everything,
        )
    else:
        assert options.max_kl is not None
        budget, measure, unit, good, bad = options.max_kl, distance, "nats", everything, least
    if measure(good) > budget:
        raise UserError(
            f"{budget:g} {unit} are out of reach: {measure(good):.3g} is the least that these settings give; "
            + (
                "lower min_k or tail_samples"
                if options.max_bytes_per_token is not None
                else "build a cache with larger heads"
            )
        )
    if measure(bad) <= budget:
        good = bad
    # Bisection in the log of the bound. ``good`` always meets the budget, ``bad`` never does.
    while abs(good - bad) > 0.005:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if measure(middle) <= budget else (good, middle)
    log.info(
        "heads end at a probability of %g: %.4g %s", at(good).min_probability, measure(good), unit
    )
    return at(good)


def bytes_per_token(sample: list[CachedSequence], codec: Codec, source: str) -> float:
    """Bytes per token of these sequences, of the cache with fingerprint ``source``, in a shard."""
    small = [narrow(sequence, codec.store, source) for sequence in sample]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    with pa.ipc.new_file(sink, codec.schema, options=options) as file:
        file.write_batch(codec.encode(small))
    return float(sink.getvalue().size / sum(len(sequence) for sequence in sample))


def _mean_kl(sample: list[CachedSequence], store: StoreSettings, prior: TailPrior) -> float:
    per_position = [
        reconstruction_kl(sequence, head_sizes(sequence.logprobs, store), store.vocab_size, prior)
        for sequence in sample
    ]
    return float(np.concatenate(per_position).mean())
