"""The process of a stage: its result, its failures, and its end with the process that waits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.runtime.interruption import Stopped, sigterm_at_once
from logitcask.rounds.stage import StageFailed, run_stage


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A build that needs no model."""
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 400},
        "data": {"path": "python-docs", "max_length": 64, "max_tokens": 2000},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
        "log": False,
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "build.yaml"


def children() -> list[psutil.Process]:
    """Processes below this one that run a stage."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            if "logitcask.rounds.child" in each.cmdline():
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_stage_ends_before_the_next_one_starts(config, tmp_path):
    for name in ("one", "two"):
        assert children() == []
        output = tmp_path / name
        ended = run_stage(["teacher-cache", "build", str(config), f"output={output}"], ["--quiet"])
        assert ended.document["cache"] == str(output)
        assert ended.document["tokens"] == CacheReader(output).manifest.statistics.tokens
        assert ended.seconds > 0
        assert ended.peak_bytes > 10 << 20
    assert children() == []


def test_a_command_that_fails_has_said_why(config, capfd):
    with pytest.raises(StageFailed) as failed:
        run_stage(["teacher-cache", "build", str(config), "store.top_k=401"], [])
    assert failed.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines == [
        "error: store.top_k is 401, but synthetic can predict 400 ids; choose a smaller top_k"
    ]


def wait_for_child(parent: psutil.Process) -> psutil.Process:
    """The stage below ``parent`` whose build has begun."""
    while True:
        for each in parent.children():  # other tests' children may be there, too
            with contextlib.suppress(psutil.NoSuchProcess):
                if "logitcask.rounds.child" in each.cmdline():
                    return each
        time.sleep(0.01)


def test_a_killed_command_is_said(config):
    import threading

    def kill() -> None:
        wait_for_child(psutil.Process()).kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match="teacher-cache was killed by SIGKILL"):
        run_stage(["teacher-cache", "build", str(config)], [])
    thread.join()


def test_a_signal_goes_on_to_the_command(config):
    import threading

    stages: list[psutil.Process] = []

    def stop() -> None:
        stages.append(wait_for_child(psutil.Process()))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    with sigterm_at_once(), pytest.raises(Stopped) as stopped:
        thread.start()
        run_stage(["teacher-cache", "build", str(config)], [])
    thread.join()
    assert stopped.value.exit_code == 143
    assert not stages[0].is_running()


def test_a_signal_while_the_command_is_started(config, monkeypatch):
    """It is not lost, and leaves no command behind that nobody waits for."""
    started: list[psutil.Process] = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(psutil.Process(self.pid))
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with sigterm_at_once(), pytest.raises(Stopped) as stopped:
        run_stage(["teacher-cache", "build", str(config)], [])
    assert stopped.value.exit_code == 143
    assert not started[0].is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such request")
def test_a_stage_dies_with_the_process_that_waits(config):
    code = (
        "import sys; from logitcask.rounds.stage import run_stage; "
        "run_stage(['teacher-cache', 'build', sys.argv[1], 'data.max_tokens=null'], [])"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code, str(config)])
    stage = wait_for_child(psutil.Process(waiting.pid))
    while "logitcask.rounds.child" not in stage.cmdline():
        time.sleep(0.01)
    build = config.parent / "cache" / ".build"
    while not build.exists():  # the request has been made by then
        assert stage.is_running()
        time.sleep(0.01)
    waiting.kill()
    waiting.wait()
    stage.wait(timeout=60)
