"""What goes wrong in real life, through the command line: one line that names the cause, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_format import CacheReader

SYNTHETIC = {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000}


def config_file(tmp_path: Path, teacher: dict[str, Any], data: dict[str, Any], **more: Any) -> Path:
    fields = {
        "teacher": teacher,
        "data": {"path": "python-docs", "max_length": 32, "max_tokens": 300, **data},
        "store": {"top_k": 4, "min_k": 1, "shard_tokens": 100},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
        **more,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]


def build(file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command("build", file), capture_output=True, text=True, env=env)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error, error
    assert len(error) < 500, error


# --- data


def test_rows_of_all_kinds(tmp_path: Path) -> None:
    rows = [None, "", "  \n", 5, ["x"], {"a": 1}, True, "fine", "\ud83d", "z" * 2_000_000, "the end"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    done = build(config_file(tmp_path, SYNTHETIC, {"path": str(data), "overlong": "drop"}))
    assert done.returncode == 0, done.stderr
    cache = CacheReader(tmp_path / "cache")
    assert [sequence.sequence_id for sequence in cache] == ["train/7", "train/10"]
    counters = cache.manifest.data.counters
    reasons = ("null", "empty", "not_a_string", "broken_unicode")
    assert [counters[f"rows_skipped_{reason}"] for reason in reasons] == [1, 2, 4, 1]
    assert counters["dropped_overlong"] == 1


@pytest.mark.parametrize("rows", [[None, ""], [3, 4], []])
def test_data_without_text(tmp_path: Path, rows: list[Any]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    refused(build(config_file(tmp_path, SYNTHETIC, {"path": str(data)})), "empty data set", str(data))


def test_nothing_fits(tmp_path: Path) -> None:
    refused(
        build(config_file(tmp_path, SYNTHETIC, {"max_length": 1})), "no token to learn", "raise data.max_length (1)"
    )


# --- in the middle


def test_what_was_done_when_the_process_is_stopped_is_kept(tmp_path: Path) -> None:
    """SIGTERM, as a scheduler sends it: exit code 130, a line that says how to go on, and it does."""
    file = config_file(
        tmp_path, {**SYNTHETIC, "vocab_size": 49152}, {"max_tokens": 200_000}, store={"shard_tokens": 5000}
    )
    process = subprocess.Popen(command("build", file), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    commits = tmp_path / "cache" / ".build" / "commits"
    while not list(commits.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    done_before = len(list(commits.glob("*.json")))
    assert done_before > 0
    done = build(file)
    assert done.returncode == 0, done.stderr
    assert f"{done_before} of" in done.stderr
