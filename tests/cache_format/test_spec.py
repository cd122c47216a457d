"""SPEC.md is enough to write a reader: the minimal one reads what the package writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cache_format import CacheReader, CacheWriter


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_reader", Path(__file__).with_name("minimal_reader.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("vocab_size", [200, 60_000, 1 << 24])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_minimal_reader_agrees(tmp_path, rng, header, sequence, minimal, vocab_size, ragged):
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header(vocab_size))
        for index in range(2):
            with writer.shard(index, started) as shard:
                for i in range(4):
                    tokens = int(rng.integers(1, 40))
                    shard.append(
                        sequence(rng, f"{index}/{i}", tokens=tokens, vocab_size=vocab_size, ragged=ragged, kept=0.7)
                    )
        writer.finish(started, 2)
    found = minimal.read(tmp_path / "c")
    cache = CacheReader(tmp_path / "c")
    assert len(found) == len(cache) == 8
    for simple, full in zip(found, cache, strict=True):
        for name in (
            "sequence_id",
            "input_ids",
            "loss_mask",
            "positions",
            "target_logprob",
            "target_rank",
            "tail_logprob",
        ):
            value = getattr(full, name)
            assert simple[name] == (value if isinstance(value, str) else value.tolist()), name
        heads = [
            [(i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0]
            for ids, logprobs in zip(full.ids.tolist(), full.logprobs.tolist(), strict=True)
        ]
        assert simple["heads"] == heads
