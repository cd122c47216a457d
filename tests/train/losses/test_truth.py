"""Every loss against its own definition over the whole vocabulary, written here a second time, in
float64.

Whole heads give the definition's value and gradient; a prior gives those of the reconstruction;
what is called a lower bound is never above; what is called unbiased has the right mean, and a twin
that is off by one draw in eight has not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses import (
    LOSSES,
    SPECS,
    PairTexts,
    SparseTeacher,
    StudentPass,
    TailDraws,
)

V = 40
Truth = Callable[..., Tensor]


def normal(draw: torch.Generator, *shape: int, scale: float = 2.5) -> Tensor:
    return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)


def teacher_of(
    log_p: Tensor, k: int | Tensor, draw: torch.Generator, *, width: int | None = None
) -> SparseTeacher:
    """What a cache would hold of these distributions, unrounded; the targets are drawn from
    them.
    """
    k_P1 = torch.as_tensor(k).expand(len(log_p)).unsqueeze(1)
    values, ids = log_p.sort(dim=1, descending=True, stable=True)
    inside = torch.arange(log_p.shape[1]) < k_P1
    extra = max(0, (width or 0) - log_p.shape[1])
    pad = torch.nn.functional.pad
    cut = width or int(k_P1.max())
    target = torch.multinomial(log_p.exp(), 1, generator=draw)
    return SparseTeacher(
        ids=pad(ids.masked_fill(~inside, -1), (0, extra), value=-1)[:, :cut],
        logprobs=pad(values.masked_fill(~inside, -math.inf), (0, extra), value=-math.inf)[:, :cut],
        tail_logprob=values.masked_fill(inside, -math.inf).logsumexp(1),
        target_ids=target.squeeze(1),
        target_logprob=log_p.gather(1, target).squeeze(1),
        vocab_size=log_p.shape[1],
        entropy=-(log_p.exp() * log_p).sum(1),
        writer_logprob=log_p.gather(1, target).squeeze(1) - 0.5,
        pairs=pairs_of(log_p.gather(1, target).squeeze(1)),
    )


def pairs_of(log_p: Tensor) -> PairTexts:
    """Each position as one of a preferred text of 3 tokens, beside a text of 2."""
    both = torch.stack([3 * log_p, 2 * log_p - 1], 1)
    tokens = torch.tensor([3.0, 2.0]).expand(len(log_p), 2)
    share = torch.full_like(log_p, 0.2)
    return PairTexts(torch.ones_like(log_p, dtype=torch.bool), both - 0.5, both, tokens, share)


def with_draws(
    draw: torch.Generator, log_p: Tensor, teacher: SparseTeacher, count: int
) -> SparseTeacher:
    tail = log_p.exp()
    for row, ids in zip(tail, teacher.ids, strict=True):
        row[ids[ids >= 0]] = 0
    samples = torch.multinomial(tail, count, replacement=True, generator=draw)
    return dataclasses.replace(teacher, draws=TailDraws(samples, log_p.gather(1, samples)))


# The definitions. p has zeros where the student has ids that the teacher does not know.


def both(log_p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.pad(log_p.exp(), (0, z.shape[1] - log_p.shape[1])), z.softmax(1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(1)


def reverse(log_p: Tensor, z: Tensor, target: Tensor) -> Tensor:
    known = z.softmax(1)[:, : log_p.shape[1]].sum(1)
    return kl(z[:, : log_p.shape[1]].softmax(1), log_p.exp()) - known.log()


def jensen_shannon(log_p: Tensor, z: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    p, q = both(log_p, z)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def skew(log_p: Tensor, z: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    p, q = both(log_p, z)
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse(log_p: Tensor, z: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    p, q = both(log_p, z)
    return kl(q, (1 - alpha) * p + alpha * q)


def total_variation(log_p: Tensor, z: Tensor, target: Tensor) -> Tensor:
    p, q = both(log_p, z)
    return (p - q).abs().sum(1) / 2


def alpha_beta(
    log_p: Tensor, z: Tensor, target: Tensor, alpha: float = 0.2, beta: float = 0.7
) -> Tensor:
    p, q = both(log_p, z)
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum(1) / (alpha * beta)


def adaptive(log_p: Tensor, z: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    p, q = both(log_p, z)
    falling, order = p.sort(dim=1, descending=True, stable=True)
    peaks = falling.cumsum(1) <= threshold
    peaks[:, 0] = True
    apart = (falling - q.detach().gather(1, order)).abs()
    w = (apart * peaks).sum(1) / apart.sum(1)
    return w * kl(p, q) + (1 - w) * reverse(log_p, z, target)


def tail_aware(
    log_p: Tensor,
    z: Tensor,
    target: Tensor,
    k: int = 10,
    beta: float = 2.0,
    mean_tail_mass: float | None = None,
) -> Tensor:
    p, q = both(log_p, z)
    order = p.argsort(dim=1, descending=True, stable=True)
    p, q = p.gather(1, order), q.gather(1, order)
    size = log_p.shape[1]
    m, Q = p[:, k:].sum(1, keepdim=True), q[:, k:size].sum(1, keepdim=True)
    coarse = kl(torch.cat([p[:, :k], m], 1), torch.cat([q[:, :k], Q], 1))
    mean = m.mean() if mean_tail_mass is None else mean_tail_mass
    return coarse + beta * m.squeeze(1) / mean * kl(p[:, k:size] / m, q[:, k:size] / Q)


def taid(log_p: Tensor, z: Tensor, target: Tensor, t: float = 0.4) -> Tensor:
    log_q = z.log_softmax(1)[:, : log_p.shape[1]]
    return -(((1 - t) * log_q.detach() + t * log_p).softmax(1) * log_q).sum(1)


def self_evolution(
    log_p: Tensor,
    z: Tensor,
    target: Tensor,
    ground_truth: float = 0.5,
    mix: float = 0.5,
    threshold: float = 1.0,
) -> Tensor:
    p, q = both(log_p, z)
    hard = torch.nn.functional.one_hot(target, z.shape[1]).double()
    t = ground_truth * hard + (1 - ground_truth) * p
    return torch.where(kl(t, q) > threshold, kl(t, mix * t + (1 - mix) * q), kl(t, q))


def listmle(
    log_p: Tensor, z: Tensor, target: Tensor, k: int = 10, temperature: float = 1.0
) -> Tensor:
    order = log_p.argsort(dim=1, descending=True, stable=True)[:, :k]
    left, total = z / temperature, torch.zeros(len(z), dtype=z.dtype)
    for ids in order.unbind(1):
        total = total - left.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
        left = left.scatter(1, ids[:, None], -math.inf)
    return total


def pairwise(
    log_p: Tensor,
    z: Tensor,
    target: Tensor,
    k: int = 10,
    temperature: float = 1.0,
    targets: str = "hard",
) -> Tensor:
    order = log_p.argsort(dim=1, descending=True, stable=True)
    total, pairs = torch.zeros(len(z), dtype=z.dtype), 0
    for i in range(k):
        for j in range(i + 1, k):
            d, e = (
                (x.gather(1, order[:, [i]]) - x.gather(1, order[:, [j]])) / temperature
                for x in (z, log_p)
            )
            share = torch.sigmoid(e) if targets == "soft" else torch.ones_like(e)
            total = total - (
                share * torch.sigmoid(d).log() + (1 - share) * torch.sigmoid(-d).log()
            ).squeeze(1)
            pairs += 1
    return total / pairs


def bild(
    log_p: Tensor,
    z: Tensor,
    target: Tensor,
    k: int = 8,
    temperature: float = 3.0,
    sides: str = "both",
) -> Tensor:
    total = torch.zeros(len(z), dtype=z.dtype)
    for led_by in (log_p, z)[: 2 if sides == "both" else 1]:
        ids = led_by.argsort(dim=1, descending=True, stable=True)[:, :k]
        i, j = np.triu_indices(k, 1)
        d_p, d_q = (
            (x.gather(1, ids)[:, i] - x.gather(1, ids)[:, j]) / temperature for x in (log_p, z)
        )
        total = total + kl(d_p.softmax(1), d_q.softmax(1))
    return total


def preference(log_p: Tensor, z: Tensor, target: Tensor, beta: float = 0.1) -> Tensor:
    log_q, best, ours = (
        z.log_softmax(1),
        log_p.argsort(dim=1, descending=True, stable=True)[:, :1],
        z.argmax(1, keepdim=True),
    )
    margin = (
        log_q.gather(1, best)
        - log_q.gather(1, ours)
        - log_p.gather(1, best)
        + log_p.gather(1, ours)
    )
    return -torch.sigmoid(beta * margin).log().squeeze(1)


TRUTHS: dict[str, tuple[Truth, list[dict[str, Any]]]] = {
    "forward_kl": (lambda log_p, z, target: kl(*both(log_p, z)), [{}]),
    "random_sampling": (lambda log_p, z, target: -torch.xlogy(*both(log_p, z)).sum(1), [{}]),
    "ce": (lambda log_p, z, target: -z.log_softmax(1).gather(1, target[:, None]).squeeze(1), [{}]),
    "reverse_kl": (reverse, [{}]),
    "jsd": (jensen_shannon, [{}, {"beta": 0.1}, {"beta": 0.9}]),
    "skew_kl": (skew, [{}, {"alpha": 0.7}]),
    "skew_reverse_kl": (skew_reverse, [{}, {"alpha": 0.7}]),
    "tvd": (total_variation, [{}]),
    "alpha_beta": (alpha_beta, [{}, {"alpha": 0.6, "beta": 0.4}, {"alpha": 1.1, "beta": 0.3}]),
    "adaptive_kl": (adaptive, [{}, {"threshold": 0.9}]),
    "tail_aware": (tail_aware, [{}, {"k": 3, "beta": 0.5, "mean_tail_mass": 0.2}]),
    "taid": (taid, [{}, {"t": 0.0}, {"t": 1.0}]),
    "self_evolution": (self_evolution, [{}, {"ground_truth": 0.2, "mix": 0.7, "threshold": 3.0}]),
    "listmle": (listmle, [{}, {"k": 3, "temperature": 2.0}]),
    "pairwise_logistic": (pairwise, [{}, {"targets": "soft", "k": 4, "temperature": 0.5}]),
    "bild": (bild, [{}, {"sides": "teacher", "k": 5, "temperature": 1.0}]),
    "dpkd_token": (preference, [{}, {"beta": 1.0}]),
}
CASES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values())) or 'default'}")
    for name, (_, cases) in TRUTHS.items()
    for options in cases
]


def test_every_loss_has_a_truth() -> None:
    """ranking has its own, with loops and sets, in test_losses.py."""
    apart = {"ranking", "policy_gradient", "dpkd_sequence"}
    assert {*TRUTHS, *apart} == set(LOSSES) == set(SPECS)


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(
        (torch.linspace(0.5, 2, len(value)).double() * value).sum(), z
    )
    return value.detach(), gradient


def assert_same(
    loss: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], z: Tensor, atol: float
) -> None:
    for found, expected in zip(
        value_and_gradient(loss, z), value_and_gradient(truth, z), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("unpredictable", [0, 6])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_heads(
    draw: torch.Generator, name: str, options: dict[str, Any], unpredictable: int
) -> None:
    """Padded heads, tied logprobs in every other row; the student's vocabulary may be larger."""
    log_p, z = normal(draw, 30, V).log_softmax(1), normal(draw, 30, V + unpredictable)
    log_p[::2, :4] = log_p[::2, :1]
    log_p = log_p.log_softmax(1)
    if name in ("bild", "dpkd_token"):
        z[:, V:] -= 20  # what the teacher says of the student's own top would be undefined
    teacher, truth = teacher_of(log_p, V, draw, width=V + 3), TRUTHS[name][0]
    assert_same(
        lambda x: LOSSES[name](x, teacher, **options),
        lambda x: truth(log_p, x, teacher.target_ids, **options),
        z,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_masked_logits_of_the_student(draw: torch.Generator, name: str) -> None:
    """Some models put -inf on ids that do not exist: as if they did not."""
    log_p, z = normal(draw, 8, V).log_softmax(1), normal(draw, 8, V + 4)
    z[:, V:] = -math.inf
    teacher = with_draws(draw, log_p, teacher_of(log_p, 9, draw), 5)
    value, gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher), z)
    expected, expected_gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher), z[:, :V])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :V], expected_gradient)
    assert (gradient[:, V:] == 0).all()


