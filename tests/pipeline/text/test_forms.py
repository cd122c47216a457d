"""The forms of rows, rendered and tokenised: which characters of which text are learnt.

The expected text and the expected learnt characters are written out by hand. Each token is compared
with them by the characters that it decodes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate.run import estimate
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import open_source
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence
from tests.pipeline.text.test_sources import WRITERS, json_lines

Learnt = list[tuple[str, bool]]
"""A text in parts, and whether each is learnt."""


def turn(role: str, content: str) -> Learnt:
    learnt = role == "assistant"
    return [
        (f"<|im_start|>{role}\n", False),
        (f"{content}<|im_end|>", learnt),
        ("\n", False),
    ]


def openai(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


ASKED = [*turn("user", "why is the sky blue?"), *turn("assistant", "it scatters light")]
UNLEARNT = [(text, False) for text, _ in ASKED]

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], Learnt]] = {
    "document": ({"text": "why is the sky blue?"}, {}, [("why is the sky blue?", True)]),
    "chat": (
        {"messages": openai(("user", "why is the sky blue?"), ("assistant", "it scatters light"))},
        {"messages_field": "messages"},
        ASKED,
    ),
    "ShareGPT": (
        {
            "conversations": sharegpt(
                ("system", "be brief"),
                ("human", "why is the sky blue?"),
                ("gpt", "it scatters light"),
                ("observation", "3 degrees"),
                ("gpt", "cold"),
            )
        },
        {"messages_field": "conversations"},
        [
            *turn("system", "be brief"),
            *ASKED,
            *turn("tool", "3 degrees"),
            *turn("assistant", "cold"),
        ],
    ),
    "ShareGPT with TRL's names": (
        {
            "conversations": sharegpt(
                ("user", "why is the sky blue?"), ("assistant", "it scatters light")
            )
        },
        {"messages_field": "conversations"},
        ASKED,
    ),
    "ShareGPT with a mark": (
        {
            "conversations": [
                {"from": "human", "value": "why is the sky blue?"},
                {"from": "gpt", "value": "it scatters light", "weight": 0},
                *sharegpt(("human", "so?"), ("gpt", "blue")),
            ]
        },
        {"messages_field": "conversations"},
        [*UNLEARNT, *turn("user", "so?"), *turn("assistant", "blue")],
    ),
    "prompt and completion, messages": (
        {
            "prompt": openai(
                ("user", "why is the sky blue?"),
                ("assistant", "it scatters light"),
                ("user", "so?"),
            ),
            "completion": openai(("assistant", "blue")),
        },
        {"prompt_field": "prompt", "completion_field": "completion"},
        [*UNLEARNT, *turn("user", "so?"), *turn("assistant", "blue")],
    ),
    "prompt and completion, ShareGPT": (
        {
            "prompt": sharegpt(("system", "be brief"), ("human", "so?")),
            "completion": sharegpt(("gpt", "blue")),
        },
        {"prompt_field": "prompt", "completion_field": "completion"},
        [*turn("system", "be brief"), *turn("user", "so?"), *turn("assistant", "blue")],
    ),
    "question and answer": (
        {"q": "why is the sky blue?", "a": "it scatters light"},
        {"prompt_field": "q", "completion_field": "a"},
        ASKED,
    ),
    "prompt and completion, texts": (
        {"prompt": "the sky is", "completion": " blue."},
        {"text_field": "prompt", "completion_field": "completion"},
        [("the sky is", False), (" blue.", True)],
    ),
    "prompt and completion, texts that end": (
        {"prompt": "the sky is", "completion": " blue."},
        {"text_field": "prompt", "completion_field": "completion", "append_eos": True},
        [("the sky is", False), (" blue.", True), ("<|im_end|>", True)],
    ),
}


@pytest.fixture(params=["ChatML", "synthetic"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama: Path) -> Any:
    if request.param == "ChatML":
        return AutoTokenizer.from_pretrained(tiny_llama)
    return SyntheticTokenizer()


def made(path: Path, tokenizer: Any, **data: Any) -> tuple[list[Sequence], dict[str, int]]:
    config = DataConfig(path=str(path), **{"max_length": 1000, **data})
    tokenization = Tokenization(tokenizer, config, 1000)
    source = open_source(config)
    return list(tokenization.sequences(source)), {**source.counters, **tokenization.counters}


def expected_mask(tokenizer: Any, ids: list[int], parts: Learnt) -> list[bool]:
    """Whether each token holds a learnt character; the texts are ASCII, so that every token has
    whole characters.
    """
    text = "".join(text for text, _ in parts)
    learnt = [is_learnt for part, is_learnt in parts for _ in part]
    mask, at = [], 0
    for index in ids:
        piece = tokenizer.decode([index])
        assert text.startswith(piece, at)
        mask.append(any(learnt[at : at + len(piece)]))
        at += len(piece)
    assert at == len(text)
    return [False, *mask[1:]]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("file", ["a.jsonl", "a.parquet"])
def test_what_is_learnt_of_each_form(name: str, file: str, tokenizer: Any, tmp_path: Path) -> None:
    record, fields, parts = FORMS[name]
    WRITERS[file](tmp_path / file, [record])
    synthetic = isinstance(tokenizer, SyntheticTokenizer)
    ((sequence,), counters) = made(tmp_path / file, tokenizer, **fields)
    if synthetic and "messages_field" not in fields and "prompt_field" not in fields:
        parts = [("<|im_start|>", False), *parts]  # its BOS
    ids = sequence.input_ids.tolist()
    text = "".join(text for text, _ in parts)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sequence.loss_mask.tolist() == expected_mask(tokenizer, ids, parts)
    assert counters["kept_positions"] == sum(sequence.loss_mask) > 0


def test_a_token_of_prompt_and_completion_is_learnt(tiny_llama: Path, tmp_path: Path) -> None:
    """The teacher reads the text tokenised as a whole, as TRL does, whose completion begins where
    the tokens of the prompt and of both differ.
    """
    from trl.trainer.sft_trainer import common_prefix_length

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    pairs = [("what the tea", "cher reads"), ("the student ", "will read"), ("x", "yz")]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    sequences, _ = made(
        tmp_path / "a.jsonl", tokenizer, text_field="prompt", completion_field="completion"
    )
    merged = 0
    for (prompt, completion), sequence in zip(pairs, sequences, strict=True):
        alone = tokenizer(prompt)["input_ids"]
        both = tokenizer(prompt + completion)["input_ids"]
        begin = common_prefix_length(alone, both)
        merged += begin < len(alone)
        assert sequence.input_ids.tolist() == both
        assert sequence.loss_mask.tolist() == [0 < i >= begin for i in range(len(both))]
    assert merged, "no token of the test crosses the border"


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_completions_get_the_special_tokens_of_documents(
    add_special_tokens: bool, append_eos: bool, end: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also if the texts have them already, and for texts that are tokenised in windows."""
    from tokenizers.processors import TemplateProcessing

    from logitcask.pipeline.text import tokenize as tokenize_module

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    added = ["<|endoftext|>", *filter(None, [end])]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|endoftext|> $A {end}".strip(),
        special_tokens=[(each, tokenizer.convert_tokens_to_ids(each)) for each in added],
    )
    bos, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    text = tokenizer("the sky is blue", add_special_tokens=False)["input_ids"]
    front = [bos] if add_special_tokens else []
    ends = [eos] if append_eos or (add_special_tokens and end) else []
    records = [{"p": "the sky", "c": " is blue"}]
    if add_special_tokens:
        records.append({"p": "<|endoftext|>the sky", "c": f" is blue{end}"})
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    fields = {
        "text_field": "p",
        "completion_field": "c",
        "add_special_tokens": add_special_tokens,
        "append_eos": append_eos,
    }
    learnt = len(tokenizer("the sky", add_special_tokens=False)["input_ids"]) + len(front)
    for long in (1 << 20, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenize_module, "LONG", long)
            sequences, _ = made(tmp_path / "a.jsonl", tokenizer, **fields)
        for sequence in sequences:
            ids = sequence.input_ids.tolist()
            assert ids == [*front, *text, *ends]
            assert sequence.loss_mask.tolist() == [i >= learnt for i in range(len(ids))]


