"""Every error the project raises on purpose, under one base class.

    LogitcaskError
    ├── UserError            something asked for cannot be done; the message says what to do       exit 2
    │   ├── ConfigError      a config file or an override is wrong
    │   └── CacheError       a cache cannot be used
    │       ├── CacheNotFoundError      no cache there
    │       ├── IncompleteCacheError    its build has not finished
    │       ├── UnsupportedCacheError   written by a newer format, or needs a feature this reader lacks
    │       ├── CacheInUseError         another process is writing it
    │       └── DamagedCacheError       its bytes are not what the manifest says                   exit 1

Messages follow one pattern: what was found, what was expected, what to do.
"""

from __future__ import annotations

import errno

from logitcask.cache_format.redact import redacted


class LogitcaskError(Exception):
    """Base of all errors raised on purpose. A command exits with ``exit_code``."""

    exit_code = 2

    def __str__(self) -> str:
        # Messages name URLs and quote libraries, and go to logs, files and terminals.
        return redacted(super().__str__())


class UserError(LogitcaskError):
    """A request that cannot be fulfilled; the message says what to change."""


class ConfigError(UserError):
    """A config file or an override does not describe a valid run."""


class CacheError(UserError):
    """A cache cannot be used as asked."""


class CacheNotFoundError(CacheError):
    """No cache at that place."""


class IncompleteCacheError(CacheError):
    """An unfinished build at that place: it has no manifest yet."""


class UnsupportedCacheError(CacheError):
    """The cache is of a newer format version, or requires a feature this reader does not have."""


class CacheInUseError(CacheError):
    """Another process is writing to that cache."""


class DamagedCacheError(CacheError):
    """The bytes of the cache contradict its manifest or the specification."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """First line of the error's text, at most 200 characters; its class name if it has no text."""
    text = redacted(str(error)).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """The error's text in one line; its class name if it has no text."""
    return " ".join(redacted(str(error)).split()) or type(error).__name__


def one_line_and_kind(error: BaseException) -> str:
    """``one_line`` and the class name: for errors of libraries, whose text may be unclear."""
    said = " ".join(redacted(str(error)).split())
    return f"{said} ({type(error).__name__})" if said else type(error).__name__


def cannot_write(error: BaseException) -> bool:
    """Whether ``error`` is that of a folder that cannot be written: a full disk, a read-only
    file system, other people's.
    """
    denied = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
    return isinstance(error, OSError) and error.errno in denied
