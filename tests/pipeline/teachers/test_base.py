"""Groups of sequences that are scored together."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from logitcask.pipeline.teachers.base import bounded_groups
from logitcask.pipeline.types import Sequence

Make = Callable[[str, list[int]], Sequence]


def test_groups_are_bounded_and_complete(rng: np.random.Generator, as_sequence: Make) -> None:
    sequences = [as_sequence(str(i), [0] * int(n)) for i, n in enumerate(rng.integers(1, 30, 100))]
    groups = list(bounded_groups(iter(sequences), 20))
    assert [sequence for group in groups for sequence in group] == sequences
    assert all(len(group) == 1 or sum(len(s.input_ids) for s in group) <= 20 for group in groups)
    assert all(
        sum(len(s.input_ids) for s in group) + len(after[0].input_ids) > 20
        for group, after in itertools.pairwise(groups)
    )
