"""The places where two JSON values differ, in words."""

from __future__ import annotations

import pytest

from logitcask.cache_format.differences import describe_difference


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"a": {"b": 1}, "c": 3}, {"a": {"b": 2}, "c": 4}, "a.b: 1 -> 2, c: 3 -> 4"),
        ({"z": 1, "a": 1, "same": [1]}, {"z": 2, "a": 2, "same": [1]}, "a: 1 -> 2, z: 1 -> 2"),
        ({"a": 1}, {}, "a: 1 -> null"),
        ({}, {"a": {"b": "x"}}, 'a: null -> {"b": "x"}'),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a: [1, 2] -> [1, 3]"),
        ({"a": {"b": {"c": True}}}, {"a": {"b": {"c": None}}}, "a.b.c: true -> null"),
        ({"a": 1}, {"a": 1}, ""),
        (1, 2, ": 1 -> 2"),
    ],
)
def test_each_is_named_by_its_path(before, after, says):
    assert describe_difference(before, after) == says
