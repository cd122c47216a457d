"""Pages in a browser: weight, first paint and Lighthouse's scores of reports and of the site; the
token view of a large cache.

    python benchmarks/pages.py run=runs/quickstart/report.html site=build/docs
    python benchmarks/pages.py --view 1000000

A page is an HTML file, or the folder of a site, whose index.html is opened. Results are merged into
--out, so that each command can be run alone; the tables of docs/report.md are printed.

First paint is of the file itself, as people open it, the median of five; "phone" has a screen of
390 pixels and a processor of a quarter of the speed. Lighthouse reads the page from a server on this
machine and adds the network that its presets assume (desktop: 10 Mbit/s, 40 ms; mobile: 1.6 Mbit/s,
150 ms, a quarter of the speed). It is installed by npm in a temporary folder.

--view: the page of a synthetic cache of so many tokens, in sequences of up to 10,000. Scrolling is
a gesture of 3,600 pixels a second over a sequence of 10,000 tokens; its frames are counted in the
browser's trace. It needs Chromium, and node and npm for Lighthouse.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from machine import machine
from playwright.sync_api import Browser, Page, sync_playwright

from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig

LIGHTHOUSE = "lighthouse@12.8.2"
"""The newest that runs on node 20."""

PRESETS = ("desktop", "mobile")
CATEGORIES = ("performance", "accessibility", "best-practices")
SCREENS = {"desktop": (1350, 1), "phone": (390, 4)}
"""Width in pixels, and by how much the processor is slowed down."""

LOADS = 5
QUERIES = ("the", "module", "return value", "zzzz", "\\n")
SPEED = 3600
"""Pixels a second of the gesture."""

_TRACED = ["benchmark", "cc", "disabled-by-default-devtools.timeline"]

_REPORT = """
import atexit, re, sys
from pathlib import Path
from logitcask.pipeline.cli import main

def tell(file=Path(sys.argv.pop(1))):
    file.write_text(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

atexit.register(tell)
main()
"""
"""The command, which writes its peak memory in kB to the file of its first argument."""

_PAINT = """() => new Promise((done) => {
  const found = performance.getEntriesByName("first-contentful-paint")[0];
  if (found) done(found.startTime);
  else new PerformanceObserver((list, self) => {
    const paint = list.getEntriesByName("first-contentful-paint")[0];
    if (paint) { self.disconnect(); done(paint.startTime); }
  }).observe({ type: "paint", buffered: true });
})"""


def chromium() -> str:
    """The browser's path. Exits if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    sys.exit("no Chromium is installed (Debian: apt-get install chromium)")


def flags() -> list[str]:
    """Chromium's sandbox does not run as root."""
    return ["--no-sandbox"] if os.geteuid() == 0 else []


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium(), args=flags(), timeout=300_000)
        yield opened
        opened.close()


@contextmanager
def opened(started: Browser, width: int, slower: int = 1) -> Iterator[Page]:
    """An empty page of a fresh context."""
    context = started.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(300_000)
    page = context.new_page()
    if slower > 1:
        context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
    yield page
    context.close()


def first_paint(started: Browser, file: Path) -> dict[str, float]:
    """Milliseconds to the first contentful paint of a file, by screen."""
    found = {}
    for screen, (width, slower) in SCREENS.items():
        times = []
        for _ in range(LOADS):
            with opened(started, width, slower) as page:
                page.goto(file.as_uri())
                times.append(page.evaluate(_PAINT))
        found[screen] = round(statistics.median(times))
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of ``folder``."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def install_lighthouse(folder: Path) -> Path:
    """Lighthouse's command in ``folder``."""
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run([*command, LIGHTHOUSE], check=True, stdout=subprocess.DEVNULL)
    return folder / "node_modules" / "lighthouse" / "cli" / "index.js"


def lighthouse(command: Path, url: str, preset: str) -> dict[str, Any]:
    """Scores of 100, bytes, first paint, and the audits that failed."""
    chosen = [] if preset == "mobile" else [f"--preset={preset}"]
    run = functools.partial(
        subprocess.run,
        [
            *("node", str(command), url, "--output=json", "--quiet", *chosen),
            f"--only-categories={','.join(CATEGORIES)}",
            f"--chrome-flags={' '.join(['--headless=new', *flags()])}",
        ],
        env={**os.environ, "CHROME_PATH": chromium()},
        stdout=subprocess.PIPE,
    )
    ended = run()
    if ended.returncode:  # on a busy machine it sometimes loses the browser
        ended = run(check=True)
    report = json.loads(ended.stdout)
    audits = report["audits"]
    observed = audits["metrics"]["details"]["items"][0]["observedFirstContentfulPaint"]
    scores = {name: report["categories"][name]["score"] for name in CATEGORIES}
    failed = sorted(
        ref["id"]
        for name in ("accessibility", "best-practices")
        for ref in report["categories"][name]["auditRefs"]
        if audits[ref["id"]]["score"] is not None and audits[ref["id"]]["score"] < 0.9
    )
    return {
        "scores": {name: round(100 * score) for name, score in scores.items() if score is not None},
        "bytes": round(audits["total-byte-weight"]["numericValue"]),
        "first_paint_ms": round(audits["first-contentful-paint"]["numericValue"]),
        "observed_first_paint_ms": round(observed),
        "failed": failed,
    }