@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl", "tvd", "taid"])
def test_draws_that_the_student_cannot_make(draw: torch.Generator, name: str) -> None:
    """-inf at ids that were drawn: the limit of ever lower logits."""
    log_p, z = normal(draw, 8, V).log_softmax(1), normal(draw, 8, V)
    teacher = with_draws(draw, log_p, teacher_of(log_p, 9, draw), 5)
    assert teacher.draws is not None
    masked, low = (z.scatter(1, teacher.draws.ids, value) for value in (-math.inf, -60.0))
    value, gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher), masked)
    if name != "taid":  # a cross-entropy, which rises without end
        torch.testing.assert_close(
            value, value_and_gradient(lambda x: LOSSES[name](x, teacher), low)[0]
        )
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [8.0, 12.0, 16.0, 40.0])
@pytest.mark.parametrize("name", ["reverse_kl", "adaptive_kl"])
def test_a_student_sure_of_what_the_teacher_does_not_know(
    draw: torch.Generator, name: str, gap: float
) -> None:
    """In float32, against float64: nearly all mass on an id above the teacher's vocabulary."""
    log_p, z = normal(draw, 8, V).log_softmax(1), normal(draw, 8, V + 1, scale=0.1)
    z[:, V] = gap
    teacher = teacher_of(log_p, V, draw)
    expected, expected_gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher), z)
    found, gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher), z.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize(
    "name", [n for n, s in SPECS.items() if "temperature" in s.options and s.tails]
)
def test_temperature(draw: torch.Generator, name: str, temperature: float) -> None:
    """Softens both sides of whole heads, alone or in a sum; refused on others."""
    log_p, z = normal(draw, 12, V).log_softmax(1), normal(draw, 12, V + 3)
    plain, truth = teacher_of(log_p, V, draw, width=V + 2), TRUTHS[name][0]
    for teacher in (plain, dataclasses.replace(plain, prior=normal(draw, V).softmax(0))):
        for first in (lambda x, _: x, lambda x, teacher: StudentPass(x, teacher, top_k=2)):
            assert_same(
                lambda x, first=first, teacher=teacher: LOSSES[name](
                    first(x, teacher), teacher, temperature=temperature
                ),
                lambda x: truth(
                    (log_p / temperature).log_softmax(1), x / temperature, plain.target_ids
                ),
                z,
                atol=1e-8,
            )
    with pytest.raises(UserError, match="stores 9 of 40 ids"):
        LOSSES[name](z, teacher_of(log_p, 9, draw), temperature=temperature)
    with pytest.raises(UserError, match="positive"):
        LOSSES[name](z, plain, temperature=-1.0)


