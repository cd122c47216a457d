"""The check of a loss against its definition over the whole vocabulary, for the tests of losses.

Shapes: P positions, V vocabulary, K head entries, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from logitcask.train.losses.base import LOSSES, Exactness, SparseTeacher, TailDraws
from logitcask.train.losses.others import find_loss

Definition = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``definition(p [P, V], logits [P, V], target_ids int64[P]) -> [P]``, in float64. p is 0 at ids
that only the student has.
"""

_POSITIONS, _VOCABULARY, _ONLY_STUDENT = 24, 40, 5
_HEAD, _DRAWS = 8, 4
# Sets of draws at each position, and the largest distance of their mean from the definition, in
# standard errors. A right loss passes at all of some hundred means with probability 0.9999.
_SETS, _ERRORS = 4000, 5.0
_ROUNDING = 1e-8


def check_loss(name: str, definition: Definition, *, seed: int = 0, **options: Any) -> None:
    """Checks what a loss says of its exactness, at random distributions in float64.

    With whole heads, values and gradients equal those of ``definition``. With short heads, alone
    and with draws, they are as ``from_head`` and ``from_samples`` say: equal (exact), never higher
    (lower), or equal in the mean over draws (unbiased: values, and gradients along a random
    direction). Nothing is checked of a biased loss beyond whole heads. The student has some ids
    that the teacher cannot predict.

    name:    as in configs.
    options: keyword arguments of the loss.

    Raises AssertionError with the first claim that does not hold, and what ``find_loss`` raises.
    """
    spec, draw = find_loss(name), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 2.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)

    log_p = normal(_POSITIONS, _VOCABULARY).log_softmax(1)
    z = normal(_POSITIONS, _VOCABULARY + _ONLY_STUDENT)
    direction = normal(*z.shape)
    targets = torch.multinomial(log_p.exp(), 1, generator=draw).squeeze(1)
    p = pad(log_p.exp(), (0, _ONLY_STUDENT))
    truth = _with_slope(lambda x: definition(p, x, targets), z, direction)

    def found(teacher: SparseTeacher, times: int = 1) -> tuple[Tensor, Tensor]:
        """(values, gradients along the direction) at the positions, ``times`` times over."""
        prepared = {} if spec.prepare is None else spec.prepare(teacher, options)
        return _with_slope(
            lambda x: LOSSES[name](x, teacher, **options | prepared),
            z.repeat(times, 1),
            direction.repeat(times, 1),
        )

    whole = sparse_teacher(log_p, targets, _VOCABULARY)
    _check(name, "exact", "with whole heads", found(whole), truth)
    head = sparse_teacher(log_p, targets, max(_HEAD, spec.head_k(options)))
    _check(name, spec.from_head, "with heads alone", found(head), truth)
    if spec.from_samples is None:
        return
    many = sparse_teacher(log_p.repeat(_SETS, 1), targets.repeat(_SETS), head.ids.shape[1])
    many = with_draws(many, log_p.repeat(_SETS, 1), _DRAWS, draw)
    each = tuple(part.view(_SETS, -1) for part in found(many, _SETS))
    _check(name, spec.from_samples, f"with {_DRAWS} draws", (each[0], each[1]), truth)


def sparse_teacher(log_p: Tensor, target_ids: Tensor, top_k: int) -> SparseTeacher:
    """The cached form of whole distributions, without draws and without rounding.

    log_p: float64[P, V], nats. target_ids: int64[P].
    """
    values, ids = log_p.sort(dim=1, descending=True, stable=True)
    rest = values[:, top_k:]
    return SparseTeacher(
        ids=ids[:, :top_k],
        logprobs=values[:, :top_k],
        tail_logprob=rest.logsumexp(1)
        if rest.shape[1]
        else log_p.new_full([len(log_p)], -math.inf),
        target_ids=target_ids,
        target_logprob=log_p.gather(1, target_ids.unsqueeze(1)).squeeze(1),
        vocab_size=log_p.shape[1],
        entropy=-torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1),
    )


def with_draws(
    teacher: SparseTeacher, log_p: Tensor, count: int, generator: torch.Generator
) -> SparseTeacher:
    """``teacher`` with ``count`` independent draws from the tail at each position, and their
    logprobs. ``log_p``, float64[P, V], are its whole distributions.
    """
    tail = log_p.exp().scatter(1, teacher.ids, 0.0)
    ids = torch.multinomial(tail, count, replacement=True, generator=generator)
    return replace(teacher, draws=TailDraws(ids, log_p.gather(1, ids)))


def _with_slope(
    loss: Callable[[Tensor], Tensor], z: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """([P], [P]): values, and their derivatives along ``direction``."""
    z = z.detach().requires_grad_()
    value = loss(z)
    assert value.shape == (len(z),), f"values of shape {tuple(value.shape)}, expected ({len(z)},)"
    (gradient,) = torch.autograd.grad(value.sum(), [z])
    return value.detach(), (gradient * direction).sum(1)


def _check(
    name: str,
    claim: Exactness,
    case: str,
    found: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
) -> None:
    """Raises AssertionError unless ``claim`` holds; ``found`` may have a row per set of draws."""
    for part, values, expected in zip(("values", "gradients"), found, truth, strict=True):
        apart = values - expected
        said = f"{name} {case}: {part} are not {claim}"
        if claim == "exact":
            worst = float(apart.abs().max())
            assert worst <= _ROUNDING, f"{said}: {worst:.2g} off the definition"
        elif claim == "lower" and part == "values":
            worst = float(apart.max())
            assert worst <= _ROUNDING, f"{said}: {worst:.2g} above the definition"
        elif claim == "unbiased":
            assert apart.dim() == 2, f"{said}: no draws are used, so there is no mean over them"
            error = apart.std(0) / math.sqrt(len(apart))
            worst = float((apart.mean(0).abs() / error.clamp_min(_ROUNDING)).max())
            assert worst <= _ERRORS, (
                f"{said}: a mean over {len(apart)} sets of draws is {worst:.1f} standard errors off the definition"
            )
