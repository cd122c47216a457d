"""Chats in the forms that people have them in, with the chat templates that models ship (those
that come with trl).
"""

from __future__ import annotations

import json
import logging
import os
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.text.chat_template import ChatTemplate
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row, open_source
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence

_TRL = find_spec("trl")
assert _TRL is not None
assert _TRL.origin is not None
TEMPLATES = {
    file.stem: file.read_text()
    for file in (Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")
}
EVERY_TEMPLATE = pytest.mark.parametrize("name", sorted(TEMPLATES))


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = {
        letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="Ā", eos_token="ā")
    found.chat_template = template
    return found


def config(path: object = "test", **data: Any) -> DataConfig:
    fields = {"messages_field": "messages", "max_length": 1 << 20}
    return DataConfig.model_validate({"path": str(path), **fields, **data})


def rows(tmp_path: Path, *records: dict[str, Any], **data: Any) -> list[Row]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(open_source(config(file, **data)))


def tokenise(
    template: str, given: list[Row], **data: Any
) -> tuple[list[Sequence], PreTrainedTokenizerFast]:
    found = tokenizer(template)
    return list(Tokenization(found, config(**data), len(found)).sequences(given)), found


def learnt(template: str, given: Row, **data: Any) -> str:
    (sequence,), found = tokenise(template, [given], **data)
    return str(found.decode(sequence.input_ids[sequence.loss_mask]))


def text(template: str, given: Row, **data: Any) -> str:
    (sequence,), found = tokenise(template, [given], **data)
    return str(found.decode(sequence.input_ids))


def outcome(template: str, given: list[Row]) -> Any:
    """Ids and masks of all chats, or the line that refuses them."""
    try:
        return [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in tokenise(template, given)[0]]
    except UserError as refusal:
        return str(refusal)


ARGUMENTS = {"city": "Oslo", "größe": [1, 2.5, True], "deep": {"a": ""}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "current weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "of a town"}},
        },
    },
}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "time",
        "description": "the time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "description": "of the earth"}},
        },
    },
}


def calling(arguments: object) -> list[dict[str, Any]]:
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    return [
        {"role": "user", "content": "weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "cold"},
        {"role": "assistant", "content": "It is cold."},
    ]


TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "alpha"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "omega"},
]


# --- content


@EVERY_TEMPLATE
def test_content_is_rendered(name: str) -> None:
    """Templates of image models take a list of parts; of text they make nothing, without a word."""
    template = ChatTemplate(tokenizer(TEMPLATES[name]), config())
    shown = template.render(template.prepared(TALK))
    assert [word for word in ("q1", "alpha", "q2", "omega") if shown.count(word) == 1] == [
        "q1",
        "alpha",
        "q2",
        "omega",
    ]


