"""Push and pull against real servers on the loopback: S3 (moto), SFTP (OpenSSH) and HTTP (nginx),
through a proxy that cuts connections, changes bytes, answers 503 and is slow.

The servers are those of this machine. Where one is missing, its tests skip with the reason.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from logitcask.cache_format import (
    CacheNotFoundError,
    CacheReader,
    DamagedCacheError,
    IncompleteCacheError,
    verify,
)
from logitcask.cache_format.share.copy import pull, push
from logitcask.cache_format.storage.files import open_filesystem

KILLS = int(os.environ.get("LOGITCASK_PUSH_KILLS", "4"))
"""Pushes that are killed, of each kind of server."""

_SENT = 4096  # bytes of one step of the proxy
_BAD_HTTP = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Proxy:
    """A TCP proxy on the loopback in front of ``port``, and what goes wrong on its way.

    cuts, flips: counts of bytes, over all connections, of the direction that ``upward`` names (to
                 the server, or from it): there a connection is cut, or a byte arrives changed.
    refused:     connections that get the answer 503 at once.
    pause:       seconds before each 4 KiB.
    at:          called with the bytes that have passed in both directions.
    """

    port: int
    cuts: list[int] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)
    upward: bool = False
    refused: int = 0
    pause: float = 0.0
    at: Callable[[int], None] = lambda passed: None
    happened: int = 0

    def __post_init__(self) -> None:
        self._passed = [0, 0]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def passed(self) -> int:
        return sum(self._passed)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refused:
                self.refused -= 1
                self.happened += 1
                client.recv(_SENT)
                client.sendall(_BAD_HTTP)
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            for upward, way in ((True, (client, server)), (False, (server, client))):
                threading.Thread(target=self._pump, args=(*way, upward), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, upward: bool) -> None:
        """Passes the bytes of one direction of a connection."""
        bad = upward == self.upward
        with suppress(OSError):
            while data := one.recv(_SENT):
                time.sleep(self.pause)
                begin = self._passed[upward]
                end = self._passed[upward] = begin + len(data)
                if bad and self.flips and self.flips[0] < end:
                    at = max(0, self.flips.pop(0) - begin)
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                    self.happened += 1
                if bad and self.cuts and self.cuts[0] < end:
                    other.sendall(data[: max(0, self.cuts.pop(0) - begin)])
                    self.happened += 1
                    break
                other.sendall(data)
                self.at(self.passed)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    """Runs a server while the block runs, which begins when the port answers."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def _found(program: str, package: str) -> str:
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"no {program} is installed (Debian: apt-get install {package})")
    return path


@pytest.fixture
def nginx(tmp_path) -> Iterator[tuple[Path, int]]:
    """A folder, and the port at which nginx serves it."""
    program = _found("nginx", "nginx-light")
    root, port = tmp_path / "served", _free_port()
    root.mkdir()
    temporary = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"{user} daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log; events {{}} "
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; root {root}; }} }}"
    )
    with _serving([program, "-c", str(config), "-e", f"{tmp_path}/error.log"], port):
        yield root, port


@pytest.fixture
def sshd(tmp_path, monkeypatch) -> Iterator[tuple[Path, int]]:
    """A folder, and the port at which OpenSSH lets this user in by a key of the user's home."""
    pytest.importorskip("paramiko", reason="paramiko is not installed")
    program, keygen = _found("sshd", "openssh-server"), _found("ssh-keygen", "openssh-client")
    home, port = tmp_path / "home", _free_port()
    (home / ".ssh").mkdir(parents=True)
    for key in (tmp_path / "host", home / ".ssh/id_ed25519"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(home / ".ssh/id_ed25519.pub", tmp_path / "authorized")
    config = tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\nPasswordAuthentication no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\nPerSourcePenalties no\n"
        "Subsystem sftp internal-sftp\n"
    )
    checked = subprocess.run([program, "-t", "-f", config], capture_output=True, text=True)
    if "PerSourcePenalties" in checked.stderr:  # servers before 9.8 do not know it
        config.write_text(config.read_text().replace("PerSourcePenalties no\n", ""))
    if os.geteuid() == 0:  # where it separates privileges
        Path("/run/sshd").mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with _serving([program, "-D", "-f", str(config), "-E", f"{tmp_path}/sshd.log"], port):
        yield tmp_path, port


@dataclass
class Place:
    """A place on a server behind ``proxy``: its URL through the proxy, and for SFTP the folder
    itself as ``direct``; for S3 both are one.
    """

    url: str
    direct: str
    proxy: Proxy


@pytest.fixture(params=["s3", "sftp"])
def place(request, monkeypatch, tmp_path) -> Iterator[Place]:
    """A new empty place on each kind of server that takes files."""
    name = f"{uuid.uuid4()}/cache"
    if request.param == "s3":
        import s3fs

        bucket = request.getfixturevalue("s3")
        behind = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        proxy = Proxy(behind.port or 0)
        # The address of a store comes from the environment, so the direct way leads here, too.
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.own_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield Place(f"{bucket}/{name}", f"{bucket}/{name}", proxy)
        s3fs.S3FileSystem.clear_instance_cache()
    else:
        folder, port = request.getfixturevalue("sshd")
        proxy = Proxy(port)
        (folder / "taken").mkdir()
        address = f"sftp://{getpass.getuser()}@127.0.0.1:{proxy.own_port}"
        yield Place(f"{address}{folder}/taken/{name}", f"{folder}/taken/{name}", proxy)
        fsspec.get_filesystem_class("sftp").clear_instance_cache()
    proxy.close()


