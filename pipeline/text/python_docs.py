"""The built-in documents: the language reference of Python, so that a first cache needs no data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise

_MIN_DOCUMENT = 256  # characters; shorter sections are little more than their heading
_HEADING = re.compile(r"^\S.*\n([*=\-~^\"'#+])\1{2,} *$", re.MULTILINE)


@cache
def _python_docs() -> tuple[tuple[str, str], ...]:
    """(id, text) of the language reference that ships with Python, one document per section.

    PSF licence, about 465 kB. The order is that of sha256(id), so any prefix is a fair sample. The
    text depends on the Python version, and so does the stamp.
    """
    from pydoc_data.topics import topics

    documents = [
        (f"topics/{topic}#{number}", text)
        for topic, page in topics.items()
        for number, text in enumerate(_sections(page))
    ]
    return tuple(
        sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())
    )


def _sections(page: str) -> list[str]:
    """A page, cut before each underlined heading; short sections join the next, or the last."""
    cuts = [0, *(m.start() for m in _HEADING.finditer(page) if m.start() > 0), len(page)]
    sections = [""]
    for start, end in pairwise(cuts):
        if len(sections[-1]) >= _MIN_DOCUMENT:
            sections.append("")
        sections[-1] += page[start:end]
    if len(sections) > 1 and len(sections[-1]) < _MIN_DOCUMENT:
        sections[-2:] = [sections[-2] + sections[-1]]
    return [section.strip() + "\n" for section in sections]


BUILT_IN: dict[str, Callable[[], tuple[tuple[str, str], ...]]] = {"python-docs": _python_docs}
"""Data sets that need no file: from the name in ``data.path`` to (id, text) of each document."""
