"""Two texts of each prompt, read together, and losses that apply to some caches of a mixture: every
batch against the same losses of the model's own whole logits, in float64.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.data.mixture import Collator, open_data
from logitcask.train.data.order import Batches
from logitcask.train.data.pairs import number_of_pairs, positions_of_pairs
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.batch_loss import BatchLoss
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES
from logitcask.train.run import train
from logitcask.train.trainers.distillation import Distillation
from tests.train.conftest import scratch

pytestmark = pytest.mark.random

HELD_OUT = {"held_out": 0.25, "max_sequences": 4}


@pytest.fixture
def caches(write_cache):
    """Documents, the teacher's texts of 20 prompts, and a student's of 18 of them and of 9 others."""
    teacher = write_cache("teacher-1", shards=2, sequences=10, tokens=(4, 30), ids="prompt")
    student = write_cache("round-1", shards=3, sequences=9, tokens=(12, 50), ids="prompt")
    text = write_cache("text", kind="head", shards=1, sequences=12)
    return text, teacher, student


@pytest.fixture
def pair_config(caches, scratch_config):
    """A config of pairs and documents; arguments change it."""

    def make(**changes):
        text, teacher, student = (cache.path for cache in caches)
        fields = {
            "cache": [
                {"cache": text, "weight": 0.3},
                {"cache": teacher, "weight": 0.5, "held_out": 0.0},
                {"cache": student, "weight": 0.5, "held_out": 0.0, "preferred": "teacher-1"},
            ],
            "losses": [
                {"name": "dpkd_sequence", "weight": 2.0},
                {"name": "forward_kl", "caches": ["text"]},
            ],
            "ce_weight": 0.0,
            "evaluation": HELD_OUT,
            **changes,
        }
        return scratch_config(**fields)

    return make


def ids_of(drawn):
    return [(unit.pair, unit.sequences[0].sequence_id) for unit in drawn if unit.pair is not None]


def test_a_batch_has_both_texts_of_a_prompt(caches, pair_config, caplog):
    data, held_out = open_data(pair_config(), list(caches), 0)
    usable = [{s.sequence_id for s in cache if len(s.positions)} for cache in caches[1:]]
    common, (one, other) = usable[0] & usable[1], (len(each) for each in usable)
    assert 10 <= len(common) < 20
    assert (
        f"{one - len(common)} of {one} sequences of {caches[1].path} and {other - len(common)} of {other} of "
        f"{caches[2].path} are left out: they have no partner"
    ) in caplog.text
    batches, seen = Batches(data.plan, 3), Counter()
    for batch in batches:
        drawn = data.__getitems__(batch)
        found = ids_of(drawn)
        assert len(drawn) == len(batch) + len(found) // 2
        for (number, preferred), name in found:
            assert ((number, not preferred), name) in found
            seen[name] += preferred
        layout = Collator()(drawn)["layout"]
        assert number_of_pairs(layout) == len(found) // 2
        assert positions_of_pairs(layout) == sum(
            len(unit.sequences[0].positions) for unit in drawn if unit.pair is not None
        )
        assert {(each.source, each.pair[1]) for each in layout if each.pair} <= {
            (1, True),
            (2, False),
        }
    assert set(seen) <= common
    # Of the positions of an epoch a pair has the weights of both its caches.
    epoch = data.plan.epoch(0)
    kept = np.concatenate([units.kept for units in data.units])[epoch]
    of_pairs = kept[epoch >= data.plan.first_unit[1]].sum() / kept.sum()
    assert of_pairs == pytest.approx(1.0 / 1.3, abs=0.06)
    assert len(held_out) == 4


def test_the_objective_and_its_gradient_are_those_of_whole_logits(caches, pair_config):
    """Of a real model in float64: two chunks of logits and more, texts beside the pairs."""
    config = pair_config(
        losses=[
            {"name": "dpkd_sequence", "weight": 2.0, "beta": 0.7, "lm": 0.3},
            {"name": "forward_kl", "caches": ["t*t"]},
            {"name": "listmle", "weight": 0.4, "k": 3, "caches": ["text", "round-?"]},
        ]
    )
    data, _ = open_data(config, list(caches), 0)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(**scratch()["config"]))
    student = student.double().eval()
    objective = Objective(config)
    units = [*data.plan.epoch(0)[:9].tolist()]
    batch = Collator()(data.__getitems__(units))
    layout = batch["layout"]
    per_pair = positions_of_pairs(layout) / number_of_pairs(layout)
    objective.positions_per_pair = per_pair
    found, values = BatchLoss(LogitsHead(student), data, objective, 7).distil(batch)

    logits = student(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.flatten(0, 1)[batch["kept"]]
    log_q = logits.log_softmax(1).gather(1, batch["labels"][:, None])[:, 0]
    log_p = batch["teacher_target_logprob"].double()
    starts = np.cumsum([0, *(place.kept for place in layout)])
    texts = {
        place.pair: slice(starts[i], starts[i + 1])
        for i, place in enumerate(layout)
        if place.pair is not None
    }
    pairs = []
    for number in {number for number, _ in texts}:
        preferred, other = texts[number, True], texts[number, False]
        gaps = [(log_q[at] - log_p[at]).mean() for at in (preferred, other)]
        sigmoid = torch.sigmoid(0.7 * (gaps[0] - gaps[1]))
        pairs.append(-torch.log(sigmoid) - 0.3 * log_q[preferred].mean())
    assert len(pairs) >= 3
    expected = 2.0 * per_pair * sum(pairs)
    for each in data.teachers(batch):
        there = logits[each.rows]
        if each.source == 0:
            expected = expected + LOSSES["forward_kl"](there, each.teacher).sum()
        if each.source in (0, 2):
            expected = expected + 0.4 * LOSSES["listmle"](there, each.teacher, k=3).sum()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    truth = torch.autograd.grad(expected, list(student.parameters()))
    found.backward()
    for weight, gradient in zip(student.parameters(), truth, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-7, atol=1e-9)
    # Each loss has values at its own positions alone.
    kept = [sum(place.kept for place in layout if place.source == n) for n in range(3)]
    assert len(values["dpkd_sequence"]) == kept[1] + kept[2]
    assert len(values["forward_kl"]) == kept[0]
    assert len(values["listmle"]) == kept[0] + kept[2]
    assert len(values["objective"]) == sum(kept)
    torch.testing.assert_close(
        values["dpkd_sequence"].mean(), sum(pairs).detach() / len(pairs), rtol=1e-9, atol=0
    )


KL = {"name": "forward_kl"}


def test_accumulated_batches_of_pairs_equal_one_batch(pair_config, tmp_path):
    """4 units at once and one after the other: the pairs are weighed alike in the whole step."""
    logs = []
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        training = {
            "output_dir": str(tmp_path / f"run-{batch}"),
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "max_steps": 4,
        }
        train(pair_config(training=training))
        history = json.loads((tmp_path / f"run-{batch}" / "log.json").read_text())
        logs.append([record for record in history if "loss" in record])
    for one, *others in zip(*logs, strict=True):
        for other in others:
            for name in ("loss", "grad_norm", "positions", "loss_dpkd_sequence"):
                assert other[name] == pytest.approx(one[name], rel=2e-4), name
            assert other.get("loss_forward_kl") == pytest.approx(
                one.get("loss_forward_kl"), rel=2e-4
            )


@pytest.mark.parametrize("packing", [False, True])
def test_losses_of_one_batch_on_different_caches_are_logged_by_their_own_positions(
    caches, scratch_config, packing, tmp_path
):
    """DistiLLM-2: the loss is the two means, weighed by the positions of their caches; in four
    batches as in one.
    """
    teacher, student = (cache.path for cache in caches[1:])
    config = scratch_config(
        cache=[
            {"cache": teacher, "weight": 0.5},
            {"cache": student, "weight": 0.5},
        ],
        losses=[
            {"name": "skew_kl", "caches": ["teacher-*"]},
            {"name": "skew_reverse_kl", "caches": ["round-*"], "weight": 3.0},
        ],
        ce_weight=0.0,
        evaluation={"held_out": 0.2},
        data={"packing": packing},
        training={"per_device_train_batch_size": 8, "max_steps": 5},
    )
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    folder = {"output_dir": str(tmp_path / "accumulated")}
    cut = config.model_copy(update={"training": {**config.training, **small, **folder}})
    logs = []
    for each in (config, cut):
        train(each)
        records = json.loads((each.output_dir / "log.json").read_text())
        logs.append([record for record in records if "loss" in record])
    for record, other in zip(*logs, strict=True):
        assert other.keys() == record.keys()
        for name in (each for each in record if each.startswith(("loss", "grad_norm", "cache"))):
            assert other[name] == pytest.approx(record[name], rel=2e-4), name
    # A short epoch of packed rows may end with rows of one cache.
    both = [each for each in logs[0] if {"loss_skew_kl", "loss_skew_reverse_kl"} <= each.keys()]
    assert len(both) >= 3
    for record in both:
        assert record["cache_teacher-1"] == pytest.approx(record["loss_skew_kl"], rel=1e-5)
        assert record["cache_round-1"] == pytest.approx(
            3 * record["loss_skew_reverse_kl"], rel=1e-5
        )
        share = (record["loss"] - record["cache_round-1"]) / (
            record["cache_teacher-1"] - record["cache_round-1"]
        )
        assert 0.2 < share < 0.8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"losses": [{"name": "forward_kl", "caches": ["tekst"]}]},
            "forward_kl has caches: tekst, but none of the caches to learn from is called so: text, teacher-1, round-1",
        ),
        (
            {"losses": [{"name": "ce", "caches": ["text"]}]},
            "no loss applies to the cache teacher-1",
        ),
        (
            {"losses": [{"name": "dpkd_sequence"}]},
            "no loss applies to the cache text; name it in the caches of a loss",
        ),
        (
            {"losses": [{"name": "dpkd_sequence", "caches": ["round-1"]}, KL]},
            "dpkd_sequence applies to the caches that are read in pairs; remove its caches",
        ),
        ({"data": {"packing": True}}, "data.packing would part the texts that are read in pairs"),
        (
            {"selection": {"sequences": {"filter_ratio": 0.5}}},
            "selection.sequences would part the texts",
        ),
        (
            {"selection": {"positions": {"by": "gap"}}},
            "selection.positions would part the texts",
        ),
        ({"losses": [{"name": "forward_kl", "caches": []}]}, "losses.0.caches"),
    ],
)
def test_configs_that_cannot_be(pair_config, changes, said):
    with pytest.raises(ValidationError) as caught:
        pair_config(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("preferred", "said"),
    [
        ({"round-1": "nobody"}, "has preferred: nobody, and no cache is called so"),
        ({"round-1": "round-1"}, "round-1 is in two pairs, or in one with itself"),
        ({"round-1": "teacher-1", "text": "teacher-1"}, "teacher-1 is in two pairs"),
        ({}, "dpkd_sequence is a loss of two texts of a prompt, but no caches are read in pairs"),
    ],
)
def test_pairs_that_cannot_be(pair_config, preferred, said):
    entries = [
        {"cache": name, **({"preferred": preferred[name]} if name in preferred else {})}
        for name in ("text", "teacher-1", "round-1")
    ]
    with pytest.raises(ValidationError) as caught:
        pair_config(cache=entries)
    assert said in str(caught.value)


def test_pairs_of_nothing_and_pairs_elsewhere_are_refused(caches, pair_config, write_cache):
    text, teacher, _ = caches
    other = write_cache("other", shards=1, sequences=5)
    entries = [
        {"cache": text.path},
        {"cache": teacher.path, "held_out": 0.0},
        {"cache": other.path, "held_out": 0.0, "preferred": "teacher-1"},
    ]
    with pytest.raises(UserError, match="no sequence of one has the id of a usable one") as caught:
        open_data(pair_config(cache=entries), [text, teacher, other], 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="which only train-student keeps in one batch"):
        Distillation(
            rows=64,
            cache=entries,
            losses=[{"name": "dpkd_sequence"}, {**KL, "caches": ["text"]}],
        )


def test_the_identity_of_a_run_has_pairs_and_caches_of_losses(pair_config):
    """And that of a run without them is as before there were any."""
    from logitcask.train.identity import identity_of_config

    kept = identity_of_config(pair_config())["losses"]
    assert [each.get("caches") for each in kept] == [None, ["text"]]
    assert "caches" not in kept[0]
