"""From ``data.path`` to rows: where the text comes from, read as a stream.

A built-in name (``python_docs``) needs no file. Everything else is named as for
``datasets.load_dataset``: a file, a folder, a hub name. ``datasets`` finds the files of a split;
``file_formats`` reads them, for three reasons:

* its streaming Parquet reader may abort the process at exit when reading stops early, as it does at
``max_tokens``
  (https://github.com/huggingface/datasets/issues/7566);
* its JSON reader infers types from the first 10 MB and fails later in the file when an unrelated
column changes type; * without streaming it would write the whole data set a second time, as Arrow,
although a plan reads it only once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from logitcask.cache_format.cli.models_folder import cannot_write
from logitcask.cache_format.errors import LogitcaskError, UserError, one_line_and_kind
from logitcask.pipeline.config import DataConfig
from logitcask.pipeline.text.chat_rows import (
    ROLES,
    Skipped,
    check_unicode,
    marked_messages,
    tool_definitions,
)
from logitcask.pipeline.text.file_formats import (
    JSON_SUFFIXES,
    SUFFIXES,
    read_columns,
    read_rows,
    suffix_of,
)
from logitcask.pipeline.text.python_docs import BUILT_IN

log = logging.getLogger(__name__)

ALL = "all"
"""The split of a folder that holds every data file below it, whatever its name; a split of that
name goes first.
"""

_TOOLS = "tools"  # the column read beside chats unasked
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_SHOWN = 5  # names in a message
_PATTERN = re.compile(r"[\[\]?*]|::")  # what `datasets` and fsspec do not take literally in a path
_CARDS = (
    "README.md",
    ".huggingface.yaml",
    "dataset_infos.json",
)  # where a folder may name its splits
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row: a document (``text``) or a chat (``messages``), the other one being None.

    tools:    definitions that the chat, or the question in ``text``, comes with; None for none.
    unlearnt: indices of the messages that are marked as not to be learnt.
    """

    row_id: str
    text: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None = None
    unlearnt: frozenset[int] = frozenset()

    @property
    def characters(self) -> int:
        """About how long it is, tools and calls aside."""
        return len(self.text or "") + sum(
            len(str(message.get("content"))) for message in self.messages or []
        )


