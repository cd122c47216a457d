"""The fields of a config as Markdown, from the descriptions in its models: docs/config.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def markdown(model: type[BaseModel]) -> str:
    """A table for ``model`` and for each model in its fields, titled by the first path to it."""
    parts = []
    shown: set[type[BaseModel]] = set()
    for path, each in _models(model, ""):
        if each in shown:
            continue
        shown.add(each)
        title = f"### `{path}`\n\n" if path else ""
        rows = [_row(name, field) for name, field in each.model_fields.items()]
        said = " ".join((each.__doc__ or "").split()).replace("``", "`")
        parts.append(
            f"{title}{said}\n\n| field | value | default | |\n| --- | --- | --- | --- |\n"
            + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def _models(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        for kind, many in _inner(field.annotation):
            yield from _models(kind, f"{path}.{name}".lstrip(".") + ("[]" if many else ""))


def _inner(annotation: Any, many: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The models in a type. The second value says whether the model is in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, many
    else:
        for each in get_args(annotation):
            yield from _inner(each, many or get_origin(annotation) in (list, tuple))


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _kind(field.annotation), _default(field), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "below"
    if isinstance(default, list) and default and isinstance(default[0], BaseModel):
        default = [each.model_dump(exclude_defaults=True) for each in default]
    return "" if default is PydanticUndefined else f"`{json.dumps(default)}`"


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(
            f"`{json.dumps(each) if isinstance(each, bool) else each}`" for each in inner
        )
    if origin in (Union, UnionType):
        kinds = [_kind(each) for each in inner if each is not NoneType]
        return " or ".join([*dict.fromkeys(kinds), *(["null"] if NoneType in inner else [])])
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping, see below"
    names = {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true, false",
        "Path": "path",
        "date": "date",
    }
    return names.get(getattr(annotation, "__name__", ""), "mapping")
