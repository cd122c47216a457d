"""The rejects file of a build: rows that are left out or cut, by id and reason.

Each line is one JSON object. ``id`` is the row's id; ``reason`` is the counter in the manifest,
without ``rows_skipped_``; ``outcome`` is ``skipped`` or ``cut``; ``detail`` is there if more is
known. A file that cannot be read to its end has ``file`` in place of ``id``. The number of lines is
limited per reason. The lines behind the limit are counted in a last line ``{"reason": ...,
"unlisted": N}``.

The file belongs to a plan: it is written while the plan is made, under a temporary name, and
appears before the plan is committed. A build that was killed before makes the plan again, and with
it the same file.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from logitcask.cache_format.durable import sync
from logitcask.cache_format.errors import LogitcaskError

log = logging.getLogger(__name__)

SKIPPED_ROWS = "rows_skipped_"
"""The start of counters of rows that cannot be used; the reason follows."""

UNREADABLE = "files_unreadable"
"""The counter of files that cannot be read to their end."""

CUT = ("truncated", "truncated_left", "shortened")
"""Counters of rows that are in the cache without a part of their text."""

LEFT_OUT = (
    "without_tokens",
    "dropped_overlong",
    "nothing_to_learn",
    "prompt_too_long",
    "refused_by_template",
    "overlong_prompts",
    "without_prompt",
)
"""Counters of rows that can be read and give no sequence."""

_LINES = 10_000  # per reason
_DETAIL = 500  # characters


class Reject(NamedTuple):
    """A row that is left out or cut, or a file of which the rest is left out.

    name:   id of the row, or path of the file.
    reason: a counter, without ``rows_skipped_``.
    detail: more about the reason; may be empty.
    """

    name: str
    reason: str
    detail: str = ""

    @property
    def of_file(self) -> bool:
        return self.reason == UNREADABLE


Report = Callable[[Reject], object]
"""Receives each reject as it is found."""


def ignore(_: Reject) -> None:
    """Does nothing: the rejects of a pass over the data that makes no plan."""


class Rejects:
    """Writes the rejects file ``file``, in a ``with`` block around the pass over the data.

    Without any reject there is no file, and one of an earlier plan is removed. The file also
    appears if the pass ends with an error of the data, because it may explain it. If the file
    cannot be written, a warning says so, and the build goes on.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._temporary = file.with_name(f"{file.name}.tmp")
        self._out: IO[str] | None = None
        self._failed = False
        self._counts: Counter[str] = Counter()

    def add(self, reject: Reject) -> None:
        self._counts[reject.reason] += 1
        if self._counts[reject.reason] > _LINES:
            return
        line = {"file" if reject.of_file else "id": reject.name}
        line |= {
            "reason": reject.reason,
            "outcome": "cut" if reject.reason in CUT else "skipped",
        }
        self._write(line | ({"detail": reject.detail[:_DETAIL]} if reject.detail else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, LogitcaskError):
            self._commit()
            if error is not None and self._counts and not self._failed:
                log.info("the rows that were left out or cut are named in %s", self._file)
        elif self._out is not None:
            self._out.close()
            self._temporary.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            if self._out is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._out = self._temporary.open("w", encoding="utf-8")
            self._out.write(json.dumps(line) + "\n")
        except OSError as error:
            self._give_up(error)

    def _commit(self) -> None:
        for reason, count in self._counts.items():
            if count > _LINES:
                self._write({"reason": reason, "unlisted": count - _LINES})
        if self._failed:
            return
        try:
            if self._out is None:
                for old in (self._temporary, self._file):
                    old.unlink(missing_ok=True)
                return
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            os.replace(self._temporary, self._file)
            sync(self._file.parent)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        log.warning(
            "cannot write %s: %s; the rows that are left out or cut are counted in the manifest, but not named",
            self._file,
            error.strerror or error,
        )


def summary(counters: Mapping[str, int], file: Path | None = None) -> str:
    """One line: the number of rows left out and cut, by reason, and the file that names them, if it
    exists. Empty if there are none.
    """
    left_out = {
        name.removeprefix(SKIPPED_ROWS): count
        for name, count in counters.items()
        if count and (name.startswith(SKIPPED_ROWS) or name in LEFT_OUT)
    }
    cut = {name: counters[name] for name in CUT if counters.get(name)}
    parts = [
        f"{_count(sum(reasons.values()), 'row')} {what} ({_listed(reasons)})"
        for what, reasons in (("left out", left_out), ("cut", cut))
        if reasons
    ]
    if counters.get(UNREADABLE):
        parts.append(f"{_count(counters[UNREADABLE], 'file')} not read to the end")
    if parts and file is not None and file.exists():
        parts.append(f"named in {file}")
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in reasons.items())
