"""Reading a cache: random access by sequence, one record batch at a time, each shard's hash checked before its first use."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from cache_format.codec import PackedBatch
from cache_format.errors import CacheError, CacheNotFoundError, DamagedCacheError, IncompleteCacheError
from cache_format.manifest import Manifest
from cache_format.schema import shard_schema
from cache_format.sequence import CachedSequence
from cache_format.writer import BUILD_DIR, MANIFEST

OPEN_SHARDS = 64
"""Shards kept open: far below any limit on open files."""

OPEN_BATCHES = 8
"""Record batches kept decompressed: enough for a shuffled loader to profit, usually a few MiB."""


class CacheReader:
    """The sequences of a finished cache, by index.

    ``path`` is a folder or any fsspec URL. Raises CacheNotFoundError, IncompleteCacheError, UnsupportedCacheError, or
    DamagedCacheError. With ``check`` (the default) a shard's sha256 is compared with the manifest when it is first
    touched; switch it off only after ``verify``.

    A reader may be pickled or forked: the copy in another process opens its own files.
    """

    def __init__(self, path: str | Any, *, check: bool = True) -> None:
        self.path = str(path)
        self.check = check
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise CacheError(f"{self.path} cannot be opened: {error}") from error
        self._local = self._filesystem.protocol in ("file", ("file", "local"))
        self.manifest = self._read_manifest()
        counts = np.array([shard.sequences for shard in self.manifest.shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._shards: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._checked: set[int] = set()
        self._process = os.getpid()
        self._batches: OrderedDict[tuple[int, int], PackedBatch] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a cache with {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        batch, row = divmod(index - int(self._first[shard]), self.manifest.shards[shard].sequences_per_batch)
        return self._batch(shard, batch).decode(row)

    def __iter__(self) -> Iterator[CachedSequence]:
        for index in range(len(self)):
            yield self[index]

    def iter_column(self, name: str) -> Iterator[pa.Array]:
        """One Arrow array of a column per record batch, in order; no other column is decompressed."""
        index = shard_schema(self.manifest.store.vocab_size).get_field_index(name)
        for shard in range(len(self.manifest.shards)):
            self._check_once(shard)
            with self._open(shard, pa.ipc.IpcReadOptions(included_fields=[index])) as file:
                for batch in range(file.num_record_batches):
                    yield self._get_batch(file, shard, batch).column(0)

    def iter_batches(self, shard: int) -> Iterator[PackedBatch]:
        """The record batches of one shard, in order, opened for decoding; its hash is not checked."""
        with self._open(shard) as file:
            for batch in range(file.num_record_batches):
                yield self._pack(file, shard, batch)

    def check_shard(self, shard: int) -> None:
        """Raises DamagedCacheError, naming the shard, unless its size and sha256 are those of the manifest."""
        entry = self.manifest.shards[shard]
        path = f"{self._root}/{entry.path}"
        again = "fetch or build the cache again"
        try:
            size = self._filesystem.size(path)
            if size != entry.bytes:
                raise DamagedCacheError(f"{entry.path} is damaged: {size} bytes, {entry.bytes} expected; {again}")
            with self._filesystem.open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DamagedCacheError(f"{entry.path} is missing; {again}") from None
        except OSError as error:
            raise CacheError(f"{self.path}/{entry.path} cannot be read: {error}") from error
        if found != entry.sha256:
            raise DamagedCacheError(
                f"{entry.path} is damaged: sha256 {found[:12]}..., {entry.sha256[:12]}... expected; {again}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Open files and Arrow readers do not travel to other processes.
        return {**self.__dict__, "_shards": OrderedDict(), "_batches": OrderedDict()}

    def _after_fork(self) -> None:
        """Lets go of what belongs to the parent process: open files, and connections that do not survive a fork."""
        self._process = os.getpid()
        self._shards.clear()
        self._batches.clear()
        if not self._local:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.path, skip_instance_cache=True)

    def _check_once(self, shard: int) -> None:
        if self.check and shard not in self._checked:
            self.check_shard(shard)
            self._checked.add(shard)

    def _read_manifest(self) -> Manifest:
        try:
            text = self._filesystem.cat_file(f"{self._root}/{MANIFEST}")
        except FileNotFoundError:
            if self._filesystem.exists(f"{self._root}/{BUILD_DIR}"):
                raise IncompleteCacheError(
                    f"{self.path} is an unfinished cache; run the same `teacher-cache build` again to complete it"
                ) from None
            raise CacheNotFoundError(
                f"{self.path} holds no cache (no {MANIFEST}); build one with `teacher-cache build CONFIG`"
            ) from None
        except NotADirectoryError:
            raise CacheNotFoundError(f"{self.path} is a file; a cache is a folder") from None
        except Exception as error:  # whatever a remote file system raises: no permission, no such host, ...
            raise CacheError(f"{self.path}/{MANIFEST} cannot be read: {error}") from error
        return Manifest.from_json(text, f"{self.path}/{MANIFEST}")

    def _batch(self, shard: int, batch: int) -> PackedBatch:
        if os.getpid() != self._process:
            self._after_fork()
        key = (shard, batch)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        if shard not in self._shards:
            self._check_once(shard)
            self._shards[shard] = self._open(shard)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        packed = self._pack(self._shards[shard], shard, batch)
        self._batches[key] = packed
        if len(self._batches) > OPEN_BATCHES:
            self._batches.popitem(last=False)
        return packed

    def _pack(self, file: pa.ipc.RecordBatchFileReader, shard: int, batch: int) -> PackedBatch:
        store = self.manifest.store
        where = f"{self.manifest.shards[shard].path}, batch {batch}"
        return PackedBatch(self._get_batch(file, shard, batch), store.vocab_size, store.logprob_step, where)

    def _open(self, shard: int, options: pa.ipc.IpcReadOptions | None = None) -> pa.ipc.RecordBatchFileReader:
        entry = self.manifest.shards[shard]
        path = f"{self._root}/{entry.path}"
        try:
            source = pa.memory_map(path) if self._local else pa.PythonFile(self._filesystem.open(path, "rb"), "r")
            return pa.ipc.open_file(source, options=options)
        except (OSError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{entry.path} cannot be opened: {error}") from error

    def _get_batch(self, file: pa.ipc.RecordBatchFileReader, shard: int, batch: int) -> pa.RecordBatch:
        entry = self.manifest.shards[shard]
        expected = min(entry.sequences_per_batch, entry.sequences - batch * entry.sequences_per_batch)
        try:
            found = file.get_batch(batch)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{entry.path}, batch {batch}, cannot be read: {error}") from error
        if found.num_rows != expected:
            raise DamagedCacheError(f"{entry.path}, batch {batch}, has {found.num_rows} rows; expected {expected}")
        return found
