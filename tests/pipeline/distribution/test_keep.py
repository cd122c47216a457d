"""From an engine's rows to what the cache keeps: heads without impossible ids, exact tails,
alignment checked.
"""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.shards.validation import validate
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import draw
from logitcask.pipeline.distribution.keep import (
    MisalignedScoresError,
    keep,
    keep_nothing,
    tail_logprob,
)
from logitcask.pipeline.types import Scored, Sequence

VOCAB = 60


@pytest.fixture
def scored(rng):
    """A sequence and its rows; ``masked`` ids have no probability at all, as where an engine
    masks part of a vocabulary.
    """

    def make(capture, masked=0, positions=30):
        logits = rng.normal(0, 3, (positions, VOCAB))
        logits[:, VOCAB - masked :] = -np.inf
        dense = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
        order = np.argsort(-dense, axis=1, kind="stable").astype(np.int32)
        targets = rng.integers(0, VOCAB - masked, positions).astype(np.int32)
        at = np.arange(positions)
        draws = draw(dense, order[:, : max(4, capture.top_k)], targets, capture)
        ids = order[:, : capture.top_k]
        target = dense[at, targets]
        rows = Scored(
            ids=ids,
            logprobs=np.take_along_axis(dense, ids.astype(np.int64), axis=1),
            target_ids=targets,
            target_logprob=target,
            target_rank=(dense > target[:, None]).sum(axis=1).astype(np.int32),
            draws=draws,
        )
        mask = np.ones(positions + 1, bool)
        mask[0] = False
        return Sequence("s", np.concatenate([[0], targets]).astype(np.int32), mask), rows, dense

    return make


def store(capture):
    return StoreSettings(
        vocab_size=VOCAB,
        top_k=capture.top_k,
        capture_k=capture.top_k,
        tail_samples=capture.samples,
        entropy=capture.samples > 0,
        logprob_step=1 / 16,
    )


@pytest.mark.parametrize("masked", [0, 20, 55])
@pytest.mark.parametrize("top_k", [0, 8, VOCAB])
def test_ids_without_probability_are_never_kept(scored, masked, top_k):
    capture = Capture(top_k=top_k, samples=6)
    sequence, rows, dense = scored(capture, masked)
    kept = keep(sequence, rows, store(capture))
    validate(kept, store(capture))
    stored = kept.ids >= 0
    assert (stored.sum(axis=1) == min(top_k, VOCAB - masked)).all()
    assert np.isfinite(kept.logprobs[stored]).all()
    drawn = kept.samples.ids
    assert (drawn < VOCAB - masked).all()
    everything = top_k >= VOCAB - masked
    assert (drawn.size == 0 or (drawn < 0).all()) == everything
    outside = np.exp(dense.astype(np.float64))
    np.put_along_axis(outside, rows.ids.astype(np.int64), 0, axis=1)
    if not everything:
        np.testing.assert_allclose(np.exp(kept.tail_logprob), outside.sum(axis=1), atol=1e-5)
    elif masked:
        assert (np.exp(kept.tail_logprob) <= 2.0**-20 * 1.001).all(), (
            "nothing is outside but what cannot come"
        )
    else:
        assert np.isneginf(kept.tail_logprob).all()


def test_the_tail_is_exact_and_clamped(rng):
    logprobs = np.log(np.array([[0.5, 0.25], [1 - 1e-9, 1e-12], [0.4, 0.3]], np.float32))
    found = np.exp(tail_logprob(logprobs, np.array([2, 2, 1], np.int32), VOCAB).astype(np.float64))
    np.testing.assert_allclose(found[[0, 2]], [0.25, 0.6], rtol=1e-6)
    assert found[1] == pytest.approx(58e-12, rel=1e-4), (
        "at most all other ids as probable as the last"
    )


@pytest.mark.parametrize("what", ["rows", "targets"])
def test_rows_that_do_not_fit_the_tokens_are_refused(scored, what):
    capture = Capture(top_k=4)
    sequence, rows, _ = scored(capture)
    if what == "rows":
        sequence = Sequence("s", sequence.input_ids[:-1], sequence.loss_mask[:-1])
    else:
        sequence = Sequence("s", np.roll(sequence.input_ids, 1), sequence.loss_mask)
    with pytest.raises(MisalignedScoresError):
        keep(sequence, rows, store(capture))


def test_nothing_to_learn_is_kept_as_nothing():
    capture = Capture(top_k=4, samples=3)
    sequence = Sequence("s", np.arange(5, dtype=np.int32), np.zeros(5, bool))
    validate(keep_nothing(sequence, store(capture)), store(capture))
