"""The card of a cache: its front matter, and whether somebody has edited it."""

from __future__ import annotations

import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.cache_format.card import _size_category, dataset_card, is_unedited


def front(card):
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_front_matter(cache):
    manifest = CacheReader(cache).manifest
    plain = front(dataset_card(manifest))
    assert [each["config_name"] for each in plain["configs"]] == ["default"]
    assert "license" not in plain
    card = dataset_card(
        manifest, where="hf://datasets/me/mine", licence="apache-2.0", with_preview=True
    )
    found = front(card)
    assert found["license"] == "apache-2.0"
    assert found["size_categories"] == ["n<1K"]
    assert [each["config_name"] for each in found["configs"]] == ["preview"]
    assert found["configs"][0]["data_files"] == [
        {"split": "preview", "path": "preview/preview.parquet"}
    ]
    assert 'CacheReader("hf://datasets/me/mine")' in card
    hostile = manifest.model_copy(
        update={"teacher": manifest.teacher.model_copy(update={"model": 'm"\ntags: [x]'})}
    )
    assert front(dataset_card(hostile))["tags"] == plain["tags"]


def test_an_edited_card_is_known(cache):
    card = (cache / "README.md").read_bytes()
    assert is_unedited(card)
    assert not is_unedited(card.replace(b"Logitcask", b"My"))
    assert not is_unedited(card + b"More.\n")
    assert not is_unedited(b"")


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**6, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories_are_those_of_the_hub(rows, name):
    assert _size_category(rows) == name


def test_names_of_any_letters(cache):
    """Also such that JSON writes as two halves, line ends, and what ends a cell of a table."""
    manifest = CacheReader(cache).manifest
    source = "\N{GRINNING FACE} a|b\nc\x85d\x7f"
    other = manifest.model_copy(
        update={"data": manifest.data.model_copy(update={"source": source})}
    )
    card = dataset_card(other)
    assert front(card)["pretty_name"] == f"Teacher logprobs of {manifest.teacher.model} on {source}"
    (row,) = [line for line in card.splitlines() if line.startswith("| data |")]
    assert row.startswith("| data | \N{GRINNING FACE} a\\|b\\nc\\x85d\\x7f, split train, ")
