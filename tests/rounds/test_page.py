"""The page of a run of rounds: its numbers, its texts, hostile text, and the page in a browser."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.pages.charts import number
from logitcask.rounds.figures import _forward_kl
from logitcask.rounds.page import acceptance, parts_of, write_page_of_rounds
from logitcask.rounds.run import report_again, run_rounds
from logitcask.rounds.state import State
from logitcask.rounds.texts import BOUNDS, seen, spread

from .conftest import COMMANDS

EVIL = "</style></p><script>document.title = 'run'</script>{{ 7 * 7 }}\u202e\x1b[31m"


@pytest.fixture
def run(rounds):
    """A run of three rounds on ten prompts, four a round; two prompts come again. Every student
    answers held-out prompts.
    """
    config = rounds(
        count=3,
        on_policy_fraction=0.5,
        student={
            "evaluation": {
                "held_out": 0.3,
                "max_sequences": 4,
                "answers": {"sequences": 2, "max_new_tokens": 6, "prompt_tokens": 12},
            }
        },
    )
    document, _ = run_rounds(config, [])
    return config, document


def charts(html: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> (header, rows) of the table of each chart."""
    found = {}
    for figure in re.findall(r'<figure class="chart">.*?</figure>', html, re.DOTALL):
        title = unescape(re.search(r"<figcaption>(.*?) <span", figure)[1])
        table = re.search(r"<details.*?</details>", figure, re.DOTALL)[0]
        cells = [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table)
        ]
        found[title] = cells[0], cells[1:]
    return found


def section(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)[0]


def texts(html: str) -> list[str]:
    return [unescape(re.sub("<[^>]*>", "", each)) for each in re.findall(r'<p class="context"[^>]*>(.*?)</p>', html, re.DOTALL)]  # fmt: skip


def test_the_numbers_are_those_of_the_caches_and_the_runs(run):
    config, document = run
    html = (config.output / "rounds.html").read_text()
    found = charts(html)
    metrics = [
        json.loads((config.output / f"round-{n:03d}" / "student" / "metrics.json").read_text())
        for n in range(4)
    ]
    assert found["KL on held-out text"] == (
        ["round", "KL(teacher || student)", "KL(student || teacher)"],
        [[str(n), number(m["after"]["kl"]), number(m["after"]["reverse_kl"])] for n, m in enumerate(metrics)],
    )  # fmt: skip
    own = []
    for n in (1, 2, 3):
        cache = CacheReader(config.output / f"round-{n:03d}" / "cache")
        q = np.concatenate([each.writer_logprob for each in cache]).astype(np.float64)
        log_r = np.concatenate([each.target_logprob for each in cache]).astype(np.float64) - q
        forward = np.exp(log_r) * log_r - (np.exp(log_r) - 1)
        own.append([str(n), number(-log_r.mean()), number(forward.mean())])
    assert found["KL on the student's own text"][1] == own
    assert found["Written tokens"][1] == [
        [str(n), number(document["rounds"][n]["cache"]["written_tokens"])] for n in (1, 2, 3)
    ]
    assert "Acceptance" not in found
    header, rows = found["Seconds of each round"]
    assert len(header) == 8
    for row, each in zip(rows, document["rounds"], strict=True):
        parts = parts_of(each)
        stages = each["stages"].values()
        assert sum(parts) == pytest.approx(sum(s["seconds"] + s["handover_seconds"] for s in stages))  # fmt: skip
        assert min(parts[:-1]) >= 0  # the stages of these tests pretend to take a second
        assert row == [str(each["round"]), *map(number, parts), f"{sum(parts):,.1f} s"]


def test_a_rejection_rate_is_shown(run, tmp_path):
    config, document = run
    for n in (1, 2, 3):
        document["rounds"][n]["cache"]["rejection_rate"] = 0.125 * n
    assert [acceptance(each) for each in document["rounds"]] == [None, 0.875, 0.75, 0.625]
    settings = State.model_validate_json((config.output / "state.json").read_text()).settings
    write_page_of_rounds(config.output, document, settings)
    html = (config.output / "rounds.html").read_text()
    assert [row[1] for row in charts(html)["Acceptance"][1]] == ["87.5 %", "75.0 %", "62.5 %"]


