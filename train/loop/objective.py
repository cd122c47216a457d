"""The weighted sum of a config's losses, as one function of a chunk of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from logitcask.train.config import TrainConfig, WeightSchedule
from logitcask.train.head.chunked import PerChunk
from logitcask.train.losses import SPECS, LossState, SparseTeacher, StudentPass
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.exactness import exactness_of
from logitcask.train.losses.others import call_loss
from logitcask.train.losses.ranking import top_k_overlap


class Objective:
    """The sum of ``weight * loss`` over the config's losses, plus ``ce_weight`` * hard-label loss.

    All losses of a chunk share one ``StudentPass``, so a sum costs about as much as its most
    expensive term.

    With a dynamic term (the ranking of RLKD, equation 2) the other teacher losses of a position are
    weighted by the overlap of the student's and the teacher's top k there, with that term's k.

    A loss may apply to some caches of a mixture only. It then adds nothing to the sum at positions
    of other caches, and has no values there.

    A loss of pairs needs the student's logprobs of two whole texts, from a first pass. The trainer
    gives ``positions_per_pair`` of each optimizer step.

    Weights may have a schedule, and some losses have a state. The trainer gives the current step
    (``begin``) and, for stateful losses, their means (``end``), which are the same on all
    processes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._weights = {term.name: term.weight for term in config.losses}
        if config.ce_weight != 0.0:
            self._weights["ce"] = config.ce_weight
        self._config = config
        self.of_pairs = any(SPECS[name].of_pairs for name in self._weights)
        self.positions_per_pair: Tensor | float = 1.0
        self._dynamic = next((term.name for term in config.losses if term.dynamic), None)
        self._options: dict[str, dict[str, Any]] = {name: {} for name in self._weights}
        self._states: dict[str, LossState] = {}
        for term in config.losses:
            options = term.options
            make = SPECS[term.name].state
            if make is not None:
                own = SPECS[term.name].state_options
                self._states[term.name] = make(
                    **{name: options.pop(name) for name in own if name in options}
                )
            self._options[term.name] = options
        self.begin(0, 1)

    def applying(self, source: int | None) -> list[str]:
        """The terms that apply to a cache, by its number in the config; None: all."""
        if source is None or len(self._config.caches) == 1:
            return list(self._weights)
        here = {term.name for term in self._config.applying(source)}
        if self._config.ce_weight != 0.0:
            here.add("ce")
        return [name for name in self._weights if name in here]

    @property
    def stateful(self) -> list[str]:
        """The losses whose means ``end`` needs."""
        return list(self._states)

    def begin(self, step: int, steps: int) -> None:
        """Begins the optimizer step after ``step`` of all ``steps`` steps."""
        self._now = {
            name: weight.at(step, steps) if isinstance(weight, WeightSchedule) else weight
            for name, weight in self._weights.items()
        }

    def end(self, means: dict[str, float], step: int, steps: int) -> None:
        """Ends optimizer step ``step``; ``means``: of the stateful losses over the positions to which
        they applied. The state of others stays.
        """
        for name, state in self._states.items():
            if name in means:
                state.update(means[name], step / max(1, steps))

    def state_dict(self) -> dict[str, dict[str, float | None]]:
        """The state of stateful losses for a checkpoint, as numbers; empty without such losses."""
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, states: dict[str, dict[str, float | None]]) -> None:
        """Restores ``state_dict``."""
        for name, state in self._states.items():
            state.load_state_dict(states[name])

    def weights(self) -> list[tuple[str, str]]:
        """(name, weight as text) of every term, the hard-label cross-entropy as "ce"."""
        return [
            (name, str(weight) if isinstance(weight, WeightSchedule) else f"{weight:g}")
            for name, weight in self._weights.items()
        ]

    def exactness(
        self, teacher: SparseTeacher, shortest_head: int, source: int | None = None
    ) -> dict[str, Exactness]:
        """The exactness of each loss that applies to the cache ``source``, with a cache like
        ``teacher``: exact, unbiased, lower or biased (``logitcask.train.losses.base.Exactness``).

        ``shortest_head``: smallest number of entries of the cache's heads.
        """
        return {
            name: exactness_of(name, self._options[name], teacher, shortest_head)
            for name in self.applying(source)
        }

    def per_chunk(self, teacher: SparseTeacher, source: int | None = None) -> PerChunk:
        """The function for ``logitcask.train.head.chunked.head_losses``; its values are the
        unweighted terms, by name.

        ``teacher`` is that of the whole batch, because some losses need a value of all its
        positions. ``source``: the number of its cache in the config; None: all terms apply.
        """
        names = self.applying(source)
        options = {name: self._options[name] for name in names}
        for name, own in list(options.items()):
            prepare, state = SPECS[name].prepare, self._states.get(name)
            if prepare is not None:
                options[name] = {**own, **prepare(teacher, own)}
            if state is not None:
                options[name] = {**own, **state.options()}
        asked = any(
            SPECS[name].prior_product and own.get("tail") == "prior"
            for name, own in options.items()
        )
        prior = asked and teacher.prior is not None
        top_k = max(SPECS[name].top_k(self._options[name]) for name in names)
        masses = any(SPECS[name].masses for name in names)
        overlap_k: int | None = None
        if self._dynamic in names:
            overlap_k = SPECS[self._dynamic].top_k(self._options[self._dynamic])

        def losses(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            part = teacher[rows]
            student = StudentPass(
                logits_CV,
                part,
                top_k=top_k,
                prior=prior,
                masses=masses,
                may_overwrite=True,
            )
            overlap = None if overlap_k is None else top_k_overlap(student, part, overlap_k)
            total = logits_CV.new_zeros(len(logits_CV), dtype=student.dtype)
            values = {}
            for name in names:
                weight = self._now[name]
                values[name] = call_loss(name, student, part, options[name])
                weighted = values[name] * weight
                total = total + (
                    weighted
                    if overlap is None or not SPECS[name].by_overlap
                    else weighted * overlap
                )
            return total, values

        return losses
