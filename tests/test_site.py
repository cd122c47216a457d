"""The site that ``make docs`` builds: its links, its search in a browser, and no network.

Skipped where the extra ``docs`` is not installed, and its browser part where there is no Chromium.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import logitcask

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason="the extra docs is not installed (make setup)")

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (390, 1000, 1600)
_PATIENCE = 300_000
"""Milliseconds that a busy machine may take."""

SOUGHT = {
    "tail": "why-draws.html",
    "resume": "resume.html",
    "tools": "chats.html",
    "out of memory": "troubleshooting.html",
    "losses": "losses.html",
    "many gpus": "scale.html",
    "own teacher": "own-teacher.html",
    "training loop": "own-loop.html",
    "share": "share.html",
}
"""What people type, and the page that they mean."""


def module(name: str) -> ModuleType:
    """A module of ``docs/site``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    return subprocess.run(
        [*command, "--config-file", str(config)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "WARNING" not in told
    return folder


def test_links_to_files_of_the_repository_lead_to_pages(site):
    found = (site / "store.html").read_text()
    assert 'href="spec.html"' in found
    assert "The Logitcask cache format, version 1" in (site / "spec.html").read_text()
    assert "0.1.0" in (site / "changelog.html").read_text()
    assert (
        'href="source/pipeline/configs/quickstart.yaml.html"'
        in (site / "commands.html").read_text()
    )
    shown = (site / "source/pipeline/configs/quickstart.yaml.html").read_text()
    assert re.sub("<.*?>", "", shown).count("smollm2-135m") > 0


def test_a_bar_in_a_table_has_no_backslash(site):
    assert "KL(p || M)" in (site / "losses.html").read_text()


def test_the_reference_has_every_public_name(site):
    text = (site / "api.html").read_text()
    assert {name for name in logitcask.__all__ if f'id="logitcask.{name}"' not in text} == set()
    assert "<code>target_rank</code>: int32[P], 0 = the teacher's argmax" in text


def test_faults_are_named(tmp_path):
    """Each way in which a page can be wrong, beside a page that is right."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.svg").write_text("<svg/>")
    (tmp_path / "sub" / "right.html").write_text(
        '<h1 id="top">x</h1><a href="#top"></a><a href="../wrong.html#here"></a><a href=".."></a>'
        '<img src="../b.svg"><a href="https://example.org"></a><img src="data:image/png;base64,AA">'
    )
    (tmp_path / "index.html").write_text("")
    (tmp_path / "wrong.html").write_text(
        '<p id="here"><a href="#there"></a><a href="sub/none.html"></a><img src="c.svg">'
        '<a href="sub/right.html#bottom"></a><script src="https://cdn.example.org/x.js"></script>'
        '<link rel="stylesheet" href="//fonts.example.org/a.css">'
    )
    assert sorted(module("hooks").faults(tmp_path)) == sorted(
        [
            "wrong.html leads to #there, a page without that anchor",
            "wrong.html leads to sub/none.html, which is not in the site",
            "wrong.html leads to c.svg, which is not in the site",
            "wrong.html leads to sub/right.html#bottom, a page without that anchor",
            "wrong.html loads https://cdn.example.org/x.js from the network",
            "wrong.html loads //fonts.example.org/a.css from the network",
        ]
    )


def test_fields_of_docstrings_become_lists():
    markdown = module("docstrings").markdown
    text = "A batch.\n\nids:    int64[P],\n        padded.\nkept, teacher_*: others.\n\nRaises: no\nerror."
    assert markdown(text) == (
        "A batch.\n\n- `ids`: int64[P], padded.\n- `kept, teacher_*`: others.\n\nRaises: no\nerror."
    )


@pytest.fixture
def page(chromium):
    """A page of a browser without a network. Fails at its end if anything was asked of one, or if
    the console has an error.
    """
    context = chromium.new_context(offline=True)
    context.set_default_timeout(_PATIENCE)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url),
    )
    yield opened
    context.close()
    assert wrong == []


@pytest.mark.parametrize("words", SOUGHT)
def test_search_leads_to_the_right_page_first(site, page, words):
    """From a folder, without a server."""
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").fill(words)
    page.keyboard.press("End")  # it is asked when a key goes up
    first = page.locator(".md-search-result__item").first
    first.wait_for()
    found = first.locator("a").first.get_attribute("href")
    assert re.sub(r".*/|[?#].*", "", found) == SOUGHT[words]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1600, "light"), (1600, "dark")])
def test_every_page_is_accessible(site, page, width, scheme):
    """axe finds no violation. The page of a server for what it does not have is left out. On a wide
    screen some pages stand for all.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    names = sorted(each.stem for each in site.glob("*.html") if each.stem != "404")
    found = {}
    for name in names if width == 390 else ("index", "start", "losses", "own-loop", "report"):
        page.goto((site / f"{name}.html").as_uri())
        # From a folder it can read no style sheets, and would say so in the console.
        violations = axe.Axe().run(page, options={"preload": False}).response["violations"]
        found[name] = [(each["id"], each["nodes"][0]["html"]) for each in violations]
    assert {name: each for name, each in found.items() if each} == {}


def test_wide_tables_scroll_by_the_keyboard(site, page):
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto((site / "losses.html").as_uri())
    frame = page.locator(".md-typeset__scrollwrap").first
    frame.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0")


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_as_wide_as_the_screen(site, page, width):
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("index", "start", "losses", "config", "api", "record", "spec", "field-log"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        beside = "e => e.getBoundingClientRect().right > innerWidth + 1"
        images = f"[...document.images].filter({beside}).map(e => e.src)"
        assert page.evaluate(images) == [], name


def test_the_scheme_follows_the_system(site, page):
    colours = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto((site / "index.html").as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == {"rgb(255, 255, 255)", "rgb(30, 33, 41)"}
