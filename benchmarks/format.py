"""Bytes per token and codec speed of the cache format beside what a user would write by hand: Arrow, int32 + fp16, zstd.

    python benchmarks/format.py [CACHE] [--out FILE.json]

Both hold the same sequences of the same cache: ids, mask, head, tail, target. Times are of one core, the best of a few rounds
taken in turn, and meant as ratios: machines differ, and this one may be shared.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_format import CachedSequence, CacheReader
from cache_format.codec import PackedBatch, encode_batch
from cache_format.manifest import StoreSettings

ROUNDS = 5


def main() -> None:
    """Prints the table and, with --out, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", nargs="?", default="caches/quickstart")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    cache = CacheReader(arguments.cache)
    sequences = list(cache)
    tokens = sum(len(s) for s in sequences)
    store = cache.manifest.store
    formats = {
        "logitcask": (lambda: write_logitcask(sequences, store), lambda data: read_logitcask(data, store)),
        "Arrow int32 + fp16, zstd": (lambda: write_plain(sequences), read_plain),
    }
    sizes: dict[str, int] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in formats}
    for _ in range(ROUNDS):
        for name, (write, read) in formats.items():
            started = time.perf_counter()
            data = write()
            middle = time.perf_counter()
            read(data)
            seconds[name]["encode"].append(middle - started)
            seconds[name]["decode"].append(time.perf_counter() - middle)
            sizes[name] = len(data)
    plain = "Arrow int32 + fp16, zstd"
    result: dict[str, Any] = {
        "cache": {"tokens": tokens, "sequences": len(sequences), "top_k": store.top_k, "step": store.logprob_step},
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {"pyarrow": pa.__version__, "numpy": np.__version__},
        "formats": {
            name: {
                "bytes_per_token": sizes[name] / tokens,
                "encode_tokens_per_second": tokens / min(seconds[name]["encode"]),
                "decode_tokens_per_second": tokens / min(seconds[name]["decode"]),
                "encode_speed_ratio": min(seconds[plain]["encode"]) / min(seconds[name]["encode"]),
                "decode_speed_ratio": min(seconds[plain]["decode"]) / min(seconds[name]["decode"]),
            }
            for name in formats
        },
    }
    print(f"{tokens:,} tokens, top {store.top_k}, one core, best of {ROUNDS} rounds taken in turn")
    print(f"{'format':28} {'B/token':>8} {'encode tok/s':>14} {'ratio':>6} {'decode tok/s':>14} {'ratio':>6}")
    for name, row in result["formats"].items():
        print(
            f"{name:28} {row['bytes_per_token']:8.1f} {row['encode_tokens_per_second']:14,.0f} "
            f"{row['encode_speed_ratio']:6.2f} {row['decode_tokens_per_second']:14,.0f} {row['decode_speed_ratio']:6.2f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def write_logitcask(sequences: list[CachedSequence], store: StoreSettings) -> bytes:
    """The sequences as one shard, in memory."""
    sink = io.BytesIO()
    batches = [
        encode_batch(sequences[i : i + 8], store.vocab_size, store.logprob_step) for i in range(0, len(sequences), 8)
    ]
    return _ipc(sink, batches)


def read_logitcask(data: bytes, store: StoreSettings) -> list[CachedSequence]:
    """Every sequence decoded to the arrays that a batch is made of."""
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        packed = [
            PackedBatch(file.get_batch(i), store.vocab_size, store.logprob_step, "benchmark")
            for i in range(file.num_record_batches)
        ]
    return [batch.decode(row) for batch in packed for row in range(len(batch))]


def write_plain(sequences: list[CachedSequence]) -> bytes:
    """One row a sequence; heads flattened, ids int32, logprobs float16."""
    batches = []
    for start in range(0, len(sequences), 8):
        part = sequences[start : start + 8]
        columns = {
            "input_ids": [s.input_ids for s in part],
            "loss_mask": [s.loss_mask for s in part],
            "ids": [s.ids.reshape(-1) for s in part],
            "logprobs": [s.logprobs.reshape(-1).astype(np.float16) for s in part],
            "tail_logprob": [s.tail_logprob for s in part],
            "target_logprob": [s.target_logprob for s in part],
            "target_rank": [s.target_rank for s in part],
        }
        batches.append(pa.record_batch({name: pa.array(list(values)) for name, values in columns.items()}))
    return _ipc(io.BytesIO(), batches)


def read_plain(data: bytes) -> list[dict[str, np.ndarray]]:
    """Every row as int32 and float32 arrays of the shapes that a batch is made of."""
    rows = []
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            for row in range(batch.num_rows):
                values = {
                    name: batch.column(name)[row].values.to_numpy(zero_copy_only=False) for name in batch.schema.names
                }
                positions = len(values["target_rank"])
                values["ids"] = values["ids"].reshape(positions, -1)
                values["logprobs"] = values["logprobs"].reshape(positions, -1).astype(np.float32)
                rows.append(values)
    return rows


def _ipc(sink: io.BytesIO, batches: list[pa.RecordBatch]) -> bytes:
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)
    return sink.getvalue()


if __name__ == "__main__":
    main()
