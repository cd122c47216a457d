"""Texts too long for one call: a tokenizer needs a hundred bytes or more per character.

A long text is read in overlapping windows. The tokens of two neighbouring windows are joined at a
place where both have a border between the same two characters, as near to the middle of the overlap
as possible. Away from its edges a window is tokenised like the whole text, so the result equals
that of one call. Changes of a tokenizer at the start of a text (such as a space in front) happen
only in the first window. If a run is one word for the tokenizer and longer than an overlap (a
megabyte of ``z``), it may be split differently from one call, but into the same characters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError

# Characters. Texts up to LONG are tokenised whole, with any values of the other two.
LONG = 1 << 20
_WINDOW = 1 << 18
_OVERLAP = 1 << 12
# Windows in one call, for the tokenizer's threads. The first window is tokenised alone, because a
# limit may need only that one.
_AT_ONCE = 4

Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]
"""int32[n]: ids; int64[n, 2]: the characters that each came from, end exclusive."""


def with_whole_offsets(tokenizer: Any) -> Any:
    """A tokenizer with the same ids, no special tokens, and offsets of all characters.

    Without special tokens, a post-processor only trims white space from the offsets, as in many
    byte-level tokenizers. A token of spaces would then have no characters.

    Raises NotImplementedError, KeyError or TypeError, as the tokenizer does, if it has no offsets.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer(["a"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return tokenizer


class LongTexts:
    """Tokenises long texts as a stream of int32 arrays, in bounded memory.

    A tokenizer without offsets (one written in Python) reads a text whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        try:
            self._offset_tokenizer = with_whole_offsets(tokenizer)
        except (NotImplementedError, KeyError, TypeError):
            self._offset_tokenizer = None

    def ids(self, text: str, *, add_special_tokens: bool) -> Iterator[NDArray[np.int32]]:
        """The ids of ``text``, in parts, with the tokens that the tokenizer adds at both ends."""
        if self._offset_tokenizer is None:
            whole = self._tokenizer([text], add_special_tokens=add_special_tokens, **self._quiet)[
                "input_ids"
            ][0]
            yield np.asarray(whole, np.int32)
            return
        before, after = special_tokens(self._tokenizer) if add_special_tokens else ([], [])
        yield np.asarray(before, np.int32)
        for ids, _ in self.tokens(text):
            yield ids
        yield np.asarray(after, np.int32)

    def tokens(self, text: str) -> Iterator[Tokens]:
        """The tokens of ``text``, in parts, without special ones; for tokenizers with offsets."""
        starts = range(0, max(1, len(text) - _OVERLAP), _WINDOW - _OVERLAP)
        held: Tokens = (np.zeros(0, np.int32), np.zeros((0, 2), np.int64))
        for group in (
            starts[:1],
            *(starts[at : at + _AT_ONCE] for at in range(1, len(starts), _AT_ONCE)),
        ):
            windows = self._encode(
                text, [(start, min(start + _WINDOW, len(text))) for start in group]
            )
            for start, window in zip(group, windows, strict=True):
                if start == 0:
                    held = window
                    continue
                middle, known = start + _OVERLAP // 2, _borders(held)
                common = np.intersect1d(known, _borders(window), assume_unique=True)
                cut = _nearest(common if len(common) else known, middle)
                if not len(common):  # continue behind a token of the window before
                    (window,) = self._encode(text, [(cut, min(start + _WINDOW, len(text)))])
                yield _where(held, held[1][:, 0] < cut)
                held = _where(window, window[1][:, 0] >= cut)
        yield held

    def _encode(self, text: str, spans: list[tuple[int, int]]) -> list[Tokens]:
        encoded = self._offset_tokenizer(
            [text[start:end] for start, end in spans],
            add_special_tokens=False,
            return_offsets_mapping=True,
            **self._quiet,
        )
        return [
            (np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2) + start)
            for ids, offsets, (start, _) in zip(
                encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
            )
        ]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds at both ends of a text, found with one letter.

    Raises UserError if they cannot be separated from the text.
    """
    for letter in "aA0":  # with small alphabets, such as that of DNA, not every letter is a token
        plain = tokenizer([letter], add_special_tokens=False)["input_ids"][0]
        whole = tokenizer([letter], add_special_tokens=True)["input_ids"][0]
        for before in range(len(whole) if plain else 0):
            if whole[before : before + len(plain)] == plain:
                return whole[:before], whole[before + len(plain) :]
    raise UserError(
        f"{type(tokenizer).__name__} gives other tokens for a text with special tokens than without, so what it puts in "
        "front cannot be told from the text; set data.add_special_tokens=false"
    )


def pieces(parts: Iterable[NDArray[np.int32]], length: int) -> Iterator[NDArray[np.int32]]:
    """The same ids in arrays of ``length``, the last one shorter; no array without ids."""
    waiting: list[NDArray[np.int32]] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part)
        if held < length:
            continue
        joined = np.concatenate(waiting)
        whole = held - held % length
        for start in range(0, whole, length):
            yield joined[start : start + length]
        waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting)


def head(parts: Iterable[Tokens], length: int) -> Tokens:
    """The first ``length`` tokens, or as many as there are; reads no further."""
    taken: list[Tokens] = []
    held = 0
    for part in parts:
        taken.append(part)
        held += len(part[0])
        if held >= length:
            break
    return np.concatenate([ids for ids, _ in taken])[:length], np.concatenate(
        [at for _, at in taken]
    )[:length]


def _borders(tokens: Tokens) -> NDArray[np.int64]:
    """Characters at which a token starts and all earlier tokens have ended, ascending."""
    offsets = tokens[1]
    ended = np.maximum.accumulate(offsets[:-1, 1])
    starts = offsets[1:, 0]
    return starts[(starts >= ended) & (starts > np.maximum.accumulate(offsets[:-1, 0]))]


def _nearest(places: NDArray[np.int64], wanted: int) -> int:
    """The nearest of ``places``; ``wanted`` itself if there is none (a text without tokens)."""
    return int(places[np.abs(places - wanted).argmin()]) if len(places) else wanted


def _where(tokens: Tokens, chosen: NDArray[np.bool_]) -> Tokens:
    return tokens[0][chosen], tokens[1][chosen]
