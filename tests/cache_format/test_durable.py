"""A file is there whole or as it was before, whatever fails on the way."""

from __future__ import annotations

import errno
import os

import pytest
from pydantic import BaseModel

from logitcask.cache_format import durable
from logitcask.cache_format.durable import load_state, permit_as_umask, write_durably, writing_to
from logitcask.cache_format.errors import UserError


class State(BaseModel):
    """A state file of two fields."""

    step: int
    name: str


@pytest.fixture
def operations(monkeypatch):
    """What is flushed and renamed, in order; ``fail_at`` makes one of them fail."""
    done: list[tuple[str, str]] = []
    fail_at: list[int] = []

    def recorded(what, operation, name_of):
        def call(*arguments):
            if len(done) in fail_at:
                raise OSError(errno.EIO, "the disk is gone")
            done.append((what, name_of(*arguments)))
            return operation(*arguments)

        return call

    def file_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(durable.os, "fsync", recorded("fsync", os.fsync, file_of))
    monkeypatch.setattr(
        durable.os, "replace", recorded("replace", os.replace, lambda a, b: os.path.basename(b))
    )
    return done, fail_at


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells files by /proc")
def test_content_is_flushed_before_its_name_and_the_folder_after(tmp_path, operations):
    done, _ = operations
    write_durably(tmp_path / "a.json", "new")
    assert done == [("fsync", "a.json.tmp"), ("replace", "a.json"), ("fsync", tmp_path.name)]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells files by /proc")
@pytest.mark.parametrize(("at", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_failure_leaves_one_of_both(tmp_path, operations, at, found):
    file = tmp_path / "a.json"
    file.write_text("old")
    operations[1].append(at)
    with pytest.raises(OSError, match="the disk is gone"):
        write_durably(file, "new")
    assert file.read_text() == found


def test_bytes_text_and_a_scratch_folder(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    write_durably(tmp_path / "a", "né", scratch=scratch)
    write_durably(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == "né".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "scratch"]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1}', '{"step": "x", "name": "n"}', "\xff"])
def test_a_state_file_of_another_version_is_refused_with_what_to_do(tmp_path, content):
    file = tmp_path / "state.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"state\.json was not written by this version.*; do this"):
        load_state(State, file, "do this")


def test_a_state_file_comes_back(tmp_path):
    write_durably(tmp_path / "s", State(step=3, name="n").model_dump_json())
    assert load_state(State, tmp_path / "s") == State(step=3, name="n")


def test_only_what_the_system_refuses_is_the_users(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    says = r"cannot write to .*place: No space left"
    with pytest.raises(UserError, match=says), writing_to(tmp_path / "place"):
        raise full
    with pytest.raises(ZeroDivisionError), writing_to(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_for_their_owner_only_get_the_permissions_of_new_ones(tmp_path, mask):
    """Others keep theirs: executables, files that are open to more or fewer, and those behind
    links.
    """
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    modes = {"weights": 0o600, "script": 0o700, "open": 0o664, "sealed": 0o400}
    for name, mode in modes.items():
        (folder / name).touch()
        (folder / name).chmod(mode)
    elsewhere.touch()
    elsewhere.chmod(0o600)
    (folder / "link").symlink_to(elsewhere)
    before = os.umask(mask)
    try:
        permit_as_umask(folder)
        (tmp_path / "new").touch()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    found = {name: (folder / name).stat().st_mode & 0o777 for name in modes}
    assert found == {**modes, "weights": (tmp_path / "new").stat().st_mode & 0o777}
    assert elsewhere.stat().st_mode & 0o777 == 0o600
