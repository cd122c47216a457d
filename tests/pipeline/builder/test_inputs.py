"""The inputs of a build: how often each is opened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logitcask.pipeline.builder import inputs
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers import model
from logitcask.pipeline.teachers import open as teachers

OPENERS = ("open_rows", "open_tokenizer", "vocab_size_of")


def test_a_build_opens_its_inputs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"text {index}"}) + "\n" for index in range(20)))
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": "synthetic", "vocab_size": 3000},
            "data": {"path": str(data), "max_length": 32},
            "store": {"top_k": 8},
            "output": str(tmp_path / "cache"),
        }
    )
    opened = Counter[str]()

    def counted(name: str) -> Any:
        original = getattr(inputs, name)

        def opener(*arguments: Any) -> Any:
            opened[name] += 1
            return original(*arguments)

        return opener

    for name in OPENERS:
        monkeypatch.setattr(inputs, name, counted(name))
    build(config)
    assert opened == dict.fromkeys(OPENERS, 1)
    opened.clear()
    data.touch()  # so that a reuse compares the text
    assert build(config).reused
    assert opened == dict.fromkeys(OPENERS, 1)
    opened.clear()
    build(config, restart=True)
    # What was removed may have been among the files of the source.
    assert opened == {"open_rows": 2, "open_tokenizer": 1, "vocab_size_of": 1}


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 4, "stop": ["e"]}])
def test_a_build_resolves_its_model_once(
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    generate: dict[str, Any] | None,
) -> None:
    """For its vocabulary, its tokenizer, its end tokens and its engine; and once again for a
    reuse.
    """
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "the teacher reads the student"}) + "\n")
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {
                "path": str(data),
                "text_field": "text",
                "max_length": 32,
                "generate": generate,
            },
            "store": {"top_k": 8},
            "audit": {"sequences": 0},
            "output": str(tmp_path / "cache"),
        }
    )
    found: list[model.ResolvedModel] = []

    def counted(*arguments: Any, **options: Any) -> model.ResolvedModel:
        found.append(model_of(*arguments, **options))
        return found[-1]

    model_of = model.resolve_model
    for module in (model, teachers):
        monkeypatch.setattr(module, "resolve_model", counted)
    build(config)
    assert [each.name for each in found] == [str(tiny_llama)]
    assert build(config).reused
    assert len(found) == 2
