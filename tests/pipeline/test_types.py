"""Kept positions of a sequence."""

from __future__ import annotations

import numpy as np

from logitcask.pipeline.types import Sequence


def test_a_kept_position_is_the_one_before_a_token_that_is_learnt(rng):
    mask = rng.random(50) < 0.5
    mask[0] = False
    positions = Sequence("s", np.zeros(50, np.int32), mask).positions()
    assert positions.dtype == np.int32
    assert positions.tolist() == [i for i in range(49) if mask[i + 1]]


def test_a_single_token_is_predicted_by_nothing():
    assert Sequence("s", np.zeros(1, np.int32), np.zeros(1, np.bool_)).positions().shape == (0,)
