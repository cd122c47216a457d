"""The search for trainable parameters that a backward pass may leave without gradient."""

from __future__ import annotations

from typing import Any

import torch

from logitcask.train.head.lm_head import LogitsHead


def may_go_unused(head: LogitsHead) -> bool:
    """Whether a backward pass may leave a trainable parameter without gradient. DDP must then
    search for such parameters at every step.

    True if the graph of one token does not reach a parameter (an expert that is not chosen, a layer
    that text does not pass), or if the student's config leaves out layers at random.
    """
    student: Any = head.student
    config = student.config.get_text_config(decoder=True).to_dict()
    if any(value for name, value in config.items() if "layerdrop" in name):
        return True
    device = next(head.backbone.parameters()).device
    with head.evaluated(), torch.enable_grad():
        hidden = head.hidden(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    reached = {id(weight) for weight in head.parameters()}
    nodes, seen = [hidden.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            reached.add(id(getattr(node, "variable", None)))  # a leaf's
    return any(
        weight.requires_grad and id(weight) not in reached for weight in student.parameters()
    )
