"""The numbers that the command takes."""

from __future__ import annotations

import pytest

from logitcask.cache_format import ConfigError
from logitcask.pipeline.commands import estimate as estimate_cli


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "0.5", "nan", "inf", "2e15"])
def test_token_counts_that_are_none(text):
    with pytest.raises(ConfigError, match="--tokens is"):
        estimate_cli.count_of(text)


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("1_000", 1000), ("1e12", 10**12), ("2.5e3", 2500)]
)
def test_token_counts(text, count):
    assert estimate_cli.count_of(text) == count
