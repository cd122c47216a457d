"""``teacher-cache inspect``: one sequence as a table of tokens with the teacher's predictions.

``teacher-cache generations``: the teacher's answers as text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from logitcask.cache_format import CachedSequence, CacheReader, UserError
from logitcask.cache_format.export.token_text import TokenText
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.pipeline.config import BACKENDS, TeacherConfig
from logitcask.pipeline.teachers.open import open_tokenizer

log = logging.getLogger(__name__)

_WIDE = 100
"""Terminals of as many columns show draws."""
_WIDE_TEXT, _NARROW_TEXT = 18, 14
"""Columns of a token's own text at most."""
_WIDE_TAIL, _NARROW_TAIL = 26, 6
"""Columns of the tail with and without draws."""
_UNKNOWN = "?"
"""A value that an imported cache does not know."""


def token_text(cache: CacheReader, tokenizer: str | None) -> TokenText:
    """Ids as readable text, by the tokenizer of the cache's teacher or the named one; without a
    tokenizer ids stay numbers.

    Raises UserError for a named tokenizer that cannot be found or has other ids.
    """
    return TokenText(tokenizer_if_here(cache, tokenizer, "showing ids") or _Numbers())


def exact_text(cache: CacheReader, tokenizer: str | None) -> Callable[[int], str] | None:
    """A function from ids to the exact text of a token (``TokenText.exact``). None without a
    tokenizer.

    Raises UserError for a named tokenizer that cannot be found or has other ids.
    """
    found = tokenizer_if_here(cache, tokenizer, "without texts")
    return None if found is None else functools.cache(TokenText(found).exact)


class _Numbers:
    """A tokenizer of which nothing but the ids is known."""

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return " ".join(map(str, tokens))

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return list(map(str, tokens))


def tokenizer_if_here(cache: CacheReader, name: str | None, otherwise: str) -> Any | None:
    """The named tokenizer, or the teacher's; None, with a warning that says what is done
    ``otherwise``, if the teacher's cannot be found.
    """
    try:
        return _tokenizer_of(cache, name)
    except _NotHere as error:
        if name is not None:
            raise
        log.warning("%s, since the teacher's tokenizer is not here: %s", otherwise, error)
        return None


class _NotHere(UserError):
    """The tokenizer cannot be found."""


def _tokenizer_of(cache: CacheReader, name: str | None) -> Any:
    """The tokenizer. Raises _NotHere if it cannot be found, UserError if its ids differ."""
    manifest = cache.manifest
    model, backend = name or manifest.tokenizer.name, manifest.teacher.backend
    if model == backend and backend not in BACKENDS:
        # Code that only the manifest names is not run.
        if name is None:
            raise _NotHere(f"it is that of {backend}; --tokenizer {backend} runs its code")
        model = manifest.teacher.model
    elif backend != "synthetic":
        backend = "transformers"
    try:
        found = open_tokenizer(TeacherConfig(model=model, backend=backend))
    except UserError as error:
        raise _NotHere(str(error)) from error
    if tokenizer_identity(found, None)["vocab_sha256"] != manifest.tokenizer.vocab_sha256:
        raise UserError(
            f"the tokenizer {name or model} has other ids than the one this cache was made with; name that one with --tokenizer"
        )
    return found


def generations(cache: CacheReader, tokenizer: str | None) -> Iterator[dict[str, Any]]:
    """Every answer of a cache whose text the teacher wrote: id, prompt, answer, tokens, and the
    reason of its end.

    ``prompt`` is the teacher's input with special tokens, and ``answer`` its text without them.
    ``finish`` is ``stop`` or ``length``, or None if the cache no longer names the end tokens (it
    was merged).

    Raises UserError for a cache of other text, and if its tokenizer cannot be found.
    """
    data = cache.manifest.data
    if data.mask_policy != "generated":
        raise UserError(
            f"{cache.path} holds no generations: its text is {data.source}'s own (loss mask: {data.mask_policy}); "
            "only a build with data.generate lets the teacher write"
        )
    found = _tokenizer_of(cache, tokenizer)
    for sequence in cache:
        begin = int(sequence.positions[0]) + 1
        prompt, answer = sequence.input_ids[:begin].tolist(), sequence.input_ids[begin:].tolist()
        finish = None
        if data.generation is not None:
            room = data.max_length - begin
            longest = min(room, data.generation.max_new_tokens or room)
            ended = answer[-1] in data.generation.end_tokens or len(answer) < longest
            finish = "stop" if ended else "length"
        yield {
            "id": sequence.sequence_id,
            "prompt": found.decode(prompt),
            "answer": found.decode(answer, skip_special_tokens=True),
            "tokens": len(answer),
            "finish": finish,
        }


def texts(cache: CacheReader) -> Iterator[str]:
    """The text of every sequence; nothing, with a warning, if its tokenizer cannot be found."""
    found = tokenizer_if_here(cache, None, f"{cache.path} is not searched")
    if found is not None:
        for batch in cache.iter_column("input_ids"):
            for ids in batch:
                yield found.decode(ids.values.to_pylist())


