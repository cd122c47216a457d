"""A cache that grows: readable after each shard, and killed anywhere, as after one of its commits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import (
    CachedSequence,
    CacheInUseError,
    CacheReader,
    CacheWriter,
    UserError,
    growing,
    verify,
)
from logitcask.cache_format.growing import GrowingCache, is_growing
from logitcask.cache_format.layout import BUILD_DIR, GROW_DIR, MANIFEST
from logitcask.cache_format.manifest import DataHash, Header
from logitcask.cache_format.share.signature import check_signed, keygen, sign

COMMITS = 3


@pytest.fixture
def sequences(
    rng: np.random.Generator, consistent_sequence: Callable[..., CachedSequence]
) -> list[CachedSequence]:
    return [consistent_sequence(rng, f"s{i}", tokens=20 + i) for i in range(9)]


def grow(path: Path, header: Header, sequences: list[CachedSequence]) -> None:
    """Adds what is not there yet, a third of the sequences per commit."""
    with GrowingCache(path, header) as cache:
        while cache.sequences < len(sequences):
            for each in sequences[cache.sequences :][: len(sequences) // COMMITS]:
                cache.append(each)
            cache.commit()


def names(path: Path) -> list[str]:
    return [each.sequence_id for each in CacheReader(path)]


def test_each_commit_is_a_cache_of_its_own(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence], same: Callable
) -> None:
    """With the shards, the hashes and the statistics of a build of the same sequences."""
    data, readers = DataHash(), []
    with GrowingCache(tmp_path / "c", header()) as cache:
        assert cache.commit() is None
        for index, each in enumerate(sequences):
            read = cache.append(each).decode(0)
            same(each, read, 1 / 64)
            assert cache.open_tokens == len(each)
            manifest = cache.commit()
            data.update(each.sequence_id, each.input_ids, each.loss_mask)
            assert manifest is not None
            assert manifest.data.sha256 == data.hexdigest()
            assert manifest.data.max_length == len(each)
            assert manifest.contradictions() == []
            assert is_growing(manifest)
            readers.append(CacheReader(tmp_path / "c"))
            assert readers[-1].manifest == manifest
            same(read, readers[-1][index], 0)
        assert cache.commit() == manifest  # nothing new
    assert verify(str(tmp_path / "c"), deep=True) == []
    with CacheWriter(tmp_path / "built") as writer:
        writer.begin(header())
        for index, each in enumerate(sequences):
            with writer.shard(index) as shard:
                shard.append(each)
        built = writer.finish(writer.header(), len(sequences))
    assert built.content_sha256 == manifest.content_sha256
    assert built.statistics == manifest.statistics
    assert not is_growing(built)
    # A reader keeps the state that it has opened.
    for count, reader in enumerate(readers, 1):
        assert [each.sequence_id for each in reader] == [f"s{i}" for i in range(count)]
    assert len({reader.manifest.fingerprint for reader in readers}) == len(sequences)


def test_it_goes_on_where_it_was(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence]
) -> None:
    grow(tmp_path / "whole", header(), sequences)
    for end in (3, 6, 9):
        grow(tmp_path / "parts", header(), sequences[:end])
        assert names(tmp_path / "parts") == [f"s{i}" for i in range(end)]
    whole, parts = (CacheReader(tmp_path / name).manifest for name in ("whole", "parts"))
    assert parts.data == whole.data
    # The engine's version may change.
    newer = header()
    newer = newer.model_copy(update={"teacher": newer.teacher.model_copy(update={"engine": "2"})})
    grow(tmp_path / "parts", newer, sequences)


def kill_at(operation: int, path: Path, header: Header, sequences: list[CachedSequence]) -> bool:
    """Grows in a child process that dies, without any clean-up, at its n-th rename, fsync, mkdir or
    unlink. Returns whether the child got to the end.
    """
    child = os.fork()
    if child == 0:
        done = 0

        def counted(real: Callable) -> Callable:
            def call(*arguments: object, **options: object) -> object:
                nonlocal done
                if done == operation:
                    os._exit(9)
                done += 1
                return real(*arguments, **options)

            return call

        for name in ("replace", "fsync", "mkdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            grow(path, header, sequences)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killed_at_every_operation(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence]
) -> None:
    grow(tmp_path / "whole", header(), sequences)
    expected = CacheReader(tmp_path / "whole").manifest
    operation, finished = 0, False
    while not finished:
        path = tmp_path / f"killed-{operation}"
        finished = kill_at(operation, path, header(), sequences)
        if (path / MANIFEST).exists():
            assert verify(str(path), deep=True) == []
            there = names(path)
            assert there == [f"s{i}" for i in range(len(there))]
            assert len(there) in (3, 6, 9)
        grow(path, header(), sequences)
        assert CacheReader(path).manifest.content_sha256 == expected.content_sha256
        assert sorted(file.name for file in (path / "data").iterdir()) == [
            f"shard-{i:05d}.arrow" for i in range(COMMITS)
        ]
        assert not list(path.rglob("*.tmp"))
        operation += 1
    assert operation > 20, "growing does fewer durable operations than the protocol asks for"


def test_without_a_commit_nothing_is_there(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence]
) -> None:
    with GrowingCache(tmp_path / "c", header()) as cache:
        cache.append(sequences[0])
    assert not (tmp_path / "c" / MANIFEST).exists()
    assert [file.name for file in (tmp_path / "c" / GROW_DIR).iterdir()] == ["lock"]


def test_a_sequence_that_cannot_be_stored_leaves_the_others(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence]
) -> None:
    wrong = replace(sequences[1], target_logprob=np.full_like(sequences[1].target_logprob, -np.inf))
    with GrowingCache(tmp_path / "c", header()) as cache:
        cache.append(sequences[0])
        with pytest.raises(UserError, match="a target logprob is not finite"):
            cache.append(wrong)
        cache.append(sequences[2])
        cache.commit()
    assert names(tmp_path / "c") == ["s0", "s2"]
    assert verify(str(tmp_path / "c"), deep=True) == []


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_full_disk_is_one_line_and_loses_no_commit(
    tmp_path: Path,
    header: Callable[..., Header],
    sequences: list[CachedSequence],
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    """The disk is full at one flush of the second commit; with room again, it goes on."""
    with GrowingCache(tmp_path / "c", header()) as cache:
        cache.append(sequences[0])
        cache.commit()
        cache.append(sequences[1])
        with (
            full_disk(monkeypatch, nth),
            pytest.raises(UserError, match="No space left"),
        ):
            cache.commit()
        assert (cache.open_tokens, cache.sequences) == (0, 1)
        assert names(tmp_path / "c") == ["s0"]
        cache.append(sequences[2])
        cache.commit()
    assert names(tmp_path / "c") == ["s0", "s2"]
    assert verify(str(tmp_path / "c"), deep=True) == []


def test_a_manifest_that_readers_see_stays(
    tmp_path: Path,
    header: Callable[..., Header],
    sequences: list[CachedSequence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The flush of its folder fails after its rename: its shard is not written again."""
    with GrowingCache(tmp_path / "c", header()) as cache:
        cache.append(sequences[0])
        cache.commit()
        cache.append(sequences[1])
        with full_disk(monkeypatch, 6):
            cache.commit()
        seen = CacheReader(tmp_path / "c")
        cache.append(sequences[2])
        cache.commit()
        assert [each.sequence_id for each in seen] == ["s0", "s1"]
    assert names(tmp_path / "c") == ["s0", "s1", "s2"]


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, nth: int) -> Iterator[None]:
    """The disk refuses the n-th flush, which must come."""
    real, left = os.fsync, nth

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield
    assert left <= 0


