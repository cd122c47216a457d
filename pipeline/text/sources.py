"""From ``data.path`` to rows: where the text comes from, read as a stream.

A name in ``BUILT_IN`` needs no file. Everything else is named as for ``datasets.load_dataset``: a file, a folder, a hub
name. ``datasets`` finds the files of a split; ``logitcask.pipeline.text.file_formats`` reads them, for three reasons:

* its streaming Parquet reader may abort the process at exit when reading stops early, as it does at ``max_tokens``
  (https://github.com/huggingface/datasets/issues/7566);
* its JSON reader infers types from the first 10 MB and fails later in the file when an unrelated column changes type;
* without streaming it would write the whole data set a second time, as Arrow, although a plan reads it only once.
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
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from logitcask.cache_format.cli.models_folder import cannot_write
from logitcask.cache_format.errors import LogitcaskError, UserError, one_line_and_kind
from logitcask.pipeline.config import DataConfig
from logitcask.pipeline.text.file_formats import JSON_SUFFIXES, SUFFIXES, read_columns, read_rows, suffix_of

log = logging.getLogger(__name__)

ALL = "all"
"""The split of a folder that holds every data file below it, whatever its name; a split of that name goes first."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")
_TOOLS = "tools"  # the column read beside chats unasked
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
_MIN_DOCUMENT = 256  # characters; shorter sections are little more than their heading
_HEADING = re.compile(r"^\S.*\n([*=\-~^\"'#+])\1{2,} *$", re.MULTILINE)
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_SHOWN = 5  # names in a message
_PATTERN = re.compile(r"[\[\]?*]|::")  # what `datasets` and fsspec do not take literally in a path
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # where a folder may name its splits
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


class _Skipped(Exception):
    """Why a row cannot be used; a key of ``Source.counters``."""


class Source:
    """The rows of one split, in a fixed order. Iterating starts from the first row every time.

    ``row_id`` is the value of ``data.id_field``, else ``split/index``, where ``index`` counts all rows of the split,
    used or not, so that ids stay what they are when a bad row is repaired.

    ``counters`` describes the latest iteration: ``rows_read``, ``rows_skipped_REASON`` for rows that hold no text, and
    ``files_left_out`` for data files of the folder that are in no split.
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
        setting = next((name for name in ("messages_field", "prompt_field") if getattr(config, name)), "text_field")
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
        """A cheap identity of the data: different where the data changed. Reads names and sizes, never rows.

        Built-in: sha256 of its documents. Files: sha256 of their names, sizes and times of change. Hub: the commit.
        """
        return self._stamp()

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError where the data cannot be read, an id is missing or occurs twice, or no row can be used."""
        self._counters = Counter(rows_read=0)
        if self._files_left_out:
            self._counters["files_left_out"] = self._files_left_out
        seen: set[int] = set()  # 8 bytes of hash per row: two ids of 10 million collide with probability 3e-6
        used = 0
        for index, record in enumerate(self._records()):
            self._counters["rows_read"] += 1
            row_id = f"{self._config.split}/{index}"
            if self._id_field is not None:
                row_id = self._unique_id(record[self._id_field], row_id, seen)
            try:
                row = self._row(row_id, record)
            except _Skipped as reason:
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
            raise UserError(f"cannot read {self._config.path}: {one_line_and_kind(error)}") from error

    def _unique_id(self, value: object, place: str, seen: set[int]) -> str:
        if value is None:
            raise UserError(f"row {place} of {self._config.path} has no {self._id_field!r}; every row needs an id")
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
            raise _Skipped("null")
        tools = None if self._tools_field is None else _tools(record.get(self._tools_field))
        if self._chats:
            marked = _messages(value)
            unlearnt = frozenset(index for index, (_, learnt) in enumerate(marked) if not learnt)
            return Row(row_id, None, [message for message, _ in marked], tools, unlearnt)
        if not isinstance(value, str):
            raise _Skipped("not_a_string")
        if not value.strip():
            raise _Skipped("empty")
        _check_unicode(value)
        return Row(row_id, value, None, tools)

    def _nothing_found(self) -> str:
        place = f"empty data set: {self._config.path}, split {self._config.split}"
        prefix = "rows_skipped_"
        skipped = [f"{n} {why.removeprefix(prefix)}" for why, n in self._counters.items() if why.startswith(prefix)]
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
        wanted = f"chats ({', '.join(ROLES)} messages with role and content)" if self._chats else "non-empty strings"
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
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return _open_saved(config, local)
    if local.is_dir():
        found = _find_in_folder(config, local)
        if found.left_out or found.elsewhere:
            log.log(logging.WARNING if found.left_out else logging.INFO, "%s", _chosen(config, found))
        return _open_files(config, found.files, local, len(found.left_out))
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or suffix_of(config.path) in SUFFIXES:
        raise UserError(f"no data at {config.path!r}; expected a file, a folder, a hub name, or {_names(BUILT_IN)}")
    return _open_files(config, find_files(config), None)