def table(sequence: CachedSequence, text: TokenText, top: int, width: int) -> Table:
    """A line per token: its text, the teacher's probability and rank of it, the most probable tokens
    there, and the tail.

    Tokens outside the loss mask are dim. Spaces are shown as ``␣``. A token that completes a
    character of several tokens also shows the character. The next token of the text is green if the
    teacher lists it. If there is room, the first draws from the tail are shown beside its mass.

    top:   most probable tokens to show; fewer if they do not fit, with the number of the others.
    width: columns of the terminal.
    """
    shown = Table(
        title=f"{sequence.sequence_id}: {len(sequence)} tokens, {len(sequence.positions)} kept positions",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    tokens = sequence.input_ids.tolist()
    written = [_visible(each) for each in text.sequence(tokens)]
    ranks = [_UNKNOWN if rank < 0 else f"{rank:,}" for rank in sequence.target_rank.tolist()]
    # Without the tail's mass, probabilities are shares of the head.
    unknown = np.isnan(sequence.target_logprob) | np.isnan(sequence.tail_logprob)
    own, tail = (_WIDE_TEXT, _WIDE_TAIL) if width >= _WIDE else (_NARROW_TEXT, _NARROW_TAIL)
    widths = {
        "token": max(5, len(str(len(tokens)))),
        "": min(max(map(cell_len, written), default=1), own),
        "teacher": 7,
        "rank": max([4, *map(len, ranks)]),
        f"top {top}": 0,
        "tail": tail,
    }
    # Between two columns are two: the padding and the line of the box.
    room = max(12, width - sum(widths.values()) - 2 * len(widths))
    widths[f"top {top}"] = room
    for name, columns in widths.items():
        shown.add_column(
            name,
            justify="right" if name in ("token", "teacher", "rank") else "left",
            width=columns,
            no_wrap=True,
            overflow="ellipsis",
        )
    row_of = {int(position) + 1: row for row, position in enumerate(sequence.positions)}
    for at, (token, each) in enumerate(zip(tokens, written, strict=True)):
        row = row_of.get(at)
        if row is None:
            shown.add_row(str(at), Text(each), "", "", "", "", style="dim")
            continue
        shown.add_row(
            str(at),
            Text(each),
            _UNKNOWN if unknown[row] else f"{np.exp(sequence.target_logprob[row]):.1%}",
            ranks[row],
            _most_probable(sequence, row, token, text, top, room),
            _tail(sequence, row, text, tail),
        )
    return shown


def _visible(text: str) -> str:
    return text.replace(" ", "␣")


def _most_probable(
    sequence: CachedSequence, row: int, token: int, text: TokenText, top: int, room: int
) -> Text:
    """The head's first entries that fit in ``room`` columns, and how many of ``top`` do not."""
    entries = [
        (candidate, f"{np.exp(logprob):.0%}")
        for candidate, logprob in zip(
            sequence.ids[row, :top].tolist(), sequence.logprobs[row, :top], strict=True
        )
        if candidate >= 0
    ]
    shown = Text()
    for place, (candidate, probability) in enumerate(entries):
        name, left = _visible(text(candidate)), len(entries) - place - 1
        used = shown.cell_len + cell_len(name) + 1 + len(probability)
        if place and used + (len(f"  +{left}") if left else 0) > room:
            shown.append(f"+{left + 1}", style="dim")
            break
        shown.append(name, style="bold green" if candidate == token else "")
        shown.append(f" {probability}" + ("  " if left else ""), style="dim")
    return shown


def document(sequence: CachedSequence, text: TokenText, top: int) -> dict[str, Any]:
    """The same as ``table`` in JSON values, with all draws and logprobs in nats.

    ``teacher`` is None for tokens outside the loss mask; a value that is not known is nan or None. A draw's ``logprob`` is nan if the cache
    does not store it.
    """
    row_of = {int(position) + 1: row for row, position in enumerate(sequence.positions)}
    tokens: list[dict[str, Any]] = []
    for at, token in enumerate(sequence.input_ids.tolist()):
        row = row_of.get(at)
        teacher = None if row is None else _teacher(sequence, row, text, top)
        tokens.append({"id": token, "text": text(token), "teacher": teacher})
    return {
        "sequence": sequence.sequence_id,
        "kept_positions": len(sequence.positions),
        "tokens": tokens,
    }


def _teacher(sequence: CachedSequence, row: int, text: TokenText, top: int) -> dict[str, Any]:
    def entries(ids: Any, logprobs: Any) -> list[dict[str, Any]]:
        return [
            {"id": token, "text": text(token), "logprob": logprob}
            for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True)
            if token >= 0
        ]

    draws = sequence.samples
    drawn = None
    if draws is not None:
        ids = draws.ids[row].ravel()
        drawn = entries(
            ids,
            np.full(len(ids), np.nan) if draws.logprobs is None else draws.logprobs[row].ravel(),
        )
    return {
        "logprob": float(sequence.target_logprob[row]),
        "rank": None if sequence.target_rank[row] < 0 else int(sequence.target_rank[row]),
        "top": entries(sequence.ids[row, :top], sequence.logprobs[row, :top]),
        "tail_logprob": float(sequence.tail_logprob[row]),
        "draws": drawn,
    }


def _tail(sequence: CachedSequence, row: int, text: TokenText, columns: int) -> Text:
    """The mass of the tail, and as many of its draws as fit in ``columns``."""
    tail = sequence.tail_logprob[row]
    shown = Text(f"{_UNKNOWN:>6}" if np.isnan(tail) else f"{np.exp(tail):6.1%}")
    if sequence.samples is not None:
        drawn = sequence.samples.ids[row][sequence.samples.ids[row] >= 0].tolist()
        for each in dict.fromkeys(drawn):
            name = f"  {_visible(text(each))}"
            if shown.cell_len + cell_len(name) > columns:
                break
            shown.append(name, style="dim")
    return shown
