"""The first reading of an import's source: what its numbers are, and whether they can be right.

Layouts carry no checks of their own, so the numbers are checked by what they say. Heads of
logprobs have at most a mass of 1. The token that follows is far more often in the head of its own
position than in that of the position before or after, whoever the teacher is.

Shapes: R rows, P kept positions, K entries (padded).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import DataHash
from logitcask.pipeline.imports.base import Held, Layout
from logitcask.pipeline.imports.distributions import (
    log_masses,
    positions_of,
    sorted_rows,
    without_forced,
)

log = logging.getLogger(__name__)

_MASS = 1.05  # a head's mass up to which rounding and a codec's fit explain it
_ABOVE = 0.01  # share of positions that may be above
_WHOLE = 2e-3  # distance from 1 at which a head's mass may be 1, in 16 bits
_ALL_WHOLE = 0.995  # share of such heads above which a layout has scaled them to 1
_FEW = 0.05  # nats' mass on average below which numbers are hardly logprobs
_SHIFT_ROWS = 20_000  # rows in which the place of the next token is looked for
_SHIFT_MARGIN = 0.10
_SHIFT_RATIO = 1.5
_LEAST_ROWS = 64


@dataclass
class Survey:
    """What a source holds, gathered sequence by sequence.

    counters: sequences, tokens and positions. smallest, largest: entries of a head. longest: tokens
    of a sequence.
    """

    layout: Layout
    vocab_size: int
    counters: Counter[str] = field(default_factory=Counter)
    smallest: int = 1 << 30
    largest: int = 0
    longest: int = 0
    all_learnt: bool = True
    _hash: DataHash = field(default_factory=DataHash)
    _unknown: Counter[str] = field(default_factory=Counter)
    _above: int = 0
    _whole: int = 0
    _mass: float = 0.0
    _highest: float = 0.0
    _hits: Counter[int] = field(default_factory=Counter)
    _rows: int = 0

    def add(self, held: Held, name: str) -> None:
        """Takes in a sequence, which the cache will call ``name``. Raises UserError if it cannot be
        stored.
        """
        tokens = held.input_ids
        if not len(tokens):
            raise UserError(f"{held.name} has no tokens")
        self._check_ids(held.name, "token ids", tokens)
        ids, values = sorted_rows(held)
        self._check_ids(held.name, "ids of its heads", ids[ids >= 0])
        self._look_for_next_tokens(held, ids)
        kept = positions_of(held, ids)
        positions = held.first + kept
        ids, values = ids[kept], values[kept]
        mask = np.zeros(len(tokens), np.bool_)
        mask[positions + 1] = True
        self._hash.update(name, tokens.astype(np.int32), mask)
        self.counters += Counter(sequences=1, tokens=len(tokens), kept_positions=len(positions))
        self.longest = max(self.longest, len(tokens))
        self.all_learnt &= len(positions) == len(tokens) - 1
        if not len(positions):
            return
        mass = np.exp(np.minimum(log_masses(values), 700))
        self._above += int((mass > _MASS).sum())
        self._whole += int((np.abs(mass - 1) < _WHOLE).sum())
        self._mass += float(np.minimum(mass, 1).sum())
        self._highest = max(self._highest, float(mass.max()))
        self.counters["scaled_to_1"] += int((mass > 1).sum())
        targets = tokens[positions + 1]
        known = np.full(len(ids), np.nan)
        if self.layout.forced:
            known = without_forced(ids, values, targets)
        outside = ~(ids == targets[:, None]).any(axis=1)
        self._unknown["targets"] += int((outside & np.isnan(known)).sum())
        self._unknown["ranks"] += int((outside & ~np.isnan(known)).sum())
        size = (ids >= 0).sum(axis=1)
        self.smallest = min(self.smallest, int(size.min()))
        self.largest = max(self.largest, int(size.max()))

    def _check_ids(self, name: str, what: str, ids: NDArray[np.int64]) -> None:
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise UserError(
                f"{name}: {what} go from {ids.min():,} to {ids.max():,}, beyond the vocabulary of {self.vocab_size:,}; set "
                "--vocab-size to the ids that the teacher predicts, or name another --tokenizer"
            )

    def _look_for_next_tokens(self, held: Held, ids: NDArray[np.int64]) -> None:
        """Counts rows whose head holds the token that they are about, the one before, and the one
        after.
        """
        if self._rows >= _SHIFT_ROWS:
            return
        at = held.first + 1 + np.arange(len(ids))
        use = (at >= 1) & (at + 1 < len(held.input_ids)) & (ids >= 0).any(axis=1)
        at, ids = at[use], ids[use]
        self._rows += len(at)
        for shift in (-1, 0, 1):
            hit = (ids == held.input_ids[at + shift][:, None]).any(axis=1)
            self._hits[shift] += int(hit.sum())

    def holds_logits(self, asked: Literal["auto", "logprobs", "logits"]) -> bool:
        """Whether the numbers are logits. Raises UserError if they contradict ``asked``, cannot be
        told apart, or belong to other tokens.
        """
        if not self.counters["sequences"]:
            raise UserError("the source holds no sequences")
        positions = self.counters["kept_positions"]
        if not positions:
            raise UserError("no token of the source is learnt; see its labels or masks")
        self._check_alignment()
        above, mean = self._above / positions, self._mass / positions
        asked = self.layout.values if asked == "auto" else asked
        if (
            asked == "auto"
            and self.largest < self.vocab_size
            and self._whole > _ALL_WHOLE * positions
        ):
            log.info(
                "the heads' masses are all 1, so they were scaled to 1, and the mass outside them is not known; "
                "--values logprobs takes it for 0"
            )
            asked = "logits"
        if asked == "logits" or (asked == "auto" and above > _ABOVE):
            self.counters["scaled_to_1"] = 0
            return True
        if above > _ABOVE:
            raise UserError(
                f"{above:.1%} of the heads have a mass above {_MASS:g} (up to {self._highest:.3g}), so the numbers are no "
                "logprobs, or the settings of the codec are others; give the right ones, or --values logits"
            )
        if asked == "auto" and mean < _FEW:
            raise UserError(
                f"the heads hold {mean:.2%} of the mass on average, if the numbers are logprobs; say which they are: --values "
                "logprobs or --values logits"
            )
        return False

    def _check_alignment(self) -> None:
        if self._rows < _LEAST_ROWS:
            return
        share = {shift: hits / self._rows for shift, hits in self._hits.items()}
        best = max(share, key=lambda shift: share[shift])
        if share[best] > _SHIFT_RATIO * share[0] and share[best] > share[0] + _SHIFT_MARGIN:
            which = "after" if best > 0 else "before"
            raise UserError(
                f"the heads hold the token that they should be about at {share[0]:.0%} of the positions, and the token {which} "
                f"it at {share[best]:.0%}: the rows are shifted by one, or belong to other tokens; see docs/layouts.md for "
                "where this layout has them"
            )

    def unknown(self, *, logits: bool) -> tuple[Literal["tail", "targets", "ranks"], ...]:
        """What a cache of this source does not know."""
        found: list[Literal["tail", "targets", "ranks"]] = []
        if logits and self.smallest < self.vocab_size:
            found.append("tail")
        if self._unknown["targets"]:
            found.append("targets")
        if self._unknown["ranks"]:
            found.append("ranks")
        return tuple(found)

    def data_sha256(self) -> str:
        """sha256 of the data, as a manifest has it."""
        return self._hash.hexdigest()
