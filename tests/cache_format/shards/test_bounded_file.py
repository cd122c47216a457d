"""Bytes of columns, compared with their buffers compressed one by one."""

from __future__ import annotations

import pyarrow as pa
import pytest

from logitcask.cache_format import CacheReader, CacheWriter


@pytest.mark.parametrize("kind", ["head", "sample logprobs"])
def test_column_bytes(tmp_path, header, sequence, rng, kind):
    with CacheWriter(tmp_path / "cache") as writer:
        started = writer.begin(header(kind=kind))
        for index in range(2):
            with writer.shard(index) as shard:
                for i in range(4):
                    shard.append(sequence(rng, f"{index}-{i}", kind=kind))
        writer.finish(started, 2)
    reader = CacheReader(tmp_path / "cache")
    codec, prefix = pa.Codec("zstd", compression_level=1), 8
    for shard, entry in enumerate(reader.manifest.shards):
        expected = dict.fromkeys(reader.codec.schema.names, 0)
        for packed in reader.iter_batches(shard):
            for name, column in zip(packed.batch.schema.names, packed.batch.columns, strict=True):
                for buffer in column.buffers():
                    if buffer is not None and buffer.size:
                        expected[name] += prefix + codec.compress(buffer).size
        found = reader.column_bytes(shard)
        assert found == expected
        assert 0 < entry.bytes - sum(found.values()) < 20_000
