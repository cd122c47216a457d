"""The caches that a round learns from, with their shares of the positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitcask.rounds import teacher_text
from logitcask.rounds.config import RoundsSettings


def of_round(
    number: int,
    rounds: RoundsSettings,
    *,
    text: str,
    students: Callable[[int], Path],
    teachers: Callable[[int], Path],
    replay: float,
    pairs: bool,
    evaluates_on_text: bool,
) -> list[dict[str, Any]]:
    """``cache`` of the student config in round ``number``; 0 is the start.

    text: the cache of given text. students, teachers: the caches of a round. replay: the share of
    earlier rounds. pairs: whether a student's answer is read with the teacher's.
    evaluates_on_text: whether the held-out text is a part of ``text``.
    """
    given_text = {"cache": text, "name": teacher_text.TEXT}
    if number == 0:
        return [{**given_text, "weight": 1.0}]
    given, of_students = 1 - rounds.on_policy_fraction, rounds.on_policy_fraction
    replay = replay if number > 1 else 0.0
    shares = _shares(number, of_students or given, replay)
    found: list[dict[str, Any]] = []
    for each in sorted(shares):
        name, of_teacher = teacher_text.student(each), teacher_text.teacher(each)
        entry = {"cache": str(students(each)), "name": name, "weight": shares[each]}
        if rounds.teacher_text:
            # Beside every text of students, and as much of it as the fraction says.
            weight = shares[each] / (of_students or given) * given
            own = {"cache": str(teachers(each)), "name": of_teacher, "weight": weight}
            found.append({**own, "held_out": 0.0})
        if pairs:
            entry["preferred"] = of_teacher
        if of_students:
            found.append({**entry, "held_out": 0.0})
    if rounds.teacher_text:
        given = 0.0
    if given or evaluates_on_text:
        found.insert(0, {**given_text, "weight": given})
    return found


def _shares(number: int, whole: float, replay: float) -> dict[int, float]:
    """``whole`` as shares of the rounds up to ``number``: ``replay`` of it for the earlier ones, all
    alike.
    """
    shares = {number: whole * (1 - replay)}
    if replay:
        shares |= dict.fromkeys(range(1, number), whole * replay / (number - 1))
    return shares
