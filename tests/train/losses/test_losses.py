"""The losses against dense formulas, other implementations and slow loops; inputs are fresh in
every run.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from logitcask.cache_format.errors import UserError
from logitcask.train.losses import LOSSES, PairTexts, SparseTeacher, TailDraws, forward_kl, ranking
from logitcask.train.losses.student_pass import _add_entries, _Pass


def normal(
    draw: torch.Generator, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    return scale * torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def teacher_of(logits_PV: Tensor, k: int | Tensor, *, width: int | None = None) -> SparseTeacher:
    """What a cache would hold of these logits, unquantised; ``k`` may differ by position,
    ``width`` adds padding.
    """
    positions, vocab = logits_PV.shape
    k_P1 = torch.as_tensor(k).expand(positions).unsqueeze(1)
    logprobs, ids = logits_PV.log_softmax(1).sort(1, descending=True)
    inside = torch.arange(vocab) < k_P1
    width = width or int(k_P1.max())
    padding = max(0, width - vocab)
    return SparseTeacher(
        ids=torch.nn.functional.pad(ids.masked_fill(~inside, -1), (0, padding), value=-1)[
            :, :width
        ],
        logprobs=torch.nn.functional.pad(
            logprobs.masked_fill(~inside, -math.inf), (0, padding), value=-math.inf
        )[:, :width],
        tail_logprob=logprobs.masked_fill(inside, -math.inf).logsumexp(1),
        target_ids=ids[:, 0],
        target_logprob=logprobs[:, 0],
        vocab_size=vocab,
        writer_logprob=logprobs[:, 0] - 0.5,
        pairs=pairs_of(logprobs[:, 0]),
    )


def pairs_of(log_p: Tensor) -> PairTexts:
    """Each position as one of a preferred text of 3 tokens, beside a text of 2."""
    both = torch.stack([3 * log_p, 2 * log_p - 1], 1)
    tokens = torch.tensor([3.0, 2.0]).expand(len(log_p), 2)
    share = torch.full_like(log_p, 0.2)
    return PairTexts(torch.ones_like(log_p, dtype=torch.bool), both - 0.5, both, tokens, share)


def with_draws(
    draw: torch.Generator, teacher: SparseTeacher, logits_PV: Tensor, count: int = 5
) -> SparseTeacher:
    """The same with ``count`` draws from each tail, their logprobs, and the entropies."""
    log_p = logits_PV.log_softmax(1)
    tail = log_p.exp().scatter(1, teacher.ids, 0)
    samples = torch.multinomial(tail, count, replacement=True, generator=draw)
    return dataclasses.replace(
        teacher,
        draws=TailDraws(samples, log_p.gather(1, samples)),
        entropy=-(log_p.exp() * log_p).sum(1),
    )


def dense_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(p || q) over the teacher's vocabulary; the student may have more ids."""
    log_p, log_q = (
        teacher_logits.log_softmax(1),
        student_logits.log_softmax(1)[:, : teacher_logits.shape[1]],
    )
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)


def naive_ghost_kl(student_logits: Tensor, teacher: SparseTeacher) -> Tensor:
    """The same cells, one position at a time, differentiated by autograd."""
    rows = []
    for logits, ids, logprobs, log_m in zip(
        student_logits, teacher.ids, teacher.logprobs, teacher.tail_logprob, strict=True
    ):
        log_q, head = logits.log_softmax(0), ids[ids >= 0]
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[head] = False
        outside[teacher.vocab_size :] = False
        row = (logprobs[ids >= 0].exp() * (logprobs[ids >= 0] - log_q[head])).sum()
        if log_m > -math.inf:
            row = row + log_m.exp() * (log_m - log_q[outside].logsumexp(0))
        rows.append(row)
    return torch.stack(rows)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    weights = torch.linspace(0.5, 2, len(value), dtype=value.dtype)
    (gradient,) = torch.autograd.grad((weights * value).sum(), logits)
    return value.detach(), gradient


