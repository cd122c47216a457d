"""The listing of a home: what is there, what has changed, what is gone."""

from __future__ import annotations

import os
import shutil

import pytest

from logitcask.cache_format.catalog.listing import (
    chosen,
    listing,
    matching,
    span,
    table,
    totals,
)


@pytest.fixture
def two(home, make_cache, tmp_path):
    """Caches ``a`` and ``b`` of teachers small and Large; ``b`` was used last."""
    for name, teacher in (("a", "org/small"), ("b", "org/Large")):
        home.register(tmp_path / name, make_cache(tmp_path / name, teacher=teacher))
    for at, file in enumerate(home.entries_folder.iterdir()):
        os.utime(file, (1000 + at, 1000 + at))
    last = next(home.entries_folder.glob(f"{listing(home)[0].entry.name}.json"))
    os.utime(last, (2000, 2000))
    return home


def test_the_latest_use_comes_first(two):
    lines = listing(two)
    assert lines[0].last_use == 2000
    assert sorted(line.last_use for line in lines)[::-1] == [line.last_use for line in lines]
    assert len({line.entry.where for line in lines}) == 2
    assert not any(line.gone or line.in_use for line in lines)


def test_a_cache_removed_or_moved_by_hand_is_gone(two, tmp_path):
    shutil.rmtree(tmp_path / "a")
    shutil.move(tmp_path / "b", tmp_path / "c")
    assert [line.gone for line in listing(two)] == [True, True]
    shutil.move(tmp_path / "c", tmp_path / "b")
    lines = {line.entry.where: line.gone for line in listing(two)}
    assert lines == {str(tmp_path / "a"): True, str(tmp_path / "b"): False}


def test_another_cache_in_the_place_is_listed_as_it_is(two, make_cache, tmp_path):
    before = {line.entry.where: line for line in listing(two)}[str(tmp_path / "a")]
    shutil.rmtree(tmp_path / "a")
    manifest = make_cache(tmp_path / "a", teacher="new", sequences=9)
    for _ in range(2):  # from the folder, then from the updated entry
        line = {line.entry.where: line for line in listing(two)}[str(tmp_path / "a")]
        assert (line.entry.teacher, line.entry.sequences) == ("new", 18)
        assert line.entry.fingerprint == manifest.fingerprint != before.entry.fingerprint
        assert line.last_use == before.last_use


def test_a_damaged_manifest_is_gone_and_no_error(two, tmp_path):
    (tmp_path / "a" / "manifest.json").write_text("{")
    assert [line.entry.where for line in listing(two) if line.gone] == [str(tmp_path / "a")]


def test_a_cache_in_use_says_so(two, tmp_path):
    with two.in_use(tmp_path / "a"):
        used = [line.entry.where for line in listing(two) if line.in_use]
    assert used == [str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"teacher": "large"}, {"org/Large"}),
        ({"teacher": "org/*"}, {"org/Large", "org/small"}),
        ({"teacher": "small*"}, set()),
        ({"teacher": "org", "data": "nothing"}, set()),
        ({"tokenizer": "00000000"}, {"org/Large", "org/small"}),
        ({"tokenizer": "t"}, {"org/Large", "org/small"}),
        ({"tokenizer": "u"}, set()),
        ({"teacher": None}, {"org/Large", "org/small"}),
    ],
)
def test_patterns(two, patterns, expected):
    assert {line.entry.teacher for line in matching(listing(two), **patterns)} == expected


def test_a_name_is_a_folder_or_a_fingerprint(two, tmp_path, monkeypatch):
    lines = listing(two)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        name = os.path.basename(line.entry.where)
        assert chosen(lines, name) == chosen(lines, line.entry.where) == [line]
        assert chosen(lines, line.entry.fingerprint[:6]) == [line]
        assert chosen(lines, line.entry.fingerprint[:5]) == []
    assert chosen(lines, "nothing") == []


def test_the_table_has_a_line_for_each(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = listing(two)
    head, *rest = table(lines).splitlines()
    assert head.split() == ["teacher", "data", "tokens", "B/token", "age", "last", "use", "where"]
    for line, text in zip(lines, rest, strict=True):
        size = line.entry.bytes / line.entry.tokens
        name = os.path.basename(line.entry.where)
        assert text.split()[:5] == [line.entry.teacher, "x,", "train", "240", f"{size:.1f}"]
        assert text.endswith(f" {name}")
    assert totals(lines) == f"2 caches, {sum(line.entry.bytes for line in lines):,} bytes"


def test_spans():
    assert [span(s) for s in (0, 59, 60, 3599, 3600, 86399, 86400, 1e7)] == [
        *("now", "now", "1 min", "59 min", "1 h", "23 h", "1 d", "115 d")
    ]


def test_documents_are_json(two):
    for line in listing(two):
        document = line.document()
        assert document["where"] == line.entry.where
        assert document["last_use"].startswith("1970-01-01T00:")
        assert set(document) >= {"teacher", "tokens", "bytes", "fingerprint", "in_use", "gone"}


def test_names_of_strangers_stay_in_their_line(home, make_cache, tmp_path):
    manifest = make_cache(tmp_path / "c", teacher="m\x1b[2J")
    data = manifest.data.model_copy(update={"source": "one\ntwo\u2028three"})
    home.register(tmp_path / "c", manifest.model_copy(update={"data": data}))
    _, line = table(listing(home)).splitlines()
    assert line.startswith("m\\x1b[2J  one\\ntwo\\u2028three, train ")
