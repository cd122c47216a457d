"""The codec's decisions, one at a time: what each column takes in bytes per position, stored as it
is and otherwise.

Columns are compressed as a shard compresses them: a buffer per record batch, zstd level 1, unless
the level is what is varied.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from format_caches import cache_bytes, write_cache
from format_speed import consume, seconds
from format_truth import Reconstruction, Truth, distances
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.schema import PRIOR_STEP, TAIL_MASS_FLOOR
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.shards.shard_writer import uncompressed_bytes
from logitcask.pipeline.config import StoreConfig

K = 16
_ROUNDS = 7
_Array = NDArray[Any]


def choices(truth: Truth, work: Path) -> dict[str, Any]:
    """Bytes per position of columns at k = 16, and bytes and times of whole caches."""
    ids = np.concatenate([s.ids for s in truth.scored])[:, :K]
    logprobs = np.concatenate([s.logprobs for s in truth.scored])[:, :K]
    prior = TailPrior.estimate(_kept(truth, StoreConfig(), "default"), truth.vocab_size)
    # Rows of a record batch, as a build with these heads would cut them.
    batch = (1 << 20) // (5 + 20 + 3 * K)
    return {
        "k": K,
        "head_ids": _head_ids(ids, prior.rank_of, batch, truth.vocab_size),
        "head_logprobs": _head_logprobs(logprobs, batch),
        "scalars": _scalars(truth, logprobs, batch),
        "draws": _draws(truth, prior, batch),
        "prior": _priors(truth, prior),
        "levels": _levels(truth, work),
        "batches": _batches(truth, work),
    }


def compressed(columns: list[_Array], rows: int, level: int = 1) -> float:
    """Bytes per position of columns [P, ...], each cut into buffers of ``rows`` positions."""
    codec = pa.Codec("zstd", compression_level=level)
    total = 0
    for column in columns:
        for at in range(0, len(column), rows):
            total += len(
                codec.compress(np.ascontiguousarray(column[at : at + rows]).tobytes(), asbytes=True)
            )
    return total / len(columns[0])


def _planes(values: _Array) -> list[_Array]:
    return [(values >> shift & 255).astype(np.uint8) for shift in (0, 8)]


def _entropy(values: _Array) -> float:
    """Bytes per row of [P, K] values that a coder knowing only how often each occurs would need."""
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * values.shape[1] / 8)


def _head_ids(ids: _Array, rank_of: _Array, batch: int, vocab_size: int) -> dict[str, float]:
    ranks = rank_of[ids]
    counts = np.bincount(ids.reshape(-1), minlength=vocab_size)
    by_count = np.empty(vocab_size, np.int32)
    by_count[np.argsort(-counts, kind="stable")] = np.arange(vocab_size, dtype=np.int32)
    return {
        "int32": compressed([ids.astype(np.int32)], batch),
        "uint16": compressed([ids.astype(np.uint16)], batch),
        "byte planes": compressed(_planes(ids), batch),
        "byte planes of ranks in the prior (stored)": compressed(_planes(ranks), batch),
        "byte planes of ranks by count in heads": compressed(_planes(by_count[ids]), batch),
        "same as stored, head entry by head entry": compressed(
            [np.ascontiguousarray(plane[:, j]) for plane in _planes(ranks) for j in range(K)], batch
        ),
        "entropy of single ids": _entropy(ids),
    }


def _head_logprobs(logprobs: _Array, batch: int) -> dict[str, float]:
    result = {
        "float16": compressed([logprobs.astype(np.float16)], batch),
        "bytes of 8 bits on a grid of 1/8, no differences": compressed(
            [np.minimum(np.rint(-logprobs * 8), 255).astype(np.uint8)], batch
        ),
    }
    for step in (64, 16, 8, 4):
        grid = np.rint(-logprobs * step).astype(np.int64)
        steps = np.minimum(np.diff(grid, axis=1, prepend=0), 255).astype(np.uint8)
        result[f"differences, step 1/{step}"] = compressed([steps], batch)
        if step == 16:
            by_entry = [np.ascontiguousarray(steps[:, j]) for j in range(K)]
            result["differences, step 1/16, head entry by head entry"] = compressed(by_entry, batch)
            result["differences, step 1/16, entropy"] = sum(
                _entropy(steps[:, j : j + 1]) for j in range(K)
            )
    return result


def _scalars(truth: Truth, logprobs: _Array, batch: int) -> dict[str, dict[str, float]]:
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    columns = {
        "target_logprob": -np.concatenate([s.target_logprob for s in truth.scored]),
        "tail_logprob": -np.log(np.maximum(1 - mass, TAIL_MASS_FLOOR)),
        "entropy": np.concatenate(
            [s.draws.entropy for s in truth.scored if s.draws.entropy is not None]
        ),
    }
    result: dict[str, dict[str, float]] = {}
    for name, values in columns.items():
        steps = np.rint(np.maximum(values, 0) * 256).astype(np.uint16)
        result[name] = {
            "float32": compressed([values.astype(np.float32)], batch),
            "float32, multiples of 1/256": compressed([(steps / 256).astype(np.float32)], batch),
            "uint16, multiples of 1/256": compressed([steps], batch),
            "byte planes, multiples of 1/256": compressed(_planes(steps), batch),
            "uint16, multiples of 1/64": compressed(
                [np.rint(np.maximum(values, 0) * 64).astype(np.uint16)], batch
            ),
        }
    return result


def _draws(truth: Truth, prior: TailPrior, batch: int) -> dict[str, float]:
    ids = np.concatenate([d.samples[:, 0] for d in truth.draws["head 16 + 16 draws"]])
    ranks = prior.rank_of[ids]
    in_order = np.sort(ranks, axis=1)
    gaps = np.diff(in_order, axis=1, prepend=0)
    return {
        "draws": ids.shape[1],
        "byte planes": compressed(_planes(ids), batch),
        "byte planes of ranks": compressed(_planes(ranks), batch),
        "byte planes of sorted ranks": compressed(_planes(in_order), batch),
        "byte planes of gaps (stored)": compressed(_planes(gaps), batch),
        "entropy of gaps": _entropy(gaps),
        "byte planes of gaps of sorted ids, no prior": compressed(
            _planes(np.diff(np.sort(ids, axis=1), axis=1, prepend=0)), batch
        ),
    }


def _priors(truth: Truth, prior: TailPrior) -> dict[str, dict[str, float | None]]:
    """The stored grid, coarser ones, none at all, and what KL they leave at k = 16."""
    logprobs = np.concatenate([s.logprobs for s in truth.scored])[:, :K]
    ids = np.concatenate([s.ids for s in truth.scored])[:, :K]
    tail = np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1), TAIL_MASS_FLOOR)
    spread: dict[str, TailPrior | None] = {"evenly, no prior": None}
    for factor in (1, 2, 4, 8):
        coarse = np.minimum(np.rint(prior.steps / factor) * factor, 255).astype(np.uint8)
        spread[f"step {factor * PRIOR_STEP:g}"] = TailPrior(coarse)
    found = distances(
        truth, {name: Reconstruction(ids, logprobs, tail, one) for name, one in spread.items()}
    )
    return {
        name: {"file_bytes": 0 if one is None else len(one.to_bytes()), **found[name]}
        for name, one in spread.items()
    }


def _kept(truth: Truth, store: StoreConfig, draws: str | None = None) -> list[CachedSequence]:
    return truth.kept(store.settings(truth.vocab_size), store.capture(), draws)


def _levels(truth: Truth, work: Path) -> dict[str, dict[str, float]]:
    """Whole caches of default settings."""
    sequences = _kept(truth, StoreConfig(), "default")

    def written(level: int) -> Callable[[Path], None]:
        store = StoreConfig(compression_level=level)
        return lambda path: write_cache(path, sequences, store, truth.teacher, truth.tokenizer)

    return _compared(truth, work, {f"zstd level {level}": written(level) for level in (1, 3, 9)})


def _batches(truth: Truth, work: Path) -> dict[str, dict[str, float]]:
    """Whole caches at k = 64, where a record batch holds the fewest sequences."""
    store = StoreConfig(
        top_k=64, min_k=64, min_probability=None, tail_samples=0, mass_per_sample=None
    )
    sequences = _kept(truth, store)
    size = uncompressed_bytes(truth.tokens, len(truth.squares), 64 * len(truth.squares)) / len(
        sequences
    )

    def written(kib: int) -> Callable[[Path], None]:
        rows = max(1, round(kib * 1024 / size))
        return lambda path: write_cache(
            path, sequences, store, truth.teacher, truth.tokenizer, per_batch=lambda _: rows
        )

    return _compared(truth, work, {f"{kib} KiB": written(kib) for kib in (64, 256, 1024, 4096)})


def _compared(
    truth: Truth, work: Path, writers: dict[str, Callable[[Path], None]]
) -> dict[str, dict[str, float]]:
    """Bytes per token, and the fastest of some rounds that all take turns in."""
    result: dict[str, dict[str, float]] = {name: {} for name in writers}
    best = {name: {"write": np.inf, "read": np.inf, "batch": np.inf} for name in writers}
    for _ in range(_ROUNDS):
        for name, write in writers.items():
            path = work / "choices"
            shutil.rmtree(path, ignore_errors=True)
            own = best[name]
            own["write"] = min(own["write"], seconds(lambda w=write, p=path: w(p)))
            reader = CacheReader(path, check=False)
            own["batch"] = min(own["batch"], seconds(lambda r=reader: r[0], time.perf_counter))
            fresh = CacheReader(path, check=False)
            own["read"] = min(own["read"], seconds(lambda r=fresh: consume(r)))
            result[name]["bytes_per_token"] = cache_bytes(path) / truth.tokens
    for name, own in best.items():
        result[name] |= {
            "write_tokens_per_second": round(truth.tokens / own["write"]),
            "read_tokens_per_second": round(truth.tokens / own["read"]),
            "first_of_batch_ms": 1e3 * own["batch"],
        }
    return result
