"""Chats and tool definitions of rows, converted to one form for templates.

Rows come from many tools and have many forms: OpenAI's {role, content} and ShareGPT's {from, value},
content in parts or beside calls, arguments as text, marks for turns that are not learnt, keys that
Arrow has filled with None. A row that cannot be used raises ``Skipped`` with the reason.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")

_CALLS = "function_call"
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    _CALLS: "assistant",
}
"""The role of each name in ``from``: those of ShareGPT, TRL, axolotl and LLaMA-Factory."""


class Skipped(Exception):
    """The reason why a row cannot be used; the end of a key of ``Source.counters``."""


def marked_messages(value: object) -> list[tuple[dict[str, Any], bool]]:
    """A chat in the form for templates, and whether each message may be learnt. ``content`` is one
    string, or None beside tool calls, whose arguments are objects.

    Arrow adds the keys of other messages, calls or parts with the value None. Such keys are removed
    at every depth, in all formats, so that a chat is the same in every kind of file.

    A string is read as JSON, because CSV columns hold chats so, and ``datasets`` stores uneven
    structures so.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise Skipped("not_a_chat")
        if not value:
            raise Skipped("empty")
        return [_message(message) for message in value]
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        raise Skipped("not_a_chat") from None


def _message(filled: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    if filled.get("role") is None and filled.get("from") is not None:
        filled = _from_sharegpt(filled)
    message = {
        _unfilled(key): _unfilled(item)
        for key, item in filled.items()
        if item is not None or key == "content"
    }
    learnt = [_is_learnt(mark, message.pop(mark)) for mark in _MARKS if mark in message]
    content = message.get("content")
    calls = bool(message.get("tool_calls"))
    if "function_call" in message:  # OpenAI's form before tool_calls; no template renders it
        raise Skipped("function_call")
    if "role" not in message or not ("content" in message or calls):
        raise Skipped("not_a_chat")
    if message["role"] not in ROLES:
        raise Skipped("unknown_role")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and not calls:
        raise Skipped("null_content")
    if content is not None and not isinstance(content, str):
        raise Skipped("content_not_text")
    if calls:
        message["tool_calls"] = _calls(message["tool_calls"])
    else:  # some templates ask only whether the key is there
        message.pop("tool_calls", None)
    return {**message, "content": content}, all(learnt)


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """A message {from, value} as {role, content}, with its other keys. The value of a
    ``function_call`` is JSON text of {name, arguments}, or of a list of them, and becomes
    ``tool_calls``.

    Raises Skipped for other names in ``from`` and for other values of a call.
    """
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise Skipped("unknown_role")
    others = {key: item for key, item in message.items() if key not in ("from", "value")}
    others["role"] = _SHAREGPT_ROLES[speaker]
    if speaker != _CALLS:
        return {**others, "content": value}
    try:
        calls = json.loads(value, parse_constant=_no_constant) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and call.get("name") for call in calls):
        raise Skipped("function_call_not_json")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    called = [{"type": "function", "function": function} for function in functions]
    return {**others, "content": None, "tool_calls": called}


_MARKS = {"weight": False, "train": False, "training": False, "mask": True, "masked": True}
"""Keys of a message that say whether it is learnt, and the value that says it is not: those of
OpenAI and axolotl.
"""


def _is_learnt(mark: str, value: object) -> bool:
    """Whether a message is learnt. Raises Skipped for a value other than yes or no, such as 0.5."""
    if value not in (0, 1):
        raise Skipped(f"{mark}_not_0_or_1")
    return bool(value) is not _MARKS[mark]


def _calls(calls: object) -> list[Any]:
    """Calls with their arguments as objects, which OpenAI's API gives as JSON text. Empty text
    means no arguments.

    Raises Skipped for text that is not a JSON object, because templates would quote it again.
    """
    if not isinstance(calls, list):
        raise Skipped("not_a_chat")
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function = {**function, "arguments": _arguments(function["arguments"])}
            call = {**call, "function": function} if "function" in call else function
        parsed.append(call)
    return parsed


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text, parse_constant=_no_constant) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Skipped("arguments_not_json")
    unfilled: dict[str, Any] = _unfilled(arguments)
    return unfilled


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def tool_definitions(value: object) -> list[dict[str, Any]] | None:
    """Tool definitions in the form for templates; None if there are none.

    The list, or each of its elements, may be JSON text.

    Keys with the value None are removed, as in messages: Arrow gives each tool the parameters of
    all tools.
    """
    try:
        tools = json.loads(value.strip() or "null") if isinstance(value, str) else value
        if tools is None or tools == []:
            return None
        if isinstance(tools, list):
            tools = [
                _unfilled(json.loads(tool) if isinstance(tool, str) else tool) for tool in tools
            ]
    except (ValueError, RecursionError):
        raise Skipped("not_tools") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise Skipped("not_tools")
    return tools


def _is_text(part: object) -> bool:
    """Whether ``part`` is a text part of a content list, as in OpenAI's API."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _unfilled(value: Any) -> Any:
    """The value without keys that hold None. Raises Skipped if one of its strings is not Unicode
    text, because any of them may be rendered.
    """
    if isinstance(value, dict):
        return {_unfilled(key): _unfilled(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_unfilled(item) for item in value]
    if isinstance(value, str):
        check_unicode(value)
    return value


def check_unicode(text: str) -> None:
    """Raises Skipped for half an emoji (``"\\ud83d"`` in JSON), which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Skipped("broken_unicode") from None