def _files(url: str, files_at: Callable[[str | Path], dict[str, str]]) -> dict[str, str]:
    return {name: sha for name, sha in files_at(url).items() if not name.startswith(".")}


# --- pull


@pytest.mark.parametrize("fault", ["cut", "wrong bytes", "503", "slow"])
def test_a_pull_from_a_web_server(nginx, cache, tmp_path, files_at, fault):
    root, port = nginx
    shutil.copytree(cache, root / "cache")
    sizes = [file.stat().st_size for file in sorted((cache / "data").iterdir())]
    manifest = (cache / "manifest.json").stat().st_size
    inside = [manifest + sizes[0] // 2, manifest + sizes[0] + sizes[1]]  # of shards
    proxy = Proxy(
        port,
        cuts=[100, *inside] if fault == "cut" else [],
        flips=[inside[0], inside[1] + sizes[0]] if fault == "wrong bytes" else [],
        refused=3 if fault == "503" else 0,
        pause=0.005 if fault == "slow" else 0,
    )
    pull(f"http://127.0.0.1:{proxy.own_port}/cache", tmp_path / "copy")
    assert files_at(tmp_path / "copy") == files_at(cache)
    assert verify(str(tmp_path / "copy"), deep=True) == []
    assert proxy.happened == {"cut": 3, "wrong bytes": 2, "503": 3, "slow": 0}[fault]
    read = [s.sequence_id for s in CacheReader(f"http://127.0.0.1:{port}/cache")]
    assert read == [s.sequence_id for s in CacheReader(cache)]
    proxy.close()


def test_a_server_that_always_sends_wrong_bytes(nginx, cache, tmp_path):
    """The damaged file is named, and no cache is left."""
    root, port = nginx
    shutil.copytree(cache, root / "cache")
    shard = root / "cache/data/shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedCacheError, match=r"shard-00001\.arrow is damaged"):
        pull(f"http://127.0.0.1:{port}/cache", tmp_path / "copy")
    with pytest.raises(IncompleteCacheError):
        CacheReader(tmp_path / "copy")
    shutil.copy(cache / "data/shard-00001.arrow", shard)
    assert pull(f"http://127.0.0.1:{port}/cache", tmp_path / "copy").files_skipped == 1


# --- push


@pytest.mark.parametrize("fault", ["cut", "cut in the answer", "wrong bytes", "503", "slow"])
def test_a_push_through_a_bad_line(place, cache, tmp_path, files_at, fault):
    """A push goes on after each fault and ends well."""
    sizes = [file.stat().st_size for file in sorted((cache / "data").iterdir())]
    inside = [sizes[0], sizes[0] + sizes[1]]
    proxy = place.proxy
    proxy.upward = fault != "cut in the answer"
    proxy.cuts = {"cut": [*inside, sum(sizes)], "cut in the answer": [3000]}.get(fault, [])
    proxy.flips = inside if fault == "wrong bytes" else []
    proxy.refused = 2 if fault == "503" else 0
    proxy.pause = 0.005 if fault == "slow" else 0
    planned = len(proxy.cuts) + len(proxy.flips) + proxy.refused
    push(cache, place.url)
    assert proxy.happened == planned
    assert _files(place.direct, files_at) == _files(cache, files_at)
    pull(place.url, tmp_path / "copy")
    assert verify(str(tmp_path / "copy"), deep=True) == []


def test_killed_pushes_never_show_half_a_cache(place, write_cache, tmp_path, files_at, rng):
    """``kill -9`` after so many bytes have passed; the next push goes on with what is there."""
    cache = write_cache(tmp_path / "original", shards=12)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    killed = 0
    for at in rng.uniform(0.02, 0.9, KILLS):
        process = _push(cache, place.url)
        passed = place.proxy.passed
        place.proxy.at = lambda now, p=process, goal=passed + at * size: (
            os.kill(p.pid, signal.SIGKILL) if now >= goal and p.returncode is None else None
        )
        process.wait()
        place.proxy.at = lambda now: None
        if process.returncode == 0:  # begin again
            filesystem, root = open_filesystem(place.direct)
            filesystem.rm(root, recursive=True)
            continue
        assert process.returncode == -signal.SIGKILL
        killed += 1
        open_filesystem(place.direct)[0].invalidate_cache()
        with suppress(CacheNotFoundError, IncompleteCacheError):
            CacheReader(place.direct)
            assert verify(place.direct, deep=True) == []
    assert killed, "no push was killed"
    push(cache, place.url)
    assert _files(place.direct, files_at) == _files(cache, files_at)


def _push(cache: Path, url: str) -> subprocess.Popen[bytes]:
    """A push in a process of its own."""
    code = "import sys; from logitcask.cache_format.share.copy import push; push(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, str(cache), url])
