"""Tokenisation with real byte-level BPE tokenizers: the ids, the loss masks token by token, and
every limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text import tokenize as tokenize_module
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row, open_source
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence

SPECIALS = [
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
CORPUS = [
    "the user asks and the assistant answers the user",
    "system\nmodel\nassistant\nuser\ntool\n",
    "hello world. 12 + 30 = 42",
    "world\nif a:\n        b\n    c    d",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (  # no special token at all, and the header runs into the answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
FORGETFUL = (  # shows the thoughts of the last turn only, as templates of thinking models do
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )


PLAIN_OFFSETS, TRIMMED_OFFSETS = byte_level(), byte_level(trim_offsets=True)
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [PLAIN_OFFSETS, TRIMMED_OFFSETS], ids=["offsets", "trimmed offsets"]
)
VOCAB = len(PLAIN_OFFSETS)


def settings_for(**data: Any) -> DataConfig:
    return DataConfig(path="test", **{"max_length": 4096, **data})


def documents(texts: Iterable[str]) -> list[Row]:
    return [Row(f"train/{i}", text, None) for i, text in enumerate(texts)]


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def chats(*conversations: list[dict[str, Any]]) -> list[Row]:
    return [Row(f"train/{i}", None, conversation) for i, conversation in enumerate(conversations)]


def with_template(
    template: str, tokenizer: PreTrainedTokenizerFast = PLAIN_OFFSETS
) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    copy.chat_template = template
    return copy


def tokenise(
    tokenizer: Any, rows: list[Row], vocab_size: int = VOCAB, **data: Any
) -> tuple[list[Sequence], dict[str, int]]:
    tokenization = Tokenization(tokenizer, settings_for(**data), vocab_size)
    return list(tokenization.sequences(rows)), tokenization.counters


def tokenise_chat(
    template: str, messages: list[dict[str, Any]], tokenizer: Any = PLAIN_OFFSETS
) -> Sequence:
    (sequence,), _ = tokenise(
        with_template(template, tokenizer), chats(messages), messages_field="messages"
    )
    return sequence


def learnt(sequence: Sequence, tokenizer: Any = PLAIN_OFFSETS) -> list[str]:
    """The runs of learnt tokens, as text."""
    runs: list[list[int]] = []
    for position, token in enumerate(sequence.input_ids.tolist()):
        if sequence.loss_mask[position]:
            if position == 0 or not sequence.loss_mask[position - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


# --- documents


def test_documents_are_learnt_but_for_their_first_token() -> None:
    texts = ["the user asks", "é🙂 the", "x"]
    sequences, counters = tokenise(PLAIN_OFFSETS, documents(texts))
    for text, sequence in zip(texts, sequences, strict=True):
        assert PLAIN_OFFSETS.decode(sequence.input_ids) == text
        assert sequence.input_ids.dtype == np.int32
        assert sequence.loss_mask.dtype == np.bool_
        assert sequence.loss_mask.tolist() == [False] + [True] * (len(sequence.input_ids) - 1)
    assert [s.sequence_id for s in sequences] == ["train/0", "train/1", "train/2"]
    tokens = sum(len(s.input_ids) for s in sequences)
    assert counters == {
        "documents": 3,
        "sequences": 3,
        "tokens": tokens,
        "kept_positions": tokens - 3,
        "stopped_at_max_tokens": 0,
    }


texts_of_documents = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=8
)


def beginning_with(*specials: str, end: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer that puts these in front of every text, as Llama 3's and Gemma's put BOS, and
    ``end`` behind it.
    """
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join((*specials, "$A", end)).strip(),
        special_tokens=[
            (name, tokenizer.convert_tokens_to_ids(name)) for name in {*specials, end} - {""}
        ],
    )
    return tokenizer


