"""Forecast bytes against those of measured caches."""

from __future__ import annotations

import math

import pytest

from logitcask.pipeline.config import StoreConfig
from logitcask.pipeline.estimate.size import size_from_reference

FIXED = {"min_probability": None, "mass_per_sample": None}


# Settings, and bytes per token of a whole cache of SmolLM2-135M over 29,810 tokens of python-docs,
# all files counted.
MEASURED = [
    ({}, 40.5),
    ({"sample_logprobs": True}, 50.5),
    ({**FIXED, "top_k": 16, "min_k": 16, "tail_samples": 16}, 59.9),
    ({**FIXED, "top_k": 8, "min_k": 8, "tail_samples": 0}, 21.7),
    ({**FIXED, "top_k": 64, "min_k": 64, "tail_samples": 0}, 122.1),
    ({**FIXED, "top_k": 64, "min_k": 64, "tail_samples": 0, "logprob_step": 1 / 64}, 133.4),
    ({**FIXED, "top_k": 128, "min_k": 128, "tail_samples": 0, "logprob_step": 1 / 8}, 228.1),
    ({"top_k": 256, "min_k": 1, "tail_samples": 0, "min_probability": 0.005}, 34.9),
    (
        {
            "top_k": 16,
            "min_k": 5,
            "tail_samples": 16,
            "min_probability": 0.05,
            "mass_per_sample": 0.05,
        },
        27.0,
    ),
    ({**FIXED, "top_k": 0, "tail_samples": 50, "draws": "independent"}, 32.5),
    ({**FIXED, "top_k": 0, "tail_samples": 50}, 34.2),
    ({**FIXED, "top_k": 0, "tail_samples": 16}, 19.8),
]


@pytest.mark.parametrize(("store", "measured"), MEASURED)
def test_bytes_are_those_of_measured_caches(store, measured):
    size = size_from_reference(StoreConfig.model_validate(store), 49_152)
    found = size.of(sequences=97, tokens=29_810, positions=29_713, shards=1).times(1 / 29_810)
    assert found.likely == pytest.approx(measured, rel=0.08)
    assert found.low < 0.9 * measured
    assert found.high > 1.1 * measured


def test_heads_and_draws_beyond_the_measured_ranks():
    size = size_from_reference(
        StoreConfig(top_k=2000, min_k=2000, min_probability=None, tail_samples=0), 5000
    )
    assert size.heads == 2000
    one, three = (
        size_from_reference(
            StoreConfig(top_k=0, tail_samples=255, sample_sets=sets, mass_per_sample=None), 49_152
        ).draws
        for sets in (1, 3)
    )
    assert 1 < one < 255
    assert three == pytest.approx(3 * one)
    tiny = size_from_reference(StoreConfig(top_k=4, min_k=4), 300)
    assert 0 < tiny.per_position.low < tiny.per_position.likely < tiny.per_position.high < math.inf
