"""The student before training: some layers of a model, a model as it is, or random weights from a config."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cache_format.errors import ConfigError, UserError, first_line
from cache_format.places import local_model, models_dir, refuse_adapters
from cache_format.tokenizers import usable_tokenizer
from train.config import StudentConfig

log = logging.getLogger(__name__)


_LAYER = re.compile(r"^(?P<before>(?:.*\.)?(?:layers|h|blocks)\.)(?P<index>\d+)(?P<after>\..*)$")
"""Where transformers' decoders keep a layer's number in the names of its weights."""


def build_student(config: StudentConfig, seed: int) -> PreTrainedModel:
    """The untrained student, in ``config.dtype``, on the CPU.

    Raises UserError where its model is not to be had, ConfigError where keep_layers, config or attention do not fit.
    """
    student = _base(config, seed)
    if config.attention is not None:
        if "flash" in config.attention and config.dtype == "float32":
            raise ConfigError(
                f"student.attention is {config.attention!r}, which does not compute in float32; set student.dtype to bfloat16"
            )
        try:
            student.set_attn_implementation(config.attention)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(f"student.attention is {config.attention!r}: {first_line(error)}") from error
    return student if config.peft is None else _with_adapters(student, config.peft, seed)


def _base(config: StudentConfig, seed: int) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    if config.config is not None:
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(_student_config(config.config), dtype=dtype)
        except ConfigError:
            raise
        except Exception as error:  # whatever an architecture makes of sizes that do not go together
            raise ConfigError(f"student.config describes no causal language model: {first_line(error)}") from error
    name = config.model or config.init_from
    assert name is not None
    folder = find_model(name, config.revision)
    refuse_adapters(name, folder)
    if config.model is not None or config.keep_layers is None:
        return _whole(folder, dtype)
    return _from_layers(folder, config.keep_layers, dtype)


def _with_adapters(student: PreTrainedModel, fields: dict[str, Any], seed: int) -> PreTrainedModel:
    try:
        from peft import get_peft_config, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UserError(
            f"student.peft needs the package peft, which cannot be imported ({_line(error)}); pip install 'logitcask[peft]'"
        ) from error

    torch.manual_seed(seed)
    try:
        adapters = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", **fields})
        if adapters.is_prompt_learning:
            raise ConfigError(
                f"student.peft: {fields['peft_type']} learns a prompt, which no saved student has; use LORA"
            )
        adapted = get_peft_model(student, adapters)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"student.peft does not describe adapters for {type(student).__name__}: {first_line(error)}"
        ) from error
    _try_merging(adapted)
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    if student.config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ConfigError(
            "student.peft adapts the embedding or the lm_head of a student in which they are one weight, so merging would change "
            "both; leave them out of target_modules, or name them in modules_to_save"
        )
    return adapted


def _try_merging(student: Any) -> None:
    """Merges copies of the adapted layers, one of each kind. Raises ConfigError where that cannot be done."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = student.active_peft_config.peft_type.value
    if not hasattr(student, "merge_and_unload"):
        raise ConfigError(f"student.peft: adapters of the kind {kind} cannot be merged into the student; use LORA")
    seen = set()
    for layer in student.modules():
        if isinstance(layer, BaseTunerLayer) and (key := (type(layer), type(layer.get_base_layer()))) not in seen:
            seen.add(key)
            try:
                copy.deepcopy(layer).merge()
            except Exception as error:  # every kind of adapter refuses in its own way
                raise ConfigError(
                    f"student.peft: these adapters cannot be merged into the student ({type(error).__name__}: "
                    f"{first_line(error)}), which is how it is saved; change them, or use LORA"
                ) from error


def load_student_tokenizer(config: StudentConfig) -> PreTrainedTokenizerBase | None:
    """The student's own tokenizer, or None for a student from scratch that names none."""
    name = config.tokenizer or config.model or config.init_from
    if name is None:
        return None
    try:
        folder = find_model(name, None if config.tokenizer else config.revision)
        return usable_tokenizer(
            name, AutoTokenizer.from_pretrained(folder), lambda: PreTrainedTokenizerFast.from_pretrained(folder)
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)}); set student.tokenizer"
        ) from error


def find_model(name: str, revision: str | None) -> Path:
    """The folder of a model: a path, a name under the local models folder, or a hub name fetched to the hub's cache."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if (folder := local_model(name)) is not None:
        return folder
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.gguf", "*.pth", "*.onnx"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"there is no model {name!r}: not a folder, not under {models_dir()}/, and not to be had from the hub "
            f"({first_line(error)}). A built-in one is fetched by `teacher-cache model NAME`"
        ) from error


def _student_config(fields: dict[str, object]) -> PretrainedConfig:
    try:
        config = AutoConfig.for_model(**fields)
        known = AutoConfig.for_model(fields["model_type"])
    except Exception as error:  # every config class validates its fields in its own way
        raise ConfigError(
            f"student.config does not describe a transformers model ({first_line(error)}); it needs model_type and that "
            "model's own fields"
        ) from error
    # rope_theta stands inside rope_parameters nowadays; transformers still takes it by itself.
    unknown = [name for name in fields if name != "rope_theta" and not hasattr(known, name)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known.to_dict(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"student.config: {type(known).__name__} has no field {unknown[0]!r}{hint}")
    return config


def _whole(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a causal language model that transformers can load: {first_line(error)}"
        ) from error
    if loading["missing_keys"]:
        raise UserError(
            f"{folder} has no weights for {sorted(loading['missing_keys'])[0]} ({len(loading['missing_keys'])} missing in all), "
            "and random ones are hardly meant; give a whole causal language model"
        )
    return model


def _from_layers(folder: Path, keep: list[int], dtype: torch.dtype) -> PreTrainedModel:
    """A model with some of the layers of the one in ``folder``; the weights of all others are never read."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no config.json that transformers can read: {first_line(error)}") from error
    layers = config.num_hidden_layers
    if not keep or len(set(keep)) < len(keep) or not all(0 <= layer < layers for layer in keep):
        raise ConfigError(f"student.keep_layers is {keep}; expected distinct numbers from 0 to {layers - 1}")
    config.num_hidden_layers = len(keep)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # layer_types and the like
            setattr(config, name, [value[layer] for layer in keep])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    new_number = {old: new for new, old in enumerate(keep)}
    state = model.state_dict()
    unset = set(state)
    for file, names in _weight_files(folder).items():
        with safe_open(file, framework="pt") as weights:
            for name in names:
                found = _LAYER.match(name)
                if found and int(found["index"]) not in new_number:
                    continue
                new = name if found is None else f"{found['before']}{new_number[int(found['index'])]}{found['after']}"
                if new in state:
                    state[new].copy_(weights.get_tensor(name))
                    unset.discard(new)
    model.tie_weights()
    tied = {
        name
        for name in unset
        if any(state[name].data_ptr() == state[other].data_ptr() for other in state.keys() - unset)
    }
    if unset - tied:
        raise UserError(
            f"{folder} does not hold {sorted(unset - tied)[0]} where this expects it; keep_layers knows decoders whose "
            "layers are named layers.N, h.N or blocks.N: give such a model, or use student.model"
        )
    return model


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model folder and the names of the tensors in each."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files: dict[Path, list[str]] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(folder / file, []).append(name)
        return files
    file = folder / "model.safetensors"
    if not file.exists():
        raise UserError(f"{folder} has no safetensors weights; save the model with save_pretrained first")
    with safe_open(file, framework="pt") as weights:
        return {file: list(weights.keys())}
