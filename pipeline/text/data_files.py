"""The data files of a split: of a file, a folder, wildcards, a URL or a hub data set.

``datasets`` names the files of a split by its rules for names, subfolders and cards. It does not
read the files. A folder in a store has the same rules.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec

from logitcask.cache_format.errors import (
    LogitcaskError,
    UserError,
    cannot_write,
    one_line_and_kind,
)
from logitcask.cache_format.storage.files import open_filesystem
from logitcask.pipeline.text.config import DataConfig
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


class Found(NamedTuple):
    """The files of a split, as paths or fsspec URLs in reading order.

    base:      the folder of local files; None for files elsewhere.
    listed:    number of data files in the folder.
    left_out:  data files that are in no split.
    elsewhere: names of the other splits.
    """

    files: list[str]
    base: Path | None = None
    listed: int = 0
    left_out: Iterable[str] = ()
    elsewhere: Iterable[str] = ()


def find_files(config: DataConfig) -> Found:
    """The files of the split, from a file, a folder, a URL, wildcards or a hub data set.

    A path that exists is taken literally, whatever its characters. Raises UserError if there is
    nothing at the path, and for an unknown split.
    """
    if is_url(config.path):
        return _find_at_url(config)
    local = Path(config.path).expanduser()
    if local.is_file():
        check_split(config, ["train"])
        return Found([str(local)], local.parent)
    if local.is_dir():
        return _find_in_folder(config, local)
    if glob.has_magic(config.path):
        files = sorted(filter(os.path.isfile, glob.glob(str(local), recursive=True)))
        return _matched(
            config, files, Path(os.path.commonpath(map(os.path.dirname, files or ["/"])))
        )
    if (
        config.path.startswith((".", "/", "~"))
        or config.path.count("/") > 1
        or suffix_of(config.path) in SUFFIXES
    ):
        raise UserError(f"no data at {config.path!r}; expected {_PLACES}")
    splits = _ask_datasets(config, config.path, None)
    check_split(config, list(splits))
    return Found(splits[config.slice.name])


def is_url(path: str) -> bool:
    return "://" in path


_PLACES = (
    "a file, a folder, a URL, a hub name, a built-in name (python-docs), or MODULE:NAME of a source "
    "of your own (docs/extending.md)"
)


def _matched(config: DataConfig, files: list[str], base: Path | None) -> Found:
    """The files that wildcards name. They are one split, of any name that means all."""
    if not files:
        raise UserError(
            f"no file matches {config.path!r}; `*`, `?` and `[]` are wildcards, since no file or folder has that name"
        )
    check_split(config, ["train", ALL])
    return Found(files, base, len(files))


def _find_at_url(config: DataConfig) -> Found:
    filesystem, root = open_filesystem(config.path)
    web = config.path.startswith(("http://", "https://"))
    wild = "*" in config.path if web else glob.has_magic(root)
    with _reaching(config.path):
        if not web and filesystem.isdir(root):
            return _find_in_remote_folder(config, filesystem, root)
        if not wild or (not web and filesystem.exists(root)):
            if not web and not filesystem.exists(root):
                raise UserError(f"no data at {config.path!r}; expected {_PLACES}")
            check_split(config, ["train"])
            return Found([config.path])
        matched = filesystem.glob(root, detail=True)
    names = sorted(name for name, info in matched.items() if info["type"] == "file")
    return _matched(config, [filesystem.unstrip_protocol(name) for name in names], None)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turns errors of a file system into one line about ``url``."""
    try:
        yield
    except LogitcaskError:
        raise
    except Exception as error:  # drivers raise errors of any type
        raise UserError(
            f"cannot read {url}: {one_line_and_kind(error)}; check the address, the network and your access to it"
        ) from error


def _find_in_remote_folder(
    config: DataConfig, filesystem: fsspec.AbstractFileSystem, root: str
) -> Found:
    """The files of one split of a folder in a store, by the rules for folders here."""
    urls = {
        os.path.relpath(name, root): filesystem.unstrip_protocol(name)
        for name in sorted(filesystem.find(root))
    }

    def splits() -> dict[str, list[str]]:
        with tempfile.TemporaryDirectory() as temporary:
            cards = {
                name: filesystem.cat_file(urls[name])
                for name in urls
                if os.path.basename(name) in _CARDS
            }
            return _splits_of_mirror(config, temporary, urls, cards.get)

    listed = {name: url for name, url in urls.items() if _is_data(name)}
    return _chosen_of(config, listed, None, splits)


