"""The report of a run: numbers of the log and the metrics, hostile text, and the page in a browser."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest

from logitcask.train.evaluation.by_sequence import BySequence, interval
from logitcask.train.evaluation.measured import ENTROPY_EDGES
from logitcask.train.output.report import METRICS, Running, write_report

STEPS = 6


@pytest.fixture
def metrics():
    names = [
        "kl",
        "reverse_kl",
        "ce",
        "perplexity",
        "top1_agreement",
        "mor@5",
        "cr@5",
        "spearman@5",
        "ece",
    ]
    return {
        "before": {name: 2.0 + 0.1 * i for i, name in enumerate(names)},
        "after": {name: 1.0 + 0.1 * i for i, name in enumerate(names)},
        "teacher": {"ce": 0.75, "perplexity": 2.117, "model": "the teacher", "engine": "none", "positions": 9},
        "rouge_l": {"before": 0.125, "after": 0.25, "answers": 1},
        "k": 5,
        "kl_tail": "samples",
        "kl_kind": "The KL is an estimate.",
        "kinds": {"kl": "unbiased"},
        "steps": STEPS,
        "final_loss": 1.0,
        "seconds": 12.0,
        "positions_trained": 600,
        "train_sequences": 3,
        "held_out_sequences": 1,
        "held_out_positions": 9,
        "losses": [["forward_kl", "1.0"]],
        "exactness": {"forward_kl": "unbiased"},
        "student": {"parameters": 1234567, "trained": 1, "architecture": "A"},
        "cache": {"path": "caches/c", "fingerprint": "f" * 64, "source": "s", "tokens": 4321, "bytes_per_token": 40.9},
        "run": "a run",
        "seed": 1,
        "created_by": "logitcask",
        "config": {},
    }  # fmt: skip


@pytest.fixture
def log(rng):
    records = [
        {
            "step": step,
            "loss": float(rng.random() + 1),
            "loss_forward_kl": float(rng.random()),
            "loss_ce": float(rng.random()),
            "grad_norm": float(rng.random() * 10),
            "learning_rate": 1e-4 * step,
            "positions": 100 * step,
            "seconds": 2.0 * step if step < 4 else 2.0 * step + 4,
        }
        for step in range(1, STEPS + 1)
    ]
    return [
        *records[:3],
        {"step": 3, "eval_kl": 1.5, "eval_ce": 1.6, "eval_top1_agreement": 0.4},
        *records[3:],
    ]


EXAMPLES = [
    {
        "context": "once\nupon",
        "target": " a",
        "teacher": [(" a", 0.75), ("\n", 0.25)],
        "before": [("x", 0.5)],
        "after": [(" a", 1.0)],
    }
]
ANSWERS = [{"prompt": "why", "reference": "because", "student": "so", "rouge_l": 0.25}]


@pytest.fixture
def page(tmp_path):
    """``page(metrics, log, examples, answers)``: the HTML."""

    def write(metrics, log, examples=EXAMPLES, answers=ANSWERS, held_out=None, running=None):
        write_report(tmp_path / "report.html", metrics, log, examples, answers, held_out, running)
        return (tmp_path / "report.html").read_text()

    return write


def charts(html):
    """Title -> (header, rows) of the table of each chart."""
    found = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', html, re.DOTALL):
        title = unescape(re.search(r"<figcaption>(.*?) <span", figure)[1])
        cells = [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", figure)
        ]
        found[title] = cells[0], cells[1:]
    return found


def test_the_charts_have_the_numbers_of_the_log(page, metrics, log):
    found = charts(page(metrics, log))
    assert list(found) == ["Held-out text", "Agreement with the teacher, held-out text", "Training losses", "Learning rate", "Gradient norm", "Speed"]  # fmt: skip
    assert found["Held-out text"] == (
        ["step", "KL to the teacher (estimate)", "cross-entropy on the text", "the teacher's cross-entropy"],
        [["0", "2", "2.2", "0.75"], ["3", "1.5", "1.6", ""], ["6", "1", "1.2", "0.75"]],
    )  # fmt: skip
    training = [record for record in log if "loss" in record]
    header, rows = found["Training losses"]
    assert header == ["step", "weighted sum", "ce", "forward_kl"]
    for row, record in zip(rows, training, strict=True):
        values = [record["step"], record["loss"], record["loss_ce"], record["loss_forward_kl"]]
        assert row == [f"{value:.3g}" for value in values]
    for title, name in (("Learning rate", "learning_rate"), ("Gradient norm", "grad_norm")):
        assert found[title][1] == [[str(r["step"]), f"{r[name]:.3g}"] for r in training]
    # 100 positions in 2 seconds, but for one step of 6 seconds.
    assert [row[1] for row in found["Speed"][1]] == ["50", "50", "50", "16.7", "50", "50"]


def test_every_metric_is_in_the_table(page, metrics, log):
    html = page(metrics, log)
    assert len(metrics["before"]) == len(METRICS)
    for name, before in metrics["before"].items():
        title, unit, better = METRICS[name.partition("@")[0]]
        scale, digits, unit = (100, 1, " %") if unit == "%" else (1, 3, f" {unit}".rstrip())
        row = re.search(
            rf'<th scope="row">{re.escape(title.format(k=5))} <span class="quiet note">(.*?)</span></th>(.*?)</tr>',
            html,
        )
        assert row[1].endswith(better)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row[2])
        expected = [
            f"{scale * value:.{digits}f}{unit}" for value in (before, metrics["after"][name])
        ]
        assert cells[:2] == expected
    assert "estimate; less is better" in html
    assert (
        'card better"><span class="name">KL to the teacher (estimate)</span><span class="now">1.000 nats'
        in html
    )
    assert 'card worse"><span class="name">Top-1 agreement' in html
    assert "0.750 nats" in html


def test_predictions_and_answers(page, metrics, log):
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page(metrics, log))).split())
    assert (
        "…once upon next a teacher a 75 % \\n 25 % student before x 50 % student after a 100 %"
        in text
    )
    assert "Rouge-L with the cached answers over 1 of them: 0.125 before, 0.250 after." in text
    assert "student, Rouge-L 0.250 so" in text


def test_hostile_text_stays_text(page, metrics, log):
    evil = "</style><script>alert(1)</script>{{ 7 * 7 }}\u202e\x1b"
    metrics |= {
        "run": evil,
        "teacher": metrics["teacher"] | {"model": evil},
        "cache": metrics["cache"] | {"path": evil},
    }
    example = {**EXAMPLES[0], "context": evil, "target": evil, "teacher": [(evil, 1.0)]}
    html = page(metrics, log, [example], [{**ANSWERS[0], "student": evil}])
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert html.count("{{ 7 * 7 }}") == 9
    assert "script-src &#39;none&#39;" in html


def test_an_old_report_of_the_run_is_replaced(page, tmp_path, metrics, log):
    (tmp_path / "report.html").write_text("<html>of an older version</html>")
    assert "older" not in page(metrics, log)
    assert len(page(metrics, log)) < 100_000


def test_without_a_log(page, metrics):
    assert list(charts(page(metrics, []))) == [
        "Held-out text",
        "Agreement with the teacher, held-out text",
    ]


def test_a_value_that_is_not_a_number_is_a_gap(page, metrics, log):
    log[0]["grad_norm"] = float("nan")
    assert charts(page(metrics, log))["Gradient norm"][1][0] == ["1", "–"]


@pytest.fixture
def held_out(rng, metrics):
    """Values by sequence and bins with random numbers; one bin of each has no position."""
    metrics["kinds"] = dict.fromkeys(metrics["before"], "exact")
    positions = rng.integers(3, 30, 12)
    names = ["kl", "reverse_kl", "ce", "top1_agreement", "mor@5", "cr@5", "spearman@5"]

    def bins():
        count = np.array([0, *rng.integers(1, 50, 14)])
        sure = count * (np.arange(15) + 0.5) / 15
        each = np.array([4, 0, *rng.integers(1, 40, len(ENTROPY_EDGES) - 1)])
        centres = np.array([0, *ENTROPY_EDGES]) + 0.1
        return {
            "calibration": [count.tolist(), sure.tolist(), (count * 0.4).tolist()],
            "entropy": {
                "positions": each.tolist(),
                "entropy": (each * centres).tolist(),
                "top1_agreement": (each * rng.random(len(each))).tolist(),
                "mor@5": (each * rng.random(len(each))).tolist(),
            },
            "entropy_kind": "lower",
        }

    after = bins()
    before = bins()
    before["entropy"]["positions"] = after["entropy"]["positions"]
    return {
        "parts": [{"fingerprint": "f", "ids": 60, "sequences": [*range(12)]}],
        "positions": positions.tolist(),
        "sums": {name: (positions * (1 + rng.random(12))).tolist() for name in names},
        "ece": 0.1,
        "before": before,
        "after": after,
        "teacher_calibration": bins()["calibration"],
    }


def test_held_out_charts_have_the_numbers_of_the_bins(page, metrics, log, held_out):
    found = charts(page(metrics, log, held_out=held_out))
    header, rows = found["Agreement by the teacher's entropy"]
    assert header[1:] == ["top-1 agreement", "overlap of both top-5", "top-1 before training", "share of the positions"]  # fmt: skip
    after, before = held_out["after"]["entropy"], held_out["before"]["entropy"]
    total, expected = sum(after["positions"]), []
    for at, count in enumerate(after["positions"]):
        if count:
            values = [after["top1_agreement"][at] / count, after["mor@5"][at] / count,
                      before["top1_agreement"][at] / count, count / total]  # fmt: skip
            x = after["entropy"][at] / count
            expected.append([f"{x:.3g}", *(f"{100 * value:.1f} %" for value in values)])
    assert rows == expected
    assert len(rows) == len(ENTROPY_EDGES)

    header, rows = found["Calibration"]
    assert header[1:] == ["student", "before training", "teacher", "calibrated"]
    assert (rows[0], rows[-1]) == (["0", "", "", "", "0.0 %"], ["1", "", "", "", "100.0 %"])
    for column in (1, 2, 3):
        points = [(row[0], row[column]) for row in rows if row[column]]
        assert points == [(f"{(at + 0.5) / 15:.3g}", "40.0 %") for at in range(1, 15)]
    counts = [row[1] for row in found["How sure the student is"][1]]
    assert counts == [f"{count:,}" for count in held_out["after"]["calibration"][0]]
    each = np.array(held_out["sums"]["kl"]) / held_out["positions"]
    rows = found["KL of each sequence"][1]
    low = min(each)
    for number, row in enumerate(rows):
        first = low + number * (max(each) - low) / 12
        last = low + (number + 1) * (max(each) - low) / 12
        assert int(row[1]) == sum((first <= v < last) or (number == 11 and v == max(each)) for v in each)  # fmt: skip


def test_the_spread_of_every_metric(page, metrics, log, held_out):
    html = page(metrics, log, held_out=held_out)
    sums = {name: np.array(values) for name, values in held_out["sums"].items()}
    sequences = BySequence(sums, np.array(held_out["positions"]), 0.1)
    resampled, deviations = sequences.resampled(seed=0, resamples=1000), sequences.deviations()
    notes = re.findall(r'<span class="quiet note spread">(.*?)</span>', html)
    assert len(notes) == 16
    names = [name for name in metrics["before"] if name != "ece"]
    for name, bounds, deviation in zip(names, notes[::2], notes[1::2], strict=True):
        share = METRICS[name.partition("@")[0]][1] == "%"
        low, high = interval(resampled[name])
        written = [f"{100 * v:.1f} %" if share else f"{v:.3f}" for v in (low, high, deviations[name])]  # fmt: skip
        assert bounds == f"{written[0]} to {written[1]}"
        assert deviation == f"sd {written[2]}"


def test_what_is_not_known_is_left_out(page, metrics, log, held_out):
    for bins in (held_out["before"], held_out["after"]):
        bins["entropy_kind"] = None
    held_out["teacher_calibration"] = None
    del held_out["before"]
    found = charts(page(metrics, log, held_out=held_out))
    assert "Agreement by the teacher's entropy" not in found
    assert found["Calibration"][0][1:] == ["student", "calibrated"]


def test_exactness_of_entropies_is_said(page, metrics, log, held_out):
    assert "a lower bound." in page(metrics, log, held_out=held_out)
    held_out["after"]["entropy_kind"] = "exact"
    html = page(metrics, log, held_out=held_out)
    assert "which the cache stores for each whole distribution" in html
    assert "a lower bound." not in html


@pytest.mark.long
def test_a_running_page_loads_itself_again(chromium, page, tmp_path, metrics, log):
    """Unless a table is open or the box is off, which is remembered."""
    page(metrics, log, running=Running(3, 6, "2026-01-01 00:00:00 UTC"))
    file = tmp_path / "report.html"
    context = chromium.new_context()
    context.set_default_timeout(300_000)
    opened = context.new_page()
    # The test's own clock: the page's only timer is called by hand.
    opened.add_init_script(
        "window.setInterval = (work, period) => { window.work = work; window.period = period; }"
    )

    def loads_again():
        opened.evaluate("window.old = true")
        opened.evaluate("work()")
        opened.wait_for_timeout(200)
        return not opened.evaluate("window.old === true")

    opened.goto(f"file://{file}")
    assert opened.evaluate("period") == 30_000
    file.write_text(file.read_text().replace("step 3 of 6", "step 4 of 6"))
    with opened.expect_event("load"):
        opened.evaluate("setTimeout(work, 0)")
    assert "step 4 of 6" in opened.locator(".running").text_content()
    opened.locator("#refresh").uncheck()
    assert not loads_again()
    for _ in range(50):  # a page in a new process may be shown what was kept a moment before
        opened.reload()
        if not opened.locator("#refresh").is_checked():
            break
    assert not opened.locator("#refresh").is_checked(), "remembered"
    assert not loads_again()
    opened.locator("#refresh").check()
    values = opened.locator("details.values summary").first
    values.click()
    assert not loads_again(), "a table of values is open"
    values.click()
    with opened.expect_event("load"):
        opened.evaluate("setTimeout(work, 0)")
    context.close()


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1000, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(chromium, page, tmp_path, metrics, log, held_out, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page(metrics, log, held_out=held_out, running=Running(3, 6, "2026-01-01 00:00:00 UTC"))
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(300_000)
    opened, wrong, requests = context.new_page(), [], []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(f"file://{tmp_path}/report.html")
    for each in opened.locator("details.values summary").all():
        each.click()
    found = axe.Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert (wrong, len(requests)) == ([], 1)
    context.close()
