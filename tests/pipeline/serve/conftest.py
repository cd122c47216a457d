"""A teacher whose distributions are a table, as a vLLM server and as caches; servers under test."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, CacheWriter
from logitcask.cache_format.manifest import (
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.pipeline.serve import upstream
from logitcask.pipeline.serve.run import ServeOptions, serve
from logitcask.pipeline.teachers.server.checks import probe_ids

VOCAB = 384
PROBE = probe_ids(VOCAB, 199).tolist()


class Table:
    """Token i + 1 depends on token i alone: float32[V, V] logprobs."""

    def __init__(self, seed: int) -> None:
        logits = np.random.default_rng(seed).normal(0, 3, (VOCAB, VOCAB))
        self.logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(
            np.float32
        )

    def prompt_logprobs(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        """What vLLM answers, with its dictionaries: the target, then the k most probable ids."""
        rows: list[dict[str, Any] | None] = [None]
        for token, target in itertools.pairwise(prompt):
            logprobs = self.logprobs[token]
            ranks = {target: int((logprobs >= logprobs[target]).sum())}
            ranks |= {
                i: n for n, i in enumerate(np.argsort(-logprobs, kind="stable")[:k].tolist(), 1)
            }
            rows.append(
                {
                    str(i): {"logprob": float(logprobs[i]), "rank": rank, "decoded_token": None}
                    for i, rank in ranks.items()
                }
            )
        return rows

    def cached(self, name: str, ids: list[int], mask: list[bool], k: int) -> CachedSequence:
        """A sequence of a cache with heads of k entries."""
        input_ids, loss_mask = np.array(ids, np.int32), np.array(mask)
        positions = np.flatnonzero(loss_mask[1:]).astype(np.int32)
        dense, targets = self.logprobs[input_ids[positions]], input_ids[positions + 1]
        head = np.argsort(-dense, axis=1, kind="stable")[:, :k].astype(np.int32)
        logprobs = np.take_along_axis(dense, head, axis=1)
        target = dense[np.arange(len(positions)), targets]
        return CachedSequence(
            sequence_id=name,
            input_ids=input_ids,
            loss_mask=loss_mask,
            positions=positions,
            ids=head,
            logprobs=logprobs,
            tail_logprob=np.log1p(-np.exp(logprobs.astype(np.float64)).sum(axis=1)).astype(
                np.float32
            ),
            target_logprob=target,
            target_rank=(dense > target[:, None]).sum(axis=1).astype(np.int32),
        )


class FakeVllm:
    """A vLLM server with a table for a model."""

    def __init__(self, table: Table) -> None:
        self.table, self.version, self.max_logprobs = table, "0.32.0", 64
        self.models = [("tiny", "/models/tiny", 200)]
        self.key: str | None = None
        self.before: Callable[[list[int]], Any] = lambda prompt: None
        self.after: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.prompts: list[list[int]] = []
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, content: Any) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                cards = [{"id": i, "root": r, "max_model_len": n} for i, r, n in fake.models]
                if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                    self.answer(401, {"error": "Unauthorized"})
                elif self.path == "/v1/models":
                    self.answer(200, {"data": cards})
                elif self.path == "/version":
                    self.answer(200, {"version": fake.version})
                else:
                    self.answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt, k = request["prompt"], request["prompt_logprobs"]
                with fake._lock:
                    fake.prompts.append(prompt)
                failure = fake.before(prompt)
                if failure == "drop":
                    self.close_connection = True
                elif failure is not None:
                    self.answer(failure, {"error": {"message": "out of order"}})
                elif k > fake.max_logprobs:
                    message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {fake.max_logprobs}"
                    self.answer(400, {"error": {"message": message}})
                else:
                    rows = fake.table.prompt_logprobs(prompt, k)
                    choice = {"index": 0, "finish_reason": "length", "prompt_logprobs": rows}
                    self.answer(200, fake.after({"choices": [choice]}))

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def asked(self) -> list[list[int]]:
        """The prompts since the last call, without the probes of new connections."""
        with self._lock:
            prompts, self.prompts = self.prompts, []
        return [each for each in prompts if each != PROBE]

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_FIRST_DELAY", 0.01)


@pytest.fixture
def table(rng: np.random.Generator) -> Table:
    return Table(int(rng.integers(1 << 31)))


@pytest.fixture
def fake(table: Table) -> Iterator[FakeVllm]:
    running = FakeVllm(table)
    yield running
    running.stop()


@pytest.fixture
def another_table(rng: np.random.Generator) -> Table:
    return Table(int(rng.integers(1 << 31)) + 1)


@pytest.fixture
def texts(rng: np.random.Generator) -> list[list[int]]:
    """Random ids, some texts with a common beginning."""
    common = rng.integers(0, VOCAB, 12).tolist()
    lengths = [2, 100, *rng.integers(3, 100, 10).tolist()]
    return [
        (common if n > 12 and i % 2 else []) + rng.integers(0, VOCAB, n).tolist()
        for i, n in enumerate(lengths)
    ]


def header(k: int, *, model: str = "tiny", step: float = 1 / 64, **teacher: Any) -> Header:
    return Header(
        created_by="tests",
        teacher=TeacherIdentity(
            **{
                "model": model,
                "backend": "vllm",
                "engine": "vllm 0.32.0",
                "dtype": "float32",
                "route": "raw",
                "vocab_size": VOCAB,
                **teacher,
            }
        ),
        tokenizer=TokenizerIdentity(
            name="tiny", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=VOCAB
        ),
        data=DataIdentity(
            source="x",
            split="train",
            kind="documents",
            mask_policy="all",
            max_length=112,
            overlong="split",
            sha256="0",
        ),
        store=StoreSettings(vocab_size=VOCAB, top_k=k, capture_k=k, logprob_step=step),
    )


@pytest.fixture
def make_cache(table: Table) -> Callable[..., str]:
    """``make_cache(path, texts, k=8, masks=None, table=None, **fields of the header)``"""

    def make(
        path: Path,
        texts: list[list[int]],
        k: int = 8,
        masks: list[list[bool]] | None = None,
        table: Table = table,
        **fields: Any,
    ) -> str:
        masks = masks or [[False] + [True] * (len(each) - 1) for each in texts]
        with CacheWriter(path) as writer:
            started = writer.begin(header(k, **fields))
            for shard, start in enumerate(range(0, len(texts), 5)):
                with writer.shard(shard) as open_shard:
                    for n in range(start, min(start + 5, len(texts))):
                        open_shard.append(table.cached(f"s{n}", texts[n], masks[n], k))
            writer.finish(started, len(range(0, len(texts), 5)))
        return str(path)

    return make


class Client:
    """HTTP to a server under test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"max_tokens": 1, **fields})

    def rows(self, prompt: list[int], k: int, **fields: Any) -> list[dict[str, Any] | None]:
        answer = self.post(prompt=prompt, prompt_logprobs=k, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["prompt_logprobs"]

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        (line,) = [each for each in lines if each.startswith(f"{name} ")]
        return float(line.split()[-1])

    def sources(self) -> dict[str, float]:
        """Prompts answered so far, by source."""
        sources = ("cache", "kept", "upstream")
        return {
            each: self.metric(f'logitcask_prompts_total{{source="{each}"}}') for each in sources
        }


@pytest.fixture
def running() -> Iterator[Callable[..., Any]]:
    """``running(caches, **options)`` serves in a thread, and returns a ``Client`` with ``stop()``."""
    opened: list[Any] = []

    def start(caches: list[str] = (), **options: Any) -> Client:  # type: ignore[assignment]
        ready, failure = threading.Event(), []
        found: list[Any] = []

        def run() -> None:
            try:
                serve(
                    ServeOptions(caches=list(caches), port=0, **options),
                    on_ready=lambda *both: (found.extend(both), ready.set()),
                )
            except BaseException as error:
                failure.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
        if failure:
            thread.join()
            raise failure[0]
        server, url = found
        client = Client(url)

        def stop() -> None:
            client.http.close()
            server.should_exit = True
            thread.join()
            assert not failure, failure

        client.stop = stop  # type: ignore[attr-defined]
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.stop()


@pytest.fixture
def assert_rows() -> Callable[..., None]:
    """``assert_rows(found, expected, step)``: equal ids and ranks in equal order, logprobs but for
    rounding to ``step`` (0: equal).
    """

    def check(found: list[Any], expected: list[Any], step: float) -> None:
        assert len(found) == len(expected)
        assert found[0] is None
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert list(one) == list(other)
            for i, entry in one.items():
                assert entry["rank"] == other[i]["rank"]
                assert entry["decoded_token"] is None
                assert abs(entry["logprob"] - other[i]["logprob"]) <= step / 2 + 1e-6

    return check


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """uvicorn changes no level of the tests' loggers."""
    level = logging.getLogger("uvicorn").level
    yield
    logging.getLogger("uvicorn").setLevel(level)
