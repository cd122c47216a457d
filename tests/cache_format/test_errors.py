"""Errors of others as one line, whatever they say."""

from __future__ import annotations

import pytest

from logitcask.cache_format.errors import first_line, one_line, one_line_and_kind


class Speechless(Exception):
    """An error that says nothing."""


@pytest.mark.parametrize("said", ["", "  ", "\n \n"])
def test_an_error_that_says_nothing_is_its_kind(said):
    error = Speechless(said)
    assert first_line(error) == one_line(error) == one_line_and_kind(error) == "Speechless"


def test_an_error_of_several_lines_is_one():
    error = ValueError("\n first:\n   the second\tpart \r\nthird\n")
    assert first_line(error) == "first:"
    assert one_line(error) == "first: the second part third"
    assert one_line_and_kind(error) == "first: the second part third (ValueError)"


def test_a_first_line_is_short():
    assert first_line(ValueError("x" * 1000 + "\ny")) == "x" * 200
