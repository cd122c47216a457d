"""``verify``: compares a cache with its manifest and SPEC.md: hashes, or every number (deep)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import DamagedCacheError, UserError
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.manifest import ShardEntry, StoreSettings
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.schema import UNKNOWN_RANK
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.codec import ContentHash
from logitcask.cache_format.shards.validation import validate

_FP32_SLACK = 2.0**-16
"""What sums of an engine's fp32 probabilities may be off by."""

_PART_ENTRIES = 1 << 22
"""Head entries checked at a time: bounds the memory that the checks take."""


def verify(
    path: str, *, deep: bool = False, on_shard: Callable[[str], None] = lambda _: None
) -> list[str]:
    """One line per damaged or missing shard of the cache at ``path``.

    ``deep`` also decodes every sequence and checks it against SPEC.md: lengths, ids in the
    vocabulary, descending logprobs, masses that add up to 1, agreement of target and head, unique
    sequence ids, and the manifest's totals. ``on_shard`` is called with the path of each checked
    shard. Raises the errors of opening the cache.
    """
    cache = CacheReader(path, check=False)  # problems are listed, not raised
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
        problems += [
            f"{MANIFEST}: {name} is not what the rest of it gives"
            for name in cache.manifest.contradictions()
        ]
    return problems


def _check_content(cache: CacheReader, index: int, entry: ShardEntry, seen: set[bytes]) -> None:
    store = cache.manifest.store
    content = ContentHash()
    sequences = tokens = positions = entries = draws = 0
    head_mass = nll = 0.0
    for packed in cache.iter_batches(index):
        content.update(packed.batch)
        # Decodes one row at a time: a row that is small on disk may be large in memory.
        for row in range(len(packed)):
            sequence = packed.decode(row)
            for part in _parts(sequence):
                _check_sequence(part, store, entry.path)
            sequences += 1
            tokens += len(sequence)
            positions += len(sequence.positions)
            entries += int((sequence.ids >= 0).sum())
            draws += 0 if sequence.samples is None else int((sequence.samples.ids >= 0).sum())
            mass, lost = sequence.mass_and_nll()
            head_mass, nll = head_mass + mass, nll + lost
            # Eight bytes per sequence: with a billion ids, the probability of a collision is 3 %.
            name = hashlib.blake2b(sequence.sequence_id.encode(), digest_size=8).digest()
            if name in seen:
                raise DamagedCacheError(
                    f"{entry.path}: sequence id {sequence.sequence_id[:100]!r} occurs twice in the cache"
                )
            seen.add(name)
            del sequence, part
    if content.hexdigest() != entry.content_sha256:
        raise DamagedCacheError(f"{entry.path}: its content_sha256 is not the manifest's")
    found = (sequences, tokens, positions, entries, draws)
    expected = (entry.sequences, entry.tokens, entry.positions, entry.entries, entry.draws)
    if found != expected:
        raise DamagedCacheError(
            f"{entry.path} has {found} sequences, tokens, positions, entries, draws; the manifest says {expected}"
        )
    # The manifest's sums are of values before rounding to the scalar grid.
    room = positions * store.scalar_step + 1e-6
    if not (
        math.isclose(head_mass, entry.head_mass_sum, abs_tol=room)
        and math.isclose(nll, entry.target_nll_sum, abs_tol=room)
    ):
        raise DamagedCacheError(
            f"{entry.path}: its sums of head mass or target logprobs are not the manifest's"
        )


