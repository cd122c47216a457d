"""Reading a cache: random access by sequence, one record batch at a time. Each shard's hash is
checked before its first use.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from logitcask.cache_format.errors import CacheError, DamagedCacheError, UserError
from logitcask.cache_format.export.tables import ROWS, SCHEMA, Text, iter_tables
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.manifest import CacheFile, Manifest, ShardEntry, TailPriorEntry
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.bounded_file import BoundedFile
from logitcask.cache_format.shards.codec import Codec, PackedBatch
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.storage.files import (
    is_local,
    map_file,
    open_filesystem,
    reaching,
    read_manifest,
    retrying,
    verified_chunks,
)
from logitcask.cache_format.storage.shard_cache import ShardCache

OPEN_SHARDS = 64
"""Shards kept open: far below any limit on open files."""

OPEN_BATCHES = 8
"""Record batches kept decompressed: enough for a shuffled loader to profit, usually a few MiB."""

OPEN_BYTES = 256 << 20
"""Of these batches: a larger one is kept alone."""


class CacheReader:
    """The sequences of a finished cache, by index.

    ``path`` is a folder or any fsspec URL. Shards of a remote cache are fetched when they are first
    used and kept in a bounded local cache
    (``logitcask.cache_format.storage.shard_cache.ShardCache``). Raises CacheNotFoundError,
    IncompleteCacheError, UnsupportedCacheError, or DamagedCacheError.

    ``check`` (the default): the manifest must agree with its own totals and hashes, and a local
    shard's sha256 must agree with the manifest at its first use. Switch it off only after
    ``verify``. Remote shards are always checked.

    ``manifest``: the manifest of a build that has all its shards but is not finished yet.

    ``checked``: local shards whose sha256 is known to be right and is not checked again. A process
    that checks shards for several readers of the same files may add to it.

    A reader may be pickled or forked: the copy in another process opens its own files.
    """

    def __init__(
        self,
        path: str | Any,
        *,
        check: bool = True,
        shard_cache: ShardCache | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.path = str(path)
        self.check = check
        self._process = os.getpid()
        self._filesystem, self._root = open_filesystem(self.path)
        self.manifest_sha256 = ""
        """Of the bytes of the manifest that was read, hex; empty for one that was given."""
        if manifest is None:
            text, manifest = read_manifest(self._filesystem, self._root, self.path)
            self.manifest_sha256 = hashlib.sha256(text).hexdigest()
        self.manifest = manifest
        if check and (wrong := self.manifest.contradictions()):
            raise DamagedCacheError(
                f"{self.path}/{MANIFEST} contradicts itself: {' and '.join(wrong)} are not what the rest of it gives; "
                "fetch or build the cache again"
            )
        self._copies = None if is_local(self._filesystem) else shard_cache or ShardCache()
        self.prior = self._read_prior(self.manifest.tail_prior)
        self.codec = Codec(self.manifest.store, self.prior)
        counts = np.array([shard.sequences for shard in self.manifest.shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._shards: OrderedDict[int, BoundedFile] = OrderedDict()
        self.checked: set[int] = set()
        self._batches: OrderedDict[tuple[int, int], PackedBatch] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    def require_known(self, so_that: str) -> None:
        """Raises UserError if the source of the cache did not hold some values (``store.unknown``),
        which ``so_that`` needs.
        """
        if unknown := self.manifest.store.unknown:
            raise UserError(
                f"{self.path} does not know all values of its positions (store.unknown: {', '.join(unknown)}), so {so_that}"
            )

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a cache with {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        batch, row = divmod(
            index - int(self._first[shard]), self.manifest.shards[shard].sequences_per_batch
        )
        return self._batch(shard, batch).decode(row)

    def __iter__(self) -> Iterator[CachedSequence]:
        for shard in range(len(self.manifest.shards)):
            self.check_once(shard)
            for batch in self.iter_batches(shard):
                for row in range(len(batch)):
                    yield batch.decode(row)

    def iter_column(self, name: str, shards: Iterable[int] | None = None) -> Iterator[pa.Array]:
        """One Arrow array of a column per record batch, in order, of some or all shards. Other
        columns stay compressed.
        """
        index = self.codec.schema.get_field_index(name)
        for shard in range(len(self.manifest.shards)) if shards is None else shards:
            self.check_once(shard)
            file = self._open(shard, [index])
            for batch in range(len(file)):
                yield self._get_batch(file, shard, batch).column(0)

    def iter_batches(self, shard: int) -> Iterator[PackedBatch]:
        """The record batches of one shard, in order, opened for decoding. The hash of a local shard
        is not checked.
        """
        file = self._open(shard)
        for batch in range(len(file)):
            yield self._pack(file, shard, batch)

    def column_bytes(self, shard: int) -> dict[str, int]:
        """The bytes of each column of a shard as they are stored. Only sizes are read; the rest of
        the shard's bytes are Arrow's headers and padding.
        """
        file = self._open(shard)
        total = dict.fromkeys(self.codec.schema.names, 0)
        for batch in range(len(file)):
            for name, size in file.column_bytes(batch).items():
                total[name] += size
        return total

    def iter_tables(
        self, sequences: Iterable[int] | None = None, *, rows: int = ROWS, text: Text | None = None
    ) -> Iterator[pa.Table]:
        """The sequences as plain Arrow tables with a row per token, at least ``rows`` tokens a
        table, but for the last one. docs/store.md describes the columns.

        sequences: indices; None for all, in order.
        text:      from ids to texts; None leaves the column ``token_text`` null.
        """
        return iter_tables(self, sequences, rows=rows, text=text)

    def to_table(
        self, sequences: Iterable[int] | None = None, *, text: Text | None = None
    ) -> pa.Table:
        """The tables of ``iter_tables`` as one, all of it in memory: for small caches, or some
        sequences of a large one.
        """
        return pa.concat_tables([SCHEMA.empty_table(), *self.iter_tables(sequences, text=text)])

    def check_shard(self, shard: int) -> None:
        """Raises DamagedCacheError, naming the shard, if its size or sha256 is wrong.

        Raises CacheError if it cannot be reached or read.
        """
        self._check_file(self.manifest.shards[shard])

    def check_once(self, shard: int) -> None:
        """Calls ``check_shard`` at a shard's first use, except for remote and ``checked`` ones."""
        # The local cache of remote shards checks each shard when it arrives.
        if self.check and self._copies is None and shard not in self.checked:
            self.check_shard(shard)
            self.checked.add(shard)

    def __getstate__(self) -> dict[str, Any]:
        # Open files and Arrow readers cannot be pickled.
        return {**self.__dict__, "_shards": OrderedDict(), "_batches": OrderedDict()}

    def _in_this_process(self) -> None:
        """After a fork, drops open files of the parent and connections, which break in a fork."""
        if os.getpid() == self._process:
            return
        self._process = os.getpid()
        self._shards.clear()
        self._batches.clear()
        if self._copies is not None:
            self._filesystem, self._root = open_filesystem(self.path, fresh=True)

    def _check_file(self, entry: ShardEntry | TailPriorEntry) -> None:
        self._in_this_process()
        self._require_file(entry)
        file, where = CacheFile(entry.path, entry.bytes, entry.sha256), f"{self.path}/{entry.path}"

        def read() -> None:
            for _ in verified_chunks(self._filesystem, f"{self._root}/{entry.path}", file):
                pass

        if self._copies is not None:
            with reaching(where):
                retrying(read, self._filesystem)
            return
        try:
            read()
        except OSError as error:
            raise CacheError(f"{where} cannot be read: {error}") from error

    def _require_file(self, entry: ShardEntry | TailPriorEntry) -> None:
        """Raises DamagedCacheError for a pipe, a device or a folder, which could block forever."""
        path = f"{self._root}/{entry.path}"
        if self._copies is None and os.path.exists(path) and not os.path.isfile(path):
            raise DamagedCacheError(
                f"{self.path}/{entry.path} is no file; fetch or build the cache again"
            )

    def _read_prior(self, entry: TailPriorEntry | None) -> TailPrior | None:
        if entry is None:
            return None
        where = f"{self.path}/{entry.path}"
        if self._copies is None:
            self._check_file(entry)
        return TailPrior.from_bytes(self._map(entry), self.manifest.store.vocab_size, where)

    def _map(self, entry: ShardEntry | TailPriorEntry) -> mmap.mmap:
        """The bytes of a file of the cache, memory-mapped."""
        path = f"{self._root}/{entry.path}"
        try:
            if self._copies is not None:
                return self._copies.memory_map(self._filesystem, path, entry.bytes, entry.sha256)
            self._require_file(entry)
            return map_file(path)
        except (OSError, ValueError) as error:  # ValueError for a file of 0 bytes
            raise DamagedCacheError(f"{entry.path} cannot be opened: {error}") from error

    def _batch(self, shard: int, batch: int) -> PackedBatch:
        self._in_this_process()
        key = (shard, batch)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        if shard not in self._shards:
            self.check_once(shard)
            self._shards[shard] = self._open(shard)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        packed = self._pack(self._shards[shard], shard, batch)
        self._batches[key] = packed
        while len(self._batches) > 1 and (
            len(self._batches) > OPEN_BATCHES
            or sum(each.batch.nbytes for each in self._batches.values()) > OPEN_BYTES
        ):
            self._batches.popitem(last=False)
        return packed

    def _pack(self, file: BoundedFile, shard: int, batch: int) -> PackedBatch:
        where = f"{self.manifest.shards[shard].path}, batch {batch}"
        return self.codec.open(self._get_batch(file, shard, batch), where)

    def _open(self, shard: int, columns: list[int] | None = None) -> BoundedFile:
        self._in_this_process()
        entry = self.manifest.shards[shard]
        file = BoundedFile(self._map(entry), entry.path, self.codec.schema, columns)
        expected = -(-entry.sequences // entry.sequences_per_batch)
        if len(file) != expected:
            raise DamagedCacheError(
                f"{entry.path} has {len(file)} record batches; the manifest asks for {expected}"
            )
        return file

    def _get_batch(self, file: BoundedFile, shard: int, batch: int) -> pa.RecordBatch:
        entry = self.manifest.shards[shard]
        expected = min(
            entry.sequences_per_batch, entry.sequences - batch * entry.sequences_per_batch
        )
        found = file.batch(batch)
        if found.num_rows != expected:
            raise DamagedCacheError(
                f"{entry.path}, batch {batch}, has {found.num_rows} rows; expected {expected}"
            )
        return found
