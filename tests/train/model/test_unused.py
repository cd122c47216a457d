"""Students in which a backward pass may leave a parameter without gradient."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.model.unused import may_go_unused

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}


def student(model_type="llama", **fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **fields))


class Routed(nn.Module):
    """Two experts, each a module; every token goes to one of them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            mine = (hidden.sum(-1) > 0) == bool(number)
            if mine.any():
                out[mine] = expert(hidden[mine])
        return out


def test_ddp_looks_for_unused_parameters_only_in_students_that_may_have_some():
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 1}
    for model in (
        student(),
        student(tie_word_embeddings=True),
        student("gpt2"),
        student("mixtral", **mixture),
    ):
        model.train()
        assert not may_go_unused(LogitsHead(model)), type(model)
        assert all(weight.grad is None for weight in model.parameters())
        assert model.training
    routed, extra = student(), student()
    routed.model.layers[1].mlp = Routed()
    extra.model.other = nn.Linear(2, 2)
    for model in (routed, extra, student("opt", ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.1)):
        assert may_go_unused(LogitsHead(model)), type(model)
    extra.model.other.requires_grad_(False)
    assert not may_go_unused(LogitsHead(extra))
    for weight in extra.parameters():
        weight.requires_grad = weight is extra.lm_head.weight
    assert not may_go_unused(LogitsHead(extra))
