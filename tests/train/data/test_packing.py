"""Packed sequences are read as they are read apart: the same loss, the same gradient, and
nothing shifts.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from logitcask.cache_format import UserError
from logitcask.train.data.batch import collate, teacher_of
from logitcask.train.data.order import single_units
from logitcask.train.data.packing import collate_packed, fill_rows, packed_units
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.losses import LOSSES
from logitcask.train.model.isolation import check_isolation, wants_flat
from logitcask.train.run import train

pytestmark = pytest.mark.random

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
STUDENTS = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    "gemma2": {"sliding_window": 6},
}


def student(model_type, attention="sdpa", **fields):
    config = AutoConfig.for_model(model_type, **SMALL, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def objective_and_gradients(model, batch, vocab_size):
    """Sum over kept positions of KL + ranking + CE, each position with a weight of its own, so
    that a mix-up shows.
    """
    head, teacher = LogitsHead(model), teacher_of(batch, vocab_size)

    def per_chunk(logits, rows):
        part = teacher[rows]
        weight = 1 + part.target_logprob.sin()
        loss = LOSSES["forward_kl"](logits, part) + LOSSES["ranking"](logits, part, k=3)
        loss = loss + torch.nn.functional.cross_entropy(logits, part.target_ids, reduction="none")
        return weight * loss, {}

    inputs = {
        n: v
        for n, v in batch.items()
        if n in ("input_ids", "attention_mask", "position_ids") or "_q" in n or "_k" in n
    }
    inputs = {n: v for n, v in inputs.items() if not n.startswith("teacher")}
    hidden = head.hidden(**inputs).flatten(0, 1)[batch["kept"]]
    model.zero_grad()
    objective = head_losses(head, hidden, per_chunk, chunk_size=50).objective
    objective.backward()
    return objective.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        assert (found[1][name] - gradient).abs().max().item() <= 1e-5 * max(scale, 1e-3), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", STUDENTS)
def test_packed_equals_unpacked(rng, write_cache, model_type, attention):
    cache = write_cache("c", kind=str(rng.choice(["head", "samples"])), shards=1, sequences=12)
    sequences = [cache[i] for i in range(12)]
    model = student(model_type, attention, **STUDENTS[model_type]).eval()
    expected = objective_and_gradients(model, collate(sequences), 60)
    rows = fill_rows(np.array([len(s) for s in sequences]), 60)
    assert len(rows) < 10
    packed = collate_packed([[sequences[i] for i in row] for row in rows])
    check_isolation(LogitsHead(model))
    assert_equal(objective_and_gradients(model, packed, 60), expected)


def varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **kwargs,
):
    """What flash attention's varlen kernel computes, from the borders that it is given."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    if cu_seq_lens_q is None:
        borders = [0, query.shape[2]]
    else:
        borders = cu_seq_lens_q.tolist()
        assert max_length_q == max(np.diff(borders))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def test_flash_attention_gets_one_row_with_its_borders(rng, write_cache, monkeypatch):
    """Transformers' own flash path up to the kernel, which needs a GPU."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", varlen)
    sequences = list(write_cache("c", shards=1, sequences=7))
    model = student("llama").eval()
    expected = objective_and_gradients(model, collate(sequences), 60)
    model.config._attn_implementation = "flash_attention_2"
    head = LogitsHead(model)
    assert wants_flat(head)
    check_isolation(head)
    packed = collate_packed([sequences[:3], sequences[3:]], flat=True)
    assert packed["input_ids"].shape == (1, sum(map(len, sequences)))
    assert_equal(objective_and_gradients(model, packed, 60), expected)


def test_nothing_shifts(rng, write_cache):
    sequences = list(write_cache("c", shards=1, sequences=9))
    for flat in (False, True):
        packed = collate_packed([sequences[:2], sequences[2:6], sequences[6:]], flat=flat)
        tokens, kept = packed["input_ids"].flatten(), packed["kept"]
        assert torch.equal(tokens[kept + 1], packed["labels"])
        assert torch.equal(
            packed["position_ids"].flatten()[kept],
            torch.cat([torch.from_numpy(s.positions) for s in sequences]),
        )
        apart = collate(sequences)
        for name in apart:
            if name.startswith("teacher_"):
                assert torch.equal(packed[name], apart[name]), name


def test_rows_hold_every_sequence_once_and_are_nearly_full(rng):
    capacity = int(rng.integers(50, 600))
    tokens = rng.integers(2, capacity + 1, int(rng.integers(1, 2000)))
    rows = fill_rows(tokens, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(tokens)))
    filled = np.array([tokens[row].sum() for row in rows])
    assert filled.max() <= capacity
    assert (filled <= capacity / 2).sum() <= 1
    short = rng.integers(2, capacity // 4, 2000)
    assert short.sum() / (len(fill_rows(short, capacity)) * capacity) > 0.97
    with pytest.raises(ValueError, match="rows of"):
        fill_rows(np.array([3, capacity + 1]), capacity)


@pytest.mark.parametrize("shuffle", ["all", "shards", "batches", "none"])
def test_packed_rows_keep_to_their_shard_where_they_must(rng, shuffle):
    shard = np.sort(rng.integers(0, 4, 300)).astype(np.int32)
    block = np.arange(300) // 10 + 1000 * shard
    single = single_units(rng.integers(2, 60, 300), rng.integers(1, 30, 300), shard, block)
    rows = packed_units(single, 100, seed=(1,), shuffle=shuffle)
    assert sorted(rows.members.tolist()) == list(range(300))
    for row in range(len(rows)):
        members = rows[row]
        assert rows.tokens[row] == single.tokens[members].sum() <= 100
        assert rows.kept[row] == single.kept[members].sum()
        if shuffle in ("shards", "batches"):
            assert set(shard[members]) == {rows.shard[row]}
        if shuffle == "batches":
            assert set(block[members]) == {rows.block[row]}


def test_training_packed_is_training_unpacked(write_cache, scratch_config):
    """All of a small cache as one batch: the same first loss and the same weights after a step,
    packed or not.
    """
    cache = write_cache("c", shards=1, sequences=30)
    losses = []
    for packing in (False, True):
        config = scratch_config(
            cache=cache.path,
            data={"packing": packing},
            training={
                "output_dir": f"{cache.path}-run-{packing}",
                "per_device_train_batch_size": 30,
                "max_steps": 3,
            },
        )
        metrics, _ = train(config)
        losses.append((metrics["final_loss"], metrics["after"]["ce"], metrics["positions_trained"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_too_short_are_refused_in_one_line(write_cache, scratch_config):
    cache = write_cache("c", shards=1)
    with pytest.raises(
        UserError, match=r"data.row_tokens is 10, but .* has a sequence of \d\d tokens"
    ) as caught:
        train(scratch_config(cache=cache.path, data={"packing": True, "row_tokens": 10}))
    assert "\n" not in str(caught.value)


def test_an_attention_that_is_not_there_is_one_line(write_cache, scratch_config):
    cache = write_cache("c", shards=1)
    with pytest.raises(UserError, match=r"student\.attention is 'no-such-attention'") as caught:
        train(
            scratch_config(
                cache=cache.path,
                student={
                    **scratch_config(cache="c").student.model_dump(),
                    "attention": "no-such-attention",
                },
            )
        )
    assert "\n" not in str(caught.value)


def test_a_restart_that_cannot_pack_removes_nothing(write_cache, scratch_config, monkeypatch):
    cache = write_cache("c", shards=1)
    train(scratch_config(cache=cache.path, training={"max_steps": 1}))

    def refuse(head):
        raise UserError("does not keep packed sequences apart")

    monkeypatch.setattr("logitcask.train.loop.trainer.check_isolation", refuse)
    with pytest.raises(UserError, match="apart"):
        train(
            scratch_config(cache=cache.path, data={"packing": True}, training={"max_steps": 1}),
            restart=True,
        )
    assert train(scratch_config(cache=cache.path, training={"max_steps": 1}))[1]


def test_batches_larger_than_an_epoch_are_refused_where_the_last_is_dropped(
    write_cache, scratch_config
):
    cache = write_cache("c", shards=1)
    training = {"per_device_train_batch_size": 500, "dataloader_drop_last": True}
    with pytest.raises(UserError, match=r"an epoch has \d+ sequences or rows"):
        train(scratch_config(cache=cache.path, training=training))
