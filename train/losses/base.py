"""The base of all losses: the teacher that they are given, their common signature, the registry.

Shapes: P kept positions, K head entries per position (padded), V vocabulary, S draws from the tail
(padded), C chosen ids of the tail (padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TailDraws:
    """Draws from the tails of P positions, as tensors on one device. The draws of a position have
    equal shares of its tail.

    ids:      int64[P, S], repeats included, padded with -1.
    logprobs: None, or float32[P, S], nats, padded with -inf.
    """

    ids: Tensor
    logprobs: Tensor | None = None

    @property
    def finite_logprobs(self) -> Tensor:
        """float32[P, S], nats, 0 for padding. Raises ValueError if none are stored."""
        if self.logprobs is None:
            raise ValueError("these draws have no logprobs")
        return self.logprobs.masked_fill(self.ids < 0, 0)

    def weights(self, tail_logprob: Tensor) -> Tensor:
        """float32[P, S]: each draw's share of the whole distribution, 0 for padding.

        ``tail_logprob``, float32[P], is the teacher's.
        """
        drawn = self.ids >= 0
        share = tail_logprob.exp() / drawn.sum(1).clamp_min(1)
        return drawn * share.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class ChosenTail:
    """Ids of the tails of P positions that another model finds the most probable there, with the
    teacher's logprobs, as tensors on one device. No id is a head's.

    ids:          int64[P, C], padded with -1.
    logprobs:     float32[P, C], nats, padded with -inf.
    left_logprob: float32[P], log of the tail's mass outside these ids; -inf if nothing is left.
    """

    ids: Tensor
    logprobs: Tensor
    left_logprob: Tensor

    @classmethod
    def of(
        cls,
        ids: Tensor,
        logprobs: Tensor,
        *,
        head_ids: Tensor,
        tail_logprob: Tensor,
        vocab_size: int,
        rounding: float = 0.0,
    ) -> ChosenTail:
        """These ids beside heads [P, K] and tails [P] of a vocabulary.

        rounding: largest relative error of a tail's mass and of the ids' masses together. What is
                  left of a tail is a difference, and is never below the tail's mass times this.
        """
        mass = tail_logprob.exp()
        known = torch.where(ids >= 0, logprobs.exp(), 0).sum(1)
        least = max(rounding, torch.finfo(mass.dtype).eps)
        left = torch.maximum(mass - known, least * mass).log()
        stored = (head_ids >= 0).sum(1) + (ids >= 0).sum(1)
        return cls(ids, logprobs, left.masked_fill(stored == vocab_size, -torch.inf))

    def has(self, ids: Tensor) -> Tensor:
        """bool[P, S]: which of ``ids`` [P, S] are chosen."""
        return (ids.unsqueeze(2) == self.ids.unsqueeze(1)).any(2) & (ids >= 0)


@dataclass(frozen=True, eq=False)
class PairTexts:
    """The two texts of a prompt, as tensors at P positions of either of them. Column 0 is that of
    the preferred text, column 1 that of the other. Nothing here has a gradient.

    preferred: bool[P], whether the position is one of the preferred text.
    log_q:     float[P, 2], nats, the student's logprob of the text's learnt tokens together.
    log_p:     float[P, 2], nats, the teacher's.
    tokens:    float[P, 2], the numbers of learnt tokens.
    share:     float[P], the value of the position divided by the loss of its pair. Over a pair it
               sums to the mean number of positions of a pair in the optimizer step, so that the
               mean over the positions of all pairs is the mean over the pairs.
    """

    preferred: Tensor
    log_q: Tensor
    log_p: Tensor
    tokens: Tensor
    share: Tensor

    def __getitem__(self, rows: slice) -> PairTexts:
        """The pairs at the positions ``rows``."""
        return _mapped(self, lambda name, tensor: tensor[rows])


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """The teacher's sparse next-token distributions at P positions, as tensors on one device.

    ids:             int64[P, K], head ids by falling logprob, padded with -1.
    logprobs:        float32[P, K], nats, padded with -inf.
    tail_logprob:    float32[P], log of the mass outside the head; -inf if the head is the whole
                     distribution, NaN everywhere if it is not known.
    target_ids:      int64[P], the next tokens in the data.
    target_logprob:  float32[P], the teacher's logprobs of the targets; NaN where it is not known.
    vocab_size:      number of ids that the teacher can predict. The student's V may be larger,
                     never smaller (``logitcask.train.data.vocabulary``).
    draws:           None, or the draws from the tails.
    chosen:          None, or ids of the tails that the text's writer has chosen.
    entropy:         None, or float32[P], nats, of the whole distribution.
    writer_logprob:  None, or float32[P], nats, of the targets, by the model that wrote the text, at
                     temperature 1.
    prior:           None, or float32[vocab_size]: probabilities over which a tail can be spread if
                     the cache holds only its mass.
    tail_known:      whether the tails' masses are known. If not, logprobs are known up to a
                     constant of each position.
    targets_known:   whether all targets' logprobs are known.
    pairs:           None, or the pair of texts of which each position is part.
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
    tail_known: bool = True
    targets_known: bool = True
    writer_logprob: Tensor | None = None
    pairs: PairTexts | None = None
    chosen: ChosenTail | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> SparseTeacher:
        """The teacher at the positions ``rows``, as a view."""
        return _mapped(self, lambda name, tensor: tensor if name == "prior" else tensor[rows])

    def to(self, device: torch.device | str) -> SparseTeacher:
        """The teacher with its tensors on ``device``."""
        return _mapped(self, lambda name, tensor: tensor.to(device))

    def known(self, ids_Pk: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs [P, k], stored [P, k]): the cached logprobs of these ids, from head, target,
        draws and chosen ids.

        ``stored`` is False for an id without a cached logprob. Its logprob here is the highest one
        possible: that of the head's last entry or that of the whole tail, whichever is lower.
        """
        targets = self.target_ids
        if not self.targets_known:
            targets = targets.masked_fill(self.target_logprob.isnan(), -2)  # no id
        ids, logprobs = (
            [self.ids, targets.unsqueeze(1)],
            [self.logprobs, self.target_logprob.unsqueeze(1)],
        )
        if self.draws is not None and self.draws.logprobs is not None:
            ids.append(self.draws.ids)
            logprobs.append(self.draws.logprobs)
        if self.chosen is not None:
            ids.append(self.chosen.ids)
            logprobs.append(self.chosen.logprobs)
        match_PkE = ids_Pk.unsqueeze(2) == torch.cat(ids, 1).unsqueeze(1)
        found_Pk = torch.where(match_PkE, torch.cat(logprobs, 1).unsqueeze(1), -torch.inf).amax(2)
        # Without a tail, the teacher cannot predict an id that is not stored. The bound is then the
        # head's last entry alone.
        # Of a tail whose mass is not known, nothing more is known either.
        bounded = torch.isfinite(self.tail_logprob)
        tail_P = torch.where(bounded, self.tail_logprob, self.least)
        most_P1 = torch.minimum(tail_P, self.least).unsqueeze(1)
        stored_Pk = match_PkE.any(2)
        return torch.where(stored_Pk, found_Pk, most_P1), stored_Pk

    @property
    def least(self) -> Tensor:
        """float32[P]: the logprob of the last entry of each head, 0 for an empty head. No id of
        the tail has a higher one.
        """
        return (
            torch.where(self.ids >= 0, self.logprobs, 0.0).amin(1)
            if self.ids.shape[1]
            else self.tail_logprob * 0
        )


_Tensors = TypeVar("_Tensors", bound=SparseTeacher | TailDraws | ChosenTail | PairTexts)


def _mapped(value: _Tensors, change: Callable[[str, Tensor], Tensor]) -> _Tensors:
    """A copy of ``value`` with each tensor, also those of its draws, chosen ids and pairs, replaced
    by ``change(field name, tensor)``.
    """
    changed: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            changed[field.name] = change(field.name, part)
        elif isinstance(part, TailDraws | ChosenTail | PairTexts):
            changed[field.name] = _mapped(part, change)
    return replace(value, **changed)


Loss = Callable[..., Tensor]
"""``loss(student_logits [P, V], teacher, **options) -> float32[P]``, nats: a pure function, one
value per position.

