"""The Logitcask cache format (SPEC.md): files on disk, without torch, vLLM and transformers.

from logitcask.cache_format import CacheReader
cache = CacheReader("caches/quickstart")
cache[0].ids                               # int32[P, K]
"""

from typing import TYPE_CHECKING

from logitcask.cache_format.errors import (
    CacheError,
    CacheInUseError,
    CacheNotFoundError,
    ConfigError,
    DamagedCacheError,
    IncompleteCacheError,
    LogitcaskError,
    UnsupportedCacheError,
    UserError,
)
from logitcask.cache_format.manifest import Manifest
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence, ChosenIds, TailSamples
from logitcask.cache_format.verify import verify

if TYPE_CHECKING:
    from logitcask.cache_format.writer import CacheWriter

__all__ = [
    "CacheError",
    "CacheInUseError",
    "CacheNotFoundError",
    "CacheReader",
    "CacheWriter",
    "CachedSequence",
    "ChosenIds",
    "ConfigError",
    "DamagedCacheError",
    "IncompleteCacheError",
    "LogitcaskError",
    "Manifest",
    "TailSamples",
    "UnsupportedCacheError",
    "UserError",
    "verify",
]


def __getattr__(name: str) -> object:
    """Imports the writer on first use, because readers do not need it."""
    if name == "CacheWriter":
        from logitcask.cache_format.writer import CacheWriter

        return CacheWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
