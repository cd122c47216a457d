"""What a loss sees of the teacher, the shape every loss has, and what each says of itself.

Shapes: P kept positions, K head entries per position (padded), V vocabulary, S draws from the tail
(padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TailDraws:
    """Draws from the tails of P positions, as tensors on one device. Each of a position's draws
    stands for an equal share of its tail.

    ids:      int64[P, S], repeats included, padded with -1.
    logprobs: None, or float32[P, S], nats, padded with -inf.
    """

    ids: Tensor
    logprobs: Tensor | None = None

    @property
    def finite_logprobs(self) -> Tensor:
        """float32[P, S], nats, 0 for padding. Raises ValueError where none are stored."""
        if self.logprobs is None:
            raise ValueError("these draws have no logprobs")
        return self.logprobs.masked_fill(self.ids < 0, 0)

    def weights(self, tail_logprob: Tensor) -> Tensor:
        """float32[P, S]: the share of the whole distribution that each draw stands for, 0 for
        padding; ``tail_logprob``, float32[P], is the teacher's.
        """
        drawn = self.ids >= 0
        share = tail_logprob.exp() / drawn.sum(1).clamp_min(1)
        return drawn * share.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """The teacher's sparse next-token distributions at P positions, as tensors on one device.

    ids:             int64[P, K], head ids by falling logprob, padded with -1.
    logprobs:        float32[P, K], nats, padded with -inf.
    tail_logprob:    float32[P], log of the mass outside the head; -inf where the head is
                     everything.
    target_ids:      int64[P], the tokens that really follow.
    target_logprob:  float32[P], the teacher's logprob of them.
    vocab_size:      ids the teacher can predict; the student's V may be larger, never smaller
                     (``logitcask.train.data.vocabulary``).
    draws:           None, or what was drawn from the tails.
    entropy:         None, or float32[P], nats, of the whole distribution.
    prior:           None, or float32[vocab_size], probabilities: how a tail may be spread where
                     nothing is known of it.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    target_ids: Tensor
    target_logprob: Tensor
    vocab_size: int
    draws: TailDraws | None = None
    entropy: Tensor | None = None
    prior: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> SparseTeacher:
        """The same teacher at some of the positions (a view)."""
        return _mapped(self, lambda name, tensor: tensor if name == "prior" else tensor[rows])

    def to(self, device: torch.device | str) -> SparseTeacher:
        """The same teacher on another device."""
        return _mapped(self, lambda name, tensor: tensor.to(device))

    def known(self, ids_Pk: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs [P, k], stored [P, k]): what the cache says of these ids, by head, target and
        draws.

        Where it says nothing, the logprob is the highest that the id can have: that of the head's
        last entry, or of the whole tail, whichever is lower.
        """
        ids, logprobs = (
            [self.ids, self.target_ids.unsqueeze(1)],
            [self.logprobs, self.target_logprob.unsqueeze(1)],
        )
        if self.draws is not None and self.draws.logprobs is not None:
            ids.append(self.draws.ids)
            logprobs.append(self.draws.logprobs)
        match_PkE = ids_Pk.unsqueeze(2) == torch.cat(ids, 1).unsqueeze(1)
        found_Pk = torch.where(match_PkE, torch.cat(logprobs, 1).unsqueeze(1), -torch.inf).amax(2)
        # Without a tail, an id that is not stored is one that the teacher cannot predict: below the
        # last entry, however far.
        tail_P = torch.where(torch.isneginf(self.tail_logprob), self.least, self.tail_logprob)
        most_P1 = torch.minimum(tail_P, self.least).unsqueeze(1)
        stored_Pk = match_PkE.any(2)
        return torch.where(stored_Pk, found_Pk, most_P1), stored_Pk

    @property
    def least(self) -> Tensor:
        """float32[P]: the logprob of the last entry of each head, 0 where there is none. No id
        of the tail has more.
        """
        return (
            torch.where(self.ids >= 0, self.logprobs, 0.0).amin(1)
            if self.ids.shape[1]
            else self.tail_logprob * 0
        )


_Tensors = TypeVar("_Tensors", SparseTeacher, TailDraws)


def _mapped(value: _Tensors, change: Callable[[str, Tensor], Tensor]) -> _Tensors:
    """``value`` with ``change`` of a field's name and tensor in place of each tensor, those of its
    draws included.
    """
    changed: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            changed[field.name] = change(field.name, part)
        elif isinstance(part, TailDraws):
            changed[field.name] = _mapped(part, change)
    return replace(value, **changed)


Loss = Callable[..., Tensor]
"""``loss(student_logits [P, V], teacher, **options) -> float32[P]``, nats: a pure function, one
value per position.

