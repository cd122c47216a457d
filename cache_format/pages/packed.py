"""Numbers and JSON values as text inside a page; ``packed.js`` reads them.

An array is written byte by byte: first the first byte of every number, then the second, and so on.
Numbers of a coarse grid then have planes of zeros, which compress well, and every number is exact.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KINDS = {"f": "float32", "i": "int32"}
_LEVEL = 6


def pack_arrays(columns: Mapping[str, NDArray[Any]]) -> str:
    """Flat arrays by name as base64 of zlib: the length of a JSON list (uint32, little-endian), the
    list [[name, type, length], ...], and the columns. Floats become float32, integers int32.
    """
    arrays = {
        name: np.ascontiguousarray(array, _KINDS[array.dtype.kind])
        for name, array in columns.items()
    }
    head = json.dumps([[name, str(array.dtype), len(array)] for name, array in arrays.items()])
    planes = [
        array.astype(array.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, 4).T.tobytes()
        for array in arrays.values()
    ]
    return _text(struct.pack("<I", len(head)) + head.encode() + b"".join(planes))


def pack_json(value: Any) -> str:
    """A JSON value as base64 of zlib. Single surrogates are allowed: the JSON is ASCII."""
    return _text(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def _text(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, _LEVEL)).decode()
