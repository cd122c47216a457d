"""The split into trained on and held out: by rows of the data, in every order and subset of it."""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.train.data.held_out import is_held_out, read_index, row_of


@pytest.fixture
def data(write_cache):
    """``data(**fields)``: the identity of some data."""
    identity = write_cache("any", shards=1, sequences=1).manifest.data
    return lambda **fields: identity.model_copy(update=fields)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train/17", "train/17"),
        ("train/17/3", "train/17"),
        ("0/train/17/3", "0/train/17"),  # of a merged cache
        ("2/0/train/17/3", "2/0/train/17"),
        ("book#12/3", "book#12"),
        ("a/b\n#12/3", "a/b\n#12"),
        ("test/17/3", "test/17/3"),  # another split: an id of the data's own
        ("own-id/3", "own-id/3"),
        ("train/x/3", "train/x/3"),
    ],
)
def test_pieces_of_a_document_are_of_one_row(data, name, row):
    assert row_of(name, data(split="train", mask_policy="all")) == row


def test_pieces_of_any_split_of_a_mixture(data):
    mixed = data(split="mixed", mask_policy="all")
    assert row_of("test/17/3", mixed) == "test/17"
    assert row_of("17/3", mixed) == "17/3"


def test_a_split_is_taken_literally(data):
    odd = data(split="tr.in[:10%]", mask_policy="all")
    assert row_of("tr.in[:10%]/5/0", odd) == "tr.in[:10%]/5"
    assert row_of("tr.in/5/0", odd) == "tr.in/5"  # ids have the split's name
    assert row_of("1/tr.in/5/0", odd) == "1/tr.in/5"  # of several sources
    assert row_of("train/5/0", data(split="tr.in", mask_policy="all")) == "train/5/0"


def test_answers_to_one_prompt_are_of_one_row(data):
    assert row_of("own/id/2", data(mask_policy="generated")) == "own/id"


def test_a_share_of_the_rows_is_held_out_and_a_larger_one_holds_out_more(data):
    found = data(split="train", mask_policy="all")
    names = [f"train/{row}" for row in range(4000)]
    small, large = (
        {name for name in names if is_held_out(name, found, share)} for share in (0.1, 0.3)
    )
    # Four standard deviations of a binomial count: 76 and 116.
    assert abs(len(small) - 400) < 76
    assert abs(len(large) - 1200) < 116
    assert small < large
    assert not any(is_held_out(name, found, 0.0) for name in names)
    assert all(is_held_out(name, found, 1.0) for name in names)
    for row in range(100):
        assert len({is_held_out(f"train/{row}/{piece}", found, 0.5) for piece in range(5)}) == 1


def test_the_split_is_the_same_in_every_version(data):
    """A run that goes on, or is repeated, must not be measured on what it was trained on."""
    found = data(split="train", mask_policy="all")
    assert [row for row in range(40) if is_held_out(f"train/{row}", found, 0.2)] == [
        *(1, 5, 11, 16, 24, 25, 26, 36)
    ]


def test_the_index_is_that_of_the_sequences(write_cache):
    cache = write_cache("a", shards=2, sequences=11, tokens=(1, 30))
    index = read_index(cache, 0.3)
    sequences = list(cache)
    assert index.tokens.tolist() == [len(each) for each in sequences]
    assert index.kept.tolist() == [len(each.positions) for each in sequences]
    assert index.largest.tolist() == [each.input_ids.max() for each in sequences]
    data = cache.manifest.data
    assert index.held_out.tolist() == [is_held_out(s.sequence_id, data, 0.3) for s in sequences]
    assert (index.held_out.dtype, index.tokens.dtype) == (np.bool_, np.int32)
