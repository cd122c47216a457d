"""The caches of a home as they are now: there, changed or gone, with age and last use."""

from __future__ import annotations

import fnmatch
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from logitcask.cache_format.catalog.home import Entry, Home, is_there, place_of
from logitcask.cache_format.errors import CacheError
from logitcask.cache_format.export.token_text import printable
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.storage.files import open_filesystem, read_manifest

log = logging.getLogger(__name__)

_SIZES = ((86_400, "d"), (3_600, "h"), (60, "min"))


@dataclass(frozen=True)
class Listed:
    """One line of a listing.

    last_use: seconds since 1970; None for a cache at a remote.
    gone:     whether its folder holds no cache any more.
    """

    entry: Entry
    last_use: float | None
    in_use: bool = False
    gone: bool = False

    def document(self) -> dict[str, Any]:
        """The line as JSON values."""
        used = None if self.last_use is None else datetime.fromtimestamp(self.last_use, UTC)
        return {
            **self.entry.model_dump(mode="json", exclude={"version", "stamp", "request"}),
            "last_use": None if used is None else used.isoformat(timespec="seconds"),
            "in_use": self.in_use,
            "gone": self.gone,
        }


def listing(home: Home) -> list[Listed]:
    """Every cache of the home, the latest use first. An entry whose cache was replaced by another
    is brought up to date.
    """
    used, lines = home.used(), []
    for entry, last_use in home.entries():
        now, gone = entry, False
        if not is_there(entry):
            found = None if entry.removal else _as_it_is(entry)
            now, gone = found or entry, found is None
            if found is not None:
                home.update(found, last_use)
        lines.append(Listed(now, last_use, bool(used) and entry.name in used, gone))
    return sorted(lines, key=lambda each: -(each.last_use or 0))


def matching(lines: Iterable[Listed], **patterns: str | None) -> list[Listed]:
    """The lines whose fields match: ``*``, ``?`` and ``[]`` are wildcards, a pattern without them
    matches a part. ``tokenizer`` is also the beginning of its sha256.
    """

    def matches(line: Listed, field: str, pattern: str) -> bool:
        texts = [str(getattr(line.entry, field))]
        if field == "tokenizer" and line.entry.tokenizer_sha256.startswith(pattern):
            return True
        if not set(pattern) & set("*?["):
            pattern = f"*{pattern}*"
        return any(fnmatch.fnmatchcase(text.lower(), pattern.lower()) for text in texts)

    wanted = {field: pattern for field, pattern in patterns.items() if pattern}
    return [line for line in lines if all(matches(line, *each) for each in wanted.items())]


def table(lines: list[Listed]) -> str:
    """The lines in columns, for people and for pipes. Names come from strangers, too, so control
    characters are shown as in Python's literals.
    """
    now, here = time.time(), f"{Path.cwd()}{os.sep}"
    rows = [("teacher", "data", "tokens", "B/token", "age", "last use", "where")]
    for line in lines:
        entry = line.entry
        rows.append(
            (
                _short(entry.teacher, 32),
                _short(entry.data, 40),
                f"{entry.tokens:,}",
                f"{entry.bytes_per_token:.1f}",
                span(now - _time_of(entry.created_at, now)),
                "in use"
                if line.in_use
                else ""
                if line.last_use is None
                else span(now - line.last_use),
                f"{entry.where.removeprefix(here)}{' (derived)' if entry.derived else ''}",
            )
        )
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {2, 3, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def totals(lines: list[Listed]) -> str:
    """One line: how many caches, and how large they are."""
    size = sum(line.entry.bytes for line in lines)
    return f"{len(lines):,} {'cache' if len(lines) == 1 else 'caches'}, {size:,} bytes"


def span(seconds: float) -> str:
    """A time span in words: ``3 min``, ``5 h``, ``12 d``."""
    for size, unit in _SIZES:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"


def chosen(lines: list[Listed], name: str) -> list[Listed]:
    """The lines that ``name`` means: a path, a URL, or the beginning of a fingerprint of at least
    six characters.
    """
    path = place_of(name)
    at = [line for line in lines if line.entry.where in (path, name)]
    if at or len(name) < 6:
        return at
    return [line for line in lines if line.entry.fingerprint.startswith(name)]


def _as_it_is(entry: Entry) -> Entry | None:
    """The entry of what is there now; None if that is no cache."""
    try:
        filesystem, root = open_filesystem(entry.where)
        status = os.stat(f"{root}/{MANIFEST}")
        manifest = read_manifest(filesystem, root, entry.where)[1]
    except (CacheError, OSError) as error:
        log.debug("%s: %s", entry.where, error)
        return None
    return Entry.of(entry.where, manifest, f"{status.st_size} {status.st_mtime_ns}")


def _time_of(created_at: str, now: float) -> float:
    try:
        return datetime.fromisoformat(created_at).timestamp()
    except ValueError:
        return now


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
