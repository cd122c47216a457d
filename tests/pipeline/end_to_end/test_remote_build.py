"""Builds that write to a store: the cache of a local build, whatever dies on the way, and little
room taken here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from logitcask.cache_format import (
    CacheError,
    CacheInUseError,
    CacheReader,
    DamagedCacheError,
    IncompleteCacheError,
    UserError,
    verify,
)
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.share import copy as share
from logitcask.cache_format.share.remote_writer import (
    RemoteCacheWriter,
    remove_remote_cache,
    work_folder,
)
from logitcask.cache_format.storage import files as storage
from logitcask.cache_format.storage.files import open_filesystem
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig


class _Crash(BaseException):
    """Of the whole process."""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "shards"))


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    root = "memory://" if request.param == "memory" else request.getfixturevalue("s3")
    yield f"{root}/{uuid.uuid4()}/cache"
    MemoryFileSystem.store.clear()


@pytest.fixture
def memory() -> Iterator[str]:
    yield f"memory://{uuid.uuid4()}/cache"
    MemoryFileSystem.store.clear()


def fields(output: object, shard_tokens: int = 1_500, **store: Any) -> dict[str, Any]:
    return {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 128, "max_tokens": 6_000},
        "store": {"top_k": 8, "shard_tokens": shard_tokens, **store},
        "output": str(output),
    }


def config_of(output: object, **store: Any) -> BuildConfig:
    return BuildConfig.model_validate(fields(output, **store))


def files_at(url: str) -> set[str]:
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    return {path.removeprefix(f"{root}/") for path in filesystem.find(root)}


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """The manifest of the same build in a local folder."""
    return build(config_of(tmp_path / "local")).manifest


def expected(manifest: Any) -> set[str]:
    return {
        "README.md",
        "manifest.json",
        "tail_prior.arrow",
        *(shard.path for shard in manifest.shards),
    }


def test_the_cache_is_that_of_a_local_build(url: str, whole: Any) -> None:
    manifest = build(config_of(url)).manifest
    assert (manifest.content_sha256, manifest.fingerprint) == (
        whole.content_sha256,
        whole.fingerprint,
    )
    assert files_at(url) == expected(whole)
    assert verify(url, deep=True) == []
    assert len(CacheReader(url)) == whole.statistics.sequences
    assert not work_folder(url).exists()
    assert build(config_of(url)).reused
    with pytest.raises(
        UserError,
        match=re.escape(f"{url} holds a finished cache with other settings: store.top_k: 8 -> 9"),
    ):
        build(config_of(url, top_k=9))
    again = build(config_of(url, top_k=9), restart=True)
    assert not again.reused
    assert CacheReader(url).manifest.store.top_k == 9


def test_one_shard_lies_here_at_a_time(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    write = share.Store._write

    def looking(self: Any, name: str, *rest: Any) -> Any:
        nonlocal most
        most = max(most, len(list((work_folder(memory) / "data").iterdir())))
        return write(self, name, *rest)

    monkeypatch.setattr(share.Store, "_write", looking)
    assert len(build(config_of(memory)).manifest.shards) >= 4
    assert most == 1


def test_a_crash_at_every_operation(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after whatever is done in the store: the next build ends with the same cache,
    and leaves nothing behind.
    """
    # Two shards, and no audit, which touches no store: many builds are made of it.
    few = fields(memory, shard_tokens=800)
    few["data"] |= {"max_tokens": 1_500}
    config = BuildConfig.model_validate({**few, "audit": {"sequences": 0}})
    whole = build(config.model_copy(update={"output": tmp_path / "local"})).manifest
    assert len(whole.shards) == 2
    crash_at, done, after = 0, 0, False

    def crashing(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == crash_at and not after:
                raise _Crash
            result = real(*arguments, **options)
            if done == crash_at:
                raise _Crash
            return result

        return call

    for name in ("_write", "remove", "read", "holds"):
        monkeypatch.setattr(share.Store, name, crashing(getattr(share.Store, name)))
    build(config)
    operations = done
    assert operations > 20
    for crash_at in range(1, operations + 1, 2 if operations > 60 else 1):
        after = not after
        remove_remote_cache(memory) if files_at(memory) else None
        done = 0
        try:
            build(config)
        except _Crash:
            if "manifest.json" not in files_at(memory) and files_at(memory):
                with pytest.raises(IncompleteCacheError):
                    CacheReader(memory)
        number, crash_at = crash_at, 0
        manifest = build(config).manifest
        assert manifest.content_sha256 == whole.content_sha256, number
        assert files_at(memory) == expected(whole), number
        assert not work_folder(memory).exists(), number


def test_kill_at_random_moments(
    s3: str, tmp_path: Path, whole: Any, rng: np.random.Generator
) -> None:
    url = f"{s3}/{uuid.uuid4()}/cache"
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(fields(url)))
    command = [
        sys.executable,
        "-c",
        "from logitcask.pipeline.cli import main; main()",
        "build",
        str(file),
    ]
    for wanted in (0, 1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        commits = work_folder(url) / BUILD_DIR / "commits"
        while process.poll() is None and len(list(commits.glob("*.json"))) < wanted:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert CacheReader(url).manifest.content_sha256 == whole.content_sha256
    assert verify(url, deep=True) == []
    assert files_at(url) == expected(whole)


def test_a_second_builder_is_refused(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: Any
) -> None:
    with RemoteCacheWriter(memory) as first:
        with pytest.raises(CacheInUseError):
            build(config_of(memory))
        first_machine = str(tmp_path / "shards")
        monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "another machine"))
        with pytest.raises(CacheInUseError, match=r"is being built from \S+, since .*--restart"):
            build(config_of(memory))
        # Whoever insists gets the place, and the first builder finds out before it sends anything.
        build(config_of(memory), restart=True)
        with pytest.raises(CacheInUseError, match="removed this one's marker"):
            first._require_ours()
    assert CacheReader(memory).manifest.content_sha256 == whole.content_sha256
    monkeypatch.setenv("LOGITCASK_CACHE", first_machine)
    assert build(config_of(memory)).reused