def _parts(sequence: CachedSequence) -> Iterator[CachedSequence]:
    """The sequence in one part, or, if its head is large, in parts of some positions each."""
    p, step = len(sequence.positions), max(1, _PART_ENTRIES // max(1, sequence.ids.shape[1]))
    if p <= step:
        yield sequence
        return
    for start in range(0, p, step):
        some = slice(start, start + step)
        mask = np.zeros_like(sequence.loss_mask)
        mask[sequence.positions[some] + 1] = True
        yield replace(sequence.at(some), loss_mask=mask)


def _check_sequence(sequence: CachedSequence, store: StoreSettings, where: str) -> None:
    try:
        validate(sequence, store, mass_slack=2 * store.rounding)
    except UserError as error:
        raise DamagedCacheError(f"{where}: {error}") from error
    if not len(sequence.positions):
        return

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise DamagedCacheError(f"{where}: sequence {sequence.sequence_id[:100]!r}: {what}")

    ids, logprobs = sequence.ids, sequence.logprobs.astype(np.float64)
    stored = ids >= 0
    size = stored.sum(axis=1)
    require(_distinct(ids), "an id occurs twice in a head")
    mass = np.exp(logprobs).sum(axis=1) + np.exp(sequence.tail_logprob.astype(np.float64))
    room = 2 * store.rounding + store.scalar_step + _FP32_SLACK
    if store.tail_known:
        require(bool((np.abs(mass - 1) <= room).all()), "head and tail mass do not add up to 1")
    is_target = ids == sequence.target_ids[:, None]
    inside = is_target.any(axis=1)
    require(
        bool((sequence.target_rank[inside] < size[inside]).all()),
        "a target in the head has a rank beyond it",
    )
    # If a target's rank is inside the head but its id is not, it is tied with the last entry.
    known = sequence.target_rank != UNKNOWN_RANK
    require(bool(known[inside].all()), "a target in the head is called unknown")
    matters = inside | (known & (sequence.target_rank < size))
    at = np.where(inside, is_target.argmax(axis=1) if ids.shape[1] else 0, size - 1)[matters]
    apart = np.abs(sequence.target_logprob[matters] - logprobs[np.flatnonzero(matters), at])
    require(
        bool((apart <= store.rounding + store.scalar_step / 2 + _FP32_SLACK).all()),
        "target and head disagree",
    )
    if sequence.entropy is not None:
        require(
            _entropy_is_possible(sequence, size, store),
            "its entropy contradicts the head and the tail's mass",
        )
    if sequence.samples is not None:
        _check_samples(sequence, store, require)
    if sequence.chosen is not None:
        _check_chosen(sequence, store, require)


def _entropy_is_possible(
    sequence: CachedSequence, size: NDArray[np.int64], store: StoreSettings
) -> bool:
    """Whether the stored entropies are possible, given head and tail mass: the smallest possible
    entropy has the whole tail in one id, the largest has an even tail.
    """
    assert sequence.entropy is not None
    cells = np.concatenate([sequence.logprobs, sequence.tail_logprob[:, None]], axis=1).astype(
        np.float64
    )
    known = -(np.exp(cells) * np.where(np.isneginf(cells), 0, cells)).sum(axis=1)
    spread = np.exp(cells[:, -1]) * np.log(np.maximum(store.vocab_size - size, 1))
    # d(p log p) = (1 + log p) p dlog p, summed over the cells.
    room = (store.rounding + store.scalar_step) * (2 + known + spread) + store.scalar_step + 1e-3
    return bool(
        ((sequence.entropy >= known - room) & (sequence.entropy <= known + spread + room)).all()
    )


def _check_samples(
    sequence: CachedSequence, store: StoreSettings, require: Callable[[bool, str], None]
) -> None:
    assert sequence.samples is not None
    ids = sequence.samples.ids.reshape(len(sequence.positions), -1)
    distinct = np.where(ids[:, 1:] == ids[:, :-1], -1, ids[:, 1:])
    drawn = np.concatenate([ids[:, :1], distinct], axis=1)
    # The ids of a head are distinct, and so are those of a set. An id in both is a repetition.
    for each in np.split(drawn, store.sample_sets, axis=1) if ids.shape[1] else []:
        require(_distinct(np.concatenate([sequence.ids, each], axis=1)), "a sample is in the head")
    most = sequence.samples.logprobs
    if most is not None and most.size and sequence.logprobs.shape[1]:
        last = np.where(sequence.ids >= 0, sequence.logprobs, 0).min(axis=1)
        above = most.max(axis=(1, 2)) - last
        require(
            bool((above <= 2 * store.rounding).all()),
            "a sample is more probable than the head's last entry",
        )


def _check_chosen(
    sequence: CachedSequence, store: StoreSettings, require: Callable[[bool, str], None]
) -> None:
    assert sequence.chosen is not None
    others = sequence.chosen.outside(sequence.ids).logprobs.astype(np.float64)
    tail = np.exp(sequence.tail_logprob.astype(np.float64))
    room = tail * (2 * store.rounding + store.scalar_step) + _FP32_SLACK
    require(
        bool((np.exp(others).sum(axis=1) <= tail + room).all()),
        "chosen ids outside a head have more mass than its tail",
    )
    if others.shape[1] and sequence.logprobs.shape[1]:
        last = np.where(sequence.ids >= 0, sequence.logprobs, 0).min(axis=1)
        require(
            bool((others.max(axis=1) - last <= 2 * store.rounding).all()),
            "a chosen id outside a head is more probable than its last entry",
        )


def _distinct(ids: NDArray[np.int32]) -> bool:
    """Whether no row of ``ids`` has an id twice; negative ids are ignored."""
    ordered = np.sort(np.where(ids >= 0, ids, -1 - np.arange(ids.shape[1])), axis=1)
    return bool((ordered[:, 1:] != ordered[:, :-1]).all())
