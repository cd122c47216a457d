"""Remotes: the caches that they hold, and remotes that are wrong, silent or hostile."""

from __future__ import annotations

import json
import logging
import re
import uuid
from pathlib import Path

import fsspec
import pytest

from logitcask.cache_format.catalog import remotes
from logitcask.cache_format.catalog.remotes import config_file, remote_entries, remotes_of
from logitcask.cache_format.errors import ConfigError
from logitcask.cache_format.share.copy import push


@pytest.fixture
def remote(home, make_cache, tmp_path) -> str:
    """A store in memory with caches ``a`` and ``b``, which the home's config names."""
    url = f"memory://{uuid.uuid4()}"
    for name in "ab":
        push(tmp_path / name, f"{url}/{name}") if make_cache(tmp_path / name, name) else None
    configure(home, url)
    return url


def configure(home, *urls):
    home.folder.mkdir(exist_ok=True)
    config_file(home).write_text(json.dumps({"remotes": list(urls)}))


def test_without_a_config_there_are_none(home):
    assert remotes_of(home) == ()
    assert remote_entries(home) == []


def test_every_folder_with_a_cache_is_found(home, remote):
    fsspec.filesystem("memory").pipe_file(f"{remote}/c/notes.txt", b"no cache")
    entries = {entry.where: entry.teacher for entry in remote_entries(home)}
    assert entries == {f"{remote}/a": "a", f"{remote}/b": "b"}


def test_a_remote_may_be_a_cache_or_a_folder_on_disk(home, remote, tmp_path):
    configure(home, f"{remote}/a", str(tmp_path))
    assert {entry.where for entry in remote_entries(home)} == {
        *(f"{remote}/a", f"{tmp_path}/a", f"{tmp_path}/b")
    }


def test_manifests_are_read_once(home, remote, monkeypatch, make_cache, tmp_path):
    first = remote_entries(home)
    read = []
    real = remotes.read_manifest
    monkeypatch.setattr(remotes, "read_manifest", lambda *a: read.append(a[2]) or real(*a))
    assert remote_entries(home) == first
    assert read == []
    push(tmp_path / "b", f"{remote}/a", force=True)
    assert {entry.teacher for entry in remote_entries(home)} == {"b"}
    assert read == [f"{remote}/a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[" * 5_000_000, "more than 4194304 values"),
        (b'{"format": "logitcask", "format_version": 99}', "upgrade logitcask"),
    ],
)
def test_a_hostile_manifest_is_left_out(home, remote, content, said, caplog):
    fsspec.filesystem("memory").pipe_file(f"{remote}/a/manifest.json", content)
    assert [entry.where for entry in remote_entries(home)] == [f"{remote}/b"]
    assert f"{remote}/a is left out: " in caplog.text
    assert said in caplog.text


def test_a_manifest_that_lies_about_its_content_is_left_out(home, remote, caplog):
    filesystem = fsspec.filesystem("memory")
    text = json.loads(filesystem.cat_file(f"{remote}/a/manifest.json"))
    text["fingerprint"] = "0" * 64
    filesystem.pipe_file(f"{remote}/a/manifest.json", json.dumps(text).encode())
    assert [entry.where for entry in remote_entries(home)] == [f"{remote}/b"]
    assert "its manifest contradicts itself" in caplog.text


def test_a_remote_that_cannot_be_reached_is_a_warning(home, remote, caplog):
    configure(home, "nosuchprotocol://x", "memory://nothing/there", remote)
    with caplog.at_level(logging.WARNING):
        assert len(remote_entries(home)) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("the remote nosuchprotocol://x is left out: ")
    assert lines[1].startswith("the remote memory://nothing/there is left out: there is no such")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("remotes: [", "is not a YAML file"),
        ("remotes: s3://one", "remotes: .*found 's3://one'.*expected `remotes:` and a list"),
        ("remote: [a]", "remote: Extra inputs"),
        ("remotes: [3]", r"remotes\.0: .*found 3"),
    ],
)
def test_a_wrong_config_is_one_line(home, text, said):
    home.folder.mkdir()
    config_file(home).write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        remotes_of(home)
    assert "\n" not in str(error.value)


def test_the_config_of_the_docs(home):
    docs = Path(__file__).parents[3] / "docs" / "catalog.md"
    (text,) = re.findall(r"^```yaml\n(remotes:.*?)^```", docs.read_text(), re.MULTILINE | re.DOTALL)
    home.folder.mkdir()
    config_file(home).write_text(text)
    assert remotes_of(home) == (
        *("s3://bucket/caches", "hf://datasets/ORG/NAME", "/shared/caches"),
    )


def test_a_damaged_memory_is_read_again(home, remote):
    first = remote_entries(home)
    (memory,) = (home.folder / "remotes").iterdir()
    for content in ("{", "[]", json.dumps({f"{remote}/a": {"stamp": 1}})):
        memory.write_text(content)
        assert remote_entries(home) == first
