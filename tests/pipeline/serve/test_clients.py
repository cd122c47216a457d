"""Clients that others wrote, and our own, at a real vLLM server and at this one in front of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, verify
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.serve.keeper import LOGPROB_STEP
from tests.pipeline.teachers.server.test_vllm_server import MAX_LENGTH, TOP_K, VllmServer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

# Rounding, and what the order of sums in a batch changes in float32.
ROUNDING = LOGPROB_STEP / 2 + 1e-4


@pytest.fixture(scope="module")
def vllm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tiny_llama, tmp_path_factory.mktemp("vllm") / "log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def in_front(
    vllm: VllmServer, tiny_llama: Path, tmp_path: Path, running: Callable[..., Any]
) -> Callable[[], Any]:
    """A server in front of vLLM, and with nothing behind it from the second call on."""
    kept = tmp_path / "kept"

    def start() -> Any:
        if (kept / "manifest.json").exists():
            return running([str(kept)])
        options = {"teacher": str(tiny_llama), "upstream_model": "tiny", "top_k": TOP_K}
        return running([], upstream=vllm.url, keep=kept, **options)

    return start


def test_trl_client(
    vllm: VllmServer, in_front: Callable[[], Any], rng: np.random.Generator
) -> None:
    """trl's ``get_sequence_logprobs``: the same ids, and logprobs but for rounding."""
    client = pytest.importorskip("trl.generation.vllm_client").VLLMClient
    sequences = [rng.integers(0, 384, n).tolist() for n in (2, 40, MAX_LENGTH, 71)]
    lengths = [1, 10, 30, 70]

    def ask(url: str, k: int, chunk_size: int) -> Any:
        return client(base_url=url).get_sequence_logprobs(
            sequences, lengths, top_logprobs=k, chunk_size=chunk_size
        )

    front = in_front()
    first = {(k, size): ask(front.url, k, size) for k, size in [(TOP_K, 1), (1, 0), (10, 2)]}
    assert front.sources() == {"cache": 0, "kept": 8, "upstream": 4}
    front.stop()
    alone = in_front()
    for (k, size), served in first.items():
        live = ask(vllm.url, k, size)
        assert ask(alone.url, k, size) == served
        for name in ("logprob_token_ids", "actual_token_ids"):
            assert served[name] == live[name]
        for name in ("logprobs", "actual_logprobs"):
            for one, other in zip(served[name], live[name], strict=True):
                assert np.abs(np.subtract(one, other)).max() <= ROUNDING
    assert alone.sources() == {"cache": 12, "kept": 0, "upstream": 0}


def test_openai_client(
    vllm: VllmServer, in_front: Callable[[], Any], rng: np.random.Generator
) -> None:
    """The client that most people call a vLLM server with: the same ids and ranks, several prompts
    in a request.
    """
    openai = pytest.importorskip("openai")
    prompts = [rng.integers(0, 384, n).tolist() for n in (3, 25, MAX_LENGTH)]

    def ask(url: str) -> list[list[dict[int, tuple[float, int]] | None]]:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        body = {"prompt_logprobs": TOP_K, "return_token_ids": True}
        answer = client.completions.create(
            model=name, prompt=prompts, max_tokens=1, temperature=0, extra_body=body
        )
        return [
            [
                each and {int(i): (one["logprob"], one["rank"]) for i, one in each.items()}
                for each in choice.prompt_logprobs
            ]
            for choice in sorted(answer.choices, key=lambda choice: choice.index)
        ]

    live, front = ask(vllm.url), in_front()
    first = ask(front.url)
    front.stop()
    alone = in_front()
    assert ask(alone.url) == first
    assert alone.sources() == {"cache": 3, "kept": 0, "upstream": 0}
    for one, other in zip(live, first, strict=True):
        assert one[0] is other[0] is None
        for of_live, of_front in zip(one[1:], other[1:], strict=True):
            assert of_live is not None
            assert of_front is not None
            assert of_live.keys() == of_front.keys()
            for index, (logprob, _) in of_live.items():
                assert abs(logprob - of_front[index][0]) <= ROUNDING


