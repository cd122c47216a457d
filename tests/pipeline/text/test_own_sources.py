"""Sources of data outside this project: rows, stamps, precedence, and refusals in one line."""

from __future__ import annotations

import hashlib
import sys

import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.own_sources import is_own
from logitcask.pipeline.text.row_count import count_rows
from logitcask.pipeline.text.sources import open_source

LINES = """
def lines(config):
    for line in open(config.name):
        key, _, text = line.rstrip("\\n").partition(":")
        yield {"key": key, "text": text or None, "extra": object()}
"""


@pytest.fixture
def lines(user_folder):
    (user_folder / "mine.py").write_text(LINES)
    (user_folder / "data").write_text("a:one\nb:\nc:three and more\n")


def config(**fields):
    return DataConfig(**{"path": "mine:lines", "name": "data", **fields})


def test_rows(lines):
    source = open_source(config(id_field="key"))
    for _ in range(2):  # every pass starts from the first row
        assert [(row.row_id, row.text) for row in source] == [("a", "one"), ("c", "three and more")]
    assert source.counters == {"rows_read": 3, "rows_skipped_null": 1}
    assert [row.row_id for row in open_source(config())] == ["train/0", "train/2"]
    assert count_rows(config()) is None


def test_chats(user_folder):
    (user_folder / "mine.py").write_text(
        "def chats(config):\n"
        "    yield {'messages': [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': config.split}]}\n"
        "    yield {'messages': [], 'tools': []}\n"
    )
    rows = list(open_source(config(path="mine:chats", messages_field="messages", split="part")))
    assert rows[0].messages[1] == {"role": "assistant", "content": "part"}
    assert rows[0].row_id == "part/0"


def test_the_stamp_without_one_is_that_of_the_rows(lines, user_folder):
    stamp = open_source(config()).stamp()
    assert stamp == open_source(config()).stamp()  # though ``extra`` is another object each time
    (user_folder / "data").write_text("a:one\nb:\nc:three and mors\n")
    assert open_source(config()).stamp() != stamp
    digest = hashlib.sha256(b'["one", null]\n[null, null]\n["three and mors", null]\n').hexdigest()
    assert open_source(config()).stamp() == f"mine:lines:{digest}"
    assert open_source(config(id_field="key")).stamp() != open_source(config()).stamp()


def test_a_stamp_of_its_own(user_folder):
    (user_folder / "mine.py").write_text(
        "class Rows:\n    def __init__(self, config): self.name = config.name\n"
        "    def __iter__(self): yield {'text': 'some'}\n    def stamp(self): return len(self.name)\n"
    )
    assert open_source(config(path="mine:Rows", name="abc")).stamp() == "mine:Rows:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def lines(config): return 3\n",
            r"^mine:lines: reading failed: 'int' object is not iterable \(TypeError\)",
        ),
        (
            "def lines(config): return ['a']\n",
            "^mine:lines: row 0 is str; expected a mapping of columns",
        ),
        (
            "def lines(config): yield {'text': 'a'}; yield 3\n",
            "^mine:lines: row 1 is int; expected a mapping",
        ),
        (
            "def lines(config): yield {'text': 'a'}; open('nothing')\n",
            r"reading failed: .*No such file.* at .*mine.py:1 ",
        ),
        ("def lines(): pass\n", r"^mine:lines: the call failed: .*takes 0 positional arguments"),
        ("def lines(config): return []\n", "^empty data set: mine:lines has no rows"),
        (
            "def lines(config): yield {'txt': 'a'}\n",
            "'mine:lines' has no column 'text' .*; it has txt",
        ),
        ("def lynes(config): yield {'txt': 'a'}\n", "has no 'lines'; did you mean lynes"),
    ],
)
def test_refusals(user_folder, text, message):
    (user_folder / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(open_source(config()))
    assert "\n" not in str(caught.value)


def test_precedence(user_folder, install):
    (user_folder / "mine.py").write_text("def f(config): yield {'text': 'of the package'}\n")
    names = {"python-docs": "mine:f", "rows.jsonl": "mine:f", "somebody/data": "mine:f"}
    assert not is_own(config(path="somebody/data"))
    install("extras", "1", {"logitcask.sources": names})
    (user_folder / "rows.jsonl").write_text('{"text": "of the file"}\n')
    assert not is_own(config(path="python-docs"))
    assert [row.text for row in open_source(config(path="rows.jsonl", name=None))] == [
        "of the file"
    ]
    assert [row.text for row in open_source(config(path="somebody/data"))] == ["of the package"]
    (user_folder / "mine:f").mkdir()  # a folder may have any name
    assert not is_own(config(path="mine:f"))


def test_a_build(lines, user_folder):
    made = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": "mine:lines", "name": "data", "id_field": "key"},
        audit={"sequences": 0},
        output=user_folder / "cache",
    )
    manifest = build(made).manifest
    assert manifest.data.source == "mine:lines"
    assert manifest.config["code_sha256"] == {
        "mine:lines": hashlib.sha256(LINES.encode()).hexdigest()
    }
    assert [s.sequence_id for s in CacheReader(user_folder / "cache")] == ["a", "c"]
    assert build(made).reused
    (user_folder / "data").write_text("a:one\nb:\nc:three and mors\n")
    with pytest.raises(UserError, match="mine:lines has changed since"):
        build(made)
    sys.modules.pop("mine")
    (user_folder / "mine.py").write_text(LINES + "\n")
    with pytest.raises(UserError, match=r"other settings: code_sha256\.mine:lines: "):
        build(made)
