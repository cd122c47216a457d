"""The local models folder of both stages: pipeline runs its models, train trains them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from logitcask.cache_format.errors import UserError

BUILT_IN_NAMES = frozenset({"smollm2-135m"})
"""Models that ``teacher-cache model NAME`` makes in the models folder, out of wheels from PyPI."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file of a folder of adapters (PEFT). transformers applies such adapters, vLLM does not."""


def models_dir() -> Path:
    """``$LOGITCASK_MODELS``, or ``models`` in the working directory. It may not exist."""
    return Path(os.environ.get("LOGITCASK_MODELS") or "models")


def local_model(name: str) -> Path | None:
    """The folder of the prepared model of this name, or None. Unfinished folders do not count."""
    folder = models_dir() / name
    return folder if (folder / "config.json").is_file() else None


def refuse_adapters(name: str, folder: Path) -> None:
    """Raises UserError if ``folder`` holds adapters. Messages call the model ``name``."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    beside = " beside a model" if (folder / "config.json").is_file() else ""
    raise UserError(
        f"{name} holds adapters{f' of {base}' if base else ''}{beside} ({ADAPTER_CONFIG}), expected whole weights alone; merge "
        f"them first: peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(NEW), "
        "save the tokenizer there too, and name NEW"
    )