# --- built-in -----------------------------------------------------------------------------------------------------


@cache
def _python_docs() -> tuple[tuple[str, str], ...]:
    """(id, text): the language reference that ships with Python (PSF licence, about 465 kB), one document per section.

    In the order of sha256(id), so that any prefix is a fair sample. The text belongs to the Python version; the stamp
    tells versions apart.
    """
    from pydoc_data.topics import topics

    documents = [
        (f"topics/{topic}#{number}", text)
        for topic, page in topics.items()
        for number, text in enumerate(_sections(page))
    ]
    return tuple(sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()))


def _sections(page: str) -> list[str]:
    """Cuts a page before each underlined heading; what is below ``_MIN_DOCUMENT`` joins the next, or the last one."""
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


def _open_built_in(config: DataConfig) -> Source:
    _check_split(config, ["train"])
    documents = BUILT_IN[config.path]

    def read(fields: list[str]) -> Iterator[dict[str, str]]:
        return ({"id": name, "text": text, "title": text.partition("\n")[0]} for name, text in documents())

    def stamp() -> str:
        return f"built-in:{hashlib.sha256(json.dumps(documents()).encode()).hexdigest()}"

    return Source(config, ["id", "text", "title"], read, stamp, config.id_field or "id")


# --- files, local and on the hub ----------------------------------------------------------------------------------


def _open_files(config: DataConfig, files: list[str], base: Path | None, left_out: int = 0) -> Source:
    """``files`` are paths or fsspec URLs in reading order; ``base`` is the folder of local ones, None on the hub."""
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
    """Without the column of tools where nobody asked for it and this file has none; JSON objects have any, perhaps None."""
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
    """What a folder has for a split; ``left_out`` are its data files that are in no split, ``elsewhere`` other splits."""

    files: list[str]
    listed: int
    left_out: list[str]
    elsewhere: list[str]


def _find_in_folder(config: DataConfig, folder: Path) -> _Found:
    """The files of one split by the rules of ``datasets`` (names, subfolders, card), or all of them for ``ALL``."""
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
    """The data files below ``folder``, relative to it, sorted; hidden ones and what describes a data set are none."""
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
                # It may lead back to where it lies, and what lies in the folder is found without it.
                if real in entered or os.path.commonpath((real, base)) in (real, base):
                    continue
                entered.add(real)
            folders.append(name)
        data = (name for name in files if suffix_of(name) in SUFFIXES and name not in _NOT_DATA and name[0] != ".")
        found.extend(os.path.relpath(os.path.join(here, name), folder) for name in data)
    return sorted(found)


def _splits_of_folder(config: DataConfig, folder: Path) -> dict[str, list[str]]:
    """What ``datasets`` makes of a folder.

    It takes names with ``*``, ``?``, ``[`` or ``::`` for patterns and reads other folders by them. So where there are any,
    it is shown a folder of empty files with plain names instead: its rules are about names alone.
    """
    base = folder.resolve()
    paths = [os.path.join(here, name) for here, folders, files in os.walk(base) for name in (*folders, *files)]
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
    """``name`` without special characters; a letter for each, since for the rules they are no borders of words."""
    return re.sub(r"[\[\]?*:]", "x", name)


def _ask_datasets(config: DataConfig, where: str, cache: str | None) -> dict[str, list[str]]:
    """The files of every split of a folder or a hub data set, as ``datasets`` sees them, each once.

    ``cache``: the folder that it makes its own in, which names need no cache for; None for the user's.
    """
    with _quiet_datasets():
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(where, name=config.name, revision=config.revision, cache_dir=cache)
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
            raise UserError(f"cannot open data set {config.path!r}: {one_line_and_kind(error)}") from error
    if isinstance(saved, DatasetDict):
        _check_split(config, list(saved))
        saved = saved[config.split]
    elif saved.split is not None:
        _check_split(config, [str(saved.split)])
    saved = saved.with_format(None)  # tensors or frames of some of its columns, if that is how it was used last

    def read(fields: list[str]) -> Iterator[Mapping[str, Any]]:
        return iter(saved.select_columns([field for field in fields if field in saved.column_names]))

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
    """Silences progress bars and warnings of ``datasets`` and the hub client; what goes wrong becomes our one line."""
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


# --- checks -------------------------------------------------------------------------------------------------------


