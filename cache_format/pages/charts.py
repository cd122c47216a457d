"""Charts of a page: numbers of line charts, points, histograms, bars, spans and stacks, placed on a
plot.

``charts.html.jinja`` draws them. The lines are SVG that stretches to any width; titles, ticks and
legends are HTML text, so that they keep their size on a phone. Series differ in dashes as well as
in colours. Each chart has its values as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

COLOURS = 6
"""Colours, and as many shapes of points."""

STYLES = 2 * COLOURS
"""Series that a chart can tell apart: lines of six colours with two dashes each, or points of six
colours and shapes, full and hollow.
"""

SIDE = 1000
"""Width and height of a plot in units of its SVG."""

Unit = Literal["", "%"]


class Tick(NamedTuple):
    """A mark of an axis: its place in percent of the axis, and its text."""

    place: float
    text: str


class Series(NamedTuple):
    """A line. ``x`` ascends; a value that is not finite leaves a gap. ``style``: number of its colour
    and dashes; None: its place in the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None = None


def number(value: float, unit: Unit = "") -> str:
    """Three digits of a number, or a share in percent."""
    if not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from at most ``low`` to at least ``high``."""
    span = high - low if high > low else abs(high) or 1.0
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [each * step for each in range(first, last + 1)]


@dataclass(frozen=True)
class _Plane:
    """A chart with an x axis and a y axis, both of numbers.

    ticks: values of x that have a mark; None chooses them.
    log:   whether x is logarithmic; it needs ``ticks``.
    zero:  whether the y axis begins at 0.
    unit:  of y; y_label names it in words.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[object]
    ticks: Sequence[float] | None = None
    log: bool = False
    zero: bool = True
    unit: Unit = ""
    note: str = ""

    def _xs(self) -> Iterator[float]:
        """All values of x."""
        raise NotImplementedError

    def _ys(self) -> Iterator[float]:
        """All values of y."""
        raise NotImplementedError

    @cached_property
    def _y_ticks(self) -> list[float]:
        values = [y for y in self._ys() if math.isfinite(y)] or [0.0]
        return nice_ticks(min(0.0, *values) if self.zero else min(values), max(values))

    @cached_property
    def _x_range(self) -> tuple[float, float]:
        values = [*self._xs()] or [0.0]
        values += self.ticks or []
        low, high = min(values), max(values)
        return low, high if high > low else low + 1

    def _x(self, value: float) -> float:
        low, high = self._x_range
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def _y(self, value: float) -> float:
        low, high = self._y_ticks[0], self._y_ticks[-1]
        return (value - low) / (high - low)

    def x_ticks(self) -> list[Tick]:
        values = self.ticks
        if values is None:
            low, high = self._x_range
            values = [each for each in nice_ticks(low, high) if low <= each <= high]
        return [Tick(100 * self._x(each), number(each)) for each in values]

    def y_ticks(self) -> list[Tick]:
        return [
            Tick(100 * self._y(each), number(each, self.unit).replace(".0 %", " %"))
            for each in self._y_ticks
        ]


