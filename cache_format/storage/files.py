"""Files of caches at any fsspec URL, read as streams of known size and hash."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem

from logitcask.cache_format.errors import (
    CacheError,
    CacheNotFoundError,
    DamagedCacheError,
    IncompleteCacheError,
    UserError,
    one_line,
)
from logitcask.cache_format.layout import BUILD_DIR, MANIFEST, PULL_DIR, PUSH_MARK
from logitcask.cache_format.manifest import MAX_MANIFEST_BYTES, CacheFile, Manifest

ATTEMPTS = 4
"""Attempts of a transfer before a failing network is reported."""

FIRST_DELAY = 0.5
"""Seconds before the second attempt. Each further pause is twice as long."""


_CHUNK = 1 << 20
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+:")
_LOCAL_URLS = ("file://", "local://")
_STREAMING = {"http", "https", "hf"}  # with block_size=0 these send a file in one response
_CONNECTED = {"sftp", "ssh", "ftp", "smb"}  # drivers with one connection for all requests
_PACKAGES = {
    "huggingface_hub": "logitcask[hub]",
    "paramiko": "logitcask[sftp]",
    "s3fs": "logitcask[s3]",
}
_PERMANENT = (
    UserError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
)
_Result = TypeVar("_Result")
OnBytes = Callable[[int], object]
"""Called with the number of bytes received. A negative number takes back a failed attempt's."""


def open_filesystem(
    url: str | Path, *, fresh: bool = False
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``url`` (or of a local path), and the path in it. Most drivers make no
    request yet.

    Without ``://``, ``url`` is a local path, whatever its characters. ``fresh`` gives the file
    system connections of its own, for a forked process. Raises CacheError for a protocol that
    fsspec does not know, if the driver is not installed, and for any error of the driver. Raises
    UserError for a name with ``::`` in a store.
    """
    url = str(url)
    if "://" not in url or url.startswith(_LOCAL_URLS):
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(url)).rstrip("/")
    _refuse_chain_by_accident(url)
    options: dict[str, Any] = {"skip_instance_cache": True} if fresh else {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            # aiohttp gives a whole response five minutes; a shard on a slow line takes longer.
            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            }
        filesystem, root = _opened(url, options)
    except ImportError as error:
        # fsspec raises its own ImportError from the one that names the module.
        missing = getattr(error.__cause__ or error, "name", None) or str(error)
        raise CacheError(
            f"{url} needs a package that is not installed; pip install '{_PACKAGES.get(missing, missing)}'"
        ) from error
    except (
        Exception
    ) as error:  # some drivers connect here, or open an archive, and raise errors of any type
        raise CacheError(
            f"{url} cannot be opened: {one_line(error)}; check the address, the network and your access to it"
        ) from error
    return filesystem, root.rstrip("/")


def _opened(url: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """What fsspec opens. A busy SSH server closes connections before it greets them: asked again."""
    for attempt in range(ATTEMPTS):
        try:
            filesystem, root = fsspec.core.url_to_fs(url, **options)
            break
        except Exception as error:
            # Refusals, of a key for one, are of classes derived from it.
            if type(error).__name__ != "SSHException" or attempt == ATTEMPTS - 1:
                raise
            time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5))
    return filesystem, root


def _refuse_chain_by_accident(url: str) -> None:
    """Raises UserError for ``s3://bucket/a::b``: fsspec takes ``b`` for an underlying file system,
    and drops it.
    """
    outer, chained, _ = url.partition("::")
    protocol = outer.partition("://")[0]
    if not chained or protocol not in fsspec.available_protocols():
        return
    with suppress(ImportError):  # reported when the file system is opened
        kinds = fsspec.get_filesystem_class(protocol).__mro__[:-1]
        if not any(
            {"fo", "target_protocol"} & signature(kind.__init__).parameters.keys() for kind in kinds
        ):
            raise UserError(
                f"{url} holds '::', which fsspec takes for a chain of file systems; choose a name without it"
            )


def local_folder(path: str | Path, advice: str) -> Path:
    """``path``, which must be local. Raises UserError, with ``advice``, for a URL, which as a path
    would be a folder ``s3:/...``.
    """
    first = Path(path).parts[:1]
    if first and _URL_AS_PATH.fullmatch(first[0]):
        raise UserError(f"{path} is a URL, but has to be a local folder; {advice}")
    return Path(path)


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def protocol_of(filesystem: fsspec.AbstractFileSystem) -> str:
    protocol = filesystem.protocol
    return protocol if isinstance(protocol, str) else protocol[0]


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turns any error of a remote file system (no permission, no such host, ...) into a CacheError
    about ``where``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CacheError(
            f"{where} cannot be reached: {one_line(error)}; check the address, the network and your access to it"
        ) from error


def retrying(action: Callable[[], _Result], filesystem: fsspec.AbstractFileSystem) -> _Result:
    """The result of ``action()``, tried ATTEMPTS times with growing pauses. A permanent error is
    raised at once, and wrong bytes the second time: a bad line may have changed them. Before a new
    attempt, a driver that may have lost its connection gets another.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except DamagedCacheError:
            if attempt or is_local(filesystem):
                raise
        except Exception as error:
            if not _is_transient(error):
                raise
        time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5))
        with suppress(Exception):  # the attempt meets the same error and reports it
            _reconnect(filesystem)
    return action()


