"""Resolution of a config's model name to a model that an engine can load.

A name is built in (``logitcask.pipeline.teachers.built_in_model``), a folder, or a model of the
Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.cache_format.attention import attention_implementation
from logitcask.cache_format.cli.models_folder import (
    ADAPTER_CONFIG,
    local_model,
    refuse_adapters,
)
from logitcask.cache_format.errors import UserError, cannot_write, first_line
from logitcask.cache_format.tokenizer_identity import usable_tokenizer
from logitcask.pipeline.teachers.built_in_model import BUILT_IN, prepare_built_in
from logitcask.pipeline.teachers.weights import weight_files, weights_sha256

_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.(?:safetensors|bin)")
_SHOWN = 3  # files in a message
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""How configs name the number of experts that tokens are routed to."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that exists.

    name:     as the user wrote it.
    location: folder or hub name that engines load.
    revision: commit of a hub model, so that a moving branch cannot change a running build; None for
              a folder.
    trust_remote_code: whether the user allows the model's own code to run.
    """

    name: str
    location: str
    revision: str | None
    trust_remote_code: bool = False

    def weights_sha256(self) -> str | None:
        """Identity of a local model's weights; None for a hub model, which has ``revision``."""
        return weights_sha256(Path(self.location)) if self.revision is None else None


def resolve_model(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> ResolvedModel:
    """Finds a model, and prepares it if it is built in. Raises UserError if there is none."""
    if name in BUILT_IN:
        return ResolvedModel(name, str(prepare_built_in(name)), None)
    folder = Path(name).expanduser()
    prepared = local_model(name)
    if not folder.is_dir() and prepared is not None:
        folder = prepared
    if folder.is_dir():
        refuse_adapters(name, folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is not a model folder: it has no config.json; expected a folder in transformers' format"
            )
        return ResolvedModel(name, str(folder), None, trust_remote_code)
    return ResolvedModel(name, name, _hub_commit(name, revision), trust_remote_code)


def local_weights(model: ResolvedModel) -> list[Path]:
    """The weight files of a model on this machine: in its folder, or in the hub cache."""
    folder: Path | None = Path(model.location)
    if model.revision is not None:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model.location, "config.json", revision=model.revision)
        folder = Path(config).parent if isinstance(config, str) else None
    return [] if folder is None else weight_files(folder)


def read_weights(model: ResolvedModel) -> None:
    """Computes the sha256 of a local model's weights before an engine starts, so that its GPUs do
    not wait for it.
    """
    if local_weights(model):
        model.weights_sha256()


def check_weights(model: ResolvedModel) -> None:
    """Raises UserError if files of a local model's weights are missing.

    Engines react differently to this. vLLM may start without some of the weights
    (https://github.com/vllm-project/vllm/issues/34859). Weights of a hub model are fetched by the
    engine.
    """
    if model.revision is not None:
        return
    folder = Path(model.location)
    there = {file.name for file in weight_files(folder)}
    # Engines prefer safetensors. An index of .bin files beside them is often outdated.
    suffix = ".safetensors" if any(name.endswith(".safetensors") for name in there) else ".bin"
    named = {name for index in folder.glob(f"*{suffix}.index.json") for name in _weight_map(index)}
    if not named:
        for name in there:
            if name.endswith(suffix) and (numbered := _NUMBERED.fullmatch(name)):
                stem, count = numbered[1], int(numbered[2])
                named |= {
                    f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)
                }
    if missing := sorted(named - there):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{model.name} is incomplete: {len(missing)} of the {len(named)} files of its weights are missing "
            f"({', '.join(missing[:_SHOWN])}{more}); fetch them again, or copy the whole folder"
        )


def _weight_map(index: Path) -> set[str]:
    """The files that an index of weights names. Raises UserError if it is not such an index."""
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is no index of weights ({first_line(error)}); fetch it again"
        ) from error


def prepare_model(name: str, revision: str | None = None) -> str:
    """A folder or hub name that transformers and vLLM load. Raises as ``resolve_model``."""
    return resolve_model(name, revision).location


