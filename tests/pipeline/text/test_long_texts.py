"""Long texts against one call of the tokenizer, with windows so small that a page has many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.generate import prompts
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text import long_texts, tokenize
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.python_docs import BUILT_IN
from logitcask.pipeline.text.sources import Row
from logitcask.pipeline.text.tokenize import Tokenization

PAGES = [text for _, text in BUILT_IN["python-docs"]()]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (long_texts, tokenize, prompts):
        monkeypatch.setattr(module, "LONG", 700)
    monkeypatch.setattr(long_texts, "_WINDOW", 500)
    monkeypatch.setattr(long_texts, "_OVERLAP", 120)


def byte_level(split: str) -> PreTrainedTokenizerFast:
    """As GPT-2's (``split`` is gpt2), or with NFC and numbers split into digits, as newer ones
    have it.
    """
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        plain if split == "gpt2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    )
    if split != "gpt2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece(word_by_word: bool) -> PreTrainedTokenizerFast:
    """A space in front of each text and bytes for unknown characters; Llama 2's takes the whole
    text for one word.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if word_by_word:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    trained_on = [line for page in PAGES[:40] for line in page.splitlines()]
    return _trained(tokenizer, [], trained_on, [f"<0x{byte:02X}>" for byte in range(256)])


def _trained(
    tokenizer: Tokenizer, alphabet: list[str], texts: Any = PAGES[:40], more: Any = ()
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", *more],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


TOKENIZERS = {
    "gpt2": lambda: byte_level("gpt2"),
    "nfc": lambda: byte_level("nfc"),
    "metaspace": lambda: sentence_piece(True),
    "llama2": lambda: sentence_piece(False),
    "synthetic": SyntheticTokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def page(rng: np.random.Generator, characters: int) -> str:
    """English with what is hard on borders: other scripts, combining marks, runs of white space,
    special tokens.
    """
    spice = [
        "\n\n\n",
        "    ",
        "naïve e\u0301te\u0301",
        "汉字没有空格",
        "👩‍👩‍👧",
        "1234567890",
        "<|im_end|>",
        "\t\r\n",
    ]
    text = ""
    while len(text) < characters:
        source = PAGES[rng.integers(len(PAGES))]
        at = rng.integers(len(source))
        text += source[at : at + rng.integers(10, 200)] + str(rng.choice(spice))
    return text[:characters]


def parts(tokenizer: Any, text: str) -> list[np.ndarray]:
    return list(long_texts.LongTexts(tokenizer).ids(text, add_special_tokens=True))


def test_as_in_one_call(tokenizer: Any, rng: np.random.Generator) -> None:
    for characters in (1, 119, 120, 121, 500, 501, 880, 881, *rng.integers(700, 6000, 20)):
        text = page(rng, int(characters))
        got = parts(tokenizer, text)
        assert np.concatenate(got).tolist() == tokenizer([text])["input_ids"][0], text
        assert max(map(len, got)) <= 4 * 500


def test_one_endless_word(rng: np.random.Generator) -> None:
    """Nothing is lost and nothing comes twice, wherever the tokens of two windows may have
    borders.
    """
    gpt2 = byte_level("gpt2")
    for alphabet in ("z", "ab", "e", "汉", "naïve", "the"):
        text = "".join(rng.choice(list(alphabet), int(rng.integers(1000, 4000))))
        ids = np.concatenate(parts(gpt2, text))[1:]
        assert gpt2.decode(ids.tolist()) == text


class Digraphs:
    """Two characters to a token, counted from where a text starts: windows that start at odd
    places share no border.
    """

    def __call__(
        self, texts: list[str], add_special_tokens: bool = True, **_: Any
    ) -> dict[str, Any]:
        spans = [[(at, min(at + 2, len(text))) for at in range(0, len(text), 2)] for text in texts]
        ids = [
            [int.from_bytes(text[a:b].encode()) for a, b in each]
            for text, each in zip(texts, spans, strict=True)
        ]
        return {"input_ids": ids, "offset_mapping": spans}


def test_windows_without_a_common_border(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(long_texts, "_OVERLAP", 121)
    text = "".join(rng.choice(list("abcd"), 3001))
    assert np.concatenate(parts(Digraphs(), text)).tolist() == Digraphs()([text])["input_ids"][0]


def test_text_of_which_nothing_becomes_a_token() -> None:
    tokenizer = byte_level("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    for text in ("start" + " " * 3000 + "end", " " * 3000):
        ids = np.concatenate(parts(tokenizer, text)).tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(" ", "")


def rows(rng: np.random.Generator) -> list[Row]:
    lengths = [*rng.integers(1, 1400, 30), 20_000, 700, 701]
    return [Row(f"row {i}", page(rng, int(length)), None) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_documents(
    tokenizer: Any,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    overlong: Any,
    append_eos: bool,
) -> None:
    """Long rows among short ones: the sequences and the counters of a build that reads all of
    them whole.
    """
    documents = rows(rng)
    for max_length in (3, 250, 5000, 10**6):
        config = DataConfig(
            path="test", max_length=max_length, overlong=overlong, append_eos=append_eos
        )
        results = []
        for long in (700, 10**9):
            monkeypatch.setattr(tokenize, "LONG", long)
            tokenization = Tokenization(tokenizer, config, 10**6)
            sequences = [
                (each.sequence_id, each.input_ids.tolist(), each.loss_mask.tolist())
                for each in _sequences(tokenization, documents)
            ]
            results.append((sequences, tokenization.counters))
        assert results[0] == results[1]


def _sequences(tokenization: Tokenization, documents: list[Row]) -> Iterator[Any]:
    with suppress(UserError):  # where all are dropped
        yield from tokenization.sequences(documents)


@pytest.mark.parametrize("overlong", ["split", "drop"])
def test_chats(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, overlong: Any) -> None:
    tokenizer = byte_level("gpt2")
    tokenizer.chat_template = (
        CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chats = [
        Row(
            f"chat {i}",
            None,
            [
                {"role": role, "content": page(rng, int(rng.integers(1, 700))).strip() or "x"}
                for _ in range(rng.integers(1, 4))
                for role in ("user", "assistant")
            ],
        )
        for i in range(20)
    ]
    for max_length in (400, 10**6):
        config = DataConfig(
            path="test", messages_field="messages", max_length=max_length, overlong=overlong
        )
        results = []
        for long in (700, 10**9):
            monkeypatch.setattr(tokenize, "LONG", long)
            tokenization = Tokenization(tokenizer, config, 10**6)
            sequences = [
                (each.sequence_id, each.input_ids.tolist(), each.loss_mask.tolist())
                for each in _sequences(tokenization, chats)
            ]
            results.append((sequences, tokenization.counters))
        assert results[0] == results[1]


@pytest.mark.parametrize("max_length", [200, 1000])
def test_prompts(
    tokenizer: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, max_length: int
) -> None:
    config = DataConfig(
        path="test",
        text_field="text",
        max_length=max_length,
        generate={"max_new_tokens": 5},  # type: ignore[arg-type]
    )
    documents, results = rows(rng), []
    for long in (700, 10**9):
        monkeypatch.setattr(prompts, "LONG", long)
        made = Prompts(tokenizer, config, 10**6)
        results.append(
            ([(p.row_id, p.input_ids.tolist()) for p in made.prompts(documents)], made.counters)
        )
    assert results[0] == results[1]


def test_no_further_than_needed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    tokenizer = SyntheticTokenizer()

    class Watched(SyntheticTokenizer):
        def __call__(self, text: Any, **kwargs: Any) -> Any:
            read.append(sum(map(len, text)))
            return tokenizer(text, **kwargs)

    config = DataConfig(path="test", max_length=50, overlong="truncate")
    (sequence,) = Tokenization(Watched(), config, 10**6).sequences(
        [Row("a", page(rng, 100_000), None)]
    )
    assert len(sequence.input_ids) == 50
    assert sum(read) < 3000


def test_without_offsets(rng: np.random.Generator) -> None:
    """A tokenizer written in Python reads the text whole."""

    class Slow:
        def __call__(
            self, texts: list[str], add_special_tokens: bool, return_offsets_mapping: bool = False
        ) -> Any:
            if return_offsets_mapping:
                raise NotImplementedError
            return {"input_ids": [list(text.encode()) for text in texts]}

    text = page(rng, 3000)
    (got,) = parts(Slow(), text)
    assert got.tolist() == list(text.encode())
