"""Random valid sequences, and a header to write them under."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cache_format import CachedSequence
from cache_format.manifest import DataIdentity, Header, StoreSettings, TeacherIdentity, TokenizerIdentity


def make_header(vocab_size: int = 1000, top_k: int = 8, step: float = 1 / 64) -> Header:
    return Header(
        created_by="tests",
        teacher=TeacherIdentity(
            model="m", backend="synthetic", engine="none", dtype="float32", route="synthetic", vocab_size=vocab_size
        ),
        tokenizer=TokenizerIdentity(name="t", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=vocab_size),
        data=DataIdentity(
            source="x", split="train", kind="documents", mask_policy="all", max_length=64, overlong="split", sha256="0"
        ),
        store=StoreSettings(top_k=top_k, capture_k=top_k, vocab_size=vocab_size, logprob_step=step),
    )


def make_sequence(
    rng: np.random.Generator,
    name: str,
    *,
    tokens: int = 40,
    vocab_size: int = 1000,
    top_k: int = 8,
    ragged: bool = False,
    kept: float = 0.8,
) -> CachedSequence:
    mask = rng.random(tokens) < kept
    mask[0] = False
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    p = len(positions)
    logits = rng.normal(0, 4, (p, min(vocab_size, 4 * top_k)))
    logprobs_all = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs_all, axis=1)[:, :top_k]
    logprobs = np.take_along_axis(logprobs_all, order, axis=1).astype(np.float32)
    spread = rng.choice(vocab_size, logits.shape[1], replace=False)
    ids = spread[order].astype(np.int32)
    if p == 0:
        ids, logprobs = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    elif ragged:
        sizes = rng.integers(1, top_k + 1, p)
        gone = np.arange(top_k) >= sizes[:, None]
        width = int(sizes.max())
        ids, logprobs = np.where(gone, -1, ids)[:, :width], np.where(gone, -np.inf, logprobs)[:, :width]
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1) if p else np.empty(0)
    full = (ids >= 0).sum(axis=1) == vocab_size if p else np.empty(0, bool)
    tail = np.where(full, -np.inf, np.log(np.maximum(1 - mass, 2.0**-20)))
    ranks = rng.integers(0, vocab_size, p).astype(np.int32)
    return CachedSequence(
        sequence_id=name,
        input_ids=rng.integers(0, vocab_size, tokens).astype(np.int32),
        loss_mask=mask,
        positions=positions,
        ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        target_logprob=-rng.exponential(3, p).astype(np.float32),
        target_rank=ranks,
    )


def assert_same(expected: CachedSequence, found: CachedSequence, step: float) -> None:
    """Equal but for rounding, which stays within the bounds of SPEC.md section 5."""
    assert found.sequence_id == expected.sequence_id
    for name in ("input_ids", "loss_mask", "positions", "ids", "target_rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    stored = expected.ids >= 0
    assert np.isneginf(found.logprobs[~stored]).all()
    assert (np.abs(found.logprobs[stored] - expected.logprobs[stored]) <= step / 2).all()
    for name in ("tail_logprob", "target_logprob"):
        a, b = getattr(found, name), getattr(expected, name)
        finite = np.isfinite(b)
        assert (np.isneginf(a) == ~finite).all()
        assert (np.abs(a[finite] - b[finite]) <= 2.0**-11).all(), name


@pytest.fixture
def header() -> Callable[..., Header]:
    return make_header


@pytest.fixture
def sequence() -> Callable[..., CachedSequence]:
    return make_sequence


@pytest.fixture(scope="session")
def same() -> Callable[[CachedSequence, CachedSequence, float], None]:
    return assert_same
