"""Prompts of chats and texts, and prompts as rows of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.generate.prompts import Prompts, as_rows
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text.config import DataConfig, GenerateConfig
from logitcask.pipeline.text.sources import Row, open_source

CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ m.content }}" + CALLS,
        "{{ m.content + '' }}" + CALLS,
        "{% if m.content is none %}" + CALLS + "{% else %}{{ m.content }}{% endif %}",
    ],
    ids=["a word", "refused", "asked for"],
)
def test_null_content_beside_calls_is_rendered_as_nothing(template: str) -> None:
    tokenizer = SyntheticTokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>" + template + "{% endfor %}"
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search"}}]},
        {"role": "tool", "content": "42"},
    ]
    config = DataConfig(
        path="x", messages_field="messages", generate=GenerateConfig(max_new_tokens=4)
    )
    (prompt,) = Prompts(tokenizer, config, 300).prompts([Row("a", None, messages)])
    assert tokenizer.decode(prompt.input_ids) == "<user>q<assistant>search<tool>42"


def test_a_text_to_continue_begins_with_one_bos() -> None:
    config = DataConfig(path="x", text_field="text", generate=GenerateConfig(max_new_tokens=4))
    rows = [Row("a", "hello", None), Row("b", "<|im_start|>hello", None)]
    plain, with_bos = Prompts(SyntheticTokenizer(), config, 300).prompts(rows)
    assert plain.input_ids.tolist() == with_bos.input_ids.tolist() == [256, *b"hello"]


USER = {"role": "user", "content": "how?"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHATS = [
    {"m": [USER]},
    {"m": [USER, {"role": "assistant", "content": "so"}], "f": [TOOL]},
    {"m": [{"role": "assistant", "content": "nobody asks"}]},
    {"m": [{"role": "system", "content": "é"}, USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]}, {"role": "tool", "content": "42"}]},
    {"m": [{"role": "user", "content": "long " * 99}]},
    {"m": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}, {"from": "human", "value": "why?"}]},
]  # fmt: skip
KINDS = {
    "chats": (CHATS, {"messages_field": "m", "tools_field": "f"}, 4),
    "no tools": (CHATS, {"messages_field": "m", "tools_field": False}, 4),
    "prompts": ([{"q": f"{n}?", "tools": [TOOL]} for n in range(3)], {"prompt_field": "q"}, 3),
    "texts": ([{"t": f"<|im_start|> {n}\n"} for n in range(3)], {"text_field": "t"}, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [None, 0, 2, 9])
def test_prompts_as_rows_are_the_same_prompts(tmp_path: Path, kind: str, skip: int | None) -> None:
    """Read again, they are the chosen ones, token for token and in their order."""
    rows, fields, count = KINDS[kind]
    tokenizer = SyntheticTokenizer()
    generate = {"max_new_tokens": 4, "skip_prompts": skip or 0}
    if skip is not None:
        generate["max_prompts"] = 3

    def prompts(name: str, rows: list[dict[str, Any]], **fields: Any) -> tuple[Prompts, Any]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = DataConfig.model_validate({"path": str(file), "max_length": 400, **fields})
        return Prompts(tokenizer, config, 300), open_source(config)

    first, source = prompts("rows", rows, generate=generate, **fields)
    expected = list(first.prompts(source))
    assert len(expected) == min(count, 3 if skip is not None else count)
    written = list(as_rows(first, source))
    known = {"text_field": "text"} if kind == "texts" else {"messages_field": "messages"}
    again = prompts("again", written, id_field="id", generate={"max_new_tokens": 4}, **known)
    found = list(again[0].prompts(again[1]))
    assert [each.row_id for each in found] == [each.row_id for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()


def test_rows_that_go_while_they_are_read() -> None:
    config = DataConfig(path="x", text_field="t", generate=GenerateConfig(max_new_tokens=4))
    rows = iter([Row("a", "hello", None), Row("b", "you", None)])  # an iterator is read once
    with pytest.raises(UserError, match="its row a is gone"):
        list(as_rows(Prompts(SyntheticTokenizer(), config, 300), rows))
