"""The index against a search through all texts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcask.cache_format import CacheReader, UserError
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


def limited(index: PrefixIndex) -> None:
    """As on a full disk."""
    (pages,) = index._db.execute("PRAGMA page_count").fetchone()
    index._db.execute(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_is_one_line(
    tmp_path: Path, texts: list[list[int]], make_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PrefixIndex.__init__

    def small(self: PrefixIndex) -> None:
        real(self)
        limited(self)

    reader = CacheReader(make_cache(tmp_path / "c", texts))
    monkeypatch.setattr(PrefixIndex, "__init__", small)
    with pytest.raises(UserError, match=r"index of .* cannot be written .*full.* set TMPDIR"):
        PrefixIndex.of(reader)


def test_what_finds_no_room_leaves_the_rest(rng: np.random.Generator) -> None:
    index, kept = PrefixIndex(), []
    limited(index)
    with pytest.raises(sqlite3.Error):
        for number in range(100_000):
            text = rng.integers(0, 1 << 17, 500).astype(np.int32)
            index.add(number, text, 499)
            kept.append(text)
    assert kept
    assert [index.find(text) for text in kept] == [[number] for number in range(len(kept))]
    index.remove_from(1)
    assert [index.find(text) for text in kept] == [[0], *[[]] * (len(kept) - 1)]
