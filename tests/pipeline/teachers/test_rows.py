"""The columns that an engine is asked for, and what becomes of them."""

from __future__ import annotations

import numpy as np

from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.rows import ColumnRequest, scored_rows


def test_a_request_for_draws_never_looks_like_one_for_the_whole_vocabulary() -> None:
    for vocab_size in range(260, 300):
        for capture in (
            Capture(16, samples=250),
            Capture(2, samples=255),
            Capture(vocab_size, samples=1),
        ):
            request = ColumnRequest.of(capture, vocab_size)
            assert request.columns != vocab_size
            assert max(4, capture.top_k) <= request.top <= vocab_size


def test_ranks_of_tied_ids_are_counted_from_the_ids_above_them() -> None:
    """vLLM's own rank, the last column here, counts every id at or above the target, from 1."""
    rows = [
        ([7, 3, 7, 9], [-1.5, -1.0, -1.5, -1.5], 4, 1),  # tied with two others in the head
        ([3, 3, 7, 9], [-1.0, -1.0, -1.5, -2.0], 1, 0),
        ([5, 3, 7, 9], [-2.0, -1.0, -1.5, -2.0], 5, 2),  # tied with the last of the head, not in it
        ([5, 3, 7, 9], [-6.0, -1.0, -1.5, -2.0], 41, 40),  # below the head
    ]
    ids, logprobs, ranks, expected = (list(column) for column in zip(*rows, strict=True))
    arrays = np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(ranks)
    scored = scored_rows(arrays, ColumnRequest.of(Capture(3), 10))
    assert scored.target_rank.tolist() == expected
    assert scored.target_ids.tolist() == [7, 3, 5, 5]
    assert scored.ids.tolist() == [[3, 7, 9]] * 4