It also takes a ``StudentPass`` in place of the logits, made from the logits and this teacher.
Several losses can share one pass.
"""

Exactness = Literal["exact", "unbiased", "lower", "biased"]
"""The relation of a loss's value to its value with the teacher's whole distribution.

exact:    equal, up to the cache's rounding.
unbiased: equal in the mean over fresh draws; the same holds for the gradient.
lower:    never higher.
biased:   none of these; the loss documents its own value. With a tail spread by the prior, or a
          head scaled up to 1, every loss is biased.
"""


class LossState(Protocol):
    """The state of a loss from one optimizer step to the next. The objective owns it; the loss
    sees only its options.
    """

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the loss in this step."""

    def update(self, mean: float, progress: float) -> None:
        """Takes in an optimizer step: ``mean`` is the loss's mean over all positions of all
        processes, ``progress`` the share of steps done.
        """

    def state_dict(self) -> dict[str, float | None]: ...

    def load_state_dict(self, state: dict[str, float | None]) -> None: ...


@dataclass(frozen=True)
class LossSpec:
    """The description of a loss, read by the docs, the trainer and reports.

    source:       the paper: arXiv number, or a common name.
    formula:      one line; p teacher, q student, z the student's logits, y the target, K the head,
                  m and Q the tail masses of teacher and student.
    needs:        the parts of the cache that it uses.
    from_head:    its exactness with a head that is not the whole distribution, and no tail samples.
    from_samples: its exactness with tail samples; None if it does not use them.
    use:          the case that it is meant for.
    tails:        values of its option ``tail``; empty without that option.
    needs_sample_logprobs: whether it can use tail samples only with their logprobs.
    top_k:        number of the student's most probable ids that it uses, from its options.
    head_k:       entries that a head must have for ``from_head`` and ``from_samples`` to hold, from
                  its options.
    masses:       whether it needs the student's masses; False if the logits of some ids are enough.
    state:        makes its state from the config's options; None for a loss without state.
    prepare:      makes options from the teacher of the whole batch; None for a loss that treats
                  each position alone.
    same_as:      the name of the loss that it equals with these options, or None.
    prior_product: whether ``tail: prior`` needs only the product of logits and prior; other losses
                  need all logits.
    own_samples:  whether it takes the text for samples of the whole distribution of the model that
                  wrote it.
    dynamic:      whether its term can scale the other terms by the overlap of the teacher's and the
                  student's top ``top_k``.
    by_overlap:   whether such a term scales this loss.
    of_pairs:     whether it is a loss of two texts of a prompt. It applies to the caches that are
                  read in pairs, and its teacher has ``pairs``.
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
    own_samples: bool = False
    dynamic: bool = False
    by_overlap: bool = True
    of_pairs: bool = False

    def __post_init__(self) -> None:
        for field, also in (("from_head", ()), ("from_samples", (None,))):
            found, expected = getattr(self, field), (*get_args(Exactness), *also)
            if found not in expected:
                raise ValueError(
                    f"{self.name}: {field} is {found!r}; expected {', '.join(map(repr, expected))}"
                )

    @property
    def state_options(self) -> dict[str, Any]:
        """The options of the state, with their defaults."""
        return (
            {}
            if self.state is None
            else {name: p.default for name, p in signature(self.state).parameters.items()}
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options that a config can set, with their defaults: first the state's, then the
        function's.
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
"""The losses, by their names in configs: all of this package, and the imported ones of others."""
SPECS: dict[str, LossSpec] = {}
"""The descriptions of the losses, by the same names."""

_L = TypeVar("_L", bound=Loss)


def loss(**description: Any) -> Callable[[_L], _L]:
    """Registers a function in ``LOSSES``, and its ``LossSpec`` in ``SPECS``, under its name in
    configs: its own name, or ``MODULE:NAME`` for a function outside this package.
    """

    def enter(function: _L) -> _L:
        module, name = function.__module__, function.__name__
        name = name if is_own(function) else f"{module}:{name}"
        SPECS[name] = LossSpec(name=name, **description)
        LOSSES[name] = function
        return function

    return enter


def is_own(function: Loss) -> bool:
    """Whether ``function`` is a loss of this package."""
    return function.__module__.startswith(f"{__package__}.")
