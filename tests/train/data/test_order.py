"""The order of training: every unit in its turn, neighbours near where they are to stay near,
shares as they were asked for.
"""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.train.data.order import Batches, Plan, single_units


def units(rng, count=None, shards=6):
    """Units of random sizes in shards of random lengths, blocks of up to 5 in each."""
    count = count or int(rng.integers(60, 200))
    shard = np.sort(rng.integers(0, shards, count)).astype(np.int32)
    run = np.concatenate([np.arange((shard == s).sum()) // 5 for s in range(shards)])
    block = np.unique(shard * 1000 + run, return_inverse=True)[1]
    tokens = rng.integers(2, 500, count)
    return single_units(tokens, np.maximum(1, tokens // 2), shard, block)


def plan(caches, weights=None, *, seed=0, shuffle="all", window=2, epoch="first"):
    return Plan(caches, weights, seed=seed, shuffle=shuffle, window=window, epoch=epoch)


@pytest.mark.parametrize("shuffle", ["all", "shards", "batches", "none"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_every_unit_once_and_its_own_order(rng, shuffle, grouped):
    made = [units(rng), units(rng)]
    drawn = plan(made, shuffle=shuffle, seed=int(rng.integers(1000)))
    batches = Batches(drawn, 7, group_by_length=grouped)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        assert {len(batch) for batch in found[:-1]} == {7}
        orders.append([unit for batch in found for unit in batch])
        assert sorted(orders[-1]) == list(range(sum(map(len, made))))
    assert orders[0] == orders[2]
    assert (orders[0] == orders[1]) == (shuffle == "none" and not grouped)
    assert len(list(Batches(drawn, 7, drop_last=True))) == len(drawn) // 7


def changes(labels):
    return int((np.diff(labels) != 0).sum())


def test_neighbours_stay_near(rng):
    """Shards are read window by window; with batches each block comes in one piece."""
    made = units(rng, 180)
    for shuffle in ("shards", "batches"):
        order = plan([made], shuffle=shuffle, seed=int(rng.integers(1000))).epoch(0)
        windows = []
        for shard in made.shard[order]:  # two shards at a time, and none comes back
            if not windows or shard not in windows[-1]:
                if not windows or len(windows[-1]) == 2:
                    windows.append(set())
                windows[-1].add(shard)
        seen = [shard for window in windows for shard in window]
        assert len(seen) == len(set(seen)) == len(set(made.shard))
        assert (changes(made.block[order]) == len(set(made.block)) - 1) == (shuffle == "batches")
    assert changes(made.shard[order]) < 0.7 * changes(made.shard[plan([made]).epoch(0)])


def test_grouped_batches_are_of_similar_length_for_all_processes_alike(rng):
    made = units(rng, 960)
    spread = {}
    for grouped in (False, True):
        batches = [
            made.tokens[batch]
            for batch in Batches(plan([made]), 8, group_by_length=grouped, processes=3)
        ]
        spread[grouped] = sum(batch.max() * len(batch) for batch in batches) / made.tokens.sum()
        sums = np.array([batch.sum() for batch in batches]).reshape(-1, 3)
        if grouped:
            assert (sums.max(1) - sums.min(1)).mean() < 0.1 * sums.mean()
    assert spread[True] < 1.1 < 1.4 < spread[False]
    firsts = [batch.max() for batch in batches]
    assert firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("epoch", ["first", "all"])
def test_weights_are_shares_of_positions_and_nothing_repeats_too_soon(rng, epoch):
    made = [units(rng, 150), units(rng, 400), units(rng, 90)]
    weights = rng.uniform(0.2, 1, 3).tolist()
    drawn = plan(made, weights, epoch=epoch)
    seen = [np.zeros(len(each), int) for each in made]
    kept = np.zeros(3)
    for number in range(6):
        this = [np.zeros(len(each), int) for each in made]
        for source, unit in map(drawn.locate, drawn.epoch(number)):
            this[source][unit] += 1
            kept[source] += made[source].kept[unit]
        seen = [a + b for a, b in zip(seen, this, strict=True)]
        for counts in seen:
            assert counts.max() - counts.min() <= 1
        # The cache that ends the epoch is drawn once; there is none smaller (or larger) for its
        # weight.
        whole = [n for n, counts in enumerate(this) if counts.sum() == len(counts)]
        assert any((this[n] == 1).all() for n in whole)
        passes = [counts.sum() / len(counts) for counts in this]
        assert max(passes) < 1.01 if epoch == "first" else min(passes) > 0.99
    np.testing.assert_allclose(kept / kept.sum(), np.array(weights) / sum(weights), atol=0.03)


def test_every_stretch_of_a_mixture_has_the_shares(rng):
    made = [units(rng, 300), units(rng, 300)]
    drawn = plan(made, [3.0, 1.0])
    sources = np.array([drawn.locate(unit)[0] for unit in drawn.epoch(0)])
    rate = sources.mean()
    for start in range(0, len(sources) - 40, 40):
        assert abs(sources[start : start + 40].sum() - 40 * rate) <= 3
