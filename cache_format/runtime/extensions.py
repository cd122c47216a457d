"""Code outside this project that a config names: losses, teacher backends, sources of data.

A config names it as ``MODULE:NAME``, or by the plain name of an entry point of an installed
package. Nothing is imported until ``load`` is called, and only names from a user's own config are
ever given to it: a name in the manifest of a cache is never loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from logitcask.cache_format.errors import ConfigError, LogitcaskError, UserError, one_line_and_kind

_T = TypeVar("_T")

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Kind:
    """A kind of code that a config can name.

    what:  its name in messages.
    group: the group of its entry points.
    shape: the expected form of the named object, for messages.
    """

    what: str
    group: str
    shape: str


LOSS = Kind("loss", "logitcask.losses", "a function under @loss(...)")
TEACHER = Kind("teacher backend", "logitcask.teachers", "a class")
SOURCE = Kind("source of data", "logitcask.sources", "a function or a class")


def is_reference(name: str) -> bool:
    """Whether ``name`` has the form ``MODULE:NAME``."""
    return _REFERENCE.fullmatch(name) is not None


def installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """The entry points of installed packages by name, with all packages that use the name."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=kind.group):
        known = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in known]:
            known.append(entry)
    return found


def is_named(kind: Kind, name: str) -> bool:
    """Whether ``name`` is ``MODULE:NAME`` or an entry point. Nothing is imported."""
    return is_reference(name) or name in installed(kind)


def unknown(kind: Kind, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of ``known`` and none of ``kind``: what is near it, what
    there is, and how to add one.
    """
    names = sorted({*known, *installed(kind)})
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(near)}? There" if near else "; there"
    return (
        f"no {kind.what} is called {name!r}{hint} are {', '.join(names)}; "
        "one of your own is MODULE:NAME (docs/extending.md)"
    )


def load(kind: Kind, name: str) -> Any:
    """The object that ``name`` names: ``MODULE:NAME``, or an entry point.

    The working directory is searched after the installed packages. Raises ConfigError, in one line,
    if the module cannot be imported, if it has no such object, or if another module hides the one
    in the working directory.
    """
    entry = None if is_reference(name) else _entry(kind, name)
    module_name, _, attribute = name.partition(":")
    if entry is not None:
        module_name, attribute = entry.module, entry.attr
    module = _imported(kind, name, module_name)
    if entry is None:
        _check_not_hidden(kind, name, module)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; expected {kind.shape} of that name"
            raise ConfigError(f"{kind.what} {name!r}: {place_of(module)} has no {part!r}{hint}")
        value = getattr(value, part)
    return value


def origin(kind: Kind, name: str) -> str:
    """The package and version that brings the entry point ``name``; empty for other names."""
    for entry in installed(kind).get(name, []):
        package = "" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}, "
        return f"{package}{entry.value}"
    return ""


def code_sha256(value: Any) -> str | None:
    """The sha256 of the file of the module that defines ``value``; None for code without a file,
    such as that of a notebook. Modules that this module imports are not part of it.
    """
    file = getattr(_module_of(value), "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def place_of(module: ModuleType | None) -> str:
    """The module's name and file, for people."""
    if module is None:
        return "an unknown module"
    file = getattr(module, "__file__", None)
    return f"the module {module.__name__}{'' if file is None else f' ({file})'}"


def called(name: str, what: str, defined: Any, call: Callable[[], _T]) -> _T:
    """The result of ``call``, which is other people's code. Any error of it becomes a UserError in
    one line.

    name:    of the code in the config.
    what:    the part of the code that is called, for the message.
    defined: the object of the code, whose file the message names.
    """
    try:
        return call()
    except LogitcaskError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: {what} failed: {failure(error, defined)} (--debug shows the traceback)"
        ) from error


def yielded(name: str, what: str, defined: Any, start: Callable[[], Iterable[_T]]) -> Iterator[_T]:
    """The items of what ``start`` returns, with ``called`` for each of them."""
    items, end = called(name, what, defined, lambda: iter(start())), object()
    while (item := called(name, what, defined, lambda: next(items, end))) is not end:
        yield item  # type: ignore[misc]


def failure(error: BaseException, defined: Any) -> str:
    """An error of other people's code in one line, with the last line that it passed of the file
    that defines the object ``defined``.
    """
    return _with_line(error, getattr(_module_of(defined), "__file__", None))


def _with_line(error: BaseException, file: str | None) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    said = one_line_and_kind(error)
    return f"{said}, at {file}:{lines[-1]}" if lines else said


def _module_of(value: Any) -> ModuleType | None:
    return sys.modules.get(getattr(value, "__module__", ""))


def _entry(kind: Kind, name: str) -> EntryPoint:
    entries = installed(kind)[name]
    if len(entries) > 1:
        raise ConfigError(
            f"{kind.what} {name!r} is in several installed packages: "
            f"{', '.join(entry.value for entry in entries)}; name one of these instead"
        )
    return entries[0]


def _imported(kind: Kind, name: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except LogitcaskError:
        raise
    except (Exception, SystemExit) as error:  # other people's code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ConfigError(
                f"{kind.what} {name!r}: there is no module {missing} in {here} or among the installed packages; "
                "run the command in the folder of the module, or install its package"
            ) from error
        said = _with_line(error, _file_of(module_name))
        raise ConfigError(
            f"{kind.what} {name!r}: the import of {module_name} failed: {said} (--debug shows the traceback)"
        ) from error


def _file_of(module_name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, AttributeError, ValueError):
        return None
    return None if spec is None else spec.origin


def _check_not_hidden(kind: Kind, name: str, module: ModuleType) -> None:
    """Raises ConfigError if the working directory has the module, but another one was imported."""
    top, _, _ = module.__name__.partition(".")
    here = next(
        (path for path in (Path(f"{top}.py"), Path(top, "__init__.py")) if path.is_file()), None
    )
    found = getattr(sys.modules[top], "__file__", None)
    if here is not None and (found is None or not here.samefile(found)):
        raise ConfigError(
            f"{kind.what} {name!r}: {here} in this folder is hidden by {place_of(sys.modules[top])}; give it another name"
        )
