"""Texts of the page of rounds: what the students wrote, and the same prompts answered round by round.

Everything is read from files that the stages leave: ``answers.json`` of each student, and the first
shard of each cache. No model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.errors import LogitcaskError
from logitcask.cache_format.export.token_text import TokenText, printable
from logitcask.rounds.augment import rows_in, text_of

SHOWN_ROUNDS = 8
"""Rounds whose texts are shown at most: the first, the last, and some between."""

_PROMPTS = 4
_TOKENS = 300
"""Tokens of an answer that are shown."""
_PROMPT_LETTERS = 400
_HARD = 3
"""Hard prompts of a round that are shown with the new ones like them."""
_NEW = 3

BOUNDS = (0.1, 0.5, 1, 2, 3, 5, 7, 10)
"""Surprises in nats at which the colour of a token changes, as in the token view."""


@dataclass(frozen=True)
class Piece:
    """Text with one colour: of a token, or of tokens that are a character only together. ``level``:
    place of the teacher's surprise among ``BOUNDS``; None if the teacher was not asked.
    """

    text: str
    level: int | None


@dataclass(frozen=True)
class Written:
    """An answer: its round, its pieces, the mean of the teacher's surprise over its tokens, in nats,
    and the number of its tokens.
    """

    round: int
    pieces: list[Piece]
    surprise: float
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its answers in the order of the rounds."""

    name: str
    text: str
    answers: list[Written] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """A held-out prompt: the cached answer, and the student's greedy answers as (round, text)."""

    prompt: str
    reference: str
    answers: list[tuple[int, str]]


@dataclass(frozen=True)
class Hard:
    """A prompt that was hard in the round before ``round``, with its KL in nats per token, and the
    new prompts that the teacher wrote like it.
    """

    round: int
    prompt: str
    kl: float
    new: list[str]


def augmented(folder: Path, numbers: Sequence[int]) -> list[Hard]:
    """The hardest prompts of the shown rounds that new ones came from."""
    found = []
    for number in spread(numbers):
        files = [folder / f"round-{number:03d}" / f"{each}.jsonl" for each in ("hard", "prompts")]
        if not all(each.is_file() for each in files):
            continue
        requests, prompts = (rows_in(each) for each in files)
        new: dict[str, list[str]] = {}
        for row in prompts:
            if "like" in row:
                new.setdefault(row["like"], []).append(seen(text_of(row) or "")[:_PROMPT_LETTERS])
        hard: dict[str, dict[str, Any]] = {}
        for each in requests:  # the hardest first, and each several times
            hard.setdefault(each["like"], each)
        found += [
            Hard(number, seen(each["prompt"])[-_PROMPT_LETTERS:], each["kl"], new[name][:_NEW])
            for name, each in hard.items()
            if name in new
        ][:_HARD]
    return found


def spread(numbers: Sequence[int], most: int = SHOWN_ROUNDS) -> list[int]:
    """At most ``most`` of ``numbers``, evenly: the first, the last, and some between."""
    at = np.linspace(0, len(numbers) - 1, min(most, len(numbers)))
    return [numbers[each] for each in at.round().astype(int)]


