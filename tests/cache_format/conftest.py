"""Random valid sequences, and a header to write them under."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, CacheWriter, ChosenIds, TailSamples
from logitcask.cache_format.manifest import (
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.storage import files as storage

KINDS: dict[str, dict[str, Any]] = {
    "head": {},
    "ragged": {"min_probability": 0.01},
    "samples": {"min_probability": 0.01, "tail_samples": 6, "sample_sets": 2, "entropy": True},
    "sample logprobs": {"tail_samples": 6, "sample_logprobs": True},
    "random sampling": {"top_k": 0, "tail_samples": 40, "entropy": True},
    "writer logprobs": {"writer_logprobs": True},
    "chosen ids": {"min_probability": 0.01, "chosen_ids": 6},
    "chosen ids, draws": {"chosen_ids": 6, "tail_samples": 6, "sample_logprobs": True},
}
"""What a cache may hold, as fields of its store settings."""


def make_header(
    vocab_size: int = 1000, top_k: int = 8, step: float = 1 / 64, kind: str = "head"
) -> Header:
    store = {
        "top_k": top_k,
        "capture_k": top_k,
        "vocab_size": vocab_size,
        "logprob_step": step,
        **KINDS[kind],
    }
    return Header(
        created_by="tests",
        teacher=TeacherIdentity(
            model="m",
            backend="synthetic",
            engine="none",
            dtype="float32",
            route="synthetic",
            vocab_size=vocab_size,
        ),
        tokenizer=TokenizerIdentity(
            name="t", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=vocab_size
        ),
        data=DataIdentity(
            source="x",
            split="train",
            kind="documents",
            mask_policy="all",
            max_length=64,
            overlong="split",
            sha256="0",
        ),
        store=StoreSettings(**store),
        required_features=StoreSettings(**store).features,
    )


def make_sequence(
    rng: np.random.Generator,
    name: str,
    *,
    tokens: int = 40,
    vocab_size: int = 1000,
    top_k: int = 8,
    kind: str = "head",
    kept: float = 0.8,
) -> CachedSequence:
    """A random sequence of a ``kind`` of cache; its distributions live on some ids, of which the
    head holds the first.
    """
    settings = KINDS[kind]
    top_k = settings.get("top_k", min(top_k, vocab_size))
    mask = rng.random(tokens) < kept
    mask[0] = False
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    p, support = len(positions), min(vocab_size, 40)
    logits = rng.normal(0, 3, (p, support))
    everything = np.sort(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), axis=1)[
        :, ::-1
    ]
    all_ids = np.array([rng.choice(vocab_size, support, replace=False) for _ in range(p)]).reshape(
        p, support
    )
    sizes = np.full(p, top_k)
    if "min_probability" in settings:
        sizes = np.clip((everything >= np.log(settings["min_probability"])).sum(axis=1), 1, top_k)
    width = int(sizes.max(initial=0))
    inside = np.arange(width) < sizes[:, None]
    mass = (np.exp(everything) * (np.arange(support) < sizes[:, None])).sum(axis=1)
    tail = np.where(sizes == vocab_size, -np.inf, np.log(np.maximum(1 - mass, 2.0**-20)))
    samples = None
    if draws := settings.get("tail_samples", 0):
        shape = (p, settings.get("sample_sets", 1), draws)
        drawn = np.full(shape, -1)
        drawn_logprobs = np.full(shape, -np.inf)
        for row in range(p):
            if sizes[row] < support:
                at = rng.integers(sizes[row], support, shape[1:])
                drawn[row], drawn_logprobs[row] = all_ids[row][at], everything[row][at]
        samples = TailSamples(
            drawn.astype(np.int32),
            drawn_logprobs.astype(np.float32) if "sample_logprobs" in settings else None,
        )
    chosen = None
    if most := settings.get("chosen_ids", 0):
        # Ids from anywhere, and fewer than all at some positions.
        most = min(most, support)
        at = [rng.choice(support, most, replace=False) for _ in range(p)]
        at = np.array(at, np.int64).reshape(p, most)
        there = np.arange(most) < rng.integers(0, most + 1, (p, 1))
        chosen_ids = np.take_along_axis(all_ids, at, axis=1)
        chosen_logprobs = np.take_along_axis(everything, at, axis=1)
        chosen = ChosenIds(
            np.where(there, chosen_ids, -1).astype(np.int32),
            np.where(there, chosen_logprobs, -np.inf).astype(np.float32),
        )
    return CachedSequence(
        sequence_id=name,
        input_ids=rng.integers(0, vocab_size, tokens).astype(np.int32),
        loss_mask=mask,
        positions=positions,
        ids=np.where(inside, all_ids[:, :width], -1).astype(np.int32),
        logprobs=np.where(inside, everything[:, :width], -np.inf).astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        target_logprob=-rng.exponential(3, p).astype(np.float32),
        target_rank=rng.integers(0, vocab_size, p).astype(np.int32),
        entropy=-(np.exp(everything) * everything).sum(axis=1).astype(np.float32)
        if "entropy" in settings
        else None,
        samples=samples,
        writer_logprob=-rng.exponential(3, p).astype(np.float32)
        if "writer_logprobs" in settings
        else None,
        chosen=chosen,
    )


def assert_same(expected: CachedSequence, found: CachedSequence, step: float) -> None:
    """Equal but for rounding, which stays within the bounds of SPEC.md section 5."""
    assert found.sequence_id == expected.sequence_id
    for name in ("input_ids", "loss_mask", "positions", "ids", "target_rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    stored = expected.ids >= 0
    assert np.isneginf(found.logprobs[~stored]).all()
    assert (np.abs(found.logprobs[stored] - expected.logprobs[stored]) <= step / 2).all()
    for name in ("tail_logprob", "target_logprob", "entropy", "writer_logprob"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            finite = np.isfinite(b)
            assert (np.isneginf(a) == ~finite).all()
            assert (np.abs(a[finite] - b[finite]) <= 2.0**-9).all(), name
    assert (found.chosen is None) == (expected.chosen is None)
    if found.chosen is not None:
        last = found.logprobs.min(axis=1, where=found.ids >= 0, initial=0)
        outside = found.chosen.places_in(found.ids) < 0
        for row in range(len(expected.positions)):
            pairs = zip(expected.chosen.ids[row], expected.chosen.logprobs[row], strict=True)
            true = {i: logprob for i, logprob in pairs if i >= 0}
            pairs = zip(found.chosen.ids[row], found.chosen.logprobs[row], strict=True)
            stored = {i: logprob for i, logprob in pairs if i >= 0}
            assert stored.keys() == true.keys(), "chosen ids"
            for i, logprob in stored.items():
                outer = outside[row][list(found.chosen.ids[row]).index(i)]
                expected_logprob = min(true[i], last[row]) if outer else true[i]
                assert abs(logprob - expected_logprob) <= step / 2 + 1e-6
    assert (found.samples is None) == (expected.samples is None)
    if found.samples is not None:
        for row in range(len(expected.positions)):
            for drawn, original in zip(
                found.samples.ids[row], expected.samples.ids[row], strict=True
            ):
                assert sorted(drawn[drawn >= 0]) == sorted(original[original >= 0]), "draws"
        assert (found.samples.logprobs is None) == (expected.samples.logprobs is None)
        if found.samples.logprobs is not None:
            last = found.logprobs.min(axis=1, where=found.ids >= 0, initial=0)
            for row in range(len(expected.positions)):
                true = dict(
                    zip(
                        expected.samples.ids[row].flat,
                        expected.samples.logprobs[row].flat,
                        strict=True,
                    )
                )
                for i, logprob in zip(
                    found.samples.ids[row].flat, found.samples.logprobs[row].flat, strict=True
                ):
                    if i >= 0:
                        assert abs(logprob - min(true[i], last[row])) <= step / 2 + 1e-6
                    else:
                        assert np.isneginf(logprob)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No long pauses between attempts; a local cache of shards that is this test's own."""
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "shards"))


