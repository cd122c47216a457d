"""The sum of losses: as the losses one by one, with weights that move, and states that survive a
checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from logitcask.train.config import TrainConfig, WeightSchedule
from logitcask.train.data.batch import Place
from logitcask.train.data.pairs import pair_texts
from logitcask.train.evaluation.metrics import top_k_overlap
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES, SPECS, SparseTeacher, TailDraws
from logitcask.train.losses.adaptive import TaidState

P, V, K, S = 10, 60, 12, 6


def config(losses: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "cache": "c",
            "student": {"model": "m"},
            "losses": losses,
            "training": {"output_dir": "o"},
            **changes,
        }
    )


@pytest.fixture
def teacher(draw: torch.Generator) -> SparseTeacher:
    log_p = (2.5 * torch.randn(P, V, generator=draw)).log_softmax(1)
    top = log_p.topk(K)
    samples = torch.multinomial(
        log_p.exp().scatter(1, top.indices, 0), S, replacement=True, generator=draw
    )
    return SparseTeacher(
        ids=top.indices,
        logprobs=top.values,
        tail_logprob=torch.log1p(-top.values.exp().sum(1)),
        target_ids=top.indices[:, 1],
        target_logprob=top.values[:, 1],
        vocab_size=V,
        draws=TailDraws(samples, log_p.gather(1, samples)),
        entropy=-(log_p.exp() * log_p).sum(1),
        prior=torch.full((V,), 1 / V),
        writer_logprob=top.values[:, 1] - 0.5,
        pairs=pair_texts(
            [Place(0, 9, 5, 5, (0, True)), Place(1, 9, P - 5, P - 5, (0, False))],
            top.values[:, 1] - 0.5,
            top.values[:, 1],
            2.0,
        ),
    )


def gradient_of(losses: Any, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(losses(logits).sum(), logits)[0]


@pytest.mark.parametrize("tail", [None, "prior", "ghost"])
def test_a_sum_is_the_sum(draw: torch.Generator, teacher: SparseTeacher, tail: str | None) -> None:
    """All losses at once on shared work, in chunks: values and gradient of the losses one by
    one.
    """
    if tail == "ghost":
        teacher = dataclasses.replace(teacher, draws=None, prior=None)
    names = [name for name in LOSSES if name != "random_sampling" or teacher.draws is not None]
    terms = [
        {
            "name": name,
            "weight": 0.5 + i,
            **({"tail": tail} if tail and tail in SPECS[name].tails else {}),
        }
        for i, name in enumerate(names)
    ]
    pair = [{"cache": "c"}, {"cache": "d", "preferred": "c"}]
    objective = Objective(config(terms, cache=pair))
    logits = 2 * torch.randn(P, V + 3, generator=draw)
    per_chunk = objective.per_chunk(teacher)
    found, total = torch.empty_like(logits), []
    for rows in (slice(0, 4), slice(4, 7), slice(7, P)):
        chunk = logits[rows].clone().requires_grad_()
        value, values = per_chunk(chunk, rows)
        total.append(value.detach())
        assert list(values) == names
        found[rows] = torch.autograd.grad(value.sum(), chunk)[0]
    expected, slope = torch.zeros(P), torch.zeros_like(logits)
    for term in terms:
        options = {n: v for n, v in term.items() if n not in ("name", "weight")}

        def loss(x: Tensor, name: str = term["name"], options: dict[str, Any] = options) -> Tensor:
            return LOSSES[name](x, teacher, **options)

        expected += term["weight"] * loss(logits)
        slope += term["weight"] * gradient_of(loss, logits)
    torch.testing.assert_close(torch.cat(total), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4)


def test_the_gradient_takes_the_place_of_the_logits(
    draw: torch.Generator, teacher: SparseTeacher
) -> None:
    """Where all losses share one pass, nothing of the logits' size is made; a loss with its own
    pass keeps them.
    """
    logits = torch.randn(P, V, generator=draw)
    for names, reused in (
        (["forward_kl", "ranking", "ce"], True),
        (["forward_kl", "alpha_beta"], False),
    ):
        chunk = logits.clone().requires_grad_()
        objective = Objective(config([{"name": name} for name in names]))
        value, _ = objective.per_chunk(teacher)(chunk, slice(0, P))
        (gradient,) = torch.autograd.grad(value.sum(), chunk)
        assert (gradient.data_ptr() == chunk.data_ptr()) == reused
        assert torch.equal(chunk.detach(), logits) != reused


def test_dynamic_ranking_weighs_the_others(draw: torch.Generator, teacher: SparseTeacher) -> None:
    objective = Objective(
        config(
            [{"name": "forward_kl"}, {"name": "ranking", "weight": 2, "dynamic": True, "k": 4}],
            ce_weight=0.5,
        )
    )
    logits = torch.randn(P, V, generator=draw)
    total, values = objective.per_chunk(teacher)(logits, slice(0, P))
    overlap = top_k_overlap(logits, teacher, 4)
    expected = values["forward_kl"] * overlap + 2 * values["ranking"] + 0.5 * values["ce"]
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"start": 0, "end": 2}, [0, 0.2, 1, 2]),
        (
            {"start": 1, "end": 0, "kind": "cosine", "ratio": 0.5},
            [1, (1 + math.cos(math.pi / 5)) / 2, 0, 0],
        ),
        ({"start": 3, "end": 1, "kind": "step", "steps": 50}, [3, 3, 1, 1]),
        ({"start": 3, "end": 1, "kind": "linear", "steps": 40}, [3, 2.5, 1, 1]),
        ({"start": 0.7, "kind": "constant"}, [0.7] * 4),
    ],
)
def test_schedules(
    schedule: dict[str, Any], expected: list[float], teacher: SparseTeacher, draw: torch.Generator
) -> None:
    """At steps 0, 10, 50 and 100 of 100."""
    weight = WeightSchedule.model_validate(schedule)
    assert [weight.at(step, 100) for step in (0, 10, 50, 100)] == pytest.approx(expected)
    objective = Objective(config([{"name": "forward_kl", "weight": schedule}], ce_weight=schedule))
    logits = torch.randn(P, V, generator=draw)
    for step, now in zip((0, 10, 50, 100), expected, strict=True):
        objective.begin(step, 100)
        total, values = objective.per_chunk(teacher)(logits, slice(0, P))
        torch.testing.assert_close(total, now * (values["forward_kl"] + values["ce"]))


@pytest.mark.parametrize(
    ("losses", "changes", "match"),
    [
        (
            [{"name": "jsd", "alpha": 1}],
            {},
            "jsd has no option 'alpha'; it has beta, temperature, tail",
        ),
        ([{"name": "ce", "k": 1}], {}, "it has none"),
        ([{"name": "taid", "t": 0.5}], {}, "it has t_start, t_end, alpha, beta, tail"),
        ([{"name": "ce"}], {"ce_weight": 1.0}, "set one of the two"),
        ([{"name": "tvd", "weight": -1}], {}, "greater than or equal to 0"),
        ([{"name": "tvd", "weight": {"start": 0}}], {}, "end is needed"),
        (
            [{"name": "tvd", "weight": {"start": 0, "end": 1, "steps": 3, "ratio": 0.5}}],
            {},
            "not both",
        ),
        (
            [{"name": "tvd", "weight": {"start": 0, "end": 1, "kind": "constant"}}],
            {},
            "kind is constant",
        ),
        (
            [{"name": "tvd", "weight": {"start": 0, "end": 1, "kind": "square"}}],
            {},
            "'step' or 'constant'",
        ),
        ([{"name": "tvd", "weight": float("nan")}], {}, "finite|greater"),
    ],
)
def test_configs_are_checked(
    losses: list[dict[str, Any]], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValidationError, match=match):
        config(losses, **changes)


def test_taid_moves_its_target(rng: np.random.Generator) -> None:
    """By the authors' update; never back, at least linearly, and faster while the loss falls."""
    state, t, momentum, previous = TaidState(alpha=0.02), 0.4, 0.0, None
    losses = np.sort(rng.random(50))[::-1]
    for step, value in enumerate(losses, 1):
        state.update(float(value), step / 200)
        if previous is not None:
            momentum = 0.99 * momentum + 0.01 * (previous - value) / (previous + 1e-15)
            t = min(
                1.0, max(0.4 + 0.6 * step / 200, t + 0.02 / (1 + math.exp(-momentum)) * (1 - t))
            )
        previous = value
        assert state.t == pytest.approx(t)
    assert state.t > 0.4 + 0.6 * 50 / 200
    state.update(1.0, 1.0)
    assert state.t == 1.0


