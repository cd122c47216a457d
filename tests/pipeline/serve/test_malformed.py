"""Requests that are no requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_requests(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Any,
    running: Any,
    rng: np.random.Generator,
    count: int,
) -> None:
    """No crash and no 5xx, whatever is sent; right requests are answered in between."""
    client = running([make_cache(tmp_path / "c", texts)])
    right = json.dumps({"prompt": texts[1], "prompt_logprobs": 2, "max_tokens": 1}).encode()
    for number in range(count):
        body = _malformed(right, rng)
        answer = client.http.post("/v1/completions", content=body)
        assert answer.status_code in (200, 400, 404, 413), (body[:300], answer.text)
        if number % 50 == 0:
            assert client.http.post("/v1/completions", content=right).status_code == 200


def _malformed(right: bytes, rng: np.random.Generator) -> bytes:
    values: list[Any] = [
        None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**70), 1e308, 0.5, "", "a", "1", [], [[]],
        [[], [1]], [1, "a"], [1, [2]], [None], {}, {"a": 1}, [True], [1.0, 2.0], [10**30], "\u0000", [[1], "a"],
        [383], [384], [-1, 2], [[1, 2], [3]], [{}], "\ud800",
    ]  # fmt: skip
    fields = [
        "prompt", "prompt_logprobs", "max_tokens", "model", "temperature", "n", "echo", "logprobs", "stream",
        "top_p", "top_k", "min_p", "logit_bias", "stop", "return_token_ids", "prompt_embeds", "best_of", "suffix",
    ]  # fmt: skip
    kind = rng.integers(5)
    if kind == 0:  # other values
        request = json.loads(right)
        for _ in range(rng.integers(1, 4)):
            request[fields[rng.integers(len(fields))]] = values[rng.integers(len(values))]
        return json.dumps(request).encode()
    if kind == 1:  # other bytes
        changed = bytearray(right)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        return bytes(changed)
    if kind == 2:  # cut, or doubled
        cut = rng.integers(len(right))
        return right[:cut] if rng.integers(2) else right[:cut] + right
    if kind == 3:  # deep, and no object
        depth = int(rng.integers(1, 5000))
        return [
            b"[" * depth,
            b"[" * depth + b"]" * depth,
            b'{"prompt":' + b"[" * depth + b"]" * depth + b"}",
        ][rng.integers(3)]
    return rng.bytes(rng.integers(0, 400))
