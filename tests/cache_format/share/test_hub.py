"""Pushing to a repository of the hub: what is sent, in what order, and that it goes on. The hub
is a stand-in.
"""

from __future__ import annotations

import hashlib
import inspect
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from logitcask.cache_format import CacheError, UserError
from logitcask.cache_format.share import destinations
from logitcask.cache_format.share.copy import pull, push

SHARDS = 3


class Hub(MemoryFileSystem):
    """What HfFileSystem shows of a repository: files with the sha256 of large ones."""

    protocol = "hf"
    endpoint, token = "https://hub", None
    store, pseudo_dirs = {}, [""]  # not those of memory://

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("hf://").strip("/")

    def info(self, path, **options):
        found = super().info(path, **options)
        if found["type"] == "file" and path.endswith(".arrow"):
            found["lfs"] = {"sha256": hashlib.sha256(self.cat_file(path)).hexdigest()}
        return found


class HubApi:
    """What HfApi does with a repository, for one that lies in ``Hub``. Stands in for the real
    hub.
    """

    def __init__(self, endpoint, token):
        self.files = Hub()

    def create_repo(self, repo_id, *, repo_type, exist_ok, private):
        assert (repo_type, exist_ok, private) == ("dataset", True, True)
        CALLS.append("create_repo")

    def create_branch(self, repo_id, *, repo_type, branch, exist_ok):
        CALLS.append(f"create_branch {branch}")

    def preupload_lfs_files(self, repo_id, additions, *, repo_type, revision):
        CALLS.extend(f"upload {each.path_in_repo}" for each in additions)

    def create_commit(self, repo_id, operations, *, commit_message, repo_type, revision):
        CALLS.append("commit " + " ".join(each.path_in_repo for each in operations))
        root = f"datasets/{repo_id}" + (f"@{revision}" if revision else "")
        for each in operations:
            if hasattr(each, "path_or_fileobj"):
                with each.as_file() as file:
                    self.files.pipe_file(f"{root}/{each.path_in_repo}", file.read())
            else:
                self.files.rm_file(f"{root}/{each.path_in_repo}")


CALLS: list[str] = []


@pytest.fixture
def hub(monkeypatch):
    real = pytest.importorskip("huggingface_hub").HfApi
    for name in ("create_repo", "create_branch", "preupload_lfs_files", "create_commit"):
        known = inspect.signature(getattr(real, name)).parameters.keys()
        assert inspect.signature(getattr(HubApi, name)).parameters.keys() <= known
    monkeypatch.setattr("huggingface_hub.HfApi", HubApi)
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    monkeypatch.setattr(destinations, "HUB_COMMIT_FILES", 2)
    CALLS.clear()
    Hub.store.clear()
    return CALLS


@pytest.mark.parametrize("branch", ["", "@v1"])
def test_push_to_the_hub(tmp_path, cache, hub, branch, write_cache, files_at):
    url = f"hf://datasets/org/name{branch}"
    push(cache, url)
    names = [f"data/shard-{i:05d}.arrow" for i in range(SHARDS)]
    assert [call for call in hub if not call.startswith("create")] == [
        f"upload {names[0]}",
        f"upload {names[1]}",
        f"commit {names[0]} {names[1]}",
        f"upload {names[2]}",
        f"commit {names[2]}",
        "commit README.md manifest.json",
    ]
    assert hub[: 1 + bool(branch)] == ["create_repo", "create_branch v1"][: 1 + bool(branch)]
    assert files_at(url) == files_at(cache)
    pull(url, tmp_path / "copy")
    assert files_at(tmp_path / "copy") == files_at(cache)

    hub.clear()
    assert push(cache, url).unchanged
    assert hub == []

    other = write_cache(tmp_path / "other", 1)
    push(other, url, force=True)
    assert [call for call in hub if call.startswith("commit")] == [
        f"commit manifest.json {names[1]} {names[2]}",
        f"commit {names[0]}",
        "commit README.md manifest.json",
    ]
    assert files_at(url) == files_at(other)


def test_a_push_to_the_hub_goes_on(cache, hub, monkeypatch, files_at):
    commit = HubApi.create_commit

    def fail(self, *arguments, **options):
        commit(self, *arguments, **options)
        raise ConnectionError("gone")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CacheError, match=r"hf://datasets/org/name.*gone"),
    ):
        patch.setattr(HubApi, "create_commit", fail)
        push(cache, "hf://datasets/org/name")
    assert "manifest.json" not in files_at("hf://datasets/org/name")
    assert push(cache, "hf://datasets/org/name").files_skipped == 2


def test_from_a_url_to_the_hub(tmp_path, cache, hub, files_at):
    push(cache, f"memory://{tmp_path}")
    push(f"memory://{tmp_path}", "hf://datasets/org/name/in/here")
    assert files_at("hf://datasets/org/name/in/here") == files_at(cache)


def test_not_a_data_set_of_the_hub(cache, hub):
    with pytest.raises(UserError, match="names no data set of the hub"):
        push(cache, "hf://org/name")