@EVERY_TEMPLATE
def test_a_chat_of_sharegpt_is_that_of_openai(name: str, tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": ARGUMENTS}
    sharegpt = [
        {"from": "human", "value": "weather in Oslo?"},
        {"from": "function_call", "value": json.dumps(call, ensure_ascii=False)},
        {"from": "observation", "value": "cold"},
        {"from": "gpt", "value": "It is cold."},
    ]
    openai = calling(ARGUMENTS)
    openai[1]["tool_calls"] = [{"type": "function", "function": call}]
    openai[2] = {"role": "tool", "content": "cold"}
    tools = json.dumps([TOOL])
    one, other = rows(
        tmp_path,
        {"messages": openai, "tools": [TOOL]},
        {"messages": sharegpt, "tools": tools},
    )
    assert (one.messages, one.tools) == (other.messages, other.tools)
    assert outcome(TEMPLATES[name], [one]) == outcome(
        TEMPLATES[name], [Row(one.row_id, None, other.messages, other.tools)]
    )
    if name == "qwen2_5":
        assert "Oslo" in learnt(TEMPLATES[name], other)


# --- arguments of calls


@EVERY_TEMPLATE
def test_arguments_as_json_text_are_the_object(name: str, tmp_path: Path) -> None:
    as_text = json.dumps(ARGUMENTS, ensure_ascii=False, separators=(",", ":"))
    one, other = rows(
        tmp_path, *({"messages": calling(arguments)} for arguments in (ARGUMENTS, as_text))
    )
    assert one.messages == other.messages
    assert outcome(TEMPLATES[name], [one]) == outcome(
        TEMPLATES[name], [Row(one.row_id, None, other.messages)]
    )


RENDERED = {
    "qwen2_5": '"arguments": {"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}}',
    "llama3_1": '"parameters": {"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}}',
    "llama3_2": '"parameters": {"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}}',
    "gptoss": '<|message|>{"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}<|call|>',
    "gemma4": 'call:weather{city:<|"|>Oslo<|"|>,deep:{a:<|"|><|"|>},größe:[1,2.5,true]}<tool_call|>',
    "qwen3_5_nothink": "<parameter=city>\nOslo\n</parameter>\n<parameter=größe>\n[1, 2.5, true]\n</parameter>",
    "glm4moe": "<arg_key>größe</arg_key>\n<arg_value>[1, 2.5, true]</arg_value>",
    # These two take JSON text alone.
    "deepseekv3_training": '```json\n{"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}\n```',
    "deepseek_r1_distill_training": '```json\n{"city": "Oslo", "größe": [1, 2.5, true], "deep": {"a": ""}}\n```',
}


@pytest.mark.parametrize("name", [name for name in RENDERED if name in TEMPLATES])
@pytest.mark.parametrize("form", ["object", "text"])
def test_arguments_are_written_once(name: str, form: str, tmp_path: Path) -> None:
    arguments = ARGUMENTS if form == "object" else json.dumps(ARGUMENTS)
    (row,) = rows(tmp_path, {"messages": calling(arguments)})
    assert RENDERED[name] in learnt(TEMPLATES[name], row)


PYTHON = (  # writes an object as Python does, so it asks for text
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_writes_objects_as_python_does_is_given_text(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"messages": calling({"city": "Oslo", "now": True})})
    assert learnt(PYTHON, row) == '{"city": "Oslo", "now": true}It is cold.'


def test_text_that_is_no_object_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    wrong = [
        '{"city": ',
        "Oslo",
        "[1]",
        '{"x": NaN}',
        "null",
        '"{}"',
        '{"x": "\\ud83d"}',
        "[" * 100_000,
    ]
    records = [{"messages": calling(arguments)} for arguments in ["{}", "", {}, *wrong]]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = open_source(config(file))
    assert [row.messages for row in source] == [calling({})] * 3
    assert source.counters == {
        "rows_read": 11,
        "rows_skipped_arguments_not_json": 7,
        "rows_skipped_broken_unicode": 1,
    }


def test_calls_without_a_function_around_them(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}
    (row,) = rows(
        tmp_path,
        {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]},
    )
    assert (row.messages or [])[1]["tool_calls"] == [
        {"name": "weather", "arguments": {"city": "Oslo"}}
    ]
    assert '"arguments": {"city": "Oslo"}}' in learnt(TEMPLATES["qwen2_5"], row)


@EVERY_TEMPLATE
def test_an_empty_list_of_calls_is_none(name: str, tmp_path: Path) -> None:
    one, other = rows(
        tmp_path,
        {"messages": TALK},
        {"messages": [{**message, "tool_calls": []} for message in TALK]},
    )
    assert one.messages == other.messages
    template = ChatTemplate(tokenizer(TEMPLATES[name]), config())
    assert "omega" in template.render(template.prepared(other.messages or []))


def test_the_form_before_tool_calls_is_counted(tmp_path: Path) -> None:
    """No template renders it: the turn would be learnt without its call."""
    old = {
        "role": "assistant",
        "content": "",
        "function_call": {"name": "weather", "arguments": "{}"},
    }
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"messages": [TALK[0], old]}) + "\n" + json.dumps({"messages": TALK})
    )
    source = open_source(config(file))
    assert [row.row_id for row in source] == ["train/1"]
    assert source.counters["rows_skipped_function_call"] == 1


