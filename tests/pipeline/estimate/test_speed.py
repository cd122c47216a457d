"""Forecast speeds against published ones, and the arithmetic of a model's shape."""

from __future__ import annotations

import pytest

from logitcask.pipeline.estimate import speed as estimate_speed
from logitcask.pipeline.teachers.model import ResolvedModel


def _llama(width, inner, layers, heads, vocab_size=128_256):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=vocab_size, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "arithmetic", "context", "published"),
    [
        # Tokens per second by GPU and number of them; docs/capture.md says where each comes from.
        (_llama(4096, 14336, 32, 32), "fp8", 1088, {("h100", 1): 58_650, ("h200", 1): 60_146}),
        (_llama(8192, 28672, 80, 64), "fp8", 1088, {("h100", 2): 12_954, ("h200", 1): 7_514}),
        (_llama(16384, 53248, 126, 128), "fp8", 1088, {("h100", 8): 7_701, ("h200", 8): 7_752}),
        (_llama(8192, 28672, 80, 64), "fp8", 2500, {("h100", 2): 12_292}),
        (_llama(4096, 14336, 32, 32), "16 bits", 1500, {("h100", 4): 62_021}),
    ],
)
def test_published_prefill_speeds_are_within_a_factor_of_one_and_a_half(
    tmp_path, config, arithmetic, context, published
):
    config.save_pretrained(tmp_path)
    shape = estimate_speed.shape_of(ResolvedModel("llama", str(tmp_path), None))
    for (gpu, count), speed in published.items():
        found = estimate_speed.seconds_per_token(
            shape, estimate_speed.GPUS[gpu], context, arithmetic=arithmetic, tensor_parallel=count
        )
        assert 1 / 1.5 < 1 / found.prefill / speed < 1.5


def test_of_experts_only_those_that_a_token_meets_count(tmp_path):
    from transformers import MixtralConfig

    def shape(per_token):
        config = MixtralConfig(
            vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=per_token,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        return estimate_speed.shape_of(ResolvedModel("mixtral", str(tmp_path), None))

    one, three = shape(1), shape(3)
    assert three.weights - one.weights == pytest.approx(3 * 2 * 3 * 64 * 96)
    assert one.all_weights - one.weights == pytest.approx(3 * 7 * 3 * 64 * 96)
