"""Copies of caches: whole or not a cache, interrupted and resumed anywhere, on several kinds of
places.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import multiprocessing
import os
import shutil
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import typer
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

import logitcask.cache_format.storage.files
from logitcask.cache_format import (
    CacheError,
    CacheInUseError,
    CacheNotFoundError,
    CacheReader,
    CacheWriter,
    DamagedCacheError,
    IncompleteCacheError,
    UserError,
    verify,
)
from logitcask.cache_format.cli import share_commands as share_cli
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.merge import merge
from logitcask.cache_format.layout import BUILD_DIR, PULL_DIR
from logitcask.cache_format.manifest import cache_files
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.share import destinations
from logitcask.cache_format.share.copy import pull, push
from logitcask.cache_format.share.remote_writer import RemoteCacheWriter
from logitcask.cache_format.storage.files import open_filesystem, read_manifest
from logitcask.pipeline.commands.push import push as push_command

SHARDS = 3


@pytest.fixture(params=["memory", "s3", "file"])
def url(request, tmp_path):
    """A new empty place on each kind of file system."""
    if request.param == "file":
        return f"file://{tmp_path}/shared/cache"
    root = "memory://" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{uuid.uuid4()}/cache"


def expected_of(cache):
    return {f"data/shard-{i:05d}.arrow" for i in range(SHARDS)} | {"README.md", "manifest.json"}


def test_there_and_back(tmp_path, cache, url, files_at):
    total, done = [], []
    sent = push(cache, url, on_total=total.append, on_bytes=done.append)
    assert files_at(url) == files_at(cache)
    assert files_at(url).keys() == expected_of(cache)
    size = sum(path.stat().st_size for path in (cache / "data").iterdir())
    assert (sent.files_sent, sent.files_skipped, sent.bytes_sent, sent.unchanged) == (
        SHARDS,
        0,
        size,
        False,
    )
    assert total == [size]
    assert sum(done) == size
    assert [s.sequence_id for s in CacheReader(url)] == [s.sequence_id for s in CacheReader(cache)]

    received = pull(url, tmp_path / "copy")
    assert received.files_sent == SHARDS
    assert files_at(tmp_path / "copy") == files_at(cache)
    assert verify(str(tmp_path / "copy")) == []


@pytest.mark.parametrize("name", ["a::b", "[ab]", "a*?", "m::[x]"])
def test_folders_with_special_names(tmp_path, cache, name, files_at):
    """Copied, derived and merged where the name says, and opened again; nothing beside it."""
    here = tmp_path / name
    push(cache, here / "pushed")
    pull(here / "pushed", here / name)
    derive(here / name, here / "derived", DeriveOptions(top_k=1, tail_samples=0))
    merge([here / name, here / "pushed"], here / "merged", number_ids=True)
    assert verify(str(here / name), deep=True) == []
    assert len(CacheReader(here / "merged")) == 2 * len(CacheReader(here / name))
    assert [s.sequence_id for s in CacheReader(here / "derived")] == [
        s.sequence_id for s in CacheReader(cache)
    ]
    assert not [path for path in tmp_path.iterdir() if path.name not in (name, cache.name)]


@pytest.mark.parametrize("name", ["[ab]", "a*"])
def test_keys_of_a_store_with_special_names(tmp_path, cache, s3, name, files_at):
    base = f"{s3}/{uuid.uuid4()}"
    push(cache, f"{base}/ab")
    before = files_at(f"{base}/ab")
    push(cache, f"{base}/{name}")
    assert files_at(f"{base}/{name}") == before
    pull(f"{base}/{name}", tmp_path / "copy")
    push(cache, f"{base}/{name}", force=True)
    assert files_at(f"{base}/ab") == before


def test_again_is_a_no_op(tmp_path, cache, url, files_at):
    push(cache, url)
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    before = filesystem.info(f"{root}/manifest.json")
    done = []
    again = push(cache, url, on_bytes=done.append)
    assert (again.files_sent, again.files_skipped, again.unchanged) == (0, SHARDS, True)
    assert sum(done) == sum(path.stat().st_size for path in (cache / "data").iterdir())
    filesystem.invalidate_cache()
    assert filesystem.info(f"{root}/manifest.json") == before
    pull(url, tmp_path / "copy")
    assert pull(url, tmp_path / "copy").unchanged
    assert push(tmp_path / "copy", url).unchanged
    assert files_at(tmp_path / "copy").keys() == expected_of(cache)


class Interrupted(BaseException):
    """Ctrl-C at an exact moment."""


class Fuse:
    """Burns at the n-th operation: a chunk read, a remote file opened for writing, a rename."""

    def __init__(self, patch, operation):
        self.left, self.burnt = operation, False
        step, replace = self.step, os.replace
        open_stream, fs_open = (
            logitcask.cache_format.storage.files.open_stream,
            fsspec.AbstractFileSystem.open,
        )

        def opened(filesystem, path):
            stream = open_stream(filesystem, path)
            read = stream.read

            class Stream:
                def __enter__(self):
                    return self

                def __exit__(self, *arguments):
                    stream.close()

                def read(self, size):
                    step()
                    return read(size)

            return Stream()

        def opened_file(filesystem, path, mode="rb", **options):
            if "w" in mode:
                step()
            return fs_open(filesystem, path, mode, **options)

        patch.setattr(logitcask.cache_format.storage.files, "open_stream", opened)
        patch.setattr(fsspec.AbstractFileSystem, "open", opened_file)
        patch.setattr(os, "replace", lambda *arguments: (step(), replace(*arguments)))

    def step(self):
        self.left -= 1
        if self.left < 0:
            self.burnt = True
            raise Interrupted


def interrupt_everywhere(copy, new_place, cache, chunk, monkeypatch, files_at):
    """Interrupts ``copy(place)`` at its first, second, ... operation, each time with a new
    place, and goes on.
    """
    monkeypatch.setattr(logitcask.cache_format.storage.files, "_CHUNK", chunk)
    expected = files_at(cache)
    shards = {name: digest for name, digest in expected.items() if name.startswith("data/")}
    operation = 0
    while True:
        place = new_place(operation)
        with monkeypatch.context() as patch:
            fuse = Fuse(patch, operation)
            with suppress(Interrupted):
                copy(place)
        if not fuse.burnt:
            assert files_at(place) == expected
            return operation
        there = files_at(place)
        assert "manifest.json" not in there
        with pytest.raises((CacheNotFoundError, IncompleteCacheError)):
            CacheReader(place)
        whole = shards.items() & there.items()
        resumed = copy(place)
        assert (resumed.files_sent, resumed.files_skipped) == (SHARDS - len(whole), len(whole))
        assert files_at(place) == expected
        operation += 1


def test_a_push_interrupted_anywhere(cache, url, monkeypatch, files_at):
    # Against the S3 server every operation takes its time: whole shards there, bits of shards
    # elsewhere.
    chunk = 1 << 20 if url.startswith("s3") else 2000
    operations = interrupt_everywhere(
        lambda place: push(cache, place),
        lambda i: f"{url}-{i}",
        cache,
        chunk,
        monkeypatch,
        files_at,
    )
    assert operations > 4 * SHARDS


def test_a_pull_interrupted_anywhere(tmp_path, cache, monkeypatch, files_at):
    push(cache, f"memory://{tmp_path}")
    interrupt_everywhere(
        lambda place: pull(f"memory://{tmp_path}", place),
        lambda i: tmp_path / str(i),
        cache,
        2000,
        monkeypatch,
        files_at,
    )


def kill_at(operation, action):
    """``action()`` in a child that dies without any clean-up at its n-th operation. Whether it
    got to the end.
    """
    child = os.fork()
    if child == 0:
        done = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal done
                if done == operation:
                    os._exit(9)
                done += 1
                return real(*arguments, **options)

            return call

        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pull_killed_at_every_operation(tmp_path, cache, files_at):
    operation, finished = 0, False
    while not finished:
        folder = tmp_path / str(operation)
        finished = kill_at(operation, functools.partial(pull, cache, folder))
        if (folder / "manifest.json").exists():
            assert verify(str(folder)) == []
        else:
            with pytest.raises((CacheNotFoundError, IncompleteCacheError)):
                CacheReader(folder)
        pull(cache, folder)
        assert files_at(folder) == files_at(cache)
        operation += 1
    assert operation > 5 * SHARDS


def half_pulled(tmp_path, cache, monkeypatch):
    """A folder into which a pull has brought one shard."""
    folder = tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        fuse = Fuse(patch, 10**9)

        def stop(count):
            if (folder / "data/shard-00000.arrow").exists():
                fuse.left = 0

        pull(cache, folder, on_bytes=stop)
    assert (folder / "data/shard-00000.arrow").exists()
    assert not (folder / "data/shard-00002.arrow").exists()
    return folder


def test_half_a_copy_is_incomplete(tmp_path, cache, monkeypatch):
    folder = half_pulled(tmp_path, cache, monkeypatch)
    with pytest.raises(IncompleteCacheError, match=r"unfinished copy.*run the same"):
        read_manifest(LocalFileSystem(), str(folder), str(folder))
    with pytest.raises(IncompleteCacheError):
        push(folder, f"memory://{tmp_path}")
    shutil.rmtree(folder / PULL_DIR)
    with pytest.raises(IncompleteCacheError, match="unfinished copy"):
        read_manifest(LocalFileSystem(), str(folder), str(folder))


def test_a_build_keeps_off_half_a_copy(tmp_path, cache, header, monkeypatch, files_at):
    folder = half_pulled(tmp_path, cache, monkeypatch)
    before = files_at(folder)
    with pytest.raises(UserError):
        CacheWriter(folder).__enter__()
    assert files_at(folder) == before
    pull(cache, folder)


def test_a_copy_keeps_off_a_build(tmp_path, cache, header):
    with CacheWriter(tmp_path / "building") as writer:
        writer.begin(header())
        with pytest.raises(UserError, match="unfinished build"):
            pull(cache, tmp_path / "building")
    assert (tmp_path / "building" / BUILD_DIR / "header.json").exists()


def test_two_pulls_at_once(tmp_path, cache, files_at):
    refused = []

    def second(count):
        if not refused:
            with pytest.raises(CacheInUseError, match="another process is copying") as caught:
                pull(cache, tmp_path / "copy")
            refused.append(caught.value)

    pull(cache, tmp_path / "copy", on_bytes=second)
    assert refused
    assert files_at(tmp_path / "copy") == files_at(cache)


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone"])
def test_damage_is_found_and_named(tmp_path, cache, rng, damage, files_at):
    shard = cache / "data" / "shard-00001.arrow"
    good = shard.read_bytes()
    bad = bytearray(good)
    if damage == "flipped":
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
    shard.write_bytes(bad[:-1] if damage == "short" else bad + b"x" if damage == "long" else bad)
    if damage == "gone":
        shard.unlink()
    for copy, place in ((pull, tmp_path / "copy"), (push, f"memory://{tmp_path}/copy")):
        with pytest.raises(
            DamagedCacheError, match=r"data/shard-00001\.arrow is (damaged|missing)"
        ):
            copy(cache, place)
        assert files_at(place).keys() & expected_of(cache) == {"data/shard-00000.arrow"}
    shard.write_bytes(good)
    for copy, place in ((pull, tmp_path / "copy"), (push, f"memory://{tmp_path}/copy")):
        assert copy(cache, place).files_skipped == 1
        assert files_at(place) == files_at(cache)


def test_a_damaged_copy_is_mended(tmp_path, cache, rng, files_at):
    pull(cache, tmp_path / "copy")
    shard = tmp_path / "copy" / "data" / "shard-00002.arrow"
    shard.write_bytes(rng.bytes(shard.stat().st_size))
    assert pull(cache, tmp_path / "copy").files_sent == 1
    assert files_at(tmp_path / "copy") == files_at(cache)


def test_a_file_missing_from_a_finished_place_is_sent_again(cache, url, files_at):
    push(cache, url)
    filesystem, root = open_filesystem(url)
    filesystem.rm_file(f"{root}/data/shard-00001.arrow")
    assert push(cache, url).files_sent == 1
    assert files_at(url) == files_at(cache)


def test_another_cache_is_replaced_only_by_force(tmp_path, cache, url, write_cache, files_at):
    push(cache, url)
    before = files_at(url)
    other = write_cache(tmp_path / "other", SHARDS - 1)
    with pytest.raises(UserError, match=r"holds another cache \(content_sha256 .*--force"):
        push(other, url)
    with pytest.raises(UserError, match=r"another cache \(fingerprint"):
        push(write_cache(tmp_path / "k4", top_k=4 + 8), url)
    assert files_at(url) == before
    assert push(other, url, force=True).files_sent == SHARDS - 1
    assert files_at(url) == files_at(other)


def test_a_damaged_manifest_is_replaced_only_by_force(cache, url, files_at):
    push(cache, url)
    filesystem, root = open_filesystem(url)
    filesystem.pipe_file(f"{root}/manifest.json", b"{")
    with pytest.raises(DamagedCacheError, match="not JSON"):
        push(cache, url)
    push(cache, url, force=True)
    assert files_at(url) == files_at(cache)


def test_files_of_others_are_left_alone(tmp_path, cache, url, files_at):
    filesystem, root = open_filesystem(url)
    filesystem.makedirs(f"{root}/data", exist_ok=True)
    filesystem.pipe_file(f"{root}/README.md", b"mine")
    with pytest.raises(UserError, match=r"is no cache, but has .*README\.md of its own"):
        push(cache, url)
    assert files_at(url) == {"README.md": hashlib.sha256(b"mine").hexdigest()}


def test_shards_of_half_another_cache_are_noticed(tmp_path, cache, write_cache, files_at):
    url = f"memory://{tmp_path}"
    push(write_cache(tmp_path / "longer", SHARDS + 1), url)
    fsspec.filesystem("memory").rm_file(f"{tmp_path}/manifest.json")
    fsspec.filesystem("memory").rm_file(f"{tmp_path}/README.md")
    with pytest.raises(UserError, match=r"has data/shard-00003\.arrow of its own"):
        push(cache, url)
    push(cache, url, force=True)
    assert files_at(url) == files_at(cache)


def test_shards_of_others_by_our_names(cache, url, files_at):
    """Where no manifest and no mark of this push say otherwise, they are somebody's."""
    if url.startswith("file"):
        pytest.skip("a folder refuses whatever is there")
    filesystem, root = open_filesystem(url)
    filesystem.pipe_file(f"{root}/data/shard-00001.arrow", b"somebody's")
    before = files_at(url)
    with pytest.raises(
        UserError, match=r"is no cache, but has data/shard-00001\.arrow of its own.*--force"
    ):
        push(cache, url)
    assert files_at(url) == before
    assert push(cache, url, force=True).files_sent == SHARDS
    assert files_at(url) == files_at(cache)


