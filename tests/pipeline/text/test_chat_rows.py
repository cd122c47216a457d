"""Chats as rows hold them: the one form they come out in, and what is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row, open_source

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}

Records = list[dict[str, Any]]


def json_lines(records: Records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def rows_of(path: object, **settings: Any) -> list[Row]:
    return list(open_source(DataConfig(path=str(path), **settings)))


def message_of(path: object, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_chats(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    }
    records = [
        {"messages": [HI, YO]},
        {"messages": None},
        {"messages": []},
        {"messages": "text"},
        {"messages": [HI, "yo"]},
        {"messages": [{"from": "somebody", "value": "hi"}]},
        {"messages": [HI, {"role": "gpt", "content": "yo"}]},
        {"messages": [HI, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": "half \ud83d"}, YO]},
        {"messages": [HI, call, {"role": "tool", "content": "2"}, YO]},
        {"messages": json.dumps([HI, YO])},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl"), messages_field="messages"))
    rows = list(source)
    assert [row.row_id for row in rows] == ["train/0", "train/9", "train/10"]
    assert [row.text for row in rows] == [None] * 3
    assert rows[0].messages == rows[2].messages == [HI, YO]
    assert rows[1].messages == [HI, call, {"role": "tool", "content": "2"}, YO]
    assert source.counters == {
        "rows_read": 11,
        "rows_skipped_null": 1,
        "rows_skipped_empty": 1,
        "rows_skipped_not_a_chat": 2,
        "rows_skipped_unknown_role": 2,
        "rows_skipped_null_content": 1,
        "rows_skipped_broken_unicode": 1,
    }


def test_keys_that_arrow_filled_with_none_are_taken_out(tmp_path: Path) -> None:
    chat = [HI, {**YO, "name": "bot"}]
    pq.write_table(pa.Table.from_pylist([{"chat": chat}]), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet", messages_field="chat")
    assert row.messages == chat


# --- ShareGPT


NAMES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@pytest.mark.parametrize("speaker", NAMES)
def test_the_names_of_sharegpt(speaker: str, tmp_path: Path) -> None:
    chat = [
        {"from": "human", "value": "hi"},
        {"from": speaker, "value": "x", "name": "n"},
        {"from": "gpt", "value": "yo"},
    ]
    for name in ("a.jsonl", "a.parquet", "strings.jsonl"):
        record = {"conversations": json.dumps(chat) if name == "strings.jsonl" else chat}
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist([record]), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(json_lines([record]))
        (row,) = rows_of(tmp_path / name, messages_field="conversations")
        assert row.messages == [HI, {"role": NAMES[speaker], "content": "x", "name": "n"}, YO]


def test_both_forms_in_one_column(tmp_path: Path) -> None:
    """Arrow gives every message the keys of both."""
    chats = [[HI, YO], [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]]
    table = pa.Table.from_pylist([{"chat": chat} for chat in (chats[0] + chats[1], *chats)])
    pq.write_table(table, tmp_path / "a.parquet")
    found = [row.messages for row in rows_of(tmp_path / "a.parquet", messages_field="chat")]
    assert found == [[HI, YO, HI, YO], [HI, YO], [HI, YO]]


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        '[{"name": "f", "arguments": {"x": 1}}]',
        {"name": "f", "arguments": {"x": 1}},
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
    ],
)
def test_a_function_call_of_sharegpt(value: object, tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": value}]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"chat": chat}]))
    (row,) = rows_of(tmp_path / "a.jsonl", messages_field="chat")
    assert row.messages == [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def test_what_is_no_message_of_sharegpt(tmp_path: Path) -> None:
    calls: list[Any] = ["f(x)", "", "[]", "[1]", "{}", '{"name": null}', None, "NaN", "[" * 100_000]
    wrong: list[Any] = [
        *({"from": "function_call", "value": value} for value in calls),
        {"from": "function_call", "value": '{"name": "f", "arguments": "x"}'},
        {"from": 5, "value": "x"},
        {"from": "bing", "value": "x"},
        {"from": "gpt", "value": None},
        {"from": "gpt"},
        {"from": "gpt", "value": {"a": 1}},
        {"from": "gpt", "value": "x", "weight": 0.5},
    ]
    good = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([*({"chat": [good[0], each]} for each in wrong), {"chat": good}])
    )
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl"), messages_field="chat"))
    assert [row.messages for row in source] == [[HI, YO]]
    assert source.counters == {
        "rows_read": len(wrong) + 1,
        "rows_skipped_function_call_not_json": len(calls),
        "rows_skipped_arguments_not_json": 1,
        "rows_skipped_unknown_role": 2,
        "rows_skipped_null_content": 2,
        "rows_skipped_content_not_text": 1,
        "rows_skipped_weight_not_0_or_1": 1,
    }


# --- content


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_content_is_text_or_the_row_is_skipped(tmp_path: Path) -> None:
    """A template writes what it is given, a list or a dict too, and a student would learn that."""
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    contents: list[Any] = [
        *(
            parts("one"),
            parts("one", " two", ""),
            [{**parts("a")[0], "cache_control": {"type": "ephemeral"}}],
        ),
        *([*parts("see"), image], [image], {"type": "text", "text": "a"}, 5, 0, False, ["a"]),
        *([{"type": "text", "text": None}], [{"type": "text"}], [{"text": "a"}], [None]),
    ]
    records = [{"chat": [HI, {"role": "assistant", "content": content}]} for content in contents]
    records.append({"chat": [{"role": "user", "content": parts("hi")}, YO]})
    for name, write in (
        ("a.jsonl", lambda record: record),
        ("strings.jsonl", lambda record: {"chat": json.dumps(record["chat"])}),
    ):
        (tmp_path / name).write_bytes(json_lines([write(record) for record in records]))
        source = open_source(DataConfig(path=str(tmp_path / name), messages_field="chat"))
        rows = list(source)
        assert [row.messages[1]["content"] for row in rows if row.messages] == [
            "one",
            "one two",
            "a",
            "yo",
        ]
        assert rows[-1].messages == [HI, YO]
        assert source.counters == {"rows_read": 15, "rows_skipped_content_not_text": 11}


def test_content_may_be_missing_beside_calls_only(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [CALL]}
    records = [
        *([HI, call], [HI, {**call, "content": None}], [HI, {**call, "content": parts("")}]),
        *([HI, {**call, "tool_calls": []}], [HI, {**call, "tool_calls": None, "content": None}]),
        *([HI, {"role": "assistant", "content": None, "tool_calls": []}], [{"role": "user"}, YO]),
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"chat": record} for record in records]))
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl"), messages_field="chat"))
    null = [HI, {**call, "content": None}]
    assert [row.messages for row in source] == [null, null, [HI, {**call, "content": ""}]]
    assert source.counters == {
        "rows_read": 7,
        "rows_skipped_not_a_chat": 2,
        "rows_skipped_null_content": 2,
    }


def test_what_arrow_filled_in_is_taken_out_at_every_depth(tmp_path: Path) -> None:
    other = {
        "type": "function",
        "function": {"name": "g", "arguments": {"y": [{"z": 1}, {"w": 2}]}},
    }
    chat = [
        {"role": "user", "content": parts("hi")},
        {"role": "assistant", "content": None, "tool_calls": [CALL, other]},
        {"role": "tool", "content": [{**parts("2")[0], "cache_control": "no"}]},
        {"role": "assistant", "content": parts("yo")},
    ]
    pq.write_table(pa.Table.from_pylist([{"chat": chat}]), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet", messages_field="chat")
    assert row.messages == [HI, chat[1], {"role": "tool", "content": "2"}, YO]


@pytest.mark.parametrize(
    "message",
    [
        {**YO, "name": "\ud83d"},
        {**YO, "\ud83d": 1},
        {"role": "assistant", "content": parts("a", "\ud83d")},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": '"\ud83d"'}}],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"arguments": {"x": ["\ud83d"]}}}],
        },
    ],
    ids=["name", "key", "part", "arguments", "nested"],
)
def test_half_a_surrogate_pair_anywhere_in_a_chat(tmp_path: Path, message: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(
        f"{json.dumps({'chat': [HI, message]})}\n{json.dumps({'chat': [HI, YO]})}\n"
    )
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl"), messages_field="chat"))
    assert [row.messages for row in source] == [[HI, YO]]
    assert source.counters == {"rows_read": 2, "rows_skipped_broken_unicode": 1}


def test_chats_nested_too_deeply(tmp_path: Path) -> None:
    deep = "[" * 100_000
    nested: Any = "x"
    for _ in range(400):  # JSON can be read so deep, but not what is in it
        nested = {"a": [nested]}
    records = [{"chat": deep}, {"chat": [HI, {**YO, "tool_calls": nested}]}, {"chat": [HI, YO]}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl"), messages_field="chat"))
    assert [row.row_id for row in source][-1] == "train/2"
    assert source.counters["rows_skipped_not_a_chat"] >= 1
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": ' + deep + "\n")
    assert "b.jsonl, line 2: not JSON (nested too deeply)" in message_of(tmp_path / "b.jsonl")
