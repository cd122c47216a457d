"""The sequences and positions that an audit looks at."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, UserError
from logitcask.pipeline.audit.sample import parts, sample


def sequence(name: str, mask: list[int]) -> CachedSequence:
    """Each position's head is its own number."""
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    p = len(positions)
    return CachedSequence(
        sequence_id=name,
        input_ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=np.array(mask, np.bool_),
        positions=positions,
        ids=positions[:, None],
        logprobs=np.zeros((p, 1), np.float32),
        tail_logprob=np.full(p, -np.inf, np.float32),
        target_logprob=np.zeros(p, np.float32),
        target_rank=np.zeros(p, np.int32),
    )


class Reader(list):
    """A cache of these sequences."""

    path = "the cache"

    def __init__(self, sequences, fingerprint="0123456789abcdef" * 4):
        super().__init__(sequences)
        self.manifest = SimpleNamespace(fingerprint=fingerprint)


def test_the_choice_is_the_fingerprints():
    sequences = [sequence(str(i), [0, 1, 1]) for i in range(200)]
    names, again, others = (
        [each.sequence_id for each in sample(Reader(sequences, print_), 20, 100)]
        for print_ in ("a" * 64, "a" * 64, "b" * 64)
    )
    assert names == again
    assert len(set(names)) == 20
    assert len(set(names) & set(others)) < 15
    assert names != sorted(names, key=int)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 6, 99])
def test_of_a_long_sequence_the_first_tokens_are_looked_at(tokens):
    """A position counts if the token that it predicts is among them."""
    mask = [0, 1, 0, 1, 1, 1]
    (found,) = sample(Reader([sequence("s", mask)]), 1, tokens)
    assert found.input_ids.tolist() == list(range(6))[:tokens]
    assert found.loss_mask.tolist() == mask[:tokens]
    assert found.positions.tolist() == [i for i in (0, 2, 3, 4) if i + 1 < tokens]
    assert found.ids[:, 0].tolist() == found.positions.tolist()


def test_sequences_with_nothing_to_compare_are_passed_over():
    empty = [sequence(f"e{i}", [0, 0, 0, 1]) for i in range(10)]
    full = [sequence(f"f{i}", [0, 1]) for i in range(3)]
    names = [each.sequence_id for each in sample(Reader(empty + full), 2, 3)]
    assert len(names) == 2
    assert all(name.startswith("f") for name in names)
    assert len(list(sample(Reader(empty + full), 99, 3))) == 3
    with pytest.raises(UserError, match="none of 10 sequences of the cache has a kept position"):
        list(sample(Reader(empty), 5, 3))


def test_parts_are_all_of_it_in_order():
    whole = sequence("s", [0, 1, 0, 1, 1, 1, 1, 1])
    pieces = list(parts(whole, 3))
    assert [len(piece.positions) for piece in pieces] == [3, 3]
    np.testing.assert_array_equal(np.concatenate([p.positions for p in pieces]), whole.positions)
    assert list(parts(sequence("s", [0, 0]), 3)) == []