def test_the_same_prompts_are_answered_after_every_round(run):
    config, _ = run
    same = section((config.output / "rounds.html").read_text(), "same")
    by_round = [
        json.loads((config.output / f"round-{n:03d}" / "student" / "answers.json").read_text())
        for n in range(4)
    ]
    assert len(by_round[0]) == 2
    expected = []
    for each in zip(*by_round, strict=True):
        assert len({(a["prompt"], a["reference"]) for a in each}) == 1
        expected += [each[0]["prompt"], each[0]["reference"], *(a["student"] for a in each)]
    nothing = {"": "(nothing)"}
    assert texts(same) == [nothing.get(each, seen(each)) for each in expected]
    assert re.findall(r"<h4>(.*?)</h4>", same) == ["the data&#39;s", *(f"round {n}" for n in range(4))] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("said", "shown"), [("", "(nothing)"), ("\n ", "(only line ends and spaces)")]
)
def test_an_answer_without_letters_is_named(run, said, shown):
    config, _ = run
    file = config.output / "round-003" / "student" / "answers.json"
    answers = json.loads(file.read_text())
    file.write_text(json.dumps([each | {"student": said} for each in answers]))
    report_again(config)
    same = section((config.output / "rounds.html").read_text(), "same")
    assert texts(same).count(shown) >= len(answers)


def test_what_was_written_is_coloured_by_the_teachers_surprise(run, tiny_llama):
    config, _ = run
    html = section((config.output / "rounds.html").read_text(), "written")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    caches = {n: CacheReader(config.output / f"round-{n:03d}" / "cache") for n in (1, 2, 3)}
    # Prompts 0 and 1 come again in the third round; the second round has others.
    names = re.findall(r"<h3><bdi>(.*?)</bdi></h3>", html)
    assert names == ["train/0/0", "train/1/0", "train/4/0"]
    examples = html.split('<div class="example">')[1:]
    for name, example, numbers in zip(names, examples, [(1, 3), (1, 3), (2,)], strict=True):
        answers = re.findall(r"<div><h4>(.*?)</h4>(.*?)</p></div>", example, re.DOTALL)
        assert len(answers) == len(numbers)
        for (title, body), n in zip(answers, numbers, strict=True):
            sequence = next(each for each in caches[n] if each.sequence_id == name)
            loss = -sequence.target_logprob.astype(np.float64)
            assert title == f"round {n}: {len(loss)} tokens, {loss.mean():.2f} nats each"
            spans = re.findall(r'<span class="heat h(\d)">(.*?)</span>', body, re.DOTALL)
            start = int(sequence.positions[0]) + 1
            shown = [tokenizer.decode([t]) for t in sequence.input_ids[start:].tolist()]
            if len(spans) == len(shown) and "\ufffd" not in "".join(shown):
                assert [unescape(text) for _, text in spans] == [seen(each) for each in shown]
                assert [int(level) for level, _ in spans] == np.digitize(loss, BOUNDS).tolist()
        sequence = next(each for each in caches[numbers[0]] if each.sequence_id == name)
        prompt = tokenizer.decode(sequence.input_ids[: int(sequence.positions[0]) + 1].tolist())
        assert texts(example)[0] == seen(prompt)


def test_bytes_of_one_character_are_one_piece():
    from logitcask.rounds.texts import _merged

    class Parts:
        def partial_bytes(self, token: int) -> bytes | None:
            return {1: b"\xf0\x9f", 2: b"\x98\x80", 3: b"\xff"}.get(token)

        def exact(self, token: int) -> str:
            return "a\u202e"

    found = [*_merged(Parts(), [(0, 1.0), (1, 2.0), (2, 0.5), (3, 4.0), (0, None)])]  # type: ignore[arg-type]
    assert found == [("a\\u202e", 1.0), ("😀", 2.5), ("\\xff", 4.0), ("a\\u202e", None)]


def test_written_again_from_the_state(run):
    config, document = run
    before = (config.output / "rounds.html").read_bytes()
    (config.output / "rounds.html").unlink()
    COMMANDS.clear()
    assert report_again(config)[0] == document
    assert (config.output / "rounds.html").read_bytes() == before
    assert COMMANDS == []


def test_without_rounds_there_is_no_report(rounds):
    config = rounds()
    with pytest.raises(UserError, match=r"holds no rounds \(no state.json\)"):
        report_again(config)
    config.output.mkdir()
    State(settings={}).save(config.output)
    with pytest.raises(UserError, match="its student is not made"):
        report_again(config)


