"""More prompts like the hard ones (arXiv 2311.08213): what an assessor and an augmentor do in rounds.

    assess, flag     the prompts of a round at whose answers student and teacher differ most, from the
                     round's cache alone
    requests         the augmentor's prompts: each asks the teacher for a new one like a hard one
    new_prompts      the teacher's answers, cleaned: prompts of the next round

A prompt is a row of a JSON file, as ``teacher-cache prompts`` writes them: ``id``, and ``text`` or
``messages`` with ``tools``. The new one takes the place of the last message. All else of the row is
context, and stays as it is. So would images, if rows had some: the assessor sees only ids and
logprobs, and the augmentor only the last message's text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError
from logitcask.rounds.config import PROMPT, AugmentConfig, RoundsSettings

Row = dict[str, Any]
"""A prompt."""
Kind = Literal["documents", "chats"]
"""Texts that are continued, or chats."""

SEED = 2_000_000
"""The augmentor's seed is larger by this than the student's of the same round."""

INSTRUCTIONS: dict[Kind, str] = {
    "chats": f"Here is a request that somebody made:\n\n{PROMPT}\n\nWrite another request of the same kind, on a different "
    "subject and no easier than this one. Do not answer it. Reply with the new request alone.",
    "documents": f"The beginning of a text:\n\n{PROMPT}\n\nThe beginning of another text of the same kind, on a different "
    "subject:\n\n",
}
"""The augmentor's instruction, unless the config has one."""

_NAME = "augment"
_LIKE = "like"
_SYSTEM_ROLES = ("system", "developer")
_DROPPED = ("no_room", "empty", "too_long", "duplicate")


def check(
    rounds: RoundsSettings, *, max_tokens: int | None, max_length: int, teacher_config: Path
) -> None:
    """Raises ConfigError for settings that do not go with new prompts. ``max_tokens`` and
    ``max_length`` are of the build in the file ``teacher_config``.
    """
    augment = rounds.augment
    assert augment is not None
    if rounds.skd is not None:
        raise ConfigError(
            "rounds.augment is set beside rounds.skd, whose last cache has no logprobs of the student to find hard prompts by; "
            "remove one of the two"
        )
    if max_tokens is not None:
        raise ConfigError(
            f"{teacher_config}: data.max_tokens is {max_tokens}, which would leave out the new prompts of rounds.augment first; "
            "remove it: rounds.prompts limits a round"
        )
    room = augment.max_length or max_length
    if augment.max_prompt_tokens >= room:
        raise ConfigError(
            f"rounds.augment.max_prompt_tokens is {augment.max_prompt_tokens}, which leaves no room for a request in {room} tokens; "
            "lower it, or raise rounds.augment.max_length (default: data.max_length)"
        )


# --- the assessor


@dataclass(frozen=True)
class Assessed:
    """A prompt and its answers. kl: mean over their tokens of the writer's logprob minus the
    teacher's, nats.
    """

    row_id: str
    kl: float
    tokens: int


def assess(path: str | Path) -> list[Assessed]:
    """All prompts of a cache of answers that another model than the teacher wrote, in stored order.
    Reads one sequence at a time, and no model. Prompts without a written token are not among them.

    Where the writer sampled at temperature 1 and top_p 1, the sum over an answer is an unbiased
    estimate of the KL between the writer's answers and the teacher's (the chain rule), and the mean
    is that per token. Elsewhere it is the mean log ratio on the text that was written, with the
    logprobs of temperature 1.
    """
    gaps: dict[str, float] = {}
    tokens: Counter[str] = Counter()
    for sequence in CacheReader(path):
        assert sequence.writer_logprob is not None
        row_id = sequence.sequence_id.rpartition("/")[0]
        gap = sequence.writer_logprob.astype(np.float64) - sequence.target_logprob
        gaps[row_id] = gaps.get(row_id, 0.0) + float(gap.sum())
        tokens[row_id] += len(gap)
    return [
        Assessed(row_id, gap / tokens[row_id], tokens[row_id])
        for row_id, gap in gaps.items()
        if tokens[row_id]
    ]


