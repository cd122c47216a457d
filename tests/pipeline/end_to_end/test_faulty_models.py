"""Models that overflow, that are damaged, or that bring code of their own: one line, before
anything is stored.
"""

from __future__ import annotations

import builtins
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.describe import describe
from logitcask.pipeline.audit.run import audit
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.teachers.model import check_weights, load_tokenizer, resolve_model
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import Sequence

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELLING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def config(folder: Path, output: Path, **teacher: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(folder), "backend": "transformers", **teacher},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 300},
            "output": str(output),
        }
    )


@pytest.mark.parametrize("fault", ["overflow", "damaged"])
def test_nan_names_its_cause(tiny_llama: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        if fault == "overflow":
            model.model.norm.weight *= 1e5  # more than float16 holds, and nothing to bfloat16
        else:
            model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    dtype = "float16" if fault == "overflow" else "float32"
    with pytest.raises(
        UserError, match=r"^the teacher's logprobs are NaN in .*dtype to bfloat16.*damaged"
    ) as caught:
        build(config(folder, tmp_path / "cache", dtype=dtype))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_folder_that_lacks_weights(tiny_llama: Path, tmp_path: Path, backend: str) -> None:
    """An interrupted download. vLLM starts without an lm_head where there is no index, and
    transformers says something else.
    """
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="150KB")
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    model = resolve_model(str(folder))
    check_weights(model)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "pytorch_model.bin"}})
    )
    check_weights(model)  # left over
    files[-1].unlink()
    message = rf"^{re.escape(str(folder))} is incomplete: 1 of the {len(files)} files .* missing \({files[-1].name}\)"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            open_teacher(
                TeacherConfig(model=str(folder), backend=backend), max_length=16, capture=Capture(2)
            )
        index.unlink(missing_ok=True)
    index.write_text("<html>")
    with pytest.raises(UserError, match="is no index of weights") as error:
        check_weights(model)
    assert "\n" not in str(error.value)


def test_nan_of_any_engine_is_not_stored(synthetic_scored: tuple[Sequence, Any, Any]) -> None:
    sequence, scored, store = synthetic_scored
    keep(sequence, scored, store)
    for name in ("logprobs", "target_logprob"):
        values = getattr(scored, name)
        kept, values.flat[3] = values.flat[3], np.nan
        with pytest.raises(UserError, match="logprobs are NaN in sequence 'a'"):
            keep(sequence, scored, store)
        values.flat[3] = kept


@pytest.fixture
def synthetic_scored() -> tuple[Sequence, Any, Any]:
    asked = BuildConfig.model_validate(
        {"teacher": {"model": "synthetic"}, "data": {"path": "d"}, "output": "o"}
    )
    ids = np.arange(20, dtype=np.int32)
    sequence = Sequence("a", ids, ids > 0)
    (scored,) = SyntheticTeacher(asked.teacher, asked.store.capture()).score([sequence])
    return sequence, scored, asked.store.settings(asked.teacher.vocab_size)


@pytest.fixture
def own_code(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a model that only its own code can make, and a terminal that must not be asked."""

    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama, folder)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELLING)
    (folder / "tokenization_own.py").write_text(TOKENIZATION)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    fields = json.loads((folder / "config.json").read_text())
    fields |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_own_code_is_refused_at_once(own_code: Path, tmp_path: Path, backend: str) -> None:
    refusal = r"own comes with code of its own.*teacher\.engine_args\.trust_remote_code=true"
    with pytest.raises(UserError, match=refusal) as caught:
        build(config(own_code, tmp_path / "cache", backend=backend))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=refusal):
        load_tokenizer(resolve_model(str(own_code)))


def test_own_code_that_is_trusted_runs_everywhere(own_code: Path, tmp_path: Path) -> None:
    asked = config(own_code, tmp_path / "cache", engine_args={"trust_remote_code": True})
    found = build(asked).manifest.audit
    assert found is not None
    assert found.skipped is None, "the audit did not get it"
    assert audit(str(asked.output), trust_remote_code=True).problems == ()
    with pytest.raises(UserError, match=r"--trust-remote-code"):
        audit(str(asked.output))


def test_no_audit_is_not_a_passed_one(tmp_path: Path) -> None:
    asked = BuildConfig.model_validate(
        {
            "teacher": {"model": "synthetic", "vocab_size": 300},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 500},
            "audit": {"sequences": 0},
            "output": str(tmp_path / "cache"),
        }
    )
    build(asked)
    assert "not audited: none was asked for" in describe(
        CacheReader(asked.output).manifest, asked.output
    )
