"""Draws of draws: estimates stay unbiased."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from logitcask.cache_format import TailSamples
from logitcask.cache_format.derive.narrow import narrow
from logitcask.cache_format.manifest import StoreSettings

VOCAB = 300


def test_draws_of_draws_are_unbiased(rng, sequence_of):
    """Over many first draws and many second ones, every id of the new tail gets its probability;
    a biased way does not.
    """
    p = np.sort(rng.dirichlet(np.full(VOCAB, 0.1)))[::-1]
    ids = rng.permutation(VOCAB)
    had = {
        "vocab_size": VOCAB,
        "top_k": 12,
        "capture_k": 12,
        "logprob_step": 2.0**-16,
        "tail_samples": 6,
    }
    wide = StoreSettings(**had)
    sums = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    squares = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    rounds, rows = 60, 400
    tail = p[12:].sum()
    template = sequence_of(ids[:12], np.log(p[:12]), np.log(tail), rows)
    for number in range(rounds):
        first = rng.choice(ids[12:], (rows, 1, 6), p=p[12:] / tail).astype(np.int32)
        named = dataclasses.replace(template, sequence_id=f"{number}", samples=TailSamples(first))
        new = narrow(named, wide.model_copy(update={"top_k": 4}), "source")
        for name, share in (("right", np.exp(new.tail_logprob[0])), ("biased", tail)):
            estimate = (
                np.stack(
                    [np.bincount(row[row >= 0], minlength=VOCAB) for row in new.samples.ids[:, 0]]
                )
                / 6
                * share
            )
            sums[name] += estimate.sum(0)
            squares[name] += (estimate**2).sum(0)
    expected = np.zeros(VOCAB)
    expected[ids[4:]] = p[4:]
    for name in sums:
        mean = sums[name] / (rounds * rows)
        error = np.sqrt((squares[name] / (rounds * rows) - mean**2) / (rounds * rows)) + 1e-9
        score = np.abs(mean - expected)[ids[4:12]] / error[ids[4:12]]
        assert (score.max() < 5) == (name == "right"), (name, score)


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_draws_of_draws_of_draws_are_unbiased(rng, sequence_of, draws):
    """Of 16 first draws as stored, by rising id, each gets into the last 4 equally often; with
    the same points twice not.
    """
    had = {
        "vocab_size": VOCAB,
        "top_k": 4,
        "capture_k": 4,
        "logprob_step": 2.0**-16,
        "draws": draws,
    }
    steps = [StoreSettings(**had, tail_samples=count) for count in (8, 4)]
    first = np.arange(100, 116)
    rounds, rows = 60, 400
    template = sequence_of(np.arange(4), np.log([0.4, 0.2, 0.1, 0.1]), np.log(0.2), rows)
    template = dataclasses.replace(
        template, samples=TailSamples(np.tile(first, (rows, 1, 1)).astype(np.int32))
    )
    cases = [(("one", "two"), True)]
    if draws == "systematic":  # one point a row, the same for both
        cases.append((("one", "one"), False))
    for sources, right in cases:
        sums, squares = np.zeros(16), np.zeros(16)
        for _ in range(rounds):
            new = dataclasses.replace(template, sequence_id=f"{rng.integers(2**60)}")
            for settings, source in zip(steps, sources, strict=True):
                new = narrow(new, settings, source)
                new = dataclasses.replace(
                    new, samples=TailSamples(np.sort(new.samples.ids, axis=2))
                )
            counts = (new.samples.ids[:, 0, :, None] == first).sum(axis=1)
            sums += counts.sum(0)
            squares += (counts**2).sum(0)
        mean = sums / (rounds * rows)
        error = np.sqrt((squares / (rounds * rows) - mean**2) / (rounds * rows)) + 1e-9
        score = np.abs(mean - 4 / 16) / error
        assert (score.max() < 5.5) == right, (sources, score)