def test_the_files_of_others_stay(memory: str) -> None:
    filesystem, root = open_filesystem(memory)
    filesystem.pipe_file(f"{root}/README.md", b"mine")
    with pytest.raises(UserError, match=r"is no cache, but has README\.md of its own"):
        build(config_of(memory))
    with pytest.raises(UserError, match=r"is no cache, but has README\.md of its own"):
        build(config_of(memory), restart=True)
    assert filesystem.cat_file(f"{root}/README.md") == b"mine"


def test_a_shard_that_is_gone_is_missed(
    memory: str, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    finish = share.Store.finish

    def stop(self: Any, texts: dict[str, bytes]) -> None:
        if "manifest.json" in texts:
            raise _Crash
        finish(self, texts)

    with monkeypatch.context() as patch, pytest.raises(_Crash):
        patch.setattr(share.Store, "finish", stop)
        build(config_of(memory))
    filesystem, root = open_filesystem(memory)
    filesystem.rm_file(f"{root}/data/shard-00002.arrow")
    with pytest.raises(DamagedCacheError, match=r"shard-00002\.arrow is gone .*--restart"):
        build(config_of(memory))
    assert build(config_of(memory), restart=True).manifest.content_sha256 == whole.content_sha256


def test_a_store_that_cannot_be_reached_is_one_line(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("no such key")

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    with pytest.raises(
        CacheError,
        match=r"cannot be reached: no such key; check the address, the network and your access",
    ):
        build(config_of(memory))
    with pytest.raises(UserError, match="a web server hands out files and takes none"):
        build(config_of("http://127.0.0.1:9/cache"))


def test_outputs_are_folders_or_urls(tmp_path: Path) -> None:
    assert config_of("caches/x").output == Path("caches/x")
    assert config_of(f"file://{tmp_path}/x").output == tmp_path / "x"
    assert config_of("s3://bucket/x").output == "s3://bucket/x"
    for output in ("caches/x", "s3://bucket/x"):
        config = config_of(output)
        assert BuildConfig.model_validate_json(config.model_dump_json()) == config
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(fields("s3://bucket/x")))
    assert load_config(BuildConfig, file, ["scale.workers=2"]).output == "s3://bucket/x"
