"""Tokens as text: whole words, parts of characters, long runs, and what a terminal must not get."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logitcask.cache_format.export.token_text import TokenText
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer


@pytest.fixture(scope="module")
def byte_level(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def with_fallback():
    """As SentencePiece writes text: words with ``▁``, bytes as ``<0xE4>``."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "b"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_letters_of_byte_level_bpe_are_those_of_the_library():
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for number in (*range(0x80, 0xD800, 61), *range(0x10000, 0x110000, 4099)):
        ((letters, _),) = encode.pre_tokenize_str(chr(number))
        found = [TokenText(Named(letter)).partial_bytes(0) for letter in letters]
        assert b"".join(found) == chr(number).encode()


class Named:
    """A tokenizer of one token that is no text alone."""

    def __init__(self, name):
        self.name = name

    def decode(self, _, **options):
        return "\N{REPLACEMENT CHARACTER}"

    def convert_ids_to_tokens(self, _):
        return [self.name]


@pytest.mark.parametrize("text", ["中文", "العربية", "🙂", "a中b", "e\u0301"])
@pytest.mark.parametrize("tokenizer", ["byte_level", "with_fallback", "synthetic"])
def test_parts_of_characters_are_hexadecimal_and_joined(request, tokenizer, text):
    found = SyntheticTokenizer() if tokenizer == "synthetic" else request.getfixturevalue(tokenizer)
    ids = found.encode(text, add_special_tokens=False)
    shown = TokenText(found).sequence(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in each for each in shown)
    joined = "".join(
        each.rpartition(" = ")[2] for each in shown if " = " in each or "\\x" not in each
    )
    assert joined == text
    hexadecimal = [each.partition(" = ")[0] for each in shown if "\\x" in each]
    assert hexadecimal, "every text here has a character of several tokens"
    assert all(part.startswith("\\x") for part in hexadecimal)


def test_a_broken_character_is_never_completed(byte_level):
    first, *_ = byte_level.encode("中", add_special_tokens=False)
    a = byte_level.encode("a", add_special_tokens=False)
    assert TokenText(byte_level).sequence([first, *a, first]) == ["\\xe4", "a", "\\xe4"]


def test_a_line_stays_a_line(byte_level):
    text = TokenText(byte_level)
    ((newline,), (escape,)) = (
        byte_level.encode(each, add_special_tokens=False) for each in ("\n", "\x1b")
    )
    assert (text(newline), text(escape)) == ("\\n", "\\x1b")
    assert TokenText(Wide("\\n"))(0) == r"\\n", "not a line end, but a backslash and an n"


class Wide(Named):
    def decode(self, _, **options):
        return self.name


def test_a_long_token_is_cut_and_its_length_said():
    assert TokenText(Wide("=" * 64))(0) == "=" * 11 + "…" + "=" * 11 + " (64)"
    assert TokenText(Wide("=" * 24))(0) == "=" * 24
    assert TokenText(Wide("=" * 64), longest=None)(0) == "=" * 64
    assert TokenText(Wide(""))(7) == "<7>"
    assert TokenText(Wide("\N{REPLACEMENT CHARACTER}"))(7) == "\N{REPLACEMENT CHARACTER}"


def test_exact_text_is_neither_cut_nor_escaped(byte_level):
    text = TokenText(byte_level)
    first, *_ = byte_level.encode("中", add_special_tokens=False)
    (newline,) = byte_level.encode("\n", add_special_tokens=False)
    assert (text.exact(first), text.exact(newline)) == ("\\xe4", "\n")
    assert TokenText(Wide("=" * 64)).exact(0) == "=" * 64
    assert TokenText(Wide("")).exact(7) == ""
