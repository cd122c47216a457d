"""Texts longer than ``max_length``, cut at their beginning: tokens of a text, or turns of a chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.text.chat_rows import SYSTEM_ROLES
from logitcask.pipeline.text.long_texts import Tokens
from logitcask.pipeline.text.sources import Row


def without_oldest_turns(row: Row) -> list[Row]:
    """The chat without its oldest round, without its two oldest, and so on to its last round.

    A round is a question and everything up to the next question: answers, calls, results of tools.
    A system prompt in front and the tools stay.
    """
    messages = row.messages or []
    lead = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    starts = [
        i
        for i in range(lead + 1, len(messages))
        if messages[i]["role"] == "user" != messages[i - 1]["role"]
    ]
    return [_from(row, lead, start) for start in starts]


def _from(row: Row, lead: int, start: int) -> Row:
    """The chat with its first ``lead`` messages and those from ``start`` on."""
    messages = row.messages or []
    gone = start - lead
    unlearnt = frozenset(
        index if index < lead else index - gone
        for index in row.unlearnt
        if index < lead or index >= start
    )
    return replace(row, messages=[*messages[:lead], *messages[start:]], unlearnt=unlearnt)


def tail(parts: Iterable[Tokens], length: int) -> Tokens:
    """The last ``length`` tokens, or as many as there are; holds little more than these."""
    kept: deque[Tokens] = deque()
    held = 0
    for part in parts:
        kept.append(part)
        held += len(part[0])
        while held - len(kept[0][0]) >= length:
            held -= len(kept.popleft()[0])
    ids, offsets = zip(*kept, strict=True)
    return np.concatenate(ids)[-length:], np.concatenate(offsets)[-length:]


def end_of(
    front: NDArray[np.int32], ids: NDArray[np.int32], mask: NDArray[np.bool_], limit: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """``front`` and the last tokens of ``ids`` behind it, ``limit`` in all. The first token and
    ``front`` are not learnt.
    """
    room = max(0, limit - len(front))
    start = len(ids) - room
    ids = np.concatenate((front, ids[start:]))[:limit]
    mask = np.concatenate((np.zeros(len(front), np.bool_), mask[start:]))[:limit]
    mask[:1] = False
    return ids, mask
