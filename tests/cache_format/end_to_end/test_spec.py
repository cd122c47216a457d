"""SPEC.md is enough to write a reader: the minimal one reads what the package writes, and the
caches of version 1.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, CacheWriter, verify
from logitcask.cache_format.shards.codec import ContentHash
from logitcask.cache_format.shards.prior import TailPrior

GOLDEN = sorted(path for path in (Path(__file__).parents[2] / "golden").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location(
        "minimal_reader", Path(__file__).with_name("minimal_reader.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_lists(sequence):
    """A CachedSequence in the terms of the minimal reader."""
    plain = ("input_ids", "loss_mask", "positions", "target_logprob", "target_rank", "tail_logprob")
    found = {"sequence_id": sequence.sequence_id} | {
        name: getattr(sequence, name).tolist() for name in plain
    }
    found["heads"] = [
        [(i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0]
        for ids, logprobs in zip(sequence.ids.tolist(), sequence.logprobs.tolist(), strict=True)
    ]
    if (chosen := sequence.chosen) is not None:
        found["chosen"] = [
            [(i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0]
            for ids, logprobs in zip(chosen.ids.tolist(), chosen.logprobs.tolist(), strict=True)
        ]
    for name in ("tail_logprob", "target_logprob"):
        found[name] = [None if value != value else value for value in found[name]]
    if sequence.entropy is not None:
        found["entropy"] = sequence.entropy.tolist()
    if sequence.writer_logprob is not None:
        found["writer_logprob"] = sequence.writer_logprob.tolist()
    if sequence.samples is not None:
        found["samples"] = [
            [
                draws_of(sequence.samples, row, number)
                for number in range(sequence.samples.ids.shape[1])
            ]
            for row in range(len(sequence.positions))
        ]
    return found


def draws_of(samples, row, number):
    ids, counts = np.unique(samples.ids[row, number], return_counts=True)
    if samples.logprobs is None:
        return sorted((int(i), int(c), None) for i, c in zip(ids, counts, strict=True) if i >= 0)
    logprob = dict(
        zip(samples.ids[row, number].tolist(), samples.logprobs[row, number].tolist(), strict=True)
    )
    return sorted(
        (int(i), int(c), logprob[int(i)]) for i, c in zip(ids, counts, strict=True) if i >= 0
    )


def in_any_order(found):
    """Draws by id: their order, by rank, means nothing."""
    if "samples" in found:
        found = found | {
            "samples": [[sorted(draws) for draws in sets] for sets in found["samples"]]
        }
    return found


@pytest.mark.parametrize("vocab_size", [200, 60_000, 1 << 24])
@pytest.mark.parametrize(
    "kind",
    [
        *("head", "ragged", "samples", "sample logprobs", "random sampling", "writer logprobs"),
        *("chosen ids", "chosen ids, draws"),
    ],
)
def test_the_minimal_reader_agrees(tmp_path, rng, header, sequence, minimal, vocab_size, kind):
    sequences = [
        sequence(
            rng, f"{i}", tokens=int(rng.integers(1, 40)), vocab_size=vocab_size, kind=kind, kept=0.7
        )
        for i in range(8)
    ]
    prior = TailPrior.estimate(sequences, vocab_size) if vocab_size < 1 << 20 else None
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header(vocab_size, kind=kind), prior)
        for index in range(2):
            with writer.shard(index) as shard:
                for each in sequences[4 * index : 4 * index + 4]:
                    shard.append(each)
        writer.finish(started, 2)
    found = minimal.read(tmp_path / "c")
    cache = CacheReader(tmp_path / "c")
    assert len(found) == len(cache) == 8
    for simple, full in zip(found, cache, strict=True):
        assert in_any_order(simple) == as_lists(full)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_caches_are_read_for_ever(path, minimal):
    """Both readers find the values that lie beside a cache of version 1, and its rows are still
    encoded to the same bytes.
    """
    expected = [
        in_any_order(
            {
                **sequence,
                "samples": [[[tuple(d) for d in s] for s in p] for p in sequence["samples"]],
            }
        )
        if "samples" in sequence
        else sequence
        for sequence in json.loads(path.with_suffix(".json").read_text())
    ]
    for sequence in expected:
        for name in {"heads", "chosen"} & sequence.keys():
            sequence[name] = [[tuple(entry) for entry in each] for each in sequence[name]]
    assert [in_any_order(sequence) for sequence in minimal.read(path)] == expected
    cache = CacheReader(path)
    assert [as_lists(sequence) for sequence in cache] == expected
    assert verify(str(path)) == []
    for shard, entry in enumerate(cache.manifest.shards):
        content = ContentHash()
        for packed in cache.iter_batches(shard):
            content.update(cache.codec.encode([packed.decode(row) for row in range(len(packed))]))
        assert content.hexdigest() == entry.content_sha256


def test_there_are_golden_caches():
    assert len(GOLDEN) >= 6
    assert {CacheReader(path).manifest.format_version for path in GOLDEN} == {1}