def test_what_it_refuses(
    tmp_path: Path,
    header: Callable[..., Header],
    sequences: list[CachedSequence],
    write_cache: Callable,
) -> None:
    grow(tmp_path / "c", header(), sequences)
    with pytest.raises(UserError, match=r"begun with other settings: store\.capture_k: 8 -> 4"):
        GrowingCache(tmp_path / "c", header(top_k=4)).__enter__()
    finished = write_cache(tmp_path / "finished")
    before = sorted(Path(finished).rglob("*"))
    with pytest.raises(UserError, match="finished cache, which does not grow"):
        GrowingCache(finished, header()).__enter__()
    assert sorted(Path(finished).rglob("*")) == before
    with (
        GrowingCache(tmp_path / "c", header()),
        pytest.raises(CacheInUseError, match="another process"),
    ):
        GrowingCache(tmp_path / "c", header()).__enter__()
    (tmp_path / "unfinished" / BUILD_DIR).mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished build"):
        GrowingCache(tmp_path / "unfinished", header()).__enter__()
    (tmp_path / "other" / "data").mkdir(parents=True)
    with pytest.raises(UserError, match="no cache, but has data"):
        GrowingCache(tmp_path / "other", header()).__enter__()
    with pytest.raises(UserError, match="is a URL"):
        GrowingCache("s3://bucket/c", header())


def test_as_many_shards_as_a_manifest_lists(
    tmp_path: Path,
    header: Callable[..., Header],
    sequences: list[CachedSequence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growing, "MAX_SHARDS", 2)
    with GrowingCache(tmp_path / "c", header()) as cache:
        for each in sequences[:2]:
            cache.append(each)
            cache.commit()
        cache.append(sequences[2])
        with pytest.raises(UserError, match="has 2 shards, the most that a manifest can list"):
            cache.commit()
        assert cache.open_tokens == 0, "what cannot be committed is in memory for ever"
    assert names(tmp_path / "c") == ["s0", "s1"]


def test_a_signature_is_of_one_state(
    tmp_path: Path, header: Callable[..., Header], sequences: list[CachedSequence]
) -> None:
    keygen(tmp_path / "me", "Ada")
    grow(tmp_path / "c", header(), sequences[:3])
    sign(tmp_path / "c", tmp_path / "me")
    reader = CacheReader(tmp_path / "c")
    assert check_signed(reader.path, reader.manifest_sha256)
    grow(tmp_path / "c", header(), sequences)
    reader = CacheReader(tmp_path / "c")
    with pytest.raises(UserError, match="is not signed"):
        check_signed(reader.path, reader.manifest_sha256)
