"""Slices of a split, as ``datasets`` writes them: ``train[:10%]``, ``train[1000:2000]``,
``train[-5%:]``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SLICE = re.compile(
    r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+)?(?P<start_percent>%)?:(?P<stop>-?\d+)?(?P<stop_percent>%)?\])?"
)


class Slice(NamedTuple):
    """Rows of a split, from ``start`` to ``stop``, which is exclusive; None is the split's end.

    A negative number counts from the end. Percentages are rounded to the nearest row, as in
    ``datasets``.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False

    @property
    def needs_total(self) -> bool:
        """Whether ``bounds`` needs the number of rows of the split."""
        numbers = [number for number in (self.start, self.stop) if number is not None]
        return bool(numbers) and (self.percent or min(numbers) < 0)

    def bounds(self, total: int | None) -> tuple[int, int | None]:
        """The first row, and the row behind the last one, None for all. ``total``: number of rows
        of the split; may be None unless ``needs_total``.
        """

        def row(number: int) -> int:
            if not self.needs_total or total is None:
                return number
            at = round(number * total / 100) if self.percent else number
            return max(0, total + at) if at < 0 else at

        return (
            0 if self.start is None else row(self.start),
            None if self.stop is None else row(self.stop),
        )


def parse_slice(split: str) -> Slice:
    """The slice that ``split`` names. Raises ValueError for other text, and for more than 100 %."""
    found = _SLICE.fullmatch(split)
    expected = "expected a name such as train, or a part of it, such as train[:10%] or train[100:]"
    if found is None:
        raise ValueError(f"{split!r} is no split; {expected}")
    start, stop = (None if found[each] is None else int(found[each]) for each in ("start", "stop"))
    percents = found["start_percent"], found["stop_percent"]
    if any(
        mark and found[each] is None for mark, each in zip(percents, ("start", "stop"), strict=True)
    ):
        raise ValueError(f"{split!r} is no split; {expected}")
    percent = any(percents)
    if percent and any(abs(each) > 100 for each in (start, stop) if each is not None):
        raise ValueError(f"{split!r} names more than 100 %; {expected}")
    return Slice(found["name"], start, stop, percent)
