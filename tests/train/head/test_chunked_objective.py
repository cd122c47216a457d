"""The trainer's objective through the chunked head: gradients written over the logits, and what
is never allocated.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import AutoModelForCausalLM

from logitcask.train.config import TrainConfig
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import SparseTeacher, TailDraws

pytestmark = pytest.mark.random

VOCAB, HIDDEN, POSITIONS = 211, 16, 23
SMALL = {
    "vocab_size": VOCAB + 3,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "softcap": Gemma2Config(**SMALL, final_logit_softcapping=2.0, tie_word_embeddings=False),
    "scaling": GraniteConfig(**SMALL, logits_scaling=3.0),
    "bias": PhiConfig(**SMALL, partial_rotary_factor=0.5),
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "overwritten": [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "dynamic": True}],
    "ghost": [{"name": "forward_kl", "tail": "ghost"}],
    "prior": [{"name": "forward_kl", "tail": "prior"}],
    "mixed": [{"name": "forward_kl"}, {"name": "reverse_kl", "tail": "ghost"}],
    "reconstruction": [{"name": "forward_kl"}, {"name": "reverse_kl", "tail": "prior"}],
}


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return model


def teacher(k: int = 12) -> SparseTeacher:
    logprobs, ids = (3 * torch.randn(POSITIONS, VOCAB)).log_softmax(1).sort(1, descending=True)
    at = torch.randint(k, VOCAB, (POSITIONS, 6))
    return SparseTeacher(
        ids=ids[:, :k],
        logprobs=logprobs[:, :k],
        tail_logprob=logprobs[:, k:].logsumexp(1),
        target_ids=torch.randint(VOCAB, (POSITIONS,)),
        target_logprob=logprobs[:, 0],
        vocab_size=VOCAB,
        draws=TailDraws(ids.gather(1, at), logprobs.gather(1, at)),
        prior=torch.randn(VOCAB).softmax(0),
    )


def objective(recipe: str) -> Objective:
    fields = {"cache": "-", "student": {"init_from": "-"}, "training": {"output_dir": "-"}}
    return Objective(
        TrainConfig.model_validate({**fields, "losses": RECIPES[recipe], "ce_weight": 0.5})
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_written_over_logits_are_those_of_the_model(name: str, recipe: str) -> None:
    """In float64: value and the gradient of every parameter, against the model's own logits and
    plain autograd.
    """
    model, target, terms = build(name), teacher(), objective(recipe)
    input_ids = torch.randint(VOCAB, (1, POSITIONS))
    expected, _ = terms.per_chunk(target)(model(input_ids=input_ids).logits[0].clone(), slice(None))
    expected.sum().backward()
    dense = gradients(model)
    head = LogitsHead(model)
    found = head_losses(
        head, head.hidden(input_ids=input_ids)[0], terms.per_chunk(target), chunk_size=7
    )
    found.objective.backward()
    torch.testing.assert_close(found.objective, expected.sum())
    chunked = gradients(model)
    assert chunked.keys() == dense.keys()
    for key, gradient in dense.items():
        torch.testing.assert_close(
            chunked[key], gradient, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
        )


class Alive(TorchDispatchMode):
    """The most memories that tensors of a shape hold at one time, those of ``apart`` not
    counted.
    """

    def __init__(self, shape: tuple[int, ...], apart: torch.nn.Module) -> None:
        super().__init__()
        self.shape, self.apart, self.most = (
            shape,
            {p.untyped_storage().data_ptr() for p in apart.parameters()},
            0,
        )
        self.seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) == self.shape:
                # Weakly: autograd copies a gradient that someone else still holds.
                self.seen.append(weakref.ref(tensor))
        alive = {
            tensor.untyped_storage().data_ptr()
            for each in self.seen
            if (tensor := each()) is not None
        }
        self.most = max(self.most, len(alive - self.apart))
        return out


def step(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """How many memories of ``shape`` a step holds at one time, the model's own parameters not
    counted.
    """
    head, target = LogitsHead(model), teacher()
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    terms = objective("overwritten").per_chunk(replace(target, prior=None))
    with Alive(shape, model) as alive:
        head_losses(head, hidden, terms, chunk_size=8).objective.backward()
    return alive.most


def test_the_heads_gradient_is_one_tensor() -> None:
    """Summed where it is handed on to ``.grad``. Of logits there is the buffer, and the block
    that a pass works on.
    """
    model = build("tied", torch.float32)
    assert step(model, (VOCAB + 3, HIDDEN)) == 1
    assert model.get_output_embeddings().weight.grad is not None
    assert step(build("tied", torch.float32), (8, VOCAB + 3)) <= 2


def test_a_frozen_head_has_no_gradient() -> None:
    model = build("tied", torch.float32)
    model.get_output_embeddings().weight.requires_grad_(False)
    assert step(model, (VOCAB + 3, HIDDEN)) == 0


def test_adapters_on_a_frozen_head() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("scaling", torch.float32), settings)
    assert step(model, (VOCAB + 3, HIDDEN)) == 0
    assert all((p.grad.abs() > 0).any() for p in model.parameters() if p.requires_grad)


def test_gradients_are_given_away_once() -> None:
    model = build("tied", torch.float32)
    head, hidden = LogitsHead(model), torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    found = head_losses(head, hidden, objective("ghost").per_chunk(teacher()))
    found.objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        found.objective.backward()