def test_half_of_another_push(tmp_path, cache, write_cache, monkeypatch, files_at):
    """It goes on with the same cache, whatever lies there; another cache needs --force."""
    url, other = f"memory://{tmp_path}", write_cache(tmp_path / "other")

    def send(self, source, root, files, on_bytes):
        self._filesystem.pipe_file(f"{self._root}/{files[0].path}", b"half a file")
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(destinations.Store, "send", send)
        with pytest.raises(Interrupted):
            push(cache, url)
    assert files_at(url).keys() == {".push", "data/shard-00000.arrow"}
    with pytest.raises(IncompleteCacheError, match="unfinished copy"):
        CacheReader(url)
    with pytest.raises(UserError, match=r"has data/shard-00000\.arrow of its own"):
        push(other, url)
    push(cache, url)
    assert files_at(url) == files_at(cache)

    with monkeypatch.context() as patch:
        patch.setattr(destinations.Store, "send", send)
        with pytest.raises(Interrupted):
            push(other, url, force=True)
    with pytest.raises(UserError, match=r"has data/shard-0000\d\.arrow of its own"):
        push(cache, url)
    push(other, url)
    assert files_at(url) == files_at(other)


def test_a_mark_that_was_left_behind_goes(tmp_path, cache, monkeypatch, files_at):
    url, remove = f"memory://{tmp_path}", destinations.Store.remove

    def killed(self, names):
        if names == [".push"]:
            raise Interrupted
        remove(self, names)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(destinations.Store, "remove", killed)
        push(cache, url)
    assert verify(url) == []
    assert push(cache, url).unchanged
    assert files_at(url) == files_at(cache)