def test_pairs_that_cannot_be_used_are_named_by_reason(tmp_path: Path) -> None:
    answer = openai(("assistant", "blue"))
    records = [
        {"p": None, "c": "x"},
        {"p": "q", "c": None},
        {"p": "q"},
        {"p": " ", "c": "x"},
        {"p": "q", "c": ""},
        {"p": 5, "c": "x"},
        {"p": openai(("user", "q")), "c": openai(("user", "and?"))},  # nothing of the assistant
        {"p": openai(("user", "q")), "c": "blue"},
        {"p": "q", "c": answer},
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    fields = {"prompt_field": "p", "completion_field": "c"}
    sequences, counters = made(tmp_path / "a.jsonl", SyntheticTokenizer(), **fields)
    assert [sequence.sequence_id for sequence in sequences] == ["train/7", "train/8"]
    assert {name: n for name, n in counters.items() if "skip" in name or "nothing" in name} == {
        "rows_skipped_null": 1,
        "rows_skipped_null_completion": 2,
        "rows_skipped_empty": 2,
        "rows_skipped_not_a_chat": 1,
        "nothing_to_learn": 1,
    }
    with pytest.raises(UserError, match=r"for lists of messages set data\.prompt_field instead"):
        (tmp_path / "b.jsonl").write_bytes(json_lines(records[-1:]))
        made(
            tmp_path / "b.jsonl",
            SyntheticTokenizer(),
            text_field="c",
            completion_field="p",
        )
    with pytest.raises(UserError, match=r"no column 'x' \(data\.completion_field\)"):
        made(tmp_path / "a.jsonl", SyntheticTokenizer(), text_field="p", completion_field="x")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"completion_field": "c"}, "but not the column of the prompts; set prompt_field"),
        (
            {"completion_field": "c", "messages_field": "m"},
            "name the column of the prompts in prompt_field instead",
        ),
        (
            {"completion_field": "c", "prompt_field": "p", "generate": {}},
            "the teacher writes the answers or the data has them",
        ),
        ({"overlong": "drop_turns"}, "documents have no turns"),
        (
            {"overlong": "drop_turns", "text_field": "p", "completion_field": "c"},
            "documents have no turns",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config(tmp_path, "a.jsonl", **fields)))
    with pytest.raises(ConfigError, match=says):
        load_config(BuildConfig, file, [])