def test_the_student_at_the_start_alone_is_a_page(rounds):
    """Of a run that ended in its first round."""
    config = rounds(count=1)
    run_rounds(config, [])
    state = State.model_validate_json((config.output / "state.json").read_text())
    state.done = [each for each in state.done if each.stage in ("text", "start")]
    state.save(config.output)
    document, _ = report_again(config)
    assert [each["round"] for each in document["rounds"]] == [0]
    html = (config.output / "rounds.html").read_text()
    assert "0 of 1 rounds are done" in html
    assert "KL on the student" not in "".join(charts(html))


def test_without_answers_and_caches_the_page_says_how_to_have_them(rounds):
    config = rounds(count=1)
    run_rounds(config, [])
    html = (config.output / "rounds.html").read_text()
    assert 'id="same"' not in html
    assert "<code>evaluation.answers</code>" in html
    (config.output / "round-001" / "cache" / "manifest.json").unlink()
    (config.output / "round-001" / "student" / "tokenizer.json").unlink()
    report_again(config)
    assert 'id="written"' not in (config.output / "rounds.html").read_text()


def test_rounds_that_are_shown():
    assert spread([0, 1, 2]) == [0, 1, 2]
    assert spread([], 3) == []
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]


def test_the_forward_kl_has_its_mean_at_the_kl(rng):
    """The expectation under q of the estimate is KL(p || q), and no term is negative."""
    for _ in range(20):
        logits = rng.normal(0, 3, (2, 50))
        log_p, log_q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        terms = _forward_kl(log_p.astype(np.float32), log_q.astype(np.float32))
        assert terms.min() >= 0
        kl = (np.exp(log_p) * (log_p - log_q)).sum()
        # Logprobs are float32: errors of 2^-24 of them, and of the products.
        assert (np.exp(log_q) * terms).sum() == pytest.approx(kl, rel=1e-5, abs=1e-6)


def hostile(config: Any, document: dict[str, Any]) -> Path:
    """The page of a run whose texts, names and figures are hostile."""
    for n in range(4):
        file = config.output / f"round-{n:03d}" / "student" / "answers.json"
        answers = [
            {**each, "prompt": f"{each['prompt']}\n{EVIL}", "reference": EVIL * 9, "student": EVIL}
            for each in json.loads(file.read_text())
        ]
        file.write_text(json.dumps(answers))
    for each in document["rounds"]:
        each["kl_kind"] = EVIL
        each["passes"] = {EVIL: 0.5, **each["passes"]}
    settings = State.model_validate_json((config.output / "state.json").read_text()).settings
    settings["teacher_config"]["teacher"]["model"] = EVIL
    settings["student_config"]["student"]["init_from"] = EVIL
    settings["student_config"]["losses"] = [{"name": EVIL, EVIL: EVIL}]
    write_page_of_rounds(config.output, document, settings)
    return config.output / "rounds.html"


def test_hostile_text_is_text(run):
    html = hostile(*run).read_text()
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert html.count("{{ 7 * 7 }}") > 10
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "script-src &#39;none&#39;" in html


@pytest.mark.long
def test_in_a_browser(chromium, run):
    """Hostile text, all widths, light and dark: accessible, nothing cut off, nothing asked for."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    config, document = run
    for each in document["rounds"][1:]:
        each["cache"]["rejection_rate"] = 0.25
    file = hostile(config, document)
    for width in (390, 1000, 1600):
        for scheme in ("light", "dark"):
            context = chromium.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            context.set_default_timeout(300_000)
            opened, wrong, requests = context.new_page(), [], []
            opened.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            opened.on("request", lambda request, asked=requests: asked.append(request.url))
            opened.goto(f"file://{file}")
            for each in opened.locator("details.values summary").all():
                each.click()
            found = axe.Axe().run(opened).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            outside = opened.evaluate(
                """width => [...document.querySelectorAll('body *')].filter((each) => {
                     const box = each.getBoundingClientRect();
                     return box.width && (box.right > width + 1 || box.left < -1) && !each.closest('.scroll, .skip, svg, .hidden');
                   }).map((each) => each.outerHTML.slice(0, 100))""",
                width,
            )
            assert outside == []
            assert "run" not in opened.title().split()
            assert (wrong, len(requests)) == ([], 1)
            context.close()
