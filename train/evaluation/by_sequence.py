"""Metrics of a model for each sequence, their spread, and bootstrap intervals of their means.

Sequences are resampled, because positions of one sequence depend on each other. Imports no torch:
the values of finished runs are read from files.

Shapes: M metrics that are means over positions, N sequences, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.train.evaluation.names import MOST_NATS, metric_names

Floats = NDArray[np.float64]

INTERVAL = (0.025, 0.975)
"""Quantiles of the resampled means between which an interval lies: 95 %."""


@dataclass(frozen=True, eq=False)
class BySequence:
    """The metrics of a model for each of N sequences. Memory: a few numbers for each sequence.

    sums:      metric -> float64[N], its sum over the kept positions.
    positions: int64[N], kept positions, all above 0.
    ece:       the calibration error over all positions, which is no mean over positions.
    """

    sums: dict[str, Floats]
    positions: NDArray[np.int64]
    ece: float

    def __len__(self) -> int:
        return len(self.positions)

    def means(self) -> dict[str, float]:
        """The metrics of ``logitcask.train.evaluation.evaluate.evaluate``, in its order."""
        stacked = np.array(list(self.sums.values()))
        total = stacked.sum(axis=1) / self.positions.sum()
        return self._named(dict(zip(self.sums, total.tolist(), strict=True)) | {"ece": self.ece})

    def deviations(self) -> dict[str, float]:
        """Standard deviation over the sequences of the mean of each. There is none of ece, and none
        for one sequence.
        """
        if len(self) < 2:
            return {}
        each = {name: values / self.positions for name, values in self.sums.items()}
        each["perplexity"] = _perplexity(each["ce"])
        return self._named({name: float(values.std(ddof=1)) for name, values in each.items()})

    def resampled(self, *, seed: int, resamples: int) -> dict[str, Floats]:
        """Means of ``resamples`` random draws of N sequences with replacement: metric ->
        float64[B]. The same seed draws the same sequences for every model. There is none of ece,
        whose absolute values make the resampled errors larger than the error itself.
        """
        means = resampled_means(
            np.array(list(self.sums.values())), self.positions, seed=seed, resamples=resamples
        )
        found = dict(zip(self.sums, means.T, strict=True))
        found["perplexity"] = _perplexity(found["ce"])
        return found

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        if "perplexity" not in values:
            values["perplexity"] = float(_perplexity(np.float64(values["ce"])))
        k = next((name.partition("@")[2] for name in values if "@" in name), "0")
        return {name: values[name] for name in metric_names(int(k)) if name in values}


def resampled_means(
    sums: Floats, positions: NDArray[np.int64], *, seed: int, resamples: int
) -> Floats:
    """float64[B, M]: means over the positions of randomly drawn sequences.

    sums: float64[M, N]. positions: int64[N]. Memory: that of the arguments and the result.
    """
    rng, count = np.random.default_rng(seed), len(positions)
    found = np.empty((resamples, len(sums)))
    for at in range(resamples):
        times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        found[at] = sums @ times / (positions @ times)
    return found


def interval(resampled: Floats) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means, float64[B]."""
    low, high = np.quantile(resampled, INTERVAL)
    return float(low), float(high)


def _perplexity(cross_entropy: Floats | np.float64) -> Floats:
    return np.exp(np.minimum(cross_entropy, MOST_NATS))