def assert_same(
    loss: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    logits: Tensor,
    atol: float,
) -> None:
    """Equal values and gradients."""
    for found, expected in zip(
        value_and_gradient(loss, logits), value_and_gradient(reference, logits), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_public_contract(draw: torch.Generator) -> None:
    assert {"forward_kl", "ranking", "ce"} <= set(LOSSES)
    teacher_logits, logits = normal(draw, 6, 40), normal(draw, 6, 40, dtype=torch.float32)
    teacher = with_draws(draw, teacher_of(teacher_logits, 8), teacher_logits)
    for name, loss in LOSSES.items():
        options = {"mean_tail_mass": 0.1} if name == "tail_aware" else {}
        value = loss(logits, teacher, **options)
        assert value.shape == (6,)
        assert value.dtype == torch.float32
        # Alike to float32's rounding: vectors of other lengths have other last bits.
        torch.testing.assert_close(loss(logits[2:5], teacher[2:5], **options), value[2:5])
        assert loss(logits[:0], teacher[:0], **options).shape == (0,)
        assert all(
            p.kind is p.KEYWORD_ONLY for p in list(inspect.signature(loss).parameters.values())[2:]
        )
    assert LOSSES["forward_kl"](logits, teacher, temperature=1.0).shape == (6,)


# forward_kl


@pytest.mark.parametrize("unpredictable", [0, 7])
def test_full_head_is_dense_kl(draw: torch.Generator, unpredictable: int) -> None:
    teacher_logits, logits = normal(draw, 20, 50), normal(draw, 20, 50 + unpredictable)
    teacher = teacher_of(teacher_logits, 50)
    assert teacher.tail_logprob.isneginf().all()
    assert_same(
        lambda z: forward_kl(z, teacher), lambda z: dense_kl(teacher_logits, z), logits, atol=1e-12
    )


@pytest.mark.parametrize("unpredictable", [0, 7])
@pytest.mark.parametrize("step", [None, 1 / 16], ids=["exact", "quantised"])
def test_cells_and_gradient(draw: torch.Generator, unpredictable: int, step: float | None) -> None:
    """Ragged heads, heads that are everything, and a head mass that rounding has moved off 1 -
    m.
    """
    k = torch.randint(1, 41, (30,), generator=draw)
    k[0] = 40
    teacher = teacher_of(normal(draw, 30, 40), k, width=45)
    if step:
        teacher = SparseTeacher(
            **{**vars(teacher), "logprobs": (teacher.logprobs / step).round() * step}
        )
    logits = normal(draw, 30, 40 + unpredictable)
    assert_same(
        lambda z: forward_kl(z, teacher), lambda z: naive_ghost_kl(z, teacher), logits, atol=1e-12
    )


def test_gradcheck(draw: torch.Generator) -> None:
    teacher = teacher_of(normal(draw, 4, 9), torch.tensor([1, 4, 8, 9]), width=9)
    assert torch.autograd.gradcheck(
        lambda z: forward_kl(z, teacher), normal(draw, 4, 11).requires_grad_()
    )


def test_never_above_the_true_kl(draw: torch.Generator) -> None:
    scale = 6 * torch.rand(10_000, 1, generator=draw, dtype=torch.float64)
    teacher_logits, logits = scale * normal(draw, 10_000, 24, scale=1), normal(draw, 10_000, 24)
    teacher = teacher_of(teacher_logits, torch.randint(1, 25, (10_000,), generator=draw))
    gap = dense_kl(teacher_logits, logits) - forward_kl(logits, teacher)
    assert gap.min() > -1e-12
    assert gap.median() > 1e-3


def test_exact_where_the_tails_are_proportional(draw: torch.Generator) -> None:
    teacher_logits = normal(draw, 50, 30)
    teacher = teacher_of(teacher_logits, 6)
    logits = teacher_logits + normal(draw, 50, 1)
    logits.scatter_add_(1, teacher.ids, normal(draw, 50, 6))
    torch.testing.assert_close(
        forward_kl(logits, teacher), dense_kl(teacher_logits, logits), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("log_tail", [-16.0, -30.0, -80.0])
def test_float32_keeps_its_digits_in_tiny_tails(draw: torch.Generator, log_tail: float) -> None:
    """A student tail from 1e-7, where 1 - sum of q is rounding error, down to 1e-35."""
    teacher = teacher_of(normal(draw, 30, 200, scale=1), 20)
    logits = normal(draw, 30, 200, scale=1) + log_tail
    logits.scatter_add_(1, teacher.ids, torch.full((30, 20), -log_tail, dtype=torch.float64))
    value, gradient = value_and_gradient(lambda z: forward_kl(z.float(), teacher), logits.float())
    expected, expected_gradient = value_and_gradient(
        lambda z: naive_ghost_kl(z, teacher), logits.float().double()
    )
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


def test_padding_contributes_nothing(draw: torch.Generator) -> None:
    """Id 0 is where padding could be mistaken for an entry: here it is in the head of some rows
    and in others' tail.
    """
    teacher_logits, logits = normal(draw, 60, 12), normal(draw, 60, 12, dtype=torch.float32)
    k = torch.randint(1, 12, (60,), generator=draw)
    tight, padded = teacher_of(teacher_logits, k), teacher_of(teacher_logits, k, width=30)
    in_head = (tight.ids == 0).any(1)
    assert in_head.any()
    assert not in_head.all()
    for found, expected in zip(
        value_and_gradient(lambda z: forward_kl(z, padded), logits),
        value_and_gradient(lambda z: forward_kl(z, tight), logits),
        strict=True,
    ):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_empty_head_asks_for_nothing(draw: torch.Generator) -> None:
    teacher = teacher_of(normal(draw, 3, 12), 0, width=4)
    value, gradient = value_and_gradient(lambda z: forward_kl(z, teacher), normal(draw, 3, 12))
    torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert gradient.abs().max() < 1e-12


def test_masked_logits_of_the_student(draw: torch.Generator) -> None:
    """Some models put -inf on ids that do not exist."""
    teacher, logits = teacher_of(normal(draw, 5, 20), 6), normal(draw, 5, 24)
    logits[:, 20:] = -math.inf
    value, gradient = value_and_gradient(lambda z: forward_kl(z, teacher), logits)
    torch.testing.assert_close(value, forward_kl(logits[:, :20], teacher))
    assert (gradient[:, 20:] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(
    draw: torch.Generator, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, backward, passes = LOSSES[name], _Pass.backward, []

    def watched(*args: Any) -> Any:
        gradients = backward(*args)
        passes.append(gradients[0].float())
        return gradients

    teacher_logits, logits = normal(draw, 10, 40).float(), normal(draw, 10, 40).to(dtype)
    teacher = with_draws(draw, teacher_of(teacher_logits, 8), teacher_logits)
    with monkeypatch.context() as patch:
        patch.setattr(_Pass, "backward", staticmethod(watched))
        value, gradient = value_and_gradient(lambda z: loss(z, teacher), logits)
    expected, expected_gradient = value_and_gradient(lambda z: loss(z, teacher), logits.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    if name == "alpha_beta":
        # Two passes, whose gradients are rounded one by one and then as a sum, by eps/2 each; they
        # may cancel at will.
        assert len(passes) == 2
        size = (passes[0].abs() + passes[1].abs()).max()
        assert (gradient.float() - expected_gradient).abs().max() <= torch.finfo(dtype).eps * size
    else:
        assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_on_the_whole_distribution(draw: torch.Generator, temperature: float) -> None:
    teacher_logits, logits = normal(draw, 10, 30), normal(draw, 10, 33)
    teacher = teacher_of(teacher_logits, 30, width=35)
    assert_same(
        lambda z: forward_kl(z, teacher, temperature=temperature),
        lambda z: dense_kl(teacher_logits / temperature, z / temperature),
        logits,
        atol=1e-12,
    )


def test_temperature_needs_the_whole_distribution(draw: torch.Generator) -> None:
    logits = normal(draw, 4, 30)
    with pytest.raises(UserError, match="stores 29 of 30 ids"):
        forward_kl(logits, teacher_of(logits, 29), temperature=2.0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="positive"):
            forward_kl(logits, teacher_of(logits, 30), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agrees_with_trl(draw: torch.Generator, temperature: float) -> None:
    gkd_trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    teacher_logits, logits = normal(draw, 12, 64), normal(draw, 12, 64)
    teacher = teacher_of(teacher_logits, 64)

    def theirs(z: Tensor) -> Tensor:
        return gkd_trainer.GKDTrainer.generalized_jsd_loss(
            z[None], teacher_logits[None], beta=0, temperature=temperature, reduction="none"
        )[0].sum(1)

    assert_same(
        lambda z: forward_kl(z, teacher, temperature=temperature), theirs, logits, atol=1e-10
    )


# ranking


def separated(draw: torch.Generator, *shape: int) -> Tensor:
    """Random order, no two values of a row nearer than 0.2: with a strength of 1e-3 every rank
    is hard.
    """
    order = torch.rand(*shape, generator=draw, dtype=torch.float64).argsort(1)
    return 0.3 * order + 0.1 * torch.rand(*shape, generator=draw, dtype=torch.float64)


def slow_ranking(
    logits: Tensor, teacher: SparseTeacher, k: int, ranks: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """RLKD's loss with sets and loops. ``ranks``: values, falling importance, -> soft ranks, 1
    the largest.
    """
    out = []
    for z, ids, logprobs in zip(
        logits.numpy(), teacher.ids.numpy(), teacher.logprobs.numpy(), strict=True
    ):
        stored = {int(i): float(v) for i, v in zip(ids, logprobs, strict=True) if i >= 0}
        union = list(
            dict.fromkeys([*list(stored)[:k], *np.argsort(-z, kind="stable")[:k].tolist()])
        )
        bottom = min(stored.values(), default=0.0) - 1e3
        r_p = ranks(np.array([stored.get(i, bottom) for i in union]))
        r_q = ranks(np.array([float(z[i]) for i in union]))
        varies = len(union) > 1 and r_p.var() > 1e-9
        out.append(1 - np.corrcoef(r_p, r_q)[0, 1] if varies else 0.0)
    return np.array(out)


def hard_ranks(values: np.ndarray) -> np.ndarray:
    """Ties share the mean of their ranks."""
    above, level = (values[None] > values[:, None]).sum(1), (values[None] == values[:, None]).sum(1)
    return above + (level + 1) / 2


def sigmoid_ranks(values: np.ndarray) -> np.ndarray:
    difference = np.clip(values[None] - values[:, None], -500, 500)
    return 0.5 + (1 / (1 + np.exp(-difference))).sum(1)


def l2_ranks(values: np.ndarray) -> np.ndarray:
    """Pool adjacent violators, as torchsort does it: the nearest point to -values with sorted
    entries majorised by 1..n.
    """
    order = np.argsort(-values, kind="stable")
    w = -values[order]
    blocks: list[list[float]] = []
    for excess in w - np.arange(1, len(w) + 1):
        blocks.append([excess, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            before, count = blocks[-1]
            blocks[-1] = [(before * count + mean * size) / (count + size), count + size]
    ranks = np.empty_like(values)
    ranks[order] = w - np.repeat([mean for mean, _ in blocks], [int(size) for _, size in blocks])
    return ranks


@pytest.mark.parametrize("k", [1, 5, 15])
@pytest.mark.parametrize("soft_rank", ["sigmoid", "l2"])
def test_sharp_ranking_is_spearman(draw: torch.Generator, soft_rank: str, k: int) -> None:
    """Ragged heads down to one entry, so that ids of the student's top-k are missing and tie at
    the bottom.
    """
    teacher = teacher_of(separated(draw, 200, 40), torch.randint(1, 30, (200,), generator=draw))
    logits = separated(draw, 200, 40)
    found = ranking(logits, teacher, k=k, soft_rank=soft_rank, strength=1e-3)
    np.testing.assert_allclose(
        found.numpy(), slow_ranking(logits, teacher, k, hard_ranks), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("soft_rank", "reference"), [("sigmoid", sigmoid_ranks), ("l2", l2_ranks)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_soft_ranks(
    draw: torch.Generator, soft_rank: str, reference: Callable, strength: float
) -> None:
    teacher = teacher_of(
        normal(draw, 200, 40, scale=1), torch.randint(1, 30, (200,), generator=draw)
    )
    logits = normal(draw, 200, 40, scale=1)
    expected = slow_ranking(logits, teacher, 5, lambda values: reference(values / strength))
    found = ranking(logits, teacher, k=5, soft_rank=soft_rank, strength=strength)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8)
    single = ranking(logits.float(), teacher, k=5, soft_rank=soft_rank, strength=strength)
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("soft_rank", ["sigmoid", "l2"])
def test_ranking_gradcheck(draw: torch.Generator, soft_rank: str) -> None:
    teacher = teacher_of(normal(draw, 6, 12, scale=1), torch.tensor([2, 3, 5, 8, 12, 12]))
    logits = normal(draw, 6, 12, scale=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: ranking(z, teacher, k=4, soft_rank=soft_rank), logits, eps=1e-7, atol=1e-4
    )


@pytest.mark.parametrize("soft_rank", ["sigmoid", "l2"])
def test_ranking_ignores_constants(draw: torch.Generator, soft_rank: str) -> None:
    teacher, logits = teacher_of(normal(draw, 50, 40), 12), normal(draw, 50, 40)
    shifted = SparseTeacher(**{**vars(teacher), "logprobs": teacher.logprobs - 11.5})
    assert_same(
        lambda z: ranking(z + 7.25, shifted, soft_rank=soft_rank),
        lambda z: ranking(z, teacher, soft_rank=soft_rank),
        logits,
        atol=1e-9,
    )


@pytest.mark.parametrize("soft_rank", ["sigmoid", "l2"])
def test_the_teacher_itself_is_the_optimum(draw: torch.Generator, soft_rank: str) -> None:
    teacher_logits = normal(draw, 50, 40)
    value, gradient = value_and_gradient(
        lambda z: ranking(z, teacher_of(teacher_logits, 12), soft_rank=soft_rank),
        teacher_logits + 3,
    )
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-7


def misordered() -> tuple[SparseTeacher, Tensor]:
    """Five peaks, all far apart; the student has the first two the wrong way round, by 5 nats."""
    teacher_logits = torch.full((1, 20), -40.0)
    teacher_logits[0, :5] = torch.tensor([10.0, 5.0, 0.0, -5.0, -10.0])
    logits = teacher_logits.clone()
    logits[0, :2] = teacher_logits[0, [1, 0]]
    return teacher_of(teacher_logits, 20), logits


def test_gradient_steps_reorder_a_pair_five_nats_apart() -> None:
    teacher, logits = misordered()
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    gaps = []
    for _ in range(200):
        loss = ranking(logits, teacher).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append((logits[0, 0] - logits[0, 1]).item())
    assert gaps[0] < -4.5
    assert gaps[-1] > 1
    assert logits[0, :5].argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    assert loss.item() < 1e-2


def test_l2_gives_no_gradient_to_such_a_pair() -> None:
    """Why the default is not the soft rank of the paper's authors."""
    teacher, logits = misordered()
    value, gradient = value_and_gradient(lambda z: ranking(z, teacher, soft_rank="l2"), logits)
    assert value.item() == pytest.approx(0.1, abs=1e-5)
    assert gradient.abs().max() < 1e-8
    _, gradient = value_and_gradient(lambda z: ranking(z, teacher), logits)
    assert gradient[0, 0] < -1e-4
    assert gradient[0, 1] > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("soft_rank", ["sigmoid", "l2"])
def test_degenerate_unions(draw: torch.Generator, soft_rank: str, dtype: torch.dtype) -> None:
    """Nothing to order gives 0; a student without an order gives 1 and a gradient that points
    the right way.
    """
    logits = normal(draw, 4, 10, dtype=dtype)
    cases = {
        "one id": (teacher_of(logits, 4), logits, 1, 0.0),
        "tied teacher": (teacher_of(torch.zeros_like(logits), 10), logits, 10, 0.0),
        "empty head": (teacher_of(logits, 0, width=3), logits, 5, 0.0),
        "short head, same top": (teacher_of(logits, 1, width=3), logits, 1, 0.0),
        "tied student": (teacher_of(logits, 10), torch.zeros_like(logits), 10, 1.0),
    }
    for name, (teacher, z, k, expected) in cases.items():
        value, gradient = value_and_gradient(
            lambda z, t=teacher, k=k: ranking(z, t, k=k, soft_rank=soft_rank), z
        )
        torch.testing.assert_close(
            value, torch.full_like(value, expected), rtol=0, atol=1e-6, msg=name
        )
        assert torch.isfinite(gradient).all(), name
        if name == "tied student" and soft_rank == "sigmoid":
            assert (gradient.argmin(1) == teacher.ids[:, 0]).all()
            assert (gradient.argmax(1) == teacher.ids[:, -1]).all()
        if not expected:
            assert (gradient == 0).all(), name


def test_short_heads_rank_what_they_have(draw: torch.Generator) -> None:
    """k above K: the rest of the union is the student's, tied at the bottom of the teacher's
    order.
    """
    teacher_logits, logits = separated(draw, 100, 30), separated(draw, 100, 30)
    for width in (2, 9):
        teacher = teacher_of(teacher_logits, 2, width=width)
        value, gradient = value_and_gradient(
            lambda z, t=teacher: ranking(z, t, k=5, strength=1e-3), logits
        )
        np.testing.assert_allclose(
            value.numpy(), slow_ranking(logits, teacher, 5, hard_ranks), rtol=0, atol=1e-6
        )
        assert torch.isfinite(gradient).all()


def test_ranking_options_are_checked(draw: torch.Generator) -> None:
    teacher, logits = teacher_of(normal(draw, 3, 9), 9), normal(draw, 3, 9)
    with pytest.raises(UserError, match="'sigmoid', 'l2'"):
        ranking(logits, teacher, soft_rank="hard")
    with pytest.raises(UserError, match="strength is 0"):
        ranking(logits, teacher, strength=0)


def test_what_falls_on_one_id_is_summed_before_it_is_rounded(rng: np.random.Generator) -> None:
    """In half precision, entry by entry against a sum in float64; most ids are there several
    times.
    """
    ids_PE = torch.from_numpy(rng.integers(0, 9, (7, 30)))
    entries_PE = torch.from_numpy(rng.normal(size=(7, 30))).float()
    before_PV = torch.from_numpy(rng.normal(size=(7, 12))).bfloat16()
    expected = before_PV.double().scatter_add_(1, ids_PE, entries_PE.double())
    found = before_PV.clone()
    _add_entries(found, ids_PE, entries_PE)
    torch.testing.assert_close(found.double(), expected.bfloat16().double(), rtol=2**-7, atol=1e-6)
    assert torch.equal(found[:, 9:], before_PV[:, 9:])
