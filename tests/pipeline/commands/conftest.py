"""A small cache, and the commands on it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import app
from logitcask.pipeline.config import BuildConfig


@pytest.fixture
def run() -> Callable[..., None]:
    """``run("export", "parquet", cache, out)``: the command; its errors are raised."""
    return lambda *arguments: app([str(each) for each in arguments], standalone_mode=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two texts: letters of several tokens, and the text of a special token."""
    file = tmp_path / "rows.jsonl"
    texts = ["naïve 漢字\n", "<|im_end|> end"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(file)},
        audit={"sequences": 0},
        output=tmp_path / "cache",
    )
    build(config)
    return config.output
