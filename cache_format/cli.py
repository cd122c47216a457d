"""The commands that need nothing but a cache: ``teacher-cache info`` and ``teacher-cache verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from cache_format.errors import DamagedCacheError
from cache_format.manifest import Manifest
from cache_format.reader import CacheReader
from cache_format.verify import verify as verify_cache

_SHOWN_ELSEWHERE = ("sequences", "tokens", "kept_positions")

Cache = Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder or fsspec URL.")]


def info(
    cache: Cache, as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False
) -> None:
    """Says what a cache holds: teacher, data, sizes, coverage."""
    manifest = CacheReader(cache).manifest
    print(manifest.to_json() if as_json else describe(manifest, cache), end="" if as_json else "\n")


def verify(
    cache: Cache,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode everything and check every number against SPEC.md.")
    ] = False,
) -> None:
    """Checks the size and sha256 of every shard, and with --deep all that is in them. Exit code 1 if anything is off."""
    shards = len(CacheReader(cache).manifest.shards)
    with tqdm(total=shards, unit="shard", desc="verify", leave=False) as bar:
        problems = verify_cache(cache, deep=deep, on_shard=lambda _: bar.update())
    if problems:
        raise DamagedCacheError("; ".join(problems))
    checked = "every number as the specification asks" if deep else "all as the manifest says"
    print(f"{cache}: {shards} shards, {checked}")


def describe(manifest: Manifest, path: str | Path) -> str:
    """A page for a person: what the cache at ``path`` is and how large."""
    teacher, data, store, totals = manifest.teacher, manifest.data, manifest.store, manifest.statistics
    head = "" if totals.head_mass is None else f", holding {totals.head_mass:.1%} of the mass on average"
    loss = "none: no position is kept" if totals.teacher_ce is None else f"{totals.teacher_ce:.4f} nats per token"
    shape = f"{totals.tokens:,} in {totals.sequences:,} sequences, {totals.positions:,} kept positions"
    counters = ", ".join(
        f"{name.replace('_', ' ')} {count:,}"
        for name, count in data.counters.items()
        if count and name not in _SHOWN_ELSEWHERE
    )
    rows = {
        "cache": str(path),
        "teacher": f"{teacher.model} ({teacher.engine}, {teacher.dtype}, route {teacher.route})",
        "data": f"{data.source}, split {data.split}, {data.kind}, loss mask: {data.mask_policy}",
        "read": counters,
        "tokens": shape,
        "head": f"top {store.top_k} of {store.vocab_size:,} ids{head}",
        "teacher's loss": loss,
        "size": f"{totals.bytes:,} bytes in {len(manifest.shards)} shards, {totals.bytes_per_token:.1f} bytes per token",
        "format": f"version {manifest.format_version}, logprobs within {store.logprob_step / 2:g} nats",
        "fingerprint": manifest.fingerprint,
    }
    return "\n".join(f"{name:15} {value}" for name, value in rows.items())
