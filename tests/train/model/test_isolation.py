"""Students that do not keep packed sequences apart are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.cache_format import UserError
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.model.isolation import check_isolation
from tests.train.data.test_packing import SMALL

pytestmark = pytest.mark.random


def student(model_type, attention="sdpa", **fields):
    config = AutoConfig.for_model(model_type, **SMALL, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def broken_llama():
    """A Llama that reads its rows as one text."""
    model = student("llama")
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(
        **{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    )
    return model


@pytest.mark.parametrize(
    "make", [broken_llama, lambda: student("opt", ffn_dim=64, word_embed_proj_dim=32)]
)
def test_a_student_that_mixes_sequences_is_refused(make):
    with pytest.raises(UserError, match="does not keep packed sequences apart") as caught:
        check_isolation(LogitsHead(make()))
    assert "\n" not in str(caught.value)


def test_recurrent_students_are_refused():
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        check_isolation(LogitsHead(AutoModelForCausalLM.from_config(config)))
