"""A student beside the teacher: the columns of the page, the page in a browser, the command that
reads, and refusals.
"""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from logitcask.cache_format import UserError
from logitcask.cache_format.readings import Reading, ReadingsOf, read_readings, write_readings
from logitcask.pipeline.report.student import Student, StudentFailed
from logitcask.pipeline.report.write import ReportOptions, write_report

from .test_browser import Opened, number

EVIL = "<script>document.title = 'run'</script>\u202e"
KL_BOUNDS = [0.01, 0.03, 0.1, 0.3, 0.6, 1, 2, 4]


@pytest.fixture
def readings(reader, rng, tmp_path):
    """A file of readings of all sequences but the last ten, of a student of random logits; and its
    dense logprobs by sequence.
    """
    found, dense = [], {}
    for index, sequence in enumerate(reader):
        if index >= len(reader) - 10:
            break
        logits = rng.normal(0, 2, (len(sequence.positions), 40))
        q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        inside = sequence.ids >= 0
        log_head = np.take_along_axis(q, np.maximum(sequence.ids, 0), 1)
        mass = (np.exp(log_head) * inside).sum(axis=1)
        log_tail = np.log1p(-mass)
        p, tail = sequence.logprobs.astype(np.float64), sequence.tail_logprob.astype(np.float64)
        kl = (np.exp(p) * (p - log_head)).sum(axis=1, where=inside) + np.exp(tail) * (tail - log_tail)  # fmt: skip
        target = q[np.arange(len(q)), sequence.target_ids]
        dense[index] = (log_head, log_tail, target, kl)
        values = [each.astype(np.float32) for each in (log_head[inside], log_tail, target, kl)]
        found.append((index, inside.sum(axis=1), Reading(*values)))
    of = ReadingsOf(
        EVIL, reader.manifest.fingerprint, reader.manifest.content_sha256, "lower", 0.002
    )
    write_readings(tmp_path / "student.npz", of, found)
    return tmp_path / "student.npz", dense


def unpacked(html, name):
    """The JSON value or the arrays of an element of the page."""
    text = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', html)[1]
    data = zlib.decompress(base64.b64decode(text))
    if not name.startswith("student"):
        return json.loads(data)
    size = int.from_bytes(data[:4], "little")
    found, at = {}, 4 + size
    for column, kind, length in json.loads(data[4:at]):
        planes = np.frombuffer(data[at : at + 4 * length], np.uint8).reshape(4, length)
        found[column] = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
        at += 4 * length
    return found


def test_files_come_back(readings, reader):
    file, dense = readings
    back = read_readings(file, reader.path, reader.manifest)
    assert back.indices == list(dense)
    for index, (log_head, log_tail, target, kl) in dense.items():
        sequence = reader[index]
        found = back.reading(index, sequence)
        assert found.log_head == pytest.approx(log_head[sequence.ids >= 0], rel=1e-6)
        for one, other in zip(found[1:], (log_tail, target, kl), strict=True):
            assert one == pytest.approx(other, rel=1e-6)


def test_the_page_has_the_students_values(readings, reader, tokenizer, tmp_path):
    file, dense = readings
    student = Student(str(file), reader)
    assert student.indices == list(dense)
    out = tmp_path / "report.html"
    options = ReportOptions(sequences=student.indices)
    written = write_report(reader, out, options, tokenizer, student=student)
    assert written.view_sequences == len(dense)
    html = out.read_text()
    view, columns = unpacked(html, "view"), unpacked(html, "student-0")
    means = [round(float(np.mean(kl)), 4) if len(kl) else None for *_, kl in dense.values()]
    assert view["student_kl"] == pytest.approx(means, abs=1e-4)
    at = entry = 0
    for index, (log_head, log_tail, target, kl) in dense.items():
        sequence = reader[index]
        places = at + sequence.positions + 1
        for name, values in (("loss", -target), ("tail", log_tail), ("kl", kl)):
            assert columns[name][places] == pytest.approx(values, rel=1e-5, abs=1e-7)
        entries = log_head[sequence.ids >= 0]
        assert columns["head_logprobs"][entry : entry + len(entries)] == pytest.approx(entries, rel=1e-5)  # fmt: skip
        at, entry = at + len(sequence), entry + len(entries)
    assert np.isnan(columns["kl"]).sum() == at - sum(len(kl) for *_, kl in dense.values())
    every = np.concatenate([kl for *_, kl in dense.values()])
    assert f"a KL(teacher || student) of {every.mean():.4f} nats" in html
    assert "a lower bound of the KL over the whole vocabulary" in html
    assert "0.2 % of its mass" in html
    assert "\u202e" not in html
    assert EVIL[:8] not in html.partition("<main")[2].partition("<script")[0]


def test_a_report_without_a_student_is_as_before(reader, tokenizer, tmp_path):
    out = tmp_path / "report.html"
    write_report(reader, out, ReportOptions(), tokenizer)
    html = out.read_text()
    assert 'id="student-0"' not in html
    assert '<option value="kl">' not in html
    assert unpacked(html, "view")["student_kl"] is None


