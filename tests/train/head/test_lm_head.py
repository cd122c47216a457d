"""The two halves of a model, and what a call through them leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Cohere2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto import AutoModel, AutoModelForCausalLM

from logitcask.cache_format.errors import UserError
from logitcask.train.head.lm_head import LogitsHead, as_forward_of

pytestmark = pytest.mark.random

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **fields))


def test_unknown_treatment_of_logits_is_refused() -> None:
    class TwistedForCausalLM(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    with pytest.raises(UserError, match="TwistedForCausalLM"):
        LogitsHead(TwistedForCausalLM(LlamaConfig(**SMALL)))
    with pytest.raises(UserError, match="LlamaModel has no backbone"):
        LogitsHead(AutoModel.from_config(LlamaConfig(**SMALL)))


def test_the_check_leaves_no_trace() -> None:
    """Modes module by module, random state and gradients are as they were."""
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).train()
    frozen = model.transformer.h[0]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    LogitsHead(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_follows_the_lm_head_is_read_off_the_config() -> None:
    """Granite divides by its scale, Cohere multiplies."""
    granite = AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=8.0))
    cohere = AutoModelForCausalLM.from_config(Cohere2Config(**SMALL, logit_scale=0.25))
    for model, scale in ((granite, 1 / 8), (cohere, 0.25), (llama(), 1.0)):
        head = LogitsHead(model)
        assert (head.scale, head.softcap) == (scale, None)
        hidden = torch.randn(3, 16)
        torch.testing.assert_close(head.logits(hidden), scale * model.lm_head(hidden))


def test_its_parameters_are_those_that_are_trained() -> None:
    model = llama(tie_word_embeddings=True)
    head = LogitsHead(model)
    (weight,) = head.parameters()
    assert weight is model.get_input_embeddings().weight
    weight.requires_grad = False
    assert head.parameters() == []


def test_in_evaluation_mode_for_a_while() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.norm.eval()
    head = LogitsHead(model)
    with pytest.raises(ZeroDivisionError), head.evaluated():
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [m for m in model.modules() if not m.training] == [model.model.norm]


@pytest.mark.parametrize("own", [True, False])
def test_work_in_the_place_of_a_forward_is_between_its_hooks(own: bool) -> None:
    """The module's forward is its own again afterwards, even if the work fails."""
    module = nn.Linear(2, 2)
    told: list[str] = []
    module.register_forward_pre_hook(lambda *_: told.append("before"))
    module.register_forward_hook(lambda *_: told.append("after"))

    def swapped(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    if own:
        module.forward = swapped  # type: ignore[method-assign]
    expected = module(torch.ones(2))
    told.clear()
    assert as_forward_of(module, lambda *given: told.append("work") or given, 3, "x") == (3, "x")
    assert told == ["before", "work", "after"]
    with pytest.raises(ZeroDivisionError):
        as_forward_of(module, lambda: 1 / 0)
    assert ("forward" in vars(module)) == own
    torch.testing.assert_close(module(torch.ones(2)), expected)
