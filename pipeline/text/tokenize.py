"""From rows to sequences: the tokens that the teacher reads, and those that a student learns.

Documents: every token except the first is learnt. A document above ``max_length`` may be cut into
consecutive pieces. Each piece is scored on its own, without the pieces before it. The tokens that
the tokenizer puts in front of a text (usually BOS) are put in front of every piece, because a
teacher trained with them predicts badly without them. They are context and are not learnt. Without
such tokens, the first token of a piece is not learnt. A text that already has the special tokens,
for example because another tool has rendered it, gets no second ones.

Chats: a chat is rendered once as a whole with the chat template and tokenised once. The text of the
assistant is learnt, including its end-of-turn token. Its characters are found in the rendered text
(``chats``). A token is the assistant's if it holds at least one of them.

Prompts with completions and without a chat template: both are one text, tokenised once. A token is
learnt if it holds a character of the completion.

A text above a million characters is tokenised in parts (``long_texts``). If the rest is cut off or
the text is left out, it is tokenised only as far as ``max_length`` needs.
"""

from __future__ import annotations

import hashlib
import logging
import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.chat_template import ChatTemplate, Messages, Refused, Span
from logitcask.pipeline.text.chats import render, tokens_in
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.long_texts import (
    LONG,
    LongTexts,
    Tokens,
    head,
    pieces,
    special_tokens,
    with_whole_offsets,
)
from logitcask.pipeline.text.rejects import CUT, Reject, Report, ignore
from logitcask.pipeline.text.shorten import end_of, tail, without_oldest_turns
from logitcask.pipeline.text.sources import Row
from logitcask.pipeline.types import Sequence

log = logging.getLogger(__name__)

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 20
_PIECE_LIKE = re.compile(r"/\d+$")
# BOS of common tokenizers. A text that begins with another tokenizer's BOS was rendered for it.
_KNOWN_BOS = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
)


class _Encoded(NamedTuple):
    """A rendered text with its tokens, int32[n], and what is learnt of them, bool[n]."""

    text: _Rendered
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]


