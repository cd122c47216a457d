"""``CachedSequence``: the type that a reader returns and a writer takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TailSamples:
    """T independent sets of ids per position, drawn from the tail in proportion to probability.

    Each of the S draws of a set represents 1/S of the tail mass, so ``tail mass / S * sum over
    draws of f(id)`` is an unbiased estimate of the sum over the tail of ``p(id) f(id)``.

    ids:      int32[P, T, S], padded at the end with -1; an id drawn n times occurs n times.
    logprobs: float32[P, T, S], nats, padded with -inf; None if the cache does not store them.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32] | None = None

    def at(self, rows: slice | NDArray[np.integer]) -> TailSamples:
        """The draws of some of the P positions."""
        return TailSamples(self.ids[rows], None if self.logprobs is None else self.logprobs[rows])


@dataclass(frozen=True, slots=True, eq=False)
class ChosenIds:
    """Ids that another model than the teacher, such as the writer of the text, finds the most
    probable at each position, and the teacher's logprobs of them. Some may be in the head.

    ids:      int32[P, C], no id twice at a position, padded at the end with -1.
    logprobs: float32[P, C], nats, padded with -inf.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def at(self, rows: slice | NDArray[np.integer]) -> ChosenIds:
        """The chosen ids of some of the P positions."""
        return ChosenIds(self.ids[rows], self.logprobs[rows])

    def places_in(self, head: NDArray[np.int32]) -> NDArray[np.int32]:
        """int32[P, C]: the place of each id in the position's head, int32[P, K]; -1 if it is not
        there.
        """
        places = np.full(self.ids.shape, -1, np.int32)
        # Column by column: a comparison of all ids at once would take P x C x K flags.
        for column in range(self.ids.shape[1] if head.shape[1] else 0):
            ids = self.ids[:, column]
            match = head == ids[:, None]
            found = match.any(axis=1) & (ids >= 0)
            places[found, column] = match.argmax(axis=1)[found]
        return places

    def outside(self, head: NDArray[np.int32]) -> ChosenIds:
        """Those of the ids that are not in the head, int32[P, K], as far to the left as possible."""
        kept = (self.places_in(head) < 0) & (self.ids >= 0)
        order = np.argsort(~kept, axis=1, kind="stable")
        width = int(kept.sum(axis=1).max(initial=0))
        ids = np.take_along_axis(np.where(kept, self.ids, -1), order, axis=1)
        logprobs = np.where(kept, self.logprobs, np.float32(-np.inf))
        return ChosenIds(
            ids[:, :width].astype(np.int32),
            np.take_along_axis(logprobs, order, axis=1)[:, :width].astype(np.float32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class CachedSequence:
    """One sequence and the teacher's sparse distribution at each of its P kept positions.

    sequence_id:    stable, unique name.
    input_ids:      int32[n].
    loss_mask:      bool[n], by token.
    positions:      int32[P], the kept positions, ascending; position i predicts token i + 1.
    ids:            int32[P, K], head ids by descending logprob, padded with -1; K is the size of
                    the largest head.
    logprobs:       float32[P, K], nats, padded with -inf.
    tail_logprob:   float32[P], log of the mass outside the head; -inf if the head is everything, NaN if it is not known.
    target_logprob: float32[P], the teacher's logprob of token i + 1; NaN if it is not known.
    target_rank:    int32[P], 0 = the teacher's argmax; -1 if it is not known.
    entropy:        float32[P], nats, of the whole distribution; None if not stored.
    samples:        draws from the tail; None if there are none.
    writer_logprob: float32[P], the logprob of token i + 1 by the model that wrote the text, at
                    temperature 1; None if not stored.
    chosen:         ids chosen by that model; None if not stored.
    """

    sequence_id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprob: NDArray[np.float32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    entropy: NDArray[np.float32] | None = None
    samples: TailSamples | None = None
    writer_logprob: NDArray[np.float32] | None = None
    chosen: ChosenIds | None = None

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return len(self.input_ids)

    @property
    def target_ids(self) -> NDArray[np.int32]:
        """int32[P]: the tokens after the kept positions."""
        return self.input_ids[self.positions + 1]

    def mass_and_nll(self) -> tuple[float, float]:
        """Sums over the positions, where they are known: 1 - tail mass, and -target_logprob (nats)."""
        mass = -np.nansum(np.expm1(self.tail_logprob.astype(np.float64)))
        return float(mass), -float(np.nansum(self.target_logprob, dtype=np.float64))

    def at(self, rows: slice | NDArray[np.integer]) -> CachedSequence:
        """The sequence with some of its P positions, by index; tokens and loss mask unchanged."""
        return replace(
            self,
            positions=self.positions[rows],
            ids=self.ids[rows],
            logprobs=self.logprobs[rows],
            tail_logprob=self.tail_logprob[rows],
            target_logprob=self.target_logprob[rows],
            target_rank=self.target_rank[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
            samples=None if self.samples is None else self.samples.at(rows),
            writer_logprob=None if self.writer_logprob is None else self.writer_logprob[rows],
            chosen=None if self.chosen is None else self.chosen.at(rows),
        )
