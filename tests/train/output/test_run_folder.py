"""The folder of a run: one run at a time, one run for good, and nobody else's files."""

from __future__ import annotations

import errno
import json

import filelock
import pytest
from safetensors import SafetensorError

from logitcask.cache_format import UserError
from logitcask.train.output.run_folder import (
    ADAPTER,
    TRIAL,
    begun,
    exclusive,
    refuse_other_files,
    remove_run,
)

RUN = {"config": {"seed": 1, "losses": ["forward_kl"]}, "fingerprint": "abc"}


def write_run(folder, **changes):
    (folder / "run.json").write_text(json.dumps({**RUN, "before": {"kl": 2.5}, **changes}))


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with exclusive(folder):
        other = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=False)
        with pytest.raises(filelock.Timeout):
            other.acquire()
    with (
        filelock.FileLock(folder / ".lock", is_singleton=False),
        pytest.raises(UserError, match="another process is training into"),
        exclusive(folder),
    ):
        pass
    with exclusive(folder):  # free again
        pass


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "cannot write to f: No space left"),
        (OSError(errno.EACCES, "Permission denied"), "cannot write to .*run: Permission denied"),
        (OSError(errno.ENOENT, "No such file"), "cannot write to .*run: No such file"),
        (SafetensorError("I/O error: No space left on device"), "no space left for"),
        (RuntimeError("[enforce fail] . failed writing file data/0"), "no space left for"),
    ],
)
def test_a_disk_that_is_full_is_one_line(tmp_path, error, says):
    with pytest.raises(UserError, match=says) as caught, exclusive(tmp_path / "run"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        # Shared memory of the loader's workers, not the disk.
        RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
        OSError(errno.ECONNRESET, "Connection reset by peer"),
        SafetensorError("header too large"),
    ],
)
def test_what_is_no_full_disk_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, exclusive(tmp_path / "run"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["metrics.json", "model.safetensors", "checkpoint-5", ADAPTER])
def test_files_that_a_run_would_replace_are_refused_unless_they_are_a_runs(tmp_path, name):
    (tmp_path / "notes.txt").touch()
    refuse_other_files(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"has {name} of its own"):
        refuse_other_files(tmp_path)
    write_run(tmp_path)
    refuse_other_files(tmp_path)


def test_only_this_very_run_goes_on(tmp_path):
    assert begun(tmp_path, RUN) is None
    write_run(tmp_path)
    assert begun(tmp_path, RUN) == {"kl": 2.5}
    write_run(tmp_path, config={"seed": 2, "losses": ["forward_kl"]})
    with pytest.raises(UserError, match=r"holds a run with other settings.*: config\.seed: 2 -> 1"):
        begun(tmp_path, RUN)


def test_a_run_is_removed_and_what_is_not_its_own_stays(tmp_path):
    write_run(tmp_path)
    for name in ("checkpoint-1", "checkpoint-20", ADAPTER, TRIAL):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("metrics.json", "report.html", "notes.txt"):
        (tmp_path / name).touch()
    remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    remove_run(tmp_path)


def test_whose_checkpoints_these_are_is_known_to_the_end(tmp_path, monkeypatch):
    """A removal that is killed at any file leaves no checkpoint without ``run.json``."""
    write_run(tmp_path)
    (tmp_path / "metrics.json").touch()
    removed = []
    unlink = type(tmp_path).unlink

    def record(path, **options):
        removed.append((path.name, (tmp_path / "run.json").exists()))
        return unlink(path, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", record)
    remove_run(tmp_path)
    assert removed[-1] == ("run.json", True)
    assert all(there for _, there in removed)