class _Made(NamedTuple):
    """A sequence, the counters that go up if it is taken, and more about its cut, if it has one."""

    sequence: Sequence
    kinds: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A chat, or a prompt with its completion, as text. ``spans``: learnt characters, ascending,
    end exclusive. ``unlearnt``: number of the assistant's turns that are not learnt. ``kinds``:
    counters of its text.
    """

    row: Row
    text: str
    spans: list[Span]
    unlearnt: int
    kinds: tuple[str, ...] = ()


class Tokenization:
    """Turns the rows of one source into sequences.

    tokenizer:  a fast tokenizer of transformers, or anything with its surface: ``tokenizer(list of
                str, add_special_tokens=..., return_offsets_mapping=...)`` and
                ``apply_chat_template``.
    vocab_size: how many ids the teacher knows; every id must be below it.

    ``template`` is the chat template in force, None for documents.

    ``counters`` describes the latest ``sequences()``: ``documents``, ``chats`` or ``completions``
    used; ``second_bos_removed`` and ``second_eos_removed``, documents whose text held what the
    tokenizer adds; ``foreign_bos``, those that begin with the BOS of another tokenizer, which is text to this
    one; ``split_documents`` and the ``pieces`` they gave; ``truncated`` and ``truncated_left``;
    ``shortened``, chats without their oldest turns, and ``messages_dropped`` of these;
    ``dropped_overlong``; ``without_tokens``; ``nothing_to_learn`` (chats in which the assistant says
    nothing that is learnt); ``prompt_too_long`` (the prompt alone fills ``max_length``);
    ``special_tokens_in_content`` (chats with a text that spells a special token);
    ``refused_by_template``; ``turns_not_learnt`` (of the chats used, the assistant's turns that a
    mark makes context); ``sequences``; ``tokens``; ``kept_positions``; ``stopped_at_max_tokens`` (0
    or 1). ``report`` receives each row that is left out or cut.

    Raises UserError if the tokenizer lacks what the config asks for: a chat template, offsets, an
    EOS token.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = None
        self._config = config
        self._vocab_size = vocab_size
        self._counters: Counter[str] = Counter()
        self._refusal = ""
        self.report: Report = ignore
        # transformers warns about texts above the model's length, but here they are cut.
        self._quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        if config.append_eos and tokenizer.eos_token_id is None:
            raise UserError(
                "data.append_eos is set, but the tokenizer has no EOS token; leave append_eos out"
            )
        if config.kind == "chats":
            self.template = ChatTemplate(tokenizer, config)
        if config.kind == "chats" or config.has_completions:
            self._offset_tokenizer = _with_offsets(tokenizer)

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def sequences(self, rows: Iterable[Row]) -> Iterator[Sequence]:
        """Streams the sequences of ``rows`` up to ``max_tokens``; ids are ``row_id``, or
        ``row_id/piece`` for pieces.

        Rows are read in batches, so a source may have read a few more rows than were used.

        Raises UserError: an id outside the vocabulary, two sequences of one id, a template whose
        assistant turns cannot be found, the first sequence alone above ``max_tokens``, a document
        to be cut into pieces that have no room for text, or no sequence at all.
        """
        self._counters = Counter(sequences=0, tokens=0, kept_positions=0, stopped_at_max_tokens=0)
        self._refusal = ""
        used: set[int] = set()
        for batch in batches(rows):
            for sequence, kinds, detail in self._made_of(batch):
                if not self._fits(sequence):
                    return
                self._check(sequence, used)
                self._counters.update(kinds)
                for cut in set(CUT).intersection(kinds):
                    self.report(Reject(sequence.sequence_id, cut, detail))
                self._counters["sequences"] += 1
                self._counters["tokens"] += len(sequence.input_ids)
                self._counters["kept_positions"] += int(sequence.loss_mask.sum())
                yield sequence
        if self._counters["sequences"] == 0:
            raise UserError(self._nothing_made())

    def _made_of(self, batch: list[Row]) -> Iterator[_Made]:
        if self.template is not None:
            yield from self._masked(self._render_all(batch, self.template))
            return
        for completions, rows in groupby(batch, lambda row: row.completion is not None):
            if completions:
                yield from self._masked(map(self._joined, rows))
            else:
                yield from self._documents(list(rows))

    def _leave_out(self, row_id: str, reason: str, detail: str = "") -> None:
        self._counters[reason] += 1
        self.report(Reject(row_id, reason, detail))

    # --- documents ---

    def _documents(self, batch: list[Row]) -> Iterator[_Made]:
        config = self._config
        cleaned = [self._added.once(row.text or "") for row in batch]
        texts = [text for text, _ in cleaned]
        short = [text for text in texts if len(text) <= LONG]
        encoded = iter(
            self.tokenizer(short, add_special_tokens=config.add_special_tokens, **self._quiet)[
                "input_ids"
            ]
            if short
            else ()
        )
        for row, (text, found) in zip(batch, cleaned, strict=True):
            if len(text) <= LONG:
                parts: Iterable[NDArray[np.int32]] = [np.asarray(next(encoded), np.int32)]
            else:
                parts = self._long_texts.ids(text, add_special_tokens=config.add_special_tokens)
            yield from self._document(
                row, self._ended(parts) if config.append_eos else parts, found
            )

    def _document(
        self, row: Row, parts: Iterable[NDArray[np.int32]], found: tuple[str, ...]
    ) -> Iterator[_Made]:
        """``parts``: ids of the document, read as far as needed. ``found``: its counters."""
        cut = pieces(parts, self._config.max_length)
        first, second = next(cut, None), next(cut, None)
        if first is None:
            self._leave_out(row.row_id, "without_tokens")
        elif second is None:
            yield _Made(_learnt(row.row_id, first), ("documents", *found))
        elif self._config.overlong == "drop":
            self._leave_out(row.row_id, "dropped_overlong")
        elif self._config.overlong == "truncate":
            yield _Made(_learnt(row.row_id, first), ("documents", "truncated", *found))
        elif self._config.overlong == "truncate_left":
            beginning, room = self._beginning, self._room
            end = np.concatenate(deque(chain((first, second), cut), maxlen=2))[-room:]
            yield _Made(
                _learnt(row.row_id, np.concatenate((beginning, end)), given=max(1, len(beginning))),
                ("documents", "truncated_left", *found),
            )
        else:  # a last piece of one token is kept, so that the pieces together, each begun once, are the text
            beginning, room = self._beginning, self._room
            yield _Made(
                _learnt(f"{row.row_id}/0", first),
                ("documents", "split_documents", "pieces", *found),
            )
            for number, rest in enumerate(pieces(chain((second,), cut), room), 1):
                piece = np.concatenate((beginning, rest))
                yield _Made(
                    _learnt(f"{row.row_id}/{number}", piece, given=max(1, len(beginning))),
                    ("pieces",),
                )

    def _ended(self, parts: Iterable[NDArray[np.int32]]) -> Iterator[NDArray[np.int32]]:
        """The ids with EOS at the end, unless they have one or are empty."""
        eos, last = self.tokenizer.eos_token_id, None
        for part in parts:
            last = part[-1] if len(part) else last
            yield part
        if last is not None and last != eos:
            yield np.asarray([eos], np.int32)

    @cached_property
    def _beginning(self) -> NDArray[np.int32]:
        """Ids that the tokenizer puts in front of a document; n = 0 if it adds none."""
        return np.asarray(
            special_tokens(self.tokenizer)[0] if self._config.add_special_tokens else [], np.int32
        )

    @property
    def _room(self) -> int:
        """Tokens of text in a piece behind its beginning. Raises UserError if there are none."""
        room = self._config.max_length - len(self._beginning)
        if room < 1:
            raise UserError(self._no_room())
        return room

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(self.tokenizer)

    @cached_property
    def _added(self) -> AddedTokens:
        return AddedTokens(self.tokenizer, self._config.add_special_tokens)

    # --- chats and completions ---

    def _masked(self, rendered: Iterable[_Rendered]) -> Iterator[_Made]:
        """Sequences of texts of which a part is learnt."""
        for encoded in self._encoded(list(rendered)):
            if len(encoded.ids) > self._config.max_length:
                yield from self._overlong(*encoded)
            else:
                yield from self._learnable(*encoded)

    def _encoded(self, texts: list[_Rendered]) -> Iterator[_Encoded]:
        for text, (ids, offsets) in zip(texts, self._tokens([t.text for t in texts]), strict=True):
            yield self._with_special_tokens(text, ids, tokens_in(text.spans, offsets))

    def _learnable(
        self,
        text: _Rendered,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        kinds: tuple[str, ...] = (),
        detail: str = "",
    ) -> Iterator[_Made]:
        """The sequence, unless it has nothing to learn. ``kinds``: counters of its cut."""
        if not mask.any():
            answered = any(end > start for start, end in text.spans)
            cut_off = answered and "truncated" in kinds
            self._leave_out(text.row.row_id, "prompt_too_long" if cut_off else "nothing_to_learn")
            return
        kind = "completions" if text.row.completion is not None else "chats"
        kinds = (kind, *["turns_not_learnt"] * text.unlearnt, *text.kinds, *kinds)
        yield _Made(Sequence(text.row.row_id, ids, mask), kinds, detail)

    def _overlong(
        self, text: _Rendered, ids: NDArray[np.int32], mask: NDArray[np.bool_]
    ) -> Iterator[_Made]:
        limit = self._config.max_length
        if self._config.overlong == "drop":
            self._leave_out(text.row.row_id, "dropped_overlong")
        elif self._config.overlong == "drop_turns" and self.template is not None:
            yield from self._without_oldest_turns(text.row, self.template)
        elif self._config.overlong == "truncate_left":
            cut = end_of(self._front(text), ids, mask, limit)
            yield from self._learnable(text, *cut, ("truncated_left",))
        else:  # a piece from the middle of a chat is no chat, so `split` cuts off as `truncate` does
            yield from self._learnable(text, ids[:limit], mask[:limit], ("truncated",))

    def _without_oldest_turns(self, row: Row, template: ChatTemplate) -> Iterator[_Made]:
        """The chat without as many of its oldest turns as do not fit."""
        shorter = without_oldest_turns(row)
        tried: dict[int, _Encoded] = {}

        def fits(number: int) -> bool:
            prepared = template.prepared(shorter[number].messages or [], row.tools)
            text = self._rendered(shorter[number], prepared, template)
            (tried[number],) = self._encoded([text])
            return len(tried[number].ids) <= self._config.max_length

        try:
            first = bisect_left(range(len(shorter)), True, key=fits)
        except Refused as refusal:
            self._refuse(row.row_id, refusal)
            return
        if first == len(shorter):
            self._leave_out(row.row_id, "dropped_overlong", "its last turn alone is longer")
            return
        messages = len(row.messages or [])
        gone = messages - len(shorter[first].messages or [])
        kinds = ("shortened", *["messages_dropped"] * gone)
        yield from self._learnable(*tried[first], kinds, f"{gone} of {messages} messages dropped")

    def _with_special_tokens(
        self, text: _Rendered, ids: NDArray[np.int32], mask: NDArray[np.bool_]
    ) -> _Encoded:
        """The text with its tokens and what is learnt of them. A completion gets the special tokens that a
        document gets; those at its end are learnt.
        """
        if text.row.completion is not None:
            eos, ends = self.tokenizer.eos_token_id, list(self._ends)
            if self._config.append_eos and (*ids[-1:], *ends)[-1:] != (eos,):
                ends.append(eos)
            beginning = self._beginning
            ids = np.concatenate((beginning, ids, np.asarray(ends, np.int32)))
            mask = np.concatenate(
                (np.zeros(len(beginning), np.bool_), mask, np.ones(len(ends), np.bool_))
            )
        mask[:1] = False
        return _Encoded(text, ids, mask)

    @cached_property
    def _ends(self) -> list[int]:
        """Ids that the tokenizer puts behind a document."""
        return special_tokens(self.tokenizer)[1] if self._config.add_special_tokens else []

    def _front(self, text: _Rendered) -> NDArray[np.int32]:
        """The tokens that stay in front of a text whose beginning is cut off."""
        if text.row.completion is not None:
            return self._beginning
        bos = getattr(self.tokenizer, "bos_token", None)
        begun = bos is not None and text.text.startswith(bos)
        return np.asarray([self.tokenizer.bos_token_id] if begun else [], np.int32)

    def _tokens(self, texts: list[str]) -> Iterator[Tokens]:
        """The tokens of rendered texts; of long ones, only enough to exceed ``max_length``."""
        short = [text for text in texts if len(text) <= LONG]
        if short:
            encoded = self._offset_tokenizer(
                short, add_special_tokens=False, return_offsets_mapping=True, **self._quiet
            )
            ready = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        part = tail if self._config.overlong == "truncate_left" else head
        for text in texts:
            if len(text) > LONG:
                yield part(self._long_texts.tokens(text), self._config.max_length + 1)
            else:
                ids, offsets = next(ready)
                yield np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def _joined(self, row: Row) -> _Rendered:
        """A prompt and its completion as one text, without special tokens at its ends that the
        tokenizer adds.
        """
        prompt = row.text or ""
        whole = prompt + (row.completion or "")
        start, end, found = self._added.inner(whole)
        span = (max(0, len(prompt) - start), end - start)
        return _Rendered(row, whole[start:end], [span], 0, found)

    def _render_all(self, batch: list[Row], template: ChatTemplate) -> Iterator[_Rendered]:
        for row in batch:
            messages = row.messages or []
            if not any(
                message["role"] == "assistant" and turn not in row.unlearnt
                for turn, message in enumerate(messages)
            ):
                self._leave_out(row.row_id, "nothing_to_learn")
                continue
            messages = template.prepared(messages, row.tools)
            template.check_tools(row.row_id, messages, row.tools)
            if template.special_token_in(row.row_id, messages, row.tools):
                self._counters["special_tokens_in_content"] += 1
            try:
                yield self._rendered(row, messages, template)
            except Refused as refusal:
                self._refuse(row.row_id, refusal)

    def _rendered(self, row: Row, messages: Messages, template: ChatTemplate) -> _Rendered:
        """The chat as text; ``messages`` are prepared. Raises Refused if the template does."""
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = [turn for turn in turns if turn not in row.unlearnt]
        text, spans = render(template, messages, row, learnt)
        return _Rendered(row, text, spans, len(turns) - len(learnt))

    def _refuse(self, row_id: str, refusal: Refused) -> None:
        """A row that the template refuses. Raises UserError with ``data.on_bad_rows`` fail."""
        if self._config.on_bad_rows == "fail":
            raise UserError(refused_row(row_id, refusal, self._config))
        self._leave_out(row_id, "refused_by_template", str(refusal))
        self._refusal = self._refusal or f"{row_id}: {refusal}"

    # --- checks ---

    def _fits(self, sequence: Sequence) -> bool:
        limit, tokens = self._config.max_tokens, len(sequence.input_ids)
        if limit is None or self._counters["tokens"] + tokens <= limit:
            return True
        if self._counters["sequences"] == 0:
            raise UserError(
                f"data.max_tokens is {limit}, but the first sequence ({sequence.sequence_id}) alone has {tokens} "
                "tokens; raise max_tokens or lower data.max_length"
            )
        self._counters["stopped_at_max_tokens"] = 1
        return False

    def _check(self, sequence: Sequence, used: set[int]) -> None:
        check_ids(sequence.input_ids, self._vocab_size, f"sequence {sequence.sequence_id}")
        # Row ids are unique. Only an id that looks like a piece ("book/0") can equal that of a
        # piece of another row ("book").
        if self._config.id_field is not None and _PIECE_LIKE.search(sequence.sequence_id):
            digest = int.from_bytes(
                hashlib.blake2b(sequence.sequence_id.encode(), digest_size=8).digest()
            )
            if digest in used:
                raise UserError(
                    f"two sequences are called {sequence.sequence_id!r}, one of them a piece of a longer document; "
                    "choose another data.id_field, or none to use row numbers"
                )
            used.add(digest)

    def _no_room(self) -> str:
        return (
            f"a piece of a long document gives no token to learn: each begins with the tokens that the tokenizer puts in "
            f"front of a text ({len(self._beginning)}), which leaves no room for text; raise data.max_length "
            f"({self._config.max_length}), or set data.add_special_tokens=false or data.overlong=drop"
        )

    def _nothing_made(self) -> str:
        reasons = ", ".join(f"{n} {name}" for name, n in self._counters.items() if n) or "no rows"
        first = f" (the first one: {self._refusal})" if self._refusal else ""
        return (
            f"no sequence came out of {self._config.where}: {reasons}{first}; "
            "look at data.max_length, data.overlong and the chat template"
        )