def test_a_template_that_leaves_out_calls_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = rows(tmp_path, *[{"messages": calling({})}] * 2)
    tokenise(TEMPLATES["llama3"], given)
    assert [
        r.getMessage()
        for r in caplog.records
        if "does not render tool calls (first: train/0)" in r.getMessage()
    ]
    assert len(caplog.records) == 1
    caplog.clear()
    tokenise(TEMPLATES["llama3_1"], given)
    assert not caplog.records


# --- tool definitions


@EVERY_TEMPLATE
def test_tools_are_rendered_or_missed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = ChatTemplate(tokenizer(TEMPLATES[name]), config())
    (row,) = rows(tmp_path, {"messages": TALK[:2], "tools": [TOOL]})
    messages, tools = row.messages or [], row.tools
    reads = "tools" in TEMPLATES[name].replace("tools_prefix", "")
    rendered = template.render(messages, tools)
    template.check_tools(row.row_id, messages, tools)
    assert reads == ("current weather" in rendered)
    assert reads == (not caplog.records)


def forms(tmp_path: Path, tools: list[Any]) -> dict[str, list[Row]]:
    """The same two rows in every form in which tools are stored."""
    records = [{"messages": TALK[:2], "tools": tools}, {"messages": TALK}]
    as_text = [{**record, "tools": json.dumps(record.get("tools"))} for record in records]
    texts = [
        {**record, "tools": [json.dumps(tool) for tool in record.get("tools", [])]}
        for record in records
    ]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "d" / "train-0.parquet")
    pq.write_table(
        pa.Table.from_pylist(records[1:]).select(["messages"]), tmp_path / "d" / "train-1.parquet"
    )
    return {
        "objects": rows(tmp_path, *records),
        "text": rows(tmp_path, *as_text),
        "a list of texts": rows(tmp_path, *texts),
        "arrow": list(open_source(config(tmp_path / "a.parquet"))),
        "a column that one file lacks": list(open_source(config(tmp_path / "d"))),
    }


def test_tools_in_every_form_are_the_same(tmp_path: Path) -> None:
    """Arrow gives both tools the parameters of both, None for those that are not theirs."""
    for form, found in forms(tmp_path, [TOOL, OTHER_TOOL]).items():
        assert [row.tools for row in found] == [[TOOL, OTHER_TOOL], None], form
        shown = text(TEMPLATES["qwen2_5"], found[0])
        assert (
            shown.count('"properties": {"city": {"type": "string", "description": "of a town"}}')
            == 1
        )
        assert (
            shown.count('"properties": {"zone": {"type": "string", "description": "of the earth"}}')
            == 1
        )
        assert "# Tools" not in text(TEMPLATES["qwen2_5"], found[1])


@pytest.mark.parametrize("nothing", [None, [], "", " ", "[]", "null"])
def test_no_tools_are_none(nothing: object, tmp_path: Path) -> None:
    """Llama's templates take an empty list for tools."""
    (row,) = rows(tmp_path, {"messages": TALK, "tools": nothing})
    assert row.tools is None


def test_which_column_holds_tools(tmp_path: Path) -> None:
    record = {"messages": TALK, "tools": [TOOL], "functions": [OTHER_TOOL]}
    assert rows(tmp_path, record)[0].tools == [TOOL]
    assert rows(tmp_path, record, tools_field="functions")[0].tools == [OTHER_TOOL]
    assert rows(tmp_path, record, tools_field=False)[0].tools is None
    assert rows(tmp_path, record, messages_field="messages", id_field="tools")[0].tools is None
    with pytest.raises(
        UserError, match=r"has no column 'function' \(data\.tools_field\).*did you mean 'functions'"
    ):
        rows(tmp_path, record, tools_field="function")
    late = [{"messages": TALK}] * 1001 + [record]
    assert [row.tools for row in rows(tmp_path, *late)][-2:] == [None, [TOOL]], (
        "beyond what is read to find columns"
    )


