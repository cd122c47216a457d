"""The chunked head against the model's own logits, for several architectures, tiny and random in
every run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM

from logitcask.train.evaluation.metrics import rank_agreement, top_k_overlap
from logitcask.train.head.chunked import (
    PerChunk,
    _adds_rightly,
    _adds_to_float32,
    _all_chunks,
    _LinearProjection,
    head_losses,
)
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.losses import LOSSES, SparseTeacher

pytestmark = pytest.mark.random

VOCAB, HIDDEN = 211, 16
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
# What an architecture does after its lm_head is set strong enough to be missed where it is left
# out.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2-tied": GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5
    ),
    "gemma2-softcap": Gemma2Config(**SMALL, final_logit_softcapping=2.0, tie_word_embeddings=False),
    "granite-scaling": GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere-scale": CohereConfig(**SMALL, logit_scale=0.3),
    "phi-bias": PhiConfig(**{**SMALL, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Random weights, biases included; dropout off, as for every comparison."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return model


def teacher_of(positions: int, k: int = 12) -> SparseTeacher:
    logprobs, ids = (3 * torch.randn(positions, VOCAB)).log_softmax(1).sort(1, descending=True)
    return SparseTeacher(
        ids=ids[:, :k],
        logprobs=logprobs[:, :k],
        tail_logprob=logprobs[:, k:].logsumexp(1),
        target_ids=torch.randint(VOCAB, (positions,)),
        target_logprob=logprobs[:, 0],
        vocab_size=VOCAB,
    )


def recipe(teacher: SparseTeacher, weights_P: Tensor) -> PerChunk:
    """Everything a trainer puts together: KD terms, one of them weighted by overlap, hard
    labels, metrics.
    """

    def per_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        part = teacher[rows]
        kl, rank = LOSSES["forward_kl"](logits, part), LOSSES["ranking"](logits, part)
        ce = torch.nn.functional.cross_entropy(logits, part.target_ids, reduction="none")
        objective = weights_P[rows] * (top_k_overlap(logits, part, 5) * kl + 2 * rank + 0.5 * ce)
        return objective, {
            "kl": kl,
            "ranking": rank,
            "ce": ce,
            "top_1": rank_agreement(logits, part, 5).top_1,
        }

    return per_chunk


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def kept_hidden(head: LogitsHead, input_ids: Tensor, kept: Tensor) -> Tensor:
    return head.hidden(input_ids=input_ids).flatten(0, 1)[kept]


@pytest.mark.parametrize("name", CONFIGS)
def test_halves_make_up_the_model(name: str) -> None:
    model = build(name)
    head, input_ids = LogitsHead(model), torch.randint(VOCAB, (3, 11))
    hidden, expected = head.hidden(input_ids=input_ids), model(input_ids=input_ids).logits
    assert hidden.shape == (3, 11, HIDDEN)
    torch.testing.assert_close(head.logits(hidden), expected)
    bare = (model.get_output_embeddings()(hidden) - expected).abs().max() > 1e-3
    assert bare == (name in ("gemma2-softcap", "granite-scaling", "cohere-scale"))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (CONFIGS[name].tie_word_embeddings is True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk_size", [1, 7, 40, None])
def test_equals_dense_logits(name: str, chunk_size: int | None) -> None:
    """Values and the gradients of every parameter of the model, against its own forward and
    plain autograd.
    """
    model = build(name)
    input_ids, kept = torch.randint(VOCAB, (2, 16)), torch.randperm(32)[:23].sort().values
    per_chunk = recipe(teacher_of(23), torch.rand(23, dtype=torch.float64))

    objective, values = per_chunk(
        model(input_ids=input_ids).logits.flatten(0, 1)[kept], slice(None)
    )
    (objective.sum() / 17).backward()
    expected = gradients(model)

    head = LogitsHead(model)
    found = head_losses(head, kept_hidden(head, input_ids, kept), per_chunk, chunk_size=chunk_size)
    (found.objective / 17).backward()
    assert found.objective.shape == ()
    torch.testing.assert_close(found.objective, objective.sum())
    assert found.values.keys() == values.keys()
    for key, value in values.items():
        assert not found.values[key].requires_grad
        torch.testing.assert_close(found.values[key], value.detach())
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found_gradients[key],
            gradient,
            rtol=1e-9,
            atol=1e-9,
            msg=lambda m, key=key: f"{key}: {m}",
        )


def test_accumulated_parts_equal_the_whole() -> None:
    """Two batches, each divided by the total: what gradient accumulation does."""
    model = build("llama-tied")
    head, input_ids, teacher = LogitsHead(model), torch.randint(VOCAB, (2, 10)), teacher_of(20)
    weights = torch.rand(20, dtype=torch.float64)
    whole = head_losses(
        head, kept_hidden(head, input_ids, torch.arange(20)), recipe(teacher, weights), chunk_size=6
    )
    (whole.objective / 20).backward()
    expected = gradients(model)
    for row in (0, 1):
        rows = slice(10 * row, 10 * row + 10)
        hidden = kept_hidden(head, input_ids[row : row + 1], torch.arange(10))
        part = head_losses(head, hidden, recipe(teacher[rows], weights[rows]), chunk_size=6)
        (part.objective / 20).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)


class LargestWithVocabulary(TorchDispatchMode):
    """The most rows that any tensor with one column per id had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and VOCAB in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2-softcap"])
