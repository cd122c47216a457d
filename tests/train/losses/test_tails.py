"""What stands for the tail in forward_kl: draws without bias, the prior exactly, and the best of
what a cache has.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses import SparseTeacher, TailDraws, forward_kl
from logitcask.train.losses.tails import tail_of

P, V, K, S, SETS = 12, 300, 6, 8, 2000


def peaked(draw: torch.Generator, positions: int = P, vocab: int = V) -> Tensor:
    return (2.5 * torch.randn(positions, vocab, generator=draw, dtype=torch.float64)).log_softmax(1)


def head_of(log_p: Tensor, k: int = K) -> SparseTeacher:
    top = log_p.topk(k)
    return SparseTeacher(
        ids=top.indices,
        logprobs=top.values,
        tail_logprob=torch.log1p(-top.values.exp().sum(1)),
        target_ids=top.indices[:, 0],
        target_logprob=top.values[:, 0],
        vocab_size=log_p.shape[1],
    )


def with_draws(
    draw: torch.Generator, log_p: Tensor, teacher: SparseTeacher, count: int
) -> SparseTeacher:
    """``count`` independent draws from each tail, their logprobs, and the entropies."""
    tail = log_p.exp().scatter(1, teacher.ids, 0)
    samples = torch.multinomial(tail, count, replacement=True, generator=draw)
    return dataclasses.replace(
        teacher,
        draws=TailDraws(samples, log_p.gather(1, samples)),
        entropy=-(log_p.exp() * log_p).sum(1),
    )


def dense_kl(log_p: Tensor, logits: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - logits.log_softmax(1)[:, : log_p.shape[1]])).sum(1)


def biased(logits: Tensor, teacher: SparseTeacher) -> Tensor:
    """The twin that a slip would give: the draws counted as if they made up the whole of the
    tail's mass but one draw's.
    """
    less = teacher.tail_logprob + torch.log(torch.tensor((S - 1) / S))
    return forward_kl(logits, dataclasses.replace(teacher, tail_logprob=less))


def sets_of(drawn: SparseTeacher, known: str) -> SparseTeacher:
    """SETS times the P positions of ``drawn``, each time with the next S of its draws."""

    def parts(draws: Tensor) -> Tensor:
        return draws.view(P, SETS, S).transpose(0, 1).reshape(SETS * P, S)

    rows = {
        name: value.repeat(SETS, *[1] * (value.ndim - 1))
        for name in ("ids", "logprobs", "tail_logprob", "target_ids", "target_logprob", "entropy")
        if isinstance(value := getattr(drawn, name), Tensor)
    }
    draws = TailDraws(
        parts(drawn.draws.ids), parts(drawn.draws.logprobs) if known == "logprobs" else None
    )
    return dataclasses.replace(
        drawn, **rows | {"draws": draws, "entropy": rows["entropy"] if known == "entropy" else None}
    )


@pytest.mark.parametrize("known", ["entropy", "logprobs"])
def test_draws_make_value_and_gradient_unbiased(draw: torch.Generator, known: str) -> None:
    """Over 2,000 fresh sets the mean lies within 4 standard errors of the dense value; a biased
    twin's does not.
    """
    log_p, logits = peaked(draw), 2 * torch.randn(P, V, generator=draw, dtype=torch.float64)
    direction = torch.randn(P, V, generator=draw, dtype=torch.float64)
    teacher = head_of(log_p)
    drawn = with_draws(draw, log_p, teacher, S * SETS)
    truth = logits.clone().requires_grad_()
    dense = dense_kl(log_p, truth)
    (dense_gradient,) = torch.autograd.grad(dense.sum(), truth)
    expected = torch.stack([dense.sum().detach(), (dense_gradient * direction).sum()])
    for loss in (forward_kl, biased):
        student = logits.repeat(SETS, 1).requires_grad_()
        value = loss(student, sets_of(drawn, known))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        along = (gradient.view(SETS, P, V) * direction).sum((1, 2))
        each = torch.stack([value.detach().view(SETS, P).sum(1), along], dim=1)
        errors = (each.mean(0) - expected).abs() / (each.std(0) / SETS**0.5)
        assert (errors < 4).all() if loss is forward_kl else errors[0] > 8, (loss.__name__, errors)


def test_draws_of_every_id_are_the_dense_kl(draw: torch.Generator) -> None:
    """No head, and each id drawn as often as its probability asks for: nothing is left to
    chance.
    """
    counts = torch.randint(1, 5, (7, 20), generator=draw)
    log_p = (counts / counts.sum(1, keepdim=True)).double().log()
    most = int(counts.sum(1).max())
    samples = torch.full((7, most), -1)
    for row in range(7):
        ids = torch.repeat_interleave(torch.arange(20), counts[row])
        samples[row, : len(ids)] = ids
    nothing = torch.empty(7, 0)
    teacher = SparseTeacher(
        nothing.long(), nothing.double(), torch.zeros(7), samples[:, 0], torch.zeros(7), 20, draws=TailDraws(samples),
        entropy=-(log_p.exp() * log_p).sum(1),
    )  # fmt: skip
    logits = torch.randn(7, 23, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(
        forward_kl(logits, teacher), dense_kl(log_p, logits), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("unpredictable", [0, 9])
def test_the_prior_is_the_dense_kl_to_the_reconstruction(
    draw: torch.Generator, unpredictable: int
) -> None:
    log_p = peaked(draw)
    prior = torch.rand(V, generator=draw, dtype=torch.float64).square()
    teacher = dataclasses.replace(head_of(log_p), prior=prior / prior.sum())
    outside = teacher.prior.expand(P, V).scatter(1, teacher.ids, 0)
    spread = outside / outside.sum(1, keepdim=True) * teacher.tail_logprob.exp().unsqueeze(1)
    rebuilt = spread.scatter(1, teacher.ids, teacher.logprobs.exp()).log()
    logits = torch.randn(P, V + unpredictable, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(
        forward_kl(logits, teacher, tail="prior"), dense_kl(rebuilt, logits), atol=1e-12, rtol=0
    )
    gradients = [
        torch.autograd.grad(loss(z).sum(), z)[0]
        for loss in (lambda z: forward_kl(z, teacher, tail="prior"), lambda z: dense_kl(rebuilt, z))
        for z in [logits.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tail", ["samples", "prior"])
def test_gradcheck(draw: torch.Generator, tail: str) -> None:
    log_p = peaked(draw, 4, 15)
    teacher = with_draws(draw, log_p, head_of(log_p, 3), 5)
    teacher = dataclasses.replace(
        teacher, prior=torch.softmax(torch.randn(15, generator=draw), 0).double()
    )
    teacher.draws.ids[0, 3:] = -1
    logits = torch.randn(4, 17, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, teacher, tail=tail), logits)


def test_the_best_of_what_there_is(draw: torch.Generator) -> None:
    """Samples, else the ghost; each can be asked for by name, and what is missing is refused."""
    log_p, logits = peaked(draw), torch.randn(P, V, generator=draw, dtype=torch.float64)
    ghost = head_of(log_p)
    prior = dataclasses.replace(ghost, prior=torch.full((V,), 1 / V, dtype=torch.float64))
    samples = with_draws(draw, log_p, prior, S)
    assert [tail_of(teacher) for teacher in (ghost, prior, samples)] == [
        "ghost",
        "ghost",
        "samples",
    ]
    for teacher, tail in ((ghost, "ghost"), (prior, "ghost"), (samples, "samples")):
        torch.testing.assert_close(
            forward_kl(logits, teacher), forward_kl(logits, teacher, tail=tail)
        )
        torch.testing.assert_close(
            forward_kl(logits, ghost), forward_kl(logits, teacher, tail="ghost")
        )
    undated = dataclasses.replace(samples, entropy=None, draws=TailDraws(samples.draws.ids))
    assert tail_of(undated) == "ghost"
    for teacher, tail in ((ghost, "samples"), (ghost, "prior"), (undated, "samples")):
        with pytest.raises(UserError, match="but the cache has no"):
            forward_kl(logits, teacher, tail=tail)
    with pytest.raises(UserError, match="expected auto, samples, ghost, prior or renormalised"):
        forward_kl(logits, ghost, tail="none")


def test_positions_are_independent(draw: torch.Generator) -> None:
    log_p, logits = peaked(draw), torch.randn(P, V, generator=draw)
    teacher = dataclasses.replace(
        with_draws(draw, log_p, head_of(log_p), S), prior=torch.full((V,), 1 / V)
    )
    for tail in ("samples", "prior"):
        whole = forward_kl(logits, teacher, tail=tail)
        torch.testing.assert_close(forward_kl(logits[3:7], teacher[3:7], tail=tail), whole[3:7])
        assert forward_kl(logits[:0], teacher[:0], tail=tail).shape == (0,)
