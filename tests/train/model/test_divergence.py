"""A number that is not finite ends a training with what to do about it."""

from __future__ import annotations

import math

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.train.model.divergence import check_finite


def test_finite_numbers_of_any_size_pass():
    check_finite({"loss": 1e308, "kl": -1e308, "ce": 0.0}, "at step 1")
    check_finite({}, "at step 1")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_number_its_name_and_its_time_are_named(value):
    with pytest.raises(UserError) as caught:
        check_finite({"kl": 1.0, "ce": value}, "in the evaluation")
    message = str(caught.value)
    assert f"the student has diverged: ce is {value} in the evaluation" in message
    assert "training.learning_rate" in message
    assert "\n" not in message
