"""Requests to ``/v1/completions``: what is accepted of vLLM's fields, and what is refused, and why.

Only a distribution that a cache can hold is served: that of the model itself, at temperature 1. A
field that asks for another one, or for text, is refused, never ignored. Fields that only shape the
one sampled token are without effect, since none is sampled.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_PROMPTS = 1024
"""Of one request; vLLM's own limit."""

MAX_ENTRIES = 1 << 22
"""Entries of one answer: some 250 MB of JSON."""

_NO_TEXT = "this server writes no text, it only scores tokens that it is sent"
_AS_THE_MODEL = "the teacher's own distribution is served, at temperature 1"

_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    # vLLM takes prompt_logprobs before any temperature; 0 is how clients ask for a greedy sample.
    "temperature": ((None, 0, 1), _AS_THE_MODEL),
    "top_p": ((None, 1), _AS_THE_MODEL),
    "top_k": ((None, 0, -1), _AS_THE_MODEL),
    "min_p": ((None, 0), _AS_THE_MODEL),
    "presence_penalty": ((None, 0), _AS_THE_MODEL),
    "frequency_penalty": ((None, 0), _AS_THE_MODEL),
    "repetition_penalty": ((None, 1), _AS_THE_MODEL),
    "logit_bias": ((None, {}), _AS_THE_MODEL),
    "allowed_token_ids": ((None,), _AS_THE_MODEL),
    "bad_words": ((None, []), _AS_THE_MODEL),
    # Without it vLLM writes 16 tokens.
    "max_tokens": ((0, 1), f"{_NO_TEXT}; send max_tokens 1"),
    "n": ((None, 1), _NO_TEXT),
    "best_of": ((None, 1), _NO_TEXT),
    "use_beam_search": ((None, False), _NO_TEXT),
    "suffix": ((None,), _NO_TEXT),
    "echo": ((None, False), "the text of the tokens is not known here; read prompt_logprobs"),
    "logprobs": (
        (None,),
        "they are of sampled tokens, and none is sampled; ask for prompt_logprobs",
    ),
    "logprob_token_ids": ((None,), "they are of sampled tokens, and none is sampled"),
    "stream": ((None, False), "prompt_logprobs are not streamed"),
    "prompt_embeds": ((None,), "token ids are looked up, and embeddings have none"),
    "truncate_prompt_tokens": ((None, -1), "send the tokens that are to be scored"),
}
"""Fields with the values that change nothing, and why others are refused."""


class RefusedError(Exception):
    """A request that is not answered: an HTTP status from 400 to 499, and one line."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Request(NamedTuple):
    """prompts: int32[n] each. k: heads of so many entries. ids: whether to answer with the ids."""

    model: str | None
    prompts: list[NDArray[np.int32]]
    k: int
    ids: bool

    @property
    def entries(self) -> int:
        """Entries of the answer, at most."""
        return sum(map(len, self.prompts)) * (self.k + 1)


def parse_request(body: bytes, vocab_size: int) -> Request:
    """Raises RefusedError for anything that is not answered, naming the field."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RefusedError(
            400, f"the body is not JSON ({' '.join(str(error).split())[:200]})"
        ) from None
    if not isinstance(fields, dict):
        raise RefusedError(400, f"the body is a JSON {_kind(fields)}; expected an object")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise RefusedError(400, f"model is a {_kind(model)}; expected a name", "model")
    prompts = _prompts(fields.get("prompt"), vocab_size)
    for name, (neutral, why) in _NEUTRAL.items():
        if (value := fields.get(name)) not in neutral or _is_other_kind(value, neutral):
            raise RefusedError(400, f"{name} is {_short(value)}: {why}", name)
    k = fields.get("prompt_logprobs")
    if k is None:
        raise RefusedError(400, f"prompt_logprobs is not set: {_NO_TEXT}", "prompt_logprobs")
    if not _is_integer(k) or k < -1:
        raise RefusedError(
            400,
            f"prompt_logprobs is {_short(k)}; expected a number of ids from 0 on",
            "prompt_logprobs",
        )
    k = vocab_size if k == -1 else k
    if k > vocab_size:
        raise RefusedError(
            400, f"prompt_logprobs is {k}, the vocabulary has {vocab_size} ids", "prompt_logprobs"
        )
    request = Request(model, prompts, k, fields.get("return_token_ids") is True)
    if request.entries > MAX_ENTRIES:
        raise RefusedError(
            413,
            f"the answer would have {request.entries:,} entries, of which one answer has at most {MAX_ENTRIES:,}; send fewer prompts at once",
            "prompt",
        )
    return request


def _prompts(value: Any, vocab_size: int) -> list[NDArray[np.int32]]:
    if isinstance(value, str) or (
        isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    ):
        raise RefusedError(
            400,
            "prompt is text: a tokenizer here might split it differently from the trainer's, so only token ids are taken; "
            "send prompt as a list of ids",
            "prompt",
        )
    if not isinstance(value, list) or not value:
        raise RefusedError(
            400,
            "prompt is missing or empty; expected a list of token ids, or a list of such lists",
            "prompt",
        )
    lists = value if isinstance(value[0], list) else [value]
    if len(lists) > MAX_PROMPTS:
        raise RefusedError(
            413, f"{len(lists):,} prompts; one request has at most {MAX_PROMPTS:,}", "prompt"
        )
    return [_tokens(each, vocab_size) for each in lists]


def _tokens(value: Any, vocab_size: int) -> NDArray[np.int32]:
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        raise RefusedError(
            400, "a prompt is not a list of token ids; text and ids cannot be mixed", "prompt"
        )
    if min(value) < 0 or max(value) >= vocab_size:
        wrong = min(value) if min(value) < 0 else max(value)
        raise RefusedError(
            400, f"token id {_short(wrong)} is out of the vocabulary of {vocab_size} ids", "prompt"
        )
    return np.array(value, np.int32)


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_other_kind(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value`` equals a neutral one only because Python takes True for 1."""
    return isinstance(value, bool) and not any(value is each for each in neutral)


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
