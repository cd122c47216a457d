"""A folder as the examples of docs/trainers.md expect it, and the examples."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
BLOCKS = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="session")
def chats(tiny_llama, tmp_path_factory):
    """A cache of chats, whose answers have 1 to 25 words: batches differ in their kept tokens."""
    folder = tmp_path_factory.mktemp("trainers")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say it {i} times"},
                {"role": "assistant", "content": "the teacher reads " * (1 + i * 7 % 9) + str(i)},
            ]
        }
        for i in range(56)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {
                "path": str(folder / "chats.jsonl"),
                "messages_field": "messages",
                "max_length": 120,
            },
            "store": {"shard_tokens": 1200},
            "audit": {"sequences": 0},
            "output": str(folder / "cache"),
        }
    )
    build(config)
    kept = [len(sequence.positions) for sequence in CacheReader(config.output)]
    assert max(kept) > 4 * min(kept)
    return config.output


@pytest.fixture
def folder(user_folder, chats, scratch_student):
    """The working directory, with ``caches/mine`` and ``my-student``."""
    shutil.copytree(chats, user_folder / "caches/mine")
    shutil.copytree(scratch_student(tied=False), user_folder / "my-student")
    return user_folder


def replaced(text: str, *changes: tuple[str, str]) -> str:
    """``text`` with each (old, new) replaced, which must occur exactly once."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def losses_of(example: str) -> dict[str, object]:
    """The fields of a ``Distillation`` in an example, as a config has them."""
    found = yaml.safe_load(BLOCKS["axolotl.yaml"])["logitcask"]
    assert example.count('{"name": "ranking", "weight": 2.0, "k": 5}') == 1
    return {name: found[name] for name in ("losses", "ce_weight")}
