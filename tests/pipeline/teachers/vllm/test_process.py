"""The cause of an engine's failure, found in what its processes printed."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from pydantic import ValidationError, create_model, model_validator

from logitcask.pipeline.teachers.vllm.process import explain


def test_causes_are_found_in_what_other_processes_printed() -> None:
    dead = RuntimeError(
        "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
    )
    with tempfile.TemporaryFile() as log:
        log.write(
            b"(EngineCore pid=7) ERROR 01-01 [core.py:9] Traceback (most recent call last):\n"
            b"(EngineCore pid=7) ERROR 01-01 [core.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
            b"RuntimeError: Engine core initialization failed\n"
        )
        assert explain(dead, log) == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
        assert explain(MemoryError(), log) == "MemoryError"
        assert explain(ValueError("first\nsecond"), log) == "first"


def test_an_old_error_that_did_no_harm_is_no_cause() -> None:
    dead = RuntimeError(
        "EngineCore encountered an issue. See stack trace (above) for the root cause."
    )
    with tempfile.TemporaryFile("a+b") as log:
        log.write(b"ERROR 01-01 [cuda.py:9] ImportError: no module named 'deep_gemm'\n")
        harmless = log.tell()
        log.write(
            b"ERROR 01-01 [core.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
        )
        assert (
            explain(dead, log, harmless)
            == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
        )
        assert explain(dead, log, log.tell()) == str(dead)


def test_a_package_that_a_model_needs_is_named() -> None:
    """vLLM looks at a model's class in a process of its own, and logs what that process printed."""
    message = (
        "Model architectures ['X'] failed to be inspected. Please check the logs for more details."
    )

    def fail(self: Any) -> Any:
        raise ValueError(message)

    # While it validates its config: then pydantic has wrapped the error.
    config = create_model(
        "ModelConfig", __validators__={"fail": model_validator(mode="after")(fail)}
    )
    with pytest.raises(ValidationError) as caught:
        config()
    with tempfile.TemporaryFile() as log:
        for failed in (ValueError(message), caught.value):
            assert explain(failed, log) == message
        log.write(
            b"ERROR 01-01 [registry.py:9] Error in inspecting model architecture 'X'\n"
            b"ERROR 01-01 [registry.py:9] RuntimeError: Error raised in subprocess:\n"
            b"ERROR 01-01 [registry.py:9] Traceback (most recent call last):\n"
            b"ERROR 01-01 [registry.py:9] ModuleNotFoundError: No module named 'mamba_ssm'\n"
        )
        for failed in (ValueError(message), caught.value):
            assert explain(failed, log) == "ModuleNotFoundError: No module named 'mamba_ssm'"
