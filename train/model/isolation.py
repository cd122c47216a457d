"""The check that a student separates packed sequences, on a few random tokens before training.

Some architectures do not: recurrent models carry state from one sequence to the next, and others
compute their own positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.data.packing import borders
from logitcask.train.head.lm_head import LogitsHead

_MODEL_TOLERANCE = 2e-5
"""Of hidden states in float32, packed against apart, as a share of the largest; they differ in
the order of sums.
"""


def wants_flat(head: LogitsHead) -> bool:
    """Whether the student's attention separates sequences only in a single row (flash)."""
    return "flash" in (getattr(head.backbone.config, "_attn_implementation", None) or "")


@torch.no_grad()
def check_isolation(head: LogitsHead) -> None:
    """Raises UserError if packing changes the student's hidden states, on a few random tokens.

    The hidden states of packed sequences must equal those of the separate sequences, and must not
    change if the other sequences of the row change.
    """
    device = next(head.backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    apart = [torch.randint(head.vocab_size, (n,), generator=generator) for n in (11, 7, 5)]
    other = [
        *(torch.randint(head.vocab_size, (n,), generator=generator) for n in (11, 7)),
        apart[2],
    ]
    with head.evaluated():
        expected = torch.cat([head.hidden(input_ids=ids[None].to(device))[0] for ids in apart])
        found = _hidden_packed(head, apart, device)
        leak = (_hidden_packed(head, other, device) - found)[-len(apart[2]) :].abs().max().item()
    size, error = expected.abs().max().item(), (found - expected).abs().max().item()
    rounding = torch.finfo(expected.dtype).eps
    # The last norm may enlarge rounding errors of half precision.
    if torch.is_autocast_enabled(device.type):
        rounding = max(rounding, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    if not (leak <= rounding * size and error <= max(_MODEL_TOLERANCE, 8 * rounding) * size):
        raise UserError(
            f"{head.architecture} does not keep packed sequences apart: hidden states of up to {size:.3g} differ by "
            f"{error:.3g} from those of the sequences alone; set data.packing to false (data.group_by_length also saves "
            "padding), or use another student"
        )


def _hidden_packed(head: LogitsHead, documents: list[Tensor], device: torch.device) -> Tensor:
    """Hidden states [all tokens, H] of documents read in one row."""
    lengths = [len(ids) for ids in documents]
    inputs: dict[str, Any] = {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        **(borders(lengths) if wants_flat(head) else {}),
    }
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    return head.hidden(**inputs)[0]
