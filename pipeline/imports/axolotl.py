"""Axolotl's columns: vLLM's logprobs as distilabel stores them, and prepared targets.

``axolotl``: a chat, and for each token at its end a list of ``{token: "token_id:N", logprob}``, the
first of a whole prompt null. The list about a token has that token's own logprob in any case, which
shows at once whether the chat template is the one that the data was made with.

``axolotl-prepared``: ``input_ids``, and at every token ``target_token_ids`` and
``target_logprobs``, of equal length everywhere, with ``target_mask`` 0 for padding. Logprobs were
scaled so that a row's probabilities add up to 1, so the mass outside is not known, unless
``--values logprobs`` says that they are the teacher's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.tables import Row, matrix, padded, ragged, rows, vector
from logitcask.pipeline.text.chat_rows import Skipped, marked_messages
from logitcask.pipeline.text.chat_template import ChatTemplate, Refused
from logitcask.pipeline.text.chats import render, tokens_in
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row as ChatRow

LOGPROBS = "llm_text_generation_vllm_logprobs"
MESSAGES = "messages_combined"
_OWN_TOKEN = 0.99  # least share of rows that hold the token that they are about


def read(source: Source) -> Iterator[Held]:
    """The chats of a source, rendered with the tokenizer's template; the assistant's tokens are
    learnt.
    """
    chats: Callable[..., tuple[NDArray[np.int64], NDArray[np.bool_]]] | None = None
    for name, row in rows(source):
        if "input_ids" in row:
            tokens = vector(row["input_ids"], np.int64, f"{name}: input_ids")
            learnt = _learnt(row, name, len(tokens))
        else:
            if MESSAGES not in row:
                raise UserError(
                    f"{name} has neither input_ids nor {MESSAGES}; --columns {MESSAGES}=COLUMN names the chats"
                )
            chats = chats or _renderer(source)
            tokens, learnt = chats(row[MESSAGES].as_py(), name)
        ids, values = _entries(row[LOGPROBS], f"{name}: {LOGPROBS}")
        n = len(tokens)
        # The lists are about the last tokens. The first token has no position before it.
        ids, values = ids[max(0, len(ids) - n) :], values[max(0, len(values) - n) :]
        if len(ids) == n:
            ids, values = ids[1:], values[1:]
        first = n - 1 - len(ids)
        about = tokens[first + 1 :]
        there = (ids >= 0).any(axis=1)
        own = (ids == about[:, None]).any(axis=1)[there]
        if len(own) and own.mean() < _OWN_TOKEN:
            raise UserError(
                f"{name}: {own.mean():.0%} of the lists hold the token that they are about, expected all; the chat is "
                "rendered with another template or tokenizer than that of the data: name the right one with --tokenizer"
            )
        yield Held(name, tokens, first, ids, values, learnt)


def read_prepared(source: Source) -> Iterator[Held]:
    """The sequences of a source."""
    shift = 1 if source.options.alignment == "legacy" else 0
    for name, row in rows(source):
        tokens = vector(row["input_ids"], np.int64, f"{name}: input_ids")
        ids = matrix(row["target_token_ids"], np.int64, -1, f"{name}: target_token_ids")
        values = matrix(row["target_logprobs"], np.float64, np.nan, f"{name}: target_logprobs")
        mask = matrix(row["target_mask"], np.int64, 0, f"{name}: target_mask")
        if not len(tokens) == len(ids) == len(values) == len(mask) or not (
            ids.shape == values.shape == mask.shape
        ):
            raise UserError(
                f"{name} has {len(tokens)} tokens, ids {ids.shape}, logprobs {values.shape} and masks {mask.shape}; expected "
                "a row for every token, of equal length in all three"
            )
        ids = np.where(mask != 0, ids, -1)
        # The last row is about a token that is not there; in the old alignment the first one is.
        rows_of = slice(1, None) if shift else slice(0, -1)
        learnt = _learnt(row, name, len(tokens))
        yield Held(name, tokens, 0, ids[rows_of], values[rows_of], learnt)


def _learnt(row: Row, name: str, n: int) -> NDArray[np.bool_] | None:
    if "labels" not in row:
        return None
    labels = vector(row["labels"], np.int64, f"{name}: labels")
    if len(labels) != n:
        raise UserError(f"{name} has {len(labels)} labels for {n} tokens")
    return labels != -100


def _entries(cell: pa.Scalar, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(ids, logprobs), each [R, K], of lists of ``{token: "token_id:N", logprob}``."""
    lengths, flat = ragged(cell, name)
    if pa.types.is_null(flat.type) or not len(flat):
        return np.full((len(lengths), 0), -1), np.zeros((len(lengths), 0))
    if not pa.types.is_struct(flat.type) or not {"token", "logprob"} <= {
        field.name for field in flat.type
    }:
        raise UserError(f"{name} is {cell.type}, expected lists of objects with token and logprob")
    texts = pc.struct_field(flat, "token")
    numbers = pc.replace_substring_regex(texts, r"^token_id:(\d+)$", r"\1")
    try:
        ids = pc.cast(numbers, pa.int64())
    except pa.ArrowInvalid:
        there = (each for each in texts.to_pylist() if each is not None)
        wrong = next(each for each in there if not re.fullmatch(r"token_id:[0-9]{1,18}", each))
        raise UserError(
            f"{name} has the token {wrong[:60]!r}, expected token_id:NUMBER; the data must have been made with "
            "--return-tokens-as-token-ids"
        ) from None
    logprobs = pc.struct_field(flat, "logprob").to_numpy(zero_copy_only=False).astype(np.float64)
    found = np.asarray(ids.to_numpy(zero_copy_only=False)).astype(np.int64)
    return padded(lengths, found, -1), padded(lengths, logprobs, np.nan)


def _renderer(source: Source) -> Callable[..., tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """A function from a chat to its tokens, int64[n], and those of the assistant, bool[n]."""
    tokenizer = source.tokenizer
    template = ChatTemplate(tokenizer, DataConfig(path=source.path, messages_field=MESSAGES))

    def rendered(value: Any, name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        try:
            marked = marked_messages(value)
            messages = template.prepared([message for message, _ in marked])
            learnt = [
                turn
                for turn, (message, may) in enumerate(marked)
                if message["role"] == "assistant" and may
            ]
            text, spans = render(template, messages, ChatRow(name, None, messages), learnt)
        except (Skipped, Refused) as error:
            raise UserError(f"{name} holds no chat that the template takes: {error}") from None
        found = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(found["offset_mapping"][0], np.int64).reshape(-1, 2)
        return np.array(found["input_ids"][0], np.int64), tokens_in(spans, offsets)

    return rendered


LAYOUT = Layout(
    name="axolotl",
    summary="axolotl and distilabel: chats, and vLLM's logprobs as lists of token_id:N",
    read=read,
    columns=(LOGPROBS,),
    values="logprobs",
    forced=True,
)
PREPARED = Layout(
    name="axolotl-prepared",
    summary="axolotl: input_ids, target_token_ids, target_logprobs, target_mask",
    read=read_prepared,
    columns=("input_ids", "target_token_ids", "target_logprobs", "target_mask"),
)
