"""The source of the text: from ``data.path`` to a stream of rows.

A built-in name (``python_docs``) needs no file. Any other value has the form that
``datasets.load_dataset`` takes: a file, a folder or a hub name. ``data_files`` asks ``datasets``
for the files of a split. ``file_formats`` reads the files instead of ``datasets``, for three
reasons:

* The streaming Parquet reader of ``datasets`` may abort the process at exit if reading stops early,
  as it does at ``max_tokens`` (https://github.com/huggingface/datasets/issues/7566).
* Its JSON reader infers types from the first 10 MB, and fails later in the file if an unrelated
  column changes type.
* Without streaming it writes the whole data set a second time, as Arrow, although a plan reads it
  only once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from logitcask.cache_format.errors import LogitcaskError, UserError, one_line_and_kind
from logitcask.pipeline.text.chat_rows import (
    ROLES,
    Skipped,
    check_unicode,
    marked_messages,
    tool_definitions,
)
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.data_files import (
    Found,
    check_split,
    chosen,
    find_files,
    is_saved,
    is_url,
    names_of,
    nearest,
    quiet_datasets,
)
from logitcask.pipeline.text.file_formats import (
    JSON_SUFFIXES,
    SUFFIXES,
    BadRow,
    locate,
    read_columns,
    read_rows,
    suffix_of,
)
from logitcask.pipeline.text.own_sources import OwnRows, is_own
from logitcask.pipeline.text.python_docs import BUILT_IN
from logitcask.pipeline.text.rejects import SKIPPED_ROWS, UNREADABLE, Reject, Report, ignore

log = logging.getLogger(__name__)

_TOOLS = "tools"  # the default column of tools, read if it exists
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
# Keys in which file systems tell whether a file is the same.
_FACTS = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row: a document (``text``) or a chat (``messages``). The other field is None.

    tools:      tool definitions of the chat, or of the question in ``text``; None without any.
    unlearnt:   indices of the messages that are not to be learnt.
    completion: the text behind ``text`` of which alone is learnt; None for a document.
    """

    row_id: str
    text: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None = None
    unlearnt: frozenset[int] = frozenset()
    completion: str | None = None

    @property
    def characters(self) -> int:
        """The approximate length, without tools and tool calls."""
        return (
            len(self.text or "")
            + len(self.completion or "")
            + sum(len(str(message.get("content"))) for message in self.messages or [])
        )


class RowSource(Protocol):
    """Rows in a fixed order: one ``Source``, or several as one."""

    report: Report

    @property
    def counters(self) -> dict[str, int]: ...

    def stamp(self) -> str: ...

    def __iter__(self) -> Iterator[Row]: ...


