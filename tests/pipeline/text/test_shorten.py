"""Texts above ``max_length`` that lose their beginning, against the same cuts made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text import long_texts as long_texts_module
from logitcask.pipeline.text import tokenize as tokenize_module
from logitcask.pipeline.text.rejects import Reject
from logitcask.pipeline.text.shorten import tail, without_oldest_turns
from logitcask.pipeline.text.sources import Row
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence
from tests.pipeline.text.test_tokenize import (
    BEGINNINGS,
    CHATML,
    LLAMA,
    MARKED,
    PLAIN_OFFSETS,
    VOCAB,
    documents,
    settings_for,
    tokenise,
    with_template,
)

Chat = list[dict[str, Any]]


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def random_chat(rng: np.random.Generator, *, system: bool) -> Chat:
    """Rounds of one or two questions, answers, and now and then a tool."""
    words = ["the user asks", "hello world", "12 + 30", "é🙂", "assistant"]

    def some(role: str) -> dict[str, Any]:
        return message(role, " ".join(rng.choice(words, rng.integers(1, 6))))

    chat = [some("system")] if system else []
    for _ in range(rng.integers(1, 9)):
        chat += [some("user") for _ in range(rng.integers(1, 3))]
        if rng.random() < 0.3:
            chat += [some("assistant"), some("tool")]
        chat.append(some("assistant"))
    return chat


def rounds_of(chat: Chat) -> tuple[Chat, list[Chat]]:
    """The system prompt, and the rounds behind it."""
    lead = chat[:1] if chat[0]["role"] == "system" else []
    rounds: list[Chat] = []
    for before, each in zip([None, *chat], chat, strict=False):
        if each in lead and not rounds:
            continue
        begins = each["role"] == "user" and (before is None or before["role"] != "user")
        if begins or not rounds:
            rounds.append([])
        rounds[-1].append(each)
    return lead, rounds


def tokenise_reporting(
    tokenizer: Any, rows: list[Row], **data: Any
) -> tuple[list[Sequence], dict[str, int], list[Reject]]:
    rejects: list[Reject] = []
    tokenization = Tokenization(tokenizer, settings_for(**data), VOCAB)
    tokenization.report = rejects.append
    return list(tokenization.sequences(rows)), tokenization.counters, rejects


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("long", [False, True])
def test_the_oldest_turns_are_dropped(
    template: str, long: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every number of rounds tried in turn, the shortened chat tokenised as one that fits."""
    if long:
        monkeypatch.setattr(tokenize_module, "LONG", 30)
    tokenizer = with_template(template)
    seen = {"whole": 0, "shortened": 0, "dropped": 0}
    for number in range(25):
        chat = random_chat(rng, system=bool(number % 2))
        unlearnt = frozenset(i for i in range(len(chat)) if rng.random() < 0.2)
        limit = int(rng.integers(15, 150)) if number % 5 else 10_000
        row, filler = (
            Row("train/0", None, chat, None, unlearnt),
            Row("train/1", None, [message("user", "a"), message("assistant", "b")]),
        )
        found, counters, rejects = tokenise_reporting(
            tokenizer, [row, filler], messages_field="m", overlong="drop_turns", max_length=limit
        )
        found = [sequence for sequence in found if sequence.sequence_id == "train/0"]
        rejects = [reject for reject in rejects if reject.name == "train/0"]
        lead, rounds = rounds_of(chat)
        marks = [i in unlearnt for i in range(len(chat))]
        expected: Sequence | None = None
        fitted = False
        for gone in range(len(rounds)):
            skipped = sum(map(len, rounds[:gone]))
            kept = lead + [m for each in rounds[gone:] for m in each]
            kept_marks = marks[: len(lead)] + marks[len(lead) + skipped :]
            again = Row("train/0", None, kept, None, frozenset(np.flatnonzero(kept_marks).tolist()))
            made, _ = tokenise(tokenizer, [again, filler], messages_field="m")
            text = tokenizer.apply_chat_template(kept, tokenize=False)
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= limit:
                expected = next((s for s in made if s.sequence_id == "train/0"), None)
                fitted = True
                break
        if not any(m["role"] == "assistant" and not k for m, k in zip(chat, marks, strict=True)):
            assert rejects == [Reject("train/0", "nothing_to_learn")]
            continue
        if not fitted:
            assert rejects == [
                Reject("train/0", "dropped_overlong", "its last turn alone is longer")
            ]
            seen["dropped"] += 1
        elif expected is None:
            assert [reject.reason for reject in rejects] == ["nothing_to_learn"]
        else:
            (sequence,) = found
            assert sequence.input_ids.tolist() == expected.input_ids.tolist()
            assert sequence.loss_mask.tolist() == expected.loss_mask.tolist()
            assert counters.get("messages_dropped", 0) == skipped
            detail = f"{skipped} of {len(chat)} messages dropped"
            assert rejects == ([Reject("train/0", "shortened", detail)] if skipped else [])
            seen["shortened" if skipped else "whole"] += 1
    assert min(seen.values()) > 0, f"the test does not see all cases: {seen}"


