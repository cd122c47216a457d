"""Losses with a cache that does not know the mass outside its heads, or some targets' logprobs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from logitcask.cache_format import UserError
from logitcask.train.losses import LOSSES, SparseTeacher
from logitcask.train.losses.exactness import exactness_of

K, V, P = 6, 30, 40
RENORMALISED = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"}
ORDER = {"listmle", "pairwise_logistic", "bild", "ranking", "dpkd_token", "ce"}


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64) * 2


@pytest.fixture
def dense(draw):
    """The teacher's logits."""
    return normal(draw, P, V)


@pytest.fixture
def known(draw, dense):
    """A teacher with the mass of its tails."""
    logprobs, ids = dense.log_softmax(1).topk(K)
    targets = torch.randint(0, V, (P,), generator=draw)
    rest = dense.log_softmax(1).scatter(1, ids, -torch.inf).logsumexp(1)
    of_targets = dense.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return SparseTeacher(ids, logprobs, rest, targets, of_targets, V)


def without_tail(teacher):
    """The same heads, with logprobs up to a constant of each position, as an import of logits
    has them.
    """
    shift = teacher.logprobs.logsumexp(1)
    return replace(
        teacher,
        logprobs=teacher.logprobs - shift[:, None],
        tail_logprob=torch.full_like(teacher.tail_logprob, torch.nan),
        target_logprob=torch.where(
            (teacher.ids == teacher.target_ids[:, None]).any(1),
            teacher.target_logprob - shift,
            torch.nan,
        ),
        tail_known=False,
        targets_known=False,
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_renormalises_needs_no_tail_or_is_refused(name, draw, known):
    teacher, logits = without_tail(known), normal(draw, P, V).requires_grad_()
    if name in RENORMALISED | ORDER:
        value = LOSSES[name](logits, teacher)
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), logits)[0]).all()
        if name in RENORMALISED:
            assert exactness_of(name, {}, teacher, K) == "biased"
            explicit = LOSSES[name](logits, teacher, tail="renormalised")
            assert torch.equal(value, explicit)
            assert torch.allclose(value, LOSSES[name](logits, known, tail="renormalised"))
            with pytest.raises(UserError, match=f"{name} with tail 'ghost' needs the mass outside"):
                LOSSES[name](logits, teacher, tail="ghost")
    else:
        with pytest.raises(
            UserError,
            match=r"needs the mass outside each head|no tail samples|no logprobs of the model that wrote|not read in pairs",
        ):
            LOSSES[name](logits, teacher)


def test_the_renormalised_kl_is_that_of_the_heads(draw, dense, known):
    logits = normal(draw, P, V)
    p = dense.gather(1, known.ids).log_softmax(1)
    q = logits.gather(1, known.ids).log_softmax(1)
    truth = (p.exp() * (p - q)).sum(1)
    assert torch.allclose(LOSSES["forward_kl"](logits, without_tail(known)), truth)


@pytest.mark.parametrize("name", ["listmle", "pairwise_logistic"])
def test_losses_on_the_order_are_those_of_the_whole_cache(name, draw, known):
    logits = normal(draw, P, V)
    assert torch.equal(LOSSES[name](logits, known), LOSSES[name](logits, without_tail(known)))
    assert exactness_of(name, {"k": K}, without_tail(known), K) == "exact"


def test_an_unknown_target_is_not_taken_for_a_known_one(draw, known):
    unknown = replace(
        known,
        target_logprob=torch.full_like(known.target_logprob, torch.nan),
        targets_known=False,
    )
    outside = ~(known.ids == known.target_ids[:, None]).any(1)
    logprobs, stored = unknown.known(known.target_ids[:, None])
    assert not stored[outside].any()
    assert torch.equal(
        logprobs[outside, 0], torch.minimum(known.tail_logprob, known.least)[outside]
    )
    assert stored[~outside].all()
    with pytest.raises(UserError, match="self_evolution needs the teacher's logprob of every next"):
        LOSSES["self_evolution"](normal(draw, P, V), unknown)
    assert torch.isfinite(LOSSES["dpkd_token"](normal(draw, P, V), unknown)).all()
    assert torch.equal(
        LOSSES["forward_kl"](logits := normal(draw, P, V), unknown),
        LOSSES["forward_kl"](logits, known),
    )