class Source:
    """The rows of one split, in a fixed order. Iterating starts from the first row every time.

    ``row_id`` is the value of ``data.id_field``, by default ``split/index``. ``index`` counts all
    rows of the split, also skipped ones and those outside a slice (``train[:10%]``), so a repaired
    row or another slice does not change the ids of the others.

    ``counters`` describes the latest iteration: ``rows_read``, ``rows_skipped_REASON`` for rows
    without usable text, ``files_unreadable`` for files that cannot be read to their end, and
    ``files_left_out`` for data files of the folder that are in no split. ``report`` receives each
    row that is skipped and each unreadable file. ``file`` gives the file of the latest row if the
    source has several, else an empty text.
    """

    report: Report

    def __init__(
        self,
        config: DataConfig,
        columns: list[str],
        read: Callable[[list[str]], Iterator[Mapping[str, Any] | BadRow]],
        stamp: Callable[[], str],
        id_field: str | None,
        files_left_out: int = 0,
        file: Callable[[], str] = str,
    ) -> None:
        self._config = config
        self._file = file
        self._read = read
        self._stamp = stamp
        self._id_field = id_field
        self._chats = config.messages_field is not None
        setting = next(
            (name for name in ("messages_field", "prompt_field") if getattr(config, name)),
            "text_field",
        )
        self._field: str = getattr(config, setting) or "text"
        self._tools_field: str | None = config.tools_field or None
        wanted = {
            setting: self._field,
            "completion_field": config.completion_field,
            "id_field": id_field,
            "tools_field": self._tools_field,
        }
        if columns or config.on_bad_rows != "skip":  # else no row can be read, which is said later
            for name, field in wanted.items():
                if field is not None:
                    _check_field(config.path, columns, field, name)
        if self._tools_field is None and config.looks_for_tools:
            self._tools_field = _TOOLS
        self._fields = list(dict.fromkeys(filter(None, (*wanted.values(), self._tools_field))))
        self._files_left_out = files_left_out
        self._slice = config.slice
        self._rows: int | None = None
        self._counters: Counter[str] = Counter()
        self.report = ignore

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def stamp(self) -> str:
        """An identity of the data that changes with the data. It reads names and sizes, never
        rows.

        Built-in: sha256 of its documents. Files: sha256 of their names, sizes and times of change.
        Hub: the commit.
        """
        return self._stamp()

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError if the data cannot be read, if an id is missing or occurs twice, if no
        row is usable, and for the first unusable row with ``data.on_bad_rows`` fail.
        """
        self._counters = Counter(rows_read=0)
        if self._files_left_out:
            self._counters["files_left_out"] = self._files_left_out
        # 8 bytes of hash per row: two ids of 10 million collide with probability 3e-6.
        seen: set[int] = set()
        used = 0
        start, stop = self._slice.bounds(self._total() if self._slice.needs_total else None)
        for index, record in self._numbered(start, stop):
            if isinstance(record, BadRow) and record.whole_file:
                self._counters[UNREADABLE] += 1
                self.report(Reject(record.whole_file, UNREADABLE, record.message))
                continue
            self._counters["rows_read"] += 1
            row_id = f"{self._slice.name}/{index}"
            if isinstance(record, BadRow):
                self._skip(row_id, record.reason, record.message)
                continue
            if self._id_field is not None:
                if record[self._id_field] is None and self._config.on_bad_rows == "skip":
                    self._skip(row_id, "no_id", self._file())
                    continue
                row_id = self._unique_id(record[self._id_field], row_id, seen)
            try:
                row = self._row(row_id, record)
            except Skipped as reason:
                self._skip(row_id, str(reason), self._file())
                continue
            used += 1
            yield row
        if used == 0:
            raise UserError(self._nothing_found())

    def _skip(self, row_id: str, reason: str, detail: str = "") -> None:
        self._counters[f"{SKIPPED_ROWS}{reason}"] += 1
        self.report(Reject(row_id, reason, detail))
        if self._config.on_bad_rows == "fail":
            raise UserError(
                f"row {row_id} of {self._file() or self._config.path} cannot be used: {reason}; repair it, or set "
                "data.on_bad_rows=skip"
            )

    def _total(self) -> int:
        """The number of rows of the split, counted by reading it once."""
        if self._rows is None:
            whole = (bool(isinstance(r, BadRow) and r.whole_file) for r in self._records())
            self._rows = sum(not each for each in whole)
        return self._rows

    def _numbered(
        self, start: int, stop: int | None
    ) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """The records from ``start`` to ``stop`` with their indices in the split. The rest of a
        file that cannot be read has that of the next row.
        """
        index = 0
        for record in self._records() if stop is None or stop > start else ():
            if index >= start:
                yield index, record
            index += not (isinstance(record, BadRow) and record.whole_file)
            if index == stop:
                return

    def _records(self) -> Iterator[Mapping[str, Any] | BadRow]:
        try:
            yield from self._read(self._fields)
        except LogitcaskError:
            raise
        except Exception as error:  # any error of a file system, a decoder or the network
            raise UserError(
                f"cannot read {self._config.path}: {one_line_and_kind(error)}"
            ) from error

    def _unique_id(self, value: object, place: str, seen: set[int]) -> str:
        if value is None:
            raise UserError(
                f"row {place} of {self._config.path} has no {self._id_field!r}; every row needs an id"
            )
        row_id = str(value)
        try:
            encoded = row_id.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"row {place} of {self._config.path} has the {self._id_field!r} {row_id!r}, which holds half a surrogate "
                "pair and is no Unicode text; repair it, or choose another data.id_field, or none to use row numbers"
            ) from None
        digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
        if digest in seen:
            raise UserError(
                f"the id {row_id!r} occurs twice in column {self._id_field!r} of {self._config.path} (again at row "
                f"{place}); ids must be unique: choose another data.id_field, or none to use row numbers"
            )
        seen.add(digest)
        return row_id

    def _row(self, row_id: str, record: Mapping[str, Any]) -> Row:
        value = record[self._field]
        if value is None:
            raise Skipped("null")
        tools = (
            None if self._tools_field is None else tool_definitions(record.get(self._tools_field))
        )
        if self._chats:
            marked = marked_messages(value)
        elif self._config.completion_field is None:
            return Row(row_id, _text_of(value), None, tools)
        else:
            completion = record[self._config.completion_field]
            if completion is None:
                raise Skipped("null_completion")
            if self._config.kind == "documents":
                return Row(row_id, _text_of(value), None, completion=_text_of(completion))
            prompt = [(message, False) for message, _ in _messages_of(value, "user")]
            marked = [*prompt, *_messages_of(completion, "assistant")]
        unlearnt = frozenset(index for index, (_, learnt) in enumerate(marked) if not learnt)
        return Row(row_id, None, [message for message, _ in marked], tools, unlearnt)

    def _nothing_found(self) -> str:
        place = f"empty data set: {self._config.path}, split {self._config.split}"
        skipped = [
            f"{n} {why.removeprefix(SKIPPED_ROWS)}"
            for why, n in self._counters.items()
            if why.startswith(SKIPPED_ROWS)
        ]
        if self._counters[UNREADABLE]:
            skipped.append(f"{self._counters[UNREADABLE]} unreadable files")
        if not skipped:
            return f"{place}, has no rows"
        if self._counters["rows_skipped_not_tools"] == self._counters["rows_read"]:
            return (
                f"{place}: column {self._tools_field!r} should hold tool definitions (a list of objects, or JSON text of "
                "one); name another column in data.tools_field, or set data.tools_field=false to leave it out"
            )
        wanted = "non-empty strings"
        if self._chats:
            wanted = f"chats ({', '.join(ROLES)} messages with role and content)"
        elif self._config.completion_field and self._config.kind == "chats":
            wanted += " or chats"
        elif self._config.completion_field:
            wanted += " (for lists of messages set data.prompt_field instead of text_field)"
        return (
            f"{place}: none of its {self._counters['rows_read']} rows can be used ({', '.join(skipped)}); "
            f"column {self._field!r} should hold {wanted}"
        )


def _text_of(value: object) -> str:
    """A text. Raises Skipped for a value that is none, and for white space alone."""
    if not isinstance(value, str):
        raise Skipped("not_a_string")
    if not value.strip():
        raise Skipped("empty")
    check_unicode(value)
    return value


def _messages_of(value: object, role: str) -> list[tuple[dict[str, Any], bool]]:
    """A prompt or a completion as marked messages; a text is one message of ``role``."""
    if isinstance(value, str):
        return [({"role": role, "content": _text_of(value)}, True)]
    return marked_messages(value)


def open_source(config: DataConfig) -> Source:
    """The source at ``data.path``, which is one of ``DataConfig.parts``. Split and columns are
    checked here, before any row is read.

    Raises UserError if there is no data at that path, for an unknown split, a missing column or an
    unreadable file.
    """
    if config.path in BUILT_IN:
        return _open_built_in(config)
    if is_own(config):
        rows = OwnRows(config)
        return Source(config, rows.columns, rows.read, rows.stamp, config.id_field)
    local = Path(config.path).expanduser()
    if is_saved(local):
        return _open_saved(config, local)
    found = find_files(config)
    if found.left_out or found.elsewhere:
        log.log(logging.WARNING if found.left_out else logging.INFO, "%s", chosen(config, found))
    return _open_files(config, found)


# --- built-in -------------------------------------------------------------------------------------


def _open_built_in(config: DataConfig) -> Source:
    check_split(config, ["train"])
    documents = BUILT_IN[config.path]

    def read(fields: list[str]) -> Iterator[dict[str, str]]:
        return (
            {"id": name, "text": text, "title": text.partition("\n")[0]}
            for name, text in documents()
        )

    def stamp() -> str:
        return f"built-in:{hashlib.sha256(json.dumps(documents()).encode()).hexdigest()}"

    return Source(config, ["id", "text", "title"], read, stamp, config.id_field or "id")


# --- files, local and on the hub ------------------------------------------------------------------


def _open_files(config: DataConfig, found: Found) -> Source:
    files, base = found.files, found.base
    unknown = [file for file in files if suffix_of(file) not in SUFFIXES]
    if unknown:
        raise UserError(f"cannot read {unknown[0]}: expected a file of type {names_of(SUFFIXES)}")
    tolerant = config.on_bad_rows == "skip"
    # Of the first file with rows.
    columns = next(filter(None, (read_columns(file, tolerant=tolerant) for file in files)), [])

    current = ""

    def read(fields: list[str]) -> Iterator[Mapping[str, Any] | BadRow]:
        nonlocal current
        for file in files:
            current = file if len(files) > 1 else ""
            yield from read_rows(file, _fields_in(file, fields, config), tolerant=tolerant)

    def stamp() -> str:
        if base is not None:
            return _stamp_of_files([Path(file) for file in files], base)
        if is_url(config.path):
            return _stamp_of_urls(files)
        commit = _COMMIT.search(files[0])
        return f"hub:{config.path}@{commit[1] if commit else config.revision or 'main'}"

    left_out = len(list(found.left_out))
    return Source(config, columns, read, stamp, config.id_field, left_out, lambda: current)


def _fields_in(file: str, fields: list[str], config: DataConfig) -> list[str]:
    """``fields`` without the default column of tools, if this file lacks it. JSON files never lack
    it: a missing key reads as None.
    """
    if _TOOLS not in fields or not config.looks_for_tools or suffix_of(file) in JSON_SUFFIXES:
        return fields
    columns = read_columns(file, tolerant=config.on_bad_rows == "skip")
    return [field for field in fields if field != _TOOLS or field in columns]


def _open_saved(config: DataConfig, folder: Path) -> Source:
    """A folder written by ``save_to_disk``. It is Arrow already, so it is memory-mapped."""
    if "::" in str(folder.resolve()):
        raise UserError(
            f"cannot open data set {config.path!r}: `datasets` takes '::' in the path of a saved data set for a chain of "
            "file systems; rename the folder"
        )
    from datasets import DatasetDict, load_from_disk

    with quiet_datasets():
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:
            raise UserError(
                f"cannot open data set {config.path!r}: {one_line_and_kind(error)}"
            ) from error
    if isinstance(saved, DatasetDict):
        check_split(config, list(saved))
        saved = saved[config.slice.name]
    elif saved.split is not None:
        check_split(config, [str(saved.split)])
    # A saved data set may have a format, such as tensors of some columns; plain values are read.
    saved = saved.with_format(None)

    def read(fields: list[str]) -> Iterator[Mapping[str, Any]]:
        return iter(
            saved.select_columns([field for field in fields if field in saved.column_names])
        )

    def stamp() -> str:
        return _stamp_of_files(sorted(folder.rglob("*.arrow")), folder)

    return Source(config, saved.column_names, read, stamp, config.id_field)


def _stamp_of_files(files: list[Path], base: Path) -> str:
    facts = []
    for file in files:
        stat = file.stat()
        facts.append((os.path.relpath(file, base), stat.st_size, stat.st_mtime_ns))
    return f"files:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def _stamp_of_urls(urls: list[str]) -> str:
    """As far as a store tells sizes, times and versions."""
    facts = []
    for url in urls:
        filesystem, name = locate(url)
        info = filesystem.info(name)
        facts.append((url, [str(info.get(fact)) for fact in _FACTS]))
    return f"urls:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


# --- checks ---------------------------------------------------------------------------------------


def _check_field(path: str, columns: list[str], field: str, setting: str) -> None:
    if field in columns:
        return
    if not columns:
        raise UserError(f"empty data set: {path} has no rows")
    hint = nearest(field, columns)
    chats = [column for column in _CHAT_COLUMNS if column in columns]
    if setting == "text_field" and not hint and chats:
        hint = f"; if {chats[0]!r} holds chats, set data.messages_field={chats[0]}"
    raise UserError(
        f"data set {path!r} has no column {field!r} (data.{setting}); it has {', '.join(columns)}{hint}"
    )
