"""The rows that a teacher with whole distributions yields."""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.dense import scored_from_dense


@pytest.mark.parametrize(
    "capture",
    [
        Capture(1),
        Capture(3, samples=4, mass_per_sample=0.1, seed=5),
        Capture(0, samples=7, sets=2, independent=True),
        Capture(20, top_p=0.6, min_k=2, samples=3),
    ],
)
def test_scores_of_random_distributions(rng, as_sequence, assert_same_scores, capture):
    vocab = 20
    sequence = as_sequence("a", rng.integers(0, vocab, 30).tolist())
    z = 2 * rng.standard_normal((29, vocab))
    z[::3, 4] = z[::3, 9]  # a tie
    dense = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    scored = scored_from_dense(dense, sequence.input_ids, capture)
    assert_same_scores(scored, dense, sequence.input_ids, tolerance=1e-6, capture=capture)
    for row in range(29):  # ranks and heads again, by sorting a list
        order = sorted(range(vocab), key=lambda v, row=row: -dense[row, v])
        assert scored.ids[row].tolist() == order[: capture.top_k]
        target = sequence.input_ids[row + 1]
        assert scored.target_rank[row] == sum(dense[row] > dense[row, target])


def test_impossible_ids(as_sequence, assert_same_scores):
    dense = np.log(
        np.array([[0.5, 0.5, 0.0, 0.0, 0.0]]), where=[[1, 1, 0, 0, 0]], out=np.full((1, 5), -np.inf)
    )
    sequence = as_sequence("a", [0, 1])
    scored = scored_from_dense(dense, sequence.input_ids, Capture(3, samples=2))
    assert scored.ids.tolist() == [[0, 1, 2]]
    assert scored.logprobs[0, 2] == -np.inf
    assert scored.target_rank.tolist() == [0]
    assert scored.draws.entropy[0] == pytest.approx(np.log(2))


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (5,), (2, 1, 5)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"logprobs of shape .* for 3 tokens; expected \(2, V\)"):
        scored_from_dense(np.zeros(shape), np.array([1, 2, 3], np.int32), Capture(1))
