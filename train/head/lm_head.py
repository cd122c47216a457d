"""A causal language model in two halves: the backbone up to its last hidden states, and the head
from them to logits.

Shapes: B sequences, T tokens, H hidden size, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcask.cache_format.errors import UserError

_T = TypeVar("_T")


class LogitsHead:
    """A causal language model in two halves: input to last hidden states, and these to logits.

    The second half includes the operations of an architecture after its lm_head: bias, Gemma's
    soft-capping, Granite's, Cohere's or Falcon-H1's scale. A check on a few random tokens compares
    the two halves with the model's own logits.

    The halves are the model's own modules, so training them trains the model. They bypass
    ``model.forward``. Under DDP or FSDP2, call them from inside the wrapped module's forward, where
    hooks are active.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.

    Raises:
        UserError: the model has no such halves, or they do not reproduce its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        # PEFT changes the modules inside the model that it wraps; the halves are those of the
        # wrapped model.
        unwrap = getattr(model, "get_base_model", None)
        causal = cast(PreTrainedModel, unwrap() if unwrap else model)
        self.architecture = type(causal).__name__
        self.student = model
        backbone, lm_head = causal.base_model, causal.get_output_embeddings()
        if lm_head is None or backbone is causal:
            raise UserError(
                f"{self.architecture} has no backbone with an lm_head on top; expected a causal language model such as "
                "LlamaForCausalLM"
            )
        self.backbone: nn.Module = backbone
        self.lm_head: nn.Module = lm_head
        self.vocab_size: int = causal.config.get_text_config().vocab_size
        self.scale, self.softcap = _after_lm_head(causal.config.get_text_config())
        self._check(causal)

    def hidden(self, **inputs: Tensor) -> Tensor:
        """Last hidden states [B, T, H] of ``input_ids`` [B, T] and the forward's other inputs."""
        hidden: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], as the model's own forward gives them."""
        return self._after(self.lm_head(hidden))

    def _after(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def inside(self, work: Callable[[], _T]) -> _T:
        """Calls ``work`` instead of the model's forward, where FSDP2 has gathered both halves."""
        return as_forward_of(self.student, work)

    def evaluated(self) -> AbstractContextManager[None]:
        """A context with the whole model in evaluation mode: no dropout, also in adapters."""
        return _eval_mode(self.student)

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters between hidden states and logits; if tied, also the embedding."""
        return [parameter for parameter in self.lm_head.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _check(self, causal: PreTrainedModel) -> None:
        device = causal.get_input_embeddings().weight.device
        input_ids = torch.randint(
            self.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0)
        ).to(device)
        with _eval_mode(causal):
            expected = causal(input_ids=input_ids, use_cache=False).logits
            found = self.logits(self.hidden(input_ids=input_ids))
        error, size = (found - expected).abs().max().item(), expected.abs().max().item()
        # The hidden states may be rounded in another order; a missing scale or cap is a far larger
        # difference. Under autocast the lm_head computes in half precision, even if the model
        # widens its logits.
        rounding = max(torch.finfo(logits.dtype).eps for logits in (expected, found))
        if not error <= max(8 * rounding, 1e-4) * size:
            raise UserError(
                f"{self.architecture} treats its logits in a way not known here: what its lm_head gives differs by "
                f"{error:.3g} from logits of up to {size:.3g}; use another student, or extend _after_lm_head"
            )


def _after_lm_head(config: Any) -> tuple[float, float | None]:
    """(scale, softcap): the operations after the lm_head, from the fields of the config."""
    scale = 1.0
    for field in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, field, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    scale *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next(
        (cap for cap in (getattr(config, field, None) for field in caps) if cap is not None), None
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored module by module, because frozen parts may always be in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def as_forward_of(module: nn.Module, work: Callable[..., _T], *args: Any) -> _T:
    """Calls ``work(*args)`` instead of the module's own forward, with the module's hooks."""
    own = vars(module).get("forward")
    module.forward = work  # type: ignore[method-assign]
    try:
        return cast(_T, module(*args))
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