class AddedTokens:
    """Documents without the special tokens at their ends that the tokenizer adds to every text."""

    def __init__(self, tokenizer: Any, add_special_tokens: bool) -> None:
        self._tokenizer, self._adds = tokenizer, add_special_tokens
        self._warned = False

    def once(self, text: str) -> tuple[str, tuple[str, ...]]:
        """``text`` without these tokens, and the counters of ``Tokenization`` to increase."""
        start, end, found = self.inner(text)
        return text[start:end], found

    def inner(self, text: str) -> tuple[int, int, tuple[str, ...]]:
        """The characters of ``text`` without these tokens, end exclusive, and the counters."""
        beginnings, ends = self._strings
        found = []
        start, end = 0, len(text)
        while (at := next((len(b) for b in beginnings if text.startswith(b, start)), 0)) > 0:
            start += at
        if start:
            found.append("second_bos_removed")
        while (at := next((len(e) for e in ends if text.endswith(e, start, end)), 0)) > 0:
            end -= at
        if end < len(text):
            found.append("second_eos_removed")
        foreign = next((bos for bos in self._foreign if text.startswith(bos)), None)
        if foreign is not None:
            found.append("foreign_bos")
            if not self._warned:
                log.warning(
                    "a document begins with %s, which another tokenizer takes for the beginning of a text and this one for "
                    "text, to be learnt; take it out of the data if that is not meant (counted as foreign_bos)",
                    foreign,
                )
                self._warned = True
        return start, end, tuple(found)

    @cached_property
    def _strings(self) -> tuple[list[str], list[str]]:
        """The strings of the tokens that are added in front (or of the last of them) and behind (or
        of the first of them); longest first.
        """
        if not self._adds:
            return [], []
        try:
            before, after = special_tokens(self._tokenizer)
        except UserError:  # the added tokens cannot be separated from the text
            return [], []
        beginnings = [self._spelled(before[at:]) for at in range(len(before))]
        ends = [self._spelled(after[:at]) for at in range(len(after), 0, -1)]
        return [each for each in beginnings if each], [each for each in ends if each]

    def _spelled(self, ids: list[int]) -> str:
        """The text of the special tokens ``ids``; empty if there is none."""
        if not set(ids) <= {
            *self._tokenizer.all_special_ids,
            *getattr(self._tokenizer, "added_tokens_decoder", {}),
        }:
            return ""
        spelled = "".join(map(str, self._tokenizer.convert_ids_to_tokens(ids)))
        again = self._tokenizer([spelled], add_special_tokens=False)["input_ids"][0]
        return spelled if list(again) == ids else ""

    @cached_property
    def _foreign(self) -> tuple[str, ...]:
        own = self._tokenizer.get_vocab() if hasattr(self._tokenizer, "get_vocab") else {}
        return tuple(bos for bos in _KNOWN_BOS if bos not in own) if own else ()


