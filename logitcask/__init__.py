"""Logitcask: a teacher's next-token distributions, computed once, stored sparsely, learnt from
without the teacher.

    from logitcask import CacheReader, CachedDataset, LOSSES, SparseTeacher, collate

Everything here is loaded when it is first asked for: a reader of caches loads no torch. The
packages:

    logitcask.cache_format   what is on disk: reading, writing, verifying, deriving, sharing caches
    logitcask.pipeline       teacher to cache: ``teacher-cache``
    logitcask.train          cache to student: losses, data, ``train-student``
    logitcask.rounds         both in turns: ``student-rounds``
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitcask.cache_format import (
        CachedSequence,
        CacheError,
        CacheInUseError,
        CacheNotFoundError,
        CacheReader,
        CacheWriter,
        ChosenIds,
        ConfigError,
        DamagedCacheError,
        IncompleteCacheError,
        LogitcaskError,
        Manifest,
        TailSamples,
        UnsupportedCacheError,
        UserError,
        verify,
    )
    from logitcask.cache_format.export.rows import RowDecoder
    from logitcask.train.data.batch import collate
    from logitcask.train.data.dataset import CachedDataset
    from logitcask.train.losses import LOSSES, SparseTeacher, TailDraws
    from logitcask.train.trainers.distillation import Distillation
    from logitcask.train.trainers.transformers_trainer import DistillationMixin

_FORMAT = "logitcask.cache_format"
_HOMES = {
    "CachedDataset": "logitcask.train.data.dataset",
    "Distillation": "logitcask.train.trainers.distillation",
    "DistillationMixin": "logitcask.train.trainers.transformers_trainer",
    "LOSSES": "logitcask.train.losses",
    "RowDecoder": "logitcask.cache_format.export.rows",
    "SparseTeacher": "logitcask.train.losses",
    "TailDraws": "logitcask.train.losses",
    "collate": "logitcask.train.data.batch",
}
"""The modules that public names are loaded from, where it is not the format."""

__all__ = [
    "LOSSES",
    "CacheError",
    "CacheInUseError",
    "CacheNotFoundError",
    "CacheReader",
    "CacheWriter",
    "CachedDataset",
    "CachedSequence",
    "ChosenIds",
    "ConfigError",
    "DamagedCacheError",
    "Distillation",
    "DistillationMixin",
    "IncompleteCacheError",
    "LogitcaskError",
    "Manifest",
    "RowDecoder",
    "SparseTeacher",
    "TailDraws",
    "TailSamples",
    "UnsupportedCacheError",
    "UserError",
    "collate",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES.get(name, _FORMAT)), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