@pytest.mark.parametrize("unpredictable", [0, 6])
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if "prior" in s.tails])
def test_the_prior_is_the_truth_of_the_reconstruction(
    draw: torch.Generator, name: str, unpredictable: int
) -> None:
    log_p, z = normal(draw, 20, V).log_softmax(1), normal(draw, 20, V + unpredictable)
    teacher = teacher_of(log_p, torch.randint(10, V, (20,), generator=draw), draw, width=V + 3)
    teacher = dataclasses.replace(teacher, prior=normal(draw, V).softmax(0))
    rebuilt = torch.stack(
        [
            (prior := teacher.prior.clone().index_fill(0, ids[ids >= 0], 0)) / prior.sum() * m.exp()
            for ids, m in zip(teacher.ids, teacher.tail_logprob, strict=True)
        ]
    )
    for row, ids, logprobs in zip(rebuilt, teacher.ids, teacher.logprobs, strict=True):
        row[ids[ids >= 0]] = logprobs[ids >= 0].exp()
    # Where the prior puts more on an id than the head's last entry has, the reconstruction's order
    # is not the head's.
    options = (
        {"k": 5} if name == "tail_aware" else {"threshold": 1e-3} if name == "adaptive_kl" else {}
    )
    keep = rebuilt.argmax(1) == teacher.ids[:, 0]
    if name == "tail_aware":
        keep = (rebuilt.topk(5).indices == teacher.ids[:, :5]).all(1)
        options["mean_tail_mass"] = 0.3
    teacher, rebuilt, z = teacher[keep], rebuilt[keep], z[keep]
    truth = TRUTHS[name][0]
    assert_same(
        lambda x: LOSSES[name](x, teacher, tail="prior", **options),
        lambda x: truth(rebuilt.log(), x, teacher.target_ids, **options),
        z,
        atol=1e-8,
    )


