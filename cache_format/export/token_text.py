"""Single tokens as readable text, also those that are only part of a character.

Most tokenizers write text as bytes. A Chinese character or an emoji can be spread over several
tokens, and none of them alone is text. Such bytes are shown in hexadecimal, ``\\xe4\\xb8``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

LONGEST = 24
"""Characters of a token that are shown; of a longer one its beginning, its end and its length."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def _byte_alphabet() -> dict[str, int]:
    """Byte of each letter of byte-level BPE (GPT-2): printable bytes stand for themselves, the
    others for the letters from U+0100 on, in order.
    """
    others = [byte for byte in range(256) if byte not in _PRINTED]
    return {chr(byte): byte for byte in _PRINTED} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


class TokenText:
    """The text of each id of ``tokenizer``, in one line and at most ``longest`` characters wide.

    tokenizer: with ``decode`` and ``convert_ids_to_tokens``, as those of transformers have.
    longest:   None: tokens are shown whole.
    """

    def __init__(self, tokenizer: Any, longest: int | None = LONGEST) -> None:
        self._tokenizer, self._longest = tokenizer, longest

    def __call__(self, token: int) -> str:
        """Text of one token alone; bytes that are no characters as ``\\xNN``."""
        return self._shown(self._raw(token)[0]) or f"<{token}>"

    def exact(self, token: int) -> str:
        """Text of one token alone, whole, with line ends and control characters as they are; bytes
        that are no characters as ``\\xNN``.
        """
        text, found = self._raw(token)
        return text if found is None else found.decode(errors="backslashreplace")

    def partial_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that is not whole characters; None for one that is."""
        return self._raw(token)[1]

    def _raw(self, token: int) -> tuple[str, bytes | None]:
        """Text and ``partial_bytes`` of a token; each byte that is no character is a surrogate in the
        text.
        """
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        found = self._partial(token, text)
        return (text if found is None else found.decode(errors="surrogateescape")), found

    def _partial(self, token: int, text: str) -> bytes | None:
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return None
        name = self._tokenizer.convert_ids_to_tokens([token])[0]
        if fallback := _FALLBACK.fullmatch(name or ""):
            return bytes([int(fallback[1], 16)])
        if name and all(letter in _BYTES for letter in name):
            found = bytes(_BYTES[letter] for letter in name)
            # A text that holds U+FFFD itself is whole.
            return None if _is_whole(found) else found
        return None

    def sequence(self, tokens: Iterable[int]) -> list[str]:
        """Texts of tokens in a row. The one that completes a character also shows the
        character, ``\\xad = 中``.
        """
        shown, waiting = [], b""
        for token in tokens:
            raw, found = self._raw(token)
            text = self._shown(raw) or f"<{token}>"
            if found is None:
                waiting = b""
            else:
                waiting += found
                whole = waiting.decode(errors="ignore")
                if whole and _is_whole(waiting):
                    text, waiting = f"{text} = {self._shown(whole)}", b""
            shown.append(text)
        return shown

    def _shown(self, text: str) -> str:
        """``text`` in one line."""
        line = printable(text)
        if self._longest is None or len(line) <= self._longest:
            return line
        half = (self._longest - 2) // 2
        return f"{line[:half]}…{line[-half:]} ({len(text)})"


def printable(text: str) -> str:
    """``text`` in one line, with control and formatting characters, line ends and backslashes as in
    Python's literals, so that nothing in it is invisible or changes the order of what is shown.
    """
    return "".join(map(_letter, text))


def _letter(letter: str) -> str:
    """A letter; control characters, line ends and backslashes as in Python's literals, and a byte
    that was no character as ``\\xNN``.
    """
    if "\udc80" <= letter <= "\udcff":  # as surrogateescape decodes a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter if letter.isprintable() and letter != "\\" else repr(letter)[1:-1]


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
