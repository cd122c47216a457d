"""Models that look like others: adapters, of which engines make different things, and Mistral's
own tokenizers.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer, MistralConfig
from transformers.integrations.mistral import convert_tekken_tokenizer

from logitcask.cache_format import UserError
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    _hub_commit,
    activation_bits,
    load_tokenizer,
    resolve_model,
)

ADAPTERS = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}


def refused(name: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    for word in (*words, "merge_and_unload", "name NEW"):
        assert word in str(caught.value)


def test_a_folder_of_adapters_is_no_model(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTERS))
    refused(
        str(folder),
        f"{folder} holds adapters of org/base (adapter_config.json), expected whole weights alone",
    )
    (folder / "adapter_config.json").write_text("{")
    refused(str(folder), f"{folder} holds adapters (adapter_config.json)")


def test_adapters_beside_a_model_are_refused_since_only_some_engines_apply_them(
    tmp_path: Path, tiny_llama: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "both")
    assert resolve_model(str(folder)).location == str(folder)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTERS))
    refused(
        str(folder), f"{folder} holds adapters of org/base beside a model (adapter_config.json)"
    )


@pytest.mark.parametrize("config", [True, False])
def test_adapters_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: bool) -> None:
    snapshot = tmp_path / "0123abcd"
    snapshot.mkdir()
    (snapshot / "adapter_config.json").write_text(json.dumps(ADAPTERS))
    if config:
        (snapshot / "config.json").write_text("{}")

    def download(name: str, file: str, revision: str | None = None) -> str:
        if not (snapshot / file).exists():
            raise OSError("404")
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path / "models"))
    _hub_commit.cache_clear()
    refused("org/adapters", "org/adapters holds adapters of org/base")
    (snapshot / "adapter_config.json").unlink()
    if config:
        assert resolve_model("org/adapters").revision == "0123abcd"
    _hub_commit.cache_clear()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_hub_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """What is in it is read; of what is not, the cache is named, not the model."""

    def download(name: str, file: str, revision: str | None = None) -> str:
        raise OSError(code, os.strerror(code), str(tmp_path / "hub"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path / "models"))
    _hub_commit.cache_clear()
    with pytest.raises(
        UserError, match=r"hub cache cannot be written.*set HF_HOME to a folder"
    ) as error:
        resolve_model("org/model")
    assert os.strerror(code) in str(error.value)
    assert "\n" not in str(error.value)

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert resolve_model("org/model").revision == commit
    assert resolve_model("org/model", commit).revision == commit
    with pytest.raises(UserError, match="hub cache cannot be written"):
        resolve_model("org/model", "another-branch")
    _hub_commit.cache_clear()


def mistral(tmp_path: Path, write_tekken: Any) -> Path:
    write_tekken(tmp_path)
    MistralConfig(vocab_size=288).save_pretrained(tmp_path)
    return tmp_path


def test_a_tekken_file_alone_is_refused_with_what_to_do(tmp_path: Path, write_tekken: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(resolve_model(str(mistral(tmp_path, write_tekken))))
    assert f"{tmp_path} has a tekken.json and no tokenizer.json" in str(caught.value)
    assert "convert_tekken_tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tekken_file_beside_a_tokenizer_changes_nothing(
    tmp_path: Path, write_tekken: Any
) -> None:
    """Where mistral-common is installed, transformers prefers it, and its tokenizer has no
    offsets.
    """
    folder = mistral(tmp_path, write_tekken)
    convert_tekken_tokenizer(str(folder / "tekken.json")).save_pretrained(folder)
    found = load_tokenizer(resolve_model(str(folder)))
    (folder / "tekken.json").unlink()
    plain = AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(plain)
    assert tokenizer_identity(found, None) == tokenizer_identity(plain, None)
    text = "in the other <s> thing"
    assert found(text, return_offsets_mapping=True)["offset_mapping"][0] == (0, 2)
    assert found(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        (None, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4),
        ({"quant_method": "awq", "bits": 4}, None),
        ({"quant_method": "gptq", "bits": 8}, None),
        ({"quant_method": "mxfp4"}, None),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"input_activations": None}},
            },
            None,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
                },
            },
            8,
        ),
    ],
)
def test_what_a_quantised_checkpoint_rounds_its_layers_inputs_to(
    tiny_llama, tmp_path, settings, bits
):
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": settings} if settings else {}))
    )
    assert activation_bits(ResolvedModel("tiny", str(tmp_path), None)) == bits
