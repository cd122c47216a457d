"""Reading remote files within bounds, and the local cache of shards: verified, bounded, shared
by processes.
"""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from logitcask.cache_format import CacheError, DamagedCacheError, UserError
from logitcask.cache_format.manifest import CacheFile
from logitcask.cache_format.storage.files import download, open_filesystem, read_small
from logitcask.cache_format.storage.shard_cache import (
    DEFAULT_CACHE_BYTES,
    ShardCache,
    shard_cache_folder,
)

FORK = multiprocessing.get_context("fork")


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by path; ``failures`` are statuses to answer with first, ``endless``
    paths never stop.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.failures, self.requests, self.endless = {}, [], [], set()
        self.hold = threading.Event()
        self.held = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if server.failures:
            return self.send_error(server.failures.pop(0))
        if self.path not in server.files:
            return self.send_error(404)
        data = server.files[self.path]
        self.send_response(200)
        if self.path not in server.endless:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.path in server.held:
            self.wfile.write(data[: len(data) // 2])
            server.hold.wait(60)
            data = data[len(data) // 2 :]
        try:
            self.wfile.write(data)
            while self.path in server.endless:
                self.wfile.write(data)
        except OSError:
            return None  # the client has heard enough

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.hold.set()
        server.shutdown()


@pytest.fixture
def shards(rng):
    """Path to content: ten shards of 1000 bytes."""
    return {f"/{i}.arrow": rng.bytes(1000) for i in range(10)}


@pytest.fixture
def get(server, shards):
    """``get(cache, path)`` fetches one of the shards from the server."""
    server.files.update(shards)
    filesystem, _ = open_filesystem(server.url, fresh=True)

    def get(cache, path):
        sha256 = hashlib.sha256(shards[path]).hexdigest()
        return cache.get(filesystem, server.url + path, len(shards[path]), sha256)

    return get


def contents(folder):
    return sorted(path.name for path in (folder / "shards").iterdir())


def test_a_shard_is_fetched_once(tmp_path, server, shards, get):
    cache = ShardCache(tmp_path)
    assert get(cache, "/3.arrow").read_bytes() == shards["/3.arrow"]
    assert get(cache, "/3.arrow") == get(ShardCache(tmp_path), "/3.arrow")
    assert server.requests == ["/3.arrow"]


def test_the_least_recently_used_goes_first(tmp_path, server, shards, get):
    cache = ShardCache(tmp_path, max_bytes=3500)
    for i in (0, 1, 2):
        get(cache, f"/{i}.arrow")
    get(cache, "/0.arrow")
    get(cache, "/3.arrow")
    del server.requests[:]
    for i in (0, 2, 3):
        get(cache, f"/{i}.arrow")
    assert server.requests == []
    get(cache, "/1.arrow")
    assert server.requests == ["/1.arrow"]
    assert len(contents(tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"x", r"more than the 1000 bytes"),
        (lambda data: data[:-1], r"999 bytes, 1000 expected"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], r"sha256 .* expected"),
        (lambda data: b"", r"0 bytes, 1000 expected"),
        (None, r"missing"),
    ],
)
def test_what_is_not_the_manifests_is_refused_and_not_kept(
    tmp_path, server, shards, get, change, message
):
    if change is None:
        del server.files["/4.arrow"]
    else:
        server.files["/4.arrow"] = change(shards["/4.arrow"])
    with pytest.raises(DamagedCacheError, match=rf"/4\.arrow is .*{message}"):
        get(ShardCache(tmp_path), "/4.arrow")
    assert contents(tmp_path) == []
    assert len(server.requests) == 2, "one more look tells damage from a bad line"


def test_an_endless_answer_is_cut_short(tmp_path, server, shards, get):
    server.endless.add("/4.arrow")
    with pytest.raises(DamagedCacheError, match=r"4\.arrow is damaged: more than"):
        get(ShardCache(tmp_path), "/4.arrow")
    filesystem, _ = open_filesystem(server.url, fresh=True)
    with pytest.raises(DamagedCacheError, match="more than 5000 bytes"):
        read_small(filesystem, f"{server.url}/4.arrow", 5000)


def test_small_files_up_to_the_limit(tmp_path, rng):
    (tmp_path / "f").write_bytes(rng.bytes(3000))
    assert len(read_small(LocalFileSystem(), str(tmp_path / "f"), 3000)) == 3000
    with pytest.raises(DamagedCacheError, match="more than 2999 bytes"):
        read_small(LocalFileSystem(), str(tmp_path / "f"), 2999)


def test_a_failing_network_is_tried_again(tmp_path, server, shards, get):
    server.failures = [503, 429, 500]
    assert get(ShardCache(tmp_path), "/1.arrow").read_bytes() == shards["/1.arrow"]
    server.failures = [503] * 4
    with pytest.raises(CacheError, match=r"2\.arrow cannot be reached: 503"):
        get(ShardCache(tmp_path), "/2.arrow")
    assert contents(tmp_path) == [f"{hashlib.sha256(shards['/1.arrow']).hexdigest()}.arrow"]


def test_a_refusal_is_not_tried_again(tmp_path, server, get):
    server.failures = [403, 403]
    with pytest.raises(CacheError, match="403"):
        get(ShardCache(tmp_path), "/1.arrow")
    assert server.failures == [403]


def test_a_damaged_copy_is_fetched_again(tmp_path, shards, get):
    local = get(ShardCache(tmp_path), "/1.arrow")
    local.write_bytes(local.read_bytes()[:-1] + b"?")
    assert get(ShardCache(tmp_path), "/1.arrow").read_bytes() == shards["/1.arrow"]


def test_a_mapped_shard_outlives_its_file(tmp_path, rng):
    cache, files = ShardCache(tmp_path / "cache", max_bytes=1000), []
    for i in range(2):
        (tmp_path / str(i)).write_bytes(rng.bytes(1000))
        files.append(
            (
                str(tmp_path / str(i)),
                1000,
                hashlib.sha256((tmp_path / str(i)).read_bytes()).hexdigest(),
            )
        )
    mapped = cache.memory_map(LocalFileSystem(), *files[0])
    cache.get(LocalFileSystem(), *files[1])
    assert contents(tmp_path / "cache") == [f"{files[1][2]}.arrow"]
    assert hashlib.sha256(mapped.read()).hexdigest() == files[0][2]


def test_a_shard_removed_before_it_is_mapped_is_fetched_again(tmp_path, rng, monkeypatch):
    data = rng.bytes(1000)
    (tmp_path / "shard").write_bytes(data)
    get, calls = ShardCache.get, []

    def get_and_lose(*arguments):
        local = get(*arguments)
        calls.append(local)
        if len(calls) < 3:
            local.unlink()
        return local

    monkeypatch.setattr(ShardCache, "get", get_and_lose)
    mapped = ShardCache(tmp_path / "cache").memory_map(
        LocalFileSystem(), str(tmp_path / "shard"), 1000, hashlib.sha256(data).hexdigest()
    )
    assert mapped.read() == data
    assert len(calls) == 3


def test_a_download_replaces_a_longer_file(tmp_path, rng):
    data = rng.bytes(1000)
    (tmp_path / "from").write_bytes(data)
    (tmp_path / "to").write_bytes(rng.bytes(2000))
    file = CacheFile("from", 1000, hashlib.sha256(data).hexdigest())
    download(LocalFileSystem(), str(tmp_path / "from"), file, tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == data


def test_larger_than_the_bound(tmp_path, get):
    with pytest.raises(UserError, match=r"1,000 bytes.*may have 999; set LOGITCASK_CACHE_BYTES"):
        get(ShardCache(tmp_path, max_bytes=999), "/1.arrow")


def test_a_full_disk_is_one_line(tmp_path, get):
    cache = ShardCache(tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write to .*shards: File too large; make room"):
            get(cache, "/1.arrow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert contents(tmp_path) == []
    get(cache, "/1.arrow")


def test_what_another_process_left_of_the_same_shard(tmp_path, shards, get):
    """It was killed after this object was made, while this process waited for its lock or
    fetched something else.
    """
    cache = ShardCache(tmp_path, max_bytes=1500)
    sha256 = hashlib.sha256(shards["/1.arrow"]).hexdigest()
    for name in (sha256, sha256[:2] + "0" * 62):
        with open(tmp_path / "shards" / f"{name}.part", "wb") as handle:
            handle.truncate(1000)
    assert get(cache, "/1.arrow").read_bytes() == shards["/1.arrow"]
    assert contents(tmp_path) == [f"{sha256}.arrow"]


@pytest.mark.timeout(60)
def test_a_waiting_process_goes_on_when_the_fetching_one_is_killed(tmp_path, server, shards, get):
    server.held.add("/5.arrow")
    server.files.update(shards)
    sha256 = hashlib.sha256(shards["/5.arrow"]).hexdigest()
    waiting = ShardCache(tmp_path, max_bytes=1500)
    child = multiprocessing.get_context("spawn").Process(
        target=fetch, args=(tmp_path, f"{server.url}/5.arrow", 1000, sha256)
    )
    child.start()
    while "/5.arrow" not in server.requests:
        time.sleep(0.01)
    found = []
    thread = threading.Thread(target=lambda: found.append(get(waiting, "/5.arrow")), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert not found
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    server.hold.set()
    thread.join(30)
    assert found[0].read_bytes() == shards["/5.arrow"]


def test_files_of_others_do_not_count(tmp_path, shards, get):
    cache = ShardCache(tmp_path, max_bytes=1500)
    (tmp_path / "shards" / "notes.txt").write_bytes(b"x" * 800)
    (tmp_path / "shards" / "a folder").mkdir()
    assert get(cache, "/1.arrow").read_bytes() == shards["/1.arrow"]
    get(cache, "/2.arrow")
    assert len(contents(tmp_path)) == 3
    assert (tmp_path / "shards" / "notes.txt").exists()


@pytest.mark.timeout(60)
def test_room_that_nobody_can_make(tmp_path, get, monkeypatch):
    cache = ShardCache(tmp_path, max_bytes=1500)
    first = get(cache, "/1.arrow")
    unlink = Path.unlink

    def refuse(path, **options):
        if path == first:
            raise PermissionError("mapped")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(
        UserError,
        match=r"no room for 1,000 bytes: of the 1,500 .* 1,000 are taken by shards that cannot",
    ):
        get(cache, "/2.arrow")


def test_a_disk_that_is_full_when_the_file_is_closed(tmp_path, get, monkeypatch):
    """What is small stays in the buffer until then."""
    real = open

    def opened(*arguments, **options):
        handle = real(*arguments, **options)
        if str(arguments[0]).endswith(".part") and "+" in arguments[1]:
            close = handle.close

            class Full:
                def __getattr__(self, name):
                    return getattr(handle, name)

                def write(self, chunk):
                    raise OSError(28, "No space left on device")

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    close()
                    raise OSError(28, "No space left on device")

            return Full()
        return handle

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", opened)
        with pytest.raises(
            UserError, match=r"cannot write to .*shards: No space left on device; make room"
        ) as caught:
            get(ShardCache(tmp_path), "/1.arrow")
        assert caught.type is UserError
    assert contents(tmp_path) == []


def test_no_room_for_a_lock(tmp_path, get):
    cache = ShardCache(tmp_path)
    (tmp_path / "locks").rename(tmp_path / "gone")
    (tmp_path / "locks").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*locks"):
        get(cache, "/1.arrow")


def test_settings_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("LOGITCASK_CACHE_BYTES", "12345")
    assert (ShardCache().folder, ShardCache().max_bytes) == (tmp_path / "mine", 12345)
    monkeypatch.setenv("LOGITCASK_CACHE_BYTES", "much")
    with pytest.raises(UserError, match="'much'"):
        ShardCache()
    monkeypatch.delenv("LOGITCASK_CACHE_BYTES")
    monkeypatch.delenv("LOGITCASK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (ShardCache().folder, ShardCache().max_bytes) == (
        tmp_path / "xdg" / "logitcask",
        DEFAULT_CACHE_BYTES,
    )


def test_a_user_without_a_home_has_no_cache_folder(tmp_path, monkeypatch):
    """Containers often run as a user that the system does not know: no folder ``~`` is made."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("LOGITCASK_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        shard_cache_folder()
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path))
    assert shard_cache_folder() == tmp_path


def read_many(folder, max_bytes, files, seed, failed):
    import numpy as np

    cache = ShardCache(folder, max_bytes)
    try:
        for i in np.random.default_rng(seed).integers(len(files), size=60):
            mapped = cache.memory_map(LocalFileSystem(), *files[i])
            if hashlib.sha256(mapped.read()).hexdigest() != files[i][2]:
                failed.set()
    except BaseException:
        failed.set()
        raise


def test_the_bound_holds_for_all_processes_together(tmp_path, rng):
    """Three processes want ten shards in a cache with room for two and a half; some have to wait
    for the others.
    """
    files = []
    for i in range(10):
        data = rng.bytes(200_000)
        (tmp_path / f"{i}.arrow").write_bytes(data)
        files.append((str(tmp_path / f"{i}.arrow"), len(data), hashlib.sha256(data).hexdigest()))
    folder, bound, failed = tmp_path / "cache", 500_000, FORK.Event()
    watch = ShardCache(folder, bound)
    readers = [
        FORK.Process(
            target=read_many, args=(folder, bound, files, int(rng.integers(2**32)), failed)
        )
        for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        with watch._lock("room"):
            most = max(most, sum(path.stat().st_size for path in (folder / "shards").iterdir()))
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert not failed.is_set()
    assert 200_000 < most <= bound
    assert not list(folder.rglob("*.part"))


def fetch(folder, url, size, sha256):
    filesystem, _ = open_filesystem(url, fresh=True)
    ShardCache(folder).get(filesystem, url, size, sha256)


def test_killed_while_fetching(tmp_path, server, shards, get):
    """What kill -9 leaves goes when the next process starts; what a living process fetches
    stays.
    """
    server.held.add("/5.arrow")
    server.files.update(shards)
    sha256 = hashlib.sha256(shards["/5.arrow"]).hexdigest()
    child = multiprocessing.get_context("spawn").Process(
        target=fetch, args=(tmp_path, f"{server.url}/5.arrow", 1000, sha256)
    )
    child.start()
    while "/5.arrow" not in server.requests:
        assert child.is_alive()
        time.sleep(0.01)
    ShardCache(tmp_path)
    assert contents(tmp_path) == [f"{sha256}.part"]
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert contents(tmp_path) == [f"{sha256}.part"]
    cache = ShardCache(tmp_path)
    assert contents(tmp_path) == []
    server.hold.set()
    assert get(cache, "/5.arrow").read_bytes() == shards["/5.arrow"]


def test_places_that_cannot_be_opened():
    with pytest.raises(CacheError, match=r"gopher://x/y cannot be opened: .*gopher"):
        open_filesystem("gopher://x/y")


@pytest.mark.parametrize(
    "raised",
    [OSError("connection refused"), TypeError("no host given"), RuntimeError("\n two\nlines")],
)
def test_drivers_that_raise_what_they_please(monkeypatch, raised):
    class Picky(LocalFileSystem):
        protocol = "picky"

        def __init__(self, **options):
            raise raised

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "picky", Picky)
    with pytest.raises(
        CacheError, match=rf"^picky://x cannot be opened: {' '.join(str(raised).split())}; check"
    ):
        open_filesystem("picky://x")


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1:1/x", "zip://x::{folder}/no.zip", "zip://x::{folder}/bad.zip", "github://x"],
)
def test_drivers_that_look_at_once(tmp_path, url):
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(CacheError, match=r"cannot be opened: [^\n]*; check the address"):
        open_filesystem(url.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("hf://datasets/a/b", "huggingface_hub", r"logitcask\[hub\]"),
        ("s3://bucket/x", "s3fs", r"logitcask\[s3\]"),
        ("gs://bucket/x", "gcsfs", "gcsfs"),
        ("http://host/x", "aiohttp", "aiohttp"),
    ],
)
def test_a_missing_driver_is_named(monkeypatch, url, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.split(":")[0], raising=False)
    with pytest.raises(
        CacheError, match=rf"{url} needs a package that is not installed; pip install '{package}'"
    ):
        open_filesystem(url)


def test_the_path_of_a_url(tmp_path):
    assert (
        open_filesystem(str(tmp_path))[1]
        == open_filesystem(f"file://{tmp_path}/")[1]
        == str(Path(tmp_path))
    )


@pytest.mark.parametrize("name", ["a::b", "[ab]", "a?", "a*", "memory::x", "zip::a.zip"])
def test_a_path_is_taken_literally(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in (name, f"{tmp_path}/{name}", f"file://{tmp_path}/{name}", f"{name}/"):
        filesystem, root = open_filesystem(url)
        assert isinstance(filesystem, LocalFileSystem)
        assert root == f"{tmp_path}/{name}"


@pytest.mark.parametrize("url", ["memory://a::b", "memory://a::b.c/d", "memory://a::file"])
def test_a_name_that_fsspec_would_take_for_a_chain_is_refused(url):
    with pytest.raises(
        UserError, match="holds '::', which fsspec takes for a chain of file systems"
    ):
        open_filesystem(url)


def test_chains_that_are_meant_still_work(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/manifest.json", "{}")
    for url in (f"zip://x::{tmp_path}/a.zip", f"zip://x::file://{tmp_path}/a.zip"):
        filesystem, root = open_filesystem(url)
        assert filesystem.cat(f"{root}/manifest.json") == b"{}"
    filesystem, root = open_filesystem(f"simplecache::file://{tmp_path}/a.zip")
    assert filesystem.size(root) == (tmp_path / "a.zip").stat().st_size
