"""Packed data, read again by a reader of this test's own."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import numpy as np
import pytest

from logitcask.cache_format.pages.packed import pack_arrays, pack_json


def unpack(text):
    """The arrays, number by number from their four bytes."""
    data = zlib.decompress(base64.b64decode(text))
    size = int.from_bytes(data[:4], "little")
    at, found = 4 + size, {}
    for name, kind, length in json.loads(data[4:at]):
        planes = [data[at + plane * length : at + (plane + 1) * length] for plane in range(4)]
        letter = {"float32": "f", "int32": "i"}[kind]
        found[name] = [struct.unpack(f"<{letter}", bytes(b))[0] for b in zip(*planes, strict=True)]
        at += 4 * length
    assert at == len(data)
    return found


def test_every_number_is_exact(rng):
    columns = {
        "floats": np.array([0.1, -np.inf, np.nan, -0.0, 3e38], np.float32),
        "integers": rng.integers(-(2**31), 2**31, 1000, dtype=np.int32),
        "none": np.zeros(0, np.int64),
        "wide": np.array([5, -1], np.int64),
    }
    found = unpack(pack_arrays(columns))
    assert list(found) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(np.array(found[name], values.dtype), values)
    assert np.signbit(found["floats"][3])


def test_numbers_of_a_grid_take_little_room(rng):
    values = rng.integers(0, 256, 10_000).astype(np.float32) / 16
    assert len(pack_arrays({"x": values})) < 0.5 * 4 * len(values)


def test_json_of_any_text():
    value = {"a": ["<\ud800>", "</script>", "‮", None, 1.5]}
    text = pack_json(value)
    assert json.loads(zlib.decompress(base64.b64decode(text))) == value
    assert text.isascii()
    assert "<" not in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack_json(float("nan"))
