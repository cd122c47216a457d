"""Chosen ids: cells of their own in every divergence over cells, against the whole vocabulary in
float64. Bounds stay bounds and come closer, estimates stay unbiased, whoever chose the ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.cache_format.manifest import StoreSettings
from logitcask.train.data.batch import at_positions
from logitcask.train.data.batch import teacher_of as of_batch
from logitcask.train.losses import LOSSES, ChosenTail, SparseTeacher, StudentPass, TailDraws
from tests.train.losses.test_truth import (
    TRUTHS,
    V,
    assert_same,
    normal,
    reverse,
    teacher_of,
    value_and_gradient,
    with_draws,
)

CELLS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
"""Losses that are lower bounds with any cells."""
DRAWN = ["jsd", "skew_kl", "skew_reverse_kl", "tvd"]
"""Those of them with an estimate over what the chosen ids leave."""


def choosing(log_p: Tensor, teacher: SparseTeacher, by: Tensor, count: int) -> SparseTeacher:
    """``teacher`` with the ``count`` ids of the highest ``by`` [P, V] at each position that are not
    in its head; fewer where the tail has fewer.
    """
    in_head = torch.zeros_like(log_p, dtype=torch.bool)
    for row, ids in zip(in_head, teacher.ids, strict=True):
        row[ids[ids >= 0]] = True
    chosen = by.topk(count).indices
    outside = ~in_head.gather(1, chosen)
    ids = chosen.masked_fill(~outside, -1)
    tail = ChosenTail.of(
        ids,
        log_p.gather(1, chosen).masked_fill(~outside, -math.inf),
        head_ids=teacher.ids,
        tail_logprob=teacher.tail_logprob,
        vocab_size=teacher.vocab_size,
    )
    return dataclasses.replace(teacher, chosen=tail)


def pair(draw: torch.Generator, rows: int, unpredictable: int = 0) -> tuple[Tensor, Tensor]:
    """A teacher and the logits of a student far from it, at some positions more than at others."""
    log_p = normal(draw, rows, V).log_softmax(1)
    return log_p, normal(draw, rows, V + unpredictable)


@pytest.mark.parametrize("unpredictable", [0, 5])
@pytest.mark.parametrize("name", CELLS)
def test_head_and_chosen_ids_that_are_everything(
    draw: torch.Generator, name: str, unpredictable: int
) -> None:
    """The definition's value and gradient: no mass is left on either side."""
    log_p, z = pair(draw, 20, unpredictable)
    sizes = torch.randint(1, V, (20,), generator=draw)
    teacher = teacher_of(log_p, sizes, draw, width=V + 2)
    teacher = choosing(log_p, teacher, normal(draw, 20, V), V)
    assert torch.isneginf(teacher.chosen.left_logprob).all()
    assert_same(
        lambda x: LOSSES[name](x, teacher, tail="ghost"),
        lambda x: TRUTHS[name][0](log_p, x, teacher.target_ids),
        z,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", CELLS)
def test_cells_by_hand(draw: torch.Generator, name: str) -> None:
    """The value and the gradient of the dense definition over merged cells: each known id, and the
    sum of all others. The ids are not those of the student.
    """
    log_p, z = pair(draw, 16)
    teacher = teacher_of(log_p, torch.randint(0, 12, (16,), generator=draw), draw, width=14)
    teacher = choosing(log_p, teacher, normal(draw, 16, V), 6)
    known = torch.cat([teacher.ids, teacher.chosen.ids], 1)
    # Row by row [V, N]: the matrix that adds probabilities of ids to cells.
    merges = []
    for ids in known:
        cell = torch.full((V,), len(ids))
        cell[ids[ids >= 0]] = torch.arange(len(ids))[ids >= 0]
        merges.append(torch.nn.functional.one_hot(cell, len(ids) + 1).double())
    merge = torch.stack(merges)

    def truth(x: Tensor) -> Tensor:
        p, q = ((y.exp().unsqueeze(1) @ merge).squeeze(1) for y in (log_p, x.log_softmax(1)))
        if name == "tvd":
            return (p - q).abs().sum(1) / 2
        some = p > 0
        log_of = [torch.where(some, y, 1).log() for y in (p, q)]
        kls = {"forward_kl": (0, None), "reverse_kl": (1, None)}
        if name in kls:
            one = kls[name][0]
            return ((p, q)[one] * (log_of[one] - log_of[1 - one])).sum(1)
        if name == "jsd":
            middle = torch.where(some, (p + q) / 2, 1).log()
            return (p * (log_of[0] - middle) + q * (log_of[1] - middle)).sum(1) / 2
        a = 0.1
        one, (u, v) = (1, (q, p)) if name == "skew_reverse_kl" else (0, (p, q))
        middle = torch.where(some, a * u + (1 - a) * v, 1).log()
        return (u * (log_of[one] - middle)).sum(1)

    assert_same(lambda x: LOSSES[name](x, teacher, tail="ghost"), truth, z, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "tail"), [*((name, "ghost") for name in CELLS), ("reverse_kl", "samples")]
)
@pytest.mark.parametrize("moved", [False, True])
def test_bounds_stay_bounds_and_come_closer(
    draw: torch.Generator, name: str, tail: str, moved: bool
) -> None:
    """Flat to peaked, near and far; the ids are of the student, or of what it was before."""
    cases = 4000
    scale = 4 * torch.rand(cases, 1, generator=draw, dtype=torch.float64)
    log_p = (scale * normal(draw, cases, V, scale=1)).log_softmax(1)
    z = log_p + normal(draw, cases, V, scale=2)
    sizes = torch.randint(1, 20, (cases,), generator=draw)
    plain = teacher_of(log_p, sizes, draw)
    if tail == "samples":
        plain = with_draws(draw, log_p, plain, 6)
    before = z + normal(draw, cases, V, scale=2) if moved else z
    teacher = choosing(log_p, plain, before, 8)
    near, far = (LOSSES[name](z, each, tail=tail) for each in (teacher, plain))
    truth = TRUTHS[name][0](log_p, z, teacher.target_ids)
    assert (truth - near).min() > -1e-7
    if tail == "ghost":  # with samples, positions differ in which draws are cells
        assert (near - far).min() > -1e-9
    # A forward KL is mostly of ids that the teacher finds probable.
    share = 0.9 if name == "forward_kl" else 0.75 if moved else 0.4
    assert (truth - near).mean() < share * (truth - far).mean()


