"""The data, batches and loss of a ``Distillation``, and what it refuses."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from logitcask import LOSSES, CachedDataset, Distillation, DistillationMixin, RowDecoder, collate
from logitcask.cache_format.errors import ConfigError, DamagedCacheError, UserError
from logitcask.train.trainers import transformers_trainer

pytestmark = pytest.mark.random


def model_of(**changes):
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = AutoConfig.for_model("llama", **{"max_position_embeddings": 128, **fields, **changes})
    return AutoModelForCausalLM.from_config(config)


def expected(model, cache, indices):
    """The forward KL at every position of sequences, one at a time: [positions of all]."""
    data, values = CachedDataset(cache, indices), []
    for item in range(len(indices)):
        batch = collate([data[item]])
        logits = model(batch["input_ids"]).logits[0][batch["kept"]]
        values.append(LOSSES["forward_kl"](logits, data.teacher(batch)))
    return torch.cat(values)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kinds", [["samples"], ["head", "samples"]], ids="+".join)
def test_loss_and_gradients(write_cache, kinds, packing):
    """Of a batch from the beginning and the end, which belong to different caches of a mixture."""
    caches = [write_cache(kind, kind=kind, shards=1, sequences=20) for kind in kinds]
    model = model_of()
    found = Distillation(
        model,
        cache=[{"cache": cache.path} for cache in caches],
        data={"packing": packing, "row_tokens": 60 if packing else None, "shuffle": "none"},
        evaluation={"held_out": 0.2},
    )
    ends = [0, 1, len(found.train) - 1]
    batch = found.collate([found.train[at] for at in ends])
    drawn = found._mixture.__getitems__(ends)
    parts = []
    for unit in drawn:
        cache = caches[unit.source]
        names = {sequence.sequence_id: index for index, sequence in enumerate(cache)}
        parts.append(expected(model, cache, [names[s.sequence_id] for s in unit.sequences]))
    values = torch.cat(parts)
    values.mean().backward()
    wanted = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    loss = found.loss(model(**found.inputs(batch)), batch)
    loss.backward()
    assert loss.item() == pytest.approx(values.mean().item(), rel=1e-5)
    for weight, gradient in zip(model.parameters(), wanted, strict=True):
        assert (weight.grad - gradient).norm() < 1e-4 * gradient.norm()
    whole = found.loss(model(**found.inputs(batch)).logits, batch, 1000)
    assert whole.item() == pytest.approx(values.sum().item() / 1000, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_labels_are_those_of_transformers(write_cache, packing):
    """The model's own loss with the batch's labels is the cross-entropy at the kept positions, and
    the labels that a trainer counts are as many.
    """
    cache = write_cache("c")
    model = model_of()
    found = Distillation(
        model, cache=cache.path, losses=[{"name": "ce"}], data={"packing": packing}
    )
    batch = found.collate([found.train[at] for at in range(5)])
    assert (batch["labels"][:, 1:] != -100).sum() == len(batch["kept"])
    assert (batch["labels"] != -100).sum() == len(batch["kept"])
    inputs = found.inputs(batch)
    own = model(**inputs, labels=batch["labels"]).loss
    assert found.loss(model(**inputs), batch).item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [None, 50], ids=["all ids", "fewer ids"])
@pytest.mark.parametrize(
    "kind", ["head", "samples", "sample logprobs", "writer logprobs", "chosen ids"]
)
def test_decoded_rows_are_batches_too(write_cache, kind, rows):
    """Also for a student that lacks some of the teacher's ids, which are left out."""
    cache = write_cache("c", kind=kind, tokens=(4, 9))
    found = Distillation(rows=rows, cache=cache.path, data={"shuffle": "none"})
    names = {sequence.sequence_id: index for index, sequence in enumerate(cache)}
    items = [found.train[at] for at in (3, 0, 8)]
    drawn = found._mixture.__getitems__([item["unit"] for item in items])
    decode = RowDecoder(cache.path)
    decoded = [
        {name: values[0] for name, values in decode(packed_row(cache, names[id_of(unit)])).items()}
        for unit in drawn
    ]
    ours, theirs = found.collate(items), found.collate(decoded)
    assert bool((ours["teacher_ids"] >= 50).any()) == (rows is None)
    assert set(ours) == set(theirs)
    if "teacher_samples" in ours:  # padding between the sets of a position is gone in rows
        drawn, again = (
            [sorted(row[row >= 0].tolist()) for row in batch.pop("teacher_samples")]
            for batch in (ours, theirs)
        )
        assert drawn == again
        assert any(drawn)
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert theirs[name] == value


def id_of(drawn):
    (sequence,) = drawn.sequences
    return sequence.sequence_id


def packed_row(cache, index):
    """The packed columns of one sequence, as ``datasets`` gives them."""
    for shard in range(len(cache.manifest.shards)):
        for batch in cache.iter_batches(shard):
            if index < len(batch):
                return batch.batch.slice(index, 1).to_pydict()
            index -= len(batch)
    raise IndexError


def test_rows_of_something_else(write_cache):
    cache, other = write_cache("c"), write_cache("d", kind="head")
    decode, row = RowDecoder(cache.path), packed_row(cache, 0)
    with pytest.raises(UserError, match=r"no column sequence_id \(found text\), so they are not"):
        decode({"text": ["a"]})
    with pytest.raises(UserError, match="these rows have no column"):
        decode(packed_row(other, 0))
    with pytest.raises(UserError, match="these rows are not packed rows of"):
        decode({**row, "positions": [["a"]]})
    with pytest.raises(DamagedCacheError, match="have nulls"):
        decode({**row, "positions": [None]})
    with pytest.raises(DamagedCacheError, match="positions are not those of its loss mask"):
        decode({**row, "positions": [[p + 1 for p in row["positions"][0]]]})
    found = Distillation(cache=cache.path)
    with pytest.raises(UserError, match=r"this row has no column loss_mask .*RowDecoder"):
        found.collate([{"sequence_id": "a", "input_ids": [1]}])
    two = Distillation(cache=[{"cache": cache.path}, {"cache": other.path}])
    decoded = {name: values[0] for name, values in decode(row).items()}
    with pytest.raises(UserError, match="does not say which of 2 caches it is of"):
        two.collate([decoded])