def load_tokenizer(model: ResolvedModel) -> Any:
    """The model's ``transformers.PreTrainedTokenizerBase``. Raises UserError if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return usable_tokenizer(
            model.name,
            AutoTokenizer.from_pretrained(
                model.location, revision=model.revision, trust_remote_code=model.trust_remote_code
            ),
            lambda: PreTrainedTokenizerFast.from_pretrained(
                model.location, revision=model.revision
            ),
        )
    except (OSError, ValueError, ImportError) as error:
        _refuse_own_code(model, error)
        reason = first_line(error)
        if "backend tokenizer" in reason:  # the start of a list that goes on for lines
            reason = (
                "there is no tokenizer.json, nor a vocabulary that can be converted to one "
                "(a tokenizer.model needs the package sentencepiece or tiktoken)"
            )
        raise UserError(
            f"the tokenizer of {model.name} cannot be loaded: {reason}; "
            "a model folder needs the tokenizer's files beside the weights"
        ) from error


def vocab_size(model: ResolvedModel) -> int:
    """Number of ids that the model predicts, by its config; may exceed the tokenizer's ids."""
    return int(_config(model).get_text_config().vocab_size)


def end_tokens(model: ResolvedModel) -> set[int]:
    """Ids that end the model's text, from its generation_config.json and config; may be empty."""
    from transformers import GenerationConfig

    named = [_config(model).get_text_config().eos_token_id]
    with contextlib.suppress(OSError):  # the model has none
        named.append(
            GenerationConfig.from_pretrained(model.location, revision=model.revision).eos_token_id
        )
    return {
        int(token)
        for ids in named
        if ids is not None
        for token in (ids if isinstance(ids, list) else [ids])
    }


def attention(model: ResolvedModel, asked: Any) -> Any:
    """``attn_implementation`` for the teacher in transformers (see
    ``logitcask.cache_format.attention``); ``asked``: the user's value.
    """
    return attention_implementation(
        _config(model), asked, "teacher.engine_args.attn_implementation"
    )


def check_context(model: ResolvedModel, max_length: int) -> None:
    """Raises UserError if the model does not support sequences of ``max_length`` tokens."""
    limit = context_limit(model)
    if limit is not None and max_length > limit:
        raise UserError(
            f"{model.name} reads at most {limit} tokens, data.max_length is {max_length}; lower data.max_length"
        )


def context_limit(model: ResolvedModel) -> int | None:
    """Largest number of tokens that the model supports; None if its config does not say, or scales
    its positions at run time.
    """
    config = _config(model).get_text_config()
    if any(one.get("rope_type") in {"linear", "dynamic"} for one in _rope_parameters(config)):
        return None
    return getattr(config, "max_position_embeddings", None)


