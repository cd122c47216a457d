"""The built-in documents: all of the reference, in a fair order, the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row, open_source


def rows_of(path: object, **settings: Any) -> list[Row]:
    return list(open_source(DataConfig(path=str(path), **settings)))


def message_of(path: object, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_python_docs_is_the_whole_reference_in_fair_order() -> None:
    from pydoc_data.topics import topics

    rows = rows_of("python-docs")
    assert len({row.row_id for row in rows}) == len(rows)
    text_of = {row.row_id: row.text or "" for row in rows}
    for topic, page in topics.items():
        numbers = range(sum(name.startswith(f"topics/{topic}#") for name in text_of))
        assert numbers, topic
        together = "".join(text_of[f"topics/{topic}#{n}"] for n in numbers)
        assert "".join(together.split()) == "".join(page.split())
    assert sum(len(text) < 200 for text in text_of.values()) == 0
    assert list(text_of) != sorted(text_of)
    # A fair prefix holds many topics, not the beginning of the alphabet.
    assert len({row.row_id.split("#")[0] for row in rows[: len(rows) // 4]}) > 20


def test_python_docs_refuses_what_it_does_not_have() -> None:
    assert "no split 'test'" in message_of("python-docs", split="test")
    assert "no column 'messages'" in message_of("python-docs", messages_field="messages")


def test_python_docs_needs_no_datasets_and_is_the_same_everywhere() -> None:
    code = (
        "import sys; from logitcask.pipeline.text.config import DataConfig; from logitcask.pipeline.text.sources import open_source;"
        "source = open_source(DataConfig(path='python-docs')); ids = [row.row_id for row in source];"
        "assert 'datasets' not in sys.modules; print(source.stamp(), ids[:3])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    source = open_source(DataConfig(path="python-docs"))
    assert outputs == {f"{source.stamp()} {[row.row_id for row in source][:3]}\n"}
