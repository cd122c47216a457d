"""What a request may ask for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from logitcask.pipeline.serve.request import MAX_ENTRIES, MAX_PROMPTS, RefusedError, parse_request

RIGHT = {"prompt": [1, 2, 3], "prompt_logprobs": 4, "max_tokens": 1}


def parse(**fields: Any) -> Any:
    request = {name: value for name, value in {**RIGHT, **fields}.items() if value is not ...}
    return parse_request(json.dumps(request).encode(), 100)


def test_what_is_accepted() -> None:
    found = parse(model="m", return_token_ids=True)
    assert (found.model, found.k, found.ids) == ("m", 4, True)
    assert [each.tolist() for each in found.prompts] == [[1, 2, 3]]
    assert found.prompts[0].dtype == np.int32
    assert [each.tolist() for each in parse(prompt=[[1], [2, 3]]).prompts] == [[1], [2, 3]]
    assert parse(prompt_logprobs=-1).k == 100
    assert parse(prompt_logprobs=0).k == 0
    # What changes no prompt logprob: a greedy sample, stops, a seed, a field nobody knows.
    for name, values in {
        "temperature": [None, 0, 0.0, 1, 1.0],
        "top_p": [1.0],
        "top_k": [-1, 0],
        "n": [1],
        "max_tokens": [0],
        "stop": [["a"]],
        "seed": [3],
        "add_special_tokens": [False],
        "stream": [False],
        "unknown": [{"a": 1}],
    }.items():
        for value in values:
            assert parse(**{name: value}).k == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "text"}, "prompt is text: a tokenizer here might split it differently"),
        ({"prompt": ["text", "more"]}, "prompt is text"),
        ({"prompt": ...}, "prompt is missing or empty"),
        ({"prompt": []}, "prompt is missing or empty"),
        ({"prompt": [[]]}, "not a list of token ids"),
        ({"prompt": [[1], "a"]}, "not a list of token ids"),
        ({"prompt": [1.0]}, "not a list of token ids"),
        ({"prompt": [True]}, "not a list of token ids"),
        ({"prompt": [100]}, "token id 100 is out of the vocabulary of 100 ids"),
        ({"prompt": [-1]}, "token id -1 is out of the vocabulary"),
        ({"prompt": [10**40]}, "."),
        ({"prompt": [[1]] * (MAX_PROMPTS + 1)}, "1,025 prompts; one request has at most 1,024"),
        ({"prompt_logprobs": ...}, "prompt_logprobs is not set: this server writes no text"),
        ({"prompt_logprobs": -2}, "expected a number of ids from 0 on"),
        ({"prompt_logprobs": True}, "expected a number of ids from 0 on"),
        ({"prompt_logprobs": "4"}, "expected a number of ids from 0 on"),
        ({"prompt_logprobs": 101}, "the vocabulary has 100 ids"),
        ({"temperature": 0.7}, "temperature is 0.7: the teacher's own distribution is served, at temperature 1"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"top_k": 5}, "top_k is 5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"logit_bias": {"1": 2}}, "logit_bias is"),
        ({"max_tokens": 16}, "max_tokens is 16: this server writes no text.*send max_tokens 1"),
        ({"max_tokens": ...}, "max_tokens is None"),
        ({"n": 2}, "n is 2"),
        ({"echo": True}, "echo is True"),
        ({"logprobs": 5}, "logprobs is 5: they are of sampled tokens"),
        ({"stream": True}, "stream is True"),
        ({"model": 3}, "model is a number"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens is 5"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        parse(**fields)
    assert caught.value.status in (400, 413)
    assert "\n" not in str(caught.value)


def test_the_size_of_an_answer_is_limited() -> None:
    body = json.dumps(
        {**RIGHT, "prompt": [[1] * 100] * 100, "prompt_logprobs": MAX_ENTRIES // 10_000 - 1}
    ).encode()
    assert len(parse_request(body, 1000).prompts) == 100
    body = json.dumps(
        {**RIGHT, "prompt": [[1] * 100] * 100, "prompt_logprobs": MAX_ENTRIES // 10_000}
    ).encode()
    with pytest.raises(RefusedError, match="entries, of which one answer has at most"):
        parse_request(body, 1000)


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b'"a"', b"[" * 100_000, b'{"a": 1', b"nan"])
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(RefusedError, match=r"the body is") as caught:
        parse_request(body, 100)
    assert caught.value.status == 400
