"""A chat template, and chats in the form that it accepts.

Rows hold chats in one form (``chat_rows``): arguments of calls as objects, content None beside
calls, the role ``developer`` unchanged. Templates accept different forms, so each is tested once
with small chats of our own. If a template writes a date, it gets a fixed one, so that all chats of
a build have the same date.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import date, datetime
from functools import cached_property
from typing import Any

from logitcask.cache_format.errors import UserError, one_line
from logitcask.pipeline.text.config import DataConfig

log = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_NULL = re.compile(r"None|null")
_DEVELOPER = re.compile(r"""["']developer["']""")
_CLOCK = re.compile(r"\bstrftime_now\b")

# The template's clock, written in Jinja because transformers passes no functions on. transformers
# trims the newline after the block, so the template begins on its own line.
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) %}{% set ns = namespace(text=format) %}"
    "{% for directive, value in logitcask_date %}{% set ns.text = ns.text.replace(directive, value) %}{% endfor %}"
    "{{ ns.text }}{% endmacro %}\n"
)
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRhCnt"

_QUESTION = {"role": "user", "content": "q"}
_ARGUMENTS = {"k": "logitcask"}
_ANSWERED: Messages = [
    {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "1"},
    {"role": "assistant", "content": "a"},
]


_LEFT_OUT = {
    "tools": "the chat template does not render the tool definitions that come with chats (first: %s), so the teacher reads "
    "calls of tools that it was not told of; set data.chat_template to one that renders `tools`, or data.tools_field=false "
    "to leave them out",
    "calls": "the chat template does not render tool calls (first: %s), so turns that make them are learnt without; set "
    "data.chat_template to one that renders `tool_calls`",
}


class Refused(Exception):
    """The chat template raised on this chat."""


