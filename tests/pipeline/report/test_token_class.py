"""Classes of tokens."""

import pytest

from logitcask.pipeline.report.token_class import TokenClass, token_class

CASES = {
    TokenClass.begins_word: [" cat", "The", "\nIf", " été", " 漢字", "ΑΒ"],
    TokenClass.inside_word: ["ing", "漢", "مر", "x1", "(x"],
    TokenClass.number: ["12", " 3", "٣", "3."],
    TokenClass.mark: [".", " ::=", "😀", "\u0301", "_"],
    TokenClass.line_end: ["\n", "\n\n  ", "\r\n"],
    TokenClass.space: [" ", "\t", "", "\u00a0"],
}


@pytest.mark.parametrize(
    ("text", "expected"), [(text, kind) for kind, texts in CASES.items() for text in texts]
)
def test_by_text(text, expected):
    assert token_class(text) is expected


def test_special_and_partial_tokens():
    assert token_class("\\xe4", part=True) is TokenClass.part
    assert token_class("<|im_end|>", special=True) is TokenClass.special
