"""Files of torch: items of ``full_ids``, ``prompt_len``, ``indices`` and ``values``.

A file is one item, or a list of items. Row r is about the token ``prompt_len + r`` if there is a
row for each token of the answer, and about token r + 1 if there is one for every token. Files are
read with ``weights_only``: nothing in them can run code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, first_line
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.tables import as_numbers

_FIELDS = ("full_ids", "indices", "values")


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source: a file, or all files of a folder by name."""
    for file in files_of(source):
        for number, item in enumerate(_items(load(file, str(file)), file)):
            yield _held(item, f"{file.name}, item {number}")


def files_of(source: Source) -> list[Path]:
    """The layout's files at the path of ``source``. Raises UserError if there are none."""
    place, suffix = Path(source.path).expanduser(), source.layout.suffix
    found = sorted(place.rglob(f"*{suffix}")) if place.is_dir() else [place]
    found = [file for file in found if file.is_file() and file.name.endswith(suffix)]
    if not found:
        raise UserError(
            f"{source.path} is not in the layout {source.layout.name}: expected a file {suffix}, or a folder of them"
        )
    return found


def load(file: Any, name: str) -> Any:
    """The tensors and plain values of a file or buffer. Raises UserError, naming ``name``, for
    content of any other type.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} is no file of torch: {first_line(error)}") from None
    except Exception as error:  # pickle's, whose text is a page about switching the check off
        raise UserError(
            f"{name} holds more than tensors and plain values ({type(error).__name__}), and is not read, since it could run "
            "code; save it again with tensors alone"
        ) from None


def array(value: Any, name: str) -> NDArray[Any]:
    """A tensor or a list of numbers as an array; bfloat16 as float32."""
    import torch

    try:
        tensor = torch.as_tensor(value).detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is no tensor: {first_line(error)}") from None


def _integers(value: Any, name: str) -> NDArray[np.int64]:
    return as_numbers(array(value, name), np.int64, name)


def _items(found: Any, file: Path) -> list[dict[str, Any]]:
    items = found if isinstance(found, list) else [found]
    for item in items:
        if not isinstance(item, dict) or not set(_FIELDS) <= set(item):
            there = (
                ", ".join(map(str, list(item)[:8]))
                if isinstance(item, dict)
                else type(item).__name__
            )
            raise UserError(
                f"{file} is not in the layout torch: expected items of {', '.join(_FIELDS)} and prompt_len, found {there}"
            )
    return items


def _held(item: dict[str, Any], name: str) -> Held:
    tokens = _integers(item["full_ids"], f"{name}: full_ids").reshape(-1)
    ids = _integers(item["indices"], f"{name}: indices")
    values = as_numbers(array(item["values"], f"{name}: values"), np.float64, f"{name}: values")
    given = item.get("prompt_len")
    prompts = _integers(1 if given is None else given, f"{name}: prompt_len").reshape(-1)
    if len(prompts) != 1:
        raise UserError(f"{name} has {len(prompts)} numbers in prompt_len, expected one")
    n, prompt = len(tokens), int(prompts[0]) or 1
    if ids.ndim != 2 or ids.shape != values.shape or not 1 <= prompt <= n:
        raise UserError(
            f"{name} has {n} tokens, a prompt of {prompt}, indices {ids.shape} and values {values.shape}; expected equal "
            "shapes of two dimensions"
        )
    if len(ids) == n - prompt:
        first = prompt - 1
    elif len(ids) in (n - 1, n):
        first, ids, values = 0, ids[: n - 1], values[: n - 1]
    else:
        raise UserError(
            f"{name} has {len(ids)} rows, expected {n - prompt}, one for each token of the answer, or {n - 1}"
        )
    learnt = np.arange(n) >= prompt
    return Held(name, tokens, first, ids, values, learnt)


LAYOUT = Layout(
    name="torch",
    summary=".pt files with items of full_ids, prompt_len, indices, values",
    read=read,
    suffix=".pt",
)
