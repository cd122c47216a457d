"""Per-position losses from hidden states, without the logits of all positions in memory.

The logits of a batch, positions times vocabulary, are the largest tensor of a fine-tuning step, and
exist several times if losses upcast them. Here only ``chunk_size`` positions have logits at any
time. The gradient of a chunk is computed directly after its losses, so logits are computed once, as
in plain training, and not again in the backward pass. All chunks share one buffer for logits, the
gradient may be written over it, and the head's gradient is summed in place.

Shapes: P kept positions, C positions of one chunk, H hidden size, V student vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from logitcask.train.head.lm_head import LogitsHead, as_forward_of

# Bytes of logits of one chunk. A GPU needs large chunks to be busy. On a CPU larger chunks gain
# nothing, and smaller ones are slower, because each chunk reads the head and reads and writes its
# gradient (docs/speed.md).
_CHUNK_BYTES = {"cpu": 96 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20
_CHUNK_AT_LEAST = 512
# Rows of the head's gradient that are summed at a time if no kernel adds 16-bit products to
# float32.
_SLICE = 8192

_T = TypeVar("_T")

PerChunk = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""``per_chunk(logits [C, V], rows) -> (objective [C], values)``.

``rows`` says which of the P positions these are (``teacher[rows]``). ``objective`` is what to
minimise, weighted but not reduced; its only way to parameters must be through the logits.
``values`` are [C] tensors to report, by name. The backward pass of ``objective`` may overwrite the
logits, which nothing reads afterwards.
"""

_Losses = Callable[[Tensor, PerChunk], tuple[Tensor, dict[str, Tensor]]]


class HeadLosses(NamedTuple):
    """objective: scalar, float32, the sum of the objective over all positions, differentiable.
    values:    float32[P] each, what ``per_chunk`` reported, without gradient."""

    objective: Tensor
    values: dict[str, Tensor]


def head_losses(
    head: LogitsHead, hidden_PH: Tensor, per_chunk: PerChunk, *, chunk_size: int | None = None
) -> HeadLosses:
    """Losses of all positions, a chunk of logits at a time, with the gradient in the same pass.

    The gradients of the hidden states and of the head's parameters are exact and ready when this
    returns. The backward pass only multiplies them once by the (scalar) gradient of the objective.
    The objective must therefore be complete here. A loss that depends on the logits of other
    positions needs a first pass (``chosen_head_losses``).

    Memory holds one chunk of logits (two if losses do not write their gradient over them, or if
    logits are soft-capped) and the gradients: [P, H], and one tensor of the size of each trainable
    parameter of the head, summed over chunks in at least float32 and passed on to ``.grad`` without
    a copy. Under ``torch.no_grad`` there are only values.

    All chunks run inside one call of the lm_head's module. Its hooks run once, and FSDP2 gathers it
    once for all chunks.

    Args:
        head: the model's second half.
        hidden_PH: hidden states at the kept positions; P may be 0.
        per_chunk: the losses; see ``PerChunk``.
        chunk_size: the largest number of positions with logits at any time; by default as many as
            give 96 MiB (on GPUs 512 MiB) of float32 logits, but at least 512. Chunks have nearly
            equal sizes.
    """
    return _in_head(
        head, hidden_PH, lambda hidden_PH, losses: losses(hidden_PH, per_chunk), chunk_size
    )


def chosen_head_losses(
    head: LogitsHead,
    hidden_PH: Tensor,
    measure: PerChunk,
    choose: Callable[[dict[str, Tensor]], tuple[Tensor | slice, PerChunk]],
    *,
    chunk_size: int | None = None,
) -> HeadLosses:
    """``head_losses`` of positions that are chosen by a first pass without gradient.

    Args:
        measure: the losses of the first pass at all P positions; only its values are used.
        choose: from these values, float32[P] by name, to the Q chosen positions (int64[Q], or a
            slice) and the losses there.
    """

    def passes(hidden_PH: Tensor, losses: _Losses) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            _, values = losses(hidden_PH, measure)
        index_Q, per_chunk = choose(values)
        return losses(hidden_PH[index_Q], per_chunk)

    return _in_head(head, hidden_PH, passes, chunk_size)


def _in_head(
    head: LogitsHead,
    hidden_PH: Tensor,
    work: Callable[[Tensor, _Losses], tuple[Tensor, dict[str, Tensor]]],
    chunk_size: int | None,
) -> HeadLosses:
    """Calls ``work`` in one call of the lm_head's module, with a function for losses by chunks.

    There must be only one call: FSDP2 treats a second one as the beginning of another forward, and
    in the backward pass would free the parameters of the norm before the head while they are
    needed.
    """
    plain = head.lm_head.forward

    def losses(hidden_PH: Tensor, per_chunk: PerChunk) -> tuple[Tensor, dict[str, Tensor]]:
        size = _chunk_size(head, hidden_PH, chunk_size)
        return _all_chunks(_projection(head, plain, hidden_PH, size), hidden_PH, per_chunk, size)

    return HeadLosses(
        *as_forward_of(head.lm_head, lambda hidden_PH: work(hidden_PH, losses), hidden_PH)
    )


