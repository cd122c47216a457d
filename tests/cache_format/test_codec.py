"""The numbers: what is stored comes back within the stated bounds, and what cannot be stored is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_format import CachedSequence, DamagedCacheError, UserError
from cache_format.codec import ContentHash, PackedBatch, check_step, encode_batch, validate


def round_trip(sequences, vocab_size, step):
    batch = encode_batch(sequences, vocab_size, step)
    packed = PackedBatch(batch, vocab_size, step, "test")
    return [packed.decode(row) for row in range(len(packed))]


@pytest.mark.parametrize("vocab_size", [2, 255, 256, 257, 65_536, 65_537, 1 << 24])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("step", [1.0, 1 / 16, 1 / 64, 2.0**-16])
def test_round_trip(rng, sequence, same, vocab_size, ragged, step):
    sequences = [
        sequence(
            rng,
            f"s{i}",
            tokens=int(rng.integers(1, 60)),
            vocab_size=vocab_size,
            top_k=min(8, vocab_size),
            ragged=ragged,
        )
        for i in range(7)
    ]
    for original, decoded in zip(sequences, round_trip(sequences, vocab_size, step), strict=True):
        validate(original, vocab_size)
        same(original, decoded, step)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_valid_sequence(same, data):
    """Ties, sure things, tiny tails, k = 1, k = vocabulary, empty and full masks, one token."""
    vocab_size = data.draw(st.sampled_from([2, 3, 300, 70_000, 1 << 24]))
    tokens = data.draw(st.integers(1, 6))
    mask = np.array([False, *data.draw(st.lists(st.booleans(), min_size=tokens - 1, max_size=tokens - 1))])
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    step = data.draw(st.sampled_from([1.0, 1 / 64, 2.0**-16]))
    rows, tails = [], []
    for _ in positions:
        k = data.draw(st.integers(1, min(vocab_size, 6)))
        weights = data.draw(st.lists(st.floats(1e-30, 1.0), min_size=k, max_size=k))
        tail = 0.0 if k == vocab_size else data.draw(st.sampled_from([2.0**-20, 1e-3, 0.5, 1 - 1e-7]))
        p = np.sort(np.array(weights))[::-1] / sum(weights) * (1 - tail)
        ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=k, max_size=k, unique=True))
        rows.append((ids, np.log(np.maximum(p, 1e-37))))
        tails.append(np.log(tail) if tail else -np.inf)
    width = max((len(ids) for ids, _ in rows), default=0)
    ids = np.full((len(rows), width), -1, np.int32)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for row, (row_ids, row_logprobs) in enumerate(rows):
        ids[row, : len(row_ids)], logprobs[row, : len(row_ids)] = row_ids, row_logprobs
    original = CachedSequence(
        sequence_id=data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        input_ids=np.full(tokens, vocab_size - 1, np.int32),
        loss_mask=mask,
        positions=positions,
        ids=ids,
        logprobs=logprobs,
        tail_logprob=np.array(tails, np.float32),
        target_logprob=np.full(len(rows), -0.25, np.float32),
        target_rank=np.zeros(len(rows), np.int32),
    )
    validate(original, vocab_size)
    (decoded,) = round_trip([original], vocab_size, step)
    same(original, decoded, step)


def test_errors_do_not_add_up_along_the_head(rng, sequence):
    """Differences are stored, but each logprob is rounded on its own: the last of 64 is as good as the first."""
    original = sequence(rng, "s", tokens=200, vocab_size=5000, top_k=64)
    (decoded,) = round_trip([original], 5000, 1 / 4)
    assert np.abs(decoded.logprobs - original.logprobs).max() <= 1 / 8


def test_one_sequence_or_many_is_the_same_content(rng, sequence):
    sequences = [sequence(rng, f"s{i}", ragged=bool(i % 2)) for i in range(6)]
    together, apart = ContentHash(), ContentHash()
    together.update(encode_batch(sequences, 1000, 1 / 64))
    for each in sequences:
        apart.update(encode_batch([each], 1000, 1 / 64))
    assert together.hexdigest() == apart.hexdigest()
    other = ContentHash()
    other.update(encode_batch(sequences[::-1], 1000, 1 / 64))
    assert other.hexdigest() != together.hexdigest()


BROKEN = {
    "falling": lambda s: {"logprobs": s.logprobs[:, ::-1].copy()},
    "vocabulary": lambda s: {"ids": s.ids + 1000},
    "finite": lambda s: {
        "logprobs": np.where(np.arange(s.logprobs.size).reshape(s.logprobs.shape) == 0, -np.inf, s.logprobs)
    },
    "not a number": lambda s: {"target_logprob": s.target_logprob * np.nan},
    "mass": lambda s: {"logprobs": np.full_like(s.logprobs, -0.01)},
    "mask": lambda s: {"positions": s.positions - 1},
    "lengths": lambda s: {"target_rank": s.target_rank[:-1]},
    "tail": lambda s: {"tail_logprob": np.full_like(s.tail_logprob, -np.inf)},
    "first token": lambda s: {"loss_mask": np.ones_like(s.loss_mask)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_stored_is_refused(rng, sequence, what):
    good = sequence(rng, "s", kept=1.0)
    validate(good, 1000)
    with pytest.raises(UserError, match="'s' cannot be stored"):
        validate(dataclasses.replace(good, **BROKEN[what](good)), 1000)


@pytest.mark.parametrize("step", [0, -1, 0.1, 2, 2.0**-17, float("nan")])
def test_only_powers_of_two_are_steps(step):
    with pytest.raises(ValueError, match="power of two"):
        check_step(step)


def test_contradictory_columns_are_damage(rng, sequence):
    """Each packed column in turn is replaced by that of other rows; no such batch decodes."""
    batch = encode_batch([sequence(rng, "a", tokens=30)], 1000, 1 / 64)
    other = encode_batch([sequence(rng, "b", tokens=50)], 1000, 1 / 64)
    names = set(batch.schema.names) - {"sequence_id", "head_step_escape"}
    for name in sorted(names):
        index = batch.schema.get_field_index(name)
        mixed = batch.set_column(index, batch.schema.field(index), other.column(index))
        with pytest.raises(DamagedCacheError):
            PackedBatch(mixed, 1000, 1 / 64, "test").decode(0)