class Source:
    """The rows of one split, in a fixed order. Iterating starts from the first row every time.

    ``row_id`` is the value of ``data.id_field``, else ``split/index``, where ``index`` counts all
    rows of the split, used or not, so that ids stay what they are when a bad row is repaired.

    ``counters`` describes the latest iteration: ``rows_read``, ``rows_skipped_REASON`` for rows
    that hold no text, and ``files_left_out`` for data files of the folder that are in no split.
    """

    def __init__(
        self,
        config: DataConfig,
        columns: list[str],
        read: Callable[[list[str]], Iterator[Mapping[str, Any]]],
        stamp: Callable[[], str],
        id_field: str | None,
        files_left_out: int = 0,
    ) -> None:
        self._config = config
        self._read = read
        self._stamp = stamp
        self._id_field = id_field
        self._chats = config.messages_field is not None
        setting = next(
            (name for name in ("messages_field", "prompt_field") if getattr(config, name)),
            "text_field",
        )
        self._field: str = getattr(config, setting) or "text"
        _check_field(config.path, columns, self._field, setting)
        if id_field is not None:
            _check_field(config.path, columns, id_field, "id_field")
        self._files_left_out = files_left_out
        self._tools_field: str | None = config.tools_field or None
        if self._tools_field is not None:
            _check_field(config.path, columns, self._tools_field, "tools_field")
        elif config.looks_for_tools:
            self._tools_field = _TOOLS
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def stamp(self) -> str:
        """A cheap identity of the data: different where the data changed. Reads names and sizes,
        never rows.

        Built-in: sha256 of its documents. Files: sha256 of their names, sizes and times of change.
        Hub: the commit.
        """
        return self._stamp()

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError where the data cannot be read, an id is missing or occurs twice, or
        no row can be used.
        """
        self._counters = Counter(rows_read=0)
        if self._files_left_out:
            self._counters["files_left_out"] = self._files_left_out
        # 8 bytes of hash per row: two ids of 10 million collide with probability 3e-6.
        seen: set[int] = set()
        used = 0
        for index, record in enumerate(self._records()):
            self._counters["rows_read"] += 1
            row_id = f"{self._config.split}/{index}"
            if self._id_field is not None:
                row_id = self._unique_id(record[self._id_field], row_id, seen)
            try:
                row = self._row(row_id, record)
            except Skipped as reason:
                self._counters[f"rows_skipped_{reason}"] += 1
                continue
            used += 1
            yield row
        if used == 0:
            raise UserError(self._nothing_found())

    def _records(self) -> Iterator[Mapping[str, Any]]:
        fields = list(dict.fromkeys(filter(None, (self._field, self._id_field, self._tools_field))))
        try:
            yield from self._read(fields)
        except LogitcaskError:
            raise
        except Exception as error:  # whatever a file system, a decoder or the network raises
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
            unlearnt = frozenset(index for index, (_, learnt) in enumerate(marked) if not learnt)
            return Row(row_id, None, [message for message, _ in marked], tools, unlearnt)
        if not isinstance(value, str):
            raise Skipped("not_a_string")
        if not value.strip():
            raise Skipped("empty")
        check_unicode(value)
        return Row(row_id, value, None, tools)

    def _nothing_found(self) -> str:
        place = f"empty data set: {self._config.path}, split {self._config.split}"
        prefix = "rows_skipped_"
        skipped = [
            f"{n} {why.removeprefix(prefix)}"
            for why, n in self._counters.items()
            if why.startswith(prefix)
        ]
        if not skipped:
            return f"{place}, has no rows"
        if self._counters["rows_skipped_sharegpt"]:
            return (
                f"{place}: column {self._field!r} holds chats in ShareGPT's form ({{from, value}}), which is not read; turn "
                "each message into {role, content}: `from` human is role user, gpt is assistant, system stays"
            )
        if self._counters["rows_skipped_not_tools"] == self._counters["rows_read"]:
            return (
                f"{place}: column {self._tools_field!r} should hold tool definitions (a list of objects, or JSON text of "
                "one); name another column in data.tools_field, or set data.tools_field=false to leave it out"
            )
        wanted = (
            f"chats ({', '.join(ROLES)} messages with role and content)"
            if self._chats
            else "non-empty strings"
        )
        return (
            f"{place}: none of its {self._counters['rows_read']} rows can be used ({', '.join(skipped)}); "
            f"column {self._field!r} should hold {wanted}"
        )


def open_source(config: DataConfig) -> Source:
    """Finds the data and checks split and columns, so that a mistake shows before anything is read.

    Raises UserError: nothing at that path, unknown split, missing column, unreadable file.
    """
    if config.path in BUILT_IN:
        return _open_built_in(config)
    local = Path(config.path).expanduser()
    if local.is_file():
        _check_split(config, ["train"])
        return _open_files(config, [str(local)], local.parent)
    if is_saved(local):
        return _open_saved(config, local)
    if local.is_dir():
        found = _find_in_folder(config, local)
        if found.left_out or found.elsewhere:
            log.log(
                logging.WARNING if found.left_out else logging.INFO, "%s", _chosen(config, found)
            )
        return _open_files(config, found.files, local, len(found.left_out))
    if (
        config.path.startswith((".", "/", "~"))
        or config.path.count("/") > 1
        or suffix_of(config.path) in SUFFIXES
    ):
        raise UserError(
            f"no data at {config.path!r}; expected a file, a folder, a hub name, or {_names(BUILT_IN)}"
        )
    return _open_files(config, find_files(config), None)


# --- built-in -------------------------------------------------------------------------------------


def _open_built_in(config: DataConfig) -> Source:
    _check_split(config, ["train"])
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


def _open_files(
    config: DataConfig, files: list[str], base: Path | None, left_out: int = 0
) -> Source:
    """``files`` are paths or fsspec URLs in reading order; ``base`` is the folder of local ones,
    None on the hub.
    """
    unknown = [file for file in files if suffix_of(file) not in SUFFIXES]
    if unknown:
        raise UserError(f"cannot read {unknown[0]}: expected a file of type {_names(SUFFIXES)}")
    columns = next(filter(None, map(read_columns, files)), [])  # of the first file with rows

    def read(fields: list[str]) -> Iterator[Mapping[str, Any]]:
        for file in files:
            yield from read_rows(file, _fields_in(file, fields, config))

    def stamp() -> str:
        if base is not None:
            return _stamp_of_files([Path(file) for file in files], base)
        commit = _COMMIT.search(files[0])
        return f"hub:{config.path}@{commit[1] if commit else config.revision or 'main'}"

    return Source(config, columns, read, stamp, config.id_field, left_out)


def _fields_in(file: str, fields: list[str], config: DataConfig) -> list[str]:
    """Without the column of tools where nobody asked for it and this file has none; JSON objects
    have any, perhaps None.
    """
    if _TOOLS not in fields or not config.looks_for_tools or suffix_of(file) in JSON_SUFFIXES:
        return fields
    columns = read_columns(file)
    return [field for field in fields if field != _TOOLS or field in columns]


def find_files(config: DataConfig) -> list[str]:
    """The files of ``config.split``, in reading order: of a file, a folder, or a hub data set."""
    local = Path(config.path).expanduser()
    if local.is_file():
        return [str(local)]
    if local.is_dir():
        return _find_in_folder(config, local).files
    splits = _ask_datasets(config, config.path, None)
    _check_split(config, list(splits))
    return splits[config.split]


class _Found(NamedTuple):
    """What a folder has for a split; ``left_out`` are its data files that are in no split,
    ``elsewhere`` other splits.
    """

    files: list[str]
    listed: int
    left_out: list[str]
    elsewhere: list[str]


def _find_in_folder(config: DataConfig, folder: Path) -> _Found:
    """The files of one split by the rules of ``datasets`` (names, subfolders, card), or all of
    them for ``ALL``.
    """
    listed = _data_files(folder)
    everything = f"data.split={ALL} reads all {len(listed)} data files of the folder"
    try:
        splits = _splits_of_folder(config, folder)
    except UserError as error:
        if not listed:
            raise
        if config.split != ALL:
            raise UserError(f"{error}; {everything}") from error
        splits = {}
    if config.split == ALL and ALL not in splits and listed:
        return _Found([str(folder.resolve() / name) for name in listed], len(listed), [], [])
    if config.split not in splits and listed:
        raise UserError(f"{_no_such_split(config, list(splits))}; {everything}")
    _check_split(config, list(splits))
    base = folder.resolve()
    used = {os.path.relpath(file, base) for files in splits.values() for file in files}
    left_out = [name for name in listed if name not in used]
    elsewhere = [split for split in splits if split != config.split]
    return _Found(splits[config.split], len(listed), left_out, elsewhere)


def _chosen(config: DataConfig, found: _Found) -> str:
    """How many of which files are read and which are not, and how to read all."""
    line = f"{config.path}: reading {len(found.files)} of {found.listed} data files, split {config.split!r}"
    if found.elsewhere:
        line += f" (other splits: {_names(found.elsewhere)})"
    if not found.left_out:
        return line
    more = f" and {len(found.left_out) - _SHOWN} more" if len(found.left_out) > _SHOWN else ""
    return (
        f"{line}; left out, since the rules of `datasets` for names and file types put them into no split: "
        f"{', '.join(found.left_out[:_SHOWN])}{more}; data.split={ALL} reads every file of the folder"
    )


def _data_files(folder: Path) -> list[str]:
    """The data files below ``folder``, relative to it, sorted; hidden ones and what describes a
    data set are none.
    """
    found: list[str] = []
    base = os.path.realpath(folder)
    entered: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith((".", "__")))
        folders[:] = []
        for name in visible:
            path = os.path.join(here, name)
            real = os.path.realpath(path)
            if os.path.islink(path):
                # It may lead back to where it lies, and what lies in the folder is found without
                # it.
                if real in entered or os.path.commonpath((real, base)) in (real, base):
                    continue
                entered.add(real)
            folders.append(name)
        data = (
            name
            for name in files
            if suffix_of(name) in SUFFIXES and name not in _NOT_DATA and name[0] != "."
        )
        found.extend(os.path.relpath(os.path.join(here, name), folder) for name in data)
    return sorted(found)


def _splits_of_folder(config: DataConfig, folder: Path) -> dict[str, list[str]]:
    """What ``datasets`` makes of a folder.

    It takes names with ``*``, ``?``, ``[`` or ``::`` for patterns and reads other folders by them. So where there are any,
    it is shown a folder of empty files with plain names instead: its rules are about names alone.
    """
    base = folder.resolve()
    paths = [
        os.path.join(here, name)
        for here, folders, files in os.walk(base)
        for name in (*folders, *files)
    ]
    script = base.suffix == ".py"  # a folder that passes for one
    with tempfile.TemporaryDirectory() as temporary:
        if not script and not any(_PATTERN.search(path) for path in (str(base), *paths)):
            return _ask_datasets(config, str(base), temporary)
        mirror = Path(temporary).resolve() / "data"
        original: dict[str, str] = {}
        for path in sorted(paths):
            if not os.path.isfile(path):
                continue
            plain = mirror / _plain(os.path.relpath(path, base))
            while str(plain) in original:
                plain = plain.with_name(f"{plain.stem}x{plain.suffix}")
            original[str(plain)] = path
            plain.parent.mkdir(parents=True, exist_ok=True)
            if plain.name in _CARDS:
                shutil.copyfile(path, plain)
            else:
                plain.touch()
        splits = _ask_datasets(config, str(mirror), temporary)
    return {split: [original[file] for file in files] for split, files in splits.items()}


def _plain(name: str) -> str:
    """``name`` without special characters; a letter for each, since for the rules they are no
    borders of words.
    """
    return re.sub(r"[\[\]?*:]", "x", name)


def _ask_datasets(config: DataConfig, where: str, cache: str | None) -> dict[str, list[str]]:
    """The files of every split of a folder or a hub data set, as ``datasets`` sees them, each once.

    ``cache``: the folder that it makes its own in, which names need no cache for; None for the
    user's.
    """
    with _quiet_datasets():
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(
                where, name=config.name, revision=config.revision, cache_dir=cache
            )
        except Exception as error:  # not found, no such configuration, gated, offline, ...
            what = one_line_and_kind(error).replace(where, config.path)
            if cannot_write(error):
                what += "; set HF_HOME to a folder that can be written and has room"
            raise UserError(f"cannot open data set {config.path!r}: {what}") from error
    # A name may match several patterns of one split.
    return {
        str(split): list(dict.fromkeys(str(file) for file in files))
        for split, files in (builder.config.data_files or {}).items()
    }


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` has written it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _open_saved(config: DataConfig, folder: Path) -> Source:
    """A folder written by ``save_to_disk``: already Arrow, so it is memory-mapped."""
    if "::" in str(folder.resolve()):
        raise UserError(
            f"cannot open data set {config.path!r}: `datasets` takes '::' in the path of a saved data set for a chain of "
            "file systems; rename the folder"
        )
    from datasets import DatasetDict, load_from_disk

    with _quiet_datasets():
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:
            raise UserError(
                f"cannot open data set {config.path!r}: {one_line_and_kind(error)}"
            ) from error
    if isinstance(saved, DatasetDict):
        _check_split(config, list(saved))
        saved = saved[config.split]
    elif saved.split is not None:
        _check_split(config, [str(saved.split)])
    # Tensors or frames of some of its columns, if that is how it was used last.
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


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silences progress bars and warnings of ``datasets`` and the hub client; what goes wrong
    becomes our one line.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars_were_off, level = are_progress_bars_disabled(), logging.root.manager.disable
    disable_progress_bars()
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)
        if not bars_were_off:
            enable_progress_bars()


# --- checks ---------------------------------------------------------------------------------------


def _check_split(config: DataConfig, splits: list[str]) -> None:
    if config.split not in splits:
        raise UserError(_no_such_split(config, splits))


def _no_such_split(config: DataConfig, splits: list[str]) -> str:
    hint = _nearest(config.split, splits)
    return (
        f"data set {config.path!r} has no split {config.split!r}; expected {_names(splits)}{hint}"
    )


def _check_field(path: str, columns: list[str], field: str, setting: str) -> None:
    if field in columns:
        return
    if not columns:
        raise UserError(f"empty data set: {path} has no rows")
    hint = _nearest(field, columns)
    chats = [column for column in _CHAT_COLUMNS if column in columns]
    if setting == "text_field" and not hint and chats:
        hint = f"; if {chats[0]!r} holds chats, set data.messages_field={chats[0]}"
    raise UserError(
        f"data set {path!r} has no column {field!r} (data.{setting}); it has {', '.join(columns)}{hint}"
    )


def _nearest(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _names(known: Any) -> str:
    return ", ".join(sorted(known)) or "one (it has none)"
