"""The result of a command on stdout: text for people, or with ``--json`` one JSON document and
nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TextIO

from pydantic import BaseModel


@dataclass
class _Stdout:
    """as_json: whether stdout gets a document. quiet: whether summaries are left out. file: stdout
    of the document, or None for the current ``sys.stdout``.
    """

    as_json: bool = False
    quiet: bool = False
    file: TextIO | None = None


_stdout = _Stdout()


@contextlib.contextmanager
def results(*, as_json: bool, quiet: bool) -> Iterator[None]:
    """A context for a command. With ``as_json``, all other output of this process, its libraries
    and its children to stdout goes to stderr.
    """
    global _stdout
    before = _stdout
    with _only_the_document() if as_json else contextlib.nullcontext() as file:
        _stdout = _Stdout(as_json, quiet, file)
        try:
            yield
        finally:
            _stdout = before


def print_result(
    document: Mapping[str, Any] | BaseModel | str, text: str, *, summary: bool = True
) -> None:
    """Prints ``document`` with ``--json``, else ``text``.

    document: a mapping, a pydantic model, or JSON text. Numbers that are not finite become null.
    summary: whether ``text`` only describes work that is done, so that ``--quiet`` leaves it out.
    """
    if as_json():
        print(_json(document), file=result_file(), flush=True)
    elif not (summary and _stdout.quiet):
        print(text)


def as_json() -> bool:
    """Whether the command was given ``--json``."""
    return _stdout.as_json


def result_file() -> TextIO:
    """Stdout, for results that are written in parts."""
    return _stdout.file or sys.stdout


def _json(document: Mapping[str, Any] | BaseModel | str) -> str:
    if isinstance(document, str):
        return document.rstrip("\n")
    if isinstance(document, BaseModel):
        return document.model_dump_json(indent=2)
    return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, PurePath) else value


@contextlib.contextmanager
def _only_the_document() -> Iterator[TextIO]:
    """Stdout for the document; the stream and the descriptor of stdout become those of stderr."""
    stdout = sys.stdout
    stdout.flush()
    try:
        real = stdout.fileno() == 1
    except (OSError, ValueError):  # a stream in memory
        real = False
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            if real:
                with open(kept, "w", encoding="utf-8", closefd=False) as file:
                    yield file
            else:
                yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)
