"""The site that ``make docs`` builds from ``docs/``: what mkdocs does not do by itself.

Pages link to files of the repository, such as ``../cache_format/SPEC.md``, and these links work in
a clone and on a forge. In the site they lead to pages too: a document of the repository is a page
of its own, and any other file is shown as code. Nothing is copied into ``docs/``.

After a build every link, anchor and picture of its HTML is checked, also those that mkdocs does not
look at: of raw HTML and of the pages that are made from docstrings. A resource from the network is a
fault as well. mkdocs runs with ``strict``, so a fault ends the build.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "cache_format/SPEC.md": "spec.md",
}
"""Documents outside ``docs/``, and their pages. The README's place in the site is the first page,
which has a text of its own."""

BOOSTS = {"Start": 4, "How to": 4, "Understand": 4, "Measured": 0.5, "Log": 0.25}
"""Weights of the parts of the site in its search: a page that explains a word goes before a list in
which it occurs."""
BOOSTS_OF_PAGES = {"losses.md": 4, "own-teacher.md": 12, "extending.md": 1}
"""Losses and own teachers: people mean the ones that there are, and only then code of one's own."""

_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_CODE = re.compile(r"(^```.*?^```$|``.+?``|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_NO_HEADER = re.compile(r"<th([^>]*)></th>")
_SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'
_MENU = re.compile(
    r'(<nav class="md-nav" data-md-level="\d") aria-labelledby="\w+"'
    r'([^>]*>\s*<label class="md-nav__title"[^>]*>\s*<span[^>]*></span>\s*([^<]*?)\s*</label>)'
)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}
_LONGEST = 100_000
"""Bytes of a file that is shown as code; the rest of a longer one is left out."""

log = logging.getLogger("mkdocs.plugins.site")


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the documents outside ``docs/``, and the files that pages link to."""
    for path, page in DOCUMENTS.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for file in list(files.documentation_pages()):
        for target in _LINK.findall(_CODE.sub("", file.content_string)):
            path = _in_repository(target, file.src_uri)
            if path and not _page(path) and not files.get_file_from_path(_source(path)):
                files.append(File.generated(config, _source(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with links to pages in place of links to files of the repository."""
    folder = PurePosixPath(page.file.src_uri).parent
    part = page.ancestors[-1].title if page.ancestors else ""
    boost = BOOSTS_OF_PAGES.get(page.file.src_uri, BOOSTS.get(part, 1))
    page.meta.setdefault("search", {}).setdefault("boost", boost)

    def replaced(link: re.Match[str]) -> str:
        path = _in_repository(link[1], page.file.src_uri)
        if path is None:
            return link[1]
        anchor = link[1].partition("#")[2]
        place = os.path.relpath(_page(path) or _source(path), folder)
        return f"{place}#{anchor}" if anchor else place

    parts = _CODE.split(markdown)
    return "".join(
        part if place % 2 else _LINK.sub(replaced, part) for place, part in enumerate(parts)
    )


def on_page_content(html: str, **_: Any) -> str:
    """The page without the backslashes of ``\\|`` in the cells of tables: a forge leaves them out,
    Python-Markdown keeps them within code. A header cell without text is an ordinary cell.
    """
    html = _NO_HEADER.sub(r"<td\1></td>", html)
    return _CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)


def on_post_page(output: str, **_: Any) -> str:
    """The page with names for its landmarks that the theme leaves without one: the search, and the
    menus of parts whose first page is their title.
    """
    output = output.replace(_SEARCH, f'{_SEARCH} aria-label="Search"', 1)
    return _MENU.sub(
        lambda menu: f'{menu[1]} aria-label="{" ".join(menu[3].split())}"{menu[2]}', output
    )


def on_post_build(*, config: Any) -> None:
    """Checks the HTML that was written."""
    for fault in faults(Path(config.site_dir)):
        log.warning(fault)


def _in_repository(target: str, page: str) -> str | None:
    """The file of the repository that a link of a page leads to, or None: another site's, an anchor
    of the page, or a file of ``docs/`` in a page of ``docs/``, which mkdocs follows by itself.
    """
    path = target.partition("#")[0]
    if not path or urlsplit(target).scheme:
        return None
    home = next((place for place, name in DOCUMENTS.items() if name == page), f"docs/{page}")
    found = os.path.normpath(
        (ROOT / ("docs/index.md" if page == "index.md" else home)).parent / path
    )
    if not found.startswith(f"{ROOT}{os.sep}") or not os.path.exists(found):
        return None  # mkdocs names it
    relative = Path(found).relative_to(ROOT).as_posix()
    return None if home.startswith("docs/") and relative.startswith("docs/") else relative


def _page(path: str) -> str | None:
    """The page of a file of the repository, if it has one."""
    return path.removeprefix("docs/") if path.startswith("docs/") else DOCUMENTS.get(path)


def _source(path: str) -> str:
    return f"source/{path}.md"


def _shown(path: str) -> str:
    """A file as a page with its code, or a folder as a page with its files."""
    file = ROOT / path
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if each.suffix in _LANGUAGES)
        return head + "".join(f"- `{path}/{name}`\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "\n...\n"
        head += f"The first {_LONGEST:,} characters.\n\n"
    return f"{head}````{_LANGUAGES.get(file.suffix, 'text')}\n{text}````\n"


class _References(HTMLParser):
    """The links, resources and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value is not None}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.resources.append(found.get("href", ""))
        elif "src" in found:
            self.resources.append(found["src"])


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the HTML of a site: links to pages and anchors that are not there, and
    resources that are not there or would come from the network. One line for each.
    """

    @cache
    def references(page: Path) -> _References:
        return _References(page.read_text(encoding="utf-8"))

    for page in sorted(site.rglob("*.html")):
        if page.name == "404.html":  # its links are absolute: nobody knows where it will be shown
            continue
        name = page.relative_to(site)
        found = references(page)
        for target in dict.fromkeys(found.links + found.resources):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in found.resources and parts.scheme != "data":
                    yield f"{name} loads {target} from the network"
                continue
            place = page if not parts.path else (page.parent / unquote(parts.path))
            place = place / "index.html" if place.is_dir() else place
            if not place.exists():
                yield f"{name} leads to {target}, which is not in the site"
            elif place.suffix == ".html" and unquote(parts.fragment) not in (
                references(Path(os.path.normpath(place))).anchors
            ):
                yield f"{name} leads to {target}, a page without that anchor"
