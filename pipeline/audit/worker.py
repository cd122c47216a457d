"""The audit of a build in a process of its own.

An engine changes what transformers makes in its process: vLLM, once it has run a model whose layers
it takes from transformers (OLMo 2, SmolLM3, GPT-NeoX), leaves classes behind that work inside an
engine only. A reference must come from a clean interpreter, so this one is started without anything
of the build's process but its ``sys.path``.

The request goes to the worker's standard input; answers come back as lines of JSON, one for each
sequence compared and one with the summary or the error. The input stays open: when it ends, so has
the build, and the worker ends too.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO

from logitcask.cache_format import errors
from logitcask.cache_format.errors import LogitcaskError, UserError
from logitcask.cache_format.manifest import AuditSummary
from logitcask.pipeline.audit.at_build_end import BuildAudit, audit_here

_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from logitcask.pipeline.audit.worker import main; main()"


def audit_apart(asked: BuildAudit, on_sequence: Callable[[], object]) -> AuditSummary:
    """``build_audit.audit_here`` in a fresh interpreter; raises what it raises.

    A worker that dies, as where memory runs out, is a reason for a skipped audit.
    """
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            start_new_session=True,  # Ctrl-C is for the build, which ends its worker
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; its exit code says how
                worker.stdin.write(pickle.dumps(asked))
                worker.stdin.flush()
            for line in worker.stdout:
                said = json.loads(line)
                if "summary" in said:
                    return AuditSummary.model_validate(said["summary"])
                if "error" in said:
                    raise getattr(errors, said["error"], UserError)(said["message"])
                on_sequence()
            return AuditSummary(skipped=_death(worker.wait(), printed))
        finally:
            worker.kill()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()


def _death(code: int, printed: IO[bytes]) -> str:
    if code < 0:
        memory = ", as where memory runs out" if -code == signal.SIGKILL else ""
        return (
            f"the process that compares was killed by signal {signal.Signals(-code).name}{memory}"
        )
    printed.seek(0)
    lines = printed.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return f"the process that compares failed: {last}"


def main() -> None:
    """The worker: reads the request, answers, ends with its parent."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**said: object) -> None:
        print(json.dumps(said), file=answers, flush=True)

    asked: BuildAudit = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer(summary=audit_here(asked, lambda: answer(compared=1)).model_dump())
    except LogitcaskError as error:
        answer(error=type(error).__name__, message=str(error))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
