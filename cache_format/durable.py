"""Files that survive a crash: written to a temporary file, flushed, renamed. Also reads state
files, which may be damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from logitcask.cache_format.errors import UserError

RESTART = "start afresh with --restart"
"""What a message advises where the state of a build is of no use: the option of ``teacher-cache
build``.
"""


State = TypeVar("State", bound=BaseModel)


def load_state(model: type[State], file: Path, afresh: str = RESTART) -> State:
    """Reads a file of ``.build``. Raises UserError with the advice ``afresh`` if this version did
    not write it.
    """
    try:
        return model.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} was not written by this version of logitcask; {afresh}") from error


def write_durably(file: Path, content: str | bytes, *, scratch: Path | None = None) -> None:
    """Writes a temporary file, fsync, rename, fsync of the folder. After a crash ``file`` is either
    complete or unchanged.
    """
    temporary = (scratch or file.parent) / f"{file.name}.tmp"
    with open(temporary, "wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
    sync(file.parent)


def permit_as_umask(folder: Path) -> None:
    """Gives the files in ``folder`` the permissions of ordinary new files, as the umask says.

    Libraries that write to a temporary file and rename it leave a file for its owner only.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            wanted = 0o666 & ~mask
            if file.stat().st_mode & 0o777 == 0o600 != wanted:
                file.chmod(wanted)


def sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to disk. Windows cannot open folders, so
    nothing happens for them there.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into a one-line error with the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}; make room or permit it, then run the same command again: "
            "finished shards are kept"
        ) from error