@pytest.fixture
def building(rng, header, consistent_sequence):
    """A build in a store, with one shard of one: its writer, to be finished, and the URL."""
    url = f"memory://{uuid.uuid4()}/cache"
    with RemoteCacheWriter(url) as writer:
        started = writer.begin(header())
        with writer.shard(0) as shard:
            shard.append(consistent_sequence(rng, "0"))
        yield writer, started, url


def test_a_push_keeps_off_a_remote_build(cache, building, files_at):
    writer, started, url = building
    before = files_at(url)
    with pytest.raises(CacheInUseError, match=r"holds an unfinished build; finish it, .*--force"):
        push(cache, url)
    assert files_at(url) == before
    writer.finish(started, 1)
    assert verify(url, deep=True) == []


def test_a_push_that_insists_ends_a_remote_build(cache, building, files_at):
    writer, started, url = building
    push(cache, url, force=True)
    assert files_at(url) == files_at(cache)
    with pytest.raises(CacheInUseError, match="removed this one's marker"):
        writer.finish(started, 1)
    assert files_at(url) == files_at(cache)


def test_a_remote_build_does_not_replace_a_manifest_of_others(cache, building, files_at):
    writer, started, url = building
    filesystem, root = open_filesystem(url)
    filesystem.pipe_file(f"{root}/manifest.json", (cache / "manifest.json").read_bytes())
    before = files_at(url)
    with pytest.raises(
        CacheInUseError, match="holds a finished cache now, which somebody else has put there"
    ):
        writer.finish(started, 1)
    assert files_at(url) == before


