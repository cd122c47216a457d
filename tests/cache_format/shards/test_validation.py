"""Sequences that cannot be stored are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from logitcask.cache_format import TailSamples, UserError
from logitcask.cache_format.shards.validation import validate

BROKEN = {
    "falling": lambda s: {"logprobs": s.logprobs[:, ::-1].copy()},
    "vocabulary": lambda s: {"ids": s.ids + 1000},
    "finite": lambda s: {
        "logprobs": np.where(
            np.arange(s.logprobs.size).reshape(s.logprobs.shape) == 0, -np.inf, s.logprobs
        )
    },
    "not a number": lambda s: {"target_logprob": s.target_logprob * np.nan},
    "mass": lambda s: {"logprobs": np.full_like(s.logprobs, -0.01)},
    "mask": lambda s: {"positions": s.positions - 1},
    "lengths": lambda s: {"target_rank": s.target_rank[:-1]},
    "tail": lambda s: {"tail_logprob": np.full_like(s.tail_logprob, -np.inf)},
    "first token": lambda s: {"loss_mask": np.ones_like(s.loss_mask)},
    "no samples": lambda s: {"samples": None},
    "no entropy": lambda s: {"entropy": None},
    "entropy above ln V": lambda s: {"entropy": s.entropy + 7},
    "sample ids": lambda s: {"samples": TailSamples(s.samples.ids + 1000)},
    "sample padding": lambda s: {
        "samples": TailSamples(np.where(np.arange(6) == 0, -1, s.samples.ids))
    },
    "a set too many": lambda s: {
        "samples": TailSamples(np.concatenate([s.samples.ids] * 2, axis=1))
    },
    "an empty set": lambda s: {"samples": TailSamples(np.full_like(s.samples.ids, -1))},
    "too many draws": lambda s: {"samples": TailSamples(np.tile(s.samples.ids, (1, 1, 50)))},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_stored_is_refused(rng, header, sequence, what):
    store = header(kind="samples").store
    good = sequence(rng, "s", kept=1.0, kind="samples")
    validate(good, store)
    with pytest.raises(UserError, match="'s' cannot be stored"):
        validate(dataclasses.replace(good, **BROKEN[what](good)), store)