In place of the logits it takes a ``StudentPass`` that was made of them and this teacher, which
several losses can share.
"""

Exactness = Literal["exact", "unbiased", "lower", "biased"]
"""How a value stands to the one that the teacher's whole distribution would give.

exact: the same, up to the cache's rounding. unbiased: the same in the mean over fresh draws, and so
is the gradient. lower: never above it. biased: none of these; the loss says what it is then (so are
a prior's reconstruction, and a head scaled up to 1, for any loss).
"""


class LossState(Protocol):
    """What a loss remembers from one optimizer step to the next; the objective owns it, the loss
    only sees its options.
    """

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the loss in this step."""

    def update(self, mean: float, progress: float) -> None:
        """After an optimizer step: the loss's mean over all positions of all processes, and the
        share of steps done.
        """

    def state_dict(self) -> dict[str, float | None]: ...

    def load_state_dict(self, state: dict[str, float | None]) -> None: ...


@dataclass(frozen=True)
class LossSpec:
    """What a loss says of itself, for the docs, the trainer and reports.

    source:       where it comes from: arXiv number, or what it is known as.
    formula:      in one line; p teacher, q student, z its logits, y the target, K the head, m and Q
                  the tails' masses.
    needs:        what of the cache it uses.
    from_head:    what it is with a head that is not everything, and nothing else.
    from_samples: what it is with tail samples; None where it does not use them.
    use:          when to use it.
    tails:        values of its option ``tail``; empty where it has none.
    needs_sample_logprobs: its use of tail samples needs their logprobs, too.
    top_k:        how many of the student's most probable ids it looks at, by its options.
    head_k:       how many entries a head must have for ``from_head`` and ``from_samples`` to hold,
                  by its options.
    masses:       whether it needs the student's masses, or the logits of some ids alone.
    state:        makes its state of the config's options, for a loss that has one.
    prepare:      options that follow from the whole batch's teacher, for a loss that is not one of
                  positions alone.
    same_as:      the name of the loss that it is with some of its options; None with all others.
    prior_product: with ``tail: prior`` the logits' product with the prior is enough; other losses
    take the logits whole.
    dynamic:      whether its term may scale the others with the overlap of both top k, of its own
                  ``top_k``.
    by_overlap:   whether such a term scales it.
    """

    name: str
    source: str
    formula: str
    needs: str
    from_head: Exactness
    from_samples: Exactness | None
    use: str
    tails: tuple[str, ...] = ()
    needs_sample_logprobs: bool = False
    top_k: Callable[[dict[str, Any]], int] = lambda options: 0
    head_k: Callable[[dict[str, Any]], int] = lambda options: 0
    masses: bool = True
    state: Callable[..., LossState] | None = None
    prepare: Callable[[SparseTeacher, dict[str, Any]], dict[str, Any]] | None = None
    same_as: Callable[[dict[str, Any]], str | None] = lambda options: None
    prior_product: bool = False
    dynamic: bool = False
    by_overlap: bool = True

    @property
    def state_options(self) -> dict[str, Any]:
        """The options of the state alone, with their defaults."""
        return (
            {}
            if self.state is None
            else {name: p.default for name, p in signature(self.state).parameters.items()}
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options that a config may set, with their defaults: those of the state, then those
        of the function.
        """
        given = set() if self.state is None else set(self.state().options())
        arguments = signature(LOSSES[self.name]).parameters.items()
        own = {
            n: p.default
            for n, p in arguments
            if p.kind is Parameter.KEYWORD_ONLY and n not in given
        }
        return self.state_options | own


LOSSES: dict[str, Loss] = {}
"""Every loss by the name that configs use."""
SPECS: dict[str, LossSpec] = {}
"""What each of them says of itself."""

_L = TypeVar("_L", bound=Loss)


def loss(**description: Any) -> Callable[[_L], _L]:
    """Enters a function into ``LOSSES`` under its own name, and its ``LossSpec`` into ``SPECS``."""

    def enter(function: _L) -> _L:
        SPECS[function.__name__] = LossSpec(name=function.__name__, **description)
        LOSSES[function.__name__] = function
        return function

    return enter
