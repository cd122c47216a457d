"""Collating: sequences without a kept position, which every cache of documents may hold, change
nothing of the others.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from logitcask.cache_format.catalog.home import Home
from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.data.packing import collate_packed
from logitcask.train.evaluation.evaluate import evaluate, teacher_reference
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES
from logitcask.train.model.student import build_student

KINDS = ["head", "ragged", "samples", "sample logprobs", "random sampling"]


@pytest.fixture(params=KINDS)
def data(request, write_cache):
    """Four sequences, of which the first and the third have one token and therefore no position
    at all.
    """
    tokens = [1, 16, 1, 12]
    cache = write_cache("c", kind=request.param, shards=1, sequences=len(tokens), tokens=tokens)
    return CachedDataset(cache, range(len(tokens)))


def test_opening_a_cache_for_training_is_its_last_use(write_cache, tmp_path, monkeypatch):
    home = Home(tmp_path / "home")
    monkeypatch.setenv("LOGITCASK_HOME", str(home.folder))
    cache = write_cache("c", shards=1, sequences=2)
    home.register(cache.path, cache.manifest)
    ((entry, _),) = home.entries()
    file = home.entries_folder / f"{entry.name}.json"
    os.utime(file, (1000, 1000))
    CachedDataset(cache, range(2))
    assert file.stat().st_mtime > 1000
    monkeypatch.setenv("LOGITCASK_HOME", str(file / "no folder"))
    CachedDataset(cache, range(2))


COLLATE = {
    "padded": collate,
    "packed": lambda sequences: collate_packed([sequences]),
    "flat": lambda sequences: collate_packed([sequences], flat=True),
}


@pytest.mark.parametrize("way", COLLATE)
@pytest.mark.parametrize("empty", [[0], [2, 0]])
def test_sequences_without_kept_positions_change_nothing_of_the_others(data, way, empty):
    batch = COLLATE[way]([*(data[index] for index in empty), data[1], data[empty[0]], data[3]])
    alone = collate([data[1], data[3]])
    names = {name for name in alone if name.startswith("teacher_") or name == "labels"}
    assert {name for name in batch if name.startswith("teacher_") or name == "labels"} == names
    for name in names:
        assert torch.equal(batch[name], alone[name]), name
    tokens = batch["input_ids"].flatten()
    assert torch.equal(tokens[batch["kept"] + 1], batch["labels"])
    same, plain = data.teacher(batch), data.teacher(alone)
    logits = torch.randn(len(same), 60)
    losses = ["forward_kl", "reverse_kl", *(["ranking"] if plain.ids.shape[1] else [])]
    for name in losses:
        assert torch.equal(LOSSES[name](logits, same), LOSSES[name](logits, plain)), name


@pytest.mark.parametrize("way", COLLATE)
def test_a_batch_of_nothing_but_such_sequences_has_no_loss_and_no_gradient(
    data, way, scratch_config
):
    batch = COLLATE[way]([data[0], data[2]])
    teacher = data.teacher(batch)
    heads = data.cache.manifest.store.top_k > 0
    drawn = data.cache.manifest.store.tail_samples > 0
    assert len(teacher) == 0
    assert bool(teacher.ids.shape[1]) == heads  # no column at all would mean a cache without heads
    assert (teacher.draws is not None) == drawn
    names = (
        {"forward_kl", "reverse_kl", "tail_aware", "ranking", "listmle"}
        if heads
        else {"forward_kl", "jsd"}
    )
    config = scratch_config(cache="c", losses=[{"name": name} for name in sorted(names)])
    student = build_student(config.student, 0)
    head = LogitsHead(student)
    inputs = {
        name: batch[name]
        for name in ("input_ids", "attention_mask", "position_ids")
        if name in batch
    }
    hidden = head.hidden(**inputs).flatten(0, 1)[batch["kept"]]
    found = head_losses(head, hidden, Objective(config).per_chunk(teacher))
    found.objective.backward()
    assert found.objective.item() == 0
    assert {name for name, value in found.values.items() if not len(value)} == names | {"ce"}
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_held_out_sequences_without_kept_positions_do_not_count(data, scratch_config):
    head = LogitsHead(build_student(scratch_config(cache="c").student, 0))
    some = HeldOut([CachedDataset(data.cache, [1, 3])])
    mixed = HeldOut([CachedDataset(data.cache, [0, 2, 1, 0, 3])])
    options = {"k": 3, "batch_size": 2, "logits_chunk": None}
    expected, found = (evaluate(head, each, **options).means() for each in (some, mixed))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert teacher_reference(mixed) == pytest.approx(teacher_reference(some))
    assert np.isfinite(list(found.values())).all()
