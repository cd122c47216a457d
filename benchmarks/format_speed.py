"""Times and memory of the format benchmark.

Speeds are by the CPU time of one process, all its threads together, pinned to one core: the wall
clock of an idle machine, also on a shared one. Each is the best of several rounds in which all
formats take turns; ratios hold within one run. Waits for the disk are not in them; data is in the
page cache. Random access is by the wall clock.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from format_caches import cache_bytes, header_of, write_cache, write_shards
from format_truth import Truth
from peers_formats import Peer

from logitcask.cache_format import CachedSequence, CacheReader, TailSamples
from logitcask.cache_format.manifest import TeacherIdentity, TokenizerIdentity
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.shards.validation import validate
from logitcask.pipeline.builder.plan import PlannedShard
from logitcask.pipeline.config import StoreConfig

ROUNDS = 15
# The formats that write numbers in decimal are slow enough to be timed less often.
SLOW_ROUNDS = 2
# So many that no reader has kept a record batch when it comes round to it again.
COPIES = 6
BASELINE = "Arrow int32 + fp16, k = 64"


Kept = tuple[StoreConfig, list[CachedSequence]]
"""Settings, and what a cache with them holds."""


def speed(
    kept: dict[str, Kept], given: list[tuple[Peer, list[CachedSequence]]], truth: Truth, work: Path
) -> dict[str, Any]:
    """Tokens per second and core, encoding and decoding, and the ratios to plain Arrow."""
    tasks: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {}
    for name, (store, sequences) in kept.items():
        path = work / "speed" / name.split(", ")[1].replace(" = ", "")
        shutil.rmtree(path, ignore_errors=True)
        copies = _copies(sequences)
        write_cache(path, copies, store, truth.teacher, truth.tokenizer)
        tasks |= _own_tasks(name, path, copies, store, truth)
    for peer, sequences in given:
        name = f"{peer.name}, k = {peer.k}" if peer.whole else peer.name
        copies = _copies(sequences)
        rounds = SLOW_ROUNDS if peer.layout == "JSON lines" else ROUNDS
        tasks[name] = (*_peer_tasks(peer, copies, peer.encode(copies)), rounds)
    best = _best_of(tasks)
    base, tokens = best[BASELINE], COPIES * truth.tokens
    return {
        "tokens": tokens,
        "rounds": ROUNDS,
        "baseline": BASELINE,
        "formats": {
            name: {
                "encode_tokens_per_second": round(tokens / encode),
                "decode_tokens_per_second": round(tokens / decode),
                "encode_ratio": base[0] / encode,
                "decode_ratio": base[1] / decode,
            }
            for name, (encode, decode) in best.items()
        },
    }


def _copies(sequences: list[CachedSequence], count: int = COPIES) -> list[CachedSequence]:
    return [replace(s, sequence_id=f"{n}/{s.sequence_id}") for n in range(count) for s in sequences]


def _own_tasks(
    name: str, path: Path, sequences: list[CachedSequence], store: StoreConfig, truth: Truth
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """To memory and from the page cache, as the other formats; and all of it, opening, hashes
    and files included.
    """
    reader = CacheReader(path, check=False)
    manifest, prior = reader.manifest, reader.prior
    assert prior is not None
    codec = Codec(manifest.store, prior)
    rows = manifest.shards[0].sequences_per_batch
    scratch = path.with_name(f"{path.name}-again")
    header = header_of(store, truth.teacher, truth.tokenizer, manifest.data.sha256)

    def encode() -> bytes:
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(
            compression=pa.Codec("zstd", compression_level=store.compression_level),
            use_threads=False,
        )
        with pa.ipc.new_file(sink, codec.schema, options=options) as file:
            for at in range(0, len(sequences), rows):
                for sequence in sequences[at : at + rows]:
                    validate(sequence, manifest.store)
                file.write_batch(codec.encode(sequences[at : at + rows]))
        return sink.getvalue()

    def write() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        write_shards(scratch, header, prior, [sequences], store, lambda _: rows)

    def decode() -> Iterator[CachedSequence]:
        for packed in reader.iter_batches(0):
            for row in range(len(packed)):
                yield packed.decode(row)

    return {
        name: (encode, lambda: consume(decode()), ROUNDS),
        f"{name}, on disk with hashes": (write, lambda: consume(CacheReader(path)), ROUNDS),
    }


def _peer_tasks(
    peer: Peer, sequences: list[CachedSequence], data: bytes
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: peer.encode(sequences), lambda: consume(peer.decode(data))


def consume(decoded: Iterable[Any]) -> None:
    """Goes through it as a loader does, keeping nothing."""
    deque(decoded, maxlen=0)


def _best_of(
    tasks: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]],
) -> dict[str, tuple[float, float]]:
    """Seconds of the fastest encode and decode of each."""
    best = dict.fromkeys(tasks, (np.inf, np.inf))
    for number in range(ROUNDS):
        for name, (encode, decode, rounds) in tasks.items():
            if number < rounds:
                best[name] = (
                    min(best[name][0], seconds(encode)),
                    min(best[name][1], seconds(decode)),
                )
    return best


def seconds(action: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """How long it takes, once."""
    started = clock()
    action()
    return clock() - started


def on_one_core(task: Callable[..., Any], *arguments: Any) -> Any:
    """What ``task`` returns in a process of its own that has one core and one thread of
    everything.
    """
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_settle) as pool:
        return pool.submit(task, *arguments).result()


def _settle() -> None:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def kept_per_batch(truth: Truth, entries: float) -> int:
    planned = PlannedShard(
        sequences=len(truth.sequences), tokens=truth.tokens, positions=len(truth.squares)
    )
    return planned.sequences_per_batch(entries)


def random_access(
    store: StoreConfig, sequences: list[CachedSequence], truth: Truth, work: Path
) -> dict[str, Any]:
    """One sequence of 512 tokens at k = 64 out of a cache of some 300,000 tokens, page cache
    warm, never the same batch twice running.
    """
    whole = [s for s in sequences if len(s) == 512]
    sequences = _copies(whole, -(-600 // len(whole)))
    path = work / "speed" / "access"
    shutil.rmtree(path, ignore_errors=True)
    write_cache(path, sequences, store, truth.teacher, truth.tokenizer)
    reader = CacheReader(path)
    rows = reader.manifest.shards[0].sequences_per_batch
    # Round by round over all record batches, one row of each: far more batches than the reader
    # keeps.
    order = [index for first in range(rows) for index in range(first, len(reader), rows)]
    for index in order:
        reader[index]
    rounds = [
        [seconds(lambda i=index: reader[i], time.perf_counter) for index in order] for _ in range(5)
    ]
    taken = sorted(map(min, zip(*rounds, strict=True)))
    return {
        "tokens_per_sequence": 512,
        "sequences": len(reader),
        "sequences_per_batch": rows,
        "median_ms": 1e3 * statistics.median(taken),
        "p99_ms": 1e3 * taken[int(0.99 * len(taken))],
        "worst_ms": 1e3 * taken[-1],
    }


def memory(work: Path) -> dict[str, Any]:
    """Peak resident memory of processes that write and read caches of 1 and 10 million tokens
    with default settings.
    """
    path = work / "memory"
    result: dict[str, Any] = {}
    for tokens in (1_000_000, 10_000_000):
        shutil.rmtree(path, ignore_errors=True)
        own: dict[str, Any] = {}
        for name, task in (("write", _write_synthetic), ("read", _read_all)):
            own[name] = on_one_core(task, path, tokens)
        result[f"{tokens}"] = own
        shutil.rmtree(path)
    for name in ("write", "read"):
        few, many = (result[f"{tokens}"][name]["peak_mib"] for tokens in (1_000_000, 10_000_000))
        result[f"{name}_growth"] = many / few - 1
    return result


def _write_synthetic(path: Path, tokens: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    store = StoreConfig()
    vocab_size, length = 49_152, 512
    pool = [_synthetic(random, vocab_size, length) for _ in range(64)]
    teacher = TeacherIdentity(
        model="synthetic",
        backend="synthetic",
        engine="none",
        dtype="float32",
        route="dense",
        vocab_size=vocab_size,
    )
    tokenizer = TokenizerIdentity(
        name="synthetic", sha256="", vocab_sha256="", vocab_size=vocab_size
    )
    total, per_shard = tokens // length, store.shard_tokens // length

    def shard(first: int) -> Iterator[CachedSequence]:
        for number in range(first, min(first + per_shard, total)):
            yield replace(pool[number % len(pool)], sequence_id=str(number))

    started = time.perf_counter()
    header = header_of(store, teacher, tokenizer, "0" * 64)
    prior = TailPrior.estimate(pool, vocab_size)
    write_shards(path, header, prior, (shard(first) for first in range(0, total, per_shard)), store)
    return _resident() | {
        "seconds": time.perf_counter() - started,
        "file_mib": cache_bytes(path) / 2**20,
    }


def _synthetic(random: np.random.Generator, vocab_size: int, length: int) -> CachedSequence:
    """Heads of 8 to 32 falling probabilities and 1 to 32 draws: the shapes of the default
    settings, no teacher.
    """
    positions, width = length - 1, 32
    size = random.integers(8, width + 1, positions)
    inside = np.arange(width) < size[:, None]
    weights = 1 / np.arange(1, width + 1) ** random.uniform(1, 2, (positions, 1))
    mass = random.uniform(0.5, 0.95, (positions, 1))
    logprobs = np.log(weights / (weights * inside).sum(axis=1, keepdims=True) * mass)
    # Distinct ids in a row: a start, and a stride that has no factor in common with the
    # vocabulary's 3 * 2^14.
    start, stride = random.integers(0, vocab_size, (2, positions, 1))
    ids = (start + (6 * stride + 1) * np.arange(2 * width)) % vocab_size
    draws = np.where(
        np.arange(width) < random.integers(1, width + 1, (positions, 1)),
        ids[:, width : 2 * width],
        -1,
    )
    return CachedSequence(
        sequence_id="",
        input_ids=random.integers(0, vocab_size, length).astype(np.int32),
        loss_mask=np.arange(length) > 0,
        positions=np.arange(positions, dtype=np.int32),
        ids=np.where(inside, ids[:, :width], -1).astype(np.int32),
        logprobs=np.where(inside, logprobs, -np.inf).astype(np.float32),
        tail_logprob=np.log1p(-mass[:, 0]).astype(np.float32),
        target_logprob=random.uniform(-8, 0, positions).astype(np.float32),
        target_rank=random.integers(0, 1000, positions).astype(np.int32),
        entropy=random.uniform(0, 8, positions).astype(np.float32),
        samples=TailSamples(draws[:, None].astype(np.int32)),
    )


def _read_all(path: Path, tokens: int) -> dict[str, float]:
    del tokens
    started = time.perf_counter()
    read = sum(len(sequence) for sequence in CacheReader(path))
    return _resident() | {"seconds": time.perf_counter() - started, "tokens": read}


def _resident() -> dict[str, float]:
    """MiB: the peak of this process's own pages and of mapped files together, and what of it are
    files now.

    From the kernel's account of this address space; getrusage's peak would be that of the parent
    before exec.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mib = {name: int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "RssFile", "RssAnon")}
    return {"peak_mib": mib["VmHWM"], "files_mib": mib["RssFile"], "own_mib": mib["RssAnon"]}
