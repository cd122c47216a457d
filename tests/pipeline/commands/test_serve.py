"""``teacher-cache serve`` as a command: its document, its end, and its error lines."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from logitcask.cache_format import CacheReader
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import main
from logitcask.pipeline.config import BuildConfig


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 384},
        data={"path": "python-docs", "max_length": 64, "max_tokens": 1000},
        store={"top_k": 8, "min_probability": None},
        audit={"sequences": 0},
        output=tmp_path / "cache",
    )
    build(config)
    return config.output


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_from_start_to_end(
    cache: Path, fork: Callable[..., Any], tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """The document has the address as soon as requests are taken; a signal ends it."""
    reading, writing = os.pipe()

    def serve() -> None:
        os.dup2(writing, 1)
        with (tmp_path / "stderr").open("w") as stderr:
            os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            logging.root.handlers.clear()  # those of pytest
            # A shell that starts the tests in the background ignores it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["teacher-cache", "serve", str(cache), "--port", "0", "--json"]
            main()

    child = fork(serve)
    os.close(writing)
    with os.fdopen(reading) as stdout:
        document = ""
        while not document.rstrip().endswith("}"):
            line = stdout.readline()
            assert line, (tmp_path / "stderr").read_text()
            document += line
        url = json.loads(document)["url"]
        sequence = CacheReader(cache)[1]
        prompt = sequence.input_ids.tolist()
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"model": "synthetic", "prompt": prompt, "prompt_logprobs": 8, "max_tokens": 1},
        )
        rows = answer.json()["choices"][0]["prompt_logprobs"]
        assert [int(next(iter(row))) for row in rows[1:]] == prompt[1:]
        os.kill(child.pid, sent)
        child.join(60)
    assert child.exitcode == code
    said = (tmp_path / "stderr").read_text()
    assert f"serving synthetic at {url}" in said
    assert "1 prompts of" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve: name one or more caches"),
        (["nowhere"], "nowhere"),
        (["CACHE", "--keep", "k"], "--keep keeps what an upstream server says, and there is none"),
        (["CACHE", "--upstream", "gpu-box"], "expected http://HOST:PORT"),
        (["CACHE", "--api-key-env", "NOT_SET"], "no such environment variable is set"),
        (["CACHE", "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
    ],
)
def test_errors_are_one_line(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    arguments = [str(cache) if each == "CACHE" else each for each in arguments]
    monkeypatch.setattr(sys, "argv", ["teacher-cache", "serve", *arguments, "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
