"""A soft cap of the attention scores is part of the teacher, whichever attention computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.open import open_teacher

IDS = (np.arange(100) * 7919 % 384).astype(np.int32)


def dense(folder: Path, attention: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits
    return logits[0, :-1].log_softmax(-1).numpy()


def teacher(folder: Path, **engine_args: object) -> Any:
    config = TeacherConfig(model=str(folder), backend="transformers", engine_args=engine_args)
    return open_teacher(config, max_length=128, capture=Capture(4))


def test_the_cap_is_applied(tiny_gemma2: Path) -> None:
    capped = dense(tiny_gemma2, "eager")
    assert np.abs(capped - dense(tiny_gemma2, "sdpa")).max() > 1, "the cap decides nothing here"
    for engine_args in ({}, {"attn_implementation": "eager"}):
        np.testing.assert_allclose(
            teacher(tiny_gemma2, **engine_args).dense_logprobs(IDS), capped, atol=1e-4
        )


def test_other_models_keep_the_default(tiny_llama: Path) -> None:
    assert teacher(tiny_llama)._lm.config._attn_implementation == "sdpa"
    assert (
        teacher(tiny_llama, attn_implementation="eager")._lm.config._attn_implementation == "eager"
    )


def test_attention_without_the_cap_is_refused(tiny_gemma2: Path, tmp_path: Path) -> None:
    refusal = r"engine_args\.attn_implementation is 'sdpa', which leaves out .*attn_logit_softcapping 1.*use eager"
    with pytest.raises(UserError, match=refusal) as caught:
        teacher(tiny_gemma2, attn_implementation="sdpa")
    assert "\n" not in str(caught.value)
    made = {
        "teacher": {"model": str(tiny_gemma2), "backend": "transformers"},
        "data": {"path": "python-docs", "max_length": 64, "max_tokens": 300},
        "output": str(tmp_path / "cache"),
    }
    build(BuildConfig.model_validate(made))
    made["teacher"] = {**made["teacher"], "engine_args": {"attn_implementation": "sdpa"}}
    with pytest.raises(UserError, match=refusal):
        build(BuildConfig.model_validate(made), restart=True)
    assert (tmp_path / "cache" / "manifest.json").exists(), "removed before the mistake was found"
