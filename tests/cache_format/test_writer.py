"""The commit protocol: killed anywhere, a cache is incomplete or right, and the same build goes
on.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import logitcask.cache_format.shards.shard_writer
import logitcask.cache_format.writer
from logitcask.cache_format import (
    CacheInUseError,
    CacheNotFoundError,
    CacheReader,
    CacheWriter,
    IncompleteCacheError,
    UserError,
    verify,
)
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.writer import CacheWorker, remove_cache

SHARDS = 3


def build(path, header, sequences):
    with CacheWriter(path) as writer:
        prior = None if writer.begun else TailPrior.estimate(sequences, header.store.vocab_size)
        started = writer.begin(header, prior)
        for index in range(SHARDS):
            if index not in writer.committed:
                with writer.shard(index) as shard:
                    for each in sequences[index::SHARDS]:
                        shard.append(each)
        return writer.finish(started, SHARDS)


@pytest.fixture
def sequences(rng, sequence):
    return [sequence(rng, f"s{i}") for i in range(12)]


def test_what_is_written_is_read(tmp_path, header, sequences, same):
    manifest = build(tmp_path / "c", header(), sequences)
    cache = CacheReader(tmp_path / "c")
    expected = [each for index in range(SHARDS) for each in sequences[index::SHARDS]]
    assert len(cache) == len(expected)
    for original, found in zip(expected, cache, strict=True):
        same(original, found, 1 / 64)
    assert manifest.statistics.tokens == sum(len(s) for s in sequences)
    files = [*(tmp_path / "c/data").iterdir(), tmp_path / "c/tail_prior.arrow"]
    assert manifest.statistics.bytes == sum(file.stat().st_size for file in files)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [
        "README.md",
        "data",
        "manifest.json",
        "tail_prior.arrow",
    ]


def kill_at(operation, path, header, sequences):
    """Builds in a child process that dies, without any clean-up, at its n-th rename, fsync, mkdir,
    unlink or rmdir.

    Returns whether the child got to the end.
    """
    child = os.fork()
    if child == 0:
        done = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal done
                if done == operation:
                    os._exit(9)
                done += 1
                return real(*arguments, **options)

            return call

        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            build(path, header, sequences)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killed_at_every_operation(tmp_path, header, sequences):
    expected = build(tmp_path / "whole", header(), sequences)
    operation, finished = 0, False
    while not finished:
        path = tmp_path / f"killed-{operation}"
        finished = kill_at(operation, path, header(), sequences)
        if (path / "manifest.json").exists():
            assert CacheReader(path).manifest.content_sha256 == expected.content_sha256
        else:
            with pytest.raises(
                IncompleteCacheError if (path / BUILD_DIR).exists() else CacheNotFoundError
            ):
                CacheReader(path)
            assert build(path, header(), sequences).content_sha256 == expected.content_sha256
        assert verify(str(path)) == []
        assert not list(path.rglob("*.tmp"))
        operation += 1
    assert operation > 20, "the build does fewer durable operations than the protocol asks for"


def test_finished_shards_are_not_written_again(tmp_path, header, sequences):
    with pytest.raises(ZeroDivisionError), CacheWriter(tmp_path / "c") as writer:
        writer.begin(header())
        with writer.shard(0) as shard:
            shard.append(sequences[0])
        with writer.shard(1) as shard:
            shard.append(sequences[1])
            raise ZeroDivisionError
    with CacheWriter(tmp_path / "c") as writer:
        assert sorted(writer.committed) == [0]
        assert writer.committed[0].sequences == 1
    assert [f.name for f in (tmp_path / "c/data").iterdir()] == ["shard-00000.arrow"]


def test_a_reader_during_writing_sees_incomplete(tmp_path, header, sequences):
    with CacheWriter(tmp_path / "c") as writer:
        writer.begin(header())
        with writer.shard(0) as shard:
            shard.append(sequences[0])
            with pytest.raises(IncompleteCacheError, match="unfinished"):
                CacheReader(tmp_path / "c")


def test_the_second_writer_is_refused(tmp_path):
    with CacheWriter(tmp_path / "c"), pytest.raises(CacheInUseError, match="another process"):
        CacheWriter(tmp_path / "c").__enter__()
    with CacheWriter(tmp_path / "c"):
        pass


def test_another_build_in_the_same_folder_is_refused(tmp_path, header):
    with CacheWriter(tmp_path / "c") as writer:
        writer.begin(header(top_k=8))
    with (
        CacheWriter(tmp_path / "c") as writer,
        pytest.raises(UserError, match=r"store\.top_k: 8 -> 4"),
    ):
        writer.begin(header(top_k=4).model_copy(update={"store": header(top_k=4).store}))


def test_a_finished_cache_is_never_written_to(tmp_path, header, sequences):
    build(tmp_path / "c", header(), sequences)
    with pytest.raises(UserError, match="finished cache"):
        CacheWriter(tmp_path / "c").__enter__()


def test_remove_leaves_what_is_not_the_caches(tmp_path, header, sequences):
    build(tmp_path / "c", header(), sequences)
    (tmp_path / "c" / "notes.txt").write_text("mine")
    remove_cache(tmp_path / "c")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["notes.txt"]
    remove_cache(tmp_path / "nothing")


def test_a_full_disk_is_one_clear_line_and_loses_no_shard(tmp_path, header, sequences, monkeypatch):
    """The disk fills while shard 1 is written; with room again, only shard 1 and later are
    written.
    """
    real = os.fsync
    path = tmp_path / "c"

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().name == "shard-00001.arrow.tmp":
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        build(path, header(), sequences)
    monkeypatch.setattr(os, "fsync", real)
    first = (path / "data" / "shard-00000.arrow").stat()
    assert not list((path / BUILD_DIR).glob("*.tmp"))
    build(path, header(), sequences)
    assert (path / "data" / "shard-00000.arrow").stat().st_mtime_ns == first.st_mtime_ns
    assert len(CacheReader(path)) == len(sequences)


def test_batches_are_small_and_uniform(tmp_path, rng, header, sequence, monkeypatch):
    """About BATCH_BYTES each before compression, every one but the last of the same number of
    sequences.
    """
    monkeypatch.setattr(logitcask.cache_format.shards.shard_writer, "BATCH_BYTES", 1 << 17)
    many = [sequence(rng, f"s{i}", tokens=300, top_k=32, vocab_size=5000) for i in range(90)]
    manifest = build(tmp_path / "c", header(5000, 32), many)
    per_batch = [shard.sequences_per_batch for shard in manifest.shards]
    assert all(2 <= count < 30 for count in per_batch)
    cache = CacheReader(tmp_path / "c")
    order = rng.permutation(len(cache))
    assert all(
        cache[int(i)].sequence_id == many[(int(i) % 30) * 3 + int(i) // 30].sequence_id
        for i in order
    )
    assert np.array_equal(cache[-1].input_ids, cache[len(cache) - 1].input_ids)


def test_files_that_are_not_a_caches_are_left_alone(tmp_path, header):
    """A project folder as output, with data/ and README.md of its own: refused, and nothing is
    touched.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"has data and README\.md of its own"):
        CacheWriter(tmp_path).__enter__()
    with pytest.raises(UserError, match="no cache"):
        remove_cache(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["README.md", "data", "train.jsonl"]


def test_finished_between_look_and_lock(tmp_path, header, sequences, monkeypatch):
    """Another process finishes the cache just before this one gets the lock: its shards stay."""
    path = tmp_path / "c"
    locked = logitcask.cache_format.writer.locked

    def late(where):
        monkeypatch.setattr(logitcask.cache_format.writer, "locked", locked)
        build(path, header(), sequences)
        return locked(where)

    monkeypatch.setattr(logitcask.cache_format.writer, "locked", late)
    with pytest.raises(UserError, match="finished cache"):
        CacheWriter(path).__enter__()
    assert len(CacheReader(path)) == len(sequences)
    assert len(list((path / "data").iterdir())) == SHARDS


def worker_of(writer):
    return CacheWorker(writer.path, writer.run)


def test_workers_write_what_one_writer_does(tmp_path, header, sequences):
    """Shards by two workers, out of order, gathered by the holder of the lock."""
    expected = build(tmp_path / "whole", header(), sequences)
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header(), TailPrior.estimate(sequences, header().store.vocab_size))
        for index in (2, 0, 1):
            worker = worker_of(writer)
            worker.join(header())
            assert not writer.adopt(index)
            with worker.shard(index) as shard:
                for each in sequences[index::SHARDS]:
                    shard.append(each)
            assert worker_of(writer).adopt(index)
            assert writer.adopt(index)
        found = writer.finish(started, SHARDS)
    assert found.content_sha256 == expected.content_sha256
    assert [entry.sha256 for entry in found.shards] == [entry.sha256 for entry in expected.shards]
    assert verify(str(tmp_path / "c")) == []


