"""How a config's teacher is found: the engine it names, another in its place, or one line that
says what is missing.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, vocab_size_of


def test_fallback_where_vllm_is_missing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        teacher = open_teacher(
            TeacherConfig(model=str(tiny_llama)), max_length=64, capture=Capture(4)
        )
    assert teacher.identity().backend == "transformers"
    (record,) = [
        record for record in caplog.records if record.name.startswith("logitcask.pipeline")
    ]
    assert "vLLM is not installed" in record.message
    teacher.close()


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in [
        (str(tmp_path / "nowhere"), "no such folder"),
        ("nobody/no-such-model", "not built in"),
        (str(tmp_path), "no config.json"),
    ]:
        for ask in (
            lambda config: open_teacher(config, max_length=8, capture=Capture(1)),
            open_tokenizer,
            vocab_size_of,
        ):
            with pytest.raises(UserError, match=message) as caught:
                ask(TeacherConfig(model=name))
            assert "\n" not in str(caught.value)
