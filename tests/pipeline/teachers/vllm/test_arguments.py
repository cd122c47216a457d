"""What vLLM is started with: no argument that would make rows wrong, and room for the logits of
prompts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.vllm import engine as vllm_teacher
from logitcask.pipeline.teachers.vllm.arguments import (
    _RESERVED,
    check_engine_args,
    logits_bytes,
    memory_utilization,
)
from logitcask.pipeline.teachers.vllm.engine import VllmTeacher

# The fields of EngineArgs in vLLM 0.30 to 0.33, each of which somebody has looked at.
LOOKED_AT = set((Path(__file__).parent / "engine_args.txt").read_text().split())
GIB = 2**30
QWEN, GEMMA = 151_936, 262_144

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.mark.parametrize("key", sorted(_RESERVED))
def test_arguments_that_would_make_rows_wrong_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^teacher\.engine_args\.{key} cannot be set; \w.*\w$"):
        check_engine_args(TeacherConfig(model="m", engine_args={"seed": 1, key: True}))


def test_other_arguments_are_the_users() -> None:
    assert _RESERVED.keys() <= LOOKED_AT
    check_engine_args(
        TeacherConfig(
            model="m",
            engine_args=dict.fromkeys(LOOKED_AT - _RESERVED.keys(), 1)
            | {"trust_remote_code": True},
        )
    )


@needs_vllm
def test_somebody_has_looked_at_every_argument_of_this_vllm() -> None:
    """A new one may change what a prompt's rows mean: look at it, reserve it if so, and add it
    to engine_args.txt.
    """
    from vllm.engine.arg_utils import EngineArgs

    assert {field.name for field in fields(EngineArgs)} - LOOKED_AT == set()


def test_the_arithmetic_of_logits() -> None:
    def gigabytes(vocab_size: int, rows: int = 1024, **kind: Any) -> float:
        kind = {"chunked": True, "soft_capped": False, "draws": False} | kind
        return logits_bytes(vocab_size, rows, **kind) / 1e9

    assert gigabytes(QWEN) == pytest.approx(1.24, abs=0.01)  # one chunk and the next
    assert gigabytes(GEMMA, soft_capped=True) == pytest.approx(3.22, abs=0.01)
    # The draws' own temporaries.
    assert gigabytes(QWEN, draws=True) == pytest.approx(0.62 + 1.07, abs=0.01)
    assert gigabytes(49_152, draws=True) == pytest.approx(5 * 0.201, abs=0.01)
    assert gigabytes(GEMMA, soft_capped=True, draws=True) == gigabytes(GEMMA, soft_capped=True)
    assert gigabytes(QWEN, tensor_parallel_size=2) == pytest.approx(1.24 + 1.5 * 0.62, abs=0.01)
    assert gigabytes(QWEN, rows=8192, chunked=False) == pytest.approx(2.25 * 4.98, abs=0.01)
    assert gigabytes(QWEN, rows=100) == pytest.approx(gigabytes(QWEN) * 100 / 1024)


@pytest.mark.parametrize(
    ("card", "logits", "expected"),
    [
        (80, 1.2, 0.92),  # vLLM's own default leaves enough
        (80, 3.0, 0.92),
        (24, 1.2, 0.91),
        (24, 3.0, 0.83),
        (16, 1.2, 0.88),
        (8, 3.0, 0.58),
    ],
)
def test_room_is_left_on_the_card(card: float, logits: float, expected: float) -> None:
    found = memory_utilization(int(card * GIB), int(logits * GIB), 0.92)
    assert found == expected
    assert (1 - found) * card >= logits + 0.035 * card


def test_logits_that_leave_no_room_for_a_model_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"logits of a step take 10\.4 GiB of the GPU's 16\.0 GiB; .*teacher\.batch_tokens",
    ):
        memory_utilization(
            16 * GIB, logits_bytes(QWEN, 8192, chunked=False, soft_capped=False, draws=False), 0.92
        )


@pytest.fixture
def start_on_gpu(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``start_on_gpu(gib, runner, **settings)``: the arguments that vLLM would be started with
    on such a card.
    """

    def start(
        gib: float | None,
        runner_v2: bool | None = None,
        folder: Path = tiny_llama,
        max_length: int = 64,
        **settings: Any,
    ) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def llm(**arguments: Any) -> None:
            given.update(arguments)
            raise RuntimeError("far enough")

        def memory() -> int:
            if gib is None:
                # As NVML says of a GPU without memory of its own.
                raise RuntimeError("Not Supported")
            return int(gib * GIB)

        platform = SimpleNamespace(is_cpu=lambda: False, get_device_total_memory=memory)
        fake = SimpleNamespace(
            platforms=SimpleNamespace(current_platform=platform),
            envs=SimpleNamespace(VLLM_USE_V2_MODEL_RUNNER=runner_v2),
            EngineArgs=SimpleNamespace(gpu_memory_utilization=0.92),
            LLM=llm,
        )
        monkeypatch.setattr(vllm_teacher, "import_vllm", lambda: fake)
        monkeypatch.setattr(vllm_teacher, "vocab_size", lambda model: QWEN)
        with pytest.raises(UserError, match=r"vLLM cannot start with .*: far enough"):
            VllmTeacher(
                TeacherConfig(model=str(folder), **settings),
                vllm_teacher.ResolvedModel(str(folder), str(folder), None),
                max_length=max_length,
                capture=Capture(16),
            )
        return given

    return start