def flag(assessed: list[Assessed], fraction: float) -> list[Assessed]:
    """The hard prompts: the share ``fraction`` with the largest KL, rounded up, the largest first.
    Of equal ones the first by id.
    """
    count = math.ceil(fraction * len(assessed))
    return sorted(assessed, key=lambda each: (-each.kl, each.row_id))[:count]


def figures_of(assessed: list[Assessed], fraction: float) -> dict[str, Any]:
    """The figures of an assessment: KL of the flagged prompts and the rest; of new prompts and those
    of the data. Means over tokens, nats; None without a token.
    """
    hard = {each.row_id for each in flag(assessed, fraction)}
    new = {each.row_id for each in assessed if each.row_id.startswith(f"{_NAME}-")}
    return {
        "prompts": len(assessed),
        "flagged": len(hard),
        "kl_flagged": _mean(each for each in assessed if each.row_id in hard),
        "kl_rest": _mean(each for each in assessed if each.row_id not in hard),
        "new_prompts": len(new),
        "kl_new": _mean(each for each in assessed if each.row_id in new),
        "kl_data": _mean(each for each in assessed if each.row_id not in new),
        "token_share_new": sum(each.tokens for each in assessed if each.row_id in new)
        / max(1, sum(each.tokens for each in assessed)),
    }


def _mean(assessed: Iterable[Assessed]) -> float | None:
    found = list(assessed)
    tokens = sum(each.tokens for each in found)
    return sum(each.kl * each.tokens for each in found) / tokens if tokens else None


# --- the augmentor


def requests(
    hard: list[Assessed], prompts: Iterable[Row], augment: AugmentConfig, number: int
) -> list[Row]:
    """The augmentor's prompts of round ``number``: as many as ``augment.prompts``, in turns to each
    hard one. ``prompts``: those that were assessed.

    A chat keeps its earlier turns, and its system message is left out. Chats that do not end with a
    text of the user are passed over; empty if all of them are.
    """
    rows = _by_id(prompts, {each.row_id for each in hard})
    known = [(rows[each.row_id], each.kl) for each in hard]
    usable = [(row, kl) for row, kl in known if text_of(row) is not None]
    return [
        {
            "id": f"{_NAME}-{number}/{count}",
            **_asking(row, augment),
            _LIKE: row["id"],
            "prompt": text_of(row),
            "kl": kl,
        }
        for count, (row, kl) in zip(range(augment.prompts), _in_turns(usable), strict=False)
    ]


def _in_turns(found: list[tuple[Row, float]]) -> Iterator[tuple[Row, float]]:
    while found:
        yield from found


def _asking(row: Row, augment: AugmentConfig) -> Row:
    kind: Kind = "documents" if "text" in row else "chats"
    instruction = augment.instruction or INSTRUCTIONS[kind]
    # Not str.format: a prompt may have braces of its own.
    text = instruction.replace(PROMPT, text_of(row) or "")
    if kind == "documents":
        return {"text": text}
    context = [each for each in row["messages"][:-1] if each["role"] not in _SYSTEM_ROLES]
    return {"messages": [*context, {"role": "user", "content": text}]}


def text_of(row: Row) -> str | None:
    """The text of a prompt: of the last message of a chat. None if that is not a text of the user."""
    if "text" in row:
        return str(row["text"])
    last = row["messages"][-1]
    text = last.get("content")
    return text if last["role"] == "user" and isinstance(text, str) else None


