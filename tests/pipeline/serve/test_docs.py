"""Every code block of docs/serve.md: the commands serve, and the line of the log is the log's."""

from __future__ import annotations

import logging
import re
import shlex
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.pipeline.cli import app as teacher_cache
from logitcask.pipeline.serve import run as serving
from logitcask.pipeline.serve.metrics import Metrics

from .conftest import Client

ROOT = Path(__file__).parents[3]
COMMANDS, LINE = re.findall(
    r"^```\w*\n(.*?)^```", (ROOT / "docs" / "serve.md").read_text(), re.DOTALL | re.MULTILINE
)
INSTALL, CACHE, UPSTREAM, TEACHER = (
    shlex.split(line, comments=True) for line in COMMANDS.splitlines()
)


class Model:
    """A model of transformers in place of a ``Table``."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def prompt_logprobs(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        dense = self._model(torch.tensor([prompt])).logits[0].log_softmax(1).numpy()
        rows: list[dict[str, Any] | None] = [None]
        for logprobs, target in zip(dense, prompt[1:], strict=False):
            most = np.argsort(-logprobs, kind="stable")[:k].tolist()
            ranks = {target: int((logprobs >= logprobs[target]).sum())}
            ranks |= {i: rank for rank, i in enumerate(most, 1)}
            rows.append(
                {
                    str(i): {"logprob": float(logprobs[i]), "rank": rank, "decoded_token": None}
                    for i, rank in ranks.items()
                }
            )
        return rows


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    """``started(words)`` runs a command as it is printed, at any free port."""
    opened: list[tuple[Client, Any, threading.Thread]] = []
    whole = serving.serve

    def start(words: list[str]) -> Client:
        found: list[Any] = []
        ready = threading.Event()

        def serve(options: Any, *, on_ready: Any) -> None:
            def tell(server: Any, url: str) -> None:
                found.extend((server, url))
                ready.set()

            whole(options, on_ready=tell)

        def run() -> None:
            try:
                teacher_cache([*words[1:], "--port", "0"], standalone_mode=False)
            finally:
                ready.set()

        monkeypatch.setattr(serving, "serve", serve)
        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
        assert found, "the command has ended"
        server, url = found
        client = Client(url)
        opened.append((client, server, thread))
        return client

    yield start
    for client, server, thread in opened:
        client.http.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def mine(user_folder: Path, texts: list[list[int]], make_cache: Callable[..., str]) -> Path:
    """A folder with the cache ``caches/mine``."""
    (user_folder / "caches").mkdir()
    make_cache(Path("caches/mine"), texts[:6])
    return user_folder


def at(words: list[str], **places: str) -> list[str]:
    """The words of a command, with what is elsewhere here."""
    changed = [places.get(word, word) for word in words]
    assert changed != words
    return changed


def test_the_package_has_the_extra() -> None:
    (name,) = re.findall(r"logitcask\[(\w+)\]", " ".join(INSTALL))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert INSTALL[:2] == ["pip", "install"]
    assert name in extras


def test_a_cache_is_served(
    mine: Path,
    texts: list[list[int]],
    table: Any,
    started: Callable[..., Client],
    assert_rows: Callable[..., None],
) -> None:
    client = started(CACHE)
    for text in texts[:6]:
        assert_rows(client.rows(text, 5), table.prompt_logprobs(text, 5), 1 / 64)
    assert client.post(prompt=texts[7], prompt_logprobs=5).status_code == 400


def test_an_upstream_server_is_asked_once(
    mine: Path,
    texts: list[list[int]],
    table: Any,
    fake: Any,
    started: Callable[..., Client],
    assert_rows: Callable[..., None],
) -> None:
    client = started(at(UPSTREAM, **{"http://gpu-box:8000": fake.url}))
    fake.asked()
    for text in (texts[0], texts[7], texts[7]):
        assert_rows(client.rows(text, 5), table.prompt_logprobs(text, 5), 1 / 64)
    assert fake.asked() == [texts[7]]
    assert client.sources() == {"cache": 1, "kept": 1, "upstream": 1}
    assert UPSTREAM[-1] == "caches/grown"


def test_a_server_without_a_cache(
    user_folder: Path,
    texts: list[list[int]],
    fake: Any,
    tiny_llama: Path,
    started: Callable[..., Client],
    assert_rows: Callable[..., None],
) -> None:
    fake.table = Model(tiny_llama)
    fake.models = [("tiny", str(tiny_llama), 200)]
    places = {"http://gpu-box:8000": fake.url, "Qwen/Qwen3-8B": str(tiny_llama)}
    client = started(at(TEACHER, **places))
    assert_rows(client.rows(texts[1], 5), fake.table.prompt_logprobs(texts[1], 5), 1 / 256)


def test_the_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """The counts of the page's line, as the server says them."""
    seconds, prompts, tokens, cached, kept, asked, slowest, sequences = re.findall(
        r"\d[\d,.]*", LINE
    )
    keeper = SimpleNamespace(cache=SimpleNamespace(sequences=int(sequences.replace(",", ""))))
    metrics = Metrics(SimpleNamespace(upstream=None, keeper=keeper))
    counts = {
        name: int(count.replace(",", ""))
        for name, count in zip(("cache", "kept", "upstream"), (cached, kept, asked), strict=True)
    }
    left = int(tokens.replace(",", ""))
    assert sum(counts.values()) == int(prompts.replace(",", ""))
    for name, count in counts.items():
        for _ in range(count):
            metrics.answered(name, min(left, 512))
            left -= min(left, 512)
    assert left == 0
    metrics.took(float(slowest))
    metrics._since = time.monotonic() - float(seconds)
    with caplog.at_level(logging.INFO):
        metrics.log()
    assert [record.getMessage() for record in caplog.records] == [LINE.strip()]
