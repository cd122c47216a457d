"""``manifest.json``: the one document that makes shards a cache, and the identity under which the cache is known."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache_format.errors import CacheError, DamagedCacheError, UnsupportedCacheError
from cache_format.schema import FORMAT, FORMAT_VERSION, KNOWN_FEATURES, MAX_VOCAB_SIZE, SCALAR_STEP

MAX_MANIFEST_BYTES = 256 << 20


class _Part(BaseModel):
    """Unknown keys are kept, so that a newer writer's extras survive an older tool."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class TeacherIdentity(_Part):
    """What produced the numbers."""

    model: str = Field(description="As the user named it.")
    revision: str | None = Field(None, description="Commit of a hub model.")
    weights_sha256: str | None = Field(None, description="Of the weight files of a local model.")
    backend: str = Field(description="vllm, transformers or synthetic.")
    engine: str = Field(description="Engine and version, such as `vllm 0.32.0`.")
    dtype: str = Field(description="Weights and arithmetic.")
    head_dtype: str | None = Field(None, description="Of the lm_head, where it differs.")
    route: str = Field(description="How the numbers left the engine; changes no number.")
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE, description="Ids the model can predict.")
    temperature: float = Field(1.0, description="Of the stored distribution.")


class TokenizerIdentity(_Part):
    """Which tokenizer made the ids."""

    name: str
    sha256: str = Field(description="Of everything that maps text to ids.")
    vocab_sha256: str = Field(description="Of the token -> id map alone.")
    vocab_size: int
    chat_template_sha256: str | None = None


class DataIdentity(_Part):
    """Which text, and what became of it."""

    source: str
    split: str
    kind: Literal["documents", "chats"]
    mask_policy: str = Field(description="all: every token but the first; assistant: the assistant's tokens.")
    max_length: int
    overlong: str
    sha256: str = Field(description="Over ids, tokens and masks of all sequences in order.")
    stamp: str | None = Field(
        None, description="Cheap identity of the source (sizes, times), to see at once if it changed."
    )
    counters: dict[str, int] = Field(default_factory=dict, description="Rows read, skipped, split, truncated.")


class StoreSettings(_Part):
    """What was kept of each distribution."""

    estimator: Literal["top_k"] = "top_k"
    top_k: int = Field(ge=1)
    capture_k: int = Field(ge=1, description="Head entries the engine was asked for.")
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    logprob_step: float = Field(gt=0, le=1)
    scalar_step: float = SCALAR_STEP


class ShardEntry(_Part):
    """One shard: a commit record while building, an element of ``shards`` afterwards."""

    path: str = Field(pattern=r"^data/[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    content_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sequences: int = Field(ge=0)
    sequences_per_batch: int = Field(ge=1)
    tokens: int = Field(ge=0)
    positions: int = Field(ge=0)
    head_mass_sum: float = Field(description="Sum over positions of 1 - tail mass.")
    target_nll_sum: float = Field(description="Sum over positions of -target_logprob, nats.")


class Statistics(_Part):
    """Totals over all shards."""

    sequences: int
    tokens: int
    positions: int
    bytes: int
    bytes_per_token: float
    head_mass: float | None = Field(description="Mean over positions; None without positions.")
    teacher_ce: float | None = Field(description="Mean -target_logprob over positions, nats.")


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
    config: dict[str, Any] = Field(default_factory=dict, description="The build config as given.")

    def content_identity(self) -> dict[str, Any]:
        """Everything that decides the content; what ``fingerprint`` hashes."""
        # The same weights are the same teacher wherever they lie; the route changes no number.
        unnamed = {"route"} if self.teacher.weights_sha256 is None else {"route", "model"}
        return {
            "teacher": self.teacher.model_dump(mode="json", exclude=unnamed),
            "tokenizer": self.tokenizer.model_dump(mode="json", exclude={"name"}),
            "data": {"sha256": self.data.sha256, "mask_policy": self.data.mask_policy},
            "store": self.store.model_dump(mode="json"),
        }

    def with_fingerprint(self) -> Header:
        """A copy that carries the hash of its own content identity."""
        return self.model_copy(update={"fingerprint": sha256_of_json(self.content_identity())})


class Manifest(Header):
    """The whole of ``manifest.json``."""

    created_at: str = Field(description="UTC, ISO 8601.")
    statistics: Statistics
    shards: tuple[ShardEntry, ...]
    content_sha256: str

    @classmethod
    def complete(cls, header: Header, shards: tuple[ShardEntry, ...], created_at: str) -> Manifest:
        """The manifest of a finished build: a header and all its shards."""
        return cls(
            **header.model_dump(),
            created_at=created_at,
            statistics=summarise(shards),
            shards=shards,
            content_sha256=content_sha256(shards),
        )

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Parses and checks a manifest; ``where`` names it in messages.

        Raises UnsupportedCacheError for a newer version or unknown features, DamagedCacheError for anything invalid.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise DamagedCacheError(f"{where} has {len(text)} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedCacheError(f"{where} is not JSON ({error}); fetch or build the cache again") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CacheError(f"{where} is not the manifest of a Logitcask cache")
        version = raw.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise DamagedCacheError(f"{where} has format_version {version!r}; expected a positive integer")
        if version > FORMAT_VERSION:
            raise UnsupportedCacheError(
                f"{where} has format version {version}; this logitcask reads up to {FORMAT_VERSION}: upgrade logitcask"
            )
        features = raw.get("required_features", [])
        unknown = sorted(set(map(str, features)) - KNOWN_FEATURES) if isinstance(features, list) else []
        if unknown:
            raise UnsupportedCacheError(
                f"{where} needs features {unknown}, unknown to this logitcask: upgrade logitcask"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DamagedCacheError(f"{where} is not valid at {place}: {first['msg']}") from error


def summarise(shards: tuple[ShardEntry, ...]) -> Statistics:
    """Totals of shards (also of those that a running build has committed so far)."""
    tokens, positions = sum(s.tokens for s in shards), sum(s.positions for s in shards)
    size = sum(s.bytes for s in shards)
    return Statistics(
        sequences=sum(s.sequences for s in shards),
        tokens=tokens,
        positions=positions,
        bytes=size,
        bytes_per_token=size / tokens if tokens else 0.0,
        head_mass=sum(s.head_mass_sum for s in shards) / positions if positions else None,
        teacher_ce=sum(s.target_nll_sum for s in shards) / positions if positions else None,
    )


def content_sha256(shards: tuple[ShardEntry, ...]) -> str:
    """sha256 of the shards' digests in order (SPEC.md section 3)."""
    return hashlib.sha256(b"".join(bytes.fromhex(shard.content_sha256) for shard in shards)).hexdigest()


def canonical_json(value: Any) -> str:
    """One spelling per value: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
