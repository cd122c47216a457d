"""Docstrings of the code as Markdown, for the reference of the Python API."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\w+(?:, [\w*]+)*): +(?=\S)")


class Markdown(griffe.Extension):
    """Turns the fields that docstrings describe, a line each, into lists."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring as Markdown. A paragraph of lines ``name: meaning``, whose continuations are
    indented, becomes a list. Anything else stays.
    """
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    items: list[str] = []
    for line in text.splitlines():
        if _FIELD.match(line):
            items.append(_FIELD.sub(r"- `\1`: ", line))
        elif items and line.startswith("  "):
            items[-1] += f" {line.strip()}"
        else:
            return text
    return "\n".join(items)
