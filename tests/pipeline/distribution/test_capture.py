"""The size of a head against a loop over its entries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from logitcask.pipeline.distribution.capture import Capture, head_sizes


def slow_sizes(logprobs: np.ndarray, capture: Capture) -> list[int]:
    """Entry by entry: whether the head goes on."""
    sizes = []
    for row in logprobs:
        size, mass = 0, 0.0
        for logprob in row:
            allowed = size < capture.min_k or (
                (
                    capture.min_probability is None
                    or logprob >= np.float32(math.log(capture.min_probability))
                )
                and (capture.top_p is None or mass < capture.top_p)
            )
            if not allowed:
                break
            size, mass = size + 1, mass + math.exp(float(logprob))
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("min_k", [0, 1, 4, 99])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_probability", [None, 0.3, 0.02])
def test_heads_end_where_the_rules_say(
    rng: np.random.Generator, min_k: int, top_p: float | None, min_probability: float | None
) -> None:
    logits = rng.normal(0, 3, (300, 12))
    logprobs = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * 0.97)
    falling = -np.sort(-logprobs, axis=1).astype(np.float32)
    capture = Capture(12, min_k=min_k, top_p=top_p, min_probability=min_probability)
    found = head_sizes(falling, capture)
    assert found.dtype == np.int32
    assert found.tolist() == slow_sizes(falling, capture)


def test_a_threshold_is_compared_as_the_engine_compares_it() -> None:
    """In float32, the entry that equals it included."""
    threshold = np.float32(math.log(0.1))
    row = np.array([[-0.5, threshold, np.nextafter(threshold, np.float32(-9))]], np.float32)
    assert head_sizes(row, Capture(3, min_probability=0.1)).tolist() == [2]


def test_a_head_ends_with_the_entry_at_which_its_mass_reaches_top_p() -> None:
    row = np.array([[0.0, -50.0, -60.0]], np.float32)
    assert head_sizes(row, Capture(3, top_p=1.0)).tolist() == [1]


def test_no_heads_for_draws_alone() -> None:
    for capture in (Capture(0, top_p=0.5, min_probability=0.1), Capture(0, min_k=8)):
        assert head_sizes(np.empty((3, 0), np.float32), capture).tolist() == [0, 0, 0]


def test_what_a_capture_says_of_itself() -> None:
    assert not Capture(4, min_k=2).ragged
    assert Capture(4, top_p=0.5).ragged
    assert Capture(4, min_probability=0.5).ragged
    assert Capture(4, samples=6, sets=3).draws == 18
    assert Capture(4, sets=3).draws == 0
