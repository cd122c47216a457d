"""Words of every script, and the score that counts them."""

from __future__ import annotations

import pytest
import torch
from rouge_score.tokenizers import DefaultTokenizer

from logitcask.train.evaluation.rouge import RougeL, Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("今天天气很好，去公园。", list("今天天气很好去公园")),
        ("ラーメンが 3つ", [*"ラーメンが", "3", "つ"]),
        ("ＡＢＣ ﬁne", ["abc", "fine"]),  # full width, a ligature
        ("مرحبا بالعالم، كيف الحال؟", ["مرحبا", "بالعالم", "كيف", "الحال"]),
        ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
        ("हिन्दी भाषा में", ["हिन्दी", "भाषा", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("한국어 문장입니다.", ["한국어", "문장입니다"]),
        ("Съешь ещё этих булок", ["съешь", "ещё", "этих", "булок"]),
        ("Cafe\u0301 naïve über", ["café", "naïve", "über"]),
        ("用Python写3个GPU程序", [*"用", "python", "写", "3", "个", "gpu", *"程序"]),
        ("?! 🙂 → …", []),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words
    if words:
        score = RougeL()
        assert score(text, text) == 1
        assert score(text, words[0]) < 1 or len(words) == 1
        assert score(text, "zz") == 0


def test_words_of_english_text_are_those_of_rouge_score() -> None:
    text = (
        torch.nn.functional.cross_entropy.__doc__
        + "it's snake_case, 3.14 and e-mails: running, flies! \t\n x^2 + 10%"
    )
    assert len(set(text)) > 60
    assert text.isascii()
    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)