def test_a_worker_with_another_teacher_is_refused(tmp_path, header):
    with CacheWriter(tmp_path / "c") as writer:
        writer.begin(header(top_k=8))
        with pytest.raises(UserError, match=r"store\.top_k: 8 -> 4"):
            worker_of(writer).join(header(top_k=4))


def begun_and_killed(path, header, prior):
    """A worker of a run whose driver has died without any clean-up."""
    child = os.fork()
    if child == 0:
        writer = CacheWriter(path).__enter__()
        writer.begin(header, prior)
        os._exit(9)
    os.waitpid(child, 0)
    (run,) = (path / BUILD_DIR / "runs").iterdir()
    worker = CacheWorker(path, run.name)
    worker.join(header)
    return worker


@pytest.mark.parametrize("again", ["the same command", "a restart"])
def test_a_worker_whose_run_is_over_changes_nothing(tmp_path, header, sequences, again):
    """It has written all of its shard and is about to commit it when the next run begins."""
    expected = build(tmp_path / "whole", header(), sequences)
    stale = begun_and_killed(
        tmp_path / "c", header(), TailPrior.estimate(sequences, header().store.vocab_size)
    )
    with ExitStack() as run:
        with pytest.raises(CacheInUseError, match="another process now"), stale.shard(1) as shard:
            shard.append(sequences[0])
            stale.check()
            if again == "a restart":
                remove_cache(tmp_path / "c")
                assert not list(tmp_path.glob("c/*"))
            else:
                run.enter_context(CacheWriter(tmp_path / "c"))
            with pytest.raises(CacheInUseError):
                stale.check()
        with pytest.raises(CacheInUseError), stale.shard(2):
            raise AssertionError("a shard was begun in a run that is over")
        assert not list((tmp_path / "c").rglob("*.tmp"))
    assert build(tmp_path / "c", header(), sequences).content_sha256 == expected.content_sha256
    assert verify(str(tmp_path / "c")) == []


