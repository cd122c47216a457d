"""From hidden states to per-position losses without ever holding the logits of all positions.

The logits of a batch, positions times vocabulary, are the largest tensor of a fine-tuning step, several times over once
losses upcast them. Here only ``chunk_size`` positions have logits at any time. The gradient of a chunk is taken as soon
as its losses are known, so logits are computed once, as in plain training, and not again in the backward pass.

Shapes: P kept positions, C positions of one chunk, H hidden size, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_format.errors import UserError

# Float32 logits of one chunk. Losses hold three or four such buffers at their peak; smaller chunks make small GEMMs.
_CHUNK_BYTES = 256 * 2**20

PerChunk = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""``per_chunk(logits [C, V], rows) -> (objective [C], values)``.

``rows`` says which of the P positions these are (``teacher[rows]``). ``objective`` is what to minimise, weighted but
not reduced; its only way to parameters must be through the logits. ``values`` are [C] tensors to report, by name.
"""


class HeadLosses(NamedTuple):
    """objective: scalar, float32, the sum of the objective over all positions, differentiable.
    values:    float32[P] each, what ``per_chunk`` reported, without gradient."""

    objective: Tensor
    values: dict[str, Tensor]


class LogitsHead:
    """A causal language model in two halves: input -> last hidden states, and hidden states -> logits.

    The second half includes what an architecture does to logits after its lm_head: bias, Gemma's soft-capping,
    Granite's, Cohere's or Falcon-H1's scale. Whether the halves make up the whole is checked once, by comparing with
    the model's own logits on a few random tokens.

    The halves are the model's own modules, so training them trains the model. They bypass ``model.forward``: under DDP
    or FSDP, call them from inside the wrapped module's forward, where parameters are whole and hooks are armed.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.

    Raises:
        UserError: the model has no such halves, or they do not reproduce its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        # PEFT changes the modules inside the model that it wraps; the halves are those of the wrapped model.
        unwrap = getattr(model, "get_base_model", None)
        causal = cast(PreTrainedModel, unwrap() if unwrap else model)
        self.architecture = type(causal).__name__
        backbone, lm_head = causal.base_model, causal.get_output_embeddings()
        if lm_head is None or backbone is causal:
            raise UserError(
                f"{self.architecture} has no backbone with an lm_head on top; expected a causal language model such as "
                "LlamaForCausalLM"
            )
        self.backbone: nn.Module = backbone
        self.lm_head: nn.Module = lm_head
        self.vocab_size: int = causal.config.get_text_config().vocab_size
        self._scale, self._softcap = _after_lm_head(causal.config.get_text_config())
        self._check(causal)

    def hidden(self, **inputs: Tensor) -> Tensor:
        """Last hidden states [B, T, H] of ``input_ids`` [B, T] and what else the model's forward takes."""
        hidden: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], as the model's own forward gives them."""
        logits: Tensor = self.lm_head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters between hidden states and logits (shared with the embedding where tied)."""
        return [parameter for parameter in self.lm_head.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _check(self, causal: PreTrainedModel) -> None:
        device = causal.get_input_embeddings().weight.device
        input_ids = torch.randint(self.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
        with _eval_mode(causal):
            expected = causal(input_ids=input_ids, use_cache=False).logits
            found = self.logits(self.hidden(input_ids=input_ids))
        error, size = (found - expected).abs().max().item(), expected.abs().max().item()
        # Same hidden states, maybe in another order of rounding; a missing scale or cap is far beyond this.
        if not error <= max(8 * torch.finfo(expected.dtype).eps, 1e-4) * size:
            raise UserError(
                f"{self.architecture} treats its logits in a way not known here: what its lm_head gives differs by "
                f"{error:.3g} from logits of up to {size:.3g}; use another student, or extend _after_lm_head"
            )


def _after_lm_head(config: Any) -> tuple[float, float | None]:
    """(scale, softcap): what follows the lm_head, from the fields by which transformers' configs name it."""
    scale = 1.0
    for field in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, field, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    scale *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((cap for cap in (getattr(config, field, None) for field in caps) if cap is not None), None)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored module by module: some may be in it for good (frozen parts)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def head_losses(
    head: LogitsHead, hidden_PH: Tensor, per_chunk: PerChunk, *, chunk_size: int | None = None
) -> HeadLosses:
    """Losses of all positions, a chunk of logits at a time, with the gradient taken on the way.

    The gradient in the hidden states and in the head's parameters is exact and ready when this returns; the backward
    pass only multiplies it by the (scalar) gradient of the objective. Hence the objective has to be complete here: a
    weight that depends on the logits of other positions needs a first pass under ``torch.no_grad``.

    Besides one chunk, memory holds the gradients: [P, H], and one tensor the size of each parameter of the head, summed
    over chunks in at least float32. Under ``torch.no_grad`` there are only values.

    Args:
        head: the model's second half.
        hidden_PH: hidden states at the kept positions; P may be 0.
        per_chunk: the losses; see ``PerChunk``.
        chunk_size: positions with logits at any time; by default as many as make 256 MiB of float32 logits.
    """
    chunk_size = chunk_size or max(1, _CHUNK_BYTES // (4 * head.vocab_size))
    parameters = head.parameters()
    objectives: list[Tensor] = []
    values: dict[str, list[Tensor]] = {}
    hidden_grads: list[Tensor] = []
    parameter_grads: list[Tensor] = []
    # An empty batch is one empty chunk, so that the names are reported and the objective stays connected.
    for start in range(0, max(len(hidden_PH), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        objective, reported, gradients = _one_chunk(head, hidden_PH[rows], parameters, per_chunk, rows)
        objectives.append(objective)
        for name, value in reported.items():
            values.setdefault(name, []).append(value)
        if gradients:
            hidden_grads.append(gradients[0])
            _add(parameter_grads, gradients[1:])
    objective = torch.stack(objectives).sum()
    if hidden_grads:
        inputs = [hidden_PH, *parameters]
        sums = [torch.cat(hidden_grads), *parameter_grads]
        gradients = tuple(g.to(x.dtype) for g, x in zip(sums, inputs, strict=True))
        objective = _Precomputed.apply(objective, gradients, *inputs)  # type: ignore[no-untyped-call]
    return HeadLosses(objective, {name: torch.cat(parts) for name, parts in values.items()})


def _one_chunk(
    head: LogitsHead, hidden_CH: Tensor, parameters: list[nn.Parameter], per_chunk: PerChunk, rows: slice
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
    """Objective, reported values and gradients of one chunk. A function, so that its logits die when it returns."""
    hidden_CH = hidden_CH.detach().requires_grad_()
    objective_C, reported = per_chunk(head.logits(hidden_CH), rows)
    objective = objective_C.sum()
    gradients: tuple[Tensor, ...] = ()
    if torch.is_grad_enabled():
        gradients = torch.autograd.grad(objective, [hidden_CH, *parameters], materialize_grads=True)
    return objective.detach(), {name: value.detach() for name, value in reported.items()}, gradients


def _add(sums: list[Tensor], gradients: tuple[Tensor, ...]) -> None:
    """sums += gradients, in float32 where gradients are narrower: bfloat16 sums over many chunks lose digits."""
    if sums:
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient)
    else:
        sums.extend(gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients)


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients in ``inputs`` are already known."""

    @staticmethod
    def forward(ctx: Any, objective: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return objective.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad.to(gradient.dtype) if need else None for gradient, need in needed)
