"""A saved model to evaluate: a model's folder or hub name, the folder of a run, or adapters."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache_format.cli.models_folder import ADAPTER_CONFIG
from logitcask.cache_format.errors import UserError, first_line
from logitcask.train.config import StudentConfig
from logitcask.train.model.student import build_student, find_model, load_student_tokenizer

log = logging.getLogger(__name__)

RUN = "run.json"
"""The file that makes a folder that of a run."""
_TOKENIZERS = ("tokenizer*", "tekken.json", "vocab.*", "spiece.model", "*.tiktoken")


def load_saved(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and its tokenizer, on the CPU in float32; None for a model without a tokenizer.

    ``name``: a model (folder, name under models/, hub name), the folder of a run, one of its
    checkpoints, or a folder of adapters. Raises UserError if it is none of these.
    """
    folder = find_model(name, None)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_adapters(name, folder)
    if (folder / RUN).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is the folder of a run that is not finished (no config.json); end the run with train-student, or name one "
            "of its checkpoints"
        )
    config = StudentConfig(model=str(folder))
    return build_student(config, 0), _tokenizer(name, folder)


def run_of(name: str) -> dict[str, Any] | None:
    """run.json of the run whose student, checkpoint or adapters ``name`` is; None for others."""
    folder = Path(name).expanduser()
    for place in (folder, folder.absolute().parent):
        try:
            found = json.loads((place / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        # Other programs may have files of this name.
        if isinstance(found, dict) and {"config", "cache", "before"} <= found.keys():
            return found
    return None


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    if any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return load_student_tokenizer(StudentConfig(model=str(folder)))
    log.warning(
        "%s has no tokenizer, so only the number of its ids is compared with the cache", name
    )
    return None


def _with_adapters(
    name: str, folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model with its adapters: of a run, on the student from which it began; of others, on the
    model that they name.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(
            f"{name} holds adapters, for which the package peft is needed ({first_line(error)}); pip install 'logitcask[peft]'"
        ) from error

    run = run_of(name)
    if run is not None:
        config = StudentConfig.model_validate({**run["config"]["student"], "peft": None})
        base = build_student(config, run["config"]["training"].get("seed", 42))
        tokenizer = load_student_tokenizer(config)
    else:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
        if not named:
            raise UserError(
                f"{name} holds adapters and does not name their model (base_model_name_or_path in {ADAPTER_CONFIG}); merge "
                "them into the model, and name that"
            )
        base, tokenizer = load_saved(named)
    try:
        return PeftModel.from_pretrained(base, str(folder)), tokenizer
    except Exception as error:  # every kind of adapter raises its own error
        raise UserError(
            f"the adapters in {name} do not fit {type(base).__name__} ({type(error).__name__}: {first_line(error)}); merge them "
            "into the model that they were trained on, and name that"
        ) from error