BOUNDS = [
    pytest.param(name, options, samples, id=f"{name}-{'samples' if samples else 'head'}-{options}")
    for name, (_, cases) in TRUTHS.items()
    for options in cases
    for samples in (False, True)
    if (SPECS[name].from_samples if samples else SPECS[name].from_head) == "lower"
]


@pytest.mark.parametrize(("name", "options", "samples"), BOUNDS)
def test_bounds_are_on_their_side(
    draw: torch.Generator, name: str, options: dict[str, Any], samples: bool
) -> None:
    """10,000 cases, flat to peaked, near and far, head sizes from 1 to all but one."""
    cases, size = 10_000, 24
    scale = 6 * torch.rand(cases, 1, generator=draw, dtype=torch.float64)
    log_p = (scale * normal(draw, cases, size, scale=1)).log_softmax(1)
    nearness = torch.rand(cases, 1, generator=draw, dtype=torch.float64)
    z = nearness * log_p + (1 - nearness) * normal(draw, cases, size + 2, scale=3)[:, :size]
    teacher = teacher_of(log_p, torch.randint(1, size, (cases,), generator=draw), draw)
    if samples:
        tail = log_p.exp()
        tail = tail.scatter_reduce(
            1, teacher.ids.clamp_min(0), torch.where(teacher.ids < 0, 1.0, 0.0).double(), "amin"
        )
        drawn = torch.multinomial(tail.clamp_min(0), 4, replacement=True, generator=draw)
        teacher = dataclasses.replace(teacher, draws=TailDraws(drawn, log_p.gather(1, drawn)))
    if name == "tail_aware":
        options = {"mean_tail_mass": 0.3, **options}
    gap = TRUTHS[name][0](log_p, z, teacher.target_ids, **options) - LOSSES[name](
        z, teacher, **options
    )
    assert gap.min() > -1e-7
    # The bound is not simply the truth.
    assert (gap > 1e-6).double().mean() > 0.05


