"""Which store contains which, and by which options of ``derive``."""

from __future__ import annotations

import pytest

from logitcask.cache_format.catalog.narrowing import narrowing
from logitcask.cache_format.manifest import StoreSettings

HAD = StoreSettings(
    vocab_size=1000,
    top_k=16,
    capture_k=16,
    min_k=4,
    min_probability=0.02,
    tail_samples=8,
    sample_sets=2,
    mass_per_sample=0.05,
    sample_logprobs=True,
    entropy=True,
    logprob_step=1 / 16,
)


def wanted(**changes):
    if changes.get("tail_samples") == 0:
        changes = {"entropy": False, "sample_logprobs": False, **changes}
    changes = {"capture_k": changes.get("top_k", 16), **changes}
    return StoreSettings.model_validate({**HAD.model_dump(), **changes})


@pytest.mark.parametrize(
    "less",
    [
        {"top_k": 8},
        {"top_k": 2},
        {"top_k": 8, "logprob_step": 1 / 8, "tail_samples": 4, "sample_sets": 1},
        {"min_k": 2},
        {"top_p": 0.9},
        {"min_probability": 0.1},
        {"mass_per_sample": 0.5},
        {"sample_logprobs": False},
        {"tail_samples": 0},
        {"tail_samples": 0, "seed": 5, "draws": "independent", "mass_per_sample": None},
        {"top_k": 0, "min_k": 0},
    ],
)
def test_less_is_contained(less):
    options = narrowing(HAD, wanted(**less))
    assert options
    # Only what must change is named, so that the cache is that of the same `derive`.
    assert {name: wanted(**less).model_dump()[name] for name in options} == options
    assert options.items() <= less.items()
    assert narrowing(wanted(**less), HAD) is None


@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 17},
        {"min_k": 5},
        {"min_probability": 0.01},
        {"min_probability": None},
        {"tail_samples": 9},
        {"sample_sets": 3},
        {"mass_per_sample": 0.01},
        {"mass_per_sample": None},
        {"seed": 1},
        {"draws": "independent"},
        {"logprob_step": 1 / 32},
        {"vocab_size": 1001},
        {"top_k": 8, "tail_samples": 9},
        {"scalar_step": 1 / 128},
    ],
)
def test_more_is_not(more):
    assert narrowing(HAD, wanted(**more)) is None


def test_the_same_store_needs_no_options():
    assert narrowing(HAD, HAD) == {}


def test_heads_of_one_size_have_every_smaller_least_size():
    full = StoreSettings(vocab_size=1000, top_k=16, capture_k=16, min_k=1, logprob_step=1 / 16)
    ragged = full.model_copy(update={"min_k": 4, "min_probability": 0.1})
    assert narrowing(full, ragged) == {"min_k": 4, "min_probability": 0.1}
    assert narrowing(ragged, full) is None


def test_a_coarser_copy_is_no_origin():
    coarse = wanted(logprob_step=1 / 8)
    derived = coarse.model_copy(update={"logprob_error": 3 / 32})
    assert narrowing(derived, coarse) is None