def measure_pages(pages: dict[str, Path]) -> dict[str, Any]:
    """Figures of each page by its name."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="logitcask-") as folder:
        command = install_lighthouse(Path(folder))
        for name, path in pages.items():
            file = path / "index.html" if path.is_dir() else path
            with browser() as started:
                paint = first_paint(started, file.resolve())
            with served(file.parent) as address:
                marks = {
                    preset: lighthouse(command, f"{address}/{file.name}", preset)
                    for preset in PRESETS
                }
            found[name] = {"bytes": file.stat().st_size, "first_paint_ms": paint} | {
                "lighthouse": marks
            }
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def pages_table(found: dict[str, Any]) -> str:
    """Figures of pages in Markdown."""
    lines = [
        "| page | bytes | first paint, desktop and phone | accessibility | best practices "
        "| performance, desktop and mobile |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in found.items():
        paint, marks = each["first_paint_ms"], each["lighthouse"]
        size = each["bytes"] if marks["desktop"]["bytes"] < 1.2 * each["bytes"] + 2000 else marks["desktop"]["bytes"]  # fmt: skip
        score = {
            category: [marks[preset]["scores"][category] for preset in PRESETS]
            for category in CATEGORIES
        }
        cells = [
            name,
            f"{size / 1000:,.0f} kB",
            f"{paint['desktop'] / 1000:.2f} and {paint['phone'] / 1000:.2f} s",
            *(str(min(score[category])) for category in ("accessibility", "best-practices")),
            " and ".join(map(str, score["performance"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def synthetic_cache(folder: Path, tokens: int) -> Path:
    """A cache of ``tokens`` tokens of Python's documentation, again and again, in sequences of at
    most 10,000.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    length = 9_999  # a byte is a token; BOS is one more
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        at = left = 0
        for left in range(tokens, 0, -length - 1):
            at = at % (len(text) - length)
            row = text[at : at + min(length, left)].encode("ascii", "replace").decode()
            file.write(json.dumps({"text": row}) + "\n")
            at += length
    build(
        BuildConfig.model_validate(
            {
                "teacher": {"model": "synthetic", "backend": "synthetic"},
                "data": {"path": str(rows), "max_length": 10_000},
                "audit": {"sequences": 0},
                "log": False,
                "output": str(folder / "cache"),
            }
        )
    )
    return folder / "cache"