@dataclass(frozen=True)
class LineChart(_Plane):
    """Lines over one x axis.

    dots: whether the points are marked: for series of few or single points.
    """

    series: Sequence[Series]
    dots: bool = False

    kind = "line"

    def _xs(self) -> Iterator[float]:
        return (x for each in self.series for x in each.x)

    def _ys(self) -> Iterator[float]:
        return (y for each in self.series for y in each.y)

    def paths(self) -> list[str]:
        """The SVG path of each series, in units of ``SIDE``."""
        return [self._path(each) for each in self.series]

    def marks(self) -> list[str]:
        """The SVG path of the dots of each series: lines without length, whose ends are round."""
        if not self.dots:
            return []
        return [
            "".join(
                f"M{SIDE * self._x(x):.1f} {SIDE * (1 - self._y(y)):.1f}h0"
                for x, y in zip(each.x, each.y, strict=True)
                if math.isfinite(y)
            )
            for each in self.series
        ]

    def style(self, at: int) -> int:
        """The number of the style of a series."""
        style = self.series[at].style
        return (at if style is None else style) % STYLES

    def _path(self, series: Series) -> str:
        parts, pen = [], "M"
        for x, y in zip(series.x, series.y, strict=True):
            if math.isfinite(y):
                parts.append(f"{pen}{SIDE * self._x(x):.1f} {SIDE * (1 - self._y(y)):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the values; an x that a series lacks leaves its cell empty."""
        at = sorted({x for each in self.series for x in each.x})
        known = [dict(zip(each.x, each.y, strict=True)) for each in self.series]
        rows = [
            [number(x), *(number(values[x], self.unit) if x in values else "" for values in known)]
            for x in at
        ]
        return [self.x_label, *(each.label for each in self.series)], rows

    def summary(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        found = [
            f"{each.label} from {number(each.y[0], self.unit)} to {number(each.y[-1], self.unit)}"
            for each in self.series
            if len(each.y)
        ]
        return f"{self.title}, {self.y_label} against {self.x_label}: {'; '.join(found)}"


class Point(NamedTuple):
    """A value between ``low`` and ``high`` (None: no interval) at a place of the x axis, with its name."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Mark(NamedTuple):
    """A point on the plot: its place in percent of both axes, and in words. below: it is at the lower
    edge, and its value is below.
    """

    left: float
    bottom: float
    words: str
    below: bool


class Cloud(NamedTuple):
    """Points of one kind. Points of a colour differ from those of another one in their shape, too.

    colour, shape: numbers below ``COLOURS``.
    """

    label: str
    points: Sequence[Point]
    colour: int
    shape: int
    hollow: bool = False


def style_of_cloud(number: int) -> tuple[int, int, bool]:
    """Colour, shape and hollowness of the series of this number, in the colour of its line."""
    return number % COLOURS, number % COLOURS, number % STYLES >= COLOURS


@dataclass(frozen=True)
class Points(_Plane):
    """Points with vertical intervals.

    x_name: what the points are, for the table.
    floor:  lowest value of y on the plot; a point below it is drawn there, and marked.
    guides: values of y with a line.
    """

    series: Sequence[Cloud]
    x_name: str = ""
    floor: float | None = None
    guides: Sequence[float] = ()

    kind = "points"

    def _xs(self) -> Iterator[float]:
        return (point.x for each in self.series for point in each.points)

    def _ys(self) -> Iterator[float]:
        for each in self.series:
            for point in each.points:
                for value in (point.y, point.low, point.high):
                    if value is not None:
                        yield self._shown(value)
        yield from self.guides

    def _shown(self, value: float) -> float:
        return value if self.floor is None else max(value, self.floor)

    def marks(self) -> list[list[Mark]]:
        """The marks of each series; a point that is not finite has none."""
        return [
            [
                Mark(
                    100 * self._x(point.x),
                    100 * self._y(self._shown(point.y)),
                    f"{point.label}: {number(point.y, self.unit)}",
                    self._shown(point.y) != point.y,
                )
                for point in each.points
                if math.isfinite(point.y)
            ]
            for each in self.series
        ]

    def intervals(self) -> list[str]:
        """The SVG path of the intervals of each series, in units of ``SIDE``."""
        return ["".join(map(self._interval, each.points)) for each in self.series]

    def _interval(self, point: Point) -> str:
        if point.low is None or point.high is None:
            return ""
        x = SIDE * self._x(point.x)
        low, high = (SIDE * (1 - self._y(self._shown(end))) for end in (point.low, point.high))
        return f"M{x:.1f} {low:.1f}L{x:.1f} {high:.1f}"

    def legend(self) -> list[Cloud]:
        """The first series of each label."""
        found: dict[str, Cloud] = {}
        for each in self.series:
            found.setdefault(each.label, each)
        return [*found.values()]

    def guide_places(self) -> list[float]:
        """Percent of the y axis."""
        return [100 * self._y(each) for each in self.guides]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the values, in the order of the points."""
        rows = [
            [
                point.label,
                number(point.x),
                number(point.y, self.unit),
                ""
                if point.low is None or point.high is None
                else f"{number(point.low, self.unit)} to {number(point.high, self.unit)}",
            ]
            for each in self.series
            for point in each.points
        ]
        return [self.x_name, self.x_label, self.y_label, "interval"], rows

    def summary(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        found = [f"{len(each.points)} of {each.label}" for each in self.series]
        return f"{self.title}, {self.y_label} against {self.x_label}; points: {', '.join(found)}"


@dataclass(frozen=True)
class Histogram:
    """Counts of values between ``edges``, which ascend in equal steps; one more than counts."""

    title: str
    x_label: str
    y_label: str
    edges: Sequence[float]
    counts: Sequence[int]
    unit: Unit = ""
    note: str = ""

    kind = "histogram"

    @cached_property
    def _y_ticks(self) -> list[float]:
        return nice_ticks(0, max([*self.counts, 1]), 5)

    def x_ticks(self) -> list[Tick]:
        low, high = self.edges[0], self.edges[-1]
        return [
            Tick(100 * (each - low) / (high - low), number(each, self.unit).replace(".0 %", " %"))
            for each in nice_ticks(low, high)
            if low <= each <= high
        ]

    def y_ticks(self) -> list[Tick]:
        return [Tick(100 * each / self._y_ticks[-1], number(each)) for each in self._y_ticks]

    def bars(self) -> list[tuple[float, float, float, float]]:
        """x, y, width and height of each bar, in units of ``SIDE``."""
        width, top = SIDE / len(self.counts), self._y_ticks[-1]
        return [
            (at * width + width * 0.06, SIDE - SIDE * count / top, width * 0.88, SIDE * count / top)
            for at, count in enumerate(self.counts)
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [f"{number(low, self.unit)} to {number(high, self.unit)}", f"{count:,}"]
            for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False)
        ]
        return [self.x_label, self.y_label], rows

    def summary(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        most = max(range(len(self.counts)), key=self.counts.__getitem__)
        low, high = number(self.edges[most], self.unit), number(self.edges[most + 1], self.unit)
        return (
            f"{self.title}: {sum(self.counts):,} {self.y_label}, most of them from {low} to {high}"
        )


class Bar(NamedTuple):
    """A bar with its name, its value, and the value in words. ``note`` is shown dim."""

    label: str
    value: float
    shown: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0, one a row."""

    title: str
    y_label: str
    bars: Sequence[Bar]
    note: str = ""

    kind = "bars"

    def widths(self) -> list[float]:
        """Percent of the longest bar."""
        most = max((each.value for each in self.bars), default=0) or 1
        return [100 * max(0.0, each.value) / most for each in self.bars]


class Span(NamedTuple):
    """A value between ``low`` and ``high`` (None: no interval), with its name, and in words."""

    label: str
    value: float
    low: float | None
    high: float | None
    shown: str
    note: str = ""


@dataclass(frozen=True)
class Spans:
    """Values with intervals over one axis that has a line at 0, one a row."""

    title: str
    y_label: str
    spans: Sequence[Span]
    note: str = ""

    kind = "spans"

    @cached_property
    def _range(self) -> tuple[float, float]:
        ends = [0.0] + [
            end
            for each in self.spans
            for end in (each.value, each.low, each.high)
            if end is not None and math.isfinite(end)
        ]
        low, high = min(ends), max(ends)
        room = 0.04 * (high - low) or 1.0
        return low - room, high + room

    def place(self, value: float) -> float:
        """Percent of the axis."""
        low, high = self._range
        return 100 * (value - low) / (high - low)


class Stack(NamedTuple):
    """A bar of one value, at least 0, for each part of its chart. shown: their sum in words."""

    label: str
    values: Sequence[float]
    shown: str


@dataclass(frozen=True)
class Stacks:
    """Horizontal bars from 0 that are made of named parts, one a row.

    x_label: what the rows are, for the table.
    """

    title: str
    x_label: str
    y_label: str
    parts: Sequence[str]
    stacks: Sequence[Stack]
    note: str = ""

    kind = "stacks"

    def widths(self) -> list[list[float]]:
        """Each value in percent of the longest bar."""
        most = max((sum(each.values) for each in self.stacks), default=0) or 1
        return [[100 * max(0.0, value) / most for value in each.values] for each in self.stacks]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the values."""
        rows = [[each.label, *map(number, each.values), each.shown] for each in self.stacks]
        return [self.x_label, *self.parts, "sum"], rows


Chart = LineChart | Points | Histogram | Bars | Spans | Stacks
