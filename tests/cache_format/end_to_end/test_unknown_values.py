"""Caches that lack tail masses or values of targets: stored, read, and never taken for numbers
(SPEC.md section 5).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import (
    CacheReader,
    CacheWriter,
    DamagedCacheError,
    UnsupportedCacheError,
    UserError,
)
from logitcask.cache_format.manifest import Manifest, StoreSettings
from logitcask.cache_format.schema import UNKNOWN_VALUES
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.validation import validate
from tests.cache_format.conftest import make_header, make_sequence

UNKNOWN = [("tail",), ("targets",), ("ranks",), ("tail", "targets", "ranks")]


def header_of(unknown):
    header = make_header()
    store = header.store.model_copy(update={"unknown": unknown})
    return header.model_copy(update={"store": store, "required_features": store.features})


def forget(sequence, unknown):
    """The sequence without these values at every other position; tails at all."""
    some = np.arange(len(sequence.positions)) % 2 == 0
    changes = {}
    if "tail" in unknown:
        changes["tail_logprob"] = np.full_like(sequence.tail_logprob, np.nan)
    if "targets" in unknown:
        changes["target_logprob"] = np.where(some, np.nan, sequence.target_logprob)
    if {"targets", "ranks"} & set(unknown):
        changes["target_rank"] = np.where(some, -1, sequence.target_rank).astype(np.int32)
    return dataclasses.replace(sequence, **changes)


@pytest.fixture
def cache(rng, tmp_path):
    def make(unknown, folder="cache"):
        sequences = [forget(make_sequence(rng, f"s{n}"), unknown) for n in range(5)]
        with CacheWriter(tmp_path / folder) as writer:
            header = writer.begin(header_of(unknown))
            with writer.shard(0) as shard:
                for sequence in sequences:
                    shard.append(sequence)
            writer.finish(header, 1)
        return tmp_path / folder, sequences

    return make


@pytest.mark.parametrize("unknown", UNKNOWN, ids="-".join)
def test_they_are_read_as_what_they_are(unknown, cache):
    folder, sequences = cache(unknown)
    reader = CacheReader(folder)
    assert reader.manifest.store.unknown == unknown
    for one, other in zip(sequences, reader, strict=True):
        np.testing.assert_array_equal(np.isnan(one.tail_logprob), np.isnan(other.tail_logprob))
        np.testing.assert_array_equal(one.target_rank, other.target_rank)
        np.testing.assert_allclose(one.target_logprob, other.target_logprob, atol=2**-9 + 1e-6)
    totals = reader.manifest.statistics
    assert (totals.teacher_ce is None) == bool({"tail", "targets"} & set(unknown))
    assert (totals.head_mass is None) == ("tail" in unknown)


def test_other_caches_are_written_as_before(cache):
    folder, _ = cache(())
    text = json.loads((folder / "manifest.json").read_text())
    assert "unknown" not in text["store"]
    assert text["required_features"] == []


def test_readers_that_do_not_know_them_refuse(cache, monkeypatch):
    folder, _ = cache(("tail",))
    path = Path(__file__).parent / "minimal_reader.py"
    spec = importlib.util.spec_from_file_location("minimal_reader", path)
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    assert len(minimal.read(folder)) == 5
    minimal.KNOWN.remove("unknown_values")
    with pytest.raises(ValueError, match="not a cache that this reader knows"):
        minimal.read(folder)
    monkeypatch.setattr("logitcask.cache_format.manifest.KNOWN_FEATURES", frozenset())
    with pytest.raises(UnsupportedCacheError, match=r"unknown_values.*upgrade logitcask"):
        CacheReader(folder)


@pytest.mark.parametrize("change", [{"features": []}, {"unknown": None}, {"unknown": ["heads"]}])
def test_a_manifest_that_contradicts_itself(change, cache):
    folder, _ = cache(("tail",))
    text = json.loads((folder / "manifest.json").read_text())
    if "features" in change:
        text["required_features"] = change["features"]
    elif change["unknown"] is None:
        del text["store"]["unknown"]
    else:
        text["store"]["unknown"] = change["unknown"]
    with pytest.raises(DamagedCacheError, match=r"unknown_values do not agree|unknown"):
        Manifest.from_json(json.dumps(text).encode(), "x")
    assert UNKNOWN_VALUES in json.loads((folder / "manifest.json").read_text())["required_features"]


@pytest.mark.parametrize(
    ("unknown", "forgotten", "said"),
    [
        ((), ("targets",), "a target logprob is not finite"),
        ((), ("ranks",), "a target rank is outside the vocabulary"),
        ((), ("tail",), "a tail logprob is above 0 or not a number"),
        (("tail",), (), "a tail has a mass, but the cache knows none"),
        (("targets",), ("ranks",), "a target has a logprob, but no rank"),
        (("ranks",), ("targets",), "a target logprob is not finite"),
    ],
)
def test_what_cannot_be_stored(unknown, forgotten, said, rng):
    sequence = forget(make_sequence(rng, "s"), forgotten)
    with pytest.raises(UserError, match=said):
        validate(sequence, header_of(unknown).store)


def test_shards_of_other_caches_are_damaged(rng):
    known, unknown = (Codec(header_of(each).store) for each in ((), ("tail", "targets")))
    sequence = make_sequence(rng, "s")
    with pytest.raises(DamagedCacheError, match="a tail has a mass, but the cache knows none"):
        unknown.open(known.encode([sequence]), "x").decode(0)
    lost = forget(sequence, ("tail", "targets"))
    with pytest.raises(DamagedCacheError, match="a target logprob is above 0 or not finite"):
        known.open(unknown.encode([lost]), "x").decode(0)
    ranked = dataclasses.replace(lost, target_rank=np.zeros_like(lost.target_rank))
    with pytest.raises(DamagedCacheError, match="a target has a rank, but no logprob"):
        unknown.open(unknown.encode([ranked]), "x").decode(0)


@pytest.mark.parametrize(
    "more",
    [{"tail_samples": 4}, {"entropy": True}, {"min_probability": 0.1}, {"top_p": 0.9}],
    ids=str,
)
def test_nothing_of_an_unknown_tail_is_stored(more):
    settings = {"vocab_size": 100, "top_k": 4, "capture_k": 4, "logprob_step": 1 / 64}
    with pytest.raises(ValueError, match="tail masses are unknown"):
        StoreSettings(**settings, unknown=("tail",), **more)
