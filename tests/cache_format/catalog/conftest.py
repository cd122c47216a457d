"""Small caches, and a home of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from logitcask.cache_format import CacheWriter, Manifest
from logitcask.cache_format.catalog.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def make_cache(rng, header, sequence) -> Callable[..., Manifest]:
    """``make_cache(folder, teacher="m", sequences=3)``: writes a cache of two shards."""

    def make(folder: Path, teacher: str = "m", sequences: int = 3) -> Manifest:
        head = header()
        head = head.model_copy(
            update={
                "teacher": head.teacher.model_copy(update={"model": teacher}),
                "config": {"teacher": {"model": teacher}},
            }
        )
        with CacheWriter(folder) as writer:
            head = writer.begin(head)
            for shard in range(2):
                with writer.shard(shard) as open_shard:
                    for number in range(sequences):
                        open_shard.append(sequence(rng, f"{shard}/{number}"))
            return writer.finish(head, 2)

    return make