def test_draws_bring_the_reverse_kl_closer(draw: torch.Generator) -> None:
    log_p, z = normal(draw, 2000, V).log_softmax(1), normal(draw, 2000, V)
    ghost = teacher_of(log_p, 5, draw)
    drawn = with_draws(draw, log_p, ghost, 8)
    near, far, truth = (
        LOSSES["reverse_kl"](z, drawn),
        LOSSES["reverse_kl"](z, ghost),
        reverse(log_p, z, None),
    )
    assert (near >= far - 1e-9).all()
    assert (truth - near).mean() < 0.9 * (truth - far).mean()


P, S, SETS = 8, 8, 1500


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.from_samples == "unbiased"])
def test_unbiased_over_fresh_draws(draw: torch.Generator, name: str) -> None:
    """Value and gradient (along a random direction): within 5 standard errors; a twin with one
    draw in eight amiss is not.
    """
    size = 120
    log_p = normal(draw, P, size).log_softmax(1)
    z = (log_p + normal(draw, P, size, scale=1.5)).detach()
    direction = normal(draw, P, size + 3, scale=1)
    z = torch.cat([z, normal(draw, P, 3, scale=1) - 6], 1)
    truth_z = z.clone().requires_grad_()
    options = {"mean_tail_mass": 0.3, "k": 4} if name == "tail_aware" else {}
    base = teacher_of(log_p, 6, draw)
    truth = TRUTHS[name][0](log_p, truth_z, base.target_ids, **options)
    (gradient,) = torch.autograd.grad(truth.sum(), truth_z)
    expected = torch.stack([truth.detach().sum(), (gradient * direction).sum()])
    samples = with_draws(draw, log_p, base, S * SETS).draws.ids.reshape(P * SETS, S)
    rows = torch.arange(P).repeat_interleave(SETS)
    logprobs = log_p[rows].gather(1, samples)
    teacher = dataclasses.replace(base[rows], draws=TailDraws(samples, logprobs))

    def standard_errors(teacher: SparseTeacher) -> Tensor:
        x = z[rows].requires_grad_()
        value = (
            LOSSES[name](x, teacher, tail="samples", **options)
            if SPECS[name].tails
            else LOSSES[name](x, teacher)
        )
        (slope,) = torch.autograd.grad(value.sum(), x)
        found = torch.stack([value.detach(), (slope * direction[rows]).sum(1)]).reshape(2, P, SETS)
        return (found.mean(2).sum(1) - expected).abs() / (found.var(2).sum(1) / SETS).sqrt()

    assert (standard_errors(teacher) < 5).all()

    class Twin(TailDraws):
        def weights(self, tail_logprob: Tensor) -> Tensor:
            return super().weights(tail_logprob) * (S - 1) / S

    fewer = dataclasses.replace(teacher, draws=Twin(samples, logprobs))
    assert standard_errors(fewer)[0] > 5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_agrees_with_trl(draw: torch.Generator, beta: float, temperature: float) -> None:
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    theirs_logits, z = normal(draw, 12, V), normal(draw, 12, V)
    teacher = teacher_of(theirs_logits.log_softmax(1), V, draw)

    def theirs(x: Tensor) -> Tensor:
        return trl.GKDTrainer.generalized_jsd_loss(
            x[None], theirs_logits[None], beta=beta, temperature=temperature, reduction="none"
        )[0].sum(1)

    # TRL's own beta is a float32.
    assert_same(
        lambda x: LOSSES["jsd"](x, teacher, beta=beta, temperature=temperature),
        theirs,
        z,
        atol=1e-6,
    )


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sparse_jsd_agrees_with_trl(draw: torch.Generator, beta: float, add_tail: bool) -> None:
    """TRL's loss_top_k with and without loss_add_tail is the ghost, and the renormalised head."""
    trl = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    log_p, z = normal(draw, 12, V).log_softmax(1), normal(draw, 12, V)
    teacher = teacher_of(log_p, 6, draw)

    def theirs(x: Tensor) -> Tensor:
        log_q, logprobs = x.log_softmax(1).gather(1, teacher.ids), teacher.logprobs
        mask = torch.ones_like(log_q, dtype=torch.bool)
        if add_tail:
            (log_q, both_mask), (logprobs, _) = (
                trl._add_tail_bucket(log_q, mask),
                trl._add_tail_bucket(logprobs, mask),
            )
        else:
            both_mask = mask
            log_q, logprobs = log_q.log_softmax(1), logprobs.log_softmax(1)
        return trl._jsd_divergence(log_q, logprobs, beta, both_mask).sum(1)

    tail = "ghost" if add_tail else "renormalised"
    assert_same(lambda x: LOSSES["jsd"](x, teacher, beta=beta, tail=tail), theirs, z, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.tails])
