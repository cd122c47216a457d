"""The index against a search through all texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from logitcask.cache_format import CacheReader
from logitcask.pipeline.serve.index import PrefixIndex, leading

TEXTS = st.lists(
    st.lists(st.sampled_from([0, 1, 255, 256, 65_535, 65_536, 2**24 - 1]), min_size=1, max_size=5),
    max_size=12,
)


def array(text: list[int]) -> np.ndarray:
    return np.array(text, np.int32)


@given(
    texts=TEXTS,
    asked=st.lists(st.sampled_from([0, 1, 255, 256, 65_535, 2**24 - 1]), min_size=1, max_size=4),
    whole=st.booleans(),
)
def test_every_text_with_that_beginning(
    texts: list[list[int]], asked: list[int], whole: bool
) -> None:
    """The shortest first, in the order of ids; with and without gaps in what is kept."""
    index = PrefixIndex()
    rows = [(n, array(text), n % 3) for n, text in enumerate(texts)]
    index.add_all(rows[: len(rows) // 2])
    for number, ids, kept in rows[len(rows) // 2 :]:
        index.add(number, ids, kept)
    need = len(asked) - 1 if whole else 0
    expected = sorted(
        (text, n) for n, text in enumerate(texts) if text[: len(asked)] == asked and n % 3 >= need
    )
    assert index.find(array(asked), None if whole else 0) == [n for _, n in expected][:8]
    assert index.has(array(asked)) == (asked in texts)
    half = len(texts) // 2
    index.remove_from(half)
    assert (
        index.find(array(asked), 0)
        == [
            n
            for _, n in sorted(
                (t, n) for n, t in enumerate(texts[:half]) if t[: len(asked)] == asked
            )
        ][:8]
    )
    index.close()


def test_leading() -> None:
    for mask, kept in [
        ([False], 0),
        ([False, True], 1),
        ([False, False, True], 0),
        ([False, True, True, False, True], 2),
        ([False, True, True, True], 3),
    ]:
        assert leading(np.array(mask)) == kept


def test_of_a_cache(tmp_path: Path, texts: list[list[int]], make_cache: Callable[..., str]) -> None:
    index = PrefixIndex.of(CacheReader(make_cache(tmp_path / "c", texts)))
    for number, text in enumerate(texts):
        assert index.find(array(text)) == [number]
        assert index.has(array(text))
