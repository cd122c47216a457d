"""The check of losses passes for right ones and finds every kind of wrong one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from logitcask.train.losses import LOSSES, SPECS, StudentPass
from logitcask.train.losses.check import check_loss, sparse_teacher, with_draws
from logitcask.train.losses.tails import cells


def forward(p, logits, target_ids):
    return (torch.xlogy(p, p) - p * logits.log_softmax(1)).sum(1)


def skewed(p, logits, target_ids):
    q = logits.softmax(1)
    return (torch.xlogy(p, p) - torch.xlogy(p, 0.7 * p + 0.3 * q)).sum(1)


def labels(p, logits, target_ids):
    return -logits.log_softmax(1).gather(1, target_ids[:, None]).squeeze(1)


def pairs(p, logits, target_ids):
    order = p.argsort(dim=1, descending=True)[:, :3]
    z = logits.gather(1, order)
    apart = torch.stack([z[:, 0] - z[:, 1], z[:, 0] - z[:, 2], z[:, 1] - z[:, 2]])
    return torch.nn.functional.softplus(-apart).mean(0)


@pytest.mark.parametrize(
    ("name", "definition", "options"),
    [
        ("forward_kl", forward, {}),
        ("skew_kl", skewed, {"alpha": 0.7}),
        ("ce", labels, {}),
        ("pairwise_logistic", pairs, {"k": 3}),
    ],
)
def test_losses_of_ours(name, definition, options):
    check_loss(name, definition, **options)


@pytest.fixture
def lie(monkeypatch):
    """``lie(function, **claims)``: enters it as a loss that forward_kl's description fits, but for
    the claims.
    """

    def enter(function, **claims):
        monkeypatch.setitem(LOSSES, "forward_kl", function)
        monkeypatch.setitem(SPECS, "forward_kl", dataclasses.replace(SPECS["forward_kl"], **claims))

    monkeypatch.setattr("logitcask.train.losses.others.is_own", lambda function: True)
    return enter


TRUE = LOSSES["forward_kl"]


def ghost(student_logits, teacher, **options):
    return TRUE(student_logits, teacher, tail="ghost")


def without_unpredictable_ids(student_logits, teacher, **options):
    return TRUE(student_logits[:, : teacher.vocab_size], teacher)


def of_the_head_alone(student_logits, teacher, **options):
    log_p, log_q, _ = cells(StudentPass.of(student_logits, teacher), teacher, renormalised=True)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def with_a_wrong_gradient(student_logits, teacher, **options):
    value = TRUE(student_logits, teacher)
    return value + 0.01 * (student_logits[:, 0] - student_logits[:, 0].detach())


def with_a_wrong_mean(student_logits, teacher, **options):
    """One draw in four counts twice."""
    draws = teacher.draws
    if draws is not None:
        ids = torch.cat([draws.ids, draws.ids[:, :1]], 1)
        draws = dataclasses.replace(draws, ids=ids, logprobs=None)
        teacher = dataclasses.replace(teacher, draws=draws)
        return TRUE(student_logits, teacher) + 0.02 * draws.ids[:, 0]
    return TRUE(student_logits, teacher)


def reduced(student_logits, teacher, **options):
    return TRUE(student_logits, teacher).mean()


@pytest.mark.parametrize(
    ("function", "claims", "message"),
    [
        (TRUE, {"from_head": "exact"}, "with heads alone: values are not exact: .* off"),
        (ghost, {}, r"with 4 draws: values are not unbiased: a mean over 4000 sets of draws is"),
        (without_unpredictable_ids, {}, "with whole heads: values are not exact"),
        (of_the_head_alone, {"from_head": "exact"}, "with whole heads: values are not exact"),
        (with_a_wrong_gradient, {}, "with whole heads: gradients are not exact: 0.0"),
        (with_a_wrong_mean, {}, "with 4 draws: values are not unbiased"),
        (lambda *a, **k: TRUE(*a) + 1e-6, {}, "with whole heads: values are not exact: 1e-06 off"),
        (reduced, {}, r"values of shape \(\), expected \(24,\)"),
        (TRUE, {"from_head": "unbiased"}, "no draws are used, so there is no mean"),
    ],
)
def test_what_is_not_so_is_found(lie, function, claims, message):
    lie(function, **claims)
    with pytest.raises(AssertionError, match=message):
        check_loss("forward_kl", forward)


def test_a_value_above_the_definition_is_no_lower_bound(lie):
    def above(student_logits, teacher, **options):
        tail = teacher.tail_logprob.exp()
        return TRUE(student_logits, teacher) + 5 * tail

    lie(above, from_samples=None)
    with pytest.raises(AssertionError, match=r"with heads alone: values are not lower: .* above"):
        check_loss("forward_kl", forward)


def test_the_teachers_that_it_makes(draw):
    log_p = torch.randn(6, 12, generator=draw, dtype=torch.float64).log_softmax(1)
    targets = torch.arange(6)
    teacher = sparse_teacher(log_p, targets, 4)
    p = log_p.exp()
    for row in range(6):
        order = sorted(range(12), key=lambda v, row=row: -float(p[row, v]))
        assert teacher.ids[row].tolist() == order[:4]
        rest = [float(p[row, v]) for v in order[4:]]
        assert float(teacher.tail_logprob[row].exp()) == pytest.approx(sum(rest), rel=1e-12)
        assert float(teacher.target_logprob[row]) == float(log_p[row, row])
        assert float(teacher.entropy[row]) == pytest.approx(
            -sum(float(x) * float(x.log()) for x in p[row]), rel=1e-12
        )
    drawn = with_draws(teacher, log_p, 500, draw).draws
    counts = torch.stack([row.bincount(minlength=12) for row in drawn.ids])
    assert not counts.gather(1, teacher.ids).any()
    outside = p.scatter(1, teacher.ids, 0.0)
    expected = 500 * outside / outside.sum(1, keepdim=True)
    assert ((counts - expected).abs() <= 5 * expected.clamp_min(1).sqrt()).all()
    torch.testing.assert_close(drawn.logprobs, log_p.gather(1, drawn.ids))
