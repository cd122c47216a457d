"""The base class of all configs, and paths in them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """A part of a config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def expanded(path: Path) -> Path:
    """``path`` with ``~`` expanded, so that all readers of a config get the same folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~NOBODY, or no home at all
        raise ValueError(f"{str(error).rstrip('.')}; name the folder without ~") from None


def with_home(name: str) -> str:
    """``name`` unchanged, for the manifest. A wrong ``~`` in it raises ValueError here."""
    expanded(Path(name))
    return name
