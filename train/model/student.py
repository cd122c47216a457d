"""The student before training: layers of a model, a whole model, or random weights."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from logitcask.cache_format.attention import attention_implementation
from logitcask.cache_format.cli.models_folder import (
    BUILT_IN_NAMES,
    local_model,
    models_dir,
    refuse_adapters,
)
from logitcask.cache_format.errors import ConfigError, UserError, first_line
from logitcask.cache_format.tokenizer_identity import usable_tokenizer
from logitcask.train.config import StudentConfig
from logitcask.train.model.layers import from_layers

log = logging.getLogger(__name__)

_PLAIN_WEIGHTS = "give the student as it was before quantisation, or dequantise it once with transformers and save that"


def build_student(config: StudentConfig, seed: int) -> PreTrainedModel:
    """The untrained student, in ``config.dtype``, on the CPU.

    Raises UserError if its model cannot be found, and ConfigError if keep_layers, config or
    attention do not fit.
    """
    student = _base(config, seed)
    say_untied(student)
    _say_unbalanced(student)
    attention = attention_implementation(student.config, config.attention, "student.attention")
    if attention is not None:
        try:
            student.set_attn_implementation(attention)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(f"student.attention is {attention!r}: {first_line(error)}") from error
    return student if config.peft is None else _with_adapters(student, config.peft, seed)


def say_untied(student: PreTrainedModel) -> None:
    """Corrects the config if it ties the embedding and the lm_head although they differ.

    Merging adapters can leave such folders. transformers loads both weights and would save the
    config unchanged. Other programs (vLLM, converters) follow the config and ignore the lm_head, so
    they would run a different student.
    """
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    text = student.config.get_text_config(decoder=True)
    if (
        any(end is None for end in ends)
        or not text.tie_word_embeddings
        or ends[0].weight is ends[1].weight
    ):
        return
    log.warning(
        "the student's config ties its embedding and its lm_head, and it has two different weights for them; it is saved with "
        "tie_word_embeddings: false"
    )
    student.config.tie_word_embeddings = text.tie_word_embeddings = False


def _say_unbalanced(student: PreTrainedModel) -> None:
    if getattr(student.config.get_text_config(decoder=True), "output_router_logits", False):
        log.warning(
            "the student's config has output_router_logits: true, for which transformers adds a loss that keeps its experts evenly "
            "used; that loss is not part of the training here, where only losses and ce_weight are minimised"
        )


def _base(config: StudentConfig, seed: int) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    if config.config is not None:
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(_student_config(config.config), dtype=dtype)
        except ConfigError:
            raise
        except (
            Exception
        ) as error:  # architectures raise errors of any kind for sizes that do not fit
            raise ConfigError(
                f"student.config describes no causal language model: {first_line(error)}"
            ) from error
    name = config.model or config.init_from
    assert name is not None
    folder = find_model(name, config.revision)
    refuse_adapters(name, folder)
    fields = _config_fields(folder)
    _refuse_own_code(folder, fields)
    method = _quantization(fields)
    try:
        student = (
            _whole(folder, dtype)
            if config.keep_layers is None
            else from_layers(folder, config.keep_layers, dtype)
        )
    except Exception as error:  # every method raises its own error
        if method is None or isinstance(error, ConfigError):
            raise
        raise UserError(
            f"the weights in {folder} are quantised ({method}), and transformers does not load them here "
            f"({first_line(error)}); {_PLAIN_WEIGHTS}"
        ) from error
    # None if transformers has dequantised them.
    quantizer = getattr(student, "hf_quantizer", None)
    if quantizer is not None and (config.peft is None or not quantizer.is_trainable):
        raise UserError(
            f"the weights in {folder} are quantised ({method}), and transformers does not train "
            f"{'them' if config.peft is None else 'adapters on them'}; {_PLAIN_WEIGHTS}"
        )
    return student


def _config_fields(folder: Path) -> dict[str, Any]:
    """The content of config.json; empty if it cannot be read, which loading reports better."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _quantization(fields: dict[str, Any]) -> str | None:
    """The quantisation method of a model's weights in its config.json; None for plain weights."""
    text = fields.get("text_config")
    found = fields.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    return str(found.get("quant_method", "in some way")) if isinstance(found, dict) else None


