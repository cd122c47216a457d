"""The process around a vLLM engine: how vLLM is imported, what it prints, why it failed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import IO, Any

from pydantic import ValidationError

from logitcask.cache_format.errors import UserError

logger = logging.getLogger(__name__)


class EngineLog:
    """The file that an engine prints to while it lives; read only to find the cause of a failure.

    harmless: bytes of it that were printed before a request that has been answered since; no cause
              of a failure is among them.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.harmless = 0

    def printed(self) -> int:
        """Bytes that the engine has printed."""
        return os.fstat(self.file.fileno()).st_size

    def cause(self, error: Exception) -> str:
        """The cause of an engine's failure, in one line."""
        return explain(error, self.file, self.harmless)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Sends what the engine prints here, unless debugging.

        By file descriptor: native code and the engine's child processes print past ``sys.stdout``
        and ``logging``.
        """
        if _debugging():
            yield
            return
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(self.file.fileno(), 1)
            os.dup2(self.file.fileno(), 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)

    def close(self) -> None:
        self.file.close()


def import_vllm() -> Any:
    """Imports vLLM with the environment that it reads meanwhile. What the user has set stays.

    Raises UserError where this build of vLLM has no device to run on.
    """
    if not _debugging():
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    import vllm.envs
    import vllm.inputs
    import vllm.platforms
    import vllm.sampling_params

    if vllm.platforms.current_platform.is_unspecified():
        raise UserError(
            "the installed vLLM finds no device it was built for (is there an NVIDIA driver?); "
            "install logitcask[teacher-cpu], or set teacher.backend=transformers"
        )
    if vllm.platforms.current_platform.is_cpu():
        # A separate engine process would bind the cores and reserve one; on a small machine that
        # halves the speed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return vllm


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """vLLM's CPU worker replaces ``torch.set_num_threads`` for the whole process; this puts it
    back.
    """
    import torch

    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


def eager(*, on_cpu: bool) -> contextlib.AbstractContextManager[Any]:
    """Without a C++ compiler, what vLLM's CPU build would compile runs as it is, 9 % slower.

    It counts ranks.
    """
    if not on_cpu or shutil.which(os.environ.get("CXX", "g++")):
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


def is_engine_failure(error: Exception) -> bool:
    """Whether the engine has failed at its work.

    A call that a version does not know (a TypeError, say) is another matter.
    """
    return type(error).__name__ == "EngineDeadError" or isinstance(
        error, RuntimeError | OSError | MemoryError | AssertionError
    )


def explain(error: Exception, engine_log: IO[bytes], harmless: int = 0) -> str:
    """The innermost message of an engine's failure, in one line.

    In-process engines raise the cause itself. Engines in other processes leave it in what they
    printed, behind the first ``harmless`` bytes.
    """
    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    if "root cause" in message or "check the logs" in message:
        engine_log.flush()
        # The engine's processes write on at the file's one offset, so it stays where it is.
        size = os.fstat(engine_log.fileno()).st_size
        printed = os.pread(engine_log.fileno(), size - harmless, harmless).decode(errors="replace")
        # The first error is the cause; the rest is other processes noticing, or naming the process
        # it came from.
        causes = re.findall(r"\b(?:\w+\.)*\w*Error: .+", printed)
        message = next((cause for cause in causes if "raised in subprocess" not in cause), message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)
