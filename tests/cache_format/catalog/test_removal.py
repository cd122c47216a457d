"""Removal: what goes first, what stays, and what a kill leaves."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from logitcask.cache_format import CacheReader, CacheWriter, UserError, writer
from logitcask.cache_format.catalog import removal
from logitcask.cache_format.catalog.listing import listing
from logitcask.cache_format.catalog.place import place
from logitcask.cache_format.catalog.removal import garbage, remove, tidy
from logitcask.cache_format.growing import GrowingCache


def size_of(folder: Path) -> int:
    """Bytes of its shards."""
    return sum(file.stat().st_size for file in (folder / "data").iterdir())


@pytest.fixture
def caches(home, make_cache, tmp_path):
    """``caches["a"]`` to ``caches["d"]``: folders; ``a`` was not used for four days, ``d`` for
    one.
    """
    folders = {}
    for name in "abcd":
        folders[name] = tmp_path / name
        home.register(folders[name], make_cache(folders[name], sequences=ord(name) - 90))
    for line in listing(home):
        days = 101 - ord(Path(line.entry.where).name)
        used = time.time() - days * 86_400
        os.utime(home.entries_folder / f"{line.entry.name}.json", (used, used))
    return folders


def names(found) -> str:
    return "".join(Path(line.entry.where).name for line in found.lines)


def test_nothing_is_chosen_without_a_goal(home, caches):
    found = garbage(listing(home))
    assert (names(found), found.freed) == ("", 0)
    assert found.total == sum(map(size_of, caches.values()))


def test_the_longest_unused_go_first(home, caches):
    sizes = {name: size_of(folder) for name, folder in caches.items()}
    total = sum(sizes.values())
    for count in range(5):
        freed = sum(sizes[name] for name in "abcd"[:count])
        found = garbage(listing(home), max_bytes=total - freed)
        assert (names(found), found.freed) == ("abcd"[:count], freed)
        if count:
            assert names(garbage(listing(home), max_bytes=total - freed + 1)) == "abcd"[:count]


@pytest.mark.parametrize(("days", "expected"), [(0.5, "abcd"), (1.5, "abc"), (3.5, "a"), (9, "")])
def test_by_age(home, caches, days, expected):
    assert names(garbage(listing(home), unused_for=days * 86_400)) == expected


def test_what_is_in_use_stays(home, caches):
    with home.in_use(caches["a"]):
        lines = listing(home)
        assert names(garbage(lines, max_bytes=0)) == "bcd"
        used = next(line.entry for line in lines if line.in_use)
        assert not remove(home, used)
    assert len(CacheReader(caches["a"])) == 14
    assert remove(home, used)


def test_what_came_into_use_since_stays(home, caches):
    chosen = garbage(listing(home), max_bytes=0)
    with home.in_use(caches["b"]):
        assert [remove(home, line.entry) for line in chosen.lines] == [True, False, True, True]
    assert [line.entry.where for line in listing(home)] == [str(caches["b"])]
    assert len(CacheReader(caches["b"])) == 16


def test_what_is_being_written_stays(home, caches, header):
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))
    shutil.rmtree(caches["a"])
    with CacheWriter(caches["a"]) as build:
        build.begin(header())
        assert not remove(home, entry)
        assert build.begun
    assert not next(each for each, _ in home.entries() if each.where == entry.where).removal


def test_shared_files_are_not_freed(home, caches, tmp_path):
    """``e`` shares the files of ``a``: neither alone frees what both have."""
    place(str(caches["a"]), CacheReader(caches["a"]).manifest, tmp_path / "e")
    home.register(tmp_path / "e", CacheReader(tmp_path / "e").manifest)
    total = sum(map(size_of, caches.values()))
    assert garbage(listing(home), unused_for=3.5 * 86_400).freed == 0
    found = garbage(listing(home), max_bytes=0)
    assert (names(found), found.freed, found.total) == ("abcde", total, total)
    for line in found.lines[:1]:
        remove(home, line.entry)
    assert len(list(CacheReader(tmp_path / "e"))) == 14


def test_a_cache_of_which_nothing_is_freed_is_not_removed_for_its_size(home, caches, tmp_path):
    """``a``, the longest unused, shares its shards with a cache that is in use."""
    place(str(caches["a"]), CacheReader(caches["a"]).manifest, tmp_path / "e")
    home.register(tmp_path / "e", CacheReader(tmp_path / "e").manifest)
    with home.in_use(tmp_path / "e"):
        lines = listing(home)
        found = garbage(lines, max_bytes=garbage(lines).total - 1)
    assert (names(found), found.freed) == ("b", size_of(caches["b"]))


def test_a_growing_cache_that_is_written_stays(home, header, sequence, rng, tmp_path):
    with GrowingCache(tmp_path / "grown", header()) as cache:
        cache.append(sequence(rng, "s0"))
        home.register(tmp_path / "grown", cache.commit())
        (line,) = listing(home)
        assert not remove(home, line.entry)
        cache.append(sequence(rng, "s1"))
        cache.commit()
    assert len(CacheReader(tmp_path / "grown")) == 2
    assert remove(home, line.entry)
    assert not (tmp_path / "grown").exists()


def test_two_that_remove_the_same(home, caches):
    """The second one finds nothing left, and says no more than that it is gone."""
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))
    assert remove(home, entry)
    assert remove(home, entry)


def test_other_files_in_the_folder_stay(home, caches):
    """They do not count as the cache's either; its preview goes."""
    total = garbage(listing(home)).total
    (caches["a"] / "notes.txt").write_text("mine")
    (caches["a"] / "preview").mkdir()
    (caches["a"] / "preview" / "preview.parquet").write_bytes(b"PAR1")
    assert garbage(listing(home)).total == total
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))
    assert remove(home, entry)
    assert [file.name for file in caches["a"].iterdir()] == ["notes.txt"]


