"""What `teacher-cache info` prints, word by word."""

from __future__ import annotations

from logitcask.cache_format.describe import numbered


def test_one_shard_is_no_shards():
    assert numbered(1, "shard") == "1 shard"
    assert numbered(0, "shard") == "0 shards"
    assert numbered(12_000, "shard") == "12,000 shards"
