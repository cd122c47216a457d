"""A vLLM server over HTTP against vLLM in this process: the same text, one toy model, interleaved
rounds.

    python benchmarks/server.py --rounds 3 --out benchmarks/results/server.json

The toy model (one layer, 32,000 ids) is where the cost of HTTP and JSON is largest: a real one
hides it behind its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.types import Sequence

MAX_LENGTH, VOCAB = 256, 32_000


def toy_model(folder: Path) -> None:
    """One layer, whose head costs most of its time, as on a small machine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def start_server(
    model: Path, top_k: int, log: Any, max_length: int = MAX_LENGTH
) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        "--host=127.0.0.1",
    ]
    command += [
        f"--port={port}",
        "--dtype=float32",
        f"--max-model-len={max_length + 1}",
        f"--max-logprobs={top_k}",
    ]
    command += [
        "--enforce-eager",
        "--skip-tokenizer-init",
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    command += ["--max-num-batched-tokens=1024"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return process, url
    raise SystemExit(f"the server did not start; see {log.name}")


def speed(teacher: Any, texts: list[Sequence]) -> float:
    """Tokens per second of one pass."""
    started = time.perf_counter()
    scored = sum(1 for _ in teacher.score(texts))
    assert scored == len(texts)
    return sum(len(text.input_ids) for text in texts) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    mask = np.ones(MAX_LENGTH, np.bool_)
    mask[0] = False
    texts = [
        Sequence(str(i), rng.integers(0, VOCAB, MAX_LENGTH).astype(np.int32), mask)
        for i in range(options.tokens // MAX_LENGTH)
    ]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        model = Path(folder) / "toy"
        toy_model(model)
        process, url = start_server(model, options.top_k, log)
        capture = Capture(options.top_k)
        try:
            configs = {
                "in this process": {"backend": "vllm"},
                "server, 32 requests at a time": {"backend": "server", "server": {"url": url}},
                "server, 1 request at a time": {
                    "backend": "server",
                    "server": {"url": url, "concurrency": 1},
                },
            }
            teachers = {
                name: open_teacher(
                    TeacherConfig.model_validate(
                        {"model": str(model), "dtype": "float32", **fields}
                    ),
                    max_length=MAX_LENGTH,
                    capture=capture,
                )
                for name, fields in configs.items()
            }
            speeds: dict[str, list[float]] = {name: [] for name in teachers}
            for teacher in teachers.values():
                speed(teacher, texts[:8])
            for _ in range(options.rounds):
                for name, teacher in teachers.items():
                    speeds[name].append(speed(teacher, texts))
            for teacher in teachers.values():
                teacher.close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    base = float(np.median(speeds["in this process"]))
    result = {
        "machine": machine(),
        "top_k": options.top_k,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "tokens_per_second": {
            name: round(float(np.median(values)), 1) for name, values in speeds.items()
        },
        "relative": {
            name: round(float(np.median(values)) / base, 3) for name, values in speeds.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