def test_states_go_on_from_a_checkpoint(teacher: SparseTeacher, draw: torch.Generator) -> None:
    terms = [{"name": "taid", "t_start": 0.2, "alpha": 0.5}, {"name": "forward_kl"}]
    one, two = Objective(config(terms)), Objective(config(terms))
    assert one.stateful == ["taid"]
    for step in range(1, 6):
        one.end({"taid": 3.0 / step}, step, 100)
    assert one.state_dict()["taid"]["t"] > 0.3
    two.load_state_dict(one.state_dict())
    one.end({"taid": 0.5}, 6, 100)
    two.end({"taid": 0.5}, 6, 100)
    assert one.state_dict() == two.state_dict()
    logits = torch.randn(P, V, generator=draw)
    _, values = two.per_chunk(teacher)(logits, slice(0, P))
    torch.testing.assert_close(
        values["taid"], LOSSES["taid"](logits, teacher, t=two.state_dict()["taid"]["t"])
    )


def test_a_mean_is_that_of_the_whole_batch(teacher: SparseTeacher, draw: torch.Generator) -> None:
    logits = torch.randn(P, V, generator=draw)
    per_chunk = Objective(config([{"name": "tail_aware", "k": 3}])).per_chunk(teacher)
    parts = [per_chunk(logits[rows], rows)[0] for rows in (slice(0, 3), slice(3, P))]
    torch.testing.assert_close(torch.cat(parts), LOSSES["tail_aware"](logits, teacher, k=3))


