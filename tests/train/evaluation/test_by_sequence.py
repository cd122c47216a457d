"""Metrics by sequence against those of a run, and bootstrap intervals against scipy's and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.evaluation.by_sequence import (
    BySequence,
    interval,
    resampled_means,
)
from logitcask.train.evaluation.evaluate import evaluate
from logitcask.train.head.lm_head import LogitsHead
from tests.train.conftest import scratch


@pytest.fixture
def head():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**scratch()["config"]))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return LogitsHead(model)


@pytest.mark.parametrize("kinds", [["samples"], ["head", "random sampling"]])
def test_the_means_are_those_of_a_run(write_cache, head, kinds):
    """Whatever the batches are, of one cache or two, with heads or without."""
    data = HeldOut(
        [CachedDataset(write_cache(k, kind=k, shards=1, sequences=9), range(1, 9)) for k in kinds]
    )
    expected = evaluate(head, data, k=5, batch_size=4, logits_chunk=None).means()
    found = evaluate(head, data, k=5, batch_size=3, logits_chunk=None).by_sequence()
    assert found.means() == pytest.approx(expected, rel=1e-5)
    assert list(found.means()) == list(expected)
    assert found.positions.tolist() == [len(s.positions) for s in data]
    # One sequence alone has the sum of its own.
    for at in (0, len(data) - 1):
        part = data.parts[0 if at == 0 else -1]
        alone = HeldOut([CachedDataset(part.cache, [part.indices[0 if at == 0 else -1]])])
        values = evaluate(head, alone, k=5, batch_size=1, logits_chunk=None).means()
        for name in found.sums:
            assert found.sums[name][at] / found.positions[at] == pytest.approx(
                values[name], rel=1e-4, abs=1e-6
            )


@pytest.fixture
def by_sequence(rng):
    positions = rng.integers(1, 200, 40)
    level = rng.gamma(2.0, 1.0, 40)
    return BySequence(
        {
            "kl": positions * (level + rng.normal(0, 0.1, 40)),
            "ce": positions * (2 + level),
            "mor@5": positions * rng.uniform(0, 1, 40),
        },
        positions,
        0.05,
    )


def test_intervals_are_those_of_scipy(by_sequence):
    """The same resamples, by the same generator, and scipy's percentile interval of each metric."""
    resampled = by_sequence.resampled(seed=11, resamples=400)

    def ratio(values, weights, axis):
        return values.sum(axis=axis) / weights.sum(axis=axis)

    for name, transform in (("kl", np.asarray), ("mor@5", np.asarray), ("ce", np.exp)):
        expected = stats.bootstrap(
            (by_sequence.sums[name], by_sequence.positions),
            lambda v, w, axis, f=transform: f(ratio(v, w, axis)),
            paired=True,
            vectorized=True,
            n_resamples=400,
            method="percentile",
            rng=np.random.default_rng(11),
        ).confidence_interval
        ours = interval(resampled["perplexity" if name == "ce" else name])
        assert ours == pytest.approx((expected.low, expected.high), rel=1e-9)
        assert ours[0] < ours[1]
    assert set(resampled) == {"kl", "ce", "mor@5", "perplexity"}


def test_resampled_means_by_hand(by_sequence):
    sums, positions = np.array(list(by_sequence.sums.values())), by_sequence.positions
    found = resampled_means(sums, positions, seed=5, resamples=3)
    rng = np.random.default_rng(5)
    for row in found:
        drawn = [int(at) for at in rng.integers(0, 40, 40)]
        total = sum(positions[at] for at in drawn)
        for value, values in zip(row, sums, strict=True):
            assert value == pytest.approx(sum(values[at] for at in drawn) / total)
    other = resampled_means(sums, positions, seed=6, resamples=3)
    assert not np.allclose(found, other)


def test_an_interval_covers_the_true_mean_as_often_as_it_says(rng):
    """Of 300 data sets of 50 sequences with a known mean, about 95 % of the intervals hold it:
    within four standard deviations, and 2 % that a percentile interval of 50 is short of it.
    """
    hits = 0
    for seed in range(300):
        positions = rng.integers(20, 60, 50)
        level = rng.normal(1.5, 0.4, 50)  # independent of the length, so that 1.5 is the mean
        found = resampled_means((positions * level)[None], positions, seed=seed, resamples=200)
        low, high = interval(found[:, 0])
        hits += low <= 1.5 <= high
    assert (
        0.93 - 4 * math.sqrt(0.95 * 0.05 / 300)
        < hits / 300
        < 0.95 + 4 * math.sqrt(0.95 * 0.05 / 300)
    )


def test_deviations_are_over_the_means_of_sequences(by_sequence):
    found = by_sequence.deviations()
    each = by_sequence.sums["kl"] / by_sequence.positions
    assert found["kl"] == pytest.approx(
        math.sqrt(((each - each.mean()) ** 2).sum() / (len(each) - 1))
    )
    assert found["perplexity"] == pytest.approx(
        np.exp(by_sequence.sums["ce"] / by_sequence.positions).std(ddof=1)
    )
    assert "ece" not in found
    one = BySequence({"ce": np.array([3.0])}, np.array([2]), 0.0)
    assert one.deviations() == {}
