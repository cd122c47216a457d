"""Where prepared models lie on this machine, so that the stage that makes them and the one that trains them agree."""

from __future__ import annotations

import os
from pathlib import Path


def models_dir() -> Path:
    """``$LOGITCASK_MODELS``, or ``models`` in the working directory. May not exist yet."""
    return Path(os.environ.get("LOGITCASK_MODELS") or "models")


def local_model(name: str) -> Path | None:
    """The folder of a model prepared under that name, or None. Folders appear there only when finished."""
    folder = models_dir() / name
    return folder if (folder / "config.json").is_file() else None
