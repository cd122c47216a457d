"""What is left in the loss: compared with a direct computation, sequence by sequence and
position by position.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from logitcask.cache_format import UserError
from logitcask.train.config import SelectPositions
from logitcask.train.data.batch import Place, collate, teacher_of
from logitcask.train.data.mixture import Collator, Drawn, open_data
from logitcask.train.data.order import Batches
from logitcask.train.data.selection import (
    highest_entropy,
    largest_gaps,
    learnability,
    most_learnable,
    only_sequences,
    share_of,
)
from logitcask.train.losses import forward_kl
from logitcask.train.model.student import build_student
from logitcask.train.run import train


@pytest.mark.parametrize("kind", ["samples", "random sampling"])
def test_positions_of_highest_entropy(rng, write_cache, kind):
    cache = write_cache("c", kind=kind, shards=1)
    for sequence in list(cache)[:10]:
        share = float(rng.uniform(0.05, 1))
        found = highest_entropy(sequence, share)
        count = math.ceil(share * len(sequence.positions))
        ranked = sorted(
            range(len(sequence.positions)), key=lambda row: (-sequence.entropy[row], row)
        )
        rows = sorted(ranked[:count])
        for name in ("positions", "ids", "logprobs", "tail_logprob", "target_logprob", "entropy"):
            np.testing.assert_array_equal(getattr(found, name), getattr(sequence, name)[rows])
        np.testing.assert_array_equal(found.samples.ids, sequence.samples.ids[rows])
        np.testing.assert_array_equal(found.target_ids, sequence.input_ids[1:][found.positions])


def test_shares_are_rounded_up_and_never_nothing():
    assert [share_of(n, 0.5) for n in (1, 2, 3, 10)] == [1, 1, 2, 5]
    assert share_of(10, 0.3) == 3  # 10 * 0.3 is a hair above 3
    assert share_of(7, 1.0) == 7


def test_largest_gaps_of_each_sequence(rng):
    for _ in range(50):
        kept = rng.integers(1, 30, int(rng.integers(1, 9)))
        layout = [Place(0, 99, int(n), int(rng.integers(1, n + 1))) for n in kept]
        gap = rng.integers(-5, 5, kept.sum()).astype(np.float32)  # with ties
        found = largest_gaps(torch.from_numpy(gap), layout).tolist()
        expected, start = [], 0
        for place in layout:
            rows = sorted(range(start, start + place.kept), key=lambda row: (-gap[row], row))
            expected += sorted(rows[: place.chosen])
            start += place.kept
        assert found == expected


def test_a_batch_of_some_sequences_is_the_batch_of_those_alone(rng, write_cache):
    sequences = list(write_cache("c", shards=1))[:9]
    whole = Collator()([Drawn(0, [s]) for s in sequences])
    rows = sorted(rng.choice(9, int(rng.integers(1, 9)), replace=False).tolist())
    found, expected = (
        only_sequences(whole, rows),
        Collator()([Drawn(0, [sequences[row]]) for row in rows]),
    )
    assert found.keys() == expected.keys()
    assert found["layout"] == expected["layout"]
    for name, value in expected.items():
        if name == "layout":
            continue
        if value.ndim == 2 and name.startswith("teacher_"):  # wider than they need be
            value, wide = value, found[name]
            assert torch.equal(wide[:, : value.shape[1]], value), name
        else:
            assert torch.equal(found[name], value), name


def first_batches(config, caches, size, count):
    """The sequences of the first batches of training, in their order."""
    data, _ = open_data(config, caches, config.training["seed"])
    batches = iter(Batches(data.plan, size))
    return [
        [s for unit in data.__getitems__(next(batches)) for s in unit.sequences]
        for _ in range(count)
    ]


def losses_of(student, sequences):
    """For each sequence, by itself: the student's losses on the next tokens, the teacher's, and
    KL, [P] each.
    """
    found = []
    for sequence in sequences:
        batch = collate([sequence])
        with torch.no_grad():
            logits = student(input_ids=batch["input_ids"]).logits[0][batch["kept"]]
        ce = cross_entropy(logits, batch["labels"], reduction="none")
        found.append(
            (ce, -batch["teacher_target_logprob"], forward_kl(logits, teacher_of(batch, 60)))
        )
    return found


def logged(config):
    train(config)
    history = json.loads((config.output_dir / "log.json").read_text())
    return [record for record in history if "loss" in record]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_most_learnable_sequences_are_trained_on(write_cache, scratch_config, accumulate):
    """The first loss is that of the sequences with the largest mean gap in each larger batch, by
    a plain forward pass.
    """
    cache = write_cache("c", sequences=60)
    config = scratch_config(
        cache=cache.path,
        selection={"sequences": {"filter_ratio": 0.75}},
        training={
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": accumulate,
            "max_steps": 1,
        },
    )
    student = build_student(config.student, 7).eval()
    total = count = 0.0
    for sequences in first_batches(config, [cache], 16, accumulate):
        losses = losses_of(student, sequences)
        gaps = [(ce - teacher).mean().item() for ce, teacher, _ in losses]
        for at in sorted(range(16), key=lambda row: -gaps[row])[:4]:
            ce, _, kl = losses[at]
            total, count = total + (kl + 0.5 * ce).sum().item(), count + len(ce)
    record = logged(config)[0]
    assert record["positions"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("by", "packing"), [("gap", False), ("gap", True), ("entropy", False), ("entropy", True)]
)
def test_the_chosen_positions_are_trained_on(write_cache, scratch_config, by, packing):
    cache = write_cache("c", sequences=30)
    config = scratch_config(
        cache=cache.path,
        data={"packing": packing},
        selection={"positions": {"by": by, "share": 0.3}},
        training={"max_steps": 1},
    )
    student = build_student(config.student, 7).eval()
    (sequences,) = first_batches(config, [cache], 8, 1)
    total = count = 0.0
    for sequence, (ce, teacher, kl) in zip(sequences, losses_of(student, sequences), strict=True):
        value = ce - teacher if by == "gap" else torch.from_numpy(sequence.entropy)
        rows = sorted(range(len(ce)), key=lambda row: -value[row].item())[
            : math.ceil(0.3 * len(ce))
        ]
        total, count = total + (kl + 0.5 * ce)[rows].sum().item(), count + len(rows)
    record = logged(config)[0]
    assert record["positions"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


def test_positions_are_chosen_alike_however_a_batch_is_cut_up(write_cache, scratch_config):
    cache = write_cache("c", sequences=30)
    losses = []
    for batch, accumulate in ((8, 1), (1, 8)):
        config = scratch_config(
            cache=cache.path,
            selection={"positions": {"by": "gap", "share": 0.4}},
            training={
                "output_dir": f"{cache.path}-{batch}",
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulate,
            },
        )
        losses.append([record["loss"] for record in logged(config)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_learnability_is_the_mean_gap_and_ties_go_to_the_first():
    gap = torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0, 5.0])
    layout = [Place(0, 9, 2, 2), Place(0, 9, 3, 3), Place(0, 9, 1, 1)]
    scores = learnability(gap, layout)
    assert scores.tolist() == [2.0, 4 / 3, 5.0]
    assert most_learnable(np.array([1.0, 2.0, 2.0, 2.0]), 2) == [1, 2]


def test_what_cannot_be_selected_is_refused(write_cache, scratch_config):
    cache = write_cache("c", kind="head")
    with pytest.raises(UserError, match=r"by is entropy, but .* stores none") as caught:
        train(scratch_config(cache=cache.path, selection={"positions": {"by": "entropy"}}))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot have them packed"):
        scratch_config(cache=cache.path, data={"packing": True}, selection={"sequences": {}})
    with pytest.raises(ValueError, match="filter_ratio"):
        scratch_config(cache=cache.path, selection={"sequences": {"filter_ratio": 1.0}})
    assert SelectPositions(by="gap").share == 0.5