def _chunk_size(head: LogitsHead, hidden_PH: Tensor, most: int | None) -> int:
    if most is None:
        chunk_bytes = _CHUNK_BYTES.get(hidden_PH.device.type, _CHUNK_BYTES_ELSEWHERE)
        most = max(_CHUNK_AT_LEAST, chunk_bytes // (4 * head.vocab_size))
    chunks = math.ceil(len(hidden_PH) / most)
    return math.ceil(len(hidden_PH) / chunks) if chunks else 1


class _Projection(Protocol):
    """Hidden states to logits, and gradients of logits to those of hidden states and parameters,
    chunk by chunk.
    """

    parameters: list[nn.Parameter]

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """[C, V], detached; valid until the next call."""

    def backward(self, grad_CV: Tensor) -> Tensor:
        """Gradient [C, H] of the chunk of the last ``logits`` call; may overwrite ``grad_CV``."""

    def sums(self) -> list[Tensor]:
        """The gradients of ``parameters`` over all chunks."""


def _projection(
    head: LogitsHead, forward: Callable[[Tensor], Tensor], hidden_PH: Tensor, chunk_size: int
) -> _Projection:
    if type(head.lm_head).forward is nn.Linear.forward:
        return _LinearProjection(head, hidden_PH, min(chunk_size, len(hidden_PH)))
    return _AnyProjection(head, forward)


class _LinearProjection:
    """A plain ``nn.Linear`` with scale and soft cap: matrix products into shared buffers."""

    def __init__(self, head: LogitsHead, hidden_PH: Tensor, chunk_size: int) -> None:
        module = cast(nn.Linear, head.lm_head)
        device = hidden_PH.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else module.weight.dtype
        )
        self.parameters = head.parameters()
        self._weight_VH = module.weight.detach().to(dtype)
        # scale * (h W + b) = (scale h) W + scale b. Scaling h is far cheaper than scaling logits.
        self._scale, self._softcap = head.scale, head.softcap
        self._bias_V = None if module.bias is None else module.bias.detach().to(dtype) * self._scale
        self._buffer_CV = hidden_PH.new_empty(chunk_size, len(self._weight_VH), dtype=dtype)
        self._slope_CV: Tensor | None = None
        self._train_weight = module.weight.requires_grad
        self._train_bias = module.bias is not None and module.bias.requires_grad
        self._weight_sum: Tensor | None = None
        self._bias_sum: Tensor | None = None

    def logits(self, hidden_CH: Tensor) -> Tensor:
        self._hidden_CH = hidden_CH.detach().to(self._weight_VH.dtype) * self._scale
        logits_CV = self._buffer_CV[: len(hidden_CH)]
        if self._bias_V is None:
            torch.mm(self._hidden_CH, self._weight_VH.t(), out=logits_CV)
        else:
            torch.addmm(self._bias_V, self._hidden_CH, self._weight_VH.t(), out=logits_CV)
        if self._softcap is not None:
            logits_CV.div_(self._softcap).tanh_()
            if torch.is_grad_enabled():
                self._slope_CV = logits_CV.square().neg_().add_(1)
            logits_CV.mul_(self._softcap)
        return logits_CV

    def backward(self, grad_CV: Tensor) -> Tensor:
        # Detached: if the gradient was written over the logits, it is still their leaf tensor.
        grad_CV = grad_CV.detach().to(self._weight_VH.dtype)
        # Through the soft cap; then the gradients of weight, bias and hidden states.
        if self._slope_CV is not None:
            grad_CV.mul_(self._slope_CV)
        if self._train_weight:
            self._add_to_weight(grad_CV)
        if self._train_bias:
            part = grad_CV.sum(0, dtype=self._wide()).mul_(self._scale)
            self._bias_sum = part if self._bias_sum is None else self._bias_sum.add_(part)
        return torch.mm(grad_CV, self._weight_VH).mul_(self._scale)

    def _add_to_weight(self, grad_CV: Tensor) -> None:
        if self._weight_sum is None:
            self._weight_sum = self._weight_VH.new_zeros(self._weight_VH.shape, dtype=self._wide())
        # In bfloat16, sums over many chunks lose digits, and so does a product that is rounded
        # before the addition.
        if self._weight_sum.dtype == grad_CV.dtype:
            self._weight_sum.addmm_(grad_CV.t(), self._hidden_CH)
            return
        if _adds_to_float32(grad_CV.device, grad_CV.dtype):
            _add_product(self._weight_sum, grad_CV.t(), self._hidden_CH)
            return
        # By slices, so that the products and the widened factors stay small.
        widened = _multiplies_faster_in_float32(grad_CV.device)
        hidden_CH = self._hidden_CH.float() if widened else self._hidden_CH
        for start in range(0, len(self._weight_sum), _SLICE):
            rows = slice(start, start + _SLICE)
            if widened:
                self._weight_sum[rows].addmm_(grad_CV[:, rows].float().t(), hidden_CH)
            else:
                self._weight_sum[rows].add_(grad_CV[:, rows].t() @ hidden_CH)

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._weight_VH.dtype, torch.float32)

    def sums(self) -> list[Tensor]:
        return [total for total in (self._weight_sum, self._bias_sum) if total is not None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, float32 from 16-bit matrices, in one kernel."""
    torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``_add_product`` works; tried, since it needs CUDA and some version of torch."""
    return device.type == "cuda" and _adds_rightly(device, dtype)


def _adds_rightly(device: torch.device, dtype: torch.dtype) -> bool:
    total = torch.full((16, 16), 256.0, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        _add_product(total, torch.eye(16, device=device, dtype=dtype).t(), ones)
    except (AttributeError, RuntimeError):
        return False
    return bool((total == 257).all())  # which has one bit more than bfloat16


def _multiplies_faster_in_float32(device: torch.device) -> bool:
    """Whether a CPU multiplies 16-bit matrices slower than float32 ones: ten times slower on AVX2,
    which has no instructions for them.
    """
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


class _AnyProjection:
    """Any module (for example adapters on the lm_head), by autograd from its logits on."""

    def __init__(self, head: LogitsHead, forward: Callable[[Tensor], Tensor]) -> None:
        self._after, self._forward, self.parameters = head._after, forward, head.parameters()
        self._sums: list[Tensor] = []

    def logits(self, hidden_CH: Tensor) -> Tensor:
        self._hidden_CH = hidden_CH.detach().requires_grad_()
        self._logits_CV = self._after(self._forward(self._hidden_CH))
        return self._logits_CV.detach()

    def backward(self, grad_CV: Tensor) -> Tensor:
        inputs = [self._hidden_CH, *self.parameters]
        logits_CV, self._logits_CV = self._logits_CV, grad_CV
        hidden, *found = torch.autograd.grad(
            logits_CV, inputs, grad_CV.to(logits_CV.dtype), materialize_grads=True
        )
        if self._sums:
            for total, gradient in zip(self._sums, found, strict=True):
                total.add_(gradient)
        else:
            self._sums = [
                gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                for gradient in found
            ]
        return hidden

    def sums(self) -> list[Tensor]:
        return self._sums


def _all_chunks(
    projection: _Projection, hidden_PH: Tensor, per_chunk: PerChunk, chunk_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    objectives: list[Tensor] = []
    values: dict[str, list[Tensor]] = {}
    wanted = torch.is_grad_enabled()
    hidden_grad = torch.empty_like(hidden_PH) if wanted else hidden_PH
    # An empty batch is one empty chunk, so that the names are reported and the objective stays
    # connected to the graph.
    for start in range(0, max(len(hidden_PH), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        logits_CV = projection.logits(hidden_PH[rows]).requires_grad_(wanted)
        objective_C, reported = per_chunk(logits_CV, rows)
        objective = objective_C.sum()
        objectives.append(objective.detach())
        for name, value in reported.items():
            values.setdefault(name, []).append(value.detach())
        if wanted:
            (grad_CV,) = torch.autograd.grad(objective, [logits_CV], materialize_grads=True)
            hidden_grad[rows] = projection.backward(grad_CV)
            del grad_CV
    objective = torch.stack(objectives).sum()
    if wanted:
        gradients = [hidden_grad]
        gradients += [
            g.to(p.dtype) for g, p in zip(projection.sums(), projection.parameters, strict=True)
        ]
        objective = _Precomputed.apply(objective, gradients, hidden_PH, *projection.parameters)  # type: ignore[no-untyped-call]
    return objective, {name: torch.cat(parts) for name, parts in values.items()}


class _Precomputed(torch.autograd.Function):
    """A scalar with known gradients in ``inputs``, which its only backward pass returns."""

    @staticmethod
    def forward(ctx: Any, objective: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return objective.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of head_losses were handed on by its first backward pass; compute it again"
            )
        # Scaled in place and not kept: autograd can make them the parameters' .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        needed = zip(gradients, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(
                gradient.mul_(grad.to(gradient.dtype)) if need else None
                for gradient, need in needed
            ),
        )