def new_prompts(
    asked: list[Row],
    answers: Iterable[Row],
    before: Iterable[Row],
    known: set[bytes],
    augment: AugmentConfig,
    *,
    answered: int,
) -> tuple[list[Row], dict[str, Any]]:
    """The new prompts of a round, and their figures.

    asked:    the requests. answers: to them, as ``teacher-cache generations`` has them.
    before:   the prompts that were assessed. known: ``key`` of each prompt that the rounds have.
    answered: the requests that were asked. The others had no room for an answer.

    ``dropped`` has the requests that gave none, by reason. ``empty``: no text. ``too_long``: the
    message of a chat reached the length limit, so that its end is missing. ``duplicate``: the rounds
    have such a prompt already, up to case and white space.
    """
    by_request = _by_id(answers, {f"{each['id']}/0" for each in asked})
    flagged = _by_id(before, {each[_LIKE] for each in asked})
    known, found = set(known), list[Row]()
    dropped = dict.fromkeys(_DROPPED, 0)
    for request in asked:
        answer = by_request.get(f"{request['id']}/0")
        like = flagged[request[_LIKE]]
        text, reason = ("", "empty") if answer is None else _cleaned(answer, like, augment)
        row = {"id": request["id"], **_with_text(like, text), _LIKE: like["id"]}
        if not reason and (name := key(row)) in known:
            reason = "duplicate"
        if reason:
            dropped[reason] += 1
            continue
        known.add(name)
        found.append(row)
    dropped["no_room"] = len(asked) - answered
    dropped["empty"] -= dropped["no_room"]  # neither has an answer
    return found, {"asked": len(asked), "new_prompts": len(found), "dropped": dropped}


def _cleaned(answer: Row, like: Row, augment: AugmentConfig) -> tuple[str, str]:
    """(text, ""), or the reason why an answer is no prompt as second."""
    whole: str = answer["answer"].strip()
    text = whole.partition("\n")[0].strip() if augment.first_line else whole
    if "text" in like:
        text = text.rstrip("\ufffd")  # half a character at the length limit
    elif answer["finish"] == "length" and text == whole:
        return text, "too_long"
    return text, "" if text else "empty"


def in_words(figures: dict[str, Any]) -> str:
    """The figures of new prompts in one line."""
    dropped = [
        f"{count} {name.replace('_', ' ')}" for name, count in figures["dropped"].items() if count
    ]
    reasons = f" ({', '.join(dropped)})" if dropped else ""
    return (
        f"{figures['new_prompts']} new prompts of {figures['asked']} that the teacher was asked for{reasons}, beside "
        f"{figures['data_prompts']} of the data"
    )


def _with_text(row: Row, text: str) -> Row:
    """A prompt with another text in the place of its own."""
    if "text" in row:
        return {"text": text}
    *context, last = row["messages"]
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"messages": [*context, {**last, "content": text}], **tools}


def key(row: Row) -> bytes:
    """The same for prompts that differ in case and white space only."""
    text = text_of(row)
    words = None if text is None else " ".join(text.casefold().split())
    context = row.get("messages", [])[: None if words is None else -1]
    content = json.dumps([context, words], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


# --- files


def data_of(file: Path, kind: Kind) -> dict[str, Any]:
    """Changes of a teacher config with which it answers the rows of ``file``."""
    fields: dict[str, Any] = {
        "path": str(file),
        "sources": [],
        "split": "train",
        "id_field": "id",
        "text_field": "text" if kind == "documents" else None,
        "messages_field": "messages" if kind == "chats" else None,
        **dict.fromkeys(("name", "revision", "prompt_field", "tools_field")),
        "generate.skip_prompts": 0,
        "generate.max_prompts": None,
    }
    return {f"data.{name}": value for name, value in fields.items()}


def writing_of(augment: AugmentConfig, max_length: int, seed: int) -> dict[str, Any]:
    """Changes of a teacher config with which the teacher writes new prompts. ``max_length`` and
    ``seed`` are those of that config; the seed that of the round.
    """
    fields = {
        "max_length": augment.max_length or max_length,
        **{
            f"generate.{name}": value
            for name, value in {
                "samples": 1,
                "stop": [],
                "include_stop": False,
                "max_new_tokens": augment.max_prompt_tokens,
                "temperature": augment.temperature,
                "top_p": augment.top_p,
                "system_prompt": augment.system_prompt,
                "seed": seed + SEED,
            }.items()
        },
    }
    return {f"data.{name}": value for name, value in fields.items()}


def rows_in(file: Path) -> Iterator[Row]:
    """The rows of a file, in order."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _by_id(rows: Iterable[Row], wanted: set[str]) -> dict[str, Row]:
    return {row["id"]: row for row in rows if row["id"] in wanted}


def as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
