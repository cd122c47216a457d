"""The student on disk: the save at the end of a run, and the same save tried before its first step.

The trial finds errors that would otherwise appear only after the training: a generation config that
transformers does not save, weights that share memory, adapters that do not merge, a folder without
space or permission.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from logitcask.cache_format.durable import permit_as_umask
from logitcask.cache_format.errors import UserError, first_line
from logitcask.train.model.divergence import check_finite
from logitcask.train.model.student import say_untied
from logitcask.train.output.run_folder import ADAPTER, TRIAL

log = logging.getLogger(__name__)


def save_student(trainer: Trainer, output: Path) -> None:
    """Saves the trained student as an ordinary model, or its adapters before they are merged.

    Raises UserError if a weight is not finite: the student has diverged at its last step.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(
        {name: _largest(weight) for name, weight in student.named_parameters()}, "after training"
    )
    trainer.save_model(str(output / ADAPTER if _has_adapters(student) else output))


def save_merged(trainer: Trainer, output: Path) -> None:
    """Merges the adapters of a student and saves the result as an ordinary model. Does nothing for
    students without adapters.

    Merging changes the student, so it is the last step.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    if _has_adapters(student) and trainer.args.should_save:
        merged = student.merge_and_unload()
        say_untied(merged)  # older versions of peft leave the config as it was
        merged.save_pretrained(output)
        permit_as_umask(output)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(output)


def mend_generation_config(student: PreTrainedModel) -> None:
    """Removes the fields of the student's generation config that transformers loads, ignores, and
    refuses to save.

    Such files are common on the hub (``temperature`` with ``do_sample: false``, ``pad_token_id:
    -1``). One line names the removed fields. Raises UserError if the config still cannot be saved.
    """
    config = getattr(student, "generation_config", None)
    if config is None:
        return
    plain = GenerationConfig()
    removed: dict[str, Any] = {}
    while (fault := _fault(config)) is not None:
        # One line per field if there are several faults; else the first field in the message.
        named = re.findall(r"^- `(\w+)`", fault, re.MULTILINE) or re.findall(r"`(\w+)`", fault)[:1]
        wrong = {
            name: getattr(config, name)
            for name in named
            if hasattr(config, name)
            and (not hasattr(plain, name) or getattr(config, name) != getattr(plain, name))
        }
        if not wrong:
            raise UserError(
                f"transformers does not save the student's generation config ({' '.join(fault.split())}); mend it, or remove it"
            )
        for name in wrong:
            if hasattr(plain, name):
                setattr(config, name, getattr(plain, name))
            else:
                delattr(config, name)
        removed |= wrong
    if removed:
        log.warning(
            "the student is saved without %s of its generation config, which transformers ignores there and does not save",
            ", ".join(f"{name}: {value}" for name, value in removed.items()),
        )


def try_saving(student: Any, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> None:
    """Saves the untrained student in a folder of ``output``, in the same way as the trained one,
    and removes it.

    Raises UserError if the student cannot be saved, and OSError or SafetensorError for errors of
    the disk.
    """
    trial = output / TRIAL
    shutil.rmtree(trial, ignore_errors=True)
    try:
        if _has_adapters(student):
            student.save_pretrained(trial / ADAPTER)
            student.get_base_model().save_pretrained(trial, state_dict=_as_merged(student))
        else:
            student.save_pretrained(trial)
        if tokenizer is not None:
            tokenizer.save_pretrained(trial)
    except (UserError, SafetensorError):
        raise
    except Exception as error:  # models, configs, tokenizers and adapters raise errors of any kind
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"the student could not be saved after training ({type(error).__name__}: {first_line(error)}); "
            "save it once with save_pretrained and train what that gives, or use another student"
        ) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _has_adapters(student: Any) -> bool:
    return hasattr(student, "get_base_model")


def _as_merged(student: Any) -> dict[str, Tensor]:
    """The student's untrained weights under their names after the merge of the adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = student.get_base_model()
    layers = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    state: dict[str, Tensor] = {}
    for name, value in base.state_dict().items():
        adapter = any(
            name.startswith(f"{layer}.") and not name.startswith(f"{layer}.base_layer.")
            for layer in layers
        )
        if not adapter and ".original_module." not in name:
            state[re.sub(r"\.(modules_to_save\.\w+|token_adapter|base_layer)(?=\.)", "", name)] = (
                value
            )
    return state


def _fault(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def _largest(weight: Tensor) -> float:
    """The largest absolute value in this process's part of a weight; nan if it contains nan."""
    part = weight.to_local() if hasattr(weight, "to_local") else weight
    return (
        float(part.detach().abs().max()) if part.numel() and torch.is_floating_point(part) else 0.0
    )