def _learnt(sequence_id: str, ids: NDArray[np.int32], given: int = 1) -> Sequence:
    """A sequence whose tokens are learnt, except the first ``given``, at least one: the very first
    token has no prediction.
    """
    mask = np.ones(len(ids), np.bool_)
    mask[:given] = False
    return Sequence(sequence_id, ids, mask)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows to tokenise in one call: enough for the tokenizer's threads, few enough for memory."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += row.characters
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def refused_row(row_id: str, refusal: Refused, config: DataConfig) -> str:
    """The message about a chat that stops a build with ``data.on_bad_rows`` fail."""
    return (
        f"the chat template refuses row {row_id} of {config.where}: {refusal}; repair it, or set "
        "data.on_bad_rows=skip"
    )


def check_ids(input_ids: NDArray[np.int32], vocab_size: int, where: str) -> None:
    """Raises UserError for an id that the teacher does not know."""
    largest = int(input_ids.max())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {largest} ({where}), but the teacher knows ids below {vocab_size}; "
            "the tokenizer is not this teacher's"
        )


def _with_offsets(tokenizer: Any) -> Any:
    try:
        return with_whole_offsets(tokenizer)
    except (NotImplementedError, KeyError, TypeError) as error:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets, which the loss mask of chats and completions needs; "
            "use a fast tokenizer (one with a tokenizer.json), or documents"
        ) from error
