"""``teacher-cache ls``, ``rm`` and ``gc`` as a user calls them."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from logitcask.cache_format import CacheReader, CacheWriter
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.catalog.remotes import config_file
from logitcask.cache_format.share.copy import push
from logitcask.pipeline.cli import main


@pytest.fixture
def run(monkeypatch, capfd):
    """``run(*arguments)``: (exit code, stdout, stderr) of ``teacher-cache``."""
    monkeypatch.setattr(logging.root, "handlers", [])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["teacher-cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        logging.root.handlers.clear()
        return int(stop.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def home(tmp_path, monkeypatch, header, sequence, rng) -> Home:
    """A home with caches ``old`` and ``new`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGITCASK_HOME", str(tmp_path / "home"))
    home = Home(tmp_path / "home")
    for name in ("new", "old"):
        head = header()
        with CacheWriter(tmp_path / name) as writer:
            head = writer.begin(
                head.model_copy(
                    update={"teacher": head.teacher.model_copy(update={"model": f"org/{name}"})}
                )
            )
            with writer.shard(0) as shard:
                shard.append(sequence(rng, "a"))
            home.register(tmp_path / name, writer.finish(head, 1))
    (old,) = (entry for entry, _ in home.entries() if entry.teacher == "org/old")
    used = time.time() - 9 * 86_400
    os.utime(home.entries_folder / f"{old.name}.json", (used, used))
    return home


def size_of(name: str) -> int:
    """Bytes of its shards."""
    return sum(file.stat().st_size for file in Path(name, "data").iterdir())


def test_ls(run, home):
    code, out, _ = run("ls")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "teacher",
        "data",
        "tokens",
        "B/token",
        "age",
        "last",
        "use",
        "where",
    ]
    assert lines[1].split()[0] == "org/new"
    assert lines[1].endswith("now  new")
    assert lines[2].endswith("9 d  old")
    assert lines[3].startswith("2 caches, ")
    *_, row, total = run("ls", "--teacher", "old")[1].splitlines()
    assert row.startswith("org/old ")
    assert total == f"1 cache, {CacheReader('old').manifest.statistics.bytes:,} bytes"


def test_ls_as_json(run, home):
    document = json.loads(run("ls", "--json")[1])
    assert document["home"] == str(home.folder)
    first, second = document["caches"]
    manifest = CacheReader("new").manifest
    assert first["where"] == str(Path("new").absolute())
    assert first["fingerprint"] == manifest.fingerprint
    assert first["tokens"] == manifest.statistics.tokens == 40
    assert first["last_use"] > second["last_use"]
    assert not first["gone"]


def test_ls_of_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGITCASK_HOME", str(tmp_path / "none"))
    assert run("ls")[:2] == (0, f"no caches in {tmp_path}/none\n")
    assert not (tmp_path / "none").exists()


def test_ls_with_remotes(run, home):
    push("new", "memory://of-ls/cache")
    config_file(home).write_text("remotes: ['memory://of-ls']\n")
    assert "memory://" not in run("ls")[1]
    assert "memory://of-ls/cache" in run("ls", "--remotes")[1]


def test_what_was_removed_by_hand_is_said_and_forgotten(run, home, tmp_path):
    shutil.rmtree("old")
    out = run("ls")[1].splitlines()
    assert out[-2:] == [
        f"1 cache, {CacheReader('new').manifest.statistics.bytes:,} bytes",
        f"no longer there: {tmp_path}/old; `teacher-cache gc` forgets them",
    ]
    assert "forgot 1 that was gone" in run("gc", "--yes")[1]
    assert "no longer" not in run("ls")[1]
    assert Path("new").is_dir()


def test_rm(run, home):
    code, out, _ = run("rm", "old", "--yes")
    assert (code, Path("old").exists()) == (0, False)
    assert out.splitlines()[-1].startswith("removed 1 cache, ")
    assert Path("new").exists()
    fingerprint = CacheReader("new").manifest.fingerprint
    document = json.loads(run("rm", fingerprint[:8], "--yes", "--json")[1])
    assert document["removed"] == [str(Path("new").absolute())]
    assert not Path("new").exists()


def test_rm_asks(run, home, monkeypatch):
    code, _, err = run("rm", "old")
    assert code == 2
    assert "nobody can be asked; give --yes" in err.splitlines()[-1]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, _, err = run("rm", "old")
    assert code == 2
    assert err.splitlines()[-1].endswith("error: nothing was removed")
    assert Path("old").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert run("rm", "old")[0] == 0
    assert not Path("old").exists()


def test_rm_dry_run_removes_nothing(run, home):
    code, out, _ = run("rm", "old", "new", "--dry-run")
    assert code == 0
    assert out.splitlines()[-1].startswith("would remove 2 caches, ")
    assert Path("old").exists()
    assert Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rm", "nothing", "--yes"], "no cache nothing in "),
        (["gc", "--max-size", "many"], "--max-size is 'many'; expected a size such as 200GB"),
        (["gc", "--unused-for", "long"], "--unused-for is 'long'; expected an age such as 12h"),
        (["find"], "nothing is searched for; give CONFIG"),
    ],
)
def test_mistakes_are_one_line(run, home, arguments, said):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


def test_a_cache_in_use_is_never_removed(run, home):
    with home.in_use("old"):
        code, _, err = run("rm", "old", "--yes")
        assert code == 2
        assert "old is in use; wait for the training, build or server" in err
        code, _, err = run("gc", "--max-size", "0", "--yes")
        assert code == 2
        assert f"{size_of('old'):,} bytes are left, more than 0" in err
        assert "in use" in run("ls")[1]
    assert Path("old").exists()
    assert not Path("new").exists()


def test_gc_by_size(run, home):
    sizes = {name: size_of(name) for name in ("old", "new")}
    goal = sizes["old"] + sizes["new"] - 1
    out = run("gc", "--max-size", goal, "--dry-run")[1]
    assert out.splitlines()[-1].endswith(f"which would free {sizes['old']:,} bytes")
    assert Path("old").exists()
    code, out, _ = run("gc", "--max-size", goal, "--yes")
    assert code == 0
    assert out.splitlines()[-1].endswith(f"which freed {sizes['old']:,} bytes")
    assert (Path("old").exists(), Path("new").exists()) == (False, True)
    assert run("gc", "--max-size", goal, "--yes")[1] == "nothing to remove\n"


def test_gc_by_age(run, home):
    assert run("gc", "--unused-for", "10d", "--yes")[1] == "nothing to remove\n"
    document = json.loads(run("gc", "--unused-for", "8d", "--yes", "--json")[1])
    assert document["removed"] == [str(Path("old").absolute())]
    assert document["forgotten"] == 0


def test_pull_derive_and_merge_register(run, home):
    run("derive", "new", "small", "--top-k", "2")
    run("merge", "two", "new", "new", "--number-ids")
    push("new", "memory://of-pull/cache")
    run("pull", "memory://of-pull/cache", "pulled")
    found = {Path(each["where"]).name for each in json.loads(run("ls", "--json")[1])["caches"]}
    assert found == {"old", "new", "small", "two", "pulled"}


def test_a_wrong_config_of_the_home(run, home):
    config_file(home).write_text("remote: []\n")
    code, _, err = run("ls", "--remotes")
    assert code == 2
    assert err.startswith(f"error: {home.folder}/config.yaml: remote: ")
