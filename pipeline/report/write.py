"""``teacher-cache report``: one pass over a cache, and the page."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache_format import CachedSequence, CacheReader, UserError
from logitcask.cache_format.derive.derive import bytes_per_token
from logitcask.cache_format.export.token_text import TokenText
from logitcask.cache_format.pages.page import HERE as PAGES
from logitcask.cache_format.pages.page import refuse_foreign, render, write_page
from logitcask.cache_format.shards.codec import Codec
from logitcask.pipeline.report.content import content
from logitcask.pipeline.report.figures import Figures, choose, shortened, sizes_up_to
from logitcask.pipeline.report.student import Student
from logitcask.pipeline.report.token_class import Classes, TokenClass, token_class
from logitcask.pipeline.report.token_view import Shown, TokenView

HERE = Path(__file__).parent

SIZED_TOKENS = 20_000
"""Tokens of the sample that is encoded with smaller heads, to tell the size of a derived cache."""

_SAMPLED = 0.9
"""Share of the token view that is a sample; the rest is for the longest and strangest sequences."""

_SPOOL_BYTES = 16 << 20


_KL_WORDS = {
    "exact": "exact",
    "lower": "over the stored head, with all other ids as one: a lower bound of the KL over the whole vocabulary",
    "biased": "over the stored heads alone, both scaled to 1",
}


class _Picked:
    """The sequences of a token view that is written later, in place of the view."""

    def __init__(self) -> None:
        self.tokens = 0
        self.order: list[int] = []
        self.indices: set[int] = set()

    def __len__(self) -> int:
        return len(self.order)

    def add(self, index: int, sequence: CachedSequence) -> None:
        self.tokens += len(sequence)
        self.order.append(index)
        self.indices.add(index)


@dataclass(frozen=True)
class ReportOptions:
    """What the report reads and shows.

    sample:    tokens that the figures are of at most; a larger cache is sampled by sequences.
    tokens:    tokens in the token view at most; 0 for none.
    sequences: indices of the token view; None for a sample.
    seed:      of the samples.
    """

    sample: int = 5_000_000
    tokens: int = 200_000
    sequences: Sequence[int] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """A written page: its bytes, and the tokens and sequences in its figures and its token view."""

    bytes: int
    sequences: int
    tokens: int
    view_sequences: int
    view_tokens: int


def write_report(
    reader: CacheReader,
    out: Path,
    options: ReportOptions,
    tokenizer: Any | None = None,
    on_tokens: Callable[[int], object] = lambda tokens: None,
    student: Student | None = None,
) -> Report:
    """Writes the report on a cache to ``out``. At most some sequences are in memory at a time.

    tokenizer: of the teacher; None shows ids as numbers.
    on_tokens: receives the number of tokens of each sequence that was read.
    student:   shown beside the teacher in the token view. Its readings are in memory.

    Raises UserError for a file that is no report, for a cache that does not know all its values, and for sequences that the cache does not have.
    """
    refuse_foreign(out)
    reader.require_known("there is no report on it; `teacher-cache inspect` shows its tokens")
    manifest = reader.manifest
    totals = manifest.statistics
    if options.sequences is not None and not len(options.sequences):
        raise UserError(
            f"{reader.path} has sequences 0 to {len(reader) - 1}; --sequences chooses none of them"
        )
    text = None if tokenizer is None else TokenText(tokenizer)
    classes = None if text is None else _classes(text, tokenizer)
    figures = Figures(manifest.store.vocab_size, manifest.store.top_k, classes)
    rng = np.random.default_rng(options.seed)
    every = max(1, totals.tokens)
    chosen = choose(len(reader), options.sample / every, rng)
    to_view = set[int]()
    if options.sequences is None:
        wanted = math.ceil(_SAMPLED * len(reader) * options.tokens / every)
        to_view = set(rng.permutation(chosen)[:wanted].tolist())
    to_size = set(rng.permutation(chosen)[: 1 + SIZED_TOKENS * len(reader) // every].tolist())
    sized: list[CachedSequence] = []

    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, "w+", encoding="utf-8") as spool:
        # The sequences that a student is to read are known after the pass, and read once more.
        view: TokenView | _Picked = (
            TokenView(spool, manifest.store.vocab_size) if student is None else _Picked()
        )
        sampled = options.tokens if len(to_view) == len(reader) else _SAMPLED * options.tokens
        for index in chosen.tolist():
            sequence = reader[index]
            figures.add(index, sequence)
            if index in to_view and view.tokens + len(sequence) <= sampled:
                view.add(index, sequence)
            if index in to_size and sum(map(len, sized)) < SIZED_TOKENS:
                sized.append(sequence)
            on_tokens(len(sequence))
        for index in _also_viewed(options, figures):
            if index not in view.indices:
                sequence = reader[index]
                if view.tokens + len(sequence) <= options.tokens:
                    view.add(index, sequence)
        readings = None
        if isinstance(view, _Picked):
            assert student is not None
            picked = view.order
            readings = student.readings(picked) if picked else None
            view = TokenView(spool, manifest.store.vocab_size, readings)
            for index in picked:
                view.add(index, reader[index])
        shown = None if text is None else functools.partial(_shown, text)
        page = render(
            HERE,
            "report.html.jinja",
            styles=[HERE / "token_view.css"],
            scripts=[PAGES / "packed.js", HERE / "token_view.js"],
            view=view,
            chosen=None if options.sequences is None else len(options.sequences),
            student=None if readings is None else readings.of,
            kl_words=_KL_WORDS,
            **content(reader, figures, _smaller(reader, sized)),
        )
        facts = {
            "vocab_size": manifest.store.vocab_size,
            "rounding": math.expm1(manifest.store.rounding),
            "student": None if readings is None else readings.of.model,
        }
        data = view.elements(shown, **facts) if len(view) else ()
        size = write_page(out, page, data)
    return Report(size, figures.sequences, figures.tokens, len(view), view.tokens)


def _also_viewed(options: ReportOptions, figures: Figures) -> Iterable[int]:
    """Sequences of the token view behind the sample: those that were asked for, or those that the
    report lists.
    """
    if options.sequences is not None:
        return options.sequences
    listed = [*figures.hardest, *figures.easiest, *figures.longest]
    return dict.fromkeys(each.index for each in listed)


def _classes(text: TokenText, tokenizer: Any) -> Classes:
    """From ids to their classes."""
    special = set(tokenizer.all_special_ids)

    @functools.cache
    def found(token: int) -> TokenClass:
        part = text.partial_bytes(token) is not None
        return token_class(text.exact(token), special=token in special, part=part)

    return found


def _shown(text: TokenText, token: int) -> Shown:
    """The text of a token for the page, or its bytes if it is part of a character."""
    part = text.partial_bytes(token)
    return shortened(text.exact(token)) if part is None else list(part)


def _smaller(reader: CacheReader, sample: list[CachedSequence]) -> dict[int, float]:
    """Bytes per token of the sample with at most k entries a head, by k. The last is the cache's
    own k.
    """
    store, prior = reader.manifest.store, reader.prior
    if not sample:
        return {}
    return {
        k: bytes_per_token(
            sample,
            Codec(store.model_copy(update={"top_k": k, "min_k": min(store.min_k, k)}), prior),
            reader.manifest.fingerprint,
        )
        for k in sizes_up_to(store.top_k)
    }