def test_system_prompts_and_tools_stay() -> None:
    chat = [
        message("system", "s"),
        message("developer", "d"),
        message("assistant", "welcome"),
        *(message("user", "1"), message("assistant", "a"), message("tool", "t")),
        *(message("assistant", "b"), message("user", "2"), message("assistant", "c")),
    ]
    tools = [{"type": "function"}]
    row = Row("train/0", None, chat, tools, frozenset({2, 8}))
    assert without_oldest_turns(row) == [
        Row("train/0", None, chat[:2] + chat[3:], tools, frozenset({7})),
        Row("train/0", None, chat[:2] + chat[7:], tools, frozenset({3})),
    ]
    assert without_oldest_turns(Row("x", None, chat[:2])) == []


def test_a_shortened_chat_that_the_template_refuses() -> None:
    tokenizer = with_template(
        "{% if messages | length == 2 %}{{ raise_exception('too short') }}{% endif %}" + MARKED
    )
    chat = [message("user", "hello world " * 9), message("assistant", "12")] * 2
    fits = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    _, counters, rejects = tokenise_reporting(
        tokenizer,
        [Row("train/0", None, chat), Row("train/1", None, fits)],
        messages_field="m",
        overlong="drop_turns",
        max_length=30,
    )
    assert rejects == [Reject("train/0", "refused_by_template", "too short")]
    assert counters["refused_by_template"] == 1


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["no BOS", "BOS"])
def test_the_end_of_a_chat(
    template: str, long: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(template)
    bos = [tokenizer.bos_token_id] if template == LLAMA else []
    for _ in range(10):
        row = Row("train/0", None, random_chat(rng, system=True))
        (whole,), _ = tokenise(tokenizer, [row], messages_field="m")
        for limit in range(12, len(whole.input_ids) + 2, 7):
            with monkeypatch.context() as patch:
                if long:
                    patch.setattr(tokenize_module, "LONG", 10)
                    patch.setattr(long_texts_module, "_WINDOW", 160)
                    patch.setattr(long_texts_module, "_OVERLAP", 64)
                (found,), counters, rejects = tokenise_reporting(
                    tokenizer,
                    [row],
                    messages_field="m",
                    overlong="truncate_left",
                    max_length=limit,
                )
            cut = len(whole.input_ids) > limit
            room = limit - len(bos) if cut else len(whole.input_ids)
            front = bos if cut else []
            ids = [*front, *whole.input_ids[-room:].tolist()]
            mask = [*([False] * len(front)), *whole.loss_mask[-room:].tolist()]
            assert found.input_ids.tolist() == ids
            assert found.loss_mask.tolist() == [False, *mask[1:]]
            assert counters.get("truncated_left", 0) == cut
            assert rejects == [Reject("train/0", "truncated_left")] * cut


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("name", ["none", *BEGINNINGS])
@pytest.mark.parametrize("form", ["document", "completion"])
def test_the_end_of_a_document(
    name: str, append_eos: bool, form: str, rng: np.random.Generator
) -> None:
    """Behind the tokens that the tokenizer puts in front of every text."""
    tokenizer = BEGINNINGS.get(name, PLAIN_OFFSETS)
    front = {"none": [], "two tokens": ["<|im_start|>", "<bos>"]}.get(name, ["<bos>"])
    front = tokenizer.convert_tokens_to_ids(front)
    data: dict[str, Any] = {"overlong": "truncate_left", "append_eos": append_eos}
    if form == "completion":
        data |= {"text_field": "p", "completion_field": "c"}
    for _ in range(20):
        text = " ".join(rng.choice(["hello", "user", "é", "12"], rng.integers(2, 30)))
        at = int(rng.integers(1, len(text)))
        row = Row("train/0", text, None)
        if form == "completion":
            row = Row("train/0", text[:at], None, completion=text[at:])
        ids = tokenizer(text)["input_ids"]
        ids += [tokenizer.eos_token_id] * (append_eos and ids[-1] != tokenizer.eos_token_id)
        limit = int(rng.integers(len(front) + 2, len(front) + 30))
        (found,), counters, rejects = tokenise_reporting(tokenizer, [row], max_length=limit, **data)
        cut = len(ids) > limit
        expected = [*front, *ids[len(front) - limit :]] if cut else ids
        assert found.input_ids.tolist() == expected
        assert counters.get("truncated_left", 0) == cut
        assert rejects == [Reject("train/0", "truncated_left")] * cut
        learnt = len(front) or 1
        if form == "completion":
            (whole,), _ = tokenise(tokenizer, [row], **(data | {"overlong": "truncate"}))
            gone = len(ids) - len(expected)
            mask = [False] * len(front) + whole.loss_mask[gone + len(front) :].tolist()
            assert found.loss_mask.tolist() == [False, *mask[1:]]
        elif cut:
            assert found.loss_mask.tolist() == [i >= learnt for i in range(len(expected))]


def test_there_is_no_room_behind_the_beginning() -> None:
    with pytest.raises(UserError, match="leaves no room for text"):
        tokenise(
            BEGINNINGS["two tokens"],
            documents(["hello world"]),
            overlong="truncate_left",
            max_length=2,
        )


def test_the_tail_of_a_stream(rng: np.random.Generator) -> None:
    for _ in range(50):
        sizes = rng.integers(0, 6, 10).tolist()
        ids = np.arange(sum(sizes), dtype=np.int32)
        offsets = np.stack([ids, ids + 1], axis=1).astype(np.int64)
        ends = np.cumsum(sizes)
        parts = [(ids[e - n : e], offsets[e - n : e]) for n, e in zip(sizes, ends, strict=True)]
        length = int(rng.integers(1, 20))
        found = tail(iter(parts), length)
        np.testing.assert_array_equal(found[0], ids[-length:])
        np.testing.assert_array_equal(found[1], offsets[-length:])


@pytest.mark.parametrize(
    ("overlong", "reason"),
    [
        ("split", "prompt_too_long"),
        ("truncate", "prompt_too_long"),
        ("drop", "dropped_overlong"),
        ("drop_turns", "dropped_overlong"),
    ],
)
def test_a_prompt_that_is_too_long_is_no_chat_without_an_answer(overlong: str, reason: str) -> None:
    question, answer = message("user", "hello world " * 20), message("assistant", "12")
    rows = [
        Row("long prompt", None, [question, answer]),
        Row("no answer", None, [message("user", "a")]),
        Row("empty answer", None, [message("user", "a"), message("assistant", "")]),
        Row("long, no answer", None, [question]),
        Row("good", None, [message("user", "a"), answer]),
    ]
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    found, _, rejects = tokenise_reporting(
        tokenizer, rows, messages_field="m", overlong=overlong, max_length=40
    )
    assert [sequence.sequence_id for sequence in found] == ["good"]
    assert {reject.name: reject.reason for reject in rejects} == {
        "long prompt": reason,
        "no answer": "nothing_to_learn",
        "empty answer": "nothing_to_learn",
        "long, no answer": "nothing_to_learn",
    }