def test_a_remote_build_keeps_off_half_a_push(cache, monkeypatch, files_at):
    url = f"memory://{uuid.uuid4()}/cache"

    def stop(self, *_):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(destinations.Store, "send", stop)
        push(cache, url)
    with pytest.raises(UserError, match=r"half a copy of a cache; push that again .*--restart"):
        RemoteCacheWriter(url).__enter__()
    push(cache, url)
    assert files_at(url) == files_at(cache)


@pytest.mark.parametrize("text", ["// my app\n{}", "{}"])
def test_a_forced_pull_leaves_an_application_alone(tmp_path, cache, text, files_at):
    """Not every manifest.json is a cache's, and one that cannot be read may be anybody's."""
    folder = tmp_path / "app"
    (folder / "data").mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    (folder / "README.md").write_text("mine")
    (folder / "data" / "shard-7.arrow").write_text("mine")
    before = files_at(folder)
    for force in (False, True):
        with pytest.raises(
            UserError,
            match=r"is no cache, but has data and README\.md and manifest\.json of its own",
        ):
            pull(cache, folder, force=force)
    assert files_at(folder) == before


@pytest.mark.parametrize("folder", ["s3://bucket/x", "file:///tmp/x", "memory://x"])
def test_a_pull_goes_to_a_folder(tmp_path, cache, folder, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        UserError, match=r"is a URL, but has to be a local folder; .*teacher-cache push"
    ):
        pull(cache, folder)
    assert not list((tmp_path / "here").iterdir())