def test_small_tails_in_float32(draw: torch.Generator, name: str) -> None:
    """Float32 against float64, on students with tails down to 1e-30 and heads that are padded;
    all is finite.
    """
    log_p = normal(draw, 40, V).log_softmax(1)
    teacher = with_draws(
        draw,
        log_p,
        teacher_of(log_p, torch.randint(10, 20, (40,), generator=draw), draw, width=25),
        6,
    )
    z = normal(draw, 40, V + 2, scale=1)
    for row, (ids, lift) in enumerate(zip(teacher.ids, torch.linspace(0, 60, 40), strict=True)):
        z[row, ids[ids >= 0]] += lift
    single = dataclasses.replace(
        teacher,
        **{
            n: getattr(teacher, n).float()
            for n in ("logprobs", "tail_logprob", "target_logprob", "entropy")
        },
        draws=TailDraws(teacher.draws.ids, teacher.draws.logprobs.float()),
    )
    for tail in ("ghost", "samples"):
        options = {"tail": tail, **({"mean_tail_mass": 0.3} if name == "tail_aware" else {})}
        found, slope = value_and_gradient(
            lambda x, o=options: LOSSES[name](x.float(), single, **o), z.float().double()
        )
        expected, gradient = value_and_gradient(
            lambda x, o=options: LOSSES[name](x, teacher, **o), z.float().double()
        )
        assert torch.isfinite(slope).all()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slope.double(), gradient, rtol=1e-3, atol=1e-3)


