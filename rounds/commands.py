"""The commands of the stages: their configs as far as rounds need them, and changes of these."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from logitcask.cache_format.errors import ConfigError, first_line


def read(path: Path) -> dict[str, Any]:
    """A config of a command, as far as it is needed here. The command checks it."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the file system, of YAML, of OmegaConf
        raise ConfigError(f"{path} cannot be read as a config: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a config: expected keys and values at the top level")
    return {str(name): value for name, value in found.items()}


def plain(config: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """A config in JSON's terms, and the content of a template file as its hash."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=str))
    for name in without:
        found.pop(name, None)
    template = (found.get("data") or {}).get("chat_template")
    if template and Path(template).expanduser().is_file():
        content = Path(template).expanduser().read_bytes()
        found["data"]["chat_template"] = hashlib.sha256(content).hexdigest()
    return found


def overrides(changes: dict[str, Any]) -> list[str]:
    """KEY=VALUE of a command; JSON is YAML of one line."""
    # YAML reads no escapes of two halves, as JSON has them for emoji.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
