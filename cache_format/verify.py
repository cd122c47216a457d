"""``verify``: is this cache what its manifest and SPEC.md say? Quick: sizes and hashes. Deep: every number in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

from cache_format.codec import ContentHash, PackedBatch, validate
from cache_format.errors import DamagedCacheError, UserError
from cache_format.manifest import Manifest, ShardEntry, StoreSettings, content_sha256, summarise
from cache_format.reader import CacheReader
from cache_format.sequence import CachedSequence

_FP32_SLACK = 2.0**-16
"""What sums of an engine's fp32 probabilities may be off by."""


def verify(path: str, *, deep: bool = False, on_shard: Callable[[str], None] = lambda _: None) -> list[str]:
    """One line per damaged or missing shard of the cache at ``path``; an empty list means that all is well.

    ``deep`` also decodes every sequence and checks it against SPEC.md: lengths, ids in the vocabulary, falling logprobs,
    masses that add up to 1, target and head in agreement, unique sequence ids, and the manifest's totals.
    ``on_shard`` is called with each shard's path after it was checked. Raises what opening the cache raises.
    """
    cache = CacheReader(path)
    seen: set[bytes] = set()
    problems = []
    for index, entry in enumerate(cache.manifest.shards):
        try:
            cache.check_shard(index)
            if deep:
                _check_content(cache, index, entry, seen)
        except DamagedCacheError as error:
            problems.append(str(error))
        on_shard(entry.path)
    if deep:
        problems += _check_totals(cache.manifest)
    return problems


def _check_totals(manifest: Manifest) -> list[str]:
    """What the manifest says of the whole, against what it says of the shards and of itself."""
    wrong = [
        name
        for name, found, expected in (
            ("statistics", manifest.statistics, summarise(manifest.shards)),
            ("content_sha256", manifest.content_sha256, content_sha256(manifest.shards)),
            ("fingerprint", manifest.fingerprint, manifest.with_fingerprint().fingerprint),
        )
        if found != expected
    ]
    return [f"manifest.json: {name} is not what the rest of it gives" for name in wrong]


def _check_content(cache: CacheReader, index: int, entry: ShardEntry, seen: set[bytes]) -> None:
    store = cache.manifest.store
    content = ContentHash()
    sequences = tokens = positions = 0
    head_mass = nll = 0.0
    for packed in cache.iter_batches(index):
        content.update(packed.batch)
        for sequence in _decoded(packed):
            _check_sequence(sequence, store, entry.path)
            sequences += 1
            tokens += len(sequence)
            positions += len(sequence.positions)
            head_mass -= float(np.expm1(sequence.tail_logprob.astype(np.float64)).sum())
            nll -= float(sequence.target_logprob.sum(dtype=np.float64))
            # Eight bytes a sequence: enough that two of a billion ids collide with probability 3 %.
            name = hashlib.blake2b(sequence.sequence_id.encode(), digest_size=8).digest()
            if name in seen:
                raise DamagedCacheError(f"{entry.path}: sequence id {sequence.sequence_id!r} occurs twice in the cache")
            seen.add(name)
    if content.hexdigest() != entry.content_sha256:
        raise DamagedCacheError(f"{entry.path}: its content_sha256 is not the manifest's")
    found = (sequences, tokens, positions)
    expected = (entry.sequences, entry.tokens, entry.positions)
    if found != expected:
        raise DamagedCacheError(f"{entry.path} has {found} sequences, tokens, positions; the manifest says {expected}")
    # The manifest's sums are of values before rounding to the scalar grid.
    room = positions * store.scalar_step + 1e-6
    if not (
        math.isclose(head_mass, entry.head_mass_sum, abs_tol=room)
        and math.isclose(nll, entry.target_nll_sum, abs_tol=room)
    ):
        raise DamagedCacheError(f"{entry.path}: its sums of head mass or target logprobs are not the manifest's")


def _decoded(packed: PackedBatch) -> list[CachedSequence]:
    return [packed.decode(row) for row in range(len(packed))]


def _check_sequence(sequence: CachedSequence, store: StoreSettings, where: str) -> None:
    try:
        validate(sequence, store.vocab_size, mass_slack=store.logprob_step)
    except UserError as error:
        raise DamagedCacheError(f"{where}: {error}") from error
    if not len(sequence.positions):
        return

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise DamagedCacheError(f"{where}: sequence {sequence.sequence_id!r}: {what}")

    ids, logprobs = sequence.ids, sequence.logprobs.astype(np.float64)
    stored = ids >= 0
    ordered = np.sort(np.where(stored, ids, -1 - np.arange(ids.shape[1])), axis=1)
    require(bool((ordered[:, 1:] != ordered[:, :-1]).all()), "an id occurs twice in a head")
    mass = np.exp(logprobs).sum(axis=1) + np.exp(sequence.tail_logprob.astype(np.float64))
    room = store.logprob_step + store.scalar_step + _FP32_SLACK
    require(bool((np.abs(mass - 1) <= room).all()), "head and tail mass do not add up to 1")
    is_target = ids == sequence.target_ids[:, None]
    inside = is_target.any(axis=1)
    size = stored.sum(axis=1)
    require(bool((sequence.target_rank[inside] < size[inside]).all()), "a target in the head has a rank beyond it")
    in_head = np.where(is_target, logprobs, 0).sum(axis=1)
    last = logprobs[np.arange(len(ids)), size - 1]
    expected = np.where(inside, in_head, last)
    # A target that ranks inside the head but is not in it can only be tied with its last entry.
    matters = inside | (sequence.target_rank < size)
    apart = np.abs(sequence.target_logprob - expected)[matters]
    require(
        bool((apart <= (store.logprob_step + store.scalar_step) / 2 + _FP32_SLACK).all()), "target and head disagree"
    )
