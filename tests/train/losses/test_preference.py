"""Direct preference distillation of texts against the paper's formula over whole logits, by autograd
in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.data.batch import Place
from logitcask.train.data.pairs import number_of_pairs, pair_texts, positions_of_pairs
from logitcask.train.losses import LOSSES, SparseTeacher

V = 30
LAYOUT = [
    Place(0, 9, 4, 4),  # of no pair
    Place(1, 9, 3, 3, (7, True)),
    Place(1, 9, 6, 6, (2, True)),
    Place(2, 9, 5, 5, (7, False)),
    Place(2, 9, 2, 2, (2, False)),
]
"""Two pairs, numbered like the units of a batch, whose texts are parted by other texts."""
STARTS = [0, 4, 7, 13, 18, 20]
PAIRS = [(1, 3), (2, 4)]


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)


def scored(log_p: Tensor, targets: Tensor) -> SparseTeacher:
    top = log_p.topk(1)
    return SparseTeacher(
        ids=top.indices,
        logprobs=top.values,
        tail_logprob=torch.log1p(-top.values.exp().squeeze(1)),
        target_ids=targets,
        target_logprob=log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        vocab_size=V,
    )


def dense(z: Tensor, log_p: Tensor, targets: Tensor, options: dict[str, float | bool]) -> Tensor:
    """The mean of the paper's loss over the pairs, one token after the other."""
    log_q, beta, lm = z.log_softmax(1), options.get("beta", 0.1), options.get("lm", 0.5)
    losses = []
    for pair in PAIRS:
        ratios, sums = [], []
        for text in pair:
            rows = range(STARTS[text], STARTS[text + 1])
            each_q = [log_q[row, targets[row]] for row in rows]
            each_p = [log_p[row, targets[row]] for row in rows]
            ratio = sum(each_q) - sum(each_p)
            normalised = options.get("length_normalised", True)
            ratios.append(ratio / len(rows) if normalised else ratio)
            sums.append(sum(each_q) / len(rows))
        preference = -torch.log(1 / (1 + torch.exp(-beta * (ratios[0] - ratios[1]))))
        losses.append(preference - lm * sums[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "options", [{}, {"lm": 0.0}, {"length_normalised": False}, {"beta": 1.5, "lm": 2.0}]
)
def test_the_mean_over_the_positions_of_pairs_is_that_over_pairs(draw, options):
    log_p, z = normal(draw, STARTS[-1], V).log_softmax(1), normal(draw, STARTS[-1], V)
    targets = torch.randint(V, (STARTS[-1],), generator=draw)
    teacher = scored(log_p, targets)
    z.requires_grad_()
    log_q = z.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    positions, pairs = positions_of_pairs(LAYOUT), number_of_pairs(LAYOUT)
    assert (positions, pairs) == (16, 2)
    teacher = replace(
        teacher, pairs=pair_texts(LAYOUT, log_q, teacher.target_logprob, positions / pairs)
    )
    values = LOSSES["dpkd_sequence"](z, teacher, **options)[STARTS[1] :]
    found, truth = values.mean(), dense(z, log_p, targets, options)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(each, z, retain_graph=True)[0] for each in (found, truth)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0][: STARTS[1]].abs().max() == 0
    # All positions of a pair have one value, and those of the two pairs different ones.
    assert values[:3].std() < 1e-12
    assert abs(values[0] - values[3]) > 1e-3


def test_what_is_refused(draw):
    log_p, z = normal(draw, 4, V).log_softmax(1), normal(draw, 4, V)
    alone = scored(log_p, torch.zeros(4, dtype=torch.int64))
    loss = LOSSES["dpkd_sequence"]
    with pytest.raises(UserError, match="not read in pairs"):
        loss(z, alone)
    teacher = replace(
        alone, pairs=pair_texts([Place(0, 9, 4, 4)], z[:, 0], alone.target_logprob, 1.0)
    )
    assert math.isfinite(loss(z, teacher).sum())
    with pytest.raises(UserError, match="beta is 0"):
        loss(z, teacher, beta=0)
    with pytest.raises(UserError, match="lm is -1"):
        loss(z, teacher, lm=-1)
    # Of an imported cache that knows no tails, the targets are enough.
    unknown = torch.full_like(teacher.tail_logprob, torch.nan)
    without = replace(teacher, tail_logprob=unknown, tail_known=False)
    assert torch.equal(loss(z, without), loss(z, teacher))
    with pytest.raises(UserError, match="does not know the teacher's logprobs"):
        loss(z, replace(teacher, targets_known=False))