def _find_in_folder(config: DataConfig, folder: Path) -> Found:
    base = folder.resolve()
    listed = {name: str(base / name) for name in _data_files(folder)}
    return _chosen_of(config, listed, folder, lambda: _splits_of_folder(config, folder))


def _chosen_of(
    config: DataConfig,
    listed: Mapping[str, str],
    base: Path | None,
    ask: Callable[[], dict[str, list[str]]],
) -> Found:
    """The files of one split by the rules of ``datasets`` (names, subfolders, card), or all data
    files for ``ALL``.

    listed: the data files of the folder, by their names in it. ask: gives the files of each split.
    """
    split = config.slice.name
    everything = f"data.split={ALL} reads all {len(listed)} data files of the folder"
    try:
        splits = ask()
    except UserError as error:
        if not listed:
            raise
        if split != ALL:
            raise UserError(f"{error}; {everything}") from error
        splits = {}
    if split == ALL and ALL not in splits and listed:
        return Found(list(listed.values()), base, len(listed))
    if split not in splits and listed:
        raise UserError(f"{_no_such_split(config, list(splits))}; {everything}")
    check_split(config, list(splits))
    used = {file for files in splits.values() for file in files}
    left_out = [name for name, file in listed.items() if file not in used]
    elsewhere = [each for each in splits if each != split]
    return Found(splits[split], base, len(listed), left_out, elsewhere)


def chosen(config: DataConfig, found: Found) -> str:
    """A message: the number of files read, the files left out, and the way to read all."""
    line = f"{config.path}: reading {len(found.files)} of {found.listed} data files, split {config.split!r}"
    if found.elsewhere:
        line += f" (other splits: {names_of(found.elsewhere)})"
    if not found.left_out:
        return line
    left_out = list(found.left_out)
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return (
        f"{line}; left out, since the rules of `datasets` for names and file types put them into no split: "
        f"{', '.join(left_out[:_SHOWN])}{more}; data.split={ALL} reads every file of the folder"
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
        data = (name for name in files if _is_data(name))
        found.extend(os.path.relpath(os.path.join(here, name), folder) for name in data)
    return sorted(found)


def _is_data(name: str) -> bool:
    """Whether the file ``name`` of a folder, with its path there, holds data by its name."""
    *folders, file = name.split("/")
    hidden = file[0] == "." or any(folder.startswith((".", "__")) for folder in folders)
    return suffix_of(file) in SUFFIXES and file not in _NOT_DATA and not hidden


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
        files = {
            os.path.relpath(path, base): path for path in sorted(paths) if os.path.isfile(path)
        }
        return _splits_of_mirror(
            config, temporary, files, lambda name: Path(files[name]).read_bytes()
        )


def _splits_of_mirror(
    config: DataConfig,
    temporary: str,
    files: Mapping[str, str],
    content: Callable[[str], bytes | None],
) -> dict[str, list[str]]:
    """The files of each split, found in a mirror of the folder below ``temporary``.

    files: the places of the folder's files, by their names in it. content: that of a card.
    """
    mirror = Path(temporary).resolve() / "data"
    original: dict[str, str] = {}
    for name, place in files.items():
        plain = mirror / _plain(name)
        while str(plain) in original:
            plain = plain.with_name(f"{plain.stem}x{plain.suffix}")
        original[str(plain)] = place
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_bytes((content(name) or b"") if plain.name in _CARDS else b"")
    splits = _ask_datasets(config, str(mirror), temporary)
    return {split: [original[file] for file in found] for split, found in splits.items()}


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
    if config.slice.name not in splits:
        raise UserError(_no_such_split(config, splits))


def _no_such_split(config: DataConfig, splits: list[str]) -> str:
    name = config.slice.name
    hint = nearest(name, splits)
    return f"data set {config.path!r} has no split {name!r}; expected {names_of(splits)}{hint}"


def nearest(wrong: str, known: list[str]) -> str:
    """The end of a message: a suggestion of the nearest known name; empty if none is near."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def names_of(known: Iterable[str]) -> str:
    """The names for a message, sorted."""
    return ", ".join(sorted(known)) or "one (it has none)"
