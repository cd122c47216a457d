"""Rendered chats, and the characters of the assistant in them.

A template may mark answers itself (``{% generation %}``). For other templates, the chat is rendered
up to each turn, and the turn is the text after the prompt that asks for it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.chat_rows import SYSTEM_ROLES
from logitcask.pipeline.text.chat_template import ChatTemplate, Messages, Refused, Span
from logitcask.pipeline.text.sources import Row

_MANY_TURNS = 8  # a chat with so many turns is rendered in windows


def render(
    template: ChatTemplate, messages: Messages, row: Row, learnt: list[int]
) -> tuple[str, list[Span]]:
    """The chat as text, and the characters of its turns ``learnt``, ascending, end exclusive.

    messages: those of ``row`` as ``template`` has prepared them.

    Raises Refused if the template does, and UserError if the turns cannot be found in the text.
    """
    if template.marks_answers:
        return _by_marks(template, messages, row, learnt)
    return _by_prefixes(template, messages, row, learnt)


def tokens_in(spans: list[Span], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool[n]: tokens that hold a character of a span.

    offsets: int64[n, 2], the characters of each token, end exclusive.
    """
    mask = np.zeros(len(offsets), np.bool_)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask


def _by_marks(
    template: ChatTemplate, messages: Messages, row: Row, learnt: list[int]
) -> tuple[str, list[Span]]:
    """Spans from the template's own ``{% generation %}`` blocks.

    A block belongs to a turn if the chat up to that turn has it at the same place and the chat
    before does not have it. A template that depends on later turns has no such places. Its blocks
    are matched by order if there is one block per turn.
    """
    text, spans = template.render_marked(messages, row.tools)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(learnt) == len(turns):
        return text, spans
    ends = []
    for turn in turns[:-1]:
        start, blocks = template.render_marked(messages[: turn + 1], row.tools)
        shared = [
            block
            for block in blocks
            if block in spans and text[slice(*block)] == start[slice(*block)]
        ]
        ends.append(len(shared) if shared == spans[: len(shared)] else -1)
    ends = [0, *ends, len(spans)]
    if any(end <= before for before, end in pairwise(ends)):
        if len(spans) != len(turns):
            raise UserError(_unattributed(row.row_id))
        ends = list(range(len(turns) + 1))
    of_turn = {
        turn: spans[before:end] for turn, (before, end) in zip(turns, pairwise(ends), strict=True)
    }
    return text, [span for turn in learnt for span in of_turn[turn]]


def _by_prefixes(
    template: ChatTemplate, messages: Messages, row: Row, learnt: list[int]
) -> tuple[str, list[Span]]:
    """Spans from prefixes: turn ``i`` is the text of the chat up to it after its prompt.

    White space after the end-of-turn token separates turns and belongs to none. If a chat begins
    with the assistant, that turn has no prompt and is context.
    """
    text = template.render(messages, row.tools)
    if len(learnt) >= _MANY_TURNS:
        found = _by_windows(template, text, messages, row, learnt)
        if found is not None:
            return text, found
    spans = []
    for turn in learnt:
        if turn == 0:
            continue
        prompt = template.render(messages[:turn], row.tools, add_generation_prompt=True)
        through = (
            text if turn + 1 == len(messages) else template.render(messages[: turn + 1], row.tools)
        )
        if not (text.startswith(through) and through.startswith(prompt)):
            raise UserError(_unstable(template.name, row.row_id, turn))
        spans.append((len(prompt), max(len(prompt), len(through.rstrip()))))
    return text, spans


def _by_windows(
    template: ChatTemplate, text: str, messages: Messages, row: Row, learnt: list[int]
) -> list[Span] | None:
    """The spans of ``_by_prefixes`` at a cost linear in turns; None if this way fails.

    A chat is a series of rounds. Each is rendered with only the system prompt and the round before
    it instead of the whole chat. The result counts only if the added texts of all rounds equal
    ``text``, character by character.
    """
    lead = next(
        (i for i, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES),
        len(messages),
    )
    starts, spans, at = _rounds(messages, lead), list[Span](), 0
    for number, (start, end) in enumerate(pairwise([*starts, len(messages)])):
        # The round's window: the system prompt, the round before it with its question, and the
        # round itself.
        before = messages[:lead]
        if number:
            before = [
                *before,
                *_question(messages, starts[number - 1]),
                *messages[starts[number - 1] : start],
            ]
        window = [*before, *messages[start:end]]
        try:
            begun = template.render(before, row.tools) if number else ""
            whole = template.render(window, row.tools)
            # The text that the round adds to its window must come next in the text of the whole
            # chat.
            if not (whole.startswith(begun) and text.startswith(whole[len(begun) :], at)):
                return None
            for turn in (turn for turn in learnt if start <= turn < end and turn):
                length = len(before) + turn - start
                prompt = template.render(window[:length], row.tools, add_generation_prompt=True)
                through = (
                    whole if turn + 1 == end else template.render(window[: length + 1], row.tools)
                )
                if not (whole.startswith(through) and through.startswith(prompt)):
                    return None
                shift = at - len(begun)  # from positions in the window to positions in the text
                spans.append((shift + len(prompt), shift + max(len(prompt), len(through.rstrip()))))
        except Refused:
            return None
        at += len(whole) - len(begun)
    return spans if at == len(text) else None


def _rounds(messages: Messages, lead: int) -> list[int]:
    """Starts of rounds after the system prompt: questions, and the assistant after a tool."""
    starts = [lead]
    for index in range(lead + 1, len(messages)):
        before, role = messages[index - 1]["role"], messages[index]["role"]
        if role == "user" != before or (role == "assistant" and before == "tool"):
            starts.append(index)
    return starts


def _question(messages: Messages, start: int) -> Messages:
    """The question of a round that begins with the assistant."""
    if messages[start]["role"] == "user":
        return []
    asked = next(
        (index for index in range(start - 1, -1, -1) if messages[index]["role"] == "user"), None
    )
    return [] if asked is None else [messages[asked]]


def _unstable(template: str, row_id: str, turn: int) -> str:
    return (
        f"{template} renders the start of chat {row_id} otherwise than the whole (message {turn}), so the assistant's "
        "tokens cannot be found; put {% generation %}...{% endgeneration %} around them in the template, "
        "or set data.chat_template to one that does not look ahead"
    )


def _unattributed(row_id: str) -> str:
    return (
        f"chat {row_id} has turns that are not to be learnt, but the template's {{% generation %}} blocks are more or "
        "fewer than its turns, so which block is whose cannot be told; set data.chat_template to one with a block for "
        "each turn of the assistant"
    )
