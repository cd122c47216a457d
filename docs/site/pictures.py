"""The pictures of pages in ``docs/``, from pages that the commands have written.

    python docs/site/pictures.py run=runs/quickstart/report.html tokens=quickstart.html

Names: run (a run's report), tokens (a cache's report), student (a cache's report with a student),
compare (a comparison) and rounds (a page of rounds). Needs Chromium, playwright and Pillow.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).resolve().parents[1]
HEIGHT = 800


def opened(browser: Browser, file: Path, width: int, scheme: str = "light") -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(file.resolve().as_uri())
    if page.locator("#text").count():
        page.wait_for_selector("html[data-ready]", state="attached")
    return page


def shot(page: Page) -> Image.Image:
    """What is on the screen."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def saved(image: Image.Image, name: str) -> None:
    file = DOCS / name
    if name.endswith(".png"):
        image.quantize(256).save(file, optimize=True)
    else:
        image.save(file, quality=85, method=6)
    print(f"{file}: {image.width} x {image.height}, {file.stat().st_size:,} bytes")


def scrolled(page: Page, selector: str, room: int = 15) -> Page:
    """The page with the element ``room`` pixels below the upper edge, and no pointer on it."""
    page.mouse.move(0, 0)
    page.evaluate(
        "([name, room]) => scrollTo(0, document.querySelector(name).getBoundingClientRect().top + scrollY - room)",
        [selector, room],
    )
    page.wait_for_timeout(500)
    return page


def of_run(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 1000)
    box = page.locator("#curves .charts").bounding_box()
    assert box is not None
    page.set_viewport_size({"width": 1000, "height": round(box["height"]) + 40})
    saved(shot(scrolled(page, "#curves .charts", 20)), "report.png")


def of_cache(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 1280)
    page.fill("#query", "construction")
    page.click("#next")
    page.wait_for_selector("#hits:not(:empty)")
    saved(shot(scrolled(page, ".tools")), "report-tokens.webp")
    phone = opened(browser, file, 390, "dark")
    phone.fill("#query", "construction")
    phone.click("#next")
    phone.wait_for_selector("#hits:not(:empty)")
    both = Image.new("RGB", (1280, HEIGHT))
    both.paste(shot(scrolled(phone, "#reading")), (0, 0))
    both.paste(shot(scrolled(opened(browser, file, 890), "#distributions h2")), (390, 0))
    saved(both, "report-phone.webp")


def of_student(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 1280)
    page.select_option("#metric", "kl")
    page.locator('.t[data-i="12"]').click()
    saved(shot(scrolled(page, "#tokens h2")), "report-student.webp")


def of_comparison(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 1000)
    page.set_viewport_size({"width": 1000, "height": 1560})
    saved(shot(page), "compare.webp")


def of_rounds(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 1280)
    saved(shot(scrolled(page, "#curves h2")), "rounds.webp")
    saved(shot(scrolled(page, "#time h2")), "rounds-time.webp")


KINDS: dict[str, Callable[[Browser, Path], None]] = {
    "run": of_run,
    "tokens": of_cache,
    "student": of_student,
    "compare": of_comparison,
    "rounds": of_rounds,
}


def main() -> None:
    """Makes the pictures of the pages that are named."""
    pages = [each.partition("=") for each in sys.argv[1:]]
    if not pages or not {name for name, _, _ in pages} <= KINDS.keys():
        sys.exit(f"usage: pictures.py NAME=FILE ...; names are {', '.join(KINDS)}")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else []
        )
        for name, _, file in pages:
            KINDS[name](browser, Path(file))
        browser.close()


if __name__ == "__main__":
    main()
