"""The data files of a split of a file, a folder or a hub data set.

``datasets`` names the files of a split by its rules for names, subfolders and cards. It does not
read the files.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from logitcask.cache_format.errors import UserError, cannot_write, one_line_and_kind
from logitcask.pipeline.config import DataConfig
from logitcask.pipeline.text.file_formats import SUFFIXES, suffix_of

ALL = "all"
"""The split that has every data file below a folder, under any name. A split of the folder's own
with this name takes precedence.
"""

_SHOWN = 5  # names in a message
_PATTERN = re.compile(r"[\[\]?*]|::")  # not literal in a path for `datasets` and fsspec
_CARDS = (
    "README.md",
    ".huggingface.yaml",
    "dataset_infos.json",
)  # files that may name the splits of a folder
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def find_files(config: DataConfig) -> list[str]:
    """The files of ``config.split`` in reading order, from a file, a folder or a hub data set."""
    local = Path(config.path).expanduser()
    if local.is_file():
        return [str(local)]
    if local.is_dir():
        return find_in_folder(config, local).files
    splits = _ask_datasets(config, config.path, None)
    check_split(config, list(splits))
    return splits[config.split]


class Found(NamedTuple):
    """The files of a split in a folder.

    listed:    number of data files in the folder.
    left_out:  data files that are in no split.
    elsewhere: names of the other splits.
    """

    files: list[str]
    listed: int
    left_out: list[str]
    elsewhere: list[str]


def find_in_folder(config: DataConfig, folder: Path) -> Found:
    """The files of one split by the rules of ``datasets`` (names, subfolders, card), or all data
    files for ``ALL``.
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
        return Found([str(folder.resolve() / name) for name in listed], len(listed), [], [])
    if config.split not in splits and listed:
        raise UserError(f"{_no_such_split(config, list(splits))}; {everything}")
    check_split(config, list(splits))
    base = folder.resolve()
    used = {os.path.relpath(file, base) for files in splits.values() for file in files}
    left_out = [name for name in listed if name not in used]
    elsewhere = [split for split in splits if split != config.split]
    return Found(splits[config.split], len(listed), left_out, elsewhere)


def chosen(config: DataConfig, found: Found) -> str:
    """A message: the number of files read, the files left out, and the way to read all."""
    line = f"{config.path}: reading {len(found.files)} of {found.listed} data files, split {config.split!r}"
    if found.elsewhere:
        line += f" (other splits: {names_of(found.elsewhere)})"
    if not found.left_out:
        return line
    more = f" and {len(found.left_out) - _SHOWN} more" if len(found.left_out) > _SHOWN else ""
    return (
        f"{line}; left out, since the rules of `datasets` for names and file types put them into no split: "
        f"{', '.join(found.left_out[:_SHOWN])}{more}; data.split={ALL} reads every file of the folder"
    )


def _data_files(folder: Path) -> list[str]:
    """The data files below ``folder``, as sorted relative paths. Hidden files and files that
    describe a data set do not count.
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
                # Skip a link that was followed before, one to a folder above, which would loop, and
                # one to a folder below, which is walked anyway.
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
    """The files of each split of a folder, by the rules of ``datasets``.

    ``datasets`` reads names with ``*``, ``?``, ``[`` or ``::`` as patterns, which may match other
    folders. If there are such names, it is given a mirror instead: a folder of empty files with
    plain names. Its rules use only names.
    """
    base = folder.resolve()
    paths = [
        os.path.join(here, name)
        for here, folders, files in os.walk(base)
        for name in (*folders, *files)
    ]
    script = base.suffix == ".py"  # `datasets` takes a folder of this name for a script
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
    """``name`` with a letter in place of each special character. The rules of ``datasets`` do not
    treat these characters as the ends of words.
    """
    return re.sub(r"[\[\]?*:]", "x", name)


def _ask_datasets(config: DataConfig, where: str, cache: str | None) -> dict[str, list[str]]:
    """The files of every split of a folder or a hub data set, found by ``datasets``, each once.

    ``cache``: the cache folder for ``datasets``; None for the user's. Finding names stores nothing
    worth keeping there.
    """
    with quiet_datasets():
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
    """Whether ``save_to_disk`` of ``datasets`` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences progress bars and warnings of ``datasets`` and the hub client. The caller reports
    errors in one line.
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


def check_split(config: DataConfig, splits: list[str]) -> None:
    """Raises UserError if the data set has no split ``data.split``."""
    if config.split not in splits:
        raise UserError(_no_such_split(config, splits))


def _no_such_split(config: DataConfig, splits: list[str]) -> str:
    hint = nearest(config.split, splits)
    return (
        f"data set {config.path!r} has no split {config.split!r}; expected {names_of(splits)}{hint}"
    )


def nearest(wrong: str, known: list[str]) -> str:
    """The end of a message: a suggestion of the nearest known name; empty if none is near."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def names_of(known: Iterable[str]) -> str:
    """The names for a message, sorted."""
    return ", ".join(sorted(known)) or "one (it has none)"
