"""A student whose attention scores are capped is trained, packed and saved as that function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format.errors import UserError
from logitcask.train.config import StudentConfig
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.model.isolation import check_isolation
from logitcask.train.model.student import build_student

IDS = (torch.arange(100) * 7919 % 384)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("fields", [{}, {"keep_layers": [0, 1]}, {"attention": "eager"}])
def test_the_cap_is_applied(tiny_gemma2: Path, fields: dict) -> None:
    origin = "init_from" if "keep_layers" in fields else "model"
    student = build_student(StudentConfig(**{origin: str(tiny_gemma2)}, **fields), seed=0)
    capped, uncapped = (
        logits(AutoModelForCausalLM.from_pretrained(tiny_gemma2, attn_implementation=each))
        for each in ("eager", "sdpa")
    )
    assert (capped - uncapped).abs().max() > 1, "the cap decides nothing here"
    torch.testing.assert_close(logits(student), capped, atol=1e-4, rtol=0)
    check_isolation(LogitsHead(student))


def test_adapters_and_random_weights_have_it_too(tiny_gemma2: Path) -> None:
    adapted = build_student(
        StudentConfig(model=str(tiny_gemma2), peft={"target_modules": ["q_proj"]}), seed=0
    )
    assert adapted.config._attn_implementation == "eager"
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    scratch = build_student(
        StudentConfig(config={"model_type": "gemma2", **sizes, **heads}), seed=0
    )
    assert scratch.config._attn_implementation == "eager"


def test_attention_without_the_cap_is_refused(tiny_gemma2: Path, tiny_llama: Path) -> None:
    with pytest.raises(
        UserError, match=r"student\.attention is 'sdpa', which leaves out .*soft cap.*use eager"
    ):
        build_student(StudentConfig(model=str(tiny_gemma2), attention="sdpa"), seed=0)
    assert (
        build_student(StudentConfig(model=str(tiny_llama)), seed=0).config._attn_implementation
        == "sdpa"
    )