def test_gpus_are_given_room_for_logits_unless_the_user_says_otherwise(start_on_gpu: Any) -> None:
    assert start_on_gpu(80)["gpu_memory_utilization"] == 0.92
    assert start_on_gpu(16)["gpu_memory_utilization"] == 0.88
    assert start_on_gpu(None)["gpu_memory_utilization"] == 0.92
    assert (
        start_on_gpu(16, engine_args={"gpu_memory_utilization": 0.95})["gpu_memory_utilization"]
        == 0.95
    )
    assert "gpu_memory_utilization" not in start_on_gpu(
        16, engine_args={"kv_cache_memory_bytes": GIB}
    )


def test_model_runner_v1_gets_steps_that_it_has_room_for(start_on_gpu: Any) -> None:
    assert start_on_gpu(24)["max_num_batched_tokens"] == 8192
    bounded = start_on_gpu(24, runner_v2=False)
    assert bounded["max_num_batched_tokens"] == 1024
    assert bounded["gpu_memory_utilization"] == 0.9
    asked = start_on_gpu(24, runner_v2=False, batch_tokens=4096)
    assert asked["max_num_batched_tokens"] == 4096
    assert asked["gpu_memory_utilization"] == 0.74


def test_multimodal_models_are_started_for_language_only(
    start_on_gpu: Any, tiny_gemma3: Path
) -> None:
    """What is said of the language model is said in its part of the config; the rest of a user's
    overrides stays.
    """
    plain = start_on_gpu(80, folder=tiny_gemma3, max_length=255)
    assert plain["language_model_only"] is True
    assert plain["hf_overrides"] == {"head_dtype": "float32"}
    whole = start_on_gpu(
        80,
        folder=tiny_gemma3,
        max_length=256,
        engine_args={"hf_overrides": {"text_config": {"sliding_window": 16}}},
    )
    assert whole["hf_overrides"] == {
        "head_dtype": "float32",
        "text_config": {"model_max_length": 257, "sliding_window": 16},
    }
    assert start_on_gpu(80, max_length=256)["hf_overrides"] == {
        "head_dtype": "float32",
        "model_max_length": 257,
    }
    theirs = start_on_gpu(80, max_length=256, engine_args={"hf_overrides": {"head_dtype": "model"}})
    assert theirs["hf_overrides"] == {"head_dtype": "model", "model_max_length": 257}
