"""``manifest.json``: the document that makes shards a cache, with the cache's identity."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from logitcask.cache_format.errors import CacheError, DamagedCacheError, UnsupportedCacheError
from logitcask.cache_format.schema import (
    CHOSEN_IDS,
    FORMAT,
    FORMAT_VERSION,
    KNOWN_FEATURES,
    MAX_CHOSEN,
    MAX_DRAWS,
    MAX_VOCAB_SIZE,
    SCALAR_STEP,
    UNKNOWN_VALUES,
    WRITER_LOGPROBS,
)

ANSWERS_BUILD = "answers_build"
"""The key of a derived cache's manifest that is true if a build made it, in place of scoring."""

MAX_MANIFEST_BYTES = 64 << 20
MAX_MANIFEST_VALUES = 1 << 22
"""Lists, objects and what stands between commas: more than any shards of that many bytes take,
and soon out of memory.
"""

_MAX_COUNT = 1 << 40
"""Of anything in one shard, so that no sum over shards leaves 64 bits."""


def check_step(step: float, name: str = "logprob_step") -> float:
    """``step`` (nats). Raises ValueError unless it is a power of two in [2^-16, 1]. Multiples of a
    power of two are exact in fp32.
    """
    if not (2.0**-16 <= step <= 1 and math.frexp(step)[0] == 0.5):
        raise ValueError(
            f"{name} is {step}; expected a power of two from 2^-16 to 1, such as 0.0625 (1/16)"
        )
    return step


class _Part(BaseModel):
    """Unknown keys are kept, so that a newer writer's extras survive an older tool."""

    model_config = ConfigDict(
        extra="allow", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class TeacherIdentity(_Part):
    """The source of the numbers."""

    model: str = Field(description="As the user named it.")
    revision: str | None = Field(None, description="Commit of a hub model.")
    weights_sha256: str | None = Field(None, description="Of the weight files of a local model.")
    backend: str = Field(description="The engine, as build configs name it.")
    engine: str = Field(description="Engine and version, such as `vllm 0.32.0`.")
    dtype: str = Field(description="Weights and arithmetic; `auto` where a server has chosen it.")
    head_dtype: str | None = Field(None, description="Of the lm_head, where it differs.")
    route: str = Field(description="How the numbers left the engine; changes no number.")
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE, description="Ids the model can predict.")
    temperature: float = Field(1.0, description="Of the stored distribution.")


class TokenizerIdentity(_Part):
    """The tokenizer of the ids."""

    name: str
    sha256: str = Field(description="Of everything that maps text to ids.")
    vocab_sha256: str = Field(description="Of the token -> id map alone.")
    vocab_size: int
    chat_template_sha256: str | None = None


class WriterIdentity(_Part):
    """The model that wrote the text, if it is not the teacher, and its sampling."""

    model: str = Field(description="As the user named it.")
    revision: str | None = Field(None, description="Commit of a hub model.")
    weights_sha256: str | None = Field(None, description="Of the weight files of a local model.")
    backend: str
    engine: str
    dtype: str
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    temperature: float = Field(ge=0, description="Of the sampling, not of the stored logprobs.")
    top_p: float = Field(gt=0, le=1)
    seed: int


class SpliceIdentity(_Part):
    """Tokens of the teacher among those of the writer: of each answer in an earlier cache, the first
    token of a rank of at least ``top_k`` was replaced, and the writer went on from there.
    """

    number: int = Field(ge=2, description="Of the pass; the first one has no splices.")
    top_k: int = Field(ge=1, description="Ranks that are accepted: 0 to top_k - 1.")
    temperature: float = Field(ge=0, description="Of the teacher's sampling.")
    top_p: float = Field(gt=0, le=1, description="Of the teacher's sampling.")
    fingerprint: str = Field(description="Of the cache of the pass before.")
    content_sha256: str = Field(description="Of the cache of the pass before.")


class GenerationIdentity(_Part):
    """The writing of the text by a model: settings in ``config``, ``sha256`` of the text."""

    prompts_sha256: str = Field(description="Over ids and tokens of all prompts.")
    end_tokens: tuple[int, ...] = Field(description="Ids that end an answer, and belong to it.")
    max_new_tokens: int | None = Field(
        None, description="Longest answer; null: as long as max_length allows."
    )
    writer: WriterIdentity | None = Field(None, description="null: the teacher wrote.")
    splice: SpliceIdentity | None = Field(
        None, description="null: no token of an answer is another model's than the writer's."
    )