def test_logits_of_all_positions_never_exist(name: str) -> None:
    model = build(name, torch.float32)
    head, per_chunk = LogitsHead(model), recipe(teacher_of(256), torch.ones(256))
    input_ids = torch.randint(VOCAB, (8, 32))
    with LargestWithVocabulary() as chunked:
        hidden = head.hidden(input_ids=input_ids).flatten(0, 1)
        head_losses(head, hidden, per_chunk, chunk_size=HIDDEN).objective.backward()
    # The weight and its gradient have HIDDEN rows.
    assert chunked.rows == HIDDEN
    with LargestWithVocabulary() as whole:
        hidden = head.hidden(input_ids=input_ids).flatten(0, 1)
        head_losses(head, hidden, per_chunk, chunk_size=256).objective.backward()
    assert whole.rows == 256


def test_without_gradients_there_are_values_only() -> None:
    model = build("llama")
    head, hidden, per_chunk = (
        LogitsHead(model),
        torch.randn(9, HIDDEN).double(),
        recipe(teacher_of(9), torch.ones(9)),
    )
    with torch.no_grad():
        found = head_losses(head, hidden, per_chunk, chunk_size=4)
    trained = head_losses(head, hidden, per_chunk, chunk_size=4)
    assert not found.objective.requires_grad
    torch.testing.assert_close(found.objective, trained.objective.detach())
    assert all(torch.equal(found.values[name], trained.values[name]) for name in trained.values)


def test_no_kept_position() -> None:
    """A batch whose loss mask is empty still has names, and an objective that can be propagated."""
    model = build("llama-tied")
    head = LogitsHead(model)
    hidden = kept_hidden(head, torch.randint(VOCAB, (1, 5)), torch.arange(0))
    found = head_losses(head, hidden, recipe(teacher_of(0), torch.ones(0)))
    found.objective.backward()
    assert found.objective == 0
    assert {name: len(value) for name, value in found.values.items()} == dict.fromkeys(
        ("kl", "ranking", "ce", "top_1"), 0
    )
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_half_gets_no_gradient(frozen: str) -> None:
    model = build("llama")
    model.get_submodule(frozen).requires_grad_(False)
    head, input_ids = LogitsHead(model), torch.randint(VOCAB, (1, 8))
    per_chunk = recipe(teacher_of(8), torch.ones(8, dtype=torch.float64))
    per_chunk(model(input_ids=input_ids).logits[0], slice(None))[0].sum().backward()
    expected = gradients(model)
    assert 0 < len(expected) < len(dict(model.named_parameters()))
    head_losses(
        head, kept_hidden(head, input_ids, torch.arange(8)), per_chunk, chunk_size=3
    ).objective.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-9)


def test_adapters_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config)
    head, input_ids = LogitsHead(model), torch.randint(VOCAB, (1, 8))
    per_chunk = recipe(teacher_of(8), torch.ones(8, dtype=torch.float64))
    per_chunk(model(input_ids=input_ids).logits[0], slice(None))[0].sum().backward()
    expected = gradients(model)
    assert any("lm_head" in name for name in expected)
    head_losses(
        head, kept_hidden(head, input_ids, torch.arange(8)), per_chunk, chunk_size=3
    ).objective.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["autocast", "bfloat16 weights"])