def write_page(cache: Path, out: Path, tokens: int) -> dict[str, Any]:
    """The report of a cache by the command in a process of its own: bytes, and peak memory."""
    peak = out.with_suffix(".peak")
    command = [sys.executable, "-c", _REPORT, str(peak), "report", str(cache), "--out", str(out)]
    subprocess.run(
        [*command, "--tokens", str(tokens), "--quiet", "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {"bytes": out.stat().st_size, "peak_mb": round(int(peak.read_text()) / 1024)}


def measure_view(tokens: int) -> dict[str, Any]:
    """The page of a cache of ``tokens`` tokens: memory of its writing, times to open and to search
    it, and the frames of scrolling.
    """
    with tempfile.TemporaryDirectory(prefix="logitcask-") as name:
        folder = Path(name)
        cache, page = synthetic_cache(folder, tokens), folder / "page.html"
        found: dict[str, Any] = {
            "tokens": tokens,
            "page": write_page(cache, page, 2 * tokens),
            "page_of_a_tenth": write_page(cache, folder / "tenth.html", tokens // 10),
        }
        with browser() as started:
            times = [_opening(started, page) for _ in range(LOADS)]
            found["opening_ms"] = {
                name: round(statistics.median(each[name] for each in times)) for name in times[0]
            }
            found["search_ms"] = _searches(started, page)
            found["scrolling"] = _scrolling(started, page)
    return found


def _opening(started: Browser, file: Path) -> dict[str, float]:
    """Milliseconds to the first paint, to the first tokens, and until all can be searched."""
    with opened(started, 1350) as page:
        page.add_init_script(
            """new MutationObserver((_, self) => {
              if (document.querySelector(".t")) { window.tokensAt ??= performance.now(); }
              if (document.documentElement.dataset.ready) { window.readyAt = performance.now(); self.disconnect(); }
            }).observe(document, { childList: true, subtree: true, attributes: true });"""
        )
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return {
            "first_paint": page.evaluate(_PAINT),
            "tokens": page.evaluate("window.tokensAt"),
            "ready": page.evaluate("window.readyAt"),
        }


def _searches(started: Browser, file: Path) -> dict[str, float]:
    """Milliseconds from the press of the button to the answer, by query."""
    found = {}
    with opened(started, 1350) as page:
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        for query in QUERIES:
            page.fill("#query", query)
            found[query] = page.evaluate(
                """() => new Promise((done) => {
                  const hits = document.getElementById("hits"), begin = performance.now();
                  hits.textContent = "";
                  new MutationObserver((_, self) => { self.disconnect(); done(performance.now() - begin); })
                    .observe(hits, { childList: true });
                  document.getElementById("next").click();
                })"""
            )
    return {query: round(value, 1) for query, value in found.items()}


def _scrolling(started: Browser, file: Path) -> dict[str, Any]:
    """Frames of a gesture over the longest text, and over the same text as plain lines, whose
    dropped frames are those of the machine.
    """
    found = {}
    for plain in (False, True):
        with opened(started, 1350) as page:
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            page.select_option("#sort", "longest")
            page.locator("#sequences button").first.click()
            page.wait_for_selector(".t")
            page.evaluate(
                """(plain) => {
                  const pane = document.getElementById("text");
                  pane.scrollIntoView({ block: "center" });
                  if (!plain) return;
                  const height = pane.scrollHeight, copy = pane.cloneNode(false);
                  copy.removeAttribute("id");
                  copy.style.cssText = "height: 38rem; overflow-y: auto; white-space: pre-wrap";
                  copy.textContent = (pane.textContent + "\\n").repeat(9);
                  pane.replaceWith(copy);
                  copy.id = "text";
                }""",
                plain,
            )
            found["plain" if plain else "view"] = _gesture(started, page)
    return found


def _gesture(started: Browser, page: Page) -> dict[str, Any]:
    box = page.locator("#text").bounding_box()
    assert box is not None
    room = "(() => { const pane = document.getElementById('text'); return pane.scrollHeight - pane.clientHeight; })()"
    session = page.context.new_cdp_session(page)
    started.start_tracing(page=page, categories=_TRACED)
    session.send(
        "Input.synthesizeScrollGesture",
        {
            "x": box["x"] + 100,
            "y": box["y"] + 200,
            "yDistance": -min(5 * SPEED, page.evaluate(room)),
            "speed": SPEED,
            "gestureSourceType": "mouse",
        },
    )
    events = json.loads(started.stop_tracing())["traceEvents"]
    scrolled = page.evaluate("document.getElementById('text').scrollTop")
    return {"scrolled_px": round(scrolled)} | frames_of(events)


def frames_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Frames by their state, and the longest task of a page's main thread, in ms."""
    states: Counter[str] = Counter()
    for event in events:
        frame = event.get("args", {}).get("frame_reporter")
        if event["name"] == "PipelineReporter" and frame:
            states[frame["state"].removeprefix("STATE_").lower()] += 1
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = [
        event["dur"] / 1000
        for event in events
        if event["name"] == "RunTask" and (event["pid"], event["tid"]) in main
    ]
    return {"frames": dict(states), "longest_task_ms": round(max(tasks, default=0.0), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="NAME=PATH")
    parser.add_argument("--view", type=int, metavar="TOKENS", help="measure the token view")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "pages.json"
    )
    options = parser.parse_args()
    pages = {name: Path(path) for name, _, path in (each.partition("=") for each in options.pages)}
    if missing := [str(path) for path in pages.values() if not path.exists()]:
        parser.error(f"no such page: {', '.join(missing)}")
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result["machine"] = machine() | {
        "chromium": subprocess.check_output([chromium(), "--version"], text=True).split()[1]
    }
    if options.view:
        result["view"] = measure_view(options.view)
        print(json.dumps(result["view"], indent=1))
    if pages:
        result["pages"] = result.get("pages", {}) | measure_pages(pages)
        result["lighthouse"] = LIGHTHOUSE.partition("@")[2]
        print(pages_table(result["pages"]))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
