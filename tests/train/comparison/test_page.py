"""The page of a comparison: its numbers, hostile names, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.train.comparison.compare import compare
from logitcask.train.comparison.page import write_comparison
from logitcask.train.comparison.runs import read_runs
from logitcask.train.evaluation.figures import Bootstrap

EVIL = "</style><script>alert(1)<\u2215script>{{ 7 * 7 }}\u202e\x1b[31m"


@pytest.fixture
def page(tmp_path):
    """``page(folders, base)``: the HTML of their comparison, and the comparison."""

    def write(folders, base=0):
        runs = read_runs([*map(str, folders)])
        found = compare(runs, base, Bootstrap(0, 200))
        write_comparison(tmp_path / "page.html", runs, found)
        return (tmp_path / "page.html").read_text(), found

    return write


def cells(html):
    """Rows of cells, each the text of its parts."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    return [
        [" ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]  # fmt: skip


def figure(html, title):
    found = [each for each in re.findall(r'<figure class="chart">.*?</figure>', html, re.DOTALL) if f"<figcaption>{title} <" in each]  # fmt: skip
    return cells(found[0])


def section(html, name):
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)[0]


def written(value, unit):
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3f}{unit}"


def test_the_numbers_are_those_of_the_files(page, make_run):
    folders = [make_run("a"), make_run("b", level=0.5), make_run("old", old=True, seconds=99.25)]
    html, found = page(folders, base=1)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    rows = {row[0]: row[1:] for row in cells(section(html, "metrics"))}
    assert rows["metric"] == ["a", "b base", "old"]
    units = {"KL to the teacher estimate; less is better": ("kl", " nats"), "Reverse KL lower bound; less is better": ("reverse_kl", " nats"),
             "Cross-entropy on the text exact; less is better": ("ce", " nats"), "Perplexity exact; less is better": ("perplexity", ""),
             "Top-1 agreement exact; more is better": ("top1_agreement", "%"), "Overlap of both top-5 (MOR@5) exact; more is better": ("mor@5", "%"),
             "Identical top-5 (CR@5) exact; more is better": ("cr@5", "%"), "Rank correlation over both top-5 approximation; more is better": ("spearman@5", ""),
             "Calibration error (ECE) exact; less is better": ("ece", "%")}  # fmt: skip
    for title, (name, unit) in units.items():
        values = [each["after"][name] for each in metrics]
        best = (min if "less" in title else max)(values)
        for number, value in enumerate(values):
            interval = found["runs"][number]["metrics"][name]
            text = "best " * (value == best) + written(value, unit)
            if interval["low"] is not None:
                text += f" {written(interval['low'], unit.strip('nats '))} to {written(interval['high'], unit.strip('nats '))}"
            assert rows[title][number] == text
    assert rows["Training seconds"] == ["12.5 s", "12.5 s", "99.2 s"]
    assert rows["Cache bytes per token"] == ["40.5"] * 3
    assert rows["Cache bytes in all"] == [f"{round(4321 * 40.5):,}"] * 3
    assert rows["Student parameters"] == ["1,234,567"] * 3

    (first, old) = figure(section(html, "differences"), "KL to the teacher")
    difference = found["runs"][0]["difference"]["kl"]
    assert first[0] == "a"
    assert first[1] == f"{difference['low']:+.4f} to {difference['high']:+.4f}: worse"
    assert first[2] == f"{metrics[0]['after']['kl'] - metrics[1]['after']['kl']:+.4f} nats"
    assert old[1:] == ["no interval", f"{metrics[2]['after']['kl'] - metrics[1]['after']['kl']:+.4f} nats"]  # fmt: skip
    share = figure(section(html, "differences"), r"Overlap of both top-5 (MOR@5)")[0]
    apart = metrics[0]["after"]["mor@5"] - metrics[1]["after"]["mor@5"]
    assert share[2] == f"{100 * apart:+.2f} points"


def test_the_curves_are_those_of_the_logs(page, make_run):
    folders = [make_run("a"), make_run("b", level=0.5)]
    html, _ = page(folders)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    header, *rows = figure(html, "KL to the teacher against time")
    assert header == ["seconds of training", "a", "b"]
    # Step 4 has no training record, so its time is not known; the run took 12.5 seconds.
    assert rows == [
        ["0", *(f"{m['before']['kl']:.3g}" for m in metrics)],
        ["6", "1.75", "1.75"],
        ["12.5", *(f"{m['after']['kl']:.3g}" for m in metrics)],
    ]
    curve = figure(section(html, "curves"), "KL to the teacher")
    assert [row[0] for row in curve[1:]] == ["0", "3", "4", "6"]
    assert figure(html, "Training loss: forward_kl")[1:] == [
        [str(step), f"{1 + 0.5 / step:.3g}", f"{0.5 + 0.5 / step:.3g}"] for step in (1, 2, 3)
    ]
    assert figure(html, "Learning rate")[1:] == [[str(s), *[f"{1e-3 / s:.3g}"] * 2] for s in (1, 2, 3)]  # fmt: skip