def test_bfloat16(mode: str) -> None:
    """Chunks in bfloat16 add up in float32: as near to the exact gradient as one bfloat16
    product.
    """
    exact, model = build("llama"), build("llama")
    model.load_state_dict(exact.state_dict())
    model.to(torch.float32 if mode == "autocast" else torch.bfloat16)
    hidden, teacher = 0.2 * torch.randn(512, HIDDEN), teacher_of(512)

    def per_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return LOSSES["forward_kl"](logits, teacher[rows]), {}

    def weight_gradient(model: PreTrainedModel, hidden: Tensor, chunk_size: int) -> Tensor:
        head_losses(
            LogitsHead(model), hidden, per_chunk, chunk_size=chunk_size
        ).objective.backward()
        return gradients(model)["lm_head.weight"]

    expected = weight_gradient(exact, hidden.double(), 512)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        inputs = hidden.to(model.dtype)
        whole, chunked = weight_gradient(model, inputs, 512), weight_gradient(model, inputs, 2)
    assert chunked.dtype == model.dtype
    error = [((found - expected).norm() / expected.norm()).item() for found in (whole, chunked)]
    assert error[1] < 2 * error[0]


class AddingInFloat32(TorchDispatchMode):
    """CUDA's addition of a 16-bit product to a float32 matrix, as documented, on the CPU, where
    torch has none.
    """

    def __init__(self, rounded: bool = False) -> None:
        super().__init__()
        self.rounded = rounded
        self.products: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.addmm.dtype_out:
            return func(*args, **(kwargs or {}))
        total, left, right, dtype = args
        assert total is kwargs["out"]
        assert (total.dtype, dtype, left.dtype, right.dtype) == (
            torch.float32,
            dtype,
            torch.bfloat16,
            torch.bfloat16,
        )
        self.products.append(left.double() @ right.double())
        added = total + left.float() @ right.float()
        return total.copy_(added.bfloat16() if self.rounded else added)


def test_the_weight_gradient_is_added_in_one_kernel_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One addition a chunk, of products that are not rounded first; nor are those of a CPU that
    widens what it multiplies.
    """
    model = build("llama", torch.bfloat16)
    hidden, teacher = (0.2 * torch.randn(64, HIDDEN)).bfloat16(), teacher_of(64)

    def per_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return LOSSES["forward_kl"](logits, teacher[rows]), {}

    def weight_sum() -> Tensor:
        """Before it is rounded to the weight's own type."""
        projection = _LinearProjection(LogitsHead(model), hidden, 8)
        _all_chunks(projection, hidden, per_chunk, 8)
        return projection.sums()[0].double()

    monkeypatch.setattr("logitcask.train.head.chunked._SLICE", 50)
    by_processor = []
    for widened in (False, True):
        monkeypatch.setattr(
            "logitcask.train.head.chunked._multiplies_faster_in_float32",
            lambda device, widened=widened: widened,
        )
        by_processor.append(weight_sum())
    sliced, widened_first = by_processor
    monkeypatch.setattr("logitcask.train.head.chunked._adds_to_float32", lambda device, dtype: True)
    with AddingInFloat32() as adding:
        found = weight_sum()
    assert [product.shape for product in adding.products] == 8 * [(VOCAB, HIDDEN)]
    exact = torch.stack(adding.products).sum(0)
    assert (found - exact).norm() < 1e-6 * exact.norm()
    assert (widened_first - exact).norm() < 1e-6 * exact.norm()
    assert 1e-2 * exact.norm() > (sliced - exact).norm() > 1e-4 * exact.norm()


def test_whether_there_is_such_a_kernel_is_tried() -> None:
    device = torch.device("cpu")
    assert not _adds_to_float32(device, torch.bfloat16)
    assert not _adds_rightly(device, torch.bfloat16), "torch has one on the CPU now: measure it"
    with AddingInFloat32():
        assert _adds_rightly(device, torch.bfloat16)
    with AddingInFloat32(rounded=True):
        assert not _adds_rightly(device, torch.bfloat16)