class DataIdentity(_Part):
    """The text and its preparation."""

    source: str
    split: str
    kind: Literal["documents", "chats", "mixed"]
    mask_policy: str = Field(
        description="all: every token but the first; assistant: the assistant's; completion: those of the "
        "completions; generated: what the teacher or another model wrote; mixed: several of the first three."
    )
    max_length: int
    overlong: str
    sha256: str = Field(description="Over ids, tokens and masks of all sequences in order.")
    generation: GenerationIdentity | None = Field(None, description="Where a model wrote the text.")
    stamp: str | None = Field(
        None,
        description="Cheap identity of the source (sizes, times), to see at once if it changed.",
    )
    counters: dict[str, int] = Field(
        default_factory=dict, description="Rows read, skipped, split, truncated."
    )


class StoreSettings(_Part):
    """The stored part of each distribution: a head, the tail's mass, perhaps draws from it."""

    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    top_k: int = Field(ge=0, description="Head entries at most; 0: draws alone.")
    capture_k: int = Field(ge=0, description="Head entries the engine was asked for.")
    min_k: int = Field(1, ge=0, description="Head entries at least, whatever the next two say.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="A head ends once it holds this mass."
    )
    min_probability: float | None = Field(
        None, gt=0, lt=1, description="A head ends before the first entry less probable than this."
    )
    tail_samples: int = Field(
        0, ge=0, le=MAX_DRAWS, description="Draws from the tail in each set, at most."
    )
    sample_sets: int = Field(1, ge=1, le=255, description="Independent sets of draws.")
    mass_per_sample: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Tail mass that one draw stands for; null: tail_samples draws everywhere.",
    )
    draws: Literal["systematic", "independent"] = "systematic"
    seed: int = Field(0, description="Of the draws.")
    sample_logprobs: bool = Field(False, description="Whether the draws' logprobs are stored.")
    entropy: bool = Field(False, description="Whether the entropy of each distribution is stored.")
    logprob_step: float = Field(gt=0, le=1, description="Grid of head and sample logprobs, nats.")
    logprob_error: float | None = Field(
        None,
        gt=0,
        description="Largest rounding error of a stored logprob, nats; null: half of logprob_step.",
    )
    scalar_step: float = Field(SCALAR_STEP, gt=0, le=1, description="Grid of the scalars, nats.")
    writer_logprobs: bool = Field(
        False,
        description="Whether the logprobs of the text's writer are stored; absent if not.",
    )
    chosen_ids: int = Field(
        0,
        ge=0,
        le=MAX_CHOSEN,
        description="Ids at most that the text's writer finds the most probable at a position, with "
        "the teacher's logprobs; absent if 0.",
    )
    unknown: tuple[Literal["tail", "targets", "ranks"], ...] = Field(
        (),
        description="Values that the source of the cache did not hold. tail: the mass outside the heads; targets: "
        "logprob and rank of some targets; ranks: the rank of some. Absent if all are known.",
    )

    @model_serializer(mode="wrap")
    def _without_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``writer_logprobs``, ``chosen_ids`` and ``unknown`` if they are false, 0 and
        empty, as versions before them wrote and hashed it.
        """
        fields: dict[str, Any] = serialise(self)
        for name in ("writer_logprobs", "chosen_ids", "unknown"):
            if not getattr(self, name):
                fields.pop(name, None)
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_step(self.logprob_step)
        check_step(self.scalar_step, "scalar_step")
        if self.top_k == 0 and self.tail_samples == 0:
            raise ValueError("top_k and tail_samples are both 0: nothing would be kept")
        if self.top_k > self.vocab_size:
            raise ValueError(f"top_k is {self.top_k}, the vocabulary has {self.vocab_size} ids")
        if self.sample_logprobs and self.tail_samples == 0:
            raise ValueError("sample_logprobs is set, but tail_samples is 0")
        if self.chosen_ids and self.unknown:
            raise ValueError("chosen_ids are stored beside known values alone; unknown has some")
        if "tail" in self.unknown and (
            self.tail_samples or self.entropy or self.min_probability or (self.top_p or 1) < 1
        ):
            raise ValueError(
                "tail masses are unknown, so there are no tail samples, entropies, min_probability and top_p"
            )
        return self

    @property
    def tail_known(self) -> bool:
        """Whether the mass outside each head is known."""
        return "tail" not in self.unknown

    @property
    def targets_known(self) -> bool:
        """Whether every target's logprob is known. Without the tail's mass none is."""
        return not {"tail", "targets"} & set(self.unknown)

    @property
    def ragged(self) -> bool:
        """Whether heads may differ in size."""
        return self.top_p is not None or self.min_probability is not None

    @property
    def features(self) -> tuple[str, ...]:
        """The ``required_features`` of a cache with these settings."""
        stored = {
            WRITER_LOGPROBS: self.writer_logprobs,
            CHOSEN_IDS: self.chosen_ids,
            UNKNOWN_VALUES: self.unknown,
        }
        return tuple(name for name, needed in stored.items() if needed)

    @property
    def bytes_per_draw(self) -> int:
        """Of a decoded tail sample."""
        return 8 if self.sample_logprobs else 4

    @property
    def rounding(self) -> float:
        """Largest rounding error of a stored logprob, nats."""
        return self.logprob_step / 2 if self.logprob_error is None else self.logprob_error


class TailPriorEntry(_Part):
    """The file of the tail prior."""

    path: Literal["tail_prior.arrow"] = "tail_prior.arrow"
    bytes: int = Field(ge=0, le=_MAX_COUNT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class DerivedFrom(_Part):
    """The making of a cache from others."""

    command: Literal["derive", "merge"]
    fingerprints: tuple[str, ...] = Field(description="Of the other caches, in order.")
    options: dict[str, Any] = Field(default_factory=dict, description="What was asked for.")


class AuditSummary(_Part):
    """The comparison of a sample with a dense reference; means over positions, nats."""

    skipped: str | None = Field(
        None, description="Why there was no audit; everything else is null then."
    )
    reference: str | None = Field(
        None, description="Model and arithmetic that the sample was compared with."
    )
    sequences: int | None = None
    positions: int | None = None
    engine_limit: float | None = Field(None, description="What the next two may be at most.")
    engine_target: float | None = Field(
        None, description="|engine - reference| of the targets' logprobs."
    )
    engine_head: float | None = Field(None, description="The same of the heads' entries.")
    ids_outside: float | None = Field(
        None, description="Share of head ids that are not the reference's, near ties aside."
    )
    codec_kl: float | None = Field(None, description="KL by rounding.")
    codec_tv: float | None = Field(None, description="Total variation by rounding.")
    truncation_kl_even: float | None = Field(
        None, description="KL by truncation, the tail spread evenly."
    )
    truncation_tv_even: float | None = None
    truncation_kl_prior: float | None = Field(
        None, description="KL by truncation, the tail spread by the prior."
    )
    truncation_tv_prior: float | None = None
    draws_p_value: float | None = Field(
        None, description="Chi-square, of the draws against the reference's tails."
    )
    draws_z_logprob: float | None = Field(
        None, description="Bias of what draws estimate, in standard errors."
    )
    draws_z_id: float | None = None


class ShardEntry(_Part):
    """One shard: a commit record while building, an element of ``shards`` afterwards."""

    path: str = Field(pattern=r"^data/[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow$")
    bytes: int = Field(ge=0, le=_MAX_COUNT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    content_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sequences: int = Field(ge=0, le=_MAX_COUNT)
    sequences_per_batch: int = Field(ge=1, le=_MAX_COUNT)
    tokens: int = Field(ge=0, le=_MAX_COUNT)
    positions: int = Field(ge=0, le=_MAX_COUNT)
    entries: int = Field(ge=0, le=_MAX_COUNT, description="Head entries.")
    draws: int = Field(ge=0, le=_MAX_COUNT, description="Tail samples, over all sets.")
    head_mass_sum: float = Field(
        description="Sum over positions of 1 - tail mass, where it is known."
    )
    target_nll_sum: float = Field(
        description="Sum over positions of -target_logprob, nats, where it is known."
    )


class Statistics(_Part):
    """Totals over all shards."""

    sequences: int
    tokens: int
    positions: int
    bytes: int = Field(description="Of the shards and the prior.")
    bytes_per_token: float
    mean_head_size: float | None = Field(
        description="Entries per position; None without positions."
    )
    mean_draws: float | None = Field(description="Tail samples per position.")
    head_mass: float | None = Field(
        description="Mean over positions; None without positions, and if it is not known."
    )
    teacher_ce: float | None = Field(
        description="Mean -target_logprob over positions, nats; None if it is not known."
    )


class Header(_Part):
    """The part of a manifest that is known before the first shard is written."""

    format: Literal["logitcask"] = "logitcask"
    format_version: int = FORMAT_VERSION
    required_features: tuple[str, ...] = ()
    created_by: str
    fingerprint: str = ""
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    data: DataIdentity
    store: StoreSettings
    tail_prior: TailPriorEntry | None = Field(
        None, description="Without one, ids are stored by their number."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="The build config as given.")
    derived_from: DerivedFrom | None = Field(None, description="Where it was made of other caches.")

    @model_validator(mode="after")
    def _features_are_named(self) -> Self:
        # A reader without the feature would take an unknown value for a number.
        if set(self.store.features) != set(self.required_features) & KNOWN_FEATURES:
            raise ValueError(
                f"required_features is {list(self.required_features)}, but the store's fields need {list(self.store.features)}"
            )
        return self

    @model_validator(mode="after")
    def _spliced_tokens_are_not_the_writers(self) -> Self:
        generation = self.data.generation
        of_writer = self.store.writer_logprobs or self.store.chosen_ids
        if of_writer and generation is not None and generation.splice is not None:
            raise ValueError(
                "writer_logprobs or chosen_ids is set, but the text has a splice: tokens of the teacher, of which the writer knows nothing"
            )
        return self

    def content_identity(self, *, as_written: bool = False) -> dict[str, Any]:
        """Everything that decides the content. ``fingerprint`` is its hash.

        ``as_written``: without fields that the original document does not have, such as those of a
        later version.
        """
        # The same weights in another place are the same teacher. The route changes no number.
        unnamed = {"route"} if self.teacher.weights_sha256 is None else {"route", "model"}
        identity = {
            "teacher": self.teacher.model_dump(
                mode="json", exclude=unnamed, exclude_unset=as_written
            ),
            "tokenizer": self.tokenizer.model_dump(
                mode="json", exclude={"name"}, exclude_unset=as_written
            ),
            "data": {"sha256": self.data.sha256, "mask_policy": self.data.mask_policy},
            "store": self.store.model_dump(mode="json", exclude_unset=as_written),
        }
        if self.derived_from is not None:
            identity["derived_from"] = self.derived_from.model_dump(
                mode="json", exclude_unset=as_written
            )
        return identity

    @property
    def answers_build(self) -> bool:
        """Whether the cache is what the build of ``config`` gave: scored, or derived by it."""
        return self.derived_from is None or (self.model_extra or {}).get(ANSWERS_BUILD) is True

    def with_fingerprint(self) -> Header:
        """A copy with the hash of its own content identity."""
        return self.model_copy(update={"fingerprint": sha256_of_json(self.content_identity())})


class Manifest(Header):
    """The whole of ``manifest.json``."""

    created_at: str = Field(description="UTC, ISO 8601.")
    statistics: Statistics
    shards: tuple[ShardEntry, ...]
    content_sha256: str
    audit: AuditSummary | None = Field(
        None, description="Of the build; no part of the fingerprint."
    )

    @model_validator(mode="after")
    def _each_shard_once(self) -> Self:
        if len({shard.path for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same path")
        return self

    @model_validator(mode="after")
    def _sums_are_finite(self) -> Self:
        for name in ("head_mass_sum", "target_nll_sum"):
            if not math.isfinite(sum(getattr(shard, name) for shard in self.shards)):
                raise ValueError(f"the {name} of all shards together is more than a float holds")
        return self

    @classmethod
    def complete(
        cls,
        header: Header,
        shards: tuple[ShardEntry, ...],
        created_at: str,
        audit: AuditSummary | None = None,
    ) -> Manifest:
        """The manifest of a finished build: a header and all its shards."""
        return cls(
            **header.model_dump(),
            created_at=created_at,
            statistics=summarise(shards, header.tail_prior, header.store),
            shards=shards,
            content_sha256=content_sha256(shards),
            audit=audit,
        )

    def contradictions(self) -> list[str]:
        """Those of ``statistics``, ``content_sha256`` and ``fingerprint`` that contradict the rest
        of the manifest.
        """
        expected = summarise(self.shards, self.tail_prior, self.store).model_dump()
        statistics = self.statistics.model_dump(exclude_unset=True)
        holds = {
            "statistics": all(
                _same_number(value, expected.get(key, value)) for key, value in statistics.items()
            ),
            "content_sha256": self.content_sha256 == content_sha256(self.shards),
            "fingerprint": self.fingerprint
            == sha256_of_json(self.content_identity(as_written=True)),
        }
        return [name for name, right in holds.items() if not right]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Parses and checks a manifest; ``where`` names it in messages.

        Raises UnsupportedCacheError for a newer version or unknown features, DamagedCacheError for
        anything invalid.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise DamagedCacheError(
                f"{where} has {len(text)} bytes; a manifest has at most {MAX_MANIFEST_BYTES}"
            )
        if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_MANIFEST_VALUES:
            raise DamagedCacheError(
                f"{where} has more than {MAX_MANIFEST_VALUES} values; that is not a manifest"
            )
        try:
            raw = json.loads(text, object_pairs_hook=_each_key_once)
        except (ValueError, RecursionError) as error:
            raise DamagedCacheError(
                f"{where} is not JSON ({error}); fetch or build the cache again"
            ) from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CacheError(f"{where} is not the manifest of a Logitcask cache")
        version = raw.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise DamagedCacheError(
                f"{where} has format_version {version!r:.40}; expected a positive integer"
            )
        if version > FORMAT_VERSION:
            raise UnsupportedCacheError(
                f"{where} has format version {version}; this logitcask reads up to {FORMAT_VERSION}: upgrade logitcask"
            )
        features = raw.get("required_features", [])
        unknown = (
            sorted(set(map(str, features)) - KNOWN_FEATURES) if isinstance(features, list) else []
        )
        if unknown:
            raise UnsupportedCacheError(
                f"{where} needs features {unknown}, unknown to this logitcask: upgrade logitcask"
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DamagedCacheError(f"{where} is not valid at {place}: {first['msg']}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which parsers use different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _same_number(one: Any, other: Any) -> bool:
    """Whether two numbers are equal, up to the rounding of a float sum."""
    return one == other or (
        isinstance(one, float) and isinstance(other, float) and math.isclose(one, other)
    )


def summarise(
    shards: tuple[ShardEntry, ...],
    prior: TailPriorEntry | None = None,
    store: StoreSettings | None = None,
) -> Statistics:
    """Totals of shards (also of those that a running build has committed so far).

    Means of values that ``store`` says are unknown are None.
    """
    tokens, positions = sum(s.tokens for s in shards), sum(s.positions for s in shards)
    tail_known = store is None or store.tail_known
    targets_known = store is None or store.targets_known
    size = sum(s.bytes for s in shards) + (0 if prior is None else prior.bytes)

    def mean(total: float) -> float | None:
        return total / positions if positions else None

    return Statistics(
        sequences=sum(s.sequences for s in shards),
        tokens=tokens,
        positions=positions,
        bytes=size,
        bytes_per_token=size / tokens if tokens else 0.0,
        mean_head_size=mean(sum(s.entries for s in shards)),
        mean_draws=mean(sum(s.draws for s in shards)),
        head_mass=mean(sum(s.head_mass_sum for s in shards)) if tail_known else None,
        teacher_ce=mean(sum(s.target_nll_sum for s in shards)) if targets_known else None,
    )


def content_sha256(shards: tuple[ShardEntry, ...]) -> str:
    """sha256 of the shards' digests in order (SPEC.md section 3)."""
    return hashlib.sha256(
        b"".join(bytes.fromhex(shard.content_sha256) for shard in shards)
    ).hexdigest()


class DataHash:
    """sha256 over (id, tokens, mask) of sequences in order: the identity of the teacher's data."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(
        self, sequence_id: str, input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]
    ) -> None:
        for part in (
            sequence_id.encode(),
            input_ids.astype("<i4").tobytes(),
            loss_mask.astype(np.uint8).tobytes(),
        ):
            self._sha.update(len(part).to_bytes(8, "little"))
            self._sha.update(part)

    def copy(self) -> DataHash:
        """A hash that goes on from here on its own."""
        copied = DataHash()
        copied._sha = self._sha.copy()
        return copied

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def canonical_json(value: Any) -> str:
    """One spelling per value: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class CacheFile(NamedTuple):
    """One file of a cache beside its manifest and card; ``path`` is relative to the cache."""

    path: str
    bytes: int
    sha256: str


def cache_files(manifest: Manifest) -> list[CacheFile]:
    """Every file that ``manifest`` names: the shards in order, then the tail prior, if any."""
    prior = manifest.tail_prior
    parts: list[ShardEntry | TailPriorEntry] = [
        *manifest.shards,
        *([] if prior is None else [prior]),
    ]
    return [CacheFile(part.path, part.bytes, part.sha256) for part in parts]
