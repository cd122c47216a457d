"""Classes of tokens by their text: the rows of "surprise by token class"."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class TokenClass(StrEnum):
    """A class; the first one that fits counts."""

    special = "special token"
    part = "part of a character"
    line_end = "line end"
    space = "other whitespace"
    begins_word = "word or its beginning"
    inside_word = "inside a word"
    number = "digits"
    mark = "punctuation, symbols"


def token_class(text: str, *, special: bool = False, part: bool = False) -> TokenClass:
    """The class of a token with this text.

    special: whether the tokenizer calls it special. part: whether it is bytes of a character.

    A word begins with a space or a capital letter. In scripts without spaces every token of letters
    is inside a word.
    """
    if special:
        return TokenClass.special
    if part:
        return TokenClass.part
    core = text.strip()
    if not core:
        return TokenClass.line_end if "\n" in text or "\r" in text else TokenClass.space
    if any(letter.isalpha() for letter in core):
        begins = text[0].isspace() or core[0].isupper()
        return TokenClass.begins_word if begins else TokenClass.inside_word
    return TokenClass.number if any(letter.isdigit() for letter in core) else TokenClass.mark


Classes = Callable[[int], TokenClass]
"""From an id to its class."""