def test_a_folder_that_has_become_anothers_is_forgotten(home, caches):
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))
    assert home.begin_removal(entry)
    shutil.rmtree(caches["a"])
    (caches["a"] / "data").mkdir(parents=True)
    (caches["a"] / "data" / "mine.csv").write_text("1")
    assert names(garbage(listing(home))) == "a"
    assert remove(home, entry)
    assert (caches["a"] / "data" / "mine.csv").exists()
    assert len(listing(home)) == 3


def test_a_folder_of_caches_alone_goes(home, caches):
    for line in listing(home):
        assert remove(home, line.entry)
    assert not any(folder.exists() for folder in caches.values())
    assert list(home.entries()) == []


class Killed(BaseException):
    """As a kill: nothing handles it."""


@pytest.mark.parametrize("step", range(10))
def test_killed_at_any_step_it_goes_on(home, caches, monkeypatch, step):
    """Every unlink of a removal is in turn the last thing that it does."""
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))
    real, count = Path.unlink, 0

    def unlink(self, *arguments, **options):
        nonlocal count
        if self.is_relative_to(caches["a"]) or self.is_relative_to(home.entries_folder):
            count += 1
            if count > step:
                raise Killed
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink)
        remove(home, entry)
        raise Killed  # fewer steps
    left = [line for line in listing(home) if line.entry.where == str(caches["a"])]
    if not left:
        assert not caches["a"].exists()
        return
    assert left[0].gone == (not (caches["a"] / "manifest.json").exists())
    found = garbage(listing(home))
    assert names(found) == "a"
    assert remove(home, found.lines[0].entry)
    assert not caches["a"].exists()
    assert len(listing(home)) == 3


def test_a_refused_removal_leaves_the_cache_usable(home, caches, monkeypatch):
    entry = next(line.entry for line in listing(home) if line.entry.where == str(caches["a"]))

    def refuse(path):
        raise UserError("cannot write")

    monkeypatch.setattr(removal, "remove_cache", refuse)
    with pytest.raises(UserError):
        remove(home, entry)
    with home.reading(entry) as there:
        assert there


def test_tidying_forgets_what_is_gone_and_old_remains(home, caches):
    shutil.rmtree(caches["a"])
    old = time.time() - 2 * 86_400
    for name in ("caches/x.tmp", "claims/k.abc", "claims/k.lock", "temporary/t"):
        file = home.folder / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (old, old))
    (home.folder / "caches" / "young.tmp").touch()
    assert tidy(home, listing(home)) == 1
    assert len(listing(home)) == 3
    left = {file.name for file in home.folder.rglob("*") if file.suffix != ".json"}
    assert {"k.lock", "young.tmp"} <= left
    assert not {"x.tmp", "k.abc", "t"} & left
    assert writer.may_be_cache(caches["b"])
