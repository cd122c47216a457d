"""Charts: places on the plot, ticks, and the tables beside them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from logitcask.cache_format.pages.charts import (
    SIDE,
    Bar,
    Bars,
    Cloud,
    Histogram,
    LineChart,
    Point,
    Points,
    Series,
    Span,
    Spans,
    Stack,
    Stacks,
    nice_ticks,
    number,
    style_of_cloud,
)
from logitcask.cache_format.pages.page import HERE, environment


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.77, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (5, 5, [5, 6]),
        (0, 0, [0, 0.2]),
    ],
)
def test_ticks(low, high, ticks):
    np.testing.assert_allclose(nice_ticks(low, high), ticks, atol=1e-12)


def test_ticks_hold_all_values(rng):
    for low, span in zip(rng.normal(0, 1e3, 200), np.exp(rng.uniform(-8, 25, 200)), strict=True):
        ticks = nice_ticks(low, low + span)
        slack = 1e-6 * (ticks[1] - ticks[0])
        assert ticks[0] <= low + slack
        assert ticks[-1] >= low + span - slack
        assert 2 <= len(ticks) <= 8
        mantissa = (ticks[1] - ticks[0]) / 10.0 ** math.floor(
            math.log10(ticks[1] - ticks[0]) + 1e-9
        )
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_lines_are_where_their_values_are():
    chart = LineChart("t", "step", "nats", [Series("a", [0, 5, 10], [0, 2.5, 5])])
    assert points(chart.paths()[0]) == [(0, SIDE), (SIDE / 2, SIDE / 2), (SIDE, 0)]
    assert [(tick.place, tick.text) for tick in chart.y_ticks()][-1] == (100, "5")
    assert [tick.text for tick in chart.x_ticks()] == ["0", "2", "4", "6", "8", "10"]


def test_a_logarithmic_axis():
    chart = LineChart("t", "k", "share", [Series("a", [1, 4, 16], [1, 1, 1])], [1, 4, 16], log=True)
    assert [x for x, _ in points(chart.paths()[0])] == [0, SIDE / 2, SIDE]
    assert [tick.place for tick in chart.x_ticks()] == [0, 50, 100]


def test_a_value_that_is_not_finite_leaves_a_gap():
    series = Series("a", [0, 1, 2, 3], [1, math.nan, math.inf, 2])
    chart = LineChart("t", "x", "y", [series])
    assert chart.paths()[0].count("M") == 2
    assert len(points(chart.paths()[0])) == 2
    assert [row[1] for row in chart.table()[1]] == ["1", "–", "–", "2"]


def test_the_table_has_every_value():
    chart = LineChart(
        "t", "x", "y", [Series("a", [0, 2], [0.5, 1]), Series("b", [2, 3], [0.25, 0])], unit="%"
    )
    assert chart.table() == (
        ["x", "a", "b"],
        [["0", "50.0 %", ""], ["2", "100.0 %", "25.0 %"], ["3", "", "0.0 %"]],
    )


def test_an_empty_chart_is_drawn():
    chart = LineChart("t", "x", "y", [Series("a", [], [])])
    assert (chart.paths(), chart.table()[1]) == ([""], [])
    assert chart.summary()
    assert Bars("t", "y", []).widths() == []


def test_histograms():
    chart = Histogram("t", "nats", "positions", [0, 1, 2], [3, 12])
    assert chart.y_ticks()[-1].text == "15"
    (x, y, width, height), second = chart.bars()
    assert (y, height) == (SIDE * 12 / 15, SIDE * 3 / 15)
    assert second[0] - x == SIDE / 2 > width
    assert second[3] == pytest.approx(SIDE * 12 / 15)
    assert chart.table()[1] == [["0 to 1", "3"], ["1 to 2", "12"]]
    assert "15 positions, most of them from 1 to 2" in chart.summary()


def test_bars():
    chart = Bars("t", "y", [Bar("a", 2, "2"), Bar("b", 0.5, "0.5"), Bar("c", -1, "-1")])
    assert chart.widths() == [100, 25, 0]


def test_numbers():
    assert [number(each) for each in (0, 0.12345, 12.345, 999.4, 123456.0, math.nan)] == [
        "0",
        "0.123",
        "12.3",
        "999",
        "123,456",
        "–",
    ]
    assert number(0.1234, "%") == "12.3 %"


def test_spans():
    spans = [Span("a", 1.0, 0.5, 2.0, "+1"), Span("b", -2.0, None, None, "-2", "no interval")]
    chart = Spans("T", "nats", spans)
    # From -2 to 2, with 4 % of that on each side.
    assert [chart.place(each) for each in (-2.16, 0, 2.16)] == pytest.approx([0, 50, 100])
    assert chart.place(1.08) == pytest.approx(75)
    drawn = environment(HERE).from_string(
        '{% from "charts.html.jinja" import draw %}{{ draw(chart) }}'
    )
    html = drawn.render(chart=chart)
    assert html.count('class="span"') == 1
    assert html.count('class="dot"') == 2
    assert f'class="dot" style="left:{chart.place(1):.2f}%"' in html
    assert Spans("T", "", [Span("a", 0.0, 0.0, 0.0, "0")]).place(0) == 50


def test_a_line_keeps_its_style():
    series = [Series("a", [0], [0]), Series("b", [0], [0], 7), Series("c", [0], [0], 25)]
    chart = LineChart("T", "x", "y", series)
    assert [chart.style(at) for at in range(3)] == [0, 7, 1]
    assert chart.marks() == []


def test_dots_are_where_their_values_are():
    chart = LineChart("T", "x", "y", [Series("a", [0, 1, 2], [0, math.nan, 4])], dots=True)
    assert chart.marks() == ["M0.0 1000.0h0M1000.0 0.0h0"]


def test_stacks():
    stacks = [Stack("0", [1.0, 0.0, 3.0], "4 s"), Stack("1", [0.5, 0.5, -0.1], "0.9 s")]
    chart = Stacks("T", "round", "seconds", ["a", "<b>", "c"], stacks)
    assert chart.widths()[0] == pytest.approx([25, 0, 75])
    assert chart.widths()[1] == pytest.approx([12.5, 12.5, 0])
    assert chart.table() == (
        ["round", "a", "<b>", "c", "sum"],
        [["0", "1", "0", "3", "4 s"], ["1", "0.5", "0.5", "-0.1", "0.9 s"]],
    )
    assert Stacks("T", "x", "y", [], []).widths() == []
    drawn = environment(HERE).from_string(
        '{% from "charts.html.jinja" import draw %}{{ draw(chart) }}'
    )
    html = drawn.render(chart=chart)
    assert re.findall(r'class="part (p\d)" style="width:([\d.]+)%', html) == [
        ("p0", "25.00"), ("p2", "75.00"), ("p0", "12.50"), ("p1", "12.50"),
    ]  # fmt: skip
    assert html.count("&lt;b&gt;") == 2
    assert html.count("<tr>") == 2 + 3


def test_points_and_intervals_are_where_their_values_are():
    """With a logarithmic axis, a floor and a guide; below the floor a point is at the edge."""
    clouds = [
        Cloud("a", [Point("p", 4, 0.5, 0.25, 1.25), Point("<q>", 1, -3.0, -4.0, 0.0)], 0, 3),
        Cloud("b", [Point("r", 16, 1.0), Point("s", 16, math.nan)], 5, 1, True),
        Cloud("a", [Point("t", 2, 0.0, 0.0, 0.0)], 0, 3, True),
    ]
    chart = Points(
        "T", "x", "share", clouds, [1, 4, 16], log=True, zero=False, unit="%", x_name="store",
        floor=-0.5, guides=[1.0],
    )  # fmt: skip
    assert [each.text for each in chart.y_ticks()] == ["-50 %", "0 %", "50 %", "100 %", "150 %"]

    def x(value):
        return 100 * math.log(value) / math.log(16)

    def y(value):
        return 100 * (value + 0.5) / 2

    marks = chart.marks()
    assert [(each.left, each.bottom) for each in marks[0]] == [
        pytest.approx((x(4), y(0.5))), pytest.approx((0, 0)),
    ]  # fmt: skip
    assert [each.below for each in marks[0]] == [False, True]
    assert [(each.left, each.bottom) for each in marks[1]] == [pytest.approx((100, y(1.0)))]
    p, q = re.findall(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)", chart.intervals()[0])
    assert [*map(float, p)] == pytest.approx(
        [10 * x(4), SIDE - 10 * y(0.25), 10 * x(4), SIDE - 10 * y(1.25)], abs=0.06
    )
    assert [*map(float, q)] == pytest.approx([0, SIDE, 0, SIDE - 10 * y(0.0)], abs=0.06)
    assert chart.intervals()[1] == ""
    assert chart.guide_places() == pytest.approx([y(1.0)])
    assert chart.legend() == clouds[:2]
    assert chart.table() == (
        ["store", "x", "share", "interval"],
        [
            ["p", "4", "50.0 %", "25.0 % to 125.0 %"],
            ["<q>", "1", "-300.0 %", "-400.0 % to 0.0 %"],
            ["r", "16", "100.0 %", ""],
            ["s", "16", "–", ""],
            ["t", "2", "0.0 %", "0.0 % to 0.0 %"],
        ],
    )
    assert chart.summary() == "T, share against x; points: 2 of a, 2 of b, 1 of a"
    drawn = environment(HERE).from_string(
        '{% from "charts.html.jinja" import draw %}{{ draw(chart) }}'
    )
    html = drawn.render(chart=chart)
    places = re.findall(r'class="point"[^>]*style="left:([\d.]+)%;bottom:([\d.]+)%', html)
    assert [tuple(map(float, each)) for each in places] == [
        pytest.approx((each.left, each.bottom), abs=0.006) for group in marks for each in group
    ]
    assert "<title>&lt;q&gt;: -300.0 %</title>" in html
    assert html.count('class="below"') == 1
    assert html.count('class="key-point"') == 2


def test_points_of_different_series_look_different():
    looks = [style_of_cloud(number) for number in range(12)]
    assert len({*looks}) == 12
    assert len({(colour, hollow) for colour, _, hollow in looks}) == 12
    assert len({(shape, hollow) for _, shape, hollow in looks}) == 12


def test_points_without_values_are_drawn():
    chart = Points("T", "x", "y", [])
    assert (chart.marks(), chart.intervals(), chart.table()[1]) == ([], [], [])
    same = Points("T", "x", "y", [Cloud("a", [Point("p", 3, 2)], 0, 0)])
    (mark,) = same.marks()[0]
    assert (mark.left, mark.bottom) == (0, 100)