class ChatTemplate:
    """The template in force, with the arguments and the date that the config gives it.

    text: as the tokenizer or ``data.chat_template`` has it.
    name: how messages call it.
    date: what it writes for today, ``data.template_date`` or the day of this object's making; None
    for a template without
          a clock.

    Raises UserError where there is no template, it cannot be read, or it does not mention a name in
    ``data.template_arguments``.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.text = _template_of(tokenizer, config)
        self.name = (
            str(config.chat_template) if config.chat_template else "the tokenizer's chat template"
        )
        self.date = (config.template_date or today()) if _CLOCK.search(self.text) else None
        self._tokenizer = tokenizer
        self._source, self._variables = self.text, dict(config.template_arguments)
        self._asked = set[str]()  # whether it renders tools, or calls
        self._warned_of_specials = False
        for name in self._variables:
            if not re.search(rf"\b{re.escape(name)}\b", self.text):
                raise UserError(
                    f"data.template_arguments has {name!r}, which the chat template does not mention; "
                    "correct its name, or leave it out"
                )
        if self.date is not None:
            self._source = _FIXED_CLOCK + self.text
            self._variables["logitcask_date"] = _directives(self.date)

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's text itself (``{% generation %}`` blocks)."""
        return _GENERATION.search(self.text) is not None

    def prepared(self, messages: Messages, tools: Tools | None = None) -> Messages:
        """A row's chat in the form that this template accepts. Raises nothing; ``render`` does."""
        if any(message["role"] == "developer" for message in messages) and not _DEVELOPER.search(
            self.text
        ):
            messages = [
                {**m, "role": "system"} if m["role"] == "developer" else m for m in messages
            ]
        if any(message.get("tool_calls") for message in messages) and self._takes_strings:
            messages = [_with_string_arguments(message) for message in messages]
        return self._without_null_content(messages, tools)

    def render(
        self, messages: Messages, tools: Tools | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """A prepared chat as text. Raises Refused if the template raises."""
        return self._text(
            self._with_parts(messages), tools, add_generation_prompt=add_generation_prompt
        )

    def render_marked(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[str, list[Span]]:
        """A prepared chat as text, and the characters of each ``{% generation %}`` block,
        ascending, end exclusive.

        ``apply_chat_template(return_assistant_tokens_mask=True)`` is not used: if the last
        character of a block has no token (trimmed offsets), its mask includes the rest of the chat.

        Raises Refused if the template raises.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = _or_refused(
            lambda: render_jinja_template(
                conversations=[self._with_parts(messages)],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **{**getattr(self._tokenizer, "special_tokens_map", {}), **self._variables},
            )
        )
        return texts[0], [(start, end) for start, end in spans[0]]

    def end_of_turn(self) -> str:
        """The text behind the last answer of a chat, without white space; empty if there is none or
        it cannot be found.
        """
        try:
            text = self.render([_QUESTION, {"role": "assistant", "content": "logitcask"}])
        except Refused:
            return ""
        return text.rpartition("logitcask")[2].strip()

    def special_token_in(self, row_id: str, messages: Messages, tools: Tools | None) -> bool:
        """Whether a text of the chat contains a special token's string and so becomes that token.
        Warns once, about the first such chat.

        A tokenizer cannot distinguish the template's text from the data's.
        """
        found = None if self._specials is None else _first_match(self._specials, [messages, tools])
        if found is not None and not self._warned_of_specials:
            log.warning(
                "chat %s holds the text %s, which the tokenizer takes for its special token, as if the template had written it "
                "(counted as special_tokens_in_content); take it out of the data if that is not meant",
                row_id,
                found,
            )
            self._warned_of_specials = True
        return found is not None

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        texts = [str(token) for token in added if getattr(token, "special", False)]
        return (
            re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
            if texts
            else None
        )

    def check_tools(self, row_id: str, messages: Messages, tools: Tools | None) -> None:
        """Warns once each if the template leaves out tool definitions or calls; tested with the
        first chat that has them.
        """
        without = dict[str, tuple[Messages, Tools | None]]()
        if tools is not None and "tools" not in self._asked:
            without["tools"] = messages, None
        if "calls" not in self._asked and any(message.get("tool_calls") for message in messages):
            without["calls"] = [_without_calls(message) for message in messages], tools
        if not without:
            return
        try:
            text = self.render(messages, tools)
        except Refused:
            return
        self._asked.update(without)
        for part, variant in without.items():
            try:
                if text == self.render(*variant):
                    log.warning(_LEFT_OUT[part], row_id)
            except Refused:  # then it reads them
                pass

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether calls need arguments as JSON text, because the template refuses objects, leaves
        them out, or writes them as Python does.

        Some templates also need content or an answer of the tool, so it is enough if one of the
        test chats is rendered correctly.
        """
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "f", "arguments": _ARGUMENTS},
        }
        asked: Messages = [
            {"role": "assistant", "content": content, "tool_calls": [call]}
            for content in ("", None)
        ]
        chats: list[Messages] = [
            [_QUESTION, turn, *rest] for turn in asked for rest in ([], _ANSWERED)
        ]
        if any(map(self._renders_arguments, chats)):
            return False
        return any(
            self._renders_arguments([_with_string_arguments(turn) for turn in chat])
            for chat in chats
        )

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content must be a list of parts: templates of image models may refuse or leave
        out plain text.
        """

        def renders(content: object) -> bool:
            try:
                return "logitcask" in self._text([{"role": "user", "content": content}])
            except Refused:
                return False

        return not renders("logitcask") and renders([{"type": "text", "text": "logitcask"}])

    def _with_parts(self, messages: Messages) -> Messages:
        if not self._takes_parts:
            return messages
        return [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m.get("content"), str)
            else m
            for m in messages
        ]

    def _text(
        self, messages: Messages, tools: Tools | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        def text() -> str:
            rendered: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._source,
                **self._variables,
            )
            return rendered

        return str(_or_refused(text))

    def _renders_arguments(self, messages: Messages) -> bool:
        try:
            text = self.render(messages)
        except Refused:
            return False
        return _ARGUMENTS["k"] in text and str(_ARGUMENTS) not in text

    def _without_null_content(self, messages: Messages, tools: Tools | None) -> Messages:
        """A chat in which the content None (beside tool calls) is rendered as an empty text.

        Many templates write "None" or "null" for it, which would be learnt, or raise (Gemma 3's).
        Others write calls only beside None (DeepSeek R1's distilled models). None therefore becomes
        the empty string, unless the template then leaves out more than that word.
        """
        if all(message.get("content", "") is not None for message in messages):
            return messages
        emptied = [{**m, "content": ""} if m.get("content", "") is None else m for m in messages]
        try:
            with_null = self.render(messages, tools)
        except Refused:
            return emptied
        try:
            return (
                emptied if _same_but_for_null(with_null, self.render(emptied, tools)) else messages
            )
        except Refused:
            return messages


def today() -> date:
    """The day here, as transformers tells templates."""
    return datetime.now().date()


def _directives(day: date) -> list[tuple[str, str]]:
    """The replacement of each directive of ``strftime``, ordered so that a literal percent sign
    never begins another directive.

    The time is midnight, because a cache should not depend on the hour of its build.
    """
    midnight = datetime(day.year, day.month, day.day)
    names = [f"%{directive}" for directive in _DIRECTIVES]
    unpadded = [
        (f"%-{directive}", str(int(midnight.strftime(f"%{directive}")))) for directive in "dmyHIMSj"
    ]
    return [
        ("%%", "\0"),
        *unpadded,
        *((name, midnight.strftime(name)) for name in names),
        ("\0", "%"),
    ]


def _first_match(pattern: re.Pattern[str], value: Any) -> str | None:
    """The first match of ``pattern`` in the strings of ``value``, keys included, at any depth."""
    if isinstance(value, str):
        match = pattern.search(value)
        return match[0] if match else None
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next(
            (found for each in value if (found := _first_match(pattern, each)) is not None), None
        )
    return None


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in message.items() if key != "tool_calls"},
        "content": message["content"] or "",
    }


def _with_string_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text."""
    calls = message.get("tool_calls")
    return (
        {**message, "tool_calls": [_with_string_argument(call) for call in calls]}
        if calls
        else message
    )


def _with_string_argument(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_string_argument(call["function"])}
    if isinstance(call.get("arguments"), dict):
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call


def _same_but_for_null(first: str, second: str) -> bool:
    """Whether two texts are equal except for null, ignoring white space around content."""
    bare, other = ("".join(_NULL.sub("", text).split()) for text in (first, second))
    return bare == other


def _or_refused(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except Exception as error:  # a template is a program, so it may raise anything
        raise Refused(one_line(error)) from error


def _template_of(tokenizer: Any, config: DataConfig) -> str:
    """The text of the template in force. Raises UserError if there is none or it cannot be read."""
    if config.chat_template is not None:
        try:
            return config.chat_template.expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read data.chat_template {config.chat_template}: {error}"
            ) from error
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several templates by name: the choice of apply_chat_template
        template = template.get("default")
    if not template:
        field = "messages_field" if config.messages_field else "prompt_field"
        raise UserError(
            f"data.{field} is set, but the teacher's tokenizer has no chat template; set data.chat_template to a "
            "Jinja file, or use documents (data.text_field)"
        )
    return str(template)
