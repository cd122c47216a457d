"""Pages: what a page may load and run, escaped text, and the file."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.pages.page import data_element, refuse_foreign, render, write_page

TEMPLATE = """{% extends "page.html.jinja" %}{% from "charts.html.jinja" import draw %}
{% block title %}{{ name }}{% endblock %}{% block main %}<p>{{ name | printable }} {{ 1234567 | count }}</p>{% endblock %}"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.html.jinja").write_text(TEMPLATE)
    (tmp_path / "a.js").write_text("'use strict'; const a = '<b>';\n")
    (tmp_path / "a.css").write_text("p > b { color: red }")
    return tmp_path


def rendered(folder, name="x"):
    return render(
        folder, "a.html.jinja", styles=[folder / "a.css"], scripts=[folder / "a.js"], name=name
    )


def test_only_its_own_scripts_run_and_nothing_is_loaded(folder):
    page = rendered(folder)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (code,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", page)


def test_text_stays_text(folder):
    page = rendered(folder, "<script>alert(1)</script>{{ 7 * 7 }}<!--data-->\x1b\u202e")
    assert page.count("<script>") == 1
    assert page.count("<!--data-->") == 1
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}&lt;!--data--&gt;\\x1b\\u202e</p>"
        not in page
    )
    assert (
        r"&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}&lt;!--data--&gt;\x1b\u202e 1,234,567</p>"
        in page
    )
    assert "p > b { color: red }" in page


def test_the_data_follows_the_page(folder, tmp_path):
    out = tmp_path / "out.html"
    size = write_page(out, rendered(folder), [data_element("a", "AAAA"), data_element("b", "BB")])
    text = out.read_text()
    assert size == out.stat().st_size
    assert (
        '<script type="text/plain" id="a">AAAA</script>\n<script type="text/plain" id="b">' in text
    )
    assert "<!--data-->" not in text
    assert text.endswith("</html>")
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_page_is_replaced_and_no_other_file(folder, tmp_path):
    out = tmp_path / "out.html"
    write_page(out, rendered(folder, "first"))
    write_page(out, rendered(folder, "second"))
    assert "second" in out.read_text()
    other = tmp_path / "notes.html"
    other.write_text("<p>mine</p>")
    for refused in (refuse_foreign, lambda file: write_page(file, rendered(folder))):
        with pytest.raises(UserError, match=r"notes\.html exists and is not a report of logitcask"):
            refused(other)
    assert other.read_text() == "<p>mine</p>"
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        refuse_foreign(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(folder, tmp_path):
    out = tmp_path / "out.html"
    write_page(out, rendered(folder, "first"))

    def broken():
        yield data_element("a", "AAAA")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write to .*out\.html: No space left on device"):
        write_page(out, rendered(folder, "second"), broken())
    assert "first" in out.read_text()
    assert list(tmp_path.glob("*.tmp")) == []
    with pytest.raises(UserError, match=r"cannot write to .*No such file or directory"):
        write_page(tmp_path / "no" / "out.html", rendered(folder))


def test_two_that_write_one_file_leave_one_whole_page(folder, tmp_path):
    out = tmp_path / "out.html"

    def meanwhile():
        write_page(out, rendered(folder, "second"))
        assert "second" in out.read_text()
        yield data_element("a", "AAAA")

    write_page(out, rendered(folder, "first"), meanwhile())
    text = out.read_text()
    assert "first" in text
    assert "second" not in text
    assert text.count("</html>") == 1
    assert list(tmp_path.glob("*.tmp")) == []


def test_reading_a_cache_needs_no_templates():
    code = "import sys, logitcask.cache_format.pages.page, logitcask; logitcask.CacheReader; assert 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
