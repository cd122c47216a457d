"""``CachedSequence``: some of its positions, all of their fields."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest


@pytest.mark.parametrize("kind", ["samples", "sample logprobs", "head"])
@pytest.mark.parametrize("rows", [slice(1, 3), np.array([0, 2]), slice(0, 0)])
def test_some_positions(rng, sequence, kind, rows):
    """Every field that has one row a position loses the same rows; tokens, loss mask and name
    stay.
    """
    whole = sequence(rng, "a", tokens=9, kind=kind)
    part = whole.at(rows)
    for field in fields(whole):
        before, after = getattr(whole, field.name), getattr(part, field.name)
        if field.name in ("sequence_id", "input_ids", "loss_mask") or before is None:
            assert after is before
        elif field.name == "samples":
            np.testing.assert_array_equal(after.ids, before.ids[rows])
            assert (after.logprobs is None) == (before.logprobs is None)
            if before.logprobs is not None:
                np.testing.assert_array_equal(after.logprobs, before.logprobs[rows])
        else:
            np.testing.assert_array_equal(after, before[rows])
    np.testing.assert_array_equal(part.target_ids, whole.target_ids[rows])
