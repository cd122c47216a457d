"""Charts as a picture, for documents that can only show one: the same charts as in a page, as SVG.

The SVG holds them as HTML (``foreignObject``), so that there is one way to draw a chart. It has no
script, loads nothing, and follows the light or dark of its reader as a page does.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from logitcask.cache_format.pages.charts import Chart
from logitcask.cache_format.pages.page import HERE, environment

_SVG = "http://www.w3.org/2000/svg"
_STYLE = """
.picture { font: 1rem/1.5 var(--text); color: var(--ink); background: var(--ground); padding: 1.25rem; }
.picture .chart + .chart { margin-top: 2rem; }
.picture .values { display: none; }
.picture .plot { grid-template-rows: 17rem 1.6rem auto; }
"""


def picture(title: str, charts: Sequence[Chart], *, width: int, height: int) -> str:
    """Charts below each other as one SVG.

    title:         the picture in a sentence.
    width, height: of the picture, in CSS pixels; what is beyond the height is cut off.
    """
    drawn = environment(HERE).get_template("picture.svg.jinja").render(charts=charts)
    # In HTML an <svg> needs no name space, in XML it does. Text is escaped, so none is in it.
    drawn = drawn.replace("<svg ", f'<svg xmlns="{_SVG}" ')
    style = (HERE / "page.css").read_text(encoding="utf-8") + _STYLE
    return (
        f'<svg xmlns="{_SVG}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title">\n<title id="title">{escape(title)}</title>\n'
        f"<style><![CDATA[\n{style}]]></style>\n"
        f'<foreignObject width="{width}" height="{height}">'
        f'<div xmlns="http://www.w3.org/1999/xhtml" class="picture" style="height:{height}px">\n'
        f"{drawn}</div></foreignObject>\n</svg>\n"
    )
