"""Mixtures of caches: every position with its own cache's teacher, shares as asked for, losses
told apart.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from logitcask.cache_format import CacheReader, UserError
from logitcask.train.config import TrainConfig
from logitcask.train.data.batch import collate, teacher_of
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.held_out import read_index
from logitcask.train.data.mixture import Collator, Drawn, Mixture, by_source, open_data
from logitcask.train.data.order import Plan, single_units
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective
from logitcask.train.model.student import build_student
from logitcask.train.run import train

KINDS = ["head", "samples", "random sampling", "sample logprobs"]
"""Caches that differ in everything: no draws, several sets, no head, draws with logprobs and no
entropy.
"""


def mixture(caches, packing=False):
    ones = [np.ones(len(cache), np.int64) for cache in caches]
    units = [single_units(one, one, one, one) for one in ones]
    plan = Plan(units, None, seed=0, shuffle="all", window=1, epoch="first")
    data = [CachedDataset(cache, list(range(len(cache)))) for cache in caches]
    return Mixture(data, [cache.path for cache in caches], units, plan)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixed_batch_is_the_sum_of_its_caches(rng, write_cache, scratch_config, packed):
    """Objective, gradient and values are those of each cache's sequences as a batch alone,
    whatever it stores.
    """
    caches = [
        write_cache(kind.replace(" ", "-"), kind=kind, shards=1, sequences=6) for kind in KINDS
    ]
    config = scratch_config(cache="unused", ce_weight=0.5)
    objective = Objective(config)
    head = LogitsHead(build_student(config.student, 3))
    data = mixture(caches)
    chosen = rng.permutation(
        [(source, index) for source in range(len(caches)) for index in range(6)]
    )
    drawn = [Drawn(int(source), [caches[source][int(index)]]) for source, index in chosen]
    batch = Collator(packed=packed)(drawn)
    weights = dict(head.backbone.named_parameters())

    def run(inputs, per_chunk):
        names = {"input_ids", "attention_mask", "position_ids"} & set(inputs)
        hidden = head.hidden(**{name: inputs[name] for name in names}).flatten(0, 1)[inputs["kept"]]
        found, values = head_losses(head, hidden, per_chunk, chunk_size=17)
        gradients = torch.autograd.grad(found, list(weights.values()))
        return found.item(), gradients, values

    found, gradients, values = run(batch, by_source(objective.per_chunk, data.teachers(batch)))
    expected, sums, parts = 0.0, [torch.zeros_like(w) for w in weights.values()], []
    for source, cache in enumerate(caches):
        own = collate([cache[int(index)] for number, index in chosen if number == source])
        prior = (
            None if cache.prior is None else torch.from_numpy(cache.prior.probabilities()).float()
        )
        teacher = teacher_of(own, 60, prior)
        loss, own_gradients, own_values = run(own, objective.per_chunk(teacher))
        expected += loss
        sums = [a + b for a, b in zip(sums, own_gradients, strict=True)]
        parts.append(own_values["forward_kl"])
    assert np.isfinite(found)
    assert found == pytest.approx(expected, rel=1e-5)
    assert values["objective"].sum().item() == pytest.approx(found, rel=1e-5)
    torch.testing.assert_close(values["forward_kl"], torch.cat(parts), rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, sums, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item())


def test_losses_of_each_cache_are_logged_and_make_up_the_loss(write_cache, scratch_config):
    a, b = (
        write_cache("a", kind="samples", tokens=(20, 40)),
        write_cache("b", kind="head", tokens=(4, 12)),
    )
    entries = [{"cache": a.path, "weight": 3.0}, {"cache": b.path, "weight": 1.0, "name": "short"}]
    metrics, _ = train(
        scratch_config(cache=entries, training={"max_steps": 30, "per_device_train_batch_size": 16})
    )
    history = json.loads((scratch_config(cache="c").output_dir / "log.json").read_text())
    records = [record for record in history if "loss" in record]
    shares = [
        (record["loss"] - record["cache_short"]) / (record["cache_a"] - record["cache_short"])
        for record in records
    ]
    for share, record in zip(shares, records, strict=True):
        assert record["loss"] == pytest.approx(
            share * record["cache_a"] + (1 - share) * record["cache_short"]
        )
        assert 0 < share < 1
    assert np.median(shares) == pytest.approx(0.75, abs=0.06)
    assert metrics["kl_tail"] == "ghost"  # the least that any of the caches has
    assert metrics["train_sequences"] > 200
    assert a.manifest.fingerprint in metrics["cache"]["fingerprint"]
    assert all(0 <= record["data_wait"] < 1 for record in records)


def test_held_out_sequences_come_from_all_caches(write_cache, scratch_config):
    a, b = write_cache("a"), write_cache("b", shards=1)
    config = scratch_config(
        cache=[{"cache": a.path}, {"cache": b.path}],
        evaluation={"held_out": 0.3, "max_sequences": 8},
    )
    data, held_out = open_data(config, [a, b], 0)
    there = [int(read_index(cache, 0.3).held_out.sum()) for cache in (a, b)]
    of_a = round(8 * there[0] / sum(there))
    assert [len(part) for part in held_out.parts] == [of_a, 8 - of_a]
    assert 0 < of_a < 8
    assert [s.sequence_id for s in held_out] == [
        part[i].sequence_id for part in held_out.parts for i in range(len(part))
    ]
    used = {
        data.sources[n].cache[int(i)].sequence_id for n in range(2) for i in data.sources[n].indices
    }
    assert not used & {s.sequence_id for s in held_out}
    whole = list(data.plan.epoch(0))
    assert sorted(whole) == list(range(sum(len(source) for source in data.sources)))


def test_caches_of_different_tokenizers_are_refused(write_cache, scratch_config):
    a, b = write_cache("a"), write_cache("b", vocab="1" * 64)
    with pytest.raises(UserError) as caught:
        train(scratch_config(cache=[{"cache": a.path}, {"cache": b.path}]))
    assert "was made with another tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_weight_is_another_run(write_cache, scratch_config):
    a, b = write_cache("a"), write_cache("b")

    def entries(weight):
        return [{"cache": a.path, "weight": weight}, {"cache": b.path, "weight": 1.0}]

    train(scratch_config(cache=entries(1.0), training={"max_steps": 1}))
    with pytest.raises(UserError, match=r"weight.*begin afresh with --restart"):
        train(scratch_config(cache=entries(2.0), training={"max_steps": 1}))


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        ([], "list of caches is empty"),
        ([{"cache": "x/a"}, {"cache": "y/a"}], "a name of its own"),
        ([{"cache": "a", "weight": 1}, {"cache": "b"}], "all of them one, or none"),
        ([{"cache": "a", "weight": 0}], "a cache has weight 0"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(scratch_config, cache, match):
    with pytest.raises(ValueError, match=match):
        scratch_config(cache=cache)


def test_one_cache_in_a_list_is_that_cache(write_cache, scratch_config):
    cache = write_cache("c")
    losses = []
    for number, form in enumerate((cache.path, [{"cache": cache.path}])):
        config = scratch_config(cache=form, training={"output_dir": f"{cache.path}-{number}"})
        assert isinstance(config, TrainConfig)
        losses.append(train(config)[0]["final_loss"])
    assert losses[0] == losses[1]
    assert isinstance(cache, CacheReader)