def test_the_tail_prior_goes_along(tmp_path, rng, header, sequence, files_at):
    with CacheWriter(tmp_path / "prior") as writer:
        writer.begin(header(), TailPrior(rng.integers(0, 256, 1000).astype(np.uint8)))
        with writer.shard(0) as shard:
            shard.append(sequence(rng, "0"))
        writer.finish(writer.header(), 1)
    assert push(tmp_path / "prior", f"memory://{tmp_path}").files_sent == 2
    assert pull(f"memory://{tmp_path}", tmp_path / "copy").files_sent == 2
    assert "tail_prior.arrow" in files_at(tmp_path / "copy")
    assert files_at(tmp_path / "copy") == files_at(tmp_path / "prior")
    prior = tmp_path / "copy" / "tail_prior.arrow"
    prior.write_bytes(prior.read_bytes()[:-1])
    assert pull(f"memory://{tmp_path}", tmp_path / "copy").files_sent == 1


def test_a_copy_onto_itself(cache, files_at):
    before = files_at(cache)
    (cache / "data" / "shard-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is where it would be copied to"):
        push(cache, f"file://{cache}", force=True)
    assert files_at(cache).keys() == before.keys()


def test_from_url_to_url(tmp_path, cache, s3, files_at):
    push(cache, f"memory://{tmp_path}")
    push(f"memory://{tmp_path}", f"{s3}{tmp_path}")
    assert files_at(f"{s3}{tmp_path}") == files_at(cache)