def test_the_end_of_a_run_ends_its_workers(tmp_path, header, sequences):
    with ExitStack() as run:
        writer = run.enter_context(CacheWriter(tmp_path / "c"))
        writer.begin(header())
        worker = worker_of(writer)
        worker.join(header())
        with pytest.raises(CacheInUseError), worker.shard(0) as shard:
            shard.append(sequences[0])
            run.close()


def test_a_shard_that_was_given_to_another_worker(tmp_path, header, sequences):
    """The first one wakes up and ends while the second is at it."""
    with CacheWriter(tmp_path / "c") as writer:
        writer.begin(header())
        first, second = worker_of(writer), worker_of(writer)
        for worker in (first, second):
            worker.join(header())
        with ExitStack() as attempt:
            with (
                pytest.raises(CacheInUseError, match="another process now"),
                first.shard(0) as shard,
            ):
                shard.append(sequences[0])
                again = attempt.enter_context(second.shard(0))
            again.append(sequences[1])
            again.append(sequences[2])
        assert writer.adopt(0)
        assert writer.committed[0].sequences == 2


def test_what_an_attempt_committed_before_it_was_stopped_stays(tmp_path, header, sequences):
    with CacheWriter(tmp_path / "c") as writer:
        writer.begin(header())
        first, second = worker_of(writer), worker_of(writer)
        for worker in (first, second):
            worker.join(header())
        with first.shard(0) as shard:
            shard.append(sequences[0])
        with second.shard(0) as shard:  # it looked before the first had committed
            shard.append(sequences[1])
        assert second.committed[0] == first.committed[0]
    assert not (tmp_path / "c" / BUILD_DIR / "runs" / writer.run).exists()


def test_the_folder_of_a_run_that_cannot_be_removed(tmp_path, monkeypatch):
    """As on a network file system, where a file that a process keeps open cannot go."""
    with CacheWriter(tmp_path / "c") as writer:
        pass
    (tmp_path / "c" / BUILD_DIR / "runs" / writer.run).mkdir()
    monkeypatch.setattr(logitcask.cache_format.writer, "_REVOKE_TIMEOUT", 0.3)
    monkeypatch.setattr(logitcask.cache_format.writer.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(CacheInUseError, match="a process of an earlier run still writes there"):
        CacheWriter(tmp_path / "c").__enter__()
