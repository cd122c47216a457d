"""What is kept: found at once, on disk after a commit, forgotten where the disk refuses it."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, CacheReader, growing
from logitcask.cache_format.growing import GrowingCache
from logitcask.pipeline.serve import keeper as keeper_module
from logitcask.pipeline.serve.keeper import LOGPROB_STEP, Keeper, header_of
from logitcask.pipeline.serve.served import Missing
from tests.pipeline.serve.conftest import header

K = 6


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], Any]:
    @contextmanager
    def open_() -> Iterator[Keeper]:
        given = header(K)
        made = header_of(given.teacher, given.tokenizer, "vllm 0.32.0", K)
        with GrowingCache(tmp_path / "kept", made) as cache:
            keeper = Keeper(cache)
            yield keeper
            keeper.close()

    return open_


@pytest.fixture
def sequences(table: Any, texts: list[list[int]]) -> list[CachedSequence]:
    return [
        table.cached(f"s{n}", text, [False] + [True] * (len(text) - 1), K)
        for n, text in enumerate(texts)
    ]


def is_right(found: Any, exact: CachedSequence, tokens: int) -> bool:
    if isinstance(found, Missing):
        return False
    rows = slice(0, tokens - 1)
    assert np.array_equal(found.input_ids, exact.input_ids[:tokens])
    assert np.array_equal(found.ids, exact.ids[rows])
    assert np.abs(found.logprobs - exact.logprobs[rows]).max() <= LOGPROB_STEP / 2
    return True


def test_found_before_and_after_a_commit(
    opened: Any, sequences: list[CachedSequence], tmp_path: Path
) -> None:
    with opened() as keeper:
        for n, each in enumerate(sequences):
            kept = keeper.add(each)
            assert is_right(kept, each, len(each))
            for earlier in sequences[: n + 1]:
                assert is_right(keeper.find(earlier.input_ids, K), earlier, len(earlier))
                half = max(2, len(earlier) // 2)
                assert is_right(keeper.find(earlier.input_ids[:half], K), earlier, half)
            if n % 3 == 2:
                keeper.commit()
                assert len(CacheReader(tmp_path / "kept")) == n + 1
        assert keeper.find(sequences[0].input_ids, K + 1)[0] == 2
        # Tokens that are kept are not kept again.
        keeper.add(sequences[4])
        assert keeper.cache.open_tokens == 0
    with opened() as keeper:
        assert all(is_right(keeper.find(each.input_ids, K), each, len(each)) for each in sequences)
    assert len(CacheReader(tmp_path / "kept")) == len(sequences)


def test_a_full_disk(
    opened: Any,
    sequences: list[CachedSequence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The open shard is forgotten, and what is committed stays; afterwards it goes on."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with opened() as keeper:
        keeper.add(sequences[1])
        keeper.commit()
        keeper.add(sequences[2])
        keeper.add(sequences[3])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            keeper.commit()
        assert "are not kept: cannot write to" in caplog.text
        assert "No space left" in caplog.text
        assert is_right(keeper.find(sequences[1].input_ids, K), sequences[1], len(sequences[1]))
        for lost in sequences[2:4]:
            assert isinstance(keeper.find(lost.input_ids, K), Missing)
        keeper.add(sequences[3])
    assert [each.sequence_id for each in CacheReader(tmp_path / "kept")] == ["s1", "s3"]


def test_what_cannot_be_stored_is_answered_and_not_kept(
    opened: Any, sequences: list[CachedSequence], caplog: pytest.LogCaptureFixture
) -> None:
    """Here a target of probability 0."""
    impossible = sequences[2]
    impossible.target_logprob[:] = -np.inf
    with opened() as keeper:
        keeper.add(sequences[1])
        assert keeper.add(impossible) is impossible
        assert "not kept: sequence 's2' cannot be stored" in caplog.text
        assert isinstance(keeper.find(impossible.input_ids, K), Missing)
        assert is_right(keeper.find(sequences[1].input_ids, K), sequences[1], len(sequences[1]))


def test_many_readers_beside_the_writer(
    opened: Any, table: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "SHARD_TOKENS", 40)
    texts = [rng.integers(0, 384, rng.integers(2, 30)).tolist() for _ in range(60)]
    exact = [
        table.cached(f"s{n}", t, [False] + [True] * (len(t) - 1), K) for n, t in enumerate(texts)
    ]
    added, failures = 0, []

    def read(seed: int, keeper: Keeper) -> None:
        draw = np.random.default_rng(seed)
        try:
            while added < len(exact):
                if added:
                    each = exact[draw.integers(added)]
                    assert is_right(keeper.find(each.input_ids, K), each, len(each))
        except BaseException as error:
            failures.append(error)

    with opened() as keeper:
        threads = [threading.Thread(target=read, args=(n, keeper)) for n in range(3)]
        for thread in threads:
            thread.start()
        for each in exact:
            keeper.add(each)
            added += 1
        for thread in threads:
            thread.join()
        assert not failures
        assert keeper.cache.sequences > 50


def test_an_index_without_room(
    opened: Any, sequences: list[CachedSequence], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be found again is answered and not kept, so that nothing is kept twice."""
    with opened() as keeper:
        keeper.add(sequences[1])
        real, keeper._index.add = keeper._index.add, full
        for _ in range(2):
            assert keeper.add(sequences[2]) is sequences[2]
        keeper._index.add = real
        assert "not kept: database or disk is full" in caplog.text
        assert isinstance(keeper.find(sequences[2].input_ids, K), Missing)
        keeper.add(sequences[2])
        keeper.add(sequences[3])
        for each in sequences[1:4]:
            assert is_right(keeper.find(each.input_ids, K), each, len(each))
    assert [each.sequence_id for each in CacheReader(tmp_path / "kept")] == ["s1", "s2", "s3"]


def full(*_: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_as_many_shards_as_a_manifest_lists(
    opened: Any,
    sequences: list[CachedSequence],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then nothing more is kept, neither on disk nor in memory."""
    monkeypatch.setattr(growing, "MAX_SHARDS", 1)
    with opened() as keeper:
        keeper.add(sequences[1])
        keeper.commit()
        keeper.add(sequences[2])
        keeper.commit()
        assert "the most that a manifest can list" in caplog.text
        assert keeper._open == []
        assert isinstance(keeper.find(sequences[2].input_ids, K), Missing)
        assert is_right(keeper.find(sequences[1].input_ids, K), sequences[1], len(sequences[1]))
