"""The quality study at its smallest size: what it compares is paired, what it stores is the
teacher's, and it goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
MODULES = ("arms", "curves", "student", "study", "tables", "teachers", "text")


@pytest.fixture(scope="module")
def quality() -> Iterator[Any]:
    """The study's modules, which are a script's and no package's."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def study(quality: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Any:
    """A study that is ready to run."""
    made = quality.study.Study(
        tmp_path_factory.mktemp("quality"), "smoke", str(tiny_llama), time.monotonic() + 1e6
    )
    made.prepare(seeds=2)
    return made


def some_jobs(quality: Any, seeds: int) -> list[Any]:
    wanted = {
        "text alone",
        "full logits",
        "half full logits",
        "top 12, renormalised",
        "half default",
        "RKL + 2 ranking, dynamic",
        "KL + 2 ranking, default cache",
        "taid",
        "random_sampling",
    }
    return [
        job for job in quality.study.jobs(seeds) if job.arm.name in wanted and job.init == job.order
    ]


def test_it_goes_on_where_it_stopped_and_comes_to_tables(
    quality: Any, study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = some_jobs(quality, 2)
    monkeypatch.setattr(
        quality.study, "jobs", lambda seeds: [job for job in jobs if job.init < seeds]
    )
    study.run(1, 0, 2)
    half = study.runs.read_text()
    study.deadline = time.monotonic()
    with pytest.raises(quality.teachers.OutOfTime):
        study.run(2, 0, 1)
    assert study.runs.read_text() == half
    study.deadline += 1e6
    study.run(2, 0, 1)
    assert study.runs.read_text().startswith(half)
    whole = study.records()
    assert set(whole) == {job.key for job in jobs}
    study.run(2, 1, 2)
    assert study.records() == whole

    study.tables(2, publish=False)
    results = json.loads((study.folder / "quality.json").read_text())
    scratch = {
        (row["teacher"], row["name"]): row for row in results["arms"] if row["start"] == "scratch"
    }
    for teacher in ("strong", "weak"):
        assert scratch[teacher, "text alone"]["recovered"]["mean"] == 0
        assert scratch[teacher, "full logits"]["recovered"]["mean"] == 1
        assert scratch[teacher, "full logits"]["ce"]["runs"] == 2
    by_name = {
        (job.arm.name, job.init): whole[job.key]["metrics"]["strong"]["ce"]
        for job in jobs
        if job.teacher != "weak" and job.arm.start == "scratch"
    }
    shares = [
        (by_name["text alone", seed] - by_name["half default", seed])
        / (by_name["text alone", seed] - by_name["full logits", seed])
        for seed in (0, 1)
    ]
    assert scratch["strong", "half default"]["recovered"]["mean"] == pytest.approx(
        np.mean(shares), abs=1e-4
    )
    plot = ElementTree.parse(study.folder / "quality.svg")
    marks = [each for each in plot.iter() if each.get("class") == "point"]
    drawn = {
        (row["teacher"], row["name"]): row["recovered"]["mean"]
        for row in results["arms"]
        if row["group"] == "bytes" and row["start"] == "scratch" and row["recovered"]
        if row["source"] != "full logits"
    }
    said = {each[0].text for each in marks}
    assert said == {f"{name}: {100 * mean:.1f} %" for (_, name), mean in drawn.items()}
    assert len(marks) == len(drawn)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table bytes scratch strong -->\nold\n<!-- end -->\nbetween\n<!-- table losses -->\n<!-- end -->\nafter\n"
    )
    quality.tables.update_page(results, page)
    text = page.read_text()
    assert "| half default |" not in text
    assert "top 12, renormalised" in text
    assert "| taid |" in text
    assert "old" not in text
    assert [line for line in text.splitlines() if line in ("before", "between", "after")] == [
        "before",
        "between",
        "after",
    ]


def test_a_run_repeats_itself_and_each_seed_moves_one_thing(quality: Any, study: Any) -> None:
    job = next(job for job in quality.study.jobs(1) if job.arm.name == "12 draws, independent")
    text, teachers = (
        study.text(),
        {n: quality.teachers.load_teacher(study.folder, n) for n in quality.study.TEACHERS},
    )

    def ce(**changes: int) -> float:
        record = study._run(quality.study.replace(job, **changes), text, teachers)
        return record["metrics"]["strong"]["ce"]

    assert ce() == ce()
    assert len({ce(), ce(init=1), ce(order=1), ce(draws=1)}) == 4


def test_caches_hold_what_the_teacher_said(quality: Any, study: Any) -> None:
    text, teacher = study.text(), quality.teachers.load_teacher(study.folder, "strong")
    store = quality.arms.STORES["default"]
    path, size = quality.teachers.cache_of(
        study.folder / "check", teacher, text, store, name="default", seed=3
    )
    assert size == pytest.approx(
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / text.train.size
    )
    sequences, prior = quality.teachers.read_cache(path)
    assert prior is not None
    assert len(sequences) == len(text.train)
    for row, (sequence, dense) in enumerate(
        zip(sequences, teacher.train.astype(np.float64), strict=True)
    ):
        assert sequence.input_ids.tolist() == text.train[row].tolist()
        at = np.arange(len(dense))
        dense = dense - np.log(np.exp(dense).sum(1, keepdims=True))
        np.testing.assert_allclose(
            sequence.target_logprob, dense[at, text.train[row, 1:]], atol=1 / 256
        )
        np.testing.assert_allclose(
            sequence.logprobs[:, 0], dense.max(1), atol=store.logprob_step / 2 + 1e-3
        )
        stored = sequence.ids >= 0
        found = np.take_along_axis(dense, np.maximum(sequence.ids, 0), 1)
        np.testing.assert_allclose(
            sequence.logprobs[stored], found[stored], atol=store.logprob_step / 2 + 1e-3
        )


def test_a_student_that_is_the_teacher_has_nothing_to_learn(quality: Any, study: Any) -> None:
    ids = study.text().held_out
    model = study._pretrained(0, study.text())
    dense = quality.teachers._logprobs(model, ids, None).numpy()
    found = quality.student.evaluate(
        model, quality.teachers.Teacher("itself", dense, dense), ids, study.device
    )
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    assert found["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert found["mor@5"] == pytest.approx(100, abs=0.5)
    targets = torch.from_numpy(ids[:, 1:].astype(np.int64))
    assert found["ce"] == pytest.approx(
        -torch.from_numpy(dense).gather(2, targets[..., None]).mean().item(), abs=1e-4
    )


def test_spelling_changes_no_text(quality: Any, tiny_llama: Path, rng: np.random.Generator) -> None:
    file = tiny_llama / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    # Every token occurs; about a third of them are too rare to be kept.
    ids = rng.permutation(np.arange(3, tokenizer.get_vocab_size())).tolist()
    ids += ids[:100]
    spelling = quality.text._Spelling(file, quality.text.Counter(ids), 300)
    spelled = [spelling.kept[piece] for token in ids for piece in spelling(token)]
    assert len(spelling.kept) == 300
    assert len(spelled) > len(ids)
    assert tokenizer.decode(spelled) == tokenizer.decode(ids)