def test_held_out_items(write_cache):
    caches = [write_cache("a"), write_cache("b", kind="head")]
    found = Distillation(
        cache=[{"cache": cache.path} for cache in caches],
        evaluation={"held_out": 0.2, "max_sequences": None},
    )
    learnt = {
        s.sequence_id
        for d in found._mixture.__getitems__(range(len(found.train)))
        for s in d.sequences
    }
    everything = {sequence.sequence_id for cache in caches for sequence in cache}
    items = [found.held_out[at] for at in range(len(found.held_out))]
    read = found._read(items)
    held = [sequence.sequence_id for drawn in read for sequence in drawn.sequences]
    assert all(name.startswith("ab"[drawn.source]) for name, drawn in zip(held, read, strict=True))
    usable = {s.sequence_id for c in caches for s in c if len(s.positions)}
    assert learnt | set(held) == usable <= everything
    assert not learnt & set(held)
    assert len(found.collate(items)["layout"]) == len(items)


def test_workers_read_the_same(write_cache):
    cache = write_cache("c")
    found = Distillation(cache=cache.path)
    again = pickle.loads(pickle.dumps(found))
    items = [found.train[at] for at in (4, 2)]
    ours, theirs = found.collate(items), again.collate(items)
    assert torch.equal(ours["teacher_ids"], theirs["teacher_ids"])
    assert [item["length"] for item in items] == ours["attention_mask"].sum(1).tolist()


def test_weights_with_a_schedule(write_cache):
    cache = write_cache("c")
    model = model_of()
    ce = {"start": 0.0, "end": 2.0, "ratio": 1.0}
    found = Distillation(model, cache=cache.path, ce_weight=ce)
    batch = found.collate([found.train[0], found.train[1]])
    outputs = model(**found.inputs(batch))
    with pytest.raises(UserError, match="a weight of the losses has a schedule: call begin_step"):
        found.loss(outputs, batch)
    values = []
    for step in (0, 5, 10):
        found.begin_step(step, 10)
        values.append(found.loss(outputs, batch).item())
    plain = Distillation(model, cache=cache.path).loss(outputs, batch).item()
    assert values[0] == pytest.approx(plain, rel=1e-6)
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"selection": {}},
            "a Distillation has no selection; it has the fields cache, trusted_keys",
        ),
        ({"losses": [{"name": "nothing"}]}, "options: losses"),
        ({"losses": [{"name": "taid"}]}, "taid follows the student from step to step"),
        ({"losses": [{"name": "ranking", "k": 50}]}, "asks for the teacher's top 50"),
        ({"data": {"group_by_length": True}}, "a matter of the other trainer's sampler"),
        ({"evaluation": {"cache": "other"}}, "evaluation.cache is for train-student"),
        ({"cache": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refusals(write_cache, fields, message):
    with pytest.raises(UserError, match=message) as found:
        Distillation(model_of(), **{"cache": write_cache("c").path, **fields})
    assert "\n" not in str(found.value)


def test_other_refusals(write_cache):
    cache = write_cache("c")
    with pytest.raises(ConfigError, match="caches with weights need the order of train-student"):
        Distillation(cache=[{"cache": cache.path, "weight": 1}])
    with pytest.raises(UserError, match="a micro-batch of 0 items"):
        Distillation(cache=cache.path).micro_batches(0)
    with pytest.raises(UserError, match="reads at most 32 tokens"):
        Distillation(model_of(max_position_embeddings=32), cache=cache.path)
    with pytest.raises(UserError, match="the student predicts 58 ids"):
        Distillation(model_of(vocab_size=58), cache=cache.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packing": True}, "packing is set in the trainer's arguments"),
        ({"padding_free": True}, "padding_free is set in the trainer's arguments"),
        ({"loss_type": "dft"}, "loss_type is dft"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, arguments, message):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name, value in arguments.items():
        setattr(args, name, value)
    with pytest.raises(UserError, match=message):
        transformers_trainer._refuse(args)


def test_a_trainer_without_a_model_or_a_distillation(write_cache, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    found = Distillation(cache=write_cache("c").path)
    with pytest.raises(UserError, match="the model is the name a/b; load it first"):
        DistillationMixin("a/b", args, distillation=found)
    with pytest.raises(UserError, match="the trainer has no distillation; give distillation="):
        DistillationMixin(model_of(), args)


def test_data_sets_of_numbers(write_cache):
    found = Distillation(cache=write_cache("c").path)
    assert found.train[-1] == found.train[len(found.train) - 1]
    with pytest.raises(IndexError, match="item 1000000 of a data set with"):
        _ = found.train[1_000_000]
    assert found.train.as_datasets()[3] == found.train[3]
    assert found.held_out.as_datasets()[0] == found.held_out[0] == {"held_out": 0}
    lengths = [found.train[at]["length"] for at in range(len(found.train))]
    drawn = found._mixture.__getitems__(range(len(found.train)))
    assert lengths == [len(unit.sequences[0]) for unit in drawn]
    assert np.std(lengths) > 0