def asked(folder: Path, numbers: Sequence[int]) -> list[Asked]:
    """The first held-out prompts that every shown student has answered (``evaluation.answers``)."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    shown = spread(numbers)
    for number in shown:
        file = folder / f"round-{number:03d}" / "student" / "answers.json"
        answers: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
        for each in answers:
            key = (str(each["prompt"]), str(each["reference"]))
            found.setdefault(key, []).append((number, seen(str(each["student"]))))
    complete = [(key, each) for key, each in found.items() if len(each) == len(shown)]
    return [
        Asked(seen(prompt)[-_PROMPT_LETTERS:], seen(reference), each)
        for (prompt, reference), each in complete[:_PROMPTS]
    ]


def written(folder: Path, caches_of: dict[int, str]) -> list[Prompt]:
    """Answers of the shown rounds: of the prompts that most of them have, and of the first prompt of
    each round that has none of these. A cache that cannot be read is left out.

    caches_of: the cache of each round, below ``folder``.
    """
    caches, numbers = {}, list(caches_of)
    for number in spread(numbers):
        try:
            cache = CacheReader(folder / caches_of[number])
            ids = [
                name for part in cache.iter_column("sequence_id", [0]) for name in part.to_pylist()
            ]
        except LogitcaskError:
            continue
        if ids:
            caches[number] = (cache, {name: at for at, name in reversed([*enumerate(ids)])})
    text = _text_of(folder, numbers)
    return [
        _prompt(name, caches, text) for name in _names([places for _, places in caches.values()])
    ]


def _names(places: list[dict[str, int]]) -> list[str]:
    """The sequences to show."""
    count: dict[str, int] = {}
    for each in places:
        for name in sorted(each, key=each.__getitem__):
            count[name] = count.get(name, 0) + 1
    again = sorted((name for name in count if count[name] > 1), key=lambda name: -count[name])
    chosen = again[:_PROMPTS]
    for each in places:
        if not any(name in each for name in chosen):
            chosen.append(min(each, key=each.__getitem__))
    return chosen


def _prompt(
    name: str, caches: dict[int, tuple[CacheReader, dict[str, int]]], text: TokenText
) -> Prompt:
    found: Prompt | None = None
    for number, (cache, places) in caches.items():
        if name not in places:
            continue
        sequence = cache[places[name]]
        if found is None:
            before = sequence.input_ids[: _start(sequence)].tolist()
            prompt = "".join(
                piece for piece, _ in _merged(text, [(token, None) for token in before])
            )
            found = Prompt(printable(name), prompt[-_PROMPT_LETTERS:])
        found.answers.append(_answer(number, sequence, text))
    assert found is not None
    return found


def _start(sequence: CachedSequence) -> int:
    """The number of the first token that the teacher has predicted."""
    return int(sequence.positions[0]) + 1 if len(sequence.positions) else len(sequence)


def _answer(number: int, sequence: CachedSequence, text: TokenText) -> Written:
    loss: dict[int, float] = dict(
        zip(
            (sequence.positions + 1).tolist(),
            (-sequence.target_logprob.astype(np.float64)).tolist(),
            strict=True,
        )
    )
    start = _start(sequence)
    tokens = [
        (token, loss.get(start + at))
        for at, token in enumerate(sequence.input_ids[start : start + _TOKENS].tolist())
    ]
    pieces = [
        Piece(piece, None if surprise is None else int(np.digitize(surprise, BOUNDS)))
        for piece, surprise in _merged(text, tokens)
    ]
    mean = sum(loss.values()) / len(loss) if loss else 0.0
    return Written(number, pieces, mean, len(sequence) - start)


def _merged(
    text: TokenText, tokens: list[tuple[int, float | None]]
) -> Iterator[tuple[str, float | None]]:
    """(text, surprise) of tokens; those that are one character only together are one, with the sum
    of their surprises.
    """
    waiting, total = b"", 0.0
    for token, surprise in tokens:
        part = text.partial_bytes(token)
        if part is None:
            if waiting:
                yield waiting.decode(errors="backslashreplace"), total
            yield seen(text.exact(token)), surprise
            waiting, total = b"", 0.0
            continue
        waiting, total = waiting + part, total + (surprise or 0.0)
        try:
            yield seen(waiting.decode()), None if surprise is None else total
        except UnicodeDecodeError:
            continue
        waiting, total = b"", 0.0
    if waiting:
        yield waiting.decode(errors="backslashreplace"), total


def seen(text: str) -> str:
    """A text with its line ends; other characters that are invisible or change the order of what is
    shown are escapes.
    """
    return "".join(
        letter if letter == "\n" or letter.isprintable() else printable(letter) for letter in text
    )


class _File:
    """A ``tokenizer.json`` as far as ``TokenText`` needs it."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [self._tokenizer.id_to_token(token) or "" for token in tokens]


class _Numbers:
    """A tokenizer of which nothing but the ids is known."""

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(f" {token}" for token in tokens)

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [str(token) for token in tokens]


def _text_of(folder: Path, numbers: Sequence[int]) -> TokenText:
    """Ids as text by a student's tokenizer.json; numbers without one that can be read."""
    for number in numbers:
        file = folder / f"round-{number:03d}" / "student" / "tokenizer.json"
        if file.is_file():
            try:
                return TokenText(_File(file), None)
            except Exception:  # of a format that this version of tokenizers does not know
                break
    return TokenText(_Numbers(), None)