def test_what_the_losses_are_with_a_cache(teacher: SparseTeacher) -> None:
    names = ("forward_kl", "jsd", "reverse_kl", "listmle", "adaptive_kl", "tvd")
    terms = [{"name": name} for name in names]
    terms[-1]["tail"] = "ghost"
    objective = Objective(config(terms))
    undated = dataclasses.replace(teacher, draws=TailDraws(teacher.draws.ids))
    ghost = dataclasses.replace(undated, draws=None, prior=None)
    whole = dataclasses.replace(ghost, tail_logprob=torch.full((P,), -math.inf))
    for given, expected in (
        (teacher, ("unbiased", "unbiased", "lower", "exact", "biased", "lower")),
        (
            undated,
            ("unbiased", "lower", "lower", "exact", "biased", "lower"),
        ),  # the others take one cell
        (ghost, ("lower", "lower", "lower", "exact", "biased", "lower")),
        (whole, ("exact",) * 6),
    ):
        assert objective.exactness(given, 10) == dict(zip(names, expected, strict=True))
    # listmle asks for ten; tail_aware, too; so few entries make another loss.
    short = Objective(config([*terms, {"name": "tail_aware"}])).exactness(teacher, 9)
    assert (short["listmle"], short["tail_aware"], short["tvd"]) == ("biased", "biased", "lower")
    assert Objective(config([{"name": "tail_aware"}])).exactness(teacher, 10) == {
        "tail_aware": "unbiased"
    }
    # At its ends jsd is another loss.
    assert Objective(config([{"name": "jsd", "beta": 1}])).exactness(teacher, 10) == {
        "jsd": "lower"
    }
    assert Objective(config([{"name": "jsd", "beta": 0}])).exactness(undated, 10) == {
        "jsd": "unbiased"
    }