def test_a_column_called_tools_that_holds_none(tmp_path: Path) -> None:
    for wrong in ("hammer", {"name": "f"}, [1], '"f"', 5, [{}]):
        with pytest.raises(
            UserError, match=r"column 'tools' should hold tool definitions.*data\.tools_field=false"
        ):
            rows(tmp_path, {"messages": TALK, "tools": wrong})
        assert len(rows(tmp_path, {"messages": TALK, "tools": wrong}, tools_field=False)) == 1


def test_prompts_are_given_tools(tmp_path: Path) -> None:
    found = tokenizer(TEMPLATES["qwen2_5"])
    for data in ({"messages_field": "messages"}, {"messages_field": None, "prompt_field": "q"}):
        settings: dict[str, Any] = {"generate": {"max_new_tokens": 4}, **data}
        given = rows(tmp_path, {"messages": TALK[:1], "q": "q1", "tools": [TOOL]}, **settings)
        (prompt,) = Prompts(found, config(**settings), len(found)).prompts(given)
        shown = found.decode(prompt.input_ids)
        assert "current weather" in shown
        assert shown.endswith("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n")


# --- what else a template is given


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"messages": TALK[:2]})
    given = {"template_arguments": {"date_string": "1 Apr 2020"}}
    assert "Today Date: 1 Apr 2020\n" in text(TEMPLATES["llama3_1"], row, **given)
    assert "Today Date: 26 Jul 2024\n" in text(TEMPLATES["llama3_1"], row)
    marked = TEMPLATES["qwen3_training"]
    found = tokenizer(marked)
    thinking = {"template_arguments": {"enable_thinking": False}, "generate": {"max_new_tokens": 4}}
    (prompt,) = Prompts(found, config(**thinking), len(found)).prompts([Row("a", None, TALK[:1])])
    assert found.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    bos = {"template_arguments": {"bos_token": "BOS"}}
    assert text(TEMPLATES["llama3_training"], row, **bos).startswith("BOS<|start_header_id|>")


def test_arguments_that_no_template_takes() -> None:
    with pytest.raises(
        UserError,
        match=r"data\.template_arguments has 'enable_thinkng', which the chat template does not",
    ):
        ChatTemplate(
            tokenizer(TEMPLATES["qwen3"]), config(template_arguments={"enable_thinkng": False})
        )
    for name in ("messages", "tools", "strftime_now", "tokenize"):
        with pytest.raises(ValueError, match=f"'{name}' is not for a config"):
            config(template_arguments={name: 1})
    for field, value in {
        "tools_field": "t",
        "template_arguments": {"a": 1},
        "template_date": "2026-01-01",
    }.items():
        with pytest.raises(ValueError, match=f"{field} is set, but documents"):
            config(messages_field=None, **{field: value})


# --- turns that are not to be learnt


@EVERY_TEMPLATE
def test_a_marked_turn_is_context(name: str, tmp_path: Path) -> None:
    talk = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    plain, row = rows(tmp_path, {"messages": TALK}, {"messages": talk})
    found, whole = (
        learnt_unless_unstable(TEMPLATES[name], row),
        learnt_unless_unstable(TEMPLATES[name], plain),
    )
    if whole is not None:
        assert text(TEMPLATES[name], row) == text(TEMPLATES[name], plain)
        assert "alpha" in whole
        assert found is not None
        assert whole.endswith(found)
    if found is not None:
        assert "alpha" not in found
        assert "omega" in found
        assert "alpha" in text(TEMPLATES[name], row)


def test_enough_templates_can_show_it() -> None:
    row = Row("a", None, TALK)
    assert (
        sum(learnt_unless_unstable(template, row) is not None for template in TEMPLATES.values())
        > 30
    )


def learnt_unless_unstable(template: str, given: Row) -> str | None:
    """None for a template that leaves out earlier thoughts; it is refused where all turns are
    learnt.
    """
    try:
        return learnt(template, given)
    except UserError as refusal:
        if "does not look ahead" in str(refusal):
            return None
        raise