def test_a_web_server(tmp_path, cache, files_at):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        pull(f"{url}/original", tmp_path / "copy")
        assert files_at(tmp_path / "copy") == files_at(cache)
        with pytest.raises(CacheNotFoundError, match="holds no cache"):
            pull(f"{url}/nowhere", tmp_path / "nothing")
        with pytest.raises(UserError, match=r"cannot be written to: a web server hands out files"):
            push(cache, f"{url}/new")
        server.shutdown()
    with pytest.raises(CacheError, match="cannot be reached"):
        pull(f"{url}/original", tmp_path / "late")
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def web(tmp_path):
    """A web server of what is in ``tmp_path``: its address, and what it does instead for paths,
    by a part of them.
    """
    instead = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            for part, action in instead.items():
                if part in self.path and action(self):
                    return
            super().do_GET()

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", instead
        server.shutdown()


def test_verifying_over_a_bad_line(cache, web):
    url, instead = web
    attempts = []

    def cut(handler):
        """Sends the beginning of the shard, then hangs up."""
        attempts.append(handler.path)
        if len(attempts) > 2:
            return False
        data = (cache / "data" / "shard-00001.arrow").read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:1000])
        handler.close_connection = True
        return True

    instead["shard-00001"] = cut
    assert verify(f"{url}/original") == []
    assert len(attempts) == 3

    instead["shard-00001"] = lambda handler: handler.send_error(503) is None
    with pytest.raises(
        CacheError, match=r"data/shard-00001\.arrow cannot be reached: 503"
    ) as caught:
        verify(f"{url}/original")
    assert (caught.type, caught.value.exit_code) == (CacheError, 2)
    instead["shard-00001"] = lambda handler: handler.send_error(404) is None
    assert len(verify(f"{url}/original")) == 1


@pytest.mark.parametrize("what", ["iter", "column", "index", "check"])
def test_a_forked_reader_makes_connections_of_its_own(cache, web, what):
    reader = CacheReader(f"{web[0]}/original")
    read = {
        "iter": lambda: next(iter(reader)),
        "column": lambda: next(reader.iter_column("sequence_id")),
        "index": lambda: reader[0],
        "check": lambda: reader.check_shard(0),
    }[what]
    child = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_bucket_that_is_not_there(cache, s3):
    with pytest.raises(
        CacheError,
        match="s3://no-such-bucket/x cannot be reached: The specified bucket does not exist",
    ):
        push(cache, "s3://no-such-bucket/x")
    with pytest.raises(CacheNotFoundError):
        pull("s3://no-such-bucket/x", "/nonexistent")


class Sftp(LocalFileSystem):
    """The local disk, written to as to a server with folders and renames."""

    protocol = "sftp"
    written: ClassVar[list[str]] = []

    def _open(self, path, mode="rb", **options):
        if "w" in mode:
            self.written.append(path)
        return super()._open(path, mode, **options)


def test_servers_with_folders_get_temporary_files_and_renames(
    tmp_path, cache, monkeypatch, files_at
):
    monkeypatch.setattr(
        destinations, "is_local", lambda filesystem: type(filesystem) is LocalFileSystem
    )
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "sftp", Sftp)
    place = tmp_path / "new" / "place"
    push(cache, f"sftp://{place}")
    assert files_at(place) == files_at(cache)
    assert sorted(Sftp.written) == sorted(
        f"{place}/{name}.tmp" for name in [*files_at(cache), ".push"]
    )