def test_options_out_of_range(draw: torch.Generator) -> None:
    log_p, z = normal(draw, 3, V).log_softmax(1), normal(draw, 3, V)
    teacher = teacher_of(log_p, 8, draw)
    for name, options, match in [
        ("jsd", {"beta": 1.5}, "beta is 1.5"),
        ("skew_kl", {"alpha": 0}, "alpha is 0"),
        ("skew_reverse_kl", {"alpha": 1}, "alpha is 1"),
        ("alpha_beta", {"beta": 0}, "forward_kl and reverse_kl"),
        ("adaptive_kl", {"threshold": 1}, "threshold is 1"),
        ("tail_aware", {"beta": -1}, "beta is -1"),
        ("taid", {"t": 2}, "t is 2"),
        ("self_evolution", {"mix": 1}, "mix is 1"),
        ("listmle", {"temperature": 0}, "temperature is 0"),
        ("pairwise_logistic", {"targets": "firm"}, "'firm'"),
        ("bild", {"sides": "left"}, "'left'"),
        ("dpkd_token", {"beta": 0}, "beta is 0"),
        ("random_sampling", {}, "no tail samples"),
        ("reverse_kl", {"tail": "samples"}, "no samples"),
        ("taid", {"tail": "renormalised"}, "expected auto, samples, ghost or prior"),
    ]:
        with pytest.raises(UserError, match=match):
            LOSSES[name](z, teacher, **options)
    empty = teacher_of(log_p, 0, draw)
    for name in (
        "adaptive_kl",
        "tail_aware",
        "listmle",
        "pairwise_logistic",
        "bild",
        "dpkd_token",
        "ranking",
    ):
        with pytest.raises(UserError, match="stores no heads"):
            LOSSES[name](z, empty)
    drawn = with_draws(draw, log_p, teacher, 4).draws
    undated = dataclasses.replace(teacher, draws=TailDraws(drawn.ids))
    with pytest.raises(UserError, match="no logprobs of its samples"):
        LOSSES["jsd"](z, undated, tail="samples")


@pytest.mark.parametrize("name", LOSSES)
def test_unfilled_rows(draw: torch.Generator, name: str) -> None:
    """Positions without a head, or without draws, among others that have them: finite, and the
    others as they are.
    """
    log_p, z = normal(draw, 6, V).log_softmax(1), normal(draw, 6, V + 2)
    teacher = with_draws(
        draw, log_p, teacher_of(log_p, torch.tensor([0, 1, 2, 5, 12, 12]), draw, width=14), 5
    )
    teacher.draws.ids[1] = -1
    teacher.draws.logprobs[1] = -math.inf
    options = {"mean_tail_mass": 0.3} if name == "tail_aware" else {}
    value, gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher, **options), z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    alone = LOSSES[name](z[4:], teacher[4:], **options)
    torch.testing.assert_close(value[4:], alone)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_prefers_what_does_not_exist(draw: torch.Generator, name: str) -> None:
    """Its argmax is an id that the teacher cannot predict, with a tail and without: finite, and
    pushed down.
    """
    log_p, z = normal(draw, 8, V).log_softmax(1), normal(draw, 8, V + 3)
    z[:, -1] = z.amax(1) + 3
    for k in (12, V):
        teacher = teacher_of(log_p, k, draw)
        if k < V:
            teacher = with_draws(draw, log_p, teacher, 4)
        value, gradient = value_and_gradient(lambda x, t=teacher: LOSSES[name](x, t), z)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        # pairwise_logistic looks at the teacher's top alone; the slopes of the other two depend on
        # all other ids; a clipped policy_gradient has none.
        if name not in ("pairwise_logistic", "ranking", "alpha_beta", "policy_gradient"):
            assert (gradient[:, -1] > 0).all()


def test_what_the_student_looks_at(draw: torch.Generator) -> None:
    """The one dense pass: its values by the definition, its gradient by finite differences, at
    any scale.
    """
    log_p, z = normal(draw, 5, 12, scale=1).log_softmax(1), normal(draw, 5, 15, scale=1)
    teacher = with_draws(
        draw, log_p, teacher_of(log_p, torch.tensor([0, 1, 3, 8, 11]), draw, width=12), 3
    )
    teacher = dataclasses.replace(teacher, prior=normal(draw, 12).softmax(0))

    def looks(x: Tensor) -> Tensor:
        s = StudentPass(x, teacher, top_k=2, prior=True, scale=0.7)
        head, drawn = s.z_head.where(teacher.ids >= 0, 0), s.z_samples
        return torch.cat(
            [
                head,
                drawn,
                s.z_top,
                torch.stack([s.z_target, s.log_tail, s.log_others, s.prior_dot], 1),
            ],
            1,
        )

    student = StudentPass(z, teacher, top_k=2, prior=True, scale=0.7)
    for row, ids in enumerate(teacher.ids):
        outside = [v for v in range(12) if v not in ids.tolist()]
        assert student.log_tail[row] == pytest.approx((0.7 * z[row, outside]).logsumexp(0).item())
    torch.testing.assert_close(student.lse, (0.7 * z).logsumexp(1))
    torch.testing.assert_close(student.prior_dot, 0.7 * z[:, :12] @ teacher.prior)
    assert torch.autograd.gradcheck(looks, z.requires_grad_())
