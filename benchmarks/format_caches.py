"""Real caches for the format benchmark, written as a build writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logitcask.cache_format import CachedSequence, CacheWriter
from logitcask.cache_format.manifest import (
    DataHash,
    DataIdentity,
    Header,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.builder.plan import PlannedShard
from logitcask.pipeline.config import StoreConfig

BENCHMARK_DATA: dict[str, Any] = {"source": "python-docs", "max_length": 512}


def write_cache(
    path: Path,
    sequences: list[CachedSequence],
    store: StoreConfig,
    teacher: TeacherIdentity,
    tokenizer: TokenizerIdentity,
    *,
    prior: TailPrior | None = None,
    per_batch: Callable[[float], int] | None = None,
) -> None:
    """One shard, its record batches as large as a build makes them; the prior is that of the
    sequences by default.
    """
    planned = PlannedShard(
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        positions=sum(len(s.positions) for s in sequences),
    )
    digest = DataHash()
    for s in sequences:
        digest.update(s.sequence_id, s.input_ids, s.loss_mask)
    if prior is None:
        prior = TailPrior.estimate(sequences, teacher.vocab_size)
    header = header_of(store, teacher, tokenizer, digest.hexdigest())
    write_shards(path, header, prior, [sequences], store, per_batch or planned.sequences_per_batch)


def write_shards(
    path: Path,
    header: Header,
    prior: TailPrior,
    shards: Iterable[Iterable[CachedSequence]],
    store: StoreConfig,
    per_batch: Callable[[float], int] | None = None,
) -> None:
    """A finished cache at ``path``, which must not exist."""
    with CacheWriter(path, compression_level=store.compression_level) as writer:
        header = writer.begin(header, prior)
        count = 0
        for shard in shards:
            with writer.shard(count, sequences_per_batch=per_batch) as file:
                for sequence in shard:
                    file.append(sequence)
            count += 1
        writer.finish(header, count)


def header_of(
    store: StoreConfig, teacher: TeacherIdentity, tokenizer: TokenizerIdentity, data_sha256: str
) -> Header:
    """What a build would write, its config included."""
    return Header(
        created_by=f"logitcask {version('logitcask')}",
        teacher=teacher,
        tokenizer=tokenizer,
        data=DataIdentity(
            **BENCHMARK_DATA,
            split="train",
            kind="documents",
            mask_policy="all",
            overlong="split",
            sha256=data_sha256,
        ),
        store=store.settings(teacher.vocab_size),
        config={"store": store.model_dump(mode="json")},
    )


def cache_bytes(path: Path) -> int:
    """Everything in the folder of a cache: shards, prior, manifest, card."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
