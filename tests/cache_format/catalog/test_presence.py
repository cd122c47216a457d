"""Signs of life of processes that share a folder."""

from __future__ import annotations

import os
import threading
import time

from logitcask.cache_format.catalog import presence
from logitcask.cache_format.catalog.presence import alive, clock, marked


def test_a_sign_lasts_as_long_as_its_context(tmp_path):
    with marked(tmp_path, "a"), marked(tmp_path, "a"), marked(tmp_path, "b"):
        assert alive(tmp_path) == {"a", "b"}
        assert len(list(tmp_path.iterdir())) == 3
    assert alive(tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_sign_is_touched_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT", 0.01)
    with marked(tmp_path, "a"):
        (file,) = tmp_path.iterdir()
        os.utime(file, (0, 0))
        while file.stat().st_mtime == 0:  # the thread's next touch
            time.sleep(0.01)
        assert alive(tmp_path) == {"a"}
    assert not [each for each in threading.enumerate() if each.name == "sign of life"]


def test_an_expired_sign_is_removed(tmp_path):
    (tmp_path / "dead.1").touch()
    (tmp_path / "living.2").touch()
    old = clock(tmp_path) - presence.EXPIRES - 1
    os.utime(tmp_path / "dead.1", (old, old))
    assert alive(tmp_path) == {"living"}
    assert [file.name for file in tmp_path.iterdir()] == ["living.2"]


def test_a_folder_that_takes_no_files_has_no_signs(tmp_path):
    (tmp_path / "file").touch()
    with marked(tmp_path / "file" / "uses", "a"):
        assert alive(tmp_path / "file" / "uses") == set()
    assert clock(tmp_path / "file") > 1e9