@pytest.mark.parametrize("name", DRAWN)
def test_unbiased_over_fresh_draws(draw: torch.Generator, name: str) -> None:
    """Value and gradient, within 5 standard errors; a twin that counts draws of chosen ids, too, is
    not. The variance is smaller than without the ids.
    """
    positions, draws, sets, size = 8, 8, 1500, 120
    log_p = normal(draw, positions, size).log_softmax(1)
    z = log_p + normal(draw, positions, size, scale=2)
    direction = normal(draw, positions, size + 3, scale=1)
    z = torch.cat([z, normal(draw, positions, 3, scale=1) - 6], 1)
    base = teacher_of(log_p, 4, draw)
    truth_z = z.clone().requires_grad_()
    truth = TRUTHS[name][0](log_p, truth_z, base.target_ids)
    (gradient,) = torch.autograd.grad(truth.sum(), truth_z)
    expected = torch.stack([truth.detach().sum(), (gradient * direction).sum()])
    samples = with_draws(draw, log_p, base, draws * sets).draws.ids.reshape(-1, draws)
    rows = torch.arange(positions).repeat_interleave(sets)
    drawn = TailDraws(samples, log_p[rows].gather(1, samples))

    def mean_and_variance(teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
        x = z[rows].requires_grad_()
        value = LOSSES[name](x, teacher, tail="samples")
        (slope,) = torch.autograd.grad(value.sum(), x)
        found = torch.stack([value.detach(), (slope * direction[rows]).sum(1)])
        found = found.reshape(2, positions, sets)
        return found.mean(2).sum(1), found.var(2).sum(1)

    plain = dataclasses.replace(base[rows], draws=drawn)
    chosen = dataclasses.replace(choosing(log_p, base, z[:, :size], 6)[rows], draws=drawn)
    mean, variance = mean_and_variance(chosen)
    assert ((mean - expected).abs() < 5 * (variance / sets).sqrt()).all()
    assert variance[0] < mean_and_variance(plain)[1][0]

    class Twin(ChosenTail):
        def has(self, ids: Tensor) -> Tensor:
            return torch.zeros_like(ids, dtype=torch.bool)

    fields = {f.name: getattr(chosen.chosen, f.name) for f in dataclasses.fields(ChosenTail)}
    mean, variance = mean_and_variance(dataclasses.replace(chosen, chosen=Twin(**fields)))
    assert (mean[0] - expected[0]).abs() > 5 * (variance[0] / sets).sqrt()


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "adaptive_kl"])
def test_the_prior_spreads_what_is_left(draw: torch.Generator, name: str) -> None:
    log_p, z = pair(draw, 12, 3)
    teacher = choosing(log_p, teacher_of(log_p, 9, draw), normal(draw, 12, V), 6)
    prior = normal(draw, V).softmax(0)
    teacher = dataclasses.replace(teacher, prior=prior)
    known = torch.zeros(12, V, dtype=torch.bool)
    for row, ids in zip(known, torch.cat([teacher.ids, teacher.chosen.ids], 1), strict=True):
        row[ids[ids >= 0]] = True
    spread = prior.expand(12, V).masked_fill(known, 0)
    left = log_p.exp().masked_fill(known, 0).sum(1, keepdim=True)
    rebuilt = torch.where(known, log_p.exp(), left * spread / spread.sum(1, keepdim=True))
    options: dict[str, Any] = {"threshold": 1e-3} if name == "adaptive_kl" else {}
    keep = rebuilt.argmax(1) == teacher.ids[:, 0]
    teacher, rebuilt, z = teacher[keep], rebuilt[keep], z[keep]
    assert_same(
        lambda x: LOSSES[name](x, teacher, tail="prior", **options),
        lambda x: TRUTHS[name][0](rebuilt.log(), x, teacher.target_ids, **options),
        z,
        atol=1e-7,
    )


