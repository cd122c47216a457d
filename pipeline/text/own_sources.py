"""Sources of data outside this project, named in ``data.path``: their rows, columns and stamp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.runtime.extensions import (
    SOURCE,
    called,
    code_sha256,
    is_named,
    load,
    yielded,
)
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.python_docs import BUILT_IN


class OwnSource(Protocol):
    """A source outside this project: a function of the config's ``data``, or a class.

    Its result yields the rows of the split, in an order that never changes: mappings from columns
    to values. It is called for every pass over the data. ``data.name``, ``data.split`` and
    ``data.revision`` are for it to use.
    """

    def __call__(self, config: DataConfig, /) -> Iterable[Mapping[str, Any]]: ...


@runtime_checkable
class Stamped(Protocol):
    """Rows with an identity that is cheaper than a pass over them."""

    def stamp(self) -> str:
        """A text that changes if the rows change, such as sizes and times of files."""
        ...


def is_own(config: DataConfig) -> bool:
    """Whether ``data.path`` names a source outside this project. Built-in names and existing files
    and folders take precedence, and such a source takes precedence over data sets of the hub.
    """
    path = config.path
    return path not in BUILT_IN and not Path(path).expanduser().exists() and is_named(SOURCE, path)


def code_of(config: DataConfig) -> str | None:
    """The sha256 of the file of a source outside this project; None for other sources, or for code
    without a file.
    """
    return code_sha256(load(SOURCE, config.path)) if is_own(config) else None


class OwnRows:
    """The rows of the source that ``data.path`` names. Imports its module.

    columns: those of the first row; none if there are no rows.

    Raises UserError, in one line, if the source cannot be imported or fails, and if a row is not a
    mapping.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._source: OwnSource = load(SOURCE, config.path)
        self.columns = [str(column) for column in next(self._rows(), {})]

    def read(self, fields: list[str]) -> Iterator[Mapping[str, Any]]:
        """The ``fields`` of all rows; a missing one is None."""
        return ({field: row.get(field) for field in fields} for row in self._rows())

    def stamp(self) -> str:
        """The source's own stamp, or else the sha256 of all columns that a build may read."""
        opened = self._opened()
        if isinstance(opened, Stamped):
            stamp = called(self._config.path, "stamp", self._source, opened.stamp)
            return f"{self._config.path}:{stamp}"
        config, digest = self._config, hashlib.sha256()
        named = (
            config.text_field or "text",
            config.messages_field,
            config.prompt_field,
            config.completion_field,
        )
        fields = [
            field for field in (*named, config.id_field, config.tools_field or "tools") if field
        ]
        for row in self.read(fields):
            digest.update(json.dumps(list(row.values()), default=str).encode() + b"\n")
        return f"{self._config.path}:{digest.hexdigest()}"

    def _opened(self) -> Iterable[Mapping[str, Any]]:
        result: Iterable[Mapping[str, Any]] = called(
            self._config.path, "the call", self._source, lambda: self._source(self._config)
        )
        return result

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        rows = yielded(self._config.path, "reading", self._source, self._opened)
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{self._config.path}: row {index} is {type(row).__name__}; expected a mapping of columns to values, "
                    "such as {'text': ...}"
                )
            yield row
