"""The report of a run of rounds: ``rounds.json``, a table of it, and ``rounds.html``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from logitcask.cache_format.durable import write_durably
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.page import write_page_of_rounds
from logitcask.rounds.skd import as_one, cache_name, passes_of
from logitcask.rounds.state import Done, State


def write_report(folder: Path, state: State, config: RoundsConfig) -> None:
    """Writes ``rounds.json`` and ``rounds.html`` of the rounds that are done."""
    document = summary_of(folder, state, config)[0]
    write_durably(folder / "rounds.json", json.dumps(document, indent=1) + "\n")
    write_page_of_rounds(folder, document, state.settings)


def summary_of(folder: Path, state: State, config: RoundsConfig) -> tuple[dict[str, Any], str]:
    """The report as a document and as text."""
    rounds = [_round(state, number) for number in range(state.rounds + 1)]
    found = [each for each in rounds if each is not None]
    lowest = min(found, key=lambda each: each["held_out"]["kl"], default=None)
    whole = sum(done.seconds + done.handover for done in state.done)
    useful = sum(_useful(done.seconds, done.figures) for done in state.done)
    document = {
        "output": str(folder),
        "student": str(folder / f"round-{state.rounds:03d}" / "student"),
        "rounds_done": state.rounds,
        "rounds_asked": config.rounds.count,
        "lowest_kl_round": None if lowest is None else lowest["round"],
        "seconds": whole,
        "overhead_share": 1 - useful / whole if whole else None,
        "rounds": found,
    }
    return document, _table(document)


def _useful(seconds: float, figures: dict[str, Any]) -> float:
    """The seconds of a command's last start in which it wrote, scored or trained. Those of a
    training count over all its starts.
    """
    names = ("writing_seconds", "scoring_seconds", "training_seconds")
    return min(seconds, sum(figures.get(name) or 0.0 for name in names))


def _round(state: State, number: int) -> dict[str, Any] | None:
    trained = state.of(f"train-{number}" if number else "start")
    written = as_one(state, number) if number else state.of("text")
    if trained is None:
        return None
    found: dict[str, Any] = {"round": number}
    if written is not None:
        found["cache"] = {"fingerprint": written.fingerprint, **written.figures}
        if number:
            name = cache_name(len(passes_of(state, number)))
            found["cache"]["folder"] = f"round-{number:03d}/{name}"
    answered = state.of(f"answer-{number}")
    if answered is not None:
        found["teacher_text"] = {"fingerprint": answered.fingerprint, **answered.figures}
    asked, prompts = state.of(f"augment-{number}"), state.of(f"prompts-{number}")
    if prompts is not None:
        found["prompts"] = {"sha256": prompts.fingerprint, **prompts.figures}
        if written is not None:  # new ones without room for an answer
            whole = prompts.figures["data_prompts"] + prompts.figures["new_prompts"]
            found["prompts"]["left_out"] = whole - written.figures["prompts"]
    if asked is not None:
        found["augment"] = {"fingerprint": asked.fingerprint, **asked.figures}
    stages = {
        "augment": asked,
        "prompts": prompts,
        "answer": answered,
        "write": written,
        "train": trained,
    }
    return {
        **found,
        **trained.figures,
        "stages": {name: _stage(done) for name, done in stages.items() if done is not None},
    }


def _stage(done: Done) -> dict[str, Any]:
    return {
        "seconds": done.seconds,
        "handover_seconds": done.handover,
        "starts": done.starts,
        "peak_bytes": done.peak_bytes,
    }


def _table(document: dict[str, Any]) -> str:
    """A line for each round. Round 0 is the student at the start, and the cache of given text."""
    columns = ("written", "length", "repeated", "own KL", "kl", "ce", "write", "score", "train")
    head = ["round", *columns, "other"]
    rows = [[*_row(each)] for each in document["rounds"]]
    rates = [each.get("cache", {}).get("rejection_rate") for each in document["rounds"]]
    spliced = any(rate is not None for rate in rates)
    if spliced:  # behind the KL on the students' own text
        for row, text in zip([head, *rows], ["rejected", *_percent(rates)], strict=True):
            row.insert(5, text)
    assessed = [each.get("cache", {}).get("assessed") for each in document["rounds"]]
    augmented = any(each is not None for each in assessed)
    if augmented:
        hard = [_number((each or {}).get("kl_flagged"), ".4f") for each in assessed]
        new = [_number(_new(each), "d") for each in document["rounds"]]
        for row, *texts in zip([head, *rows], ["hard KL", *hard], ["new", *new], strict=True):
            row[5:5] = texts
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in [head, *rows]
    ]
    share = document["overhead_share"]
    if spliced:
        lines.append(
            "rejected: share of the students' tokens in whose place the teacher put another"
        )
    if augmented:
        lines.append(
            "hard KL: own KL of the prompts that were flagged as hard; new: prompts of the teacher like the hard ones of the round before"
        )
    lines += [
        "written: tokens; length: tokens per answer; repeated: share of 4-grams; own KL: KL(student || teacher) on the",
        "student's text, as written; kl, ce: held-out text after the round; the last four columns: seconds",
        f"{document['seconds']:,.0f} seconds in all, {share or 0:.0%} of them for neither writing, scoring nor training steps",
        f"student: {document['student']}",
    ]
    if document["lowest_kl_round"] not in (None, document["rounds_done"]):
        lines.append(f"the lowest held-out KL is that of round {document['lowest_kl_round']}")
    return "\n".join(lines)


def _new(found: dict[str, Any]) -> int | None:
    """The new prompts of a round; None if it has no file of prompts."""
    prompts = found.get("prompts")
    return None if prompts is None else prompts.get("new_prompts", 0)


def _row(found: dict[str, Any]) -> list[str]:
    cache = found.get("cache", {})
    figures = {
        "augment": found.get("augment", {}),
        "prompts": {},
        "answer": found.get("teacher_text", {}),
        "write": cache,
        "train": found,
    }
    built = [figures[name] for name in ("augment", "answer", "write")]
    seconds = [
        *(_sum(built, name) for name in ("writing_seconds", "scoring_seconds")),
        found["training_seconds"],
    ]
    other = sum(
        each["seconds"] + each["handover_seconds"] - _useful(each["seconds"], figures[name])
        for name, each in found["stages"].items()
    )
    return [
        str(found["round"]),
        _number(cache.get("written_tokens"), ",d"),
        _number(cache.get("mean_answer_tokens"), ".1f"),
        _number(cache.get("repetition"), ".2f"),
        _number(cache.get("reverse_kl"), ".4f"),
        _number(found["held_out"]["kl"], ".4f"),
        _number(found["held_out"].get("ce"), ".4f"),
        *(_number(each, ".1f") for each in seconds),
        _number(other, ".1f"),
    ]


def _percent(rates: list[float | None]) -> list[str]:
    return [_number(rate, ".1%") for rate in rates]


def _sum(built: list[dict[str, Any]], name: str) -> float | None:
    """Seconds of all builds of a round together; None if there are none."""
    found = [each[name] for each in built if each.get(name) is not None]
    return sum(found) if found else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
