"""A student made of some of a model's layers: its config, its weights, and a check that both
describe the same layers.

A config has many ways to give the kinds of its layers: lists with an entry per layer
(``layer_types``), lists of layer numbers (``mlp_only_layers``), counts (``first_k_dense_replace``),
periods (``decoder_sparse_step``). Lists are cut and renumbered. Counts and periods are adapted if
they can describe the kept layers. Then both models are built without memory, and each layer of the
student is compared with its original. If the config cannot describe the kept layers, they are
refused.

safetensors reads the weights one by one, and never reads those of other layers. transformers
renames and converts them, as in ``from_pretrained``: a file may have one tensor per expert and the
model one tensor for all experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from logitcask.cache_format.errors import ConfigError, UserError, first_line

_NUMBERED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<rest>.*)$")
_LAYER_NUMBER = re.compile(r"(^|_)layer_(idx|index|id|number)$")
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "hybrid_layer_ids", "cross_attention_layers")
"""Fields that name layers by their numbers."""
_NO_LAYERS = re.compile(
    r"token_ids?$|token_index$|^architectures$|_section$|^suppress_|^begin_suppress"
)
"""Lists that may have as many entries as there are layers by chance."""


def from_layers(folder: Path, keep: list[int], dtype: torch.dtype) -> PreTrainedModel:
    """A model with some of the layers of the one in ``folder``, in the order of ``keep``.

    Raises ConfigError if ``keep`` names layers that do not exist or that no config can describe,
    and UserError if the folder has no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # config classes and architectures raise errors of any kind
        raise UserError(
            f"{folder} has no config of a causal language model: {first_line(error)}"
        ) from error
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", 0)
    if not keep or len(set(keep)) < len(keep) or not all(0 <= layer < layers for layer in keep):
        raise ConfigError(
            f"student.keep_layers is {keep}; expected distinct numbers from 0 to {layers - 1}"
        )
    place = _place(whole, layers)
    name = type(whole).__name__
    try:
        cut = _cut(config, keep)
        with torch.device("meta"):
            student = AutoModelForCausalLM.from_config(cut, dtype=dtype)
    except Exception as error:  # as above
        raise ConfigError(
            f"{name} of the layers {keep} alone has no config: {first_line(error)}"
        ) from error
    _check_same(whole, student, place, keep)
    with ExitStack() as files:
        state = dict(_weights(folder, whole, place, keep, files))
        try:
            model, loading = type(student).from_pretrained(
                None,
                config=cut,
                state_dict=state,
                dtype=dtype,
                generation_config=_generation_config(folder, config),
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder} does not hold the weights of {name}: {first_line(error)}"
            ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{folder} has no weights for {missing[0]} ({len(missing)} missing in all) of {name}"
        )
    return model


def _place(whole: PreTrainedModel, layers: int) -> str:
    """The name of the list of layers in a model."""
    decoder = getattr(whole, "get_decoder", lambda: whole)() or whole
    inside = {id(module) for module in decoder.modules()}
    for name, module in _lists(whole):
        if id(module) in inside and len(module) == layers:
            return name
    raise ConfigError(
        f"{type(whole).__name__} does not keep its {layers} layers in one list, so keep_layers cannot take some of them; "
        "use student.model"
    )


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost module lists of a model."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return [(name, module) for name, module in found if not re.search(r"\.\d+\.", name)]


def _cut(config: PretrainedConfig, keep: list[int]) -> PretrainedConfig:
    """The config of the layers ``keep``, rebuilt from its fields, as when the student is loaded."""
    text = config.get_text_config(decoder=True)
    layers, whole = text.num_hidden_layers, config.to_dict()
    own = [name for name, value in vars(config).items() if value is text]
    fields = whole[own[0]] if own else whole
    new_number = {old: new for new, old in enumerate(keep)}
    for name, value in fields.items():
        if not isinstance(value, list) or _NO_LAYERS.search(name):
            continue
        if name in _LAYER_NUMBERS:
            fields[name] = sorted(new_number[layer] for layer in value if layer in new_number)
        elif len(value) == layers:
            fields[name] = [value[layer] for layer in keep]
    # A number of first or last layers has one kind: count those that are kept.
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if isinstance(fields.get(name), int):
            fields[name] = sum(layer < fields[name] for layer in keep)
    if isinstance(end := fields.get("moe_layer_end_index"), int) and end >= 0:
        fields["moe_layer_end_index"] = sum(layer <= end for layer in keep) - 1
    if shared := fields.get("num_kv_shared_layers"):
        fields["num_kv_shared_layers"] = sum(layer >= layers - shared for layer in keep)
    # GPT-Neo: kinds, and the number of their repetitions.
    if fields.get("attention_types") and hasattr(text, "attention_layers"):
        fields["attention_types"] = [[[text.attention_layers[layer]], 1] for layer in keep]
    # One layer per period is sparse, except the named ones: with period 1, all except those.
    if (period := fields.get("decoder_sparse_step", 1)) != 1 and "mlp_only_layers" in fields:
        dense = [new for new, old in enumerate(keep) if (old + 1) % period]
        fields |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted({*dense, *(fields["mlp_only_layers"] or [])}),
        }
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    return type(config).from_dict(whole)