MARKS: list[tuple[dict[str, Any], bool]] = [
    *(({"weight": weight}, bool(weight)) for weight in (0, 1, 0.0, 1.0, None)),
    *(({mark: value}, value) for mark in ("train", "training") for value in (True, False)),
    *(({mark: value}, not value) for mark in ("mask", "masked") for value in (True, False)),
    ({"weight": 1, "train": False}, False),
]


@pytest.mark.parametrize(
    ("mark", "is_learnt"), [(m, bool(v) if m != {"weight": None} else True) for m, v in MARKS]
)
def test_what_marks_say(mark: dict[str, Any], is_learnt: bool, tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"messages": [TALK[0], {**TALK[1], **mark}, *TALK[2:]]})
    assert row.unlearnt == (set() if is_learnt else {1})
    assert row.messages == TALK, "templates need not know of marks"


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"mask": [1]}], ids=str
)
def test_marks_that_say_neither_are_counted(mark: dict[str, Any], tmp_path: Path) -> None:
    (key,) = mark
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"messages": [TALK[0], {**TALK[1], **mark}]})
        + "\n"
        + json.dumps({"messages": TALK})
    )
    source = open_source(config(file))
    assert [row.row_id for row in source] == ["train/1"]
    assert source.counters[f"rows_skipped_{key}_not_0_or_1"] == 1


def test_marked_turns_are_counted() -> None:
    given = [
        Row("a", None, TALK, None, frozenset({1})),
        Row("b", None, TALK, None, frozenset({1, 3})),
        Row("c", None, TALK, None, frozenset({0, 2})),  # questions are context anyway
    ]
    found = tokenizer(TEMPLATES["qwen2_5"])
    tokenization = Tokenization(found, config(), len(found))
    assert [sequence.sequence_id for sequence in tokenization.sequences(given)] == ["a", "c"]
    assert tokenization.counters["turns_not_learnt"] == 1
    assert tokenization.counters["nothing_to_learn"] == 1


