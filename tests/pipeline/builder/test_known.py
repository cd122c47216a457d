"""Known rows: copied as they are, and refused if they are not what they were."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from logitcask.cache_format import CacheReader
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.pipeline.builder.known import Known, KnownRowsLostError, same_numbers
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.types import Sequence


@pytest.fixture
def cache(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} of text"}) + "\n" for i in range(5)))
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(rows)},
        audit={"sequences": 0},
        log=False,
        output=tmp_path / "cache",
    )
    build(config)
    return CacheReader(str(tmp_path / "cache"))


def planned(row, name="other") -> Sequence:
    return Sequence(name, row.input_ids, row.loss_mask)


@pytest.fixture
def known(cache, tmp_path):
    """Two shards: rows 4 and 2, then a missing one and row 0."""
    places = [np.array([[0, 4], [0, 2]]), np.array([[-1, 0], [0, 0]])]
    (tmp_path / "build").mkdir()
    Known.save(tmp_path / "build", [cache], places, 0)
    return Known.load(tmp_path / "build")


def test_rows_are_those_of_the_cache_under_the_plans_name(cache, known):
    rows = known.rows(0)
    for row, index in ((0, 4), (1, 2)):
        assert row in rows
        found, stored = rows.get(row, planned(cache[index])), cache[index]
        assert found.sequence_id == "other"
        for name in ("ids", "logprobs", "tail_logprob", "target_logprob", "entropy"):
            np.testing.assert_array_equal(getattr(found, name), getattr(stored, name))
        np.testing.assert_array_equal(found.samples.ids, stored.samples.ids)
    assert [row in known.rows(1) for row in (0, 1)] == [False, True]


def test_what_is_known_of_all(cache, known, tmp_path):
    assert known.where == (str(tmp_path / "cache"),)
    assert (known.sequences, known.complete) == (3, False)
    np.testing.assert_array_equal(known.prior().steps, cache.prior.steps)
    assert known.teacher == cache.manifest.teacher
    whole = [np.array([[0, 0]])]
    assert Known.save(tmp_path / "build", [cache], whole, 0).complete
    without = Known.save(tmp_path / "build", [cache], whole, None)
    assert not without.complete
    assert without.prior() is None


def test_another_text_is_refused(cache, known):
    with pytest.raises(KnownRowsLostError, match="sequence 4 is not 'other'"):
        known.rows(0).get(0, planned(cache[3]))
    mask = cache[4].loss_mask.copy()
    mask[2] = False
    with pytest.raises(KnownRowsLostError, match="sequence 4 is not 'x'"):
        known.rows(0).get(0, Sequence("x", cache[4].input_ids, mask))


def test_another_cache_in_the_place_is_refused(cache, known, tmp_path):
    row = planned(cache[4])
    derive(str(tmp_path / "cache"), tmp_path / "small", DeriveOptions(top_k=2))
    shutil.rmtree(tmp_path / "cache")
    shutil.move(tmp_path / "small", tmp_path / "cache")
    with pytest.raises(KnownRowsLostError, match="another cache is there now"):
        known.rows(0).get(0, row)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(KnownRowsLostError, match="holds no cache"):
        known.rows(0).get(0, Sequence("x", np.zeros(1, np.int32), np.zeros(1, np.bool_)))


def test_a_damaged_shard_is_refused(cache, known, tmp_path):
    shard = tmp_path / "cache" / cache.manifest.shards[0].path
    row = planned(cache[4])
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    with pytest.raises(KnownRowsLostError, match="is damaged"):
        known.rows(0).get(0, row)


def test_another_teacher_is_refused(cache, known):
    teacher = cache.manifest.teacher
    known.check_teacher(teacher)
    known.check_teacher(teacher.model_copy(update={"route": "other"}))
    with pytest.raises(KnownRowsLostError, match=r"scored by .* and this teacher is"):
        known.check_teacher(teacher.model_copy(update={"engine": "other"}))


def test_the_same_weights_in_another_place_are_the_same(cache):
    one = cache.manifest.teacher
    assert not same_numbers(one, one.model_copy(update={"model": "elsewhere"}))
    one = one.model_copy(update={"weights_sha256": "0" * 64})
    assert same_numbers(one, one.model_copy(update={"model": "elsewhere"}))


def test_nothing_is_known_after_forgetting(known, tmp_path):
    Known.forget(tmp_path / "build")
    assert Known.load(tmp_path / "build") is None
    Known.forget(tmp_path / "build")
