"""A plan: shards of whole sequences in their order, read back as they were written."""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.cache_format import UserError
from logitcask.cache_format.manifest import DataHash
from logitcask.cache_format.schema import BATCH_BYTES
from logitcask.pipeline.builder import plan as plans
from logitcask.pipeline.builder.plan import Plan, PlannedShard, read_sequences, write_sequences
from logitcask.pipeline.types import Sequence


@pytest.fixture
def sequences(rng):
    def make(count=200, longest=30):
        found = []
        for number in range(count):
            mask = rng.random(int(rng.integers(1, longest + 1))) < 0.6
            mask[0] = False
            ids = rng.integers(0, 1000, len(mask)).astype(np.int32)
            found.append(Sequence(f"s{number}", ids, mask))
        return found

    return make


def test_shards_hold_as_many_whole_sequences_as_fit(tmp_path, sequences):
    given = sequences()
    shards, digest = write_sequences(tmp_path, iter(given), 100)
    at, expected = 0, DataHash()
    for number, shard in enumerate(shards):
        read = list(read_sequences(tmp_path, number))
        for found, original in zip(read, given[at : at + len(read)], strict=True):
            assert found.sequence_id == original.sequence_id
            np.testing.assert_array_equal(found.input_ids, original.input_ids)
            np.testing.assert_array_equal(found.loss_mask, original.loss_mask)
            expected.update(original.sequence_id, original.input_ids, original.loss_mask)
        at += len(read)
        tokens = sum(len(each.input_ids) for each in read)
        positions = sum(len(each.positions()) for each in read)
        assert shard == PlannedShard(sequences=len(read), tokens=tokens, positions=positions)
        assert tokens <= 100
        if at < len(given):
            assert tokens + len(given[at].input_ids) > 100
    assert at == len(given)
    assert digest == expected.hexdigest()


@pytest.mark.parametrize(("last", "shards"), [(40, [2]), (41, [1, 1])])
def test_a_shard_is_full_to_the_last_token(tmp_path, last, shards):
    given = [
        Sequence(f"{n}", np.zeros(n, np.int32), np.arange(n, dtype=np.int32) > 0)
        for n in (60, last)
    ]
    assert [each.sequences for each in write_sequences(tmp_path, given, 100)[0]] == shards


def test_a_sequence_longer_than_a_shard_is_one(tmp_path, sequences):
    shards, _ = write_sequences(tmp_path, sequences(3, longest=30), 1)
    assert [shard.sequences for shard in shards] == [1, 1, 1]


def test_what_is_left_of_an_earlier_plan_goes(tmp_path, sequences):
    write_sequences(tmp_path, sequences(), 50)
    shards, _ = write_sequences(tmp_path, sequences(5), 1000)
    assert len(list((tmp_path / "plan").iterdir())) == len(shards) == 1


def test_no_sequences_are_no_shards(tmp_path):
    assert write_sequences(tmp_path, [], 100)[0] == ()


def test_no_more_shards_than_a_manifest_lists(tmp_path, sequences, monkeypatch):
    monkeypatch.setattr(plans, "MAX_SHARDS", 3)
    assert len(write_sequences(tmp_path, sequences(3), 1)[0]) == 3
    with pytest.raises(UserError, match="more than 3, which a manifest cannot list"):
        write_sequences(tmp_path, sequences(4), 1)


def test_a_plan_that_another_version_wrote_is_refused(tmp_path):
    assert Plan.load(tmp_path) is None
    (tmp_path / "plan.json").write_text('{"request": {}}')
    with pytest.raises(UserError, match="was not written by this version of logitcask"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("entries", [1.0, 40.0, 400.0])
def test_record_batches_are_of_about_one_size(entries):
    shard = PlannedShard(sequences=10_000, tokens=1_000_000, positions=900_000)
    rows = shard.sequences_per_batch(entries)
    a_sequence = (5 * 1_000_000 + 20 * 900_000 + 3 * entries * 900_000) / 10_000
    assert abs(rows * a_sequence - BATCH_BYTES) <= a_sequence / 2


def test_a_record_batch_has_one_row_at_least_and_no_more_than_there_are():
    huge = PlannedShard(sequences=2, tokens=2_000_000, positions=1_999_998)
    assert huge.sequences_per_batch(100.0) == 1
    assert PlannedShard(sequences=3, tokens=30, positions=27).sequences_per_batch(1.0) == 3
    assert PlannedShard(sequences=3, tokens=30, positions=0).sequences_per_batch(0.0) == 3
