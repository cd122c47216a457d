"""Processes that train together check a cache once a machine. Here each process is a thread."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import logitcask.train.data.dataset
from logitcask.cache_format import CacheReader, DamagedCacheError
from logitcask.train.data.dataset import check_shards

SHARDS = 5


class Processes:
    """As many threads as ``machines``, each with its own rank and the machine of that name."""

    def __init__(self, machines: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machines, self.reads = machines, [[] for _ in machines]
        self._rank = threading.local()
        self._said = [b""] * len(machines)
        self._all = threading.Barrier(len(machines), timeout=60)
        check = CacheReader.check_shard

        def counted(cache: CacheReader, shard: int) -> None:
            self.reads[self._rank.value].append((Path(cache.path).name, shard))
            check(cache, shard)

        monkeypatch.setattr(CacheReader, "check_shard", counted)
        monkeypatch.setattr(
            logitcask.train.data.dataset, "processes", lambda: (self._rank.value, len(machines))
        )
        monkeypatch.setattr(
            logitcask.train.data.dataset, "machine", lambda: (machines[self._rank.value], "")
        )
        monkeypatch.setattr(logitcask.train.data.dataset, "gathered", self._gathered)

    def _gathered(self, mine: Any) -> list[Any]:
        self._said[self._rank.value] = pickle.dumps(mine)
        self._all.wait()
        found = [pickle.loads(each) for each in self._said]
        self._all.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work(rank)`` returns or raises in each."""

        def one(rank: int) -> Any:
            self._rank.value = rank
            try:
                return work(rank)
            except DamagedCacheError as error:
                return error

        with ThreadPoolExecutor(len(self.machines)) as pool:
            return list(pool.map(one, range(len(self.machines))))


@pytest.fixture
def caches(write_cache) -> tuple[Path, Path]:
    """One cache, and a copy of it, as on the disk of another node."""
    first = Path(write_cache("here", shards=SHARDS, sequences=3).path)
    return first, Path(shutil.copytree(first, first.parent / "there"))


def damage(cache: Path, shard: int) -> None:
    file = cache / f"data/shard-{shard:05d}.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("machines", "copies", "groups"),
    [
        ("aaa", (0, 0, 0), [[0, 1, 2]]),
        ("aabb", (0, 0, 0, 0), [[0, 1], [2, 3]]),  # a file system that both see
        ("abab", (0, 1, 0, 1), [[0, 2], [1, 3]]),  # disks of their own, and ranks dealt out in turn
        (
            "aaa",
            (0, 1, 0),
            [[0, 2], [1]],
        ),  # containers of one machine, with other folders under one path
    ],
)
def test_each_shard_is_read_once_where_it_is_the_same_file(
    caches,
    monkeypatch: pytest.MonkeyPatch,
    machines: str,
    copies: tuple[int, ...],
    groups: list[list[int]],
) -> None:
    together = Processes(machines, monkeypatch)
    readers = [CacheReader(caches[copy]) for copy in copies]
    assert together.run(lambda rank: check_shards([readers[rank]])) == [None] * len(machines)
    for ranks in groups:
        read = [each for rank in ranks for each in together.reads[rank]]
        assert sorted(read) == [(caches[copies[ranks[0]]].name, shard) for shard in range(SHARDS)]
        shares = [len(together.reads[rank]) for rank in ranks]
        assert max(shares) - min(shares) <= 1
    before = [len(each) for each in together.reads]
    together.run(lambda rank: list(readers[rank]))
    assert [len(each) for each in together.reads] == before, (
        "they are checked again when they are read"
    )


@pytest.mark.parametrize("copy", [0, 1])
def test_damage_on_any_node_ends_all_processes(
    caches, monkeypatch: pytest.MonkeyPatch, copy: int
) -> None:
    """Whoever finds it; nobody goes on to wait for those who have stopped."""
    damage(caches[copy], 3)
    together = Processes("aabb", monkeypatch)
    errors = together.run(lambda rank: check_shards([CacheReader(caches[rank // 2])]))
    assert all(isinstance(error, DamagedCacheError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "shard-00003" in str(errors[0])
    assert "sha256" in str(errors[0])


def test_several_caches_are_shared_out_together(caches, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Processes("aa", monkeypatch)
    together.run(lambda rank: check_shards([CacheReader(cache) for cache in caches]))
    assert sorted(together.reads[0] + together.reads[1]) == [
        (name, shard) for name in ("here", "there") for shard in range(SHARDS)
    ]
    assert [len(each) for each in together.reads] == [SHARDS, SHARDS]


def test_a_process_alone_checks_what_it_reads(caches, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Processes("a", monkeypatch)
    reader = CacheReader(caches[0])
    together.run(lambda rank: check_shards([reader]))
    assert together.reads == [[]]
    together.run(lambda rank: reader[0])
    assert together.reads == [[("here", 0)]]
