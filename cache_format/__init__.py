"""The Logitcask cache format: what is on disk, with no torch, no vLLM and no transformers. See SPEC.md.

from cache_format import CacheReader
cache = CacheReader("caches/quickstart")
cache[0].ids                               # int32[P, K]
"""

from cache_format.errors import (
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
from cache_format.manifest import Manifest
from cache_format.reader import CacheReader
from cache_format.sequence import CachedSequence, TailSamples
from cache_format.verify import verify
from cache_format.writer import CacheWriter

__all__ = [
    "CacheError",
    "CacheInUseError",
    "CacheNotFoundError",
    "CacheReader",
    "CacheWriter",
    "CachedSequence",
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