def _check_same(
    whole: PreTrainedModel, student: PreTrainedModel, place: str, keep: list[int]
) -> None:
    """Raises ConfigError unless each layer of the student equals its original, but for numbers."""
    made = student.get_submodule(place)
    new_number = {old: new for new, old in enumerate(keep)}
    layers = whole.config.get_text_config(decoder=True).num_hidden_layers
    shared = getattr(student.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    for new, old in enumerate(keep):
        expected, found = _traits(whole.get_submodule(f"{place}.{old}")), _traits(made[new])
        for trait in sorted(expected.keys() | found.keys()):
            was, now = expected.get(trait), found.get(trait)
            attribute = trait.rpartition(" ")[2]
            if (
                isinstance(was, tuple)
                and len(was) == layers
                and now == tuple(was[each] for each in keep)
            ):
                was = now  # a list of every layer's setting
            # Another layer's setting, if it differs from its own.
            if type(was) is int and _LAYER_NUMBER.search(attribute):
                was = now if was == old and now == new else new_number.get(was, was)
            if was != now and not (attribute == "store_full_length_kv" and not shared):
                raise ConfigError(
                    f"keep_layers cannot take the layers {keep} out of {type(whole).__name__}: layer {old} has {trait} "
                    f"{was!r}, and as layer {new} of {len(keep)} it would have {now!r}, which its config cannot change; "
                    "keep other layers, or use student.model"
                )
    text, cut = (model.config.get_text_config(decoder=True) for model in (whole, student))
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if (kinds := getattr(text, name, None)) is not None and len(
            kinds
        ) == text.num_hidden_layers:
            expected_kinds = [kinds[old] for old in keep]
            if list(getattr(cut, name)) != expected_kinds:
                raise ConfigError(
                    f"keep_layers cannot take the layers {keep} out of {type(whole).__name__}: its config cannot have "
                    f"{name} {expected_kinds}; keep other layers, or use student.model"
                )


def _traits(layer: nn.Module) -> dict[str, Any]:
    """The traits of a layer by module and attribute: kinds, shapes, plain settings."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"{name} class".strip()] = type(module).__name__
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute in ("training", "layer_idx"):
                continue
            plain = tuple(value) if isinstance(value, list) else value
            if isinstance(plain, int | float | str | tuple | None):
                found[f"{name} {attribute}".strip()] = plain
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        module_name, _, attribute = name.rpartition(".")
        found[f"{module_name} {attribute}".strip()] = tuple(value.shape)
    return found


def _weights(
    folder: Path, whole: PreTrainedModel, place: str, keep: list[int], files: ExitStack
) -> Iterator[tuple[str, Any]]:
    """(name, reader of safetensors) of the kept layers' weights, renumbered, and of the weights
    outside the layers.
    """
    new_number = {old: new for new, old in enumerate(keep)}
    lists = [name for name, _ in _lists(whole)]
    text = whole.config.get_text_config(decoder=True)
    width = getattr(text, "hidden_size_per_layer_input", 0) or 0
    for file, names in _weight_files(folder).items():
        try:
            weights = files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error
        for name in names:
            numbered = _NUMBERED.match(name)
            if numbered and max(lists, key=lambda path: _alike(path, numbered["list"])) == place:
                if (old := int(numbered["index"])) in new_number:
                    new_name = f"{numbered['list']}.{new_number[old]}.{numbered['rest']}"
                    yield new_name, weights.get_slice(name)
                continue
            found = weights.get_slice(name)
            if width and "per_layer" in name:  # a part for each layer, side by side (Gemma 3n)
                shape = found.get_shape()
                if shape[0] == width * text.num_hidden_layers:
                    found = torch.cat([found[old * width : (old + 1) * width] for old in keep])
                elif len(shape) > 1 and shape[1] == width * text.num_hidden_layers:
                    found = torch.cat(
                        [found[:, old * width : (old + 1) * width] for old in keep], 1
                    )
            yield name, found


def _alike(one: str, other: str) -> float:
    """Similarity of two names of lists: files and models order the parts of a name differently."""
    parts, others = set(one.split(".")), set(other.split("."))
    return len(parts & others) / len(parts | others)


def _generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The model's own generation config, with all its end tokens."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the generation_config.json in {folder} cannot be read: {first_line(error)}"
        ) from error


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model folder and the names of the tensors in each."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files: dict[Path, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(folder / file, []).append(name)
        return files
    file = folder / "model.safetensors"
    if not file.exists():
        raise UserError(
            f"{folder} has no safetensors weights; save the model with save_pretrained first"
        )
    with safe_open(file, framework="pt") as weights:
        return {file: list(weights.keys())}