@pytest.mark.parametrize("copy", [push, pull])
def test_a_broken_line_is_tried_again_and_counted_once(
    tmp_path, cache, copy, monkeypatch, files_at
):
    monkeypatch.setattr(logitcask.cache_format.storage.files, "_CHUNK", 1000)
    for module in (destinations, logitcask.cache_format.storage.files):
        monkeypatch.setattr(module, "verified_chunks", breaking_once(module.verified_chunks))
    place = f"memory://{tmp_path}" if copy is push else tmp_path / "copy"
    done = []
    copy(cache, place, on_bytes=done.append)
    assert files_at(place) == files_at(cache)
    assert min(done) < 0
    assert sum(done) == sum(path.stat().st_size for path in (cache / "data").iterdir())


def breaking_once(chunks):
    broken = []

    def some(filesystem, path, file):
        for count, chunk in enumerate(chunks(filesystem, path, file)):
            if count == 2 and not broken:
                broken.append(path)
                raise ConnectionResetError("by peer")
            yield chunk

    return some


@pytest.mark.parametrize("remote", [False, True])
def test_files_beside_a_cache(tmp_path, cache, write_cache, files_at, caplog, remote):
    url = f"memory://{tmp_path}/copy" if remote else str(tmp_path / "copy")
    files = {"README.md": b"mine", "preview/preview.parquet": b"shown"}

    def there(name):
        filesystem, root = open_filesystem(url)
        return filesystem.cat_file(f"{root}/{name}")

    push(cache, url)
    # The card of the cache is there already, and stays; what was missing is added.
    assert not push(cache, url, beside=files).unchanged
    assert there("preview/preview.parquet") == b"shown"
    assert there("README.md") == (cache / "README.md").read_bytes()
    assert f"{url}/README.md is another one; --force replaces it" in caplog.text
    assert push(cache, url, beside=files).unchanged
    assert not push(cache, url, beside=files, force=True).unchanged
    assert (there("README.md"), there("preview/preview.parquet")) == (b"mine", b"shown")
    # Another cache in its place does not keep the preview of this one.
    push(write_cache(tmp_path / "other"), url, force=True)
    assert "preview/preview.parquet" not in files_at(url)


def test_a_place_that_loses_bytes_is_noticed(tmp_path, cache, monkeypatch, files_at):
    write = destinations.Store._write

    def lossy(self, name, *rest):
        write(self, name, *rest)
        path = f"{self._root}/{name}"
        self._filesystem.pipe_file(path, self._filesystem.cat_file(path)[:-1])

    monkeypatch.setattr(destinations.Store, "_write", lossy)
    with pytest.raises(CacheError, match=r"data/shard-00000\.arrow is not what was sent"):
        push(cache, f"memory://{tmp_path}")
    assert "manifest.json" not in files_at(f"memory://{tmp_path}")


def test_every_file_of_a_manifest_is_listed(cache):
    _, manifest = read_manifest(LocalFileSystem(), str(cache), "x")
    assert [file.path for file in cache_files(manifest)] == [
        f"data/shard-{i:05d}.arrow" for i in range(SHARDS)
    ]


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(push_command)
    app.command()(share_cli.pull)
    return functools.partial(CliRunner().invoke, app, catch_exceptions=False)


def test_the_commands(tmp_path, cache, run, monkeypatch, files_at):
    monkeypatch.chdir(tmp_path)
    url = f"memory://{tmp_path}/quick"
    size = sum(path.stat().st_size for path in (cache / "data").iterdir())
    assert f"{url}: 3 of 3 files copied, {size:,} bytes\n" in run(["push", str(cache), url]).output
    assert f"{url} holds this very cache already" in run(["push", str(cache), url]).output
    assert "caches/quick: 3 of 3 files copied" in run(["pull", url]).output
    assert files_at(tmp_path / "caches" / "quick") == files_at(cache)
    (tmp_path / "caches/quick/data/shard-00000.arrow").unlink()
    assert "1 of 3 files copied" in run(["pull", url]).output


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/mine", "mine"),
        ("hf://datasets/org/mine@v1", "mine"),
        ("https://host/x/mine/", "mine"),
    ],
)
def test_where_a_pull_goes_by_default(url, name):
    assert share_cli.default_folder(url) == Path("caches") / name
