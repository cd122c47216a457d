"""The audit of a build in a separate process.

vLLM changes classes of transformers in its process: after a model whose layers it takes from
transformers (OLMo 2, SmolLM3, GPT-NeoX), these classes work only inside an engine. A reference
needs a clean interpreter, so this one gets only the ``sys.path`` of the build's process.

The request goes to the worker's standard input. The worker answers with lines of JSON, one for each
compared sequence and one with the summary or the error. The input stays open. It ends with the
build, and then the worker ends, too.
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
    """``at_build_end.audit_here`` in a new interpreter; raises its errors.

    If the worker dies, for example because memory runs out, the audit is skipped with this reason.
    """
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            start_new_session=True,  # Ctrl-C goes to the build, which ends its worker
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; see its exit code
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
    """The worker: reads the request, writes its answers, and ends with its parent."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

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