@pytest.mark.random
def test_trl_trainer(
    vllm: VllmServer, in_front: Callable[[], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """trl's ``ServerDistillationTrainer``: the losses of a live teacher but for rounding; those of
    a rerun from what was kept are equal, and nobody else is asked.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = pytest.importorskip("trl.experimental.server_distillation")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"question {n}"}]} for n in range(8)]
    )

    def losses(url: str, learning_rate: float, name: str) -> list[float]:
        arguments = module.ServerDistillationConfig(
            output_dir=str(tmp_path / name),
            teacher_model_server_url=url,
            loss_top_k=8,
            beta=0,
            max_completion_length=12,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_steps=4,
            learning_rate=learning_rate,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=7,
        )
        student = AutoModelForCausalLM.from_pretrained(tiny_llama)
        for parameter in student.parameters():
            parameter.data.mul_(0.7)
        trainer = module.ServerDistillationTrainer(
            student, args=arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        return [each["loss"] for each in trainer.state.log_history if "loss" in each]

    front = in_front()
    live, first = losses(vllm.url, 0, "live"), losses(front.url, 0, "first")
    assert len(live) == 4
    assert all(loss > 0.01 for loss in live)
    # Logs round losses to four digits.
    assert np.abs(np.subtract(live, first)).max() <= 2 * ROUNDING
    trained = losses(front.url, 1e-3, "trained")
    front.stop()
    alone = in_front()
    assert losses(alone.url, 0, "again") == first
    assert losses(alone.url, 1e-3, "trained again") == trained
    assert trained != first
    assert alone.sources()["upstream"] == 0


def test_our_own_builds(
    vllm: VllmServer, in_front: Callable[[], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """``backend: server``, whose checks pass here, too, as probes are kept like any text."""

    def heads(url: str, name: str) -> tuple[Any, list[Any]]:
        config = BuildConfig.model_validate(
            {
                "teacher": {
                    "model": str(tiny_llama),
                    "backend": "server",
                    "dtype": "float32",
                    "server": {"url": url, "model": served, "concurrency": 4},
                },
                "data": {"path": "python-docs", "max_length": MAX_LENGTH, "max_tokens": 3000},
                "store": {
                    "top_k": TOP_K,
                    "min_probability": None,
                    "tail_samples": 0,
                    "logprob_step": LOGPROB_STEP,
                },
                "audit": {"sequences": 0},
                "output": str(tmp_path / name),
            }
        )
        build(config)
        assert verify(str(tmp_path / name), deep=True) == []
        reader = CacheReader(tmp_path / name)
        return reader.manifest, list(reader)

    served = "tiny"
    live_manifest, live = heads(vllm.url, "live")
    served = str(tiny_llama)
    front = in_front()
    first_manifest, first = heads(front.url, "first")
    front.stop()
    alone = in_front()
    again_manifest, _ = heads(alone.url, "again")
    assert alone.sources()["upstream"] == 0
    assert alone.sources()["cache"] > len(live)
    assert first_manifest.content_sha256 == again_manifest.content_sha256
    assert first_manifest.teacher == live_manifest.teacher == again_manifest.teacher
    assert first_manifest.data.sha256 == live_manifest.data.sha256
    for one, other in zip(live, first, strict=True):
        assert np.array_equal(one.ids, other.ids)
        # Rounded twice, to one grid.
        assert np.abs(one.logprobs - other.logprobs).max() <= LOGPROB_STEP
        assert np.abs(one.target_logprob - other.target_logprob).max() <= LOGPROB_STEP
        # Our client counts the ids above the target, of which rounding makes some equal to it.
        for row in np.flatnonzero(one.target_rank != other.target_rank).tolist():
            low, high = sorted((int(one.target_rank[row]), int(other.target_rank[row])))
            equal = [*one.logprobs[row, low : high + 1], one.target_logprob[row]]
            assert np.ptp(equal) <= 2 * LOGPROB_STEP
            assert high - low <= 3
