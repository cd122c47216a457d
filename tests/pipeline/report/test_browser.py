"""The report in a browser: keys, pointer, search, hostile text, accessibility, and no network.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from logitcask.pipeline.report.write import ReportOptions, write_report

WIDTHS = (390, 1000, 1600)
_PATIENCE = 300_000
"""Milliseconds that a busy machine may take."""

ARABIC = ["م", "ر", "ح", "ب", "ا"]
HOSTILE = [
    "<|start|>",
    "<script>document.title = 'run'</script>",
    "</script><img src=x onerror=\"document.title = 'run'\">",
    "<!--",
    "-->]]><![CDATA[",
    "{{ 7 * 7 }}{% raw %}",
    "\x00\x1b[31m\x07",
    "\u202egnirts",
    "\u200b\ufeff",
    "e\u0301",
    "\u0301",
    "👩\u200d💻",
    b"\xf0",
    b"\x9f",
    b"\x98",
    b"\x80",
    b"\xff",
    "\t",
    "\r\n",
    "    ",
    "\u00a0",
    "x" * 1_000_000,
    "&lt;b&gt;",
    "javascript:alert(1)",
    "",
    *ARABIC,
]


class Opened:
    """A page of a browser, and what went wrong in it: console errors, requests, dialogs."""

    def __init__(self, chromium, out, width=1000, scheme="light", **options):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        context.set_default_timeout(_PATIENCE)
        self.page, self.wrong = context.new_page(), []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.requests = []
        self.page.goto(f"file://{out}")
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def wait_for(self, condition):
        """Waits for a condition in JavaScript. As a function, since the page's policy lets no text
        be evaluated, and a condition that does not hold at once is evaluated again in the page.
        """
        self.page.wait_for_function(f"() => {condition}")

    def texts(self):
        """Of the tokens that are drawn."""
        return self.page.eval_on_selector_all(".t", "all => all.map((each) => each.textContent)")

    def chosen(self):
        """The number of the chosen token."""
        return int(self.page.locator('.t[aria-selected="true"]').get_attribute("data-i"))

    def facts(self):
        """The facts on the token that is described."""
        pairs = self.page.eval_on_selector(
            "#details dl",
            "list => [...list.querySelectorAll('dt')].map((each) => [each.textContent, each.nextSibling.textContent])",
        )
        return dict(pairs)

    def bars(self):
        """Rows of the head: label, percent, class."""
        return self.page.eval_on_selector_all(
            "#details tr",
            "rows => rows.map((row) => [row.querySelector('bdi').textContent, row.querySelector('.n').textContent, row.className])",
        )


@pytest.fixture
def opened(chromium, tmp_path):
    """``opened(reader, tokenizer, **options of the context)``: the report on a cache, opened; at the
    end nothing was wrong, and only the file was requested.
    """
    pages = []

    def open_it(reader, tokenizer=None, options=ReportOptions(), **context):  # noqa: B008
        out = tmp_path / "report.html"
        write_report(reader, out, options, tokenizer)
        pages.append(Opened(chromium, out, **context))
        return pages[-1]

    yield open_it
    for each in pages:
        assert each.wrong == []
        assert [url for url in each.requests if not url.startswith("file:")] == []
        assert len(each.requests) == 1
        each.page.context.close()


def number(text):
    """The number at the beginning of a text such as ``0.012 %`` or ``1,234 nats``."""
    return float(re.match(r"[\d.,e+-]+", text)[0].replace(",", ""))


def test_the_distribution_of_a_token_is_that_of_the_cache(opened, reader, tokenizer, rng):
    view = opened(reader, tokenizer)
    view.page.locator("#sequences button").nth(5).click()
    sequence = reader[5]
    assert view.page.locator("#reading").text_content() == sequence.sequence_id
    row_of = {int(position) + 1: row for row, position in enumerate(sequence.positions)}
    row = next(row for row in range(len(sequence.positions)) if sequence.target_rank[row] < 8)
    for at, i in (
        (row, int(sequence.positions[row]) + 1),
        *[(r, p) for p, r in row_of.items()][:6],
    ):
        view.page.locator(f'.t[data-i="{i}"]').click()
        facts = view.facts()
        assert number(facts["surprise"]) == pytest.approx(-sequence.target_logprob[at], abs=6e-4)
        assert number(facts["entropy"]) == pytest.approx(sequence.entropy[at], abs=6e-4)
        assert number(facts["probability"]) == pytest.approx(
            100 * math.exp(sequence.target_logprob[at]), rel=6e-2
        )
        assert number(facts["rank"]) == sequence.target_rank[at]
        bars = view.bars()
        stored = [
            (t, p)
            for t, p in zip(sequence.ids[at].tolist(), np.exp(sequence.logprobs[at]), strict=True)
            if t >= 0
        ]
        for (label, shown, _), (token, p) in zip(bars, stored, strict=False):
            assert number(shown) == pytest.approx(100 * p, rel=6e-2)
            text = tokenizer.texts[token]
            if isinstance(text, str):
                assert label == text.replace(" ", "·").replace("\n", "\\n")
        (next_label,) = [label for label, _, kind in bars if kind == "target"]
        assert next_label == view.page.locator("#details h4").text_content()
        listed = sequence.target_rank[at] < len(stored)
        assert len(bars) == len(stored) + 1 + (not listed)
        assert number(bars[-1][1]) == pytest.approx(
            100 * math.exp(sequence.tail_logprob[at]), rel=6e-2
        )
        assert bars[-1][0] == f"all {40 - len(stored)} others"
        assert view.page.locator("#details .draws li").count() == len(
            set(sequence.samples.ids[at].ravel().tolist())
        )
    unkept = next(i for i in range(1, len(sequence)) if i not in row_of)
    view.page.locator(f'.t[data-i="{unkept}"]').click()
    assert view.facts()["teacher"].startswith("outside the loss mask")
    assert "masked" in view.page.locator(f'.t[data-i="{unkept}"]').get_attribute("class")


def test_colours(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    at = max(range(len(reader)), key=lambda index: len(reader[index]))
    view.page.evaluate(f"location.hash = '#sequence-{at}'")
    sequence = reader[at]
    view.wait_for(f"document.querySelector('#reading').textContent === {sequence.sequence_id!r}")
    for metric, values, bounds in (
        ("loss", -sequence.target_logprob, [0.1, 0.5, 1, 2, 3, 5, 7, 10]),
        ("entropy", sequence.entropy, [0.1, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("rank", sequence.target_rank, [1, 2, 5, 10, 32, 100, 1000, 10000]),
        ("tail", np.exp(sequence.tail_logprob), [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7]),
    ):
        view.page.select_option("#metric", metric)
        classes = view.page.eval_on_selector_all(".t", "all => all.map((each) => each.className)")
        for position, level in zip(sequence.positions, np.digitize(values, bounds), strict=True):
            assert classes[position + 1].split()[:3] == ["t", "heat", f"h{level}"], metric
        assert sum("masked" in each for each in classes) == len(sequence) - len(sequence.positions)


def test_keys(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    at = max(range(len(reader)), key=lambda index: len(reader[index]))
    view.page.evaluate(f"location.hash = '#sequence-{at}-token-4'")
    view.wait_for("document.querySelector('.t[aria-selected=\"true\"]')?.dataset.i === '4'")
    view.page.locator('.t[aria-selected="true"]').focus()
    view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("ArrowRight")
    assert view.chosen() == 6
    view.page.keyboard.press("ArrowLeft")
    assert view.chosen() == 5
    assert view.page.locator("#said").text_content().startswith("token 5, ")
    place = "[...document.querySelectorAll('.t')].find((each) => each.ariaSelected === 'true').getBoundingClientRect().top"
    before = view.page.evaluate(place)
    view.page.keyboard.press("ArrowDown")
    assert view.page.evaluate(place) > before
    view.page.keyboard.press("ArrowUp")
    assert view.page.evaluate(place) == before
    view.page.keyboard.press("End")
    assert view.chosen() == len(reader[at]) - 1
    view.page.keyboard.press("Home")
    assert view.chosen() == 0
    assert view.page.evaluate("document.activeElement.dataset.i") == "0"


def test_pointing_shows_and_leaving_goes_back(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    view.page.locator('.t[data-i="1"]').click()
    first = view.facts()["token"]
    view.page.locator('.t[data-i="0"]').hover()
    assert view.facts()["token"] != first
    view.page.locator("#filter").hover()
    assert view.facts()["token"] == first
    assert view.chosen() == 1


def test_text_from_right_to_left(opened, make_reader):
    """Signs of a template do not count; the left arrow leads to the next token."""
    texts = ["<s>", "[INST]", "שלום", " עולם", "\n", "a"]
    view = opened(*make_reader(texts, {"a": [0, 1, 2, 3, 4, 5, 3], "b": [0, 5, 2, 3]}))
    direction = "getComputedStyle(document.querySelector('.block')).direction"
    assert view.page.evaluate(direction) == "rtl"
    view.page.locator('.t[data-i="2"]').click()
    view.page.keyboard.press("ArrowLeft")
    assert view.chosen() == 3
    place = "(i) => document.querySelector(`.t[data-i='${i}']`).getBoundingClientRect().left"
    assert view.page.evaluate(place, 3) < view.page.evaluate(place, 2)
    view.page.locator("#sequences button").nth(1).click()
    view.wait_for("document.querySelector('#reading').textContent === 'b'")
    assert view.page.evaluate(direction) == "ltr"


def test_text_below_a_still_pointer_is_not_pointed_at(opened, reader, tokenizer):
    """A search scrolls the text below the mouse, which browsers tell as pointerover."""
    view = opened(reader, tokenizer)
    view.page.locator('.t[data-i="1"]').click()
    chosen = view.facts()["token"]
    view.page.locator("#filter").hover()
    tell = "(each, kind) => each.dispatchEvent(new PointerEvent(kind, { bubbles: true, pointerType: 'mouse' }))"
    view.page.locator('.t[data-i="0"]').evaluate(tell, "pointerover")
    assert view.facts()["token"] == chosen
    view.page.locator('.t[data-i="0"]').evaluate(tell, "pointermove")
    assert view.facts()["token"] != chosen


def test_tapping(opened, reader, tokenizer):
    view = opened(reader, tokenizer, width=390, has_touch=True)
    view.page.locator('.t[data-i="1"]').tap()
    assert view.facts()["token"].startswith("1, id ")


def test_search(opened, make_reader):
    texts = ["<s>", "The", " Cat", " sat", "\n", b"\xe4", b"\xb8", b"\xad", "İx"]
    rows = {"a": [0, 1, 2, 3, 4, 2], "b": [0, 5, 6, 7, 1, 2, 3], "c": [0, 8, 2]}
    view = opened(*make_reader(texts, rows))

    def find(query, button="next"):
        view.page.fill("#query", query)
        view.page.click(f"#{button}")
        view.wait_for("document.getElementById('hits').textContent !== ''")
        return view.page.locator("#hits").text_content()

    assert find("cat sat") == "1 of 2"
    assert view.page.locator("#reading").text_content() == "a"
    assert view.chosen() == 2
    assert view.page.eval_on_selector_all(
        ".t.hit", "all => all.map((each) => each.textContent)"
    ) == [" Cat", " sat"]
    view.page.click("#next")
    view.wait_for("document.getElementById('reading').textContent === 'b'")
    assert view.chosen() == 5
    assert view.page.locator("#hits").text_content() == "2 of 2"
    view.page.click("#next")
    view.wait_for("document.getElementById('reading').textContent === 'a'")
    view.page.click("#previous")
    view.wait_for("document.getElementById('hits').textContent === '2 of 2'")
    assert find("#2") == "1 of 4"
    assert find("中") == "1 of 1"
    assert view.chosen() == 3
    assert find("sat\\n cat") == "1 of 1"
    assert find("x cat") == "1 of 1"
    assert view.page.locator("#reading").text_content() == "c"
    assert view.chosen() == 1
    assert find("catthe") == "not found"
    # Texts of neighbours in the cache do not run together.
    assert find("cat<s>") == "not found"


_HELD_BACK = """
const whole = Response.prototype.arrayBuffer;
let left = 3;  // the index, and both halves of the first chunk
Response.prototype.arrayBuffer = async function () {
  const found = await whole.call(this);
  if (--left < 0) await (window.released ??= new Promise((resolve) => { window.release = resolve; }));
  return found;
};
"""


def test_text_is_shown_before_all_is_opened_and_a_search_waits_for_that(
    chromium, make_reader, tmp_path
):
    texts = ["<s>", " common", " rare"]
    rows = {"a": [0, *[1] * 9000], "b": [0, 1, 2]}
    reader, tokenizer = make_reader(texts, rows, max_length=10_000)
    write_report(reader, tmp_path / "report.html", ReportOptions(), tokenizer)
    page = chromium.new_context().new_page()
    page.set_default_timeout(_PATIENCE)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(_HELD_BACK)
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.wait_for_selector('.t[data-i="1"]')
    page.fill("#query", "rare")
    page.click("#next")
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
    assert page.locator("#hits").text_content() == ""
    assert page.locator("html[data-ready]").count() == 0
    page.evaluate("window.release()")
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_selector("#hits:not(:empty)")
    assert page.locator("#hits").text_content() == "1 of 1"
    assert errors == []
    page.context.close()


def test_the_most_surprising(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    losses = sorted(
        ((-float(loss), sequence.sequence_id, int(position) + 1) for sequence in reader
         for position, loss in zip(sequence.positions, sequence.target_logprob, strict=True)),
        reverse=True,
    )  # fmt: skip
    for place in range(3):
        view.page.click("#less-surprising")
        view.wait_for(
            f"document.getElementById('surprise').textContent.startsWith('{place + 1} of 500')"
        )
        loss, name, token = losses[place]
        view.wait_for(f"document.getElementById('reading').textContent === {name!r}")
        assert view.chosen() == token
        assert number(view.facts()["surprise"]) == pytest.approx(loss, abs=6e-4)


def test_the_list_of_sequences(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    names = "#sequences bdi"
    lengths = {sequence.sequence_id: len(sequence) for sequence in reader}
    assert view.page.locator(names).all_text_contents() == list(lengths)
    view.page.select_option("#sort", "longest")
    assert [lengths[name] for name in view.page.locator(names).all_text_contents()] == sorted(
        lengths.values(), reverse=True
    )
    view.page.select_option("#sort", "hardest")
    means = {s.sequence_id: -s.target_logprob.mean() if len(s.positions) else -1.0 for s in reader}
    found = [means[name] for name in view.page.locator(names).all_text_contents()]
    assert np.diff(found).max() < 1e-3
    view.page.fill("#filter", "book")
    view.page.fill("#least", "30")
    expected = {name for name, length in lengths.items() if "book" in name and length >= 30}
    assert set(view.page.locator(names).all_text_contents()) == expected
    assert view.page.locator("#found").text_content() == f"{len(expected)} of 40 sequences"


def test_hostile_text_is_text(opened, make_reader):
    """Every character is shown, and hidden ones as escapes."""
    order = list(range(len(HOSTILE)))
    name = "<img src=x onerror=\"document.title='run'\">\u202e{{ 7 * 7 }}"
    source = "</title><script>document.title='run'</script>\x1b"
    reader, tokenizer = make_reader(HOSTILE, {name: order}, source=source)
    view = opened(reader, tokenizer)
    shown = view.texts()
    expected = {
        1: HOSTILE[1],
        2: HOSTILE[2],
        3: "<!--",
        5: "{{ 7 * 7 }}{% raw %}",
        6: r"\x00\x1b[31m\x07",
        7: r"\u202egnirts",
        8: r"\u200b\ufeff",
        9: "e\u0301",
        10: "◌\u0301",
        11: r"👩\u200d💻",
        12: "f0",
        13: "9f",
        15: "80😀",
        16: "ff",
        17: "→\t",
        18: "␍⏎\n",
        19: "····",
        20: r"\xa0",
        22: "&lt;b&gt;",
        24: "<24>",
        **{25 + i: letter for i, letter in enumerate(ARABIC)},
    }
    assert {at: shown[at] for at in expected} == expected
    assert len(shown[21]) < 500
    assert "(1,000,000 characters)" in shown[21]
    assert view.page.title().startswith(reader.path)
    assert view.page.locator("img").count() == 0
    assert view.page.locator("h3#reading").text_content() == name.replace(
        "\u202e", "\\u202e"
    ).replace(" ", "·")
    for at in (1, 2, 6, 7, 15, 21):
        view.page.locator(f'.t[data-i="{at}"]').click()
    assert view.page.evaluate("document.documentElement.scrollWidth") <= 1000


def test_only_what_is_near_the_screen_is_drawn(opened, make_reader, rng):
    tokens = [0, *rng.integers(1, 12, 20_000)]
    texts = ["<s>", *(f" word{number}" for number in range(10)), "\n"]
    view = opened(*make_reader(texts, {"long": tokens}, max_length=30_000))
    drawn = "document.querySelectorAll('.t').length"
    assert 0 < view.page.evaluate(drawn) < 3000
    height = view.page.evaluate("document.getElementById('text').scrollHeight")
    for place in (0.3, 0.6, 1):
        view.page.evaluate(f"document.getElementById('text').scrollTop = {place * height}")
        view.wait_for(
            "(() => { const box = document.getElementById('text').getBoundingClientRect();"
            " return document.elementFromPoint(box.left + 60, box.top + 200)?.closest('.t') !== null; })()"
        )
        assert view.page.evaluate(drawn) < 3000
    view.page.locator("#text .t").last.click()
    assert view.chosen() == len(tokens) - 1
    # The chosen token stays, with the focus, however far the text is scrolled.
    view.page.evaluate("document.getElementById('text').scrollTop = 0")
    view.wait_for("document.querySelector('.t[data-i=\"1\"]')")
    assert view.page.evaluate("document.activeElement.dataset.i") == str(len(tokens) - 1)


def test_print_shows_the_text(opened, reader, tokenizer):
    view = opened(reader, tokenizer)
    view.page.emulate_media(media="print")
    assert view.page.locator(".t").first.is_visible()
    assert not view.page.locator("#metric").is_visible()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_and_nothing_cut_off(opened, reader, tokenizer, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    view = opened(reader, tokenizer, width=width, scheme=scheme)
    view.page.locator('.t[data-i="1"]').click()
    for each in view.page.locator("details.values summary").all():
        each.click()
    found = axe.Axe().run(view.page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    outside = view.page.evaluate(
        """width => [...document.querySelectorAll('body *')].filter((each) => {
             const box = each.getBoundingClientRect();
             return box.width && (box.right > width + 1 || box.left < -1) && !each.closest('.scroll, .skip, svg, .hidden');
           }).map((each) => each.outerHTML.slice(0, 100))""",
        width,
    )
    assert outside == []
    lists = "[...document.querySelectorAll('#sequences-of-note .scroll')]"
    cut = f"{lists}.filter((each) => each.scrollWidth > each.clientWidth).length"
    assert view.page.evaluate(cut) == 0


def test_without_scripts_the_figures_are_there(chromium, reader, tokenizer, tmp_path):
    out = tmp_path / "report.html"
    write_report(reader, out, ReportOptions(), tokenizer)
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.set_default_timeout(_PATIENCE)
    page.goto(f"file://{out}")
    assert "The token view needs JavaScript." in page.inner_text("main")
    assert page.get_by_role("img", name="Entropy of the teacher").is_visible()
    page.context.close()
