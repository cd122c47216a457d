"""Charts as a picture: XML that is whole, with the marks of the chart, and nothing that is loaded."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from logitcask.cache_format.pages.charts import Bar, Bars, Cloud, LineChart, Point, Points, Series
from logitcask.cache_format.pages.picture import picture

SVG, HTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"


@pytest.fixture
def drawn():
    clouds = [Cloud('<a> & "b"', [Point("]]><p>", 1, 2, 1, 3), Point("q", 2, 4)], 1, 2)]
    charts = [
        Points("P", "x", "y", clouds),
        LineChart("L", "x", "y", [Series("one", [0, 1], [1, 2]), Series("two", [0], [1])]),
        Bars("B", "y", [Bar("\x1b", 1, "1")]),
    ]
    return picture("A <title> & more", charts, width=600, height=1000)


def test_it_is_whole_and_shows_the_charts(drawn):
    root = ElementTree.fromstring(drawn)
    assert (root.tag, root.get("viewBox")) == (f"{SVG}svg", "0 0 600 1000")
    assert root.find(f"{SVG}title").text == "A <title> & more"
    (frame,) = root.iter(f"{SVG}foreignObject")
    assert (frame.get("width"), frame.get("height")) == ("600", "1000")
    assert len([*frame.iter(f"{HTML}figure")]) == 3
    marks = [each for each in frame.iter(f"{SVG}svg") if each.get("class") == "point"]
    assert [each.find(f"{SVG}title").text for each in marks] == ["]]><p>: 2", "q: 4"]
    # What is drawn as SVG is SVG in XML, too.
    assert [each.tag for each in frame.iter() if each.tag.endswith("}path")] == [f"{SVG}path"] * 8
    assert {each.tag for each in frame.iter(f"{HTML}svg")} == set()
    assert "\x1b" not in drawn


def test_nothing_is_loaded_or_run(drawn):
    assert not any(word in drawn for word in ("<script", "href", "url(", "@import", "src="))


def test_it_is_drawn_in_a_browser(chromium, drawn, tmp_path):
    """As an image of a page, all within its height, in the reader's scheme."""
    (tmp_path / "picture.svg").write_text(drawn, encoding="utf-8")
    (tmp_path / "page.html").write_text('<img src="picture.svg">')
    sizes = {}
    for scheme in ("light", "dark"):
        context = chromium.new_context(color_scheme=scheme)
        context.set_default_timeout(300_000)
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        sizes[scheme] = page.evaluate(
            """async () => {
              const image = document.images[0];
              await image.decode();
              return [image.naturalWidth, image.naturalHeight];
            }"""
        )
        page.goto((tmp_path / "picture.svg").as_uri())
        frame = "document.querySelector('.picture')"
        assert page.evaluate(f"{frame}.scrollHeight") <= 1000
        assert page.evaluate(f"{frame}.scrollWidth") <= 600
        ground = page.evaluate(f"getComputedStyle({frame}).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[scheme]
        context.close()
    assert sizes == {"light": [600, 1000], "dark": [600, 1000]}
