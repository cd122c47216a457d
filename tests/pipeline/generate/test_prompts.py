"""Prompts of chats in which the assistant has called tools."""

from __future__ import annotations

import pytest

from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text.config import DataConfig, GenerateConfig
from logitcask.pipeline.text.sources import Row

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