@pytest.fixture
def header() -> Callable[..., Header]:
    return make_header


@pytest.fixture
def sequence() -> Callable[..., CachedSequence]:
    return make_sequence


@pytest.fixture
def consistent_sequence() -> Callable[..., CachedSequence]:
    """A sequence whose targets agree with its heads, as real teachers' do."""

    def make(rng: np.random.Generator, name: str, **options: Any) -> CachedSequence:
        made = make_sequence(rng, name, **{"kept": 1.0, **options})
        size = (made.ids >= 0).sum(axis=1)
        if not size.all():
            return made  # no heads: any target will do
        ranks, at = rng.integers(0, size), np.arange(len(size))
        input_ids = made.input_ids.copy()
        input_ids[made.positions + 1] = made.ids[at, ranks]
        return dataclasses.replace(
            made,
            input_ids=input_ids,
            target_rank=ranks.astype(np.int32),
            target_logprob=made.logprobs[at, ranks],
        )

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[CachedSequence, CachedSequence, float], None]:
    return assert_same


@pytest.fixture
def write_cache(
    rng: np.random.Generator,
    header: Callable[..., Header],
    consistent_sequence: Callable[..., CachedSequence],
) -> Callable[..., Path]:
    """``write_cache(path, shards, **options of the header)`` makes a small cache of fresh random
    sequences.
    """

    def write(path: Path, shards: int = 3, **options: Any) -> Path:
        with CacheWriter(path) as writer:
            started = writer.begin(header(**options))
            for index in range(shards):
                with writer.shard(index) as shard:
                    for i in range(4):
                        shard.append(consistent_sequence(rng, f"{index}-{i}"))
            writer.finish(started, shards)
        return path

    return write


@pytest.fixture
def cache(tmp_path: Path, write_cache: Callable[..., Path]) -> Path:
    """A small cache of three shards."""
    return write_cache(tmp_path / "original")


@pytest.fixture
def files_at() -> Callable[[str | Path], dict[str, str]]:
    """``files_at(url)``: everything that lies there, relative path to sha256."""

    def found(url: str | Path) -> dict[str, str]:
        filesystem, root = storage.open_filesystem(str(url))
        filesystem.invalidate_cache()
        return {
            path.removeprefix(f"{root}/"): hashlib.sha256(filesystem.cat_file(path)).hexdigest()
            for path in filesystem.find(root)
        }

    return found
