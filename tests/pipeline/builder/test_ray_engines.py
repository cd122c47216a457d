"""Builds on a Ray cluster with vLLM in each worker."""

from __future__ import annotations

import pytest

from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from tests.pipeline.builder.test_ray_driver import Driver, on_ray, same_cache, settings

pytest.importorskip("ray")
pytest.importorskip("vllm")


def test_vllm_in_two_workers(tmp_path, tiny_llama):
    """With as many threads as each worker has, one, this process computes the same to the last
    bit.

    What vLLM compiles counts ranks. In the workers it runs uncompiled, which takes less time here.
    """
    fields = settings(
        tmp_path / "one",
        teacher={"model": str(tiny_llama)},
        data={"path": "python-docs", "max_length": 64, "max_tokens": 4_000},
        store={"top_k": 8, "shard_tokens": 500},
    )
    expected = build(BuildConfig.model_validate(fields)).manifest
    on_two = on_ray(fields, tmp_path / "two")
    code, said = Driver(tmp_path, on_two, TORCHDYNAMO_DISABLE="1").end()
    assert code == 0, said
    same_cache(tmp_path / "two", expected)
