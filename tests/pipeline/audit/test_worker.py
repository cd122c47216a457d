"""An audit in a process of its own says what it says in this one, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import logitcask.pipeline.audit.at_build_end
from logitcask.cache_format import CacheReader, DamagedCacheError
from logitcask.cache_format.manifest import Header
from logitcask.pipeline.audit import worker as audit_worker
from logitcask.pipeline.audit.at_build_end import BuildAudit, audit_here
from logitcask.pipeline.audit.worker import audit_apart
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import Scored

# A worker that has begun, says so in a file, and never ends by itself.
BUSY = """
import os, sys, time
sys.path[:] = sys.argv[1:]
from logitcask.pipeline.audit import worker as audit_worker
def busy(asked, on_sequence):
    with open(asked.path + ".pid", "w") as file:
        file.write(str(os.getpid()))
    os.rename(asked.path + ".pid", asked.path + ".begun")
    on_sequence()
    time.sleep(600)
audit_worker.audit_here = busy
audit_worker.main()
"""


@pytest.fixture
def asked(tmp_path: Path) -> BuildAudit:
    """Of a finished cache, as a build that has just committed its last shard would ask."""
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 1_000},
            "audit": {"sequences": 0},
            "output": str(tmp_path / "cache"),
        }
    )
    build(config)
    manifest = CacheReader(config.output).manifest
    header = Header.model_construct(
        **{name: getattr(manifest, name) for name in Header.model_fields}
    )
    settings = config.audit.model_copy(update={"sequences": 3})
    return BuildAudit(str(config.output), header, manifest.shards, settings, config.teacher)


def test_it_says_the_same(asked: BuildAudit) -> None:
    compared: list[int] = []
    found = audit_apart(asked, lambda: compared.append(1))
    assert found.sequences == len(compared) == 3
    assert found == audit_here(asked, lambda: None)


def test_errors_are_carried_over(asked: BuildAudit, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Path(asked.path) / asked.shards[0].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DamagedCacheError) as here:
        audit_here(asked, lambda: None)
    with pytest.raises(DamagedCacheError) as apart:
        audit_apart(asked, lambda: None)
    assert str(apart.value) == str(here.value)
    assert "start afresh with --restart" in str(apart.value)


@pytest.mark.parametrize(
    ("worker", "why"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            "was killed by signal SIGKILL, as where memory runs out",
        ),
        ("raise RuntimeError('not enough memory')", "failed: RuntimeError: not enough memory"),
        ("import sys; sys.exit(3)", "failed: exit code 3"),
    ],
)
def test_a_worker_that_dies_is_no_audit(
    asked: BuildAudit, monkeypatch: pytest.MonkeyPatch, worker: str, why: str
) -> None:
    monkeypatch.setattr(audit_worker, "_WORKER", worker)
    found = audit_apart(asked, lambda: None)
    assert found.skipped is not None
    assert found.skipped.endswith(why)
    assert found.sequences is None


def test_what_interrupts_the_build_ends_the_worker(
    asked: BuildAudit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit_worker, "_WORKER", BUSY)
    with pytest.raises(KeyboardInterrupt):
        audit_apart(asked, interrupted)
    assert not _alive(int(Path(asked.path + ".begun").read_text()))


def test_a_build_that_is_killed_leaves_no_worker(asked: BuildAudit, tmp_path: Path) -> None:
    request = tmp_path / "request"
    request.write_bytes(pickle.dumps((asked, BUSY)))
    program = (
        "import pickle, sys; from pathlib import Path; from logitcask.pipeline.audit import worker as audit_worker\n"
        "asked, audit_worker._WORKER = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "audit_worker.audit_apart(asked, lambda: None)"
    )
    path = os.pathsep.join(sys.path)
    killed = subprocess.Popen(
        [sys.executable, "-c", program, str(request)], env=os.environ | {"PYTHONPATH": path}
    )
    begun = Path(asked.path + ".begun")
    while not begun.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    worker = int(begun.read_text())
    assert _alive(worker)
    killed.kill()
    killed.wait()
    while _alive(worker):  # the suite's time limit ends a test that waits for ever
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_shifted_cache_is_not_completed(
    asked: BuildAudit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rolled: Callable[..., Scored],
) -> None:
    """As by a build whose teacher is vLLM: the whole way through the worker."""
    original = SyntheticTeacher.score

    def shifted(self, sequences):
        for scored in original(self, sequences):
            names = (
                "ids",
                "logprobs",
                "head_size",
                "target_logprob",
                "target_rank",
                "samples",
                "sample_logprobs",
            )
            yield rolled(scored, names, 1)

    monkeypatch.setattr(SyntheticTeacher, "score", shifted)
    monkeypatch.setattr(logitcask.pipeline.audit.at_build_end, "audit_here", audit_apart)
    config = BuildConfig.model_validate(asked.header.config | {"output": str(tmp_path / "shifted")})
    with pytest.raises(DamagedCacheError, match=r"shifted by one.*not completed"):
        build(config)
    assert not (tmp_path / "shifted" / "manifest.json").exists()
