"""A collated batch, position by position, against the sequences that it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from logitcask.train.data.batch import collate, teacher_of

KINDS = ["head", "ragged", "samples", "sample logprobs", "random sampling"]


def stored(ids, logprobs):
    """(id, logprob) of what is no padding, in order."""
    return [(i, p) for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True) if i >= 0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_has_its_token_and_its_teacher(write_cache, kind):
    cache = write_cache("a", kind=kind, shards=1, sequences=6, tokens=(2, 25))
    sequences = list(cache)
    batch = collate(sequences)
    teacher = teacher_of(batch, 60)
    longest = max(map(len, sequences))
    assert batch["input_ids"].shape == (6, longest)
    at = 0
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        assert batch["input_ids"][row, :n].tolist() == sequence.input_ids.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (longest - n)
        for i, position in enumerate(sequence.positions.tolist()):
            assert divmod(int(batch["kept"][at]), longest) == (row, position)
            assert batch["labels"][at] == sequence.input_ids[position + 1]
            assert stored(teacher.ids[at], teacher.logprobs[at]) == stored(
                sequence.ids[i], sequence.logprobs[i]
            )
            assert teacher.tail_logprob[at] == sequence.tail_logprob[i]
            assert teacher.target_logprob[at] == sequence.target_logprob[i]
            if sequence.entropy is not None:
                assert teacher.entropy[at] == sequence.entropy[i]
            if sequence.writer_logprob is not None:
                assert teacher.writer_logprob[at] == sequence.writer_logprob[i]
            if sequence.samples is not None:
                drawn = sequence.samples.ids[i].ravel()
                assert sorted(teacher.draws.ids[at].tolist()) == sorted(
                    drawn.tolist() + [-1] * (teacher.draws.ids.shape[1] - len(drawn))
                )
            at += 1
    assert at == len(teacher) == len(batch["kept"])
    assert (teacher.draws is None) == (cache.manifest.store.tail_samples == 0)
    assert (teacher.entropy is None) == (not cache.manifest.store.entropy)
    assert (teacher.writer_logprob is None) == (not cache.manifest.store.writer_logprobs)


def test_logprobs_stay_beside_their_draws(write_cache):
    (sequence,) = write_cache("a", kind="sample logprobs", shards=1, sequences=1, tokens=[20])
    batch = collate([sequence])
    for i in range(len(sequence.positions)):
        found = stored(batch["teacher_samples"][i], batch["teacher_sample_logprobs"][i])
        samples = sequence.samples
        assert found == stored(samples.ids[i].ravel(), samples.logprobs[i].ravel())


def test_what_only_some_caches_store_is_padded_for_the_others(write_cache):
    """An entropy of a cache without one is no number, so that it cannot be taken for one."""
    plain = next(iter(write_cache("plain", kind="head", shards=1, sequences=1, tokens=[30])))
    rich = next(iter(write_cache("rich", kind="samples", shards=1, sequences=1, tokens=[20])))
    batch = collate([plain, rich])
    p = len(plain.positions)
    assert torch.isnan(batch["teacher_entropy"][:p]).all()
    assert batch["teacher_entropy"][p:].tolist() == rich.entropy.tolist()
    assert (batch["teacher_samples"][:p] == -1).all()
    assert (batch["teacher_samples"][p:] >= 0).sum() == (rich.samples.ids >= 0).sum()
    assert "teacher_sample_logprobs" not in batch


def test_a_writers_logprob_is_no_number_where_nobody_else_wrote(write_cache):
    plain = next(iter(write_cache("plain", kind="head", shards=1, sequences=1, tokens=[30])))
    kind = "writer logprobs"
    written = next(iter(write_cache("written", kind=kind, shards=1, sequences=1, tokens=[20])))
    found = collate([plain, written])["teacher_writer_logprob"]
    p = len(plain.positions)
    assert torch.isnan(found[:p]).all()
    assert found[p:].tolist() == written.writer_logprob.tolist()


def test_a_sequence_without_kept_positions_adds_none(write_cache):
    sequences = list(write_cache("a", shards=1, sequences=2, tokens=[1, 20]))
    assert len(sequences[0].positions) == 0
    batch = collate(sequences)
    assert batch["kept"].tolist() == [20 + int(i) for i in sequences[1].positions]
    np.testing.assert_array_equal(batch["labels"], sequences[1].target_ids)


def test_the_prior_is_the_teachers(write_cache):
    batch = collate(list(write_cache("a", shards=1, sequences=2)))
    prior = torch.full((60,), 1 / 60)
    teacher = teacher_of(batch, 60, prior)
    assert teacher.prior is prior
    assert teacher[:3].prior is prior
    assert math.isclose(teacher.prior.sum().item(), 1, rel_tol=1e-6)