BEGINNINGS = {
    "BOS": beginning_with("<bos>"),
    "two tokens": beginning_with("<|im_start|>", "<bos>"),
    "BOS and EOS": beginning_with("<bos>", end="<eos>"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
@settings(deadline=None, max_examples=40)
@given(texts=texts_of_documents, room=st.integers(1, 9), append_eos=st.booleans())
def test_every_piece_begins_with_what_the_tokenizer_puts_in_front(
    name: str, texts: list[str], room: int, append_eos: bool
) -> None:
    """Without it a teacher that has never seen a text without BOS would score all but the start
    of a long document.
    """
    tokenizer = BEGINNINGS[name]
    front = tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<bos>"] if name == "two tokens" else ["<bos>"]
    )
    n, max_length = len(front), len(front) + room
    sequences, counters = tokenise(
        tokenizer, documents(texts), max_length=max_length, append_eos=append_eos
    )
    assert counters["documents"] == len(texts)
    by_row: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        by_row.setdefault("/".join(sequence.sequence_id.split("/")[:2]), []).append(sequence)
    for (row, parts), text in zip(by_row.items(), texts, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids += [tokenizer.eos_token_id] * (append_eos and ids[-1] != tokenizer.eos_token_id)
        assert all(part.input_ids[:n].tolist() == front for part in parts)
        assert sum((part.input_ids[n:].tolist() for part in parts), front) == ids
        assert all(len(part.input_ids) == max_length for part in parts[:-1])
        assert n < len(parts[-1].input_ids) <= max_length
        numbered = [f"{row}/{number}" for number in range(len(parts))]
        assert [part.sequence_id for part in parts] == (numbered if len(parts) > 1 else [row])
        # The start of the document is as it is in a document that fits; what is repeated is learnt
        # by nobody.
        assert parts[0].loss_mask.tolist() == [False] + [True] * (len(parts[0].input_ids) - 1)
        for part in parts[1:]:
            assert part.loss_mask.tolist() == [False] * n + [True] * (len(part.input_ids) - n)


def test_pieces_begin_with_nothing_where_nothing_is_added() -> None:
    texts = ["!" * 9, "the user asks and the assistant answers"]
    for tokenizer, data in (
        (PLAIN_OFFSETS, {}),
        (BEGINNINGS["BOS"], {"add_special_tokens": False}),
    ):
        sequences, _ = tokenise(tokenizer, documents(texts), max_length=4, **data)
        for part in sequences:
            assert tokenizer.bos_token_id not in part.input_ids
            assert part.loss_mask.tolist() == [False] + [True] * (len(part.input_ids) - 1)
        assert [len(s.input_ids) for s in sequences if s.sequence_id.startswith("train/0/")] == [
            4,
            4,
            1,
        ]


@pytest.mark.parametrize(("name", "max_length"), [("BOS", 1), ("two tokens", 1), ("two tokens", 2)])
def test_pieces_without_room_for_text(name: str, max_length: int) -> None:
    with pytest.raises(
        UserError, match=rf"leaves no room for text; raise data\.max_length \({max_length}\)"
    ) as caught:
        tokenise(BEGINNINGS[name], documents(["!!"]), max_length=max_length)
    assert "\n" not in str(caught.value)
    sequences, _ = tokenise(
        BEGINNINGS[name], documents(["!!"]), max_length=max_length, overlong="truncate"
    )
    assert [len(s.input_ids) for s in sequences] == [max_length]


def test_what_is_in_front_is_found_where_a_letter_has_no_token() -> None:
    from tokenizers import normalizers

    tokenizer = beginning_with("<bos>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    sequences, _ = tokenise(tokenizer, documents(["!" * 5]), max_length=3)
    assert [tokenizer.decode(s.input_ids) for s in sequences] == ["<bos>!!", "<bos>!!", "<bos>!"]


@settings(deadline=None, max_examples=60)
@given(texts=texts_of_documents, max_length=st.integers(1, 12), append_eos=st.booleans())
def test_pieces_together_are_the_document(
    texts: list[str], max_length: int, append_eos: bool
) -> None:
    sequences, counters = tokenise(
        PLAIN_OFFSETS, documents(texts), max_length=max_length, append_eos=append_eos
    )
    expected: list[tuple[str, list[int]]] = []
    for number, text in enumerate(texts):
        ids = PLAIN_OFFSETS(text)["input_ids"] + [PLAIN_OFFSETS.eos_token_id] * append_eos
        pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        name = f"train/{number}"
        expected += [
            (f"{name}/{i}" if len(pieces) > 1 else name, piece) for i, piece in enumerate(pieces)
        ]
    assert [(s.sequence_id, s.input_ids.tolist()) for s in sequences] == expected
    assert counters["sequences"] == len(expected)
    assert counters.get("pieces", 0) == sum(name.count("/") == 2 for name, _ in expected)
    assert counters.get("split_documents", 0) == sum(
        name.endswith("/0") and name.count("/") == 2 for name, _ in expected
    )
    assert counters["documents"] == len(texts)


@pytest.mark.parametrize(
    ("overlong", "lengths", "counts"),
    [
        ("split", [8, 8, 1], {"documents": 2, "split_documents": 1, "pieces": 2}),
        ("truncate", [8, 8], {"documents": 2, "truncated": 1}),
        ("drop", [8], {"documents": 1, "dropped_overlong": 1}),
    ],
)
def test_a_document_of_max_length_is_not_overlong(
    overlong: Any, lengths: list[int], counts: dict[str, int]
) -> None:
    sequences, counters = tokenise(
        PLAIN_OFFSETS, documents(["!" * 8, "!" * 9]), max_length=8, overlong=overlong
    )
    assert [len(s.input_ids) for s in sequences] == lengths
    assert counts.items() <= counters.items()
    assert {
        "split_documents",
        "pieces",
        "truncated",
        "dropped_overlong",
    } & counters.keys() == counts.keys() - {"documents"}


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("long", [False, True])
def test_a_text_that_has_the_special_tokens_already_gets_no_second_ones(
    name: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BEGINNINGS[name]
    if long:
        monkeypatch.setattr(tokenize_module, "LONG", 3)
    (plain,), _ = tokenise(tokenizer, documents(["hello world"]))
    start = tokenizer.decode(plain.input_ids).partition("hello")[0]
    end = tokenizer.decode(plain.input_ids).partition("world")[2]
    for text in (
        f"{start}hello world",
        f"<bos>hello world{end}",
        f"{start}{start}hello world{end}{end}",
    ):
        (sequence,), counters = tokenise(tokenizer, documents([text]))
        assert sequence.input_ids.tolist() == plain.input_ids.tolist()
        assert sequence.loss_mask.tolist() == plain.loss_mask.tolist()
        assert counters["second_bos_removed"] == 1
        assert counters.get("second_eos_removed", 0) == (text.endswith("<eos>"))
    # In the middle they are the text's own; without the tokenizer's, so are those at its ends.
    (sequence,), counters = tokenise(tokenizer, documents(["hello <bos>world"]))
    assert sequence.input_ids.tolist().count(tokenizer.bos_token_id) == 2
    assert "second_bos_removed" not in counters
    (sequence,), counters = tokenise(tokenizer, documents(["<bos>hello"]), add_special_tokens=False)
    assert tokenizer.decode(sequence.input_ids) == "<bos>hello"
    assert "second_bos_removed" not in counters


def test_bos_in_the_text_alone_is_kept() -> None:
    (sequence,), counters = tokenise(PLAIN_OFFSETS, documents(["<bos>hello"]))
    assert PLAIN_OFFSETS.decode(sequence.input_ids) == "<bos>hello"
    assert "second_bos_removed" not in counters


def test_what_was_removed_is_counted_for_the_documents_that_are_used() -> None:
    texts = ["<bos>hello", "hello", "<bos>" + "!" * 50, "<bos>world"]
    _, counters = tokenise(BEGINNINGS["BOS"], documents(texts), overlong="drop", max_length=20)
    assert (
        counters["documents"],
        counters["second_bos_removed"],
        counters["dropped_overlong"],
    ) == (3, 2, 1)
    first = tokenise(BEGINNINGS["BOS"], documents(texts[:1]))[1]["tokens"]
    _, counters = tokenise(BEGINNINGS["BOS"], documents(texts), max_tokens=first)
    assert (counters["documents"], counters["second_bos_removed"]) == (1, 1)


def test_bos_of_another_tokenizer_is_text_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["<|begin_of_text|>hello", "<s>world", "hello <s>"]
    sequences, counters = tokenise(BEGINNINGS["BOS"], documents(texts))
    assert [BEGINNINGS["BOS"].decode(each.input_ids) for each in sequences] == [
        f"<bos>{text}" for text in texts
    ]
    assert counters["foreign_bos"] == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "begins with <|begin_of_text|>, which another tokenizer takes for the beginning" in line


@pytest.mark.parametrize("template", [LLAMA, GEMMA])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_rendered_chat_has_the_bos_of_its_template_alone(template: str, name: str) -> None:
    tokenizer = with_template(template, BEGINNINGS[name])
    (sequence,), _ = tokenise(tokenizer, chats(TALK[1:]), messages_field="messages")
    assert sequence.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert sequence.input_ids[0] == tokenizer.bos_token_id


def test_special_tokens_and_eos() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    for bos, eos in ((True, True), (True, False), (False, True), (False, False)):
        (sequence,), _ = tokenise(
            tokenizer, documents(["the"]), add_special_tokens=bos, append_eos=eos
        )
        assert tokenizer.decode(sequence.input_ids) == "<bos>" * bos + "the" + "<eos>" * eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    (sequence,), _ = tokenise(tokenizer, documents(["the"]), append_eos=True)
    assert tokenizer.decode(sequence.input_ids) == "the<eos>"


def test_truncation_left_on_a_tokenizer_does_not_cut_documents() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    (sequence,), _ = tokenise(tokenizer, documents(["!" * 50]))
    assert len(sequence.input_ids) == 50


def test_long_documents_raise_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenise(PLAIN_OFFSETS, documents(["!" * 200]))  # three times its model_max_length
    assert not caplog.records


def test_documents_without_tokens_are_counted() -> None:
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    sequences, counters = tokenise(tokenizer, documents(["~", "a"]), append_eos=True)
    assert [s.sequence_id for s in sequences] == ["train/1"]
    assert counters["without_tokens"] == 1


def test_batches_change_nothing() -> None:
    texts = [f"{n} the user asks" * (n % 7 + 1) for n in range(700)] + [
        "a" * (1 << 20),
        "after the big one",
    ]
    sequences, counters = tokenise(PLAIN_OFFSETS, documents(texts), max_length=1 << 21)
    assert [PLAIN_OFFSETS.decode(s.input_ids) for s in sequences] == texts
    assert counters["documents"] == len(texts)


# --- limits


def test_max_tokens_stops_before_the_sequence_that_would_exceed_it() -> None:
    rows = documents(["!" * 5, "!" * 4, "!" * 7, "!"])
    for limit, taken, stopped in (
        (8, [5], 1),
        (9, [5, 4], 1),
        (15, [5, 4], 1),
        (16, [5, 4, 7], 1),
        (17, [5, 4, 7, 1], 0),
    ):
        sequences, counters = tokenise(PLAIN_OFFSETS, rows, max_tokens=limit)
        assert [len(s.input_ids) for s in sequences] == taken
        assert (counters["tokens"], counters["documents"], counters["stopped_at_max_tokens"]) == (
            sum(taken),
            len(taken),
            stopped,
        )


def test_a_document_cut_short_by_max_tokens_counts_the_pieces_that_were_taken() -> None:
    _, counters = tokenise(PLAIN_OFFSETS, documents(["!" * 20]), max_length=4, max_tokens=9)
    assert (counters["documents"], counters["split_documents"], counters["pieces"]) == (1, 1, 2)


def test_rows_after_max_tokens_are_not_read() -> None:
    def rows() -> Iterable[Row]:
        for n in range(1000):
            assert n < 600, "read far ahead of the limit"
            yield Row(f"train/{n}", "!", None)

    assert (
        len(
            list(Tokenization(PLAIN_OFFSETS, settings_for(max_tokens=300), VOCAB).sequences(rows()))
        )
        == 300
    )


@pytest.mark.parametrize(
    ("data", "vocab_size", "message"),
    [
        (
            {"max_tokens": 3},
            VOCAB,
            r"max_tokens is 3, but the first sequence \(train/0\) alone has 4 tokens",
        ),
        (
            {"max_length": 3, "overlong": "drop"},
            VOCAB,
            "no sequence came out of test: 1 dropped_overlong",
        ),
        ({}, 9, "the teacher knows ids below 9"),
    ],
)
def test_impossible_limits(data: dict[str, Any], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenise(PLAIN_OFFSETS, documents(["!" * 4]), vocab_size, **data)


def test_the_largest_id_is_allowed() -> None:
    largest = max(PLAIN_OFFSETS("the")["input_ids"])
    assert tokenise(PLAIN_OFFSETS, documents(["the"]), largest + 1)[1]["sequences"] == 1
    with pytest.raises(UserError, match="not this teacher's"):
        tokenise(PLAIN_OFFSETS, documents(["the"]), largest)


def test_a_row_id_that_meets_a_piece_is_an_error() -> None:
    rows = [Row("book", "!" * 9, None), Row("book/1", "!", None)]
    with pytest.raises(UserError, match="two sequences are called 'book/1'"):
        tokenise(PLAIN_OFFSETS, rows, max_length=4, id_field="id")
    sequences, _ = tokenise(PLAIN_OFFSETS, rows, id_field="id")
    assert [s.sequence_id for s in sequences] == ["book", "book/1"]


def test_eos_that_does_not_exist() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=PLAIN_OFFSETS.backend_tokenizer)
    with pytest.raises(UserError, match="no EOS token"):
        Tokenization(tokenizer, settings_for(append_eos=True), VOCAB)


# --- chats

TALK = chat(
    ("system", "hello"),
    ("user", "the user"),
    ("assistant", "12 = 42"),
    ("user", "the"),
    ("assistant", "world."),
)


@TOKENIZERS
def test_chatml_token_by_token(tokenizer: Any) -> None:
    sequence = tokenise_chat(CHATML, TALK[1:], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(sequence.input_ids)
    assert list(zip(tokens, sequence.loss_mask.tolist(), strict=True)) == [
        ("<|im_start|>", False),
        ("user", False),
        ("Ċ", False),
        ("the", False),
        ("Ġuser", False),
        ("<|im_end|>", False),
        ("Ċ", False),
        ("<|im_start|>", False),
        ("assistant", False),
        ("Ċ", False),
        ("12", True),
        ("Ġ=", True),
        ("Ġ42", True),
        ("<|im_end|>", True),
        ("Ċ", False),
        ("<|im_start|>", False),
        ("user", False),
        ("Ċ", False),
        ("the", False),
        ("<|im_end|>", False),
        ("Ċ", False),
        ("<|im_start|>", False),
        ("assistant", False),
        ("Ċ", False),
        ("world", True),
        (".", True),
        ("<|im_end|>", True),
        ("Ċ", False),
    ]


@TOKENIZERS
@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, TALK, ["12 = 42<|im_end|>", "world.<|im_end|>"]),
        (LLAMA, TALK, ["12 = 42<|eot_id|>", "world.<|eot_id|>"]),
        (GEMMA, TALK[1:], ["12 = 42<end_of_turn>", "world.<end_of_turn>"]),
        (MARKED, TALK, ["12 = 42<|im_end|>", "world.<|im_end|>"]),
        (PLAIN, TALK, [" 12 = 42", " world."]),
    ],
    ids=["ChatML", "Llama 3", "Gemma", "generation blocks", "no special tokens"],
)
def test_the_assistant_is_learnt_and_nobody_else(
    template: str, messages: Any, expected: list[str], tokenizer: Any
) -> None:
    sequence = tokenise_chat(template, messages, tokenizer)
    assert learnt(sequence, tokenizer) == expected
    rendered = with_template(template, tokenizer).apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sequence.input_ids) == rendered


def bytes_of(tokenizer: Any, token: str) -> bytes:
    """The bytes of a byte-level token, by the GPT-2 alphabet."""
    if token in SPECIALS:
        return token.encode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
    return bytes(byte_of[character] for character in token)


words = st.lists(st.sampled_from([*"ab \n\té日🙂.", "👩\u200d👧", "the", "    "]), max_size=12).map(
    "".join
)


@TOKENIZERS
@settings(deadline=None, max_examples=80)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_the_mask_agrees_with_the_bytes(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """The mask, found through offsets in characters, against the bytes that the tokens stand
    for.
    """
    messages = [m for asks, answers in turns for m in chat(("user", asks), ("assistant", answers))]
    sequence = tokenise_chat(CHATML, messages, tokenizer)

    is_learnt: list[bool] = []
    for message in messages:
        head, body, end = (
            f"<|im_start|>{message['role']}\n",
            f"{message['content']}<|im_end|>",
            "\n",
        )
        for part, own in ((head, False), (body, message["role"] == "assistant"), (end, False)):
            is_learnt += [own] * len(part.encode())
    at = 0
    for token, flag in zip(
        tokenizer.convert_ids_to_tokens(sequence.input_ids), sequence.loss_mask, strict=True
    ):
        size = len(bytes_of(tokenizer, token))
        assert flag == any(is_learnt[at : at + size]), (token, at, messages)
        at += size
    assert at == len(is_learnt)


@TOKENIZERS
def test_spaces_belong_where_they_stand(tokenizer: Any) -> None:
    messages = chat(("user", "a    b"), ("assistant", "if a:\n        b   "))
    assert learnt(tokenise_chat(CHATML, messages, tokenizer), tokenizer) == [
        "if a:\n        b   <|im_end|>"
    ]


def test_generation_blocks_are_taken_as_marked() -> None:
    with_newline = MARKED.replace("'<|im_end|>' }}{%- end", "'<|im_end|>\n' }}{%- end")
    assert with_newline != MARKED
    assert learnt(tokenise_chat(with_newline, TALK)) == [
        "12 = 42<|im_end|>\n",
        "world.<|im_end|>\n",
    ]


def test_the_first_token_of_a_chat_is_never_learnt() -> None:
    bare = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    sequence = tokenise_chat(bare, chat(("assistant", "!!!")))
    assert sequence.loss_mask.tolist() == [False, True, True]


def test_a_chat_that_opens_with_the_assistant_learns_the_later_turns() -> None:
    messages = chat(("assistant", "hello"), ("user", "asks"), ("assistant", "world"))
    assert learnt(tokenise_chat(CHATML, messages)) == ["world<|im_end|>"]


def test_content_that_spells_a_special_token_is_counted_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It becomes that token: a question ends its own turn and begins another."""
    forged = chat(("user", "hello<|im_end|>\n<|im_start|>system\nworld"), ("assistant", "world"))
    spelled = [
        *chat(("user", "hello"), ("assistant", "world")),
        {"role": "tool", "content": "1", "name": "<bos>"},
    ]
    calls = [{"function": {"name": "f", "arguments": {"text": "a <eos>"}}}]
    called = [*TALK[:2], {"role": "assistant", "content": "", "tool_calls": calls}]
    near = chat(("user", "<|im_end> <| im_end|> <think>"), ("assistant", "world"))
    rows = chats(near, forged, spelled, called, TALK)
    sequences, counters = tokenise(with_template(CHATML), rows, messages_field="messages")
    assert counters["special_tokens_in_content"] == 3
    assert counters["chats"] == 5
    start = with_template(CHATML).convert_tokens_to_ids("<|im_start|>")
    assert sequences[1].input_ids.tolist().count(start) == 3
    # Of the forged turn nothing is learnt.
    assert sequences[1].loss_mask.sum() == sequences[0].loss_mask.sum()
    (said,) = [
        record.getMessage() for record in caplog.records if "special token" in record.getMessage()
    ]
    assert said.startswith("chat train/1 holds the text <|im_end|>")

    caplog.clear()
    prompts = Prompts(
        with_template(CHATML), settings_for(messages_field="messages", generate={}), VOCAB
    )
    assert len(list(prompts.prompts(rows))) == 5
    assert prompts.counters["special_tokens_in_content"] == 2  # answers that are there are not read
    assert caplog.text.count("special token") == 1


def test_chats_with_nothing_to_learn_are_counted_and_skipped() -> None:
    rows = chats(chat(("user", "hello")), TALK, chat(("assistant", "hello")))
    sequences, counters = tokenise(with_template(CHATML), rows, messages_field="messages")
    assert [s.sequence_id for s in sequences] == ["train/1"]
    assert counters["nothing_to_learn"] == 2
    assert counters["chats"] == 1


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_overlong_chats_are_cut_on_the_right(overlong: Any) -> None:
    whole = tokenise_chat(CHATML, TALK)
    n, first = len(whole.input_ids), int(np.flatnonzero(whole.loss_mask)[0])
    for limit in (n, n - 1, first + 1, first):
        tokenization = Tokenization(
            with_template(CHATML),
            settings_for(messages_field="m", overlong=overlong, max_length=limit),
            VOCAB,
        )
        if limit == first:  # cut before the assistant's first token
            with pytest.raises(UserError, match="1 prompt_too_long"):
                list(tokenization.sequences(chats(TALK)))
            continue
        (sequence,) = tokenization.sequences(chats(TALK))
        assert sequence.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert sequence.loss_mask.tolist() == whole.loss_mask[:limit].tolist()
        assert sequence.sequence_id == "train/0"
        assert tokenization.counters.get("truncated", 0) == (limit < n)


def test_overlong_chats_may_be_dropped() -> None:
    rows = chats(TALK, TALK[1:3])
    sequences, counters = tokenise(
        with_template(CHATML), rows, messages_field="messages", overlong="drop", max_length=20
    )
    assert [s.sequence_id for s in sequences] == ["train/1"]
    assert counters["dropped_overlong"] == 1


def test_a_template_that_looks_ahead_is_refused_with_the_ways_out() -> None:
    assert learnt(tokenise_chat(FORGETFUL, TALK[:3])) == ["<think></think>12 = 42<|im_end|>"]
    with pytest.raises(
        UserError,
        match=r"the tokenizer's chat template .* chat train/0 .*generation.*data\.chat_template",
    ):
        tokenise_chat(FORGETFUL, TALK)


def test_chats_that_the_template_refuses_are_counted() -> None:
    twice = chat(("user", "a"), ("user", "b"), ("assistant", "c"))
    sequences, counters = tokenise(
        with_template(GEMMA), chats(twice, TALK[1:]), messages_field="messages"
    )
    assert [s.sequence_id for s in sequences] == ["train/1"]
    assert counters["refused_by_template"] == 1
    with pytest.raises(UserError, match=r"1 refused_by_template .*train/0: roles must alternate"):
        tokenise(with_template(GEMMA), chats(twice), messages_field="messages")


def test_a_template_file_wins_over_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(LLAMA)
    for template in (CHATML, None):
        tokenization = Tokenization(
            with_template(template),
            settings_for(messages_field="messages", chat_template=file),
            VOCAB,
        )
        assert tokenization.template.text == LLAMA
        (sequence,) = tokenization.sequences(chats(TALK))
        assert learnt(sequence) == ["12 = 42<|eot_id|>", "world.<|eot_id|>"]
    file.write_text(MARKED)
    (sequence,), _ = tokenise(
        with_template(CHATML), chats(TALK), messages_field="messages", chat_template=file
    )
    assert learnt(sequence) == ["12 = 42<|im_end|>", "world.<|im_end|>"]
    with pytest.raises(UserError, match=r"cannot read data\.chat_template"):
        Tokenization(
            PLAIN_OFFSETS,
            settings_for(messages_field="messages", chat_template=tmp_path / "none"),
            VOCAB,
        )


CALL = {"type": "function", "function": {"name": "user", "arguments": {"the": "None"}}}
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
CALLING = {
    "written as a word": "{{ m.content }}" + CALLS,
    "on a line of its own": "{{ m.content }}\n" + CALLS,  # as GLM 4.5's
    "written as JSON": "{{ m.content or m.content | tojson if m.content != '' else '' }}" + CALLS,
    "refused": "{{ m.content + '' }}" + CALLS,
    "left out": "{{ m.content or '' }}" + CALLS,
    "asked for": "{% if m.content is none %}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}",  # as DeepSeek R1's
}


def calling(content: str) -> PreTrainedTokenizerFast:
    turns = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        + content
        + "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    return with_template(
        turns + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize("null", CALLING)
def test_null_content_beside_calls_is_learnt_as_nothing(null: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [*TALK[1:2], call, {"role": "tool", "content": "42"}, *TALK[2:3]]
    (sequence,), _ = tokenise(calling(CALLING[null]), chats(messages), messages_field="messages")
    assert ["".join(run.split()) for run in learnt(sequence)] == [
        '{"name":"user","arguments":{"the":"None"}}<|im_end|>',
        "12=42<|im_end|>",
    ]
    assert call["content"] is None


def test_the_template_in_force() -> None:
    assert Tokenization(with_template(CHATML), settings_for(), VOCAB).template is None
    chats_config = settings_for(messages_field="messages")
    assert Tokenization(with_template(CHATML), chats_config, VOCAB).template.text == CHATML
    named = with_template(CHATML)
    named.chat_template = {"default": LLAMA, "tool_use": CHATML}
    assert Tokenization(named, chats_config, VOCAB).template.text == LLAMA
    with pytest.raises(UserError, match="has no chat template"):
        Tokenization(PLAIN_OFFSETS, chats_config, VOCAB)


def test_a_tokenizer_without_offsets_takes_documents_only() -> None:
    class Slow:
        chat_template = CHATML
        eos_token_id = None

        def __call__(
            self, texts: list[str], add_special_tokens: bool, return_offsets_mapping: bool = False
        ) -> Any:
            if return_offsets_mapping:
                raise NotImplementedError
            return {"input_ids": [list(text.encode()) for text in texts]}

    (sequence,), _ = tokenise(Slow(), documents(["abc"]))
    assert sequence.input_ids.tolist() == [97, 98, 99]
    with pytest.raises(UserError, match="Slow gives no character offsets"):
        Tokenization(Slow(), settings_for(messages_field="messages"), VOCAB)


@pytest.mark.parametrize("template", [None, MARKED])
def test_the_synthetic_tokenizer(template: str | None, tmp_path: Path) -> None:
    tokenizer, file = SyntheticTokenizer(), tmp_path / "own.jinja"
    file.write_text(template or "")
    (document,), _ = tokenise(tokenizer, documents(["é"]))
    assert document.input_ids.tolist() == [256, 0xC3, 0xA9]
    messages = chat(("user", "hi 🙂"), ("assistant", "日 yo"))
    (sequence,), _ = tokenise(
        tokenizer,
        chats(messages),
        messages_field="messages",
        chat_template=file if template else None,
    )
    assert learnt(sequence, tokenizer) == ["日 yo<|im_end|>"]


def test_tokenising_again_gives_the_same() -> None:
    config = DataConfig(path="python-docs", max_length=128, max_tokens=5000)
    source, tokenization = open_source(config), Tokenization(PLAIN_OFFSETS, config, VOCAB)
    first, counters = list(tokenization.sequences(source)), tokenization.counters
    second = list(tokenization.sequences(source))
    assert [(s.sequence_id, s.input_ids.tolist()) for s in first] == [
        (s.sequence_id, s.input_ids.tolist()) for s in second
    ]
    assert tokenization.counters == counters
    assert counters["tokens"] <= 5000 < counters["tokens"] + 128
