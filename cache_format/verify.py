"""``verify``: is this cache what its manifest says? Sizes and hashes of all shards."""

from __future__ import annotations

from collections.abc import Callable

from cache_format.errors import DamagedCacheError
from cache_format.reader import CacheReader, check_shard


def verify(path: str, on_shard: Callable[[str], None] = lambda _: None) -> list[str]:
    """One line per damaged or missing shard of the cache at ``path``; an empty list means that all is well.

    ``on_shard`` is called with each shard's path after it was checked. Raises what opening the cache raises.
    """
    cache = CacheReader(path)
    problems = []
    for entry in cache.manifest.shards:
        try:
            check_shard(cache._filesystem, cache._root, entry)
        except DamagedCacheError as error:
            problems.append(str(error))
        on_shard(entry.path)
    return problems