def _reconnect(filesystem: fsspec.AbstractFileSystem) -> None:
    """Gives a driver of one connection a new one. Others open a connection for each request."""
    if protocol_of(filesystem) in _CONNECTED:
        options = filesystem.storage_options | {"skip_instance_cache": True}
        fresh = vars(type(filesystem)(*filesystem.storage_args, **options))
        # All who have opened this address share the instance. It stays, with its identity.
        vars(filesystem).update(fresh | {"_fs_token_": filesystem._fs_token})


def _is_transient(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    return not isinstance(error, _PERMANENT)


def open_stream(filesystem: fsspec.AbstractFileSystem, path: str) -> BinaryIO:
    """``path``, opened for one pass from start to end. It keeps a few MiB in memory at a time."""
    protocol = protocol_of(filesystem)
    # With a size, which HTTP streams ignore, fsspec makes no HEAD request. A failed one would look
    # like a missing file.
    extra = {"size": 1} if protocol in ("http", "https") else {}
    stream: BinaryIO = filesystem.open(
        path, "rb", block_size=0 if protocol in _STREAMING else 8 * _CHUNK, **extra
    )
    return stream


def read_small(filesystem: fsspec.AbstractFileSystem, path: str, limit: int) -> bytes:
    """The bytes of a file of at most ``limit`` bytes. At most ``limit + 1`` bytes are read.

    Raises DamagedCacheError for a larger file, FileNotFoundError, and any error of the file system.
    """

    def read() -> bytes:
        data = bytearray()
        with open_stream(filesystem, path) as stream:
            while chunk := stream.read(min(_CHUNK, limit + 1 - len(data))):
                data += chunk
        return bytes(data)

    data = retrying(read, filesystem)
    if len(data) > limit:
        raise DamagedCacheError(
            f"{filesystem.unstrip_protocol(path)} has more than {limit} bytes; that is not a cache's"
        )
    return data


def read_manifest(
    filesystem: fsspec.AbstractFileSystem, root: str, where: str
) -> tuple[bytes, Manifest]:
    """The manifest of the cache in ``root``: its bytes, and the parsed Manifest. ``where`` names
    the cache in messages.

    Raises CacheNotFoundError, IncompleteCacheError for an unfinished build or copy, CacheError if
    the place cannot be reached, and what ``Manifest.from_json`` raises.
    """
    manifest = f"{root}/{MANIFEST}"
    if is_local(filesystem) and os.path.exists(manifest) and not os.path.isfile(manifest):
        # Reading a pipe could wait for ever.
        raise DamagedCacheError(f"{where}/{MANIFEST} is no file; fetch or build the cache again")
    with reaching(where):
        try:
            text = read_small(filesystem, manifest, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            if filesystem.exists(f"{root}/{BUILD_DIR}"):
                raise IncompleteCacheError(
                    f"{where} is an unfinished cache; run the same `teacher-cache build` again to complete it"
                ) from None
            if any(
                filesystem.exists(f"{root}/{name}")
                for name in (PULL_DIR, PUSH_MARK, "data/shard-00000.arrow")
            ):
                raise IncompleteCacheError(
                    f"{where} is an unfinished copy of a cache; "
                    "run the same `teacher-cache push` or `pull` again to complete it"
                ) from None
            raise CacheNotFoundError(
                f"{where} holds no cache (no {MANIFEST}); build one with `teacher-cache build CONFIG`"
            ) from None
        except NotADirectoryError:
            raise CacheNotFoundError(f"{where} is a file; a cache is a folder") from None
    return text, Manifest.from_json(text, f"{where}/{MANIFEST}")


def verified_chunks(
    filesystem: fsspec.AbstractFileSystem, path: str, file: CacheFile
) -> Iterator[bytes]:
    """The bytes of ``path`` in chunks of at most 1 MiB.

    Raises DamagedCacheError if they are not those of ``file``: at once for too many bytes, at the
    end for too few or for another sha256. The caller must then discard all chunks.
    """
    name, again = filesystem.unstrip_protocol(path), "fetch or build the cache again"
    sha, received = hashlib.sha256(), 0
    try:
        with open_stream(filesystem, path) as stream:
            while chunk := stream.read(min(_CHUNK, file.bytes - received + 1)):
                received += len(chunk)
                if received > file.bytes:
                    raise DamagedCacheError(
                        f"{name} is damaged: more than the {file.bytes} bytes expected; {again}"
                    )
                sha.update(chunk)
                yield chunk
    except FileNotFoundError:
        raise DamagedCacheError(f"{name} is missing; {again}") from None
    if received < file.bytes:
        raise DamagedCacheError(
            f"{name} is damaged: {received} bytes, {file.bytes} expected; {again}"
        )
    if sha.hexdigest() != file.sha256:
        raise DamagedCacheError(
            f"{name} is damaged: sha256 {sha.hexdigest()[:12]}..., {file.sha256[:12]}... expected; {again}"
        )


def download(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    file: CacheFile,
    target: Path,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Downloads ``file`` to ``target``, verified and flushed to disk. ``target`` is written in
    place; transient errors are retried.

    ``on_bytes`` is called with the length of each chunk. Raises DamagedCacheError, CacheError if
    the network keeps failing, and UserError if ``target`` cannot be written.
    """

    def attempt() -> None:
        with room_for(target):
            handle.seek(0)
        with counted(on_bytes) as count:
            for chunk in verified_chunks(filesystem, path, file):
                with room_for(target):
                    handle.write(chunk)
                count(len(chunk))

    with room_for(target):
        target.touch()
        # Closing writes the rest of the buffer, so it can fail like a write.
        with open(target, "r+b") as handle:
            with reaching(filesystem.unstrip_protocol(path)):
                retrying(attempt, filesystem)
            handle.truncate(file.bytes)
            os.fsync(handle.fileno())


@contextmanager
def counted(on_bytes: OnBytes) -> Iterator[OnBytes]:
    """The callback for one attempt. If the attempt fails, ``on_bytes`` gets its bytes negated."""
    done = 0

    def count(received: int) -> None:
        nonlocal done
        done += received
        on_bytes(received)

    try:
        yield count
    except BaseException:
        on_bytes(-done)
        raise


@contextmanager
def room_for(target: Path) -> Iterator[None]:
    try:
        yield
    except filelock.Timeout:  # an OSError, but another process's lock is no lack of room
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent}: {error.strerror or error}; make room or permit it, then run the same again"
        ) from error


def map_file(path: str | Path) -> mmap.mmap:
    """The bytes of a local file, mapped for reading. Raises OSError, and ValueError for an empty
    file.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def has_content(path: Path, file: CacheFile) -> bool:
    """Whether ``path`` is a local file with the size and the sha256 of ``file``."""
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size != file.bytes:
                return False
            return hashlib.file_digest(handle, "sha256").hexdigest() == file.sha256
    except OSError:
        return False