TWO_BLOCKS = (  # a template that marks an answer twice, but for short ones
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0] }}{% endgeneration %}"
    "{% if m.content[1:] %}{% generation %}{{ m.content[1:] }}{% endgeneration %}{% endif %}"
    "{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
)
NO_BLOCK_BUT_THE_LAST = (
    "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_blocks_that_are_not_one_for_each_turn() -> None:
    talk = [*TALK, TALK[0], {"role": "assistant", "content": "x"}]
    for unlearnt, expected in {
        (): "alphaomegax",
        (1,): "omegax",
        (3,): "alphax",
        (5,): "alphaomega",
    }.items():
        assert learnt(TWO_BLOCKS, Row("a", None, talk, None, frozenset(unlearnt))) == expected
    assert learnt(NO_BLOCK_BUT_THE_LAST, Row("a", None, TALK)) == "omega"
    with pytest.raises(UserError, match="chat a has turns that are not to be learnt, but"):
        learnt(NO_BLOCK_BUT_THE_LAST, Row("a", None, TALK, None, frozenset({1})))


# --- roles and forms


@EVERY_TEMPLATE
def test_a_developer_is_the_system_where_the_template_knows_none(name: str, tmp_path: Path) -> None:
    developer, system = rows(
        tmp_path,
        *(
            {"messages": [{"role": role, "content": "be kind"}, *TALK[:2]]}
            for role in ("developer", "system")
        ),
    )
    assert (developer.messages or [])[0]["role"] == "developer"
    template = ChatTemplate(tokenizer(TEMPLATES[name]), config())
    found = template.prepared(developer.messages or [])
    if "'developer'" in TEMPLATES[name] or '"developer"' in TEMPLATES[name]:
        assert found == developer.messages
        assert "be kind" in template.render(found)
    else:
        assert found == system.messages


def test_a_developer_is_no_question_and_needs_no_system_prompt(tmp_path: Path) -> None:
    settings = {"generate": {"max_new_tokens": 4, "system_prompt": "be brief"}}
    kind = {"role": "developer", "content": "be kind"}
    given = rows(tmp_path, {"messages": [kind]}, {"messages": [kind, TALK[0]]}, **settings)
    found = tokenizer(TEMPLATES["qwen2_5"])
    prompts = Prompts(found, config(**settings), len(found))
    (prompt,) = prompts.prompts(given)
    assert found.decode(prompt.input_ids).startswith(
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nq1"
    )
    assert prompts.counters["without_prompt"] == 1


# --- long chats


def long_talk(turns: int) -> list[dict[str, Any]]:
    return [{**m, "content": f"{m['content']} {turn} "} for turn in range(turns) for m in TALK[:2]]


def long_work(turns: int) -> list[dict[str, Any]]:
    call, answer = calling({"n": 1})[1:3]
    return [
        TALK[0],
        *(m for turn in range(turns) for m in (call, {**answer, "content": f"{turn}"})),
        TALK[1],
    ]


LONG = {
    "questions": lambda n: long_talk(n),
    "calls": lambda n: long_work(n),
    "both": lambda n: [
        {"role": "system", "content": "s"},
        *long_talk(2),
        *long_work(n),
        *long_talk(2),
        *long_work(2),
    ],
}


@EVERY_TEMPLATE
def test_windows_find_what_prefixes_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for messages in LONG.values():
        given = [Row("a", None, messages(3), [TOOL])]
        monkeypatch.setattr("logitcask.pipeline.text.chats._MANY_TURNS", 1)
        by_windows = outcome(TEMPLATES[name], given)
        monkeypatch.setattr("logitcask.pipeline.text.chats._MANY_TURNS", 1000)
        assert by_windows == outcome(TEMPLATES[name], given)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("qwen2_5", "llama3_1") for kind in LONG),
        *(
            ("llama3_2", "both"),
            ("qwen3_5_nothink", "calls"),
            ("gptoss", "calls"),
            ("gemma4", "questions"),
        ),
    ],
)
def test_the_cost_of_a_long_chat_is_linear(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = ChatTemplate.render

    def counting(self: ChatTemplate, messages: Any, *rest: Any, **options: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, *rest, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    messages = LONG[kind](50)
    tokenise(TEMPLATES[name], [Row("a", None, messages)])
    assert sum(rendered) < 25 * len(messages)


# --- dates

CLOCKS = [name for name, template in TEMPLATES.items() if "strftime_now" in template]
CLOCK = (
    "<{{ strftime_now('%d %b %Y') }}>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``on(2026, 1, 31)``: it is that day now."""
    return lambda *day: monkeypatch.setattr(
        "logitcask.pipeline.text.chat_template.today", lambda: date(*day)
    )


@pytest.mark.parametrize("name", CLOCKS)
def test_a_template_writes_the_day_it_is_told(name: str, on: Any) -> None:
    row = Row("a", None, TALK[:2])
    on(2026, 1, 31)
    first = text(TEMPLATES[name], row)
    told = text(TEMPLATES[name], row, template_date="2026-01-31")
    assert first == told
    assert "31 Jan 2026" in first or "2026-01-31" in first
    on(2026, 2, 1)
    assert text(TEMPLATES[name], row) != first
    assert text(TEMPLATES[name], row, template_date="2026-01-31") == first


@pytest.mark.parametrize("name", CLOCKS)
def test_but_for_the_day_nothing_changes(name: str) -> None:
    """Not a character, nor where the assistant's turns are: as transformers renders it on this
    day.
    """
    found = tokenizer(TEMPLATES[name])
    for _ in range(2):  # midnight may come between
        template = ChatTemplate(found, config())
        expected, rendered = found.apply_chat_template(TALK, tokenize=False), template.render(TALK)
        if expected == rendered:
            break
    assert rendered == expected
    if template.marks_answers:
        shown, spans = template.render_marked(TALK)
        assert shown == expected
        assert ["alpha" in shown[start:end] for start, end in spans] == [True, False]


def test_every_directive_of_a_clock() -> None:
    for format_ in ("%A %a %B %b %Y-%m-%d %y %H:%M:%S %j %p", "%-d. %-m., 100%%d %%", "today"):
        template = f"\n  {{{{ strftime_now('{format_}') }}}}|{{{{ strftime_now is defined }}}}"
        shown = ChatTemplate(tokenizer(template), config(template_date="2026-03-07")).render(TALK)
        assert shown == f"\n  {date(2026, 3, 7).strftime(format_)}|True"


def clock_build(tmp_path: Path, **data: Any) -> BuildConfig:
    (tmp_path / "clock.jinja").write_text(CLOCK)
    file = tmp_path / "chats.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(3)))
    fields = {"path": str(file), "messages_field": "messages", "max_length": 256}
    return BuildConfig.model_validate(
        {
            "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 300},
            "data": {**fields, "chat_template": str(tmp_path / "clock.jinja"), **data},
            "store": {"top_k": 4},
            "output": str(tmp_path / "cache"),
        }
    )


def touch(tmp_path: Path) -> None:
    os.utime(tmp_path / "chats.jsonl", ns=(1, 1))


def shown(tmp_path: Path) -> str:
    ids = CacheReader(tmp_path / "cache")[0].input_ids
    return bytes(ids[ids < 256].astype(np.uint8)).decode(errors="replace")


GENERATE = {"generate": {"max_new_tokens": 8}}


@pytest.mark.parametrize("data", [{}, GENERATE], ids=["chats", "generated"])
def test_a_cache_is_compared_with_the_rendering_of_its_day(
    data: dict[str, Any], tmp_path: Path, on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    on(2026, 1, 31)
    first = build(clock_build(tmp_path, **data)).manifest
    assert "writes today's date: it is 2026-01-31 for all of this cache" in caplog.text
    assert first.config["data"]["template_date"] == "2026-01-31"
    assert shown(tmp_path).startswith("<31 Jan 2026>")
    on(2026, 2, 1)
    assert build(clock_build(tmp_path, **data)).reused
    touch(tmp_path)
    assert build(clock_build(tmp_path, **data)).reused
    assert build(clock_build(tmp_path, template_date="2026-01-31", **data)).reused
    with pytest.raises(
        UserError, match=r"other settings: data\.template_date: \"2026-01-31\" -> \"2026-02-01\""
    ):
        build(clock_build(tmp_path, template_date="2026-02-01", **data))
    again = build(clock_build(tmp_path, **data), restart=True).manifest
    assert again.config["data"]["template_date"] == "2026-02-01"
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize("step", ["run.score_shards", "planner.write_sequences"])
def test_a_build_goes_on_the_next_day_with_the_date_it_began_with(
    step: str, tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    on(2026, 1, 31)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"logitcask.pipeline.builder.{step}", stop)
        build(clock_build(tmp_path, **GENERATE))
    on(2026, 2, 1)
    with pytest.raises(
        UserError,
        match=r"unfinished build with other settings: data\.template_date: \"2026-01-31\" -> \"2026-",
    ):
        build(clock_build(tmp_path, template_date="2026-02-02", **GENERATE))
    manifest = build(clock_build(tmp_path, **GENERATE)).manifest
    assert manifest.config["data"]["template_date"] == "2026-01-31"
    assert shown(tmp_path).startswith("<31 Jan 2026>")


def test_a_cache_of_a_version_that_wrote_down_no_date(tmp_path: Path, on: Any) -> None:
    """The day on which it was finished is tried."""
    day = date.fromisoformat(build(clock_build(tmp_path)).manifest.created_at[:10])
    on(day.year, day.month, day.day)
    build(clock_build(tmp_path), restart=True)
    file = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(file.read_text())
    for field in ("template_date", "template_arguments", "tools_field"):
        del manifest["config"]["data"][field]
    file.write_text(json.dumps(manifest))
    on(2030, 1, 1)
    touch(tmp_path)
    assert build(clock_build(tmp_path)).reused


def test_a_date_for_a_template_without_a_clock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(clock_build(tmp_path, chat_template=None, template_date="2026-01-31"))
    assert "data.template_date changes nothing" in caplog.text
