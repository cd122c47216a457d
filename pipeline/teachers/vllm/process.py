"""The process of a vLLM engine: the import of vLLM, its output, the causes of its failures."""

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
    """The file with the output of an engine; read only to find the cause of a failure.

    harmless: number of bytes printed before a request that has been answered since; they contain
              no cause of a failure.
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
        """Redirects the engine's output to this file, unless debugging.

        It works by file descriptor, because native code and child processes of the engine bypass
        ``sys.stdout`` and ``logging``.
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
    """Imports vLLM with the environment variables that it reads. The user's values are kept.

    Raises UserError if this build of vLLM has no device to run on.
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
    """A context that restores ``torch.set_num_threads``, which vLLM's CPU worker replaces."""
    import torch

    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


def eager(*, on_cpu: bool) -> contextlib.AbstractContextManager[Any]:
    """Without a C++ compiler, the compiled code of vLLM's CPU build runs uncompiled, 9 % slower.

    It counts ranks.
    """
    if not on_cpu or shutil.which(os.environ.get("CXX", "g++")):
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


def is_engine_failure(error: Exception) -> bool:
    """Whether the engine has failed at its work.

    A call that a version of vLLM does not have (for example a TypeError) is not such a failure.
    """
    return type(error).__name__ == "EngineDeadError" or isinstance(
        error, RuntimeError | OSError | MemoryError | AssertionError
    )


def explain(error: Exception, engine_log: IO[bytes], harmless: int = 0) -> str:
    """The innermost message of an engine's failure, in one line.

    In-process engines raise the cause itself. Engines in other processes print it, after the first
    ``harmless`` bytes of their output.
    """
    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    if "root cause" in message or "check the logs" in message:
        engine_log.flush()
        # The engine's processes share the file's offset, so it must not move.
        size = os.fstat(engine_log.fileno()).st_size
        printed = os.pread(engine_log.fileno(), size - harmless, harmless).decode(errors="replace")
        # The first error is the cause. Later ones come from other processes that notice it.
        causes = re.findall(r"\b(?:\w+\.)*\w*Error: .+", printed)
        message = next((cause for cause in causes if "raised in subprocess" not in cause), message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)
