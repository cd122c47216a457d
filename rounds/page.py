"""``rounds.html``: a run of rounds as a page, from its report and from the texts on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import LogitcaskError
from logitcask.cache_format.pages.charts import (
    LineChart,
    Series,
    Stack,
    Stacks,
    Unit,
    number,
)
from logitcask.cache_format.pages.page import render, write_page
from logitcask.rounds.texts import BOUNDS, asked, augmented, written

_HERE = Path(__file__).parent

_TICKS = 12
_Round = dict[str, Any]

_PARTS = (
    "writing",
    "scoring",
    "rest of the build: starts of engines, checks, audit",
    "training steps",
    "rest of the training: imports, evaluation, saving",
    "hand-over",
)
"""Parts of a round's seconds."""


def write_page_of_rounds(folder: Path, document: dict[str, Any], settings: dict[str, Any]) -> int:
    """Writes ``rounds.html`` in ``folder``; returns its bytes.

    document: the content of rounds.json. settings: of the run (``State.settings``).
    """
    rounds: list[_Round] = document["rounds"]
    numbers = [each["round"] for each in rounds]
    student, teacher = settings["student_config"], settings["teacher_config"]
    page = render(
        _HERE,
        "rounds.html.jinja",
        styles=[_HERE / "rounds.css"],
        name=folder.resolve().name,
        document=document,
        teacher=(teacher.get("teacher") or {}).get("model", "the teacher"),
        student=(student.get("student") or {}).get("init_from", "a student"),
        cards=_cards(document),
        curves=[each for each in _curves(rounds) if each.series],
        seconds=_seconds(rounds),
        memory=_memory(rounds),
        table=_table(rounds),
        passes=_passes(rounds),
        kinds=next((each["kl_kind"] for each in reversed(rounds) if each.get("kl_kind")), ""),
        asked=asked(folder, numbers),
        reference=_reference(student),
        augmented=augmented(folder, [number for number in numbers if number > 1]),
        written=written(
            folder, {each["round"]: each["cache"]["folder"] for each in rounds if each["round"]}
        ),
        bounds=list(BOUNDS),
        facts=_facts(document, settings),
    )
    return write_page(folder / "rounds.html", page, replace=True)


def _of_cache(name: str) -> Callable[[_Round], float | None]:
    """A figure of what a student wrote; None for the given text of round 0."""
    return lambda each: each.get("cache", {}).get(name) if each["round"] else None


def _held_out(name: str) -> Callable[[_Round], float | None]:
    return lambda each: each["held_out"].get(name)


def _assessed(name: str) -> Callable[[_Round], float | None]:
    """A figure of the assessor; of a round without new prompts, none that compares them."""

    def value(each: _Round) -> float | None:
        found = each.get("cache", {}).get("assessed") or {}
        if name in ("kl_new", "kl_data") and not found.get("new_prompts"):
            return None
        kl: float | None = found.get(name)
        return kl

    return value


def _of_prompts(name: str) -> Callable[[_Round], float | None]:
    """A figure of the new prompts, or the number of those dropped for a reason."""

    def value(each: _Round) -> float | None:
        found = each.get("prompts", {})
        count: float | None = found.get(name, (found.get("dropped") or {}).get(name))
        return count

    return value


def acceptance(found: _Round) -> float | None:
    """Share of the tokens that the teacher accepted; None for rounds without a choice of tokens."""
    rejected = found.get("cache", {}).get("rejection_rate")
    return None if rejected is None else 1 - rejected


def _ended(name: str) -> Callable[[_Round], float | None]:
    """Share of the answers that ended in a way."""

    def share(each: _Round) -> float | None:
        counts = each.get("cache", {}).get("finished") or {}
        total = sum(counts.values())
        return counts.get(name, 0) / total if each["round"] and total else None

    return share


