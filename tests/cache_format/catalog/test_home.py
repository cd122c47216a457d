"""The home: entries of caches, by their place on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from logitcask.cache_format.catalog import home as homes
from logitcask.cache_format.catalog import presence
from logitcask.cache_format.catalog.home import (
    Home,
    is_there,
    name_of,
    note_use,
    place_of,
    using,
)


def the_entry(home: Home):
    (found,) = home.entries()
    return found


def test_an_entry_says_what_the_manifest_says(home, make_cache, tmp_path):
    manifest = make_cache(tmp_path / "cache", teacher="big", sequences=5)
    home.register(tmp_path / "cache", manifest)
    entry, _ = the_entry(home)
    assert entry.where == str((tmp_path / "cache").resolve())
    assert (entry.fingerprint, entry.content_sha256) == (
        manifest.fingerprint,
        manifest.content_sha256,
    )
    assert (entry.teacher, entry.sequences, entry.tokens) == ("big", 10, 400)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache/data").iterdir())
    assert entry.bytes == on_disk
    assert is_there(entry)


def test_registering_copies_no_cache(home, make_cache, tmp_path):
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache", sequences=50))
    taken = sum(file.stat().st_size for file in home.folder.rglob("*") if file.is_file())
    assert taken < 2_000


def test_one_place_has_one_entry(home, make_cache, tmp_path, monkeypatch):
    manifest = make_cache(tmp_path / "cache")
    home.register(tmp_path / "cache", manifest)
    monkeypatch.chdir(tmp_path)
    home.register("cache", manifest)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    home.register(tmp_path / "link", manifest)
    home.register(f"file://{tmp_path}/cache", manifest)
    assert len(list(home.entries())) == 1


def test_the_last_use_is_that_of_the_latest_training(home, make_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGITCASK_HOME", str(home.folder))
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache"))
    file = next(home.entries_folder.iterdir())
    os.utime(file, (1000, 1000))
    assert the_entry(home)[1] == 1000
    note_use(str(tmp_path / "cache"))
    assert the_entry(home)[1] > 1e9


def test_a_training_registers_what_it_reads_and_keeps_it_in_use(
    home, make_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOGITCASK_HOME", str(home.folder))
    make_cache(tmp_path / "cache")
    with using([str(tmp_path / "cache"), "memory://elsewhere/cache"]):
        entry, _ = the_entry(home)
        assert entry.name in home.used()
        assert name_of("memory://elsewhere/cache") in home.used()
        assert not home.begin_removal(entry)
    assert home.used() == set()
    assert home.begin_removal(entry)


def test_a_killed_training_counts_until_its_sign_expires(home, make_cache, tmp_path, fork):
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache"))
    entry, _ = the_entry(home)

    def train():
        with home.in_use(entry.where):
            os.kill(os.getpid(), 9)

    child = fork(train)
    child.join()
    assert not home.begin_removal(entry)
    (sign,) = home.uses_folder.iterdir()
    old = sign.stat().st_mtime - presence.EXPIRES - 1
    os.utime(sign, (old, old))
    assert home.begin_removal(entry)
    assert list(home.uses_folder.iterdir()) == []


def test_a_removal_in_progress_is_seen_by_readers(home, make_cache, tmp_path):
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache"))
    entry, last_use = the_entry(home)
    with home.reading(entry) as there:
        assert there
        assert not home.begin_removal(entry)
    assert home.begin_removal(entry)
    assert the_entry(home)[1] == last_use
    with home.reading(entry) as there:
        assert not there


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"where": 3}'])
def test_a_damaged_entry_is_left_out(home, make_cache, tmp_path, content):
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache"))
    (home.entries_folder / f"{'0' * 32}.json").write_bytes(content)
    assert len(list(home.entries())) == 1


def test_a_home_that_takes_no_files_is_no_error(make_cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    home = Home(tmp_path / "file" / "home")  # nothing can be made there, not even by root
    monkeypatch.setenv("LOGITCASK_HOME", str(home.folder))
    manifest = make_cache(tmp_path / "cache")
    home.register(tmp_path / "cache", manifest)
    home.note_use(tmp_path / "cache")
    with using([str(tmp_path / "cache")]):
        note_use(str(tmp_path / "cache"))
    assert list(home.entries()) == []


def test_a_full_disk_leaves_the_old_entry(home, make_cache, tmp_path, monkeypatch):
    manifest = make_cache(tmp_path / "cache")
    home.register(tmp_path / "cache", manifest)
    before = the_entry(home)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(homes.os, "fsync", full)
    home.register(tmp_path / "cache", manifest)
    with using([tmp_path / "cache"]):
        pass
    assert the_entry(home)[0] == before[0]
    assert [file.suffix for file in home.entries_folder.iterdir()] == [".json"]


def test_the_home_is_beside_the_shards_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LOGITCASK_HOME")
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "cache"))
    assert homes.home().folder == tmp_path / "cache" / "home"
    monkeypatch.setenv("LOGITCASK_HOME", str(tmp_path / "own"))
    assert homes.home().folder == tmp_path / "own"


def test_places():
    assert place_of("s3://bucket/cache") is None
    assert place_of("nosuchprotocol://x/y") is None
    assert place_of("file:///tmp/./a") == place_of("/tmp/a") == os.path.realpath("/tmp/a")
    assert place_of(Path("x")) == os.path.realpath("x")


def test_an_entry_of_a_later_version_is_read(home, make_cache, tmp_path):
    home.register(tmp_path / "cache", make_cache(tmp_path / "cache"))
    file = next(home.entries_folder.iterdir())
    file.write_text(json.dumps({**json.loads(file.read_text()), "new": 1}))
    assert the_entry(home)[0].teacher == "m"


def test_a_folder_whose_name_is_no_text(home, make_cache, tmp_path):
    """JSON cannot hold it, so it is not registered; nothing else fails."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    home.register(folder, make_cache(folder))
    home.register_at(folder)
    with home.in_use(folder):
        assert home.used() == {name_of(str(folder))}
    assert list(home.entries()) == []
    assert list(home.entries_folder.iterdir()) == []


def test_a_cache_of_very_many_files_is_listed(home, make_cache, tmp_path):
    manifest = make_cache(tmp_path / "cache")
    source = ", ".join(f"part-{n}.jsonl" for n in range(10_000))
    data = manifest.data.model_copy(update={"source": source})
    home.register(tmp_path / "cache", manifest.model_copy(update={"data": data}))
    entry, _ = the_entry(home)
    assert entry.data.startswith("part-0.jsonl, part-1.jsonl, ")
