"""The command, and how likely draws are, if they were made as they should be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcask.pipeline.cli import main

PValue = Callable[[NDArray[np.integer], NDArray[np.floating]], float]

_LEAST_EXPECTED = 10


@pytest.fixture(scope="session")
def tail_p_value() -> PValue:
    """``tail_p_value(samples, tail)``: Pearson's chi-square test that independent draws have these
    probabilities.

    samples: int[R, N], ids; -1 is no draw. tail: float[R, V], not normalised, zero in the head. A
    draw from there is impossible: the answer is 0 then. Rare ids are pooled, so that 10 draws at
    least are expected of each class.
    """
    import torch

    def p_value(samples: NDArray[np.integer], tail: NDArray[np.floating]) -> float:
        statistic, freedom = 0.0, 0
        for ids, weights in zip(samples, tail, strict=True):
            ids = ids[ids >= 0]
            if (weights[ids] == 0).any():
                return 0.0
            expected = len(ids) * weights / weights.sum()
            order = np.argsort(-expected, kind="stable")
            cumulative = expected[order].cumsum()
            common = int((expected >= _LEAST_EXPECTED).sum())
            rare = (
                cumulative[common:] - (cumulative[common - 1] if common else 0)
            ) // _LEAST_EXPECTED
            classes = np.empty(len(weights), np.int64)
            classes[order[:common]] = np.arange(common)
            classes[order[common:]] = common + np.minimum(
                rare, max(0, rare[-1] - 1) if len(rare) else 0
            )
            wanted = np.bincount(classes, weights=expected)
            seen = np.bincount(classes[ids], minlength=len(wanted))
            statistic += ((seen - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
            freedom += len(wanted) - 1
        return float(
            torch.special.gammaincc(
                torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double()
            )
        )

    return p_value


@pytest.fixture(scope="session")
def teacher_cache(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``teacher_cache(*words, env=...)``: the command, in a process of its own."""
    return partial(command, main)