def test_spans_are_where_their_numbers_are(page, make_run):
    html, found = page([make_run("a"), make_run("b", level=0.5), make_run("c", level=0.7)])
    differences = [each["difference"]["kl"] for each in found["runs"][1:]]
    low = min(0, *(each["low"] for each in differences))
    high = max(0, *(each["high"] for each in differences))
    room = 0.04 * (high - low)
    chart = re.search(r"<figcaption>KL to the teacher <.*?</figure>", section(html, "differences"), re.DOTALL)[0]  # fmt: skip
    zeros = re.findall(r'class="zero" style="left:([\d.]+)%', chart)
    spans = re.findall(r'class="span" style="left:([\d.]+)%;width:([\d.]+)%', chart)

    def place(value):
        return 100 * (value - low + room) / (high - low + 2 * room)

    assert [float(each) for each in zeros] == pytest.approx([place(0)] * 2, abs=0.006)
    for (left, width), each in zip(spans, differences, strict=True):
        assert float(left) == pytest.approx(place(each["low"]), abs=0.006)
        assert float(left) + float(width) == pytest.approx(place(each["high"]), abs=0.02)


def test_quality_against_costs(page, make_run):
    """Points with the intervals of the table, of costs that differ."""
    cache = {"path": "c", "fingerprint": "d" * 64, "source": "s", "tokens": 10}
    folders = [
        make_run("a"),
        make_run("b", level=0.5, cache={**cache, "bytes_per_token": 13.25}),
        make_run("c", reference="q" * 64, seconds=99.0),
    ]
    html, found = page(folders)
    metrics = section(html, "metrics")
    for name, title in (("kl", "KL to the teacher"), ("ce", "Cross-entropy on the text")):
        header, *rows = figure(metrics, f"{title} against bytes")
        assert header == ["run", "bytes per token of the cache", "nats", "interval"]
        expected = []
        for label, size, run in zip("ab", ("40.5", "13.2"), found["runs"][:2], strict=True):
            each = run["metrics"][name]
            interval = f"{each['low']:.3g} to {each['high']:.3g}"
            expected.append([label, size, f"{each['mean']:.3g}", interval])
        assert rows == expected
    # One run alone has nothing beside it, and equal costs tell nothing.
    assert "(text 2)" not in metrics
    assert "against training time" not in metrics
    html, _ = page([make_run("d", seconds=5.0), make_run("e", seconds=7.0)])
    assert figure(html, "KL to the teacher against training time")[1][:2] == ["d", "5"]
    assert "against bytes" not in html


def test_long_curves_are_thinned(page, make_run):
    log = [{"step": step, "loss": 1.0, "loss_forward_kl": step / 7, "learning_rate": 1.0} for step in range(1, 5001)]  # fmt: skip
    html, _ = page([make_run("a", log=log), make_run("b", log=log)])
    _, *rows = figure(html, "Training loss: forward_kl")
    assert 200 < len(rows) <= 401
    assert rows[-1] == ["5,000", "714", "714"]
    assert len(html) < 300_000


def test_text_of_others_is_told_apart(page, make_run):
    html, found = page([make_run("a"), make_run("b"), make_run("c", reference="q" * 64)])
    assert unescape(re.search(r'<div class="notes" role="note"><p>(.*?)</p>', html)[1]) == found["notes"][0]  # fmt: skip
    assert section(html, "metrics").count("<table") == 2
    assert [row[0] for row in figure(section(html, "differences"), "KL to the teacher")] == ["b"]
    heads = re.findall(r"<figcaption>KL to the teacher(?: \(text 2\))? <.*?</figure>", section(html, "curves"), re.DOTALL)  # fmt: skip
    assert [cells(each)[0] for each in heads] == [["step", "a", "b"], ["step", "c"]]
    assert ["(text 2)" in each for each in heads] == [False, True]
    # A run has one style in all charts.
    assert 'class="line s2"' in heads[1]


def test_hostile_names_stay_text(page, make_run):
    """Of folders, caches, losses, fields and values."""
    folder = make_run(EVIL, config={"training.seed": 5})
    for name in ("metrics", "run"):
        content = json.loads((folder / f"{name}.json").read_text())
        content["config"]["training"][EVIL] = EVIL
        if name == "metrics":
            content |= {"losses": [[EVIL, "1"]], "created_by": EVIL}
            content["cache"]["path"] = content["reference"]["path"] = EVIL
            content["teacher"]["model"] = EVIL
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "log.json").write_text(json.dumps([{"step": 1, "loss": 1.0, f"loss_{EVIL}": 1.0, "learning_rate": math.nan}]))  # fmt: skip
    other = make_run("other", log=[{"step": 1, "loss": 1.0, f"loss_{EVIL}": 2.0}])
    html, _ = page([other, folder])
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert html.count("{{ 7 * 7 }}") > 10
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "script-src &#39;none&#39;" in html


def test_files_of_others_are_never_replaced(page, make_run, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match="is not a report of logitcask"):
        page([make_run("a"), make_run("b")])
    assert (tmp_path / "page.html").read_text() == "mine"


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1000, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(chromium, page, make_run, tmp_path, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    names = ["a", "b" * 60, "c d", EVIL]
    page([*map(make_run, names), make_run("z", reference="q" * 64)])
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(300_000)
    opened, wrong, requests = context.new_page(), [], []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(f"file://{tmp_path}/page.html")
    for each in opened.locator("details.values summary").all():
        each.click()
    found = axe.Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    # Tables that are wider than the page scroll by the keyboard.
    region = opened.locator("#metrics .scroll").first
    region.focus()
    room = region.evaluate("each => each.scrollWidth - each.clientWidth")
    if room > 40:
        opened.keyboard.press("ArrowRight")
        opened.wait_for_function("() => document.activeElement.scrollLeft > 0")
    assert (room > 40) == (width == 390) or width == 1000
    assert (wrong, len(requests)) == ([], 1)
    context.close()