def _refuse_own_code(folder: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for a model with its own code: transformers would ask on the terminal."""
    if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{folder} needs code of its own (auto_map in its config.json), which train-student does not run; use a model "
            "whose architecture transformers has"
        )


def _with_adapters(student: PreTrainedModel, fields: dict[str, Any], seed: int) -> PreTrainedModel:
    try:
        from peft import get_peft_config, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UserError(
            f"student.peft needs the package peft, which cannot be imported ({first_line(error)}); pip install 'logitcask[peft]'"
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
    if student.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer) for end in ends
    ):
        raise ConfigError(
            "student.peft adapts the embedding or the lm_head of a student in which they are one weight, so merging would change "
            "both; leave them out of target_modules, or name them in modules_to_save"
        )
    return adapted


def _try_merging(student: Any) -> None:
    """Merges copies of the adapted layers, one of each kind. Raises ConfigError if that fails."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = student.active_peft_config.peft_type.value
    if not hasattr(student, "merge_and_unload"):
        raise ConfigError(
            f"student.peft: adapters of the kind {kind} cannot be merged into the student; use LORA"
        )
    seen = set()
    for layer in student.modules():
        if (
            isinstance(layer, BaseTunerLayer)
            and (key := (type(layer), type(layer.get_base_layer()))) not in seen
        ):
            seen.add(key)
            try:
                copy.deepcopy(layer).merge()
            except Exception as error:  # every kind of adapter raises its own error
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
            name,
            # Given explicitly: otherwise transformers asks on the terminal.
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            lambda: PreTrainedTokenizerFast.from_pretrained(folder),
        )
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of {name} needs code of its own, which train-student does not run; set student.tokenizer to "
                "one that transformers has"
            ) from error
        raise UserError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)}); set student.tokenizer"
        ) from error


def find_model(name: str, revision: str | None) -> Path:
    """The folder of a model: a path, a name under the local models folder, where a built-in one is
    made if it is missing, or a hub name fetched to the hub's cache.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name in BUILT_IN_NAMES:
        _fetch_built_in(name)
    if (folder := local_model(name)) is not None:
        return folder
    try:
        return Path(
            snapshot_download(
                name, revision=revision, ignore_patterns=["*.bin", "*.gguf", "*.pth", "*.onnx"]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"there is no model {name!r}: not a folder, not under {models_dir()}/, and not to be had from the hub "
            f"({first_line(error)})"
        ) from error


def _fetch_built_in(name: str) -> None:
    """Makes a built-in model by the teacher stage's command, if it is missing: a cache that is found
    in the catalogue needs no teacher, so nobody has asked for the model before.
    """
    if local_model(name) is not None:
        return
    command = "from logitcask.pipeline.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", command, "model", name], stdout=subprocess.DEVNULL, check=False
    )
    if ended.returncode:
        raise UserError(
            f"the built-in model {name} cannot be made (`teacher-cache model {name}` says why); see to that, or name another model"
        )


def _student_config(fields: dict[str, object]) -> PretrainedConfig:
    try:
        config = AutoConfig.for_model(**fields)
        known = AutoConfig.for_model(fields["model_type"])
    except Exception as error:  # every config class raises its own error
        raise ConfigError(
            f"student.config does not describe a transformers model ({first_line(error)}); it needs model_type and that "
            "model's own fields"
        ) from error
    # New configs have rope_theta inside rope_parameters; transformers accepts both forms.
    unknown = [name for name in fields if name != "rope_theta" and not hasattr(known, name)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known.to_dict(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"student.config: {type(known).__name__} has no field {unknown[0]!r}{hint}"
        )
    return config


def _whole(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
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
