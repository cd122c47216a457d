"""Docstrings of the code as Markdown, for the reference of the Python API."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\w+):(?: {2,}| (?=\S))(?=.*\S)")
_BLOCK = re.compile(r"^ {4}", re.MULTILINE)


class Markdown(griffe.Extension):
    """Turns the tables of fields in docstrings into lists, and links RST's code into Markdown's."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring as Markdown. A paragraph of lines ``name:  meaning``, whose continuations are
    indented, becomes a list. Anything else stays.
    """
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if len(lines) < 2 or not all(_FIELD.match(line) or line.startswith("  ") for line in lines):
        return text
    if not _FIELD.match(lines[0]):
        return text
    joined: list[str] = []
    for line in lines:
        if _FIELD.match(line):
            joined.append(_FIELD.sub(r"- `\1`: ", line))
        else:
            joined[-1] += f" {line.strip()}"
    return "\n".join(joined)
