"""The numbers: what is stored comes back within the stated bounds, and what cannot be stored is
refused.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.cache_format import CachedSequence, DamagedCacheError, TailSamples
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.shards.codec import Codec, ContentHash
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.shards.validation import validate

ALL_KINDS = [
    *("head", "ragged", "samples", "sample logprobs", "random sampling"),
    *("chosen ids", "chosen ids, draws"),
]


def round_trip(sequences, store, prior=None):
    codec = Codec(store, prior)
    packed = codec.open(codec.encode(sequences), "test")
    return [packed.decode(row) for row in range(len(packed))]


@pytest.mark.parametrize("vocab_size", [2, 255, 256, 257, 65_536, 65_537, 1 << 24])
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("step", [1.0, 1 / 16, 2.0**-16])
def test_round_trip(rng, header, sequence, same, vocab_size, kind, step):
    store = header(vocab_size, min(8, vocab_size), step, kind).store
    sequences = [
        sequence(rng, f"s{i}", tokens=int(rng.integers(1, 60)), vocab_size=vocab_size, kind=kind)
        for i in range(7)
    ]
    prior = (
        TailPrior(rng.integers(0, 256, vocab_size).astype(np.uint8))
        if vocab_size < 1 << 20
        else None
    )
    for original, decoded in zip(sequences, round_trip(sequences, store, prior), strict=True):
        validate(original, store)
        same(original, decoded, step)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_valid_sequence(same, data):
    """Ties, sure things, tiny tails, k = 1, k = vocabulary, empty and full masks, one token."""
    vocab_size = data.draw(st.sampled_from([2, 3, 300, 70_000, 1 << 24]))
    tokens = data.draw(st.integers(1, 6))
    mask = np.array(
        [False, *data.draw(st.lists(st.booleans(), min_size=tokens - 1, max_size=tokens - 1))]
    )
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    step = data.draw(st.sampled_from([1.0, 1 / 64, 2.0**-16]))
    sets, most = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 1, 5, 255]))
    rows, tails, draws = [], [], []
    for _ in positions:
        k = data.draw(st.integers(0 if most else 1, min(vocab_size, 6)))
        weights = data.draw(st.lists(st.floats(1e-30, 1.0), min_size=k, max_size=k))
        tail = (
            0.0 if k == vocab_size else data.draw(st.sampled_from([2.0**-20, 1e-3, 0.5, 1 - 1e-7]))
        )
        tail = tail if k else 1.0
        p = np.sort(np.array(weights))[::-1] / sum(weights) * (1 - tail) if k else np.empty(0)
        ids = data.draw(
            st.lists(st.integers(0, vocab_size - 1), min_size=k, max_size=k, unique=True)
        )
        rows.append((ids, np.log(np.maximum(p, 1e-37))))
        tails.append(np.log(tail) if tail else -np.inf)
        count = data.draw(st.integers(1, most)) if most and tail else 0
        outside = st.integers(0, vocab_size - 1).filter(lambda i, ids=ids: i not in ids)
        draws.append(
            [[data.draw(outside) for _ in range(min(count, 9))] * 29 for _ in range(sets)]
            if count
            else [[]] * sets
        )
    width = max((len(ids) for ids, _ in rows), default=0)
    ids = np.full((len(rows), width), -1, np.int32)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for row, (row_ids, row_logprobs) in enumerate(rows):
        ids[row, : len(row_ids)], logprobs[row, : len(row_ids)] = row_ids, row_logprobs
    samples = None
    if most:
        samples = TailSamples(np.full((len(rows), sets, 255), -1, np.int32))
        for row, each in enumerate(draws):
            for number, drawn in enumerate(each):
                samples.ids[row, number, : len(drawn)] = drawn[:255]
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
        samples=samples,
    )
    store = StoreSettings(
        vocab_size=vocab_size,
        top_k=1,
        capture_k=1,
        logprob_step=step,
        tail_samples=most,
        sample_sets=sets,
    )
    validate(original, store)
    (decoded,) = round_trip([original], store)
    same(original, decoded, step)


def test_errors_do_not_add_up_along_the_head(rng, header, sequence):
    """Differences are stored, but each logprob is rounded on its own: the last of 40 is as good
    as the first.
    """
    original = sequence(rng, "s", tokens=200, vocab_size=5000, top_k=40)
    (decoded,) = round_trip([original], header(5000, 40, 1 / 4).store)
    assert np.abs(decoded.logprobs - original.logprobs).max() <= 1 / 8


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_sequence_or_many_is_the_same_content(rng, header, sequence, kind):
    codec = Codec(header(kind=kind).store)
    sequences = [sequence(rng, f"s{i}", kind=kind) for i in range(6)]
    together, apart, other = ContentHash(), ContentHash(), ContentHash()
    together.update(codec.encode(sequences))
    for each in sequences:
        apart.update(codec.encode([each]))
    assert together.hexdigest() == apart.hexdigest()
    other.update(codec.encode(sequences[::-1]))
    assert other.hexdigest() != together.hexdigest()


def test_a_prior_only_renumbers(rng, header, sequence, same):
    """Whatever the prior, the same values come back; a fitting one makes common ids small."""
    sequences = [sequence(rng, f"s{i}", kind="samples", vocab_size=70_000) for i in range(5)]
    store = header(70_000, kind="samples").store
    fitting = TailPrior.estimate(sequences, 70_000)
    for original, decoded in zip(sequences, round_trip(sequences, store, fitting), strict=True):
        same(original, decoded, 1 / 64)
    common = np.unique(np.concatenate([s.ids[s.ids >= 0] for s in sequences]))
    assert fitting.rank_of[common].max() < 5 * 40 * 40
    np.testing.assert_array_equal(fitting.id_at[fitting.rank_of], np.arange(70_000))
    assert (
        TailPrior.from_bytes(fitting.to_bytes(), 70_000, "x").steps.tolist()
        == fitting.steps.tolist()
    )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_contradictory_columns_are_damage(rng, header, sequence, kind):
    """Each column in turn is replaced by that of other rows; no such batch decodes."""
    codec = Codec(header(kind=kind).store)
    batch = codec.encode([sequence(rng, "a", tokens=30, kind=kind, kept=1.0)])
    other = codec.encode([sequence(rng, "b", tokens=50, kind=kind, kept=1.0)])
    for name in batch.schema.names[1:]:
        if len(batch.column(name)[0].as_py()) == len(other.column(name)[0].as_py()):
            continue  # escapes: there are few, perhaps none
        index = batch.schema.get_field_index(name)
        mixed = batch.set_column(index, batch.schema.field(index), other.column(index))
        with pytest.raises(DamagedCacheError):
            codec.open(mixed, "test").decode(0)


def test_chosen_ids_that_cannot_be(rng, header, sequence):
    """Places behind a head's end, more ids than the store has, more in the head than there are, and
    ranks beyond the vocabulary.
    """
    kind, vocab_size = "chosen ids, draws", 300
    store = header(vocab_size, kind=kind).store
    codec = Codec(store)
    batch = codec.encode([sequence(rng, "a", vocab_size=vocab_size, kind=kind, kept=1.0)])
    packed = codec.open(batch, "test")
    packed.decode(0)
    values = packed._values
    size, inside = values["chosen_size"], values["chosen_head_size"]
    first = int(np.flatnonzero((inside > 0) & (size > inside))[0])
    place = int(inside[:first].sum())
    gap = int((size - inside)[:first].sum())
    for name, at, value, match in [
        ("chosen_head_plane", place, store.top_k, "is not in its head"),
        ("chosen_size", first, store.chosen_ids + 1, "another number of chosen ids"),
        ("chosen_head_size", first, size[first] + 1, "another number of chosen ids"),
        ("chosen_head_size", first, -1, "another number of chosen ids"),
        ("chosen_gap_plane_1", gap, 2, "leave the vocabulary"),
    ]:
        forged = values[name].copy()
        forged[at] = value
        packed._values = {**values, name: forged}
        with pytest.raises(DamagedCacheError, match=match):
            packed.decode(0)
