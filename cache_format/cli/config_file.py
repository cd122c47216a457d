"""Config files of both stages: YAML, overrides KEY=VALUE by path, a strict pydantic model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from logitcask.cache_format.errors import ConfigError, first_line

Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], path: Path, overrides: list[str]) -> Model:
    """Reads ``path``, applies overrides such as ``losses[0].weight=2``, and validates.

    Override values are YAML (``null``, ``1e-4``, ``[1, 2]``). Raises ConfigError in one line: the
    place, the value found, the value expected.
    """
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {path}; configs that come along are in */configs/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"{path} is not a config: expected keys and values at the top level")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {override!r} is not of the form KEY=VALUE, such as training.max_steps=10"
            )
        try:
            # Parsed like OmegaConf parses files: 1e-4 is a number (in plain YAML 1.1 it is a
            # string).
            OmegaConf.update(
                config, key, OmegaConf.create(f"value: {value}")["value"], force_add=True
            )
        except (OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"override {override!r} cannot be applied: {first_line(error)}"
            ) from error
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    return _validated(model, values, str(path))


def parse_options(model: type[Model], options: dict[str, Any]) -> Model:
    """A command's options as a model. Raises ConfigError in one line."""
    return _validated(model, options, "options")


def _validated(model: type[Model], values: Any, where: str) -> Model:
    for key, text in _texts(values):
        if "\0" in text:
            raise ConfigError(
                f"{where}: {key} holds a NUL character (found {text!r}), which no name or path can have"
            )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {'; '.join(_explain(model, item) for item in error.errors()[:3])}"
        ) from error


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in ``values``, with its dotted path."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict | list):
        for part, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _texts(value, f"{key}.{part}" if key else str(part))


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
    return f"{where}{': ' if where else ''}{error['msg'].removeprefix('Value error, ')}{found}"


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        # The model in `Model | None`.
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))