def _messages(value: object) -> list[tuple[dict[str, Any], bool]]:
    """A chat as a template takes it, and whether each message may be learnt: ``content`` is one string, or None beside
    tool calls, whose arguments are objects.

    Arrow fills keys that other messages, calls or parts have with None; those are taken out again at every depth, in all
    formats, so that a chat is the same whichever file it was in.

    A string is read as JSON: that is how a chat fits into a CSV column, and how ``datasets`` stores uneven structures.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise _Skipped("not_a_chat")
        if not value:
            raise _Skipped("empty")
        return [_message(message) for message in value]
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        raise _Skipped("not_a_chat") from None


def _message(filled: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    message = {_unfilled(key): _unfilled(item) for key, item in filled.items() if item is not None or key == "content"}
    learnt = [_is_learnt(mark, message.pop(mark)) for mark in _MARKS if mark in message]
    content = message.get("content")
    calls = bool(message.get("tool_calls"))
    if "role" not in message and {"from", "value"} <= message.keys():
        raise _Skipped("sharegpt")
    if "function_call" in message:  # what OpenAI had before tool_calls; no template renders it
        raise _Skipped("function_call")
    if "role" not in message or not ("content" in message or calls):
        raise _Skipped("not_a_chat")
    if message["role"] not in ROLES:
        raise _Skipped("unknown_role")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and not calls:
        raise _Skipped("null_content")
    if content is not None and not isinstance(content, str):
        raise _Skipped("content_not_text")
    if calls:
        message["tool_calls"] = _calls(message["tool_calls"])
    else:  # some templates ask only whether the key is there
        message.pop("tool_calls", None)
    return {**message, "content": content}, all(learnt)


_MARKS = {"weight": False, "train": False, "training": False, "mask": True, "masked": True}
"""Keys of a message that say whether it is learnt, and the value that says it is not: those of OpenAI and axolotl."""


def _is_learnt(mark: str, value: object) -> bool:
    """Raises _Skipped for a value that is neither yes nor no: half a weight has no meaning here."""
    if value not in (0, 1):
        raise _Skipped(f"{mark}_not_0_or_1")
    return bool(value) is not _MARKS[mark]


def _calls(calls: object) -> list[Any]:
    """Calls with their arguments as objects, which OpenAI's API has as JSON text. Empty text: no arguments.

    Raises _Skipped for text that is not a JSON object: templates would quote it once more.
    """
    if not isinstance(calls, list):
        raise _Skipped("not_a_chat")
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
        raise _Skipped("arguments_not_json")
    unfilled: dict[str, Any] = _unfilled(arguments)
    return unfilled


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _tools(value: object) -> list[dict[str, Any]] | None:
    """Tool definitions as a template takes them; None for none. The list, or each of its elements, may be JSON text.

    Without keys that hold None, as in messages: Arrow gives each tool the parameters of all.
    """
    try:
        tools = json.loads(value.strip() or "null") if isinstance(value, str) else value
        if tools is None or tools == []:
            return None
        if isinstance(tools, list):
            tools = [_unfilled(json.loads(tool) if isinstance(tool, str) else tool) for tool in tools]
    except (ValueError, RecursionError):
        raise _Skipped("not_tools") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise _Skipped("not_tools")
    return tools


def _is_text(part: object) -> bool:
    """Whether it is a text part of a content list, as OpenAI's API has them."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _unfilled(value: Any) -> Any:
    """Without the keys that hold None. Raises _Skipped where a string of it is no Unicode text: any may be rendered."""
    if isinstance(value, dict):
        return {_unfilled(key): _unfilled(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_unfilled(item) for item in value]
    if isinstance(value, str):
        _check_unicode(value)
    return value


def _check_unicode(text: str) -> None:
    """Half an emoji (``"\\ud83d"`` in JSON) is a Python string, but no Unicode text; tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Skipped("broken_unicode") from None


def _check_split(config: DataConfig, splits: list[str]) -> None:
    if config.split not in splits:
        raise UserError(_no_such_split(config, splits))


def _no_such_split(config: DataConfig, splits: list[str]) -> str:
    hint = _nearest(config.split, splits)
    return f"data set {config.path!r} has no split {config.split!r}; expected {_names(splits)}{hint}"


def _check_field(path: str, columns: list[str], field: str, setting: str) -> None:
    if field in columns:
        return
    if not columns:
        raise UserError(f"empty data set: {path} has no rows")
    hint = _nearest(field, columns)
    chats = [column for column in _CHAT_COLUMNS if column in columns]
    if setting == "text_field" and not hint and chats:
        hint = f"; if {chats[0]!r} holds chats, set data.messages_field={chats[0]}"
    raise UserError(f"data set {path!r} has no column {field!r} (data.{setting}); it has {', '.join(columns)}{hint}")


def _nearest(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _names(known: Any) -> str:
    return ", ".join(sorted(known)) or "one (it has none)"
