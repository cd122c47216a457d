"""``teacher-cache serve`` against vLLM's own server, on one model and one text: requests and tokens
per second, latency with many clients, memory over minutes.

    python benchmarks/serve.py --minutes 10 --out benchmarks/results/serve.json

The built-in teacher reads Python's documentation. First vLLM answers on its own, then through the
server, which keeps the answers, and then the server alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np
import psutil
from machine import machine
from server import start_server
from transformers import AutoTokenizer

from logitcask.cache_format import CacheReader
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.serve.index import PrefixIndex
from logitcask.pipeline.teachers.model import prepare_model

COMMAND = "from logitcask.pipeline.cli import main; main()"


def texts_of(model: str, count: int, length: int) -> list[list[int]]:
    """``count`` texts of ``length`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for name in sorted(topics):
        ids += tokenizer(topics[name])["input_ids"]
        if len(ids) >= count * length:
            break
    return [ids[n * length : (n + 1) * length] for n in range(count)]


@contextlib.contextmanager
def served(log: Any, *arguments: str) -> Any:
    """The command in a process of its own: (process, URL)."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", *arguments, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=log,
    )
    assert process.stdout is not None
    document = ""
    while not document.rstrip().endswith("}"):
        line = process.stdout.readline().decode()
        if not line:
            raise SystemExit(f"the server did not start; see {log.name}")
        document += line
    try:
        yield process, json.loads(document)["url"]
    finally:
        process.terminate()
        process.wait()


async def ask(
    url: str, name: str, order: list[list[int]], clients: int, top_k: int, seconds: float | None
) -> dict[str, float]:
    """Each text of ``order`` once, or random ones for some seconds."""
    latencies: list[float] = []
    tokens = sent = 0
    pending = list(order)
    draw = random.Random(0)
    begin = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal tokens, sent
        while True:
            if seconds is None:
                if not pending:
                    return
                text = pending.pop()
            elif time.perf_counter() - begin > seconds:
                return
            else:
                text = draw.choice(order)
            start = time.perf_counter()
            request = {"model": name, "prompt": text, "max_tokens": 1, "prompt_logprobs": top_k}
            answer = await http.post("/v1/completions", json=request)
            assert answer.status_code == 200, answer.text
            latencies.append(time.perf_counter() - start)
            tokens += len(text)
            sent += len(answer.content)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    took = time.perf_counter() - begin
    return {
        "requests": len(latencies),
        "requests_per_second": round(len(latencies) / took, 3),
        "tokens_per_second": round(tokens / took, 1),
        "megabytes_per_second": round(sent / took / 1e6, 2),
        "p50_seconds": round(float(np.quantile(latencies, 0.5)), 4),
        "p99_seconds": round(float(np.quantile(latencies, 0.99)), 4),
    }


async def with_costs(process: psutil.Process, asking: Any) -> dict[str, Any]:
    """The figures, with the server's CPU time per request and its resident memory, sampled every
    ten seconds.
    """
    samples: list[float] = []
    before = process.cpu_times()

    async def sample() -> None:
        while True:
            samples.append(round(process.memory_info().rss / 2**20, 1))
            await asyncio.sleep(10)

    sampling = asyncio.create_task(sample())
    figures: dict[str, Any] = await asking
    sampling.cancel()
    after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    figures["cpu_milliseconds_per_request"] = round(1000 * spent / figures["requests"], 1)
    figures["memory_mib"] = {
        "first minute": max(samples[:6]),
        "last minute": max(samples[-6:]),
    }
    return figures


def index_figures(count: int = 100_000, length: int = 256, common: int = 100) -> dict[str, float]:
    """An index of texts with a common beginning: CPU time to build it and to find a text in it,
    whole and by what follows the common part; memory that it adds.
    """
    process, rng = psutil.Process(), np.random.default_rng(0)
    before = process.memory_info().rss
    beginning = rng.integers(0, 49_152, common).astype(np.int32)
    texts = [
        np.concatenate([beginning, rng.integers(0, 49_152, length - common).astype(np.int32)])
        for _ in range(1000)
    ]

    def rows() -> Any:
        for n in range(count):
            text = texts[n % 1000]
            yield n, np.concatenate([beginning, np.roll(text[common:], n // 1000)]), length - 1

    index, start = PrefixIndex(), time.process_time()
    index.add_all(rows())
    built = time.process_time() - start
    found: dict[str, float] = {"tokens": count * length, "cpu_seconds": round(built, 1)}
    for name, tokens in (("whole", length), ("beginning", common + 10)):
        start = time.process_time()
        assert all(n in index.find(text[:tokens]) for n, text in enumerate(texts))
        found[f"microseconds_{name}"] = round((time.process_time() - start) * 1000, 1)
    found["memory_mib"] = round((process.memory_info().rss - before) / 2**20, 1)
    return found


def in_a_process(option: str) -> Any:
    """What this script prints with ``option``."""
    command = [sys.executable, __file__, option]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def cache_figures(options: argparse.Namespace) -> dict[str, Any]:
    """A server of a cache by the synthetic teacher, asked for some minutes."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": "synthetic", "backend": "synthetic"},
                "data": {
                    "path": "python-docs",
                    "max_length": options.length,
                    "max_tokens": 2 * options.sequences * options.length,
                },
                "store": {"top_k": options.top_k, "min_probability": None, "tail_samples": 0},
                "audit": {"sequences": 0},
                "output": f"{folder}/cache",
            }
        )
        build(config)
        cache = CacheReader(config.output)
        texts = [each.input_ids.tolist() for each in cache if len(each) == options.length]
        with served(log, str(config.output)) as (process, url):
            seconds = options.minutes * 60
            asking = ask(url, "synthetic", texts, options.clients, options.top_k, seconds)
            return asyncio.run(with_costs(psutil.Process(process.pid), asking))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only-cache", action="store_true", help="a synthetic teacher's cache, without vLLM"
    )
    parser.add_argument("--only-index", action="store_true", help="nothing but the index")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.only_index:
        print(json.dumps(index_figures(), indent=2))
        return
    if options.only_cache:
        print(json.dumps(cache_figures(options), indent=2))
        return
    model = prepare_model("smollm2-135m")
    texts = texts_of(model, options.sequences, options.length)
    found: dict[str, Any] = {
        "machine": machine(),
        "index": in_a_process("--only-index"),  # its memory is that of a process without a model
        "load_average": [round(each, 1) for each in os.getloadavg()],
        **{name: getattr(options, name) for name in ("sequences", "length", "top_k", "clients")},
    }
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        kept = str(Path(folder) / "kept")
        vllm, url = start_server(Path(model), options.top_k, log, options.length)

        def once(url: str, name: str) -> dict[str, float]:
            return asyncio.run(ask(url, name, texts, options.clients, options.top_k, None))

        try:
            asyncio.run(ask(url, model, texts[:2], 2, options.top_k, None))  # warm
            found["vllm"] = once(url, model)
            start = ["--teacher", "smollm2-135m", "--upstream-model", model, "--keep", kept]
            start += ["--top-k", str(options.top_k), "--upstream", url]
            with served(log, *start) as (_, front):
                found["first time, through the server"] = once(front, "smollm2-135m")
        finally:
            os.killpg(vllm.pid, signal.SIGKILL)
        found["kept_bytes_per_token"] = CacheReader(kept).manifest.statistics.bytes_per_token
        with served(log, kept) as (process, alone):
            asking = ask(
                alone, "smollm2-135m", texts, options.clients, options.top_k, options.minutes * 60
            )
            found["from the cache"] = asyncio.run(with_costs(psutil.Process(process.pid), asking))
    found["ratio"] = round(
        found["from the cache"]["tokens_per_second"] / found["vllm"]["tokens_per_second"], 1
    )
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
