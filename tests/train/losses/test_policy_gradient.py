"""The policy gradient against its definition over the whole vocabulary, and against the reverse KL
that it estimates.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses import LOSSES, SparseTeacher

P, V = 40, 30


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)


def scored(log_p: Tensor, log_w: Tensor, targets: Tensor) -> SparseTeacher:
    """Tokens of a writer as a cache with a head of one entry has them."""
    top = log_p.topk(1)
    return SparseTeacher(
        ids=top.indices,
        logprobs=top.values,
        tail_logprob=torch.log1p(-top.values.exp().squeeze(1)),
        target_ids=targets,
        target_logprob=log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        vocab_size=V,
        writer_logprob=log_w.gather(1, targets.unsqueeze(1)).squeeze(1),
    )


@pytest.mark.parametrize("clip", [None, 0.2, 0.0])
def test_the_definition(draw, clip):
    """Values and gradients, written a second time with cases instead of a minimum."""
    log_p, log_w = (normal(draw, P, V).log_softmax(1) for _ in range(2))
    z = (log_w + 0.3 * normal(draw, P, V)).requires_grad_()
    targets = torch.multinomial(log_w.exp(), 1, generator=draw).squeeze(1)
    found = LOSSES["policy_gradient"](z, scored(log_p, log_w, targets), clip=clip)
    rows, expected, clipped = torch.arange(P), [], 0
    for row in rows.tolist():
        y = int(targets[row])
        ratio = z[row].log_softmax(0)[y].exp() / log_w[row, y].exp()
        advantage = float(log_p[row, y] - log_w[row, y])
        if clip is not None and advantage > 0 and float(ratio) > 1 + clip:
            ratio, clipped = torch.tensor(1 + clip, dtype=torch.float64), clipped + 1
        elif clip is not None and advantage < 0 and float(ratio) < 1 - clip:
            ratio, clipped = torch.tensor(1 - clip, dtype=torch.float64), clipped + 1
        expected.append(-ratio * advantage)
    truth = torch.stack(expected)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(each.sum(), z)[0] for each in (found, truth)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert (clipped > 3) == (clip is not None)


def test_its_mean_is_the_gradient_of_reverse_kl(draw):
    """Over all tokens, each as often as the student samples it."""
    log_p = normal(draw, 1, V).log_softmax(1)
    z = normal(draw, 1, V).requires_grad_()
    log_q = z.log_softmax(1)
    (expected,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), z)
    every = torch.arange(V)
    with torch.no_grad():
        written = z.log_softmax(1)
    teacher = scored(log_p.repeat(V, 1), written.repeat(V, 1), every)
    values = LOSSES["policy_gradient"](z.repeat(V, 1), teacher)
    (found,) = torch.autograd.grad((written[0].exp() * values).sum(), z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert math.isclose(
        float((written[0].exp() * values.detach()).sum()),
        float((written.exp() * (written - log_p)).sum()),
    )


def test_text_of_nobody_is_refused(draw):
    log_p = normal(draw, 3, V).log_softmax(1)
    teacher = scored(log_p, log_p, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="no logprobs of the model that wrote its text"):
        LOSSES["policy_gradient"](log_p, dataclasses.replace(teacher, writer_logprob=None))
    with pytest.raises(UserError, match="clip is -1"):
        LOSSES["policy_gradient"](log_p, teacher, clip=-1)