def for_text(model: ResolvedModel, fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` of the language model's config, as fields of the model's config.

    They differ only for multimodal models, whose config has one config for each part.
    """
    config = _config(model)
    text = config.get_text_config()
    parts = [name for name in config.sub_configs if getattr(config, name, None) is text]
    return dict.fromkeys(parts, fields) if parts else fields


def longest_with_short_rope(model: ResolvedModel) -> int | None:
    """Length in tokens above which a text needs other RoPE factors (LongRoPE: Phi-3, Phi-4-mini);
    None: never.
    """
    config = _config(model).get_text_config()
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "longrope" and rope.get("short_factor") != rope.get(
            "long_factor"
        ):
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            return int(getattr(config, "original_max_position_embeddings", None) or limit)
    return None


def check_rope_in_vllm(model: ResolvedModel, max_model_len: int) -> None:
    """Raises UserError if vLLM would read short texts with the wrong RoPE factors.

    vLLM chooses between the two sets of LongRoPE factors once, by ``max_model_len``, for texts of
    every length (https://github.com/vllm-project/vllm/pull/27431).
    """
    limit = longest_with_short_rope(model)
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"{model.name} has RoPE factors for texts of up to {limit} tokens and others for longer ones; vLLM that takes "
            f"{max_model_len} tokens (data.max_length and one more, or --max-model-len of a server) uses the latter for "
            f"every text; set data.max_length to {limit - 1} or less (and start a server with --max-model-len {limit}), or "
            "set teacher.backend=transformers, which chooses by text"
        )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE settings of a config: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [
        one for one in ([rope] if "rope_type" in rope else rope.values()) if isinstance(one, dict)
    ]


def kv_bytes_per_token(model: ResolvedModel, value_bytes: int) -> int:
    """Bytes per token in a key-value cache of ``value_bytes`` bytes per number."""
    config = _config(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return int(2 * config.num_hidden_layers * heads * head_size * value_bytes)


def is_quantised(model: ResolvedModel) -> bool:
    """Whether the weights are stored in a quantised form."""
    return getattr(_config(model), "quantization_config", None) is not None


def auto_class(model: ResolvedModel) -> Any:
    """The class of transformers that loads the model with its lm_head; two for multimodal."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(_config(model))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def is_soft_capped(model: ResolvedModel) -> bool:
    """Whether the model's final logits pass through tanh (Gemma)."""
    return getattr(_config(model).get_text_config(), "final_logit_softcapping", None) is not None


def activation_bits(model: ResolvedModel) -> int | None:
    """Bits to which the layers of a quantised checkpoint round their inputs; None if only weights
    are quantised, if nothing is, or if the config does not say.

    Covers FP8 (DeepSeek's and FBGEMM's), compressed-tensors and ModelOpt. An engine computes in the
    format of such a checkpoint.
    """
    settings = getattr(_config(model), "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") in ("fp8", "fbgemm_fp8"):
        return 8
    groups = settings.get("config_groups") or {}
    inputs = [
        group.get("input_activations") for group in groups.values() if isinstance(group, dict)
    ]
    bits = [int(one["num_bits"]) for one in inputs if one and one.get("num_bits")]
    bits += {"FP8": [8], "NVFP4": [4]}.get(str(settings.get("quant_algo")), [])
    return min((one for one in bits if one < 16), default=None)


def has_experts(model: ResolvedModel) -> bool:
    """Whether a router sends each token to some of the model's experts."""
    config = _config(model).get_text_config()
    return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)


def _config(model: ResolvedModel) -> Any:
    from transformers import AutoConfig

    try:
        # Always given explicitly: otherwise transformers asks on the terminal.
        return AutoConfig.from_pretrained(
            model.location, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        _refuse_own_code(model, error)
        raise UserError(
            f"the config.json of {model.name} cannot be read: {first_line(error)}"
        ) from error


def _refuse_own_code(model: ResolvedModel, error: Exception) -> None:
    """Raises UserError if ``error`` is transformers' refusal to run the model's own code."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{model.name} comes with code of its own, which only runs if it is trusted; read it, then set "
            "teacher.engine_args.trust_remote_code=true (an audit: --trust-remote-code)"
        ) from error


@functools.cache
def _hub_commit(name: str, revision: str | None) -> str:
    """Commit of ``revision`` of a hub model; from the local hub cache if the hub cannot be reached
    or that cache cannot be written.

    The result is cached, so that a branch that moves during a command does not give two models.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except GatedRepoError as error:
        reason = (
            "its owner restricts it: accept the terms on its page and log in with `hf auth login`"
        )
        raise UserError(f"model {name} on the Hugging Face hub cannot be read; {reason}") from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model {name} on the Hugging Face hub has no revision {revision!r}; name a branch, tag or commit"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "the Hugging Face hub is out of reach and the hub cache lacks it"
        raise UserError(
            f"no model {name!r}: it is not built in, not a folder, and {reason}; {_what_there_is()}"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"no model {name!r}: there is no such folder, and it is not a hub name; {_what_there_is()}"
        ) from error
    except OSError as error:
        if cannot_write(error):
            cached = try_to_load_from_cache(name, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise UserError(
                    f"model {name} of the Hugging Face hub cannot be fetched, as the hub cache cannot be written "
                    f"({first_line(error)}); set HF_HOME to a folder that can be written and has room"
                ) from error
            commit = Path(cached).parent.name
            _refuse_hub_adapters(name, commit)
            return commit
        _refuse_hub_adapters(name, revision)
        raise UserError(
            f"no model {name!r}: it is not built in, not a folder, and the Hugging Face hub does not have it "
            f"({first_line(error)}); {_what_there_is()}"
        ) from error
    _refuse_hub_adapters(name, commit)
    return commit


def _refuse_hub_adapters(name: str, revision: str | None) -> None:
    from huggingface_hub import hf_hub_download

    with contextlib.suppress(OSError):  # there are none
        refuse_adapters(name, Path(hf_hub_download(name, ADAPTER_CONFIG, revision=revision)).parent)


def empty_model(model: ResolvedModel) -> Any:
    """The model without its weights: torch's ``meta`` device holds shapes and no numbers.

    Raises UserError if its config does not describe it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                _config(model).get_text_config(), trust_remote_code=model.trust_remote_code
            )
    except Exception as error:  # a model's own code may raise anything
        reason = first_line(error)
        raise UserError(
            f"the shape of {model.name} cannot be told from its config: {reason}"
        ) from error


def _what_there_is() -> str:
    return f"expected a built-in name ({', '.join(BUILT_IN)}, synthetic), a model folder, or a hub name"
