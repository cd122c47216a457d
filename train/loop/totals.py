"""Running sums of a training, since the last log record and since the last optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from logitcask.train.data.batch import Place
from logitcask.train.distributed import gathered
from logitcask.train.model.divergence import check_finite
from logitcask.train.model.precision import summed


class LogTotals:
    """Sums of this process's losses since the last record, and totals of earlier runs.

    names: names of the caches, by number.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._earlier_seconds = 0.0
        self._positions_trained = 0
        self._clear()
        self.start()

    def start(self) -> None:
        """Begins the time of the training."""
        self._started = self._last_record = time.monotonic()

    def resume(self, history: list[dict[str, float]]) -> None:
        """Continues from the last training record in the log of a checkpoint."""
        records = [record for record in history if "positions" in record]
        if records:
            self._positions_trained = int(records[-1]["positions"])
            self._earlier_seconds = records[-1]["seconds"]

    def add(self, values: dict[str, Tensor], positions: int) -> None:
        """Adds the losses of a batch by name, each at the positions to which it applies.

        positions: P, all positions of the batch.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + summed(value)
            self._counts[name] = self._counts.get(name, 0) + len(value)
        self._positions += positions

    def add_by_cache(self, layout: tuple[Place, ...], objective: Tensor) -> None:
        """Adds the minimised value at each position to the sums of its cache."""
        start = 0
        for source, places in groupby(layout, lambda place: place.source):
            stop = start + sum(place.chosen for place in places)
            self._cache_positions[source] = self._cache_positions.get(source, 0) + stop - start
            self._cache_sums[source] = self._cache_sums.get(source, 0) + summed(
                objective[start:stop]
            )
            start = stop

    def waited(self, seconds: float) -> None:
        """Adds time in which the training waited for data."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Excludes time from the total in which waiting for data is measured."""
        self._last_record += seconds

    def record(self, step: int) -> dict[str, float]:
        """Means over all processes since the last record, and totals over all resumed runs. Resets
        the sums of the means.

        Empty if nothing was added. Raises UserError if a mean is not finite.
        """
        if not self._sums:
            return {}
        totals = self._gathered()
        positions = totals["positions"]["all"]
        found = {
            f"loss_{name}": total / max(1, totals["counts"][name])
            for name, total in totals["losses"].items()
        }
        check_finite(found, f"at step {step}")
        self._positions_trained += int(positions)
        found["positions"] = self._positions_trained
        found["seconds"] = self._earlier_seconds + time.monotonic() - self._started
        found |= {
            f"cache_{self._names[source]}": total / totals["cache_positions"][source]
            for source, total in sorted(totals["caches"].items())
        }
        now = time.monotonic()
        found["data_wait"] = self._waited / max(now - self._last_record, 1e-9)
        self._last_record = now
        self._clear()
        return found

    def _clear(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._positions = 0
        self._cache_sums: dict[int, Tensor | float] = {}
        self._cache_positions: dict[int, int] = {}
        self._waited = 0.0

    def _gathered(self) -> dict[str, dict[Any, float]]:
        """The sums of all processes."""
        mine: dict[str, dict[Any, Any]] = {
            "losses": self._sums,
            "counts": self._counts,
            "positions": {"all": self._positions},
            "caches": self._cache_sums,
            "cache_positions": self._cache_positions,
        }
        totals: dict[str, dict[Any, float]] = {kind: {} for kind in mine}
        for part in gathered(
            {kind: {name: float(x) for name, x in sums.items()} for kind, sums in mine.items()}
        ):
            for kind, sums in part.items():
                for name, value in sums.items():
                    totals[kind][name] = totals[kind].get(name, 0.0) + value
        return totals


class StepTotals:
    """Sums of the losses ``names`` since the last optimizer step.

    sums: [2 * names], first the sums, then the numbers of positions to which each loss applies.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.sums: Tensor | None = None

    def add(self, values: dict[str, Tensor], device: torch.device) -> None:
        """Adds the losses of a batch by name, each at the positions to which it applies."""
        if not self._names:
            return
        nothing = torch.zeros(0, device=device)
        found = [values.get(name, nothing) for name in self._names]
        counts = [torch.tensor(len(each), device=device) for each in found]
        sums = torch.stack([*map(summed, found), *map(summed, counts)])
        self.sums = sums if self.sums is None else self.sums + sums

    def means(self, reduced: Callable[[Tensor], Tensor]) -> dict[str, float] | None:
        """Means over all processes; None if nothing was added. A loss that applied to no position
        has none. ``reduced`` adds sums over processes. Resets the sums.
        """
        if self.sums is None:
            return None
        found = reduced(self.sums).tolist()
        self.sums = None
        sums, counts = found[: len(self._names)], found[len(self._names) :]
        return {
            name: total / count
            for name, total, count in zip(self._names, sums, counts, strict=True)
            if count
        }