def test_sequences_that_were_not_read_are_said(readings, reader, tokenizer, tmp_path):
    file, _ = readings
    out = tmp_path / "report.html"
    write_report(reader, out, ReportOptions(), tokenizer, student=Student(str(file), reader))
    unread = sum(len(reader[index].positions) > 0 for index in range(30, 40))
    assert f"It has not read {unread} of the sequences." in out.read_text()


def test_refusals(reader, readings, tmp_path, make_reader):
    other, _ = make_reader(["a", "b"], {"x": [0, 1]})
    with pytest.raises(UserError, match="read this cache with train-student read"):
        Student(str(readings[0]), other)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="holds no readings"):
        Student(str(tmp_path / "text.npz"), reader)


@pytest.mark.long
def test_in_a_browser(chromium, readings, reader, tokenizer, tmp_path):
    """The student's bars and facts at a token, KL as a colour, the order by KL; hostile name; axe."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    file, dense = readings
    student = Student(str(file), reader)
    out = tmp_path / "report.html"
    options = ReportOptions(sequences=student.indices)
    write_report(reader, out, options, tokenizer, student=student)
    for width, scheme in ((1000, "light"), (390, "dark")):
        view = Opened(chromium, out, width=width, scheme=scheme)
        at = max(dense, key=lambda index: len(dense[index][3]))
        sequence, (log_head, log_tail, target, kl) = reader[at], dense[at]
        view.page.evaluate(f"location.hash = '#sequence-{at}'")
        view.wait_for(f"document.querySelector('#reading').textContent === {sequence.sequence_id!r}")  # fmt: skip
        view.page.select_option("#metric", "kl")
        classes = view.page.eval_on_selector_all(".t", "all => all.map((each) => each.className)")
        levels = np.digitize(kl.astype(np.float32), np.array(KL_BOUNDS, np.float32))
        for position, level in zip(sequence.positions, levels, strict=True):
            assert classes[position + 1].split()[:3] == ["t", "heat", f"h{level}"]
        row = 3
        view.page.locator(f'.t[data-i="{int(sequence.positions[row]) + 1}"]').click()
        facts = view.facts()
        assert number(facts["KL"]) == pytest.approx(kl[row], abs=6e-4)
        assert f"surprise {-target[row]:.3f}" in facts["student"]
        shown = view.page.eval_on_selector_all(
            "#details tr .q", "all => all.map((each) => each.textContent)"
        )
        size = int((sequence.ids[row] >= 0).sum())
        expected = [*np.exp(log_head[row, :size])]
        if sequence.target_rank[row] >= size:
            expected.append(math.exp(target[row]))
        expected.append(math.exp(log_tail[row]))
        assert [number(each) for each in shown] == pytest.approx(100 * np.array(expected), rel=6e-2)
        widths = view.page.eval_on_selector_all(
            "#details tr .of-student", "all => all.map((each) => parseFloat(each.style.width))"
        )
        most = max(np.exp(sequence.logprobs[row]).max(), math.exp(sequence.tail_logprob[row]), *expected[:size], expected[-1])  # fmt: skip
        assert widths == pytest.approx(100 * np.array(expected) / most, abs=0.02)
        found = axe.Axe().run(view.page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1000:
            view.page.select_option("#sort", "kl")
            first = view.page.locator("#sequences bdi").first.text_content()
            means = {reader[i].sequence_id: kl.mean() if len(kl) else -1 for i, (*_, kl) in dense.items()}  # fmt: skip
            assert first == max(means, key=means.get)
        assert "run" not in view.page.title()
        assert (view.wrong, len(view.requests)) == ([], 1)
        view.page.context.close()


@pytest.mark.long
def test_a_run_is_read_by_its_own_command(tiny_llama, tmp_path, capfd):
    """From the command line to the page: the teacher as its own student has a KL of nearly nothing."""
    from logitcask.pipeline.builder.run import build
    from logitcask.pipeline.config import BuildConfig

    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": "python-docs", "max_length": 48, "max_tokens": 600},
            "store": {"top_k": 8},
            "audit": {"sequences": 0},
            "output": str(tmp_path / "cache"),
        }
    )
    build(config)
    code = "from logitcask.pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, "report", str(tmp_path / "cache")]
    command += ["--out", str(tmp_path / "r.html")]
    ended = subprocess.run([*command, "--student", str(tiny_llama)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    html = (tmp_path / "r.html").read_text()
    kl = float(re.search(r"a KL\(teacher \|\| student\) of (-?[\d.]+) nats", html)[1])
    # Stored logprobs are rounded to the store's step.
    assert abs(kl) < 1e-3
    ended = subprocess.run(
        [*command, "--student", str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (2, 1)
    assert ended.stderr.startswith("error: ")


def test_a_command_that_fails_gives_its_code(reader, monkeypatch):
    ended = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
    with pytest.raises(StudentFailed) as failed:
        Student("a-run", reader).readings([0])
    assert failed.value.code == 2
