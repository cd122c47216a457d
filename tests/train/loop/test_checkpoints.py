"""Checkpoints by their ``trainer_state.json``: whose they are, and which one a run goes on from."""

from __future__ import annotations

import json
import logging

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.train.loop import checkpoints
from logitcask.train.loop.checkpoints import (
    CacheStamp,
    best_checkpoint,
    last_checkpoint,
    named_checkpoint,
    warn_of_other_batches,
)

CACHES = ("a" * 64, "b" * 64)


@pytest.fixture
def written(tmp_path):
    """``written(name, step)``: a checkpoint of a run on ``CACHES``."""

    def write(name, step, **stamp):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        stamps = {CacheStamp.__name__: CacheStamp(CACHES).state()} | stamp
        state = {"global_step": step, "stateful_callbacks": stamps}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        return folder

    return write


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path, written):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        written(f"checkpoint-{step}", step)
    written("other-1000", 1000)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 30', "[]", "{}"])
def test_a_checkpoint_that_was_cut_short_is_removed(tmp_path, written, state):
    whole = written("checkpoint-20", 20)
    cut = tmp_path / "checkpoint-30"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    if state is not None:
        (cut / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == whole
    assert not cut.exists()


def test_a_named_checkpoint_is_one_of_the_same_caches(written):
    folder = written("elsewhere/checkpoint-20", 20)
    assert named_checkpoint(str(folder), CACHES, 21) == folder
    with pytest.raises(UserError, match="has made 20 steps, and this run is to make 20 in all"):
        named_checkpoint(str(folder), CACHES, 20)
    for others in (CACHES[::-1], CACHES[:1], (*CACHES, "c" * 64)):
        with pytest.raises(UserError, match="was trained from another cache: fingerprint aaaaaaaa"):
            named_checkpoint(str(folder), others, 21)


def test_a_checkpoint_of_another_program_says_nothing_of_its_cache(tmp_path, written):
    folder = written("checkpoint-5", 5, **{CacheStamp.__name__: {}})
    with pytest.raises(UserError, match="does not say which cache it was trained from"):
        named_checkpoint(str(folder), CACHES, 9)
    with pytest.raises(UserError, match="is no complete checkpoint"):
        named_checkpoint(str(tmp_path / "nowhere"), CACHES, 9)


def test_the_home_folder_is_found(tmp_path, written, monkeypatch):
    folder = written("checkpoint-5", 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_checkpoint("~/checkpoint-5", CACHES, 9) == folder


def test_the_best_student_is_that_of_this_folder_first(tmp_path, written):
    recorded = written("before/checkpoint-4", 4)
    output = tmp_path / "after"
    assert best_checkpoint(str(recorded), output) == recorded
    here = written("after/checkpoint-4", 4)
    assert best_checkpoint(str(recorded), output) == here
    with pytest.raises(UserError, match="the best student so far was saved in checkpoint-8"):
        best_checkpoint(str(tmp_path / "before" / "checkpoint-8"), output)


@pytest.mark.parametrize(("now", "warned"), [(1, False), (4, True)])
def test_other_processes_take_other_batches(written, monkeypatch, caplog, now, warned):
    folder = written("checkpoint-5", 5)  # by one process
    monkeypatch.setattr(checkpoints, "processes", lambda: (0, now))
    with caplog.at_level(logging.WARNING):
        warn_of_other_batches(folder)
    said = [r.message for r in caplog.records]
    assert bool(said) == warned
    assert all("was made by 1 process(es), and 4 go on" in line for line in said)


def test_a_checkpoint_that_says_nothing_of_processes_is_not_warned_of(written, monkeypatch, caplog):
    folder = written("checkpoint-5", 5, **{CacheStamp.__name__: {}})
    monkeypatch.setattr(checkpoints, "processes", lambda: (0, 4))
    warn_of_other_batches(folder)
    assert caplog.records == []
