"""The server backend against a real vLLM server, in processes of its own: what it says, and what
its end costs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.server import http
from logitcask.pipeline.types import Sequence

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

MAX_LENGTH, TOP_K = 160, 24
Make = Callable[[str, list[int]], Sequence]


_SERVER = """
import multiprocessing
import runpy
import vllm.v1.engine.utils
vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""


class VllmServer:
    """``python -m vllm.entrypoints.openai.api_server`` on a port of its own, started and killed
    at will.

    Its engine is forked, as on a GPU. vLLM's CPU build would import everything once more.
    """

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            self.port: int = any_port.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._log = model, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        options = {
            "model": self._model,
            "served-model-name": "tiny",  # names prove nothing
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": MAX_LENGTH + 1,
            "max-logprobs": TOP_K,
            "max-num-batched-tokens": 512,
        }
        command = [
            sys.executable,
            "-c",
            _SERVER,
            "--enforce-eager",
            "--no-enable-prefix-caching",
            "--skip-tokenizer-init",
            "--disable-uvicorn-access-log",
        ]
        command += [f"--{name}={value}" for name, value in options.items()]
        environment = {
            **os.environ,
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                cwd=self._log.parent,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.25)
            else:
                return
        raise AssertionError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        """``kill -9`` of the server and of the engine's processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same name, shape and vocabulary, with other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other") / tiny_llama.name
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1, dims=0))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def both_servers(
    tiny_llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    """The teacher's server and one with the other model."""
    logs = tmp_path_factory.mktemp("servers")
    both = VllmServer(tiny_llama, logs / "right"), VllmServer(other_llama, logs / "other")
    try:
        yield both
    finally:
        for each in both:
            each.kill()


@pytest.fixture
def servers(both_servers: tuple[VllmServer, VllmServer]) -> tuple[VllmServer, VllmServer]:
    """The same, up, whichever of them an earlier test has killed."""
    for each in both_servers:
        each.start()
    for each in both_servers:
        each.wait()
    return both_servers


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_LONGEST_DELAY", 1.0)


def teacher_fields(model: Path, url: str, **settings: Any) -> dict[str, Any]:
    # The text of one request at a time gives the same last bits whatever was asked before.
    return {
        "model": str(model),
        "backend": "server",
        "dtype": "float32",
        "server": {"url": url, "concurrency": 1, **settings},
    }


def config_of(output: Path, model: Path, url: str, **settings: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "teacher": teacher_fields(model, url, **settings),
            "data": {"path": "python-docs", "max_length": MAX_LENGTH, "max_tokens": 16_000},
            "store": {"top_k": TOP_K, "tail_samples": 0, "shard_tokens": 1_000},
            "audit": {"sequences": 0},
            "output": str(output),
        }
    )


@pytest.fixture(scope="module")
def whole(
    both_servers: tuple[VllmServer, VllmServer],
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """The manifest of a build that nothing has befallen."""
    server = both_servers[0]
    server.start()
    server.wait()
    return build(config_of(tmp_path_factory.mktemp("whole") / "c", tiny_llama, server.url)).manifest


def test_a_server_says_what_transformers_says(
    servers: tuple[VllmServer, VllmServer],
    tiny_llama: Path,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Any,
) -> None:
    dense = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers"),
        max_length=MAX_LENGTH,
        capture=Capture(1),
    )
    fields = teacher_fields(tiny_llama, servers[0].url, concurrency=8, compare="always")
    teacher = open_teacher(
        TeacherConfig.model_validate(fields), max_length=MAX_LENGTH, capture=Capture(TOP_K)
    )
    texts = [
        as_sequence(f"s{i}", rng.integers(0, 384, n).tolist())
        for i, n in enumerate([2, MAX_LENGTH, *rng.integers(2, MAX_LENGTH, 20)])
    ]
    scored = list(teacher.score(texts))
    assert len(scored) == len(texts)
    for found, text in zip(scored, texts, strict=True):
        assert_same_scores(
            found, dense.dense_logprobs(text.input_ids), text.input_ids, 1e-4, Capture(TOP_K)
        )
    identity = teacher.identity()
    assert (identity.backend, identity.route, identity.engine[:5]) == ("server", "http", "vllm ")
    assert identity.weights_sha256 == dense.identity().weights_sha256
    teacher.close()
    dense.close()


def test_another_model_of_the_same_name_is_refused_at_the_start(
    servers: tuple[VllmServer, VllmServer], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"does not say what .* says .*another model, revision or quantisation"
    ):
        build(config_of(tmp_path / "c", tiny_llama, servers[1].url))


class Switch:
    """One address that leads to one server or another: what a restart with other options looks
    like from outside.
    """

    def __init__(self, target: VllmServer) -> None:
        self.target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                upstream = socket.create_connection(("127.0.0.1", self.target.port))
            except OSError:
                return
            self._open += [client, upstream]
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    sink.sendall(data)
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def to(self, target: VllmServer) -> None:
        self.target = target
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.to(self.target)
        self._listening.close()


def after_shards(output: Path, number: int, action: Callable[[], None]) -> threading.Thread:
    """Acts once as many shards are committed."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(list((output / BUILD_DIR / "commits").glob("*.json"))) >= number:
                action()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_server_that_comes_back_with_another_model_is_refused(
    servers: tuple[VllmServer, VllmServer], tiny_llama: Path, tmp_path: Path, whole: Any
) -> None:
    """In the middle of a build, and when the build is run again; with the right model it ends as
    if nothing had been.
    """
    output = tmp_path / "c"
    switch = Switch(servers[0])
    # Where the weights are not at hand, what the server said before is all there is to go by.
    config = config_of(output, tiny_llama, switch.url, compare="never")
    try:
        watch = after_shards(output, 3, lambda: switch.to(servers[1]))
        with pytest.raises(UserError, match="says something else than when this build began"):
            build(config)
        watch.join()
        done = len(list((output / BUILD_DIR / "commits").glob("*.json")))
        assert 3 <= done < len(whole.shards)
        with pytest.raises(UserError, match="says something else than when this build began"):
            build(config)
        switch.to(servers[0])
        result = build(config)
    finally:
        switch.close()
    assert result.manifest.content_sha256 == whole.content_sha256
    assert build(config_of(output, tiny_llama, "http://127.0.0.1:9")).reused, (
        "which server scored is not what was asked"
    )


def test_a_server_killed_in_the_middle_is_waited_for(
    servers: tuple[VllmServer, VllmServer],
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    whole: Any,
) -> None:
    """``kill -9``, started again with the same command: the cache is the one of a build that met
    no such thing.
    """
    right = servers[0]
    servers[1].kill()
    config = config_of(tmp_path / "c", tiny_llama, right.url)

    def restart() -> None:
        right.kill()
        right.start()

    watch = after_shards(tmp_path / "c", 4, restart)
    with caplog.at_level("INFO"):
        manifest = build(config).manifest
    watch.join()
    assert (
        len([line for line in caplog.messages if line.startswith("waiting for the server at")]) == 1
    )
    assert any("answers again" in line for line in caplog.messages)
    assert manifest.content_sha256 == whole.content_sha256
    assert verify(str(tmp_path / "c"), deep=True) == []
    assert json.loads((tmp_path / "c/manifest.json").read_text())["teacher"]["backend"] == "server"
    assert len(CacheReader(tmp_path / "c")) == manifest.statistics.sequences
