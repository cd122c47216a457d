"""From rows to prompts, the texts that the teacher answers.

A chat, or a single question, is rendered with the chat template up to the assistant's turn. An
existing answer there is removed, because the teacher writes its own. A text is continued unchanged.
A prompt is never cut. If it leaves no room for an answer, it is left out and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.chat_rows import SYSTEM_ROLES
from logitcask.pipeline.text.chat_template import ChatTemplate, Refused
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.long_texts import LONG, LongTexts, pieces
from logitcask.pipeline.text.rejects import Reject, Report, ignore
from logitcask.pipeline.text.sources import Row, RowSource
from logitcask.pipeline.text.tokenize import AddedTokens, batches, check_ids, refused_row


@dataclass(frozen=True, slots=True, eq=False)
class PromptRow:
    """The prompt of one row: its id, and int32[n], n >= 1."""

    row_id: str
    input_ids: NDArray[np.int32]


class CountedOnce:
    """The rows of a source, which may be read several times. Counters and reports are those of the
    first time.
    """

    def __init__(self, source: RowSource, report: Report) -> None:
        self._source, self._report = source, report
        self._counted: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Row]:
        again = self._counted is not None
        self._source.report = ignore if again else self._report
        yield from self._source
        if not again:
            self._counted = self._source.counters

    @property
    def counters(self) -> dict[str, int]:
        return self._source.counters if self._counted is None else self._counted


def asked(row: Row) -> list[dict[str, Any]]:
    """The messages of a chat up to the last one that is not of the assistant. A text is the one
    message of the user.
    """
    messages = row.messages or [{"role": "user", "content": row.text}]
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


class Prompts:
    """Turns the rows of one source into prompts.

    ``template`` is the chat template in force, None for texts that are continued.

    ``counters`` describes the latest ``prompts()``: ``prompts``; ``overlong_prompts``;
    ``answers_replaced`` (chats that ended with the assistant); ``special_tokens_in_content`` (chats
    with a text that spells a special token); ``without_prompt`` (chats in which nobody asks);
    ``without_tokens``; ``refused_by_template``. ``report`` receives each row that gives no prompt.

    Raises UserError if the tokenizer lacks a chat template that is needed.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, vocab_size: int) -> None:
        assert config.generate is not None
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config) if config.kind == "chats" else None
        self._config = config
        self._settings = config.generate
        self.vocab_size = vocab_size
        self._counters: Counter[str] = Counter()
        self._refusal = ""
        self.report: Report = ignore
        self._quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def prompts(self, rows: Iterable[Row]) -> Iterator[PromptRow]:
        """Streams the prompts that the config chooses, until they, with one token of answer each,
        would exceed ``max_tokens``. ``rows`` may be read several times.

        Raises UserError for an id outside the vocabulary, and if there is no prompt.
        """
        counters = self._counters = Counter(prompts=0)
        self._refusal = ""
        tokens = 0
        for row in self._chosen(rows):
            tokens += self._settings.samples * (len(row.input_ids) + 1)
            if (
                self._config.max_tokens is not None
                and tokens > self._config.max_tokens
                and counters["prompts"]
            ):
                return
            counters["prompts"] += 1
            yield row
        if counters["prompts"] == 0:
            raise UserError(self._nothing_made())

    def _chosen(self, rows: Iterable[Row]) -> Iterator[PromptRow]:
        """The prompts that ``skip_prompts`` and ``max_prompts`` choose, each once."""
        start = self._settings.skip_prompts
        wanted: float = math.inf if (most := self._settings.max_prompts) is None else most
        if not start and most is None:
            yield from self._all(rows)
            return
        counters, report = self._counters, self.report
        try:
            while wanted > 0:
                total = 0
                for row in self._all(rows):
                    if total >= start:
                        yield row
                        wanted -= 1
                        if wanted == 0:
                            return
                    total += 1
                if total == 0:
                    return
                # Behind the last prompt the first one follows, up to where this began.
                start, wanted = (
                    (0, min(wanted, start))
                    if start < total
                    else (start % total, min(wanted, total))
                )
                # What is read again is not counted again.
                self._counters, self.report = Counter(), ignore
        finally:
            self._counters, self.report = counters, report

    def _all(self, rows: Iterable[Row]) -> Iterator[PromptRow]:
        for batch in batches(rows):
            for row_id, ids in self._tokenised(batch):
                if not ids:
                    self._leave_out(row_id, "without_tokens")
                    continue
                if len(ids) >= self._config.max_length:
                    self._leave_out(row_id, "overlong_prompts")
                    continue
                input_ids = np.asarray(ids, np.int32)
                check_ids(input_ids, self.vocab_size, f"prompt {row_id}")
                yield PromptRow(row_id, input_ids)

    def _leave_out(self, row_id: str, reason: str, detail: str = "") -> None:
        self._counters[reason] += 1
        self.report(Reject(row_id, reason, detail))

    def _tokenised(self, batch: list[Row]) -> Iterator[tuple[str, list[int]]]:
        documents = self.template is None
        if self.template is None:
            texts = {row.row_id: self._added.once(row.text or "")[0] for row in batch}
        else:
            texts = {
                row.row_id: text
                for row in batch
                if (text := self._rendered(row, self.template)) is not None
            }
        special = documents and self._config.add_special_tokens
        short = [text for text in texts.values() if len(text) <= LONG]
        encoded = iter(
            self.tokenizer(short, add_special_tokens=special, **self._quiet)["input_ids"]
            if short
            else ()
        )
        for row_id, text in texts.items():
            if len(text) <= LONG:
                ids = next(encoded)
            else:  # only as much as shows that it is too long
                ids = next(
                    pieces(
                        self._long_texts.ids(text, add_special_tokens=special),
                        self._config.max_length + 2,
                    )
                ).tolist()
            # Some tokenizers end every text with EOS, but this text will be continued.
            yield (
                row_id,
                ids[:-1] if documents and ids and ids[-1] == self.tokenizer.eos_token_id else ids,
            )

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(self.tokenizer)

    @cached_property
    def _added(self) -> AddedTokens:
        return AddedTokens(self.tokenizer, self._config.add_special_tokens)

    def _rendered(self, row: Row, template: ChatTemplate) -> str | None:
        messages = asked(row)
        if not messages or messages[-1]["role"] in SYSTEM_ROLES:
            self._leave_out(row.row_id, "without_prompt")
            return None
        replaced = row.messages is not None and len(messages) < len(row.messages)
        if self._settings.system_prompt is not None and messages[0]["role"] not in SYSTEM_ROLES:
            messages = [{"role": "system", "content": self._settings.system_prompt}, *messages]
        messages = template.prepared(messages, row.tools)
        template.check_tools(row.row_id, messages, row.tools)
        if template.special_token_in(row.row_id, messages, row.tools):
            self._counters["special_tokens_in_content"] += 1
        try:
            text = template.render(messages, row.tools, add_generation_prompt=True)
        except Refused as refusal:
            if self._config.on_bad_rows == "fail":
                raise UserError(refused_row(row.row_id, refusal, self._config)) from None
            self._leave_out(row.row_id, "refused_by_template", str(refusal))
            self._refusal = self._refusal or f"{row.row_id}: {refusal}"
            return None
        self._counters["answers_replaced"] += replaced
        return text

    def _nothing_made(self) -> str:
        reasons = ", ".join(f"{n} {name}" for name, n in self._counters.items() if n) or "no rows"
        first = f" (the first one: {self._refusal})" if self._refusal else ""
        return (
            f"no prompt came out of {self._config.where}: {reasons}{first}; "
            "look at data.max_length and the chat template"
        )


def as_rows(prompts: Prompts, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """The prompts that the config chooses, in order, as rows of a JSON file: ``id``, and ``text`` of
    a text that is continued, or ``messages`` of a chat up to the answer, with ``tools`` if it has
    some. ``id_field: id`` and ``messages_field: messages``, or ``text_field: text``, read them as
    the same prompts.

    ``rows`` are read twice. Raises UserError if they change between the two, and as
    ``Prompts.prompts`` does.
    """
    chosen: dict[str, Row | None] = {each.row_id: None for each in prompts.prompts(rows)}
    missing = len(chosen)
    for row in rows:
        if chosen.get(row.row_id, row) is None:
            chosen[row.row_id] = row
            missing -= 1
            if not missing:
                break
    for row_id, found in chosen.items():
        if found is None:
            raise UserError(
                f"the data changed while it was read: its row {row_id} is gone; run again"
            )
        if prompts.template is None:
            yield {"id": row_id, "text": found.text}
            continue
        tools = {} if found.tools is None else {"tools": found.tools}
        yield {"id": row_id, "messages": asked(found), **tools}
