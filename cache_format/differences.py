"""Descriptions of the differences between two JSON values."""

from __future__ import annotations

import json


def describe_difference(before: object, after: object, prefix: str = "") -> str:
    """Differences of two JSON values by dotted path: ``a.b: 1 -> 2, c: 3 -> 4``."""
    if isinstance(before, dict) and isinstance(after, dict):
        return ", ".join(
            describe_difference(before.get(key), after.get(key), f"{prefix}{key}.")
            for key in sorted(set(before) | set(after))
            if before.get(key) != after.get(key)
        )
    return f"{prefix.rstrip('.')}: {json.dumps(before, default=str)} -> {json.dumps(after, default=str)}"