def _curves(rounds: list[_Round]) -> list[LineChart]:
    def chart(
        title: str,
        label: str,
        lines: dict[str, Callable[[_Round], float | None]],
        unit: Unit = "",
        note: str = "",
    ) -> LineChart:
        series = []
        for name, value in lines.items():
            points = [(each["round"], value(each)) for each in rounds]
            known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
            if known:
                series.append(Series(name, [x for x, _ in known], [y for _, y in known]))
        at = [each["round"] for each in rounds]
        ticks = [float(each) for each in at[:: -(-len(at) // _TICKS)]] if at else None
        return LineChart(title, "round", label, series, ticks, unit=unit, note=note, dots=True)

    kept: Callable[[_Round], float | None] = lambda each: each.get("staleness")  # noqa: E731
    return [
        chart(
            "KL on held-out text",
            "nats per position, after the round",
            {"KL(teacher || student)": _held_out("kl"), "KL(student || teacher)": _held_out("reverse_kl")},
        ),
        chart(
            "KL on the student's own text",
            "nats per token",
            {"KL(student || teacher)": _of_cache("reverse_kl"), "KL(teacher || student)": _of_cache("forward_kl")},
            note="Of the student that wrote the round's text, which is that of the round before. Both are estimates from the written tokens, "
            "unbiased at temperature 1 and top_p 1; the second one weighs them by importance and varies more.",
        ),
        chart(
            "Cross-entropy on held-out text", "nats per token, after the round", {"student": _held_out("ce")}
        ),
        chart(
            "Surprise of the teacher at the student's text",
            "nats per token",
            {"teacher": _of_cache("teacher_ce")},
        ),
        chart("Written tokens", "tokens", {"tokens": _of_cache("written_tokens")}),
        chart("Length", "tokens per answer", {"length": _of_cache("mean_answer_tokens")}),
        chart(
            "Repetition",
            "share of an answer's 4-grams that occurred in it before",
            {"repeated": _of_cache("repetition")},
            "%",
        ),
        chart(
            "How answers end",
            "share of the answers",
            {"by themselves": _ended("stop"), "at the longest length": _ended("length"), "empty": _ended("empty")},
            "%",
        ),
        chart(
            "KL of hard prompts",
            "nats per token",
            {"flagged": _assessed("kl_flagged"), "the rest": _assessed("kl_rest")},
            note="KL(student || teacher) on the student's own text, of the prompts that the assessor has flagged and of all others. The "
            "flagged ones are chosen by this very estimate, so chance makes their KL larger and that of the rest smaller.",
        ),
        chart(
            "KL of new prompts",
            "nats per token",
            {"new": _assessed("kl_new"), "of the data": _assessed("kl_data")},
        ),
        chart("Acceptance", "share of the tokens that the teacher kept", {"accepted": acceptance}, "%"),
        chart(
            "Staleness",
            "mean age of the students' text that was learnt from, in rounds",
            {"age": kept},
        ),
    ]  # fmt: skip


def parts_of(found: _Round) -> list[float]:
    """Seconds of a round, in the order of ``_PARTS``. A stage that was started again has the seconds
    of its last start; its work is then at most these.
    """
    texts = [found.get(name, {}) for name in ("cache", "teacher_text", "augment")]
    stages, train = found["stages"], found["stages"]["train"]
    work = [
        sum(each.get(name) or 0.0 for each in texts)
        for name in ("writing_seconds", "scoring_seconds")
    ]
    builds = ("augment", "prompts", "answer", "write")
    whole = sum(stages[name]["seconds"] for name in builds if name in stages)
    share = min(1.0, whole / sum(work)) if sum(work) else 0.0
    work = [share * each for each in work]
    steps = min(train["seconds"], found["training_seconds"])
    between = sum(each["handover_seconds"] for each in stages.values())
    return [*work, whole - sum(work), steps, train["seconds"] - steps, between]


def _seconds(rounds: list[_Round]) -> Stacks:
    parts = [parts_of(each) for each in rounds]
    return Stacks(
        "Seconds of each round",
        "round",
        "wall clock; round 0 is the given text and the student at the start",
        _PARTS,
        [
            Stack(str(each["round"]), values, f"{sum(values):,.1f} s")
            for each, values in zip(rounds, parts, strict=True)
        ],
    )


def _memory(rounds: list[_Round]) -> LineChart:
    """The largest process of each command: teacher and student are never in one."""
    series = []
    for stage, name in (
        ("augment", "the teacher's prompts"),
        ("answer", "the teacher's answers"),
        ("write", "writing and scoring"),
        ("train", "training"),
    ):
        points = [
            (each["round"], each["stages"][stage]["peak_bytes"] / 1e9)
            for each in rounds
            if each["stages"].get(stage, {}).get("peak_bytes")
        ]
        if points:
            series.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    at = [float(each["round"]) for each in rounds]
    return LineChart(
        "Largest process",
        "round",
        "resident memory, GB",
        series,
        at[:: -(-len(at) // _TICKS)] if at else None,
        dots=True,
    )


def _cards(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and explanation."""
    rounds: list[_Round] = document["rounds"]
    first, last = rounds[0], rounds[-1]
    own = [kl for each in rounds if (kl := _of_cache("reverse_kl")(each)) is not None]
    tokens = sum(_of_cache("written_tokens")(each) or 0 for each in rounds)
    lowest = document["lowest_kl_round"]
    where = "the lowest of all rounds" if lowest == last["round"] else f"lowest in round {lowest}"
    share = document["overhead_share"]
    return [
        ("rounds", str(document["rounds_done"]), f"of {document['rounds_asked']}"),
        (
            "held-out KL, nats",
            number(last["held_out"]["kl"]),
            f"{number(first['held_out']['kl'])} at the start; {where}",
        ),
        (
            "KL on its own text",
            number(own[-1]) if own else "–",
            f"{number(own[0])} in the first round" if own else "the teacher wrote",
        ),
        ("written", f"{tokens:,}", "tokens by students"),
        ("time", f"{document['seconds']:,.0f} s", "of all commands and hand-overs"),
        (
            "overhead",
            "–" if share is None else number(share, "%"),
            "neither writing, scoring nor training steps",
        ),
    ]


def _table(rounds: list[_Round]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all figures; a column that no round has is left out."""
    columns: dict[str, Callable[[_Round], str]] = {
        "written tokens": lambda each: _whole(_of_cache("written_tokens")(each)),
        "answers": lambda each: _whole(_of_cache("answers")(each)),
        "tokens per answer": lambda each: _shown(_of_cache("mean_answer_tokens")(each)),
        "repeated": lambda each: _shown(_of_cache("repetition")(each), "%"),
        "accepted": lambda each: _shown(acceptance(each), "%"),
        "flagged prompts": lambda each: _whole(_assessed("flagged")(each)),
        "their KL": lambda each: _shown(_assessed("kl_flagged")(each)),
        "KL of the rest": lambda each: _shown(_assessed("kl_rest")(each)),
        "new prompts": lambda each: _whole(_of_prompts("new_prompts")(each)),
        "asked for": lambda each: _whole(_of_prompts("asked")(each)),
        "dropped: no room": lambda each: _whole(_of_prompts("no_room")(each)),
        "dropped: empty": lambda each: _whole(_of_prompts("empty")(each)),
        "dropped: too long": lambda each: _whole(_of_prompts("too_long")(each)),
        "dropped: duplicate": lambda each: _whole(_of_prompts("duplicate")(each)),
        "left out": lambda each: _whole(_of_prompts("left_out")(each)),
        "own KL(student || teacher)": lambda each: _shown(_of_cache("reverse_kl")(each)),
        "own KL(teacher || student)": lambda each: _shown(_of_cache("forward_kl")(each)),
        "held-out KL(teacher || student)": lambda each: _shown(_held_out("kl")(each)),
        "held-out KL(student || teacher)": lambda each: _shown(_held_out("reverse_kl")(each)),
        "held-out cross-entropy": lambda each: _shown(_held_out("ce")(each)),
        "top-1 agreement": lambda each: _shown(_held_out("top1_agreement")(each), "%"),
        "learnt positions": lambda each: _whole(each.get("positions")),
        "staleness, rounds": lambda each: _shown(each.get("staleness")),
        "steps in all": lambda each: _whole(each.get("steps")),
        "cache, bytes": lambda each: _whole(_of_cache("bytes")(each)),
    }
    cells = {name: [text(each) for each in rounds] for name, text in columns.items()}
    known = [name for name, column in cells.items() if any(column)]
    rows = [
        [str(each["round"]), *(cells[name][at] for name in known)] for at, each in enumerate(rounds)
    ]
    return ["round", *known], rows


def _shown(value: float | None, unit: Unit = "") -> str:
    return "" if value is None else number(value, unit)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _passes(rounds: list[_Round]) -> tuple[list[str], list[list[str]]]:
    """How often each cache was read, by round: header and rows."""
    names = list(dict.fromkeys(name for each in rounds for name in each.get("passes") or {}))
    rows = [
        [str(each["round"]), *(_shown((each.get("passes") or {}).get(name)) for name in names)]
        for each in rounds
    ]
    return ["round", *names], rows


def _reference(student: dict[str, Any]) -> str:
    """Who wrote the cached answers to the held-out prompts."""
    path = (student.get("evaluation") or {}).get("cache") or student.get("cache")
    try:
        generation = CacheReader(str(path)).manifest.data.generation
    except LogitcaskError:
        return "in the cache"
    if generation is None:
        return "the data's"
    return "the teacher's" if generation.writer is None else generation.writer.model


def _facts(document: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """Where the rounds come from."""
    rounds, student = settings["rounds"], settings["student_config"]
    losses: Sequence[dict[str, Any]] = student.get("losses") or []
    return {
        "folder": document["output"],
        "newest student": document["student"],
        "given text": str(student.get("cache")),
        "losses": ", ".join(_loss(each) for each in losses),
        "prompts a round": f"{rounds['prompts']:,}",
        "steps a round": f"{rounds['steps_per_round']:,}, after {rounds['warmup_steps']:,} on given text",
        "students' share": f"{rounds['on_policy_fraction']:g} of the learnt positions",
        "caches": ", ".join(
            f"round {each['round']}: {each['cache']['fingerprint'][:16]}"
            for each in document["rounds"]
            if "cache" in each
        ),
    }


def _loss(loss: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in loss.items() if name != "name")
    return f"{loss.get('name')} ({options})" if options else str(loss.get("name"))