USES_THEM = [*CELLS, "adaptive_kl", "taid", "dpkd_token", "bild", "ranking"]
"""Losses over cells, and those that ask for the teacher's logprobs of the student's own top."""


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in USES_THEM])
def test_other_losses_do_not_change(draw: torch.Generator, name: str) -> None:
    """Those whose cells are their own, and those without a tail."""
    log_p, z = pair(draw, 8, 2)
    plain = with_draws(draw, log_p, teacher_of(log_p, 12, draw), 5)
    chosen = choosing(log_p, plain, z[:, :V], 6)
    options = {"mean_tail_mass": 0.3} if name == "tail_aware" else {}
    for found, expected in zip(
        *(
            value_and_gradient(lambda x, t=t: LOSSES[name](x, t, **options), z)
            for t in (chosen, plain)
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_chosen_ids_and_without_heads(draw: torch.Generator, name: str) -> None:
    """Among others that have them: finite, as they are without the column, and in any slice."""
    log_p, z = pair(draw, 6, 2)
    sizes = torch.tensor([0, 1, 2, 5, 12, 12])
    drawn = with_draws(draw, log_p, teacher_of(log_p, sizes, draw), 5).draws
    sizes[5] = V
    plain = dataclasses.replace(teacher_of(log_p, sizes, draw, width=V + 2), draws=drawn)
    plain.draws.ids[5] = -1
    plain.draws.logprobs[5] = -math.inf
    teacher = choosing(log_p, plain, z[:, :V], 6)
    teacher.chosen.ids[3] = -1
    teacher.chosen.logprobs[3] = -math.inf
    teacher.chosen.left_logprob[3] = plain.tail_logprob[3]
    options = {"mean_tail_mass": 0.3} if name == "tail_aware" else {}
    value, gradient = value_and_gradient(lambda x: LOSSES[name](x, teacher, **options), z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(value[2:4], LOSSES[name](z[2:4], teacher[2:4], **options))
    for row in (3, 5):
        alone = LOSSES[name](z[row : row + 1], plain[row : row + 1], **options)
        torch.testing.assert_close(value[row : row + 1], alone)


def test_the_students_side(draw: torch.Generator) -> None:
    """Logits of chosen ids, and log-sums with and without them, at any scale; the gradient by
    finite differences.
    """
    log_p, z = normal(draw, 5, 12, scale=1).log_softmax(1), normal(draw, 5, 15, scale=1)
    teacher = teacher_of(log_p, torch.tensor([0, 1, 3, 8, 11]), draw, width=12)
    teacher = choosing(log_p, teacher, normal(draw, 5, 12), 3)
    teacher = dataclasses.replace(teacher, prior=normal(draw, 12).softmax(0))

    def looks(x: Tensor) -> Tensor:
        s = StudentPass(x, teacher, top_k=2, prior=True, scale=0.7)
        chosen = s.z_chosen.where(teacher.chosen.ids >= 0, 0)
        rest = torch.stack([s.log_tail, s.log_left, s.log_others, s.lse, s.prior_dot], 1)
        return torch.cat([chosen, rest], 1)

    # At a position without anything left, log_left is -inf.
    torch.autograd.gradcheck(
        lambda x: looks(x).masked_fill(torch.isneginf(looks(x)), 0), z.requires_grad_()
    )
    student = StudentPass(z, teacher, scale=0.7)
    for row, (ids, chosen) in enumerate(zip(teacher.ids, teacher.chosen.ids, strict=True)):
        outside = [v for v in range(12) if v not in ids.tolist()]
        left = [v for v in outside if v not in chosen.tolist()]
        for found, of in ((student.log_tail, outside), (student.log_left, left)):
            torch.testing.assert_close(found[row], (0.7 * z[row, of]).logsumexp(0))


def test_what_is_known_of_the_students_top(draw: torch.Generator) -> None:
    log_p, z = pair(draw, 10)
    teacher = choosing(log_p, teacher_of(log_p, 5, draw), z, 7)
    found, stored = teacher.known(z.topk(7).indices)
    assert stored.all()
    torch.testing.assert_close(found, log_p.gather(1, z.topk(7).indices))


def test_rounded_numbers_leave_no_negative_mass(draw: torch.Generator) -> None:
    """On a coarse grid the chosen ids may have more mass than the tail: what is left is then as
    much as rounding can hide, and the loss stays near the truth.
    """
    log_p, z = pair(draw, 500)
    head, step = 5, 1 / 8
    store = StoreSettings(vocab_size=V, top_k=head, capture_k=head, logprob_step=step, chosen_ids=V)
    plain = teacher_of(log_p, head, draw)
    exact = choosing(log_p, plain, normal(draw, 500, V), V - 1)
    rounded = (exact.chosen.logprobs / step).round() * step
    rounding = math.expm1(store.rounding) + math.expm1(store.scalar_step / 2)
    chosen = ChosenTail.of(
        exact.chosen.ids,
        rounded,
        head_ids=plain.ids,
        tail_logprob=plain.tail_logprob,
        vocab_size=V,
        rounding=rounding,
    )
    assert (rounded.exp().sum(1) > plain.tail_logprob.exp()).any()
    some = torch.isfinite(chosen.left_logprob)
    assert (chosen.left_logprob[some] >= plain.tail_logprob[some] + math.log(rounding) - 1e-9).all()
    found = LOSSES["reverse_kl"](z, dataclasses.replace(plain, chosen=chosen), tail="ghost")
    # Each known cell is off by at most step / 2, and what is left by at most its own logarithm.
    room = step / 2 + StudentPass(z, exact).log_rest.exp() * math.log(2)
    assert (found <= reverse(log_p, z, None) + room + 1e-9).all()


def test_float32_in_small_tails(draw: torch.Generator) -> None:
    """Against float64, with tails of the student down to 1e-30."""
    log_p, z = normal(draw, 40, V).log_softmax(1), normal(draw, 40, V + 2, scale=1)
    plain = with_draws(draw, log_p, teacher_of(log_p, 9, draw, width=12), 6)
    for row, (ids, lift) in enumerate(zip(plain.ids, torch.linspace(0, 60, 40), strict=True)):
        z[row, ids[ids >= 0]] += lift
    teacher = choosing(log_p, plain, normal(draw, 40, V), 8)
    single = dataclasses.replace(
        teacher,
        **{
            name: getattr(teacher, name).float()
            for name in ("logprobs", "tail_logprob", "target_logprob", "entropy")
        },
        draws=TailDraws(teacher.draws.ids, teacher.draws.logprobs.float()),
        chosen=ChosenTail(
            teacher.chosen.ids,
            teacher.chosen.logprobs.float(),
            teacher.chosen.left_logprob.float(),
        ),
    )
    for name in CELLS:
        for tail in ("ghost", "samples"):
            found, slope = value_and_gradient(
                lambda x, n=name, t=tail: LOSSES[n](x.float(), single, tail=t), z.float().double()
            )
            expected, gradient = value_and_gradient(
                lambda x, n=name, t=tail: LOSSES[n](x, teacher, tail=t), z.float().double()
            )
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(slope.double(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["chosen ids", "chosen ids, draws"])
def test_a_batch_has_the_chosen_ids_of_the_tails(write_cache, kind: str) -> None:
    """Beside a cache without them, which gets none."""
    plain = next(iter(write_cache("plain", kind="head", shards=1, sequences=1, tokens=[30])))
    rich = next(iter(write_cache("rich", kind=kind, shards=1, sequences=1, tokens=[20])))
    teacher = of_batch(at_positions([plain, rich]), 60)
    p = len(plain.positions)
    assert (teacher.chosen.ids[:p] == -1).all()
    torch.testing.assert_close(teacher.chosen.left_logprob[:p], teacher.tail_logprob[:p])
    for row in range(len(rich.positions)):
        head = set(rich.ids[row].tolist())
        expected = {
            i: pytest.approx(logprob)
            for i, logprob in zip(rich.chosen.ids[row], rich.chosen.logprobs[row], strict=True)
            if i >= 0 and i not in head
        }
        ids, logprobs = teacher.chosen.ids[p + row], teacher.chosen.logprobs[p + row]
        found = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
        found.pop(-1, None)
        assert found == expected
        known = sum(math.exp(logprob) for logprob in found.values())
        left = math.exp(teacher.chosen.left_logprob[p + row])
        tail = math.exp(teacher.tail_logprob[p + row])
        assert left == pytest.approx(max(tail - known, 1.2e-7 * tail), rel=1e-3, abs=1e-7)
