"""``verify --deep``: whatever a sound writer would never write is found, although every hash
fits.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

import logitcask.cache_format.shards.shard_writer
from logitcask.cache_format import CacheWriter, ChosenIds, TailSamples, verify

KIND = "samples"
VOCAB = 1000


@pytest.fixture
def consistent(rng, consistent_sequence):
    return lambda name: consistent_sequence(rng, name, kind=KIND)


def written(tmp_path, header, sequences, monkeypatch, kind=KIND):
    """The sequences as a cache with right hashes, whatever is in them."""
    monkeypatch.setattr(
        logitcask.cache_format.shards.shard_writer, "validate", lambda *_, **__: None
    )
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header(kind=kind))
        for index, part in enumerate((sequences[:2], sequences[2:])):
            with writer.shard(index) as shard:
                for each in part:
                    shard.append(each)
        writer.finish(started, 2)
    monkeypatch.undo()
    return str(tmp_path / "c")


def test_a_sound_cache_passes(tmp_path, header, consistent, monkeypatch):
    path = written(tmp_path, header, [consistent(f"s{i}") for i in range(4)], monkeypatch)
    assert verify(path) == verify(path, deep=True) == []


WRONG = {
    "an id occurs twice": lambda s: {
        "ids": np.where((np.arange(s.ids.shape[1]) == 1) & (s.ids >= 0), s.ids[:, :1], s.ids)
    },
    # No more than an even distribution over all ids has: beyond that it is refused for another
    # reason.
    "entropy contradicts": lambda s: {
        "entropy": np.minimum(s.entropy + 4, np.float32(math.log(VOCAB)))
    },
    "a sample is in the head": lambda s: {
        "samples": TailSamples(np.repeat(s.ids[:, None, :1], 2, axis=1))
    },
    "a tail with mass has no draw": lambda s: {
        "samples": TailSamples(np.full_like(s.samples.ids, -1))
    },
    "add up to 1": lambda s: {"tail_logprob": s.tail_logprob - 0.7},
    "target and head disagree": lambda s: {"target_logprob": s.target_logprob - 0.05},
    "rank beyond it": lambda s: {"target_rank": s.target_rank + 8},
    "head logprobs do not fall|mass is above 1": lambda s: {
        "logprobs": np.where(s.ids >= 0, 0, s.logprobs)
    },
    "positions are not those": lambda s: {
        "loss_mask": np.where(np.arange(len(s)) == 3, False, s.loss_mask)
    },
    "token ids leave": lambda s: {"input_ids": s.input_ids + 1000},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_contradicts_the_specification_is_found(
    tmp_path, header, consistent, monkeypatch, what
):
    sequences = [consistent(f"s{i}") for i in range(4)]
    sequences[3] = dataclasses.replace(sequences[3], **WRONG[what](sequences[3]))
    path = written(tmp_path, header, sequences, monkeypatch)
    assert verify(path) == [], "its hashes are right"
    problem = verify(path, deep=True)[0]
    assert "data/shard-00001.arrow" in problem
    assert any(part in problem for part in what.split("|")), problem


WRONG_CHOICE = {
    "an id is chosen twice": lambda ids, logprobs, last: (
        np.where(np.arange(6) == 1, ids[:, :1], ids),
        np.where(np.arange(6) == 1, logprobs[:, :1], logprobs),
    ),
    "more mass than its tail": lambda ids, logprobs, last: (
        ids,
        np.where(ids >= 0, last, logprobs),
    ),
}


@pytest.mark.parametrize("what", ["", *WRONG_CHOICE])
def test_chosen_ids_that_contradict_the_rest(
    tmp_path, rng, header, consistent_sequence, monkeypatch, what
):
    """Ids outside the head, as likely as its last entry, have too much mass together."""
    kind = "chosen ids, draws"
    sequences = [consistent_sequence(rng, f"s{i}", kind=kind) for i in range(4)]
    if what:
        one = sequences[3]
        others = np.array(
            [np.setdiff1d(np.arange(VOCAB), np.append(ids, -1))[:6] for ids in one.ids], np.int32
        )
        last = one.logprobs.min(axis=1, keepdims=True)
        few = np.full(others.shape, -12, np.float32)
        ids, logprobs = WRONG_CHOICE[what](others, few, last)
        changed = ChosenIds(ids.astype(np.int32), logprobs.astype(np.float32))
        sequences[3] = dataclasses.replace(one, chosen=changed)
    path = written(tmp_path, header, sequences, monkeypatch, kind)
    problems = verify(path, deep=True)
    assert [what in each and "shard-00001" in each for each in problems] == [True] * bool(what)


def test_an_id_that_occurs_twice(tmp_path, header, consistent, monkeypatch):
    path = written(
        tmp_path, header, [consistent(name) for name in ("a", "b", "c", "a")], monkeypatch
    )
    (problem,) = verify(path, deep=True)
    assert "'a' occurs twice" in problem


@pytest.mark.parametrize(
    "field", ["content_sha256", "tokens", "positions", "head_mass_sum", "target_nll_sum"]
)
def test_a_forged_manifest(tmp_path, header, consistent, monkeypatch, field):
    path = written(tmp_path, header, [consistent(f"s{i}") for i in range(4)], monkeypatch)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    shard = manifest["shards"][1]
    shard[field] = "0" * 64 if field == "content_sha256" else shard[field] + 1
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    assert verify(path) == []
    problems = verify(path, deep=True)
    assert "shard-00001" in problems[0]
    assert all("manifest.json" in problem for problem in problems[1:])


@pytest.mark.parametrize("field", ["statistics", "content_sha256", "fingerprint", "data"])
def test_a_manifest_that_contradicts_itself(tmp_path, header, consistent, monkeypatch, field):
    path = written(tmp_path, header, [consistent(f"s{i}") for i in range(4)], monkeypatch)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    if field == "statistics":
        manifest["statistics"]["tokens"] += 1
    elif field == "data":
        manifest["data"]["sha256"] = "1"
    else:
        manifest[field] = "0" * 64
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(path, deep=True)
    assert problem.startswith("manifest.json: ")