def config(tmp_path: Path, path: str, **data: Any) -> dict[str, Any]:
    return {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {"path": path, **data},
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_cache_of_each_form_says_what_is_learnt(name: str, tmp_path: Path) -> None:
    record, fields, _ = FORMS[name]
    (tmp_path / "a.jsonl").write_bytes(json_lines([record]))
    settings = BuildConfig.model_validate(config(tmp_path, str(tmp_path / "a.jsonl"), **fields))
    manifest = build(settings).manifest
    policy = "completion" if "completion_field" in fields else "assistant"
    assert manifest.data.mask_policy == (policy if fields else "all")
    ((sequence,), _) = made(tmp_path / "a.jsonl", SyntheticTokenizer(), **fields)
    (stored,) = CacheReader(tmp_path / "cache")
    assert stored.input_ids.tolist() == sequence.input_ids.tolist()
    assert stored.loss_mask.tolist() == sequence.loss_mask.tolist()
    np.testing.assert_array_equal(stored.positions + 1, np.flatnonzero(sequence.loss_mask))
    sample = estimate(settings).sample
    assert (sample.tokens, sample.kept_positions) == (len(stored), len(stored.positions))
    assert build(settings).reused
    changed = settings.model_copy(
        update={"data": settings.data.model_copy(update={"overlong": "truncate_left"})}
    )
    with pytest.raises(UserError, match=r'data\.overlong: "split" -> "truncate_left"'):
        build(changed)
