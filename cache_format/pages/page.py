"""Pages: templates, their style and scripts, and the writing of one file.

A page carries all it needs. Its content security policy forbids every request and every script
but its own, so that text from a cache can neither run nor reach a network.
"""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.export.token_text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
_GENERATOR = '<meta name="generator" content="logitcask">'
_DATA = "<!--data-->"
"""Place of the data in a template. Escaped text cannot hold it."""


def environment(folder: Path) -> Environment:
    """Jinja with the templates of ``folder`` and of this package. All values are escaped."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=ChoiceLoader([FileSystemLoader(folder), FileSystemLoader(HERE)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"printable": printable, "count": lambda number: f"{number:,}"}
    return found


def render(
    folder: Path,
    template: str,
    *,
    styles: Iterable[Path] = (),
    scripts: Iterable[Path] = (),
    **values: Any,
) -> str:
    """The page of a template that extends ``page.html.jinja``.

    folder:  of the template.
    styles:  CSS files behind the shared ``page.css``.
    scripts: JavaScript files, in order.
    """
    code = [path.read_text(encoding="utf-8") for path in scripts]
    style = "\n".join(path.read_text(encoding="utf-8") for path in (HERE / "page.css", *styles))
    return (
        environment(folder)
        .get_template(template)
        .render(style=style, scripts=code, policy=_policy(code), **values)
    )


def _policy(scripts: list[str]) -> str:
    """The content security policy of a page: nothing is loaded, only these scripts run."""
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def refuse_foreign(out: Path) -> None:
    """Raises UserError if ``out`` is a file that is not a page of this package, or a folder."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
    if out.exists() and _GENERATOR not in _beginning(out):
        raise UserError(
            f"{out} exists and is not a report of logitcask; remove it, or choose another file"
        )


def _beginning(file: Path) -> str:
    with file.open("rb") as handle:
        return handle.read(4096).decode(errors="replace")


def data_element(name: str, packed: str) -> str:
    """Packed data (``packed.py``) as an element with the id ``name``."""
    return f'<script type="text/plain" id="{name}">{packed}</script>\n'


def write_page(out: Path, page: str, data: Iterable[str] = (), *, replace: bool = False) -> int:
    """Writes a rendered page to ``out``, with the elements ``data`` in it, one at a time. Returns
    its bytes. An existing page is replaced once the new one is complete.

    replace: whether any file is replaced: one in a folder that belongs to this package.

    Raises UserError for a file that is no page (``refuse_foreign``) or cannot be written.
    """
    if not replace:
        refuse_foreign(out)
    before, _, after = page.partition(_DATA)
    # A folder of this package has one writer. Elsewhere two commands may write one file.
    own = "" if replace else f".{uuid.uuid4().hex}"
    temporary = out.with_name(f"{out.name}{own}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(before)
            for element in data:
                file.write(element)
            file.write(after)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or one_line(error)}; make room or permit it, or choose another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return out.stat().st_size
