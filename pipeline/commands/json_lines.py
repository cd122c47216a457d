"""Rows as JSON lines: the output of commands that export texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from logitcask.cache_format.cli.result import as_json, print_result, result_file
from logitcask.cache_format.durable import writing_to
from logitcask.cache_format.errors import UserError


def write_lines(rows: Iterable[dict[str, Any]], out: Path | None, name: str) -> None:
    """Writes ``rows`` to ``out``, or to standard output if it is None.

    With ``--json`` they are one list there; with ``out``, a document with their number as ``name``.
    Raises UserError for a value that JSON does not have, such as a date.
    """
    one_list = as_json() and out is None
    written = 0
    with (
        writing_to(out or Path("standard output")),
        out.open("w", encoding="utf-8") if out else nullcontext(result_file()) as file,
    ):
        for written, row in enumerate(rows, start=1):
            before = ("[\n" if written == 1 else ",\n") if one_list else ""
            file.write(before + _line(row) + "\n" * (not one_list))
        if one_list:
            file.write("\n]\n" if written else "[]\n")
    if as_json() and out:
        print_result({"out": out, name: written}, "")


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except TypeError as error:
        raise UserError(
            f"row {row['id']} holds a value that JSON does not have ({error}); write it as text"
        ) from error
