"""The study of rounds at its smallest size: every arm runs, and the judge finds no fault with the
teacher itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logitcask.rounds.run as rounds_run
from logitcask.pipeline.teachers.model import resolve_model

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
MODULES = ("on_policy", "on_policy_arms", "on_policy_judge", "on_policy_material")
WANTED = ("KL, documents", "KL, teacher's answers", "SKD, 4 passes", "DPKD", "CoMD")
OTHERS = ("arms", "student", "teachers", "text")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The study's modules, which are a script's and no package's."""
    sys.path.insert(0, str(FOLDER))
    stage = rounds_run.run_stage
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        rounds_run.run_stage = stage
        sys.path.remove(str(FOLDER))
        for name in MODULES + OTHERS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def study(
    modules: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[Any]:
    """A study of an arm of each kind of text that has run once."""
    arms = [arm for arm in modules.on_policy_arms.ARMS if arm.name in WANTED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITCASK_HOME", "")  # which the study sets
        patch.setattr(modules.on_policy, "ARMS", arms)
        made = modules.on_policy.Study(tmp_path_factory.mktemp("study"), "smoke", str(tiny_llama))
        made.run(1)
        yield made


def test_every_arm_runs_once(study: Any, modules: Any) -> None:
    names = [modules.on_policy.START, *WANTED]
    found = study.found()
    assert [each["arm"] for each in found] == names
    study.run(1)
    assert study.found() == found
    table = modules.on_policy.table(found)
    assert [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == names


def test_the_teacher_itself_is_without_fault(study: Any, modules: Any) -> None:
    figures = modules.on_policy_judge.Judge(study.folder, study.size.length).figures(
        study.folder / "teacher"
    )
    assert figures["kl"] == figures["own_kl"] == 0
    assert figures["rouge_l"] == 100


def test_the_small_tokenizer_spells_the_same_text(
    modules: Any, tmp_path: Path, tiny_llama: Path
) -> None:
    """With ids of the large one that say the same."""
    material, file = (
        modules.on_policy_material,
        Path(resolve_model(str(tiny_llama)).location) / "tokenizer.json",
    )
    texts = ["a tokenizer with fewer merges", "spells, too: öäü"]
    size = modules.on_policy.SCALES["smoke"]
    small, kept = material.cut_tokenizer(file, texts, size)
    large = material.Tokenizer.from_file(str(file))
    assert small.get_vocab_size() == len(kept) <= size.vocab
    for text in texts:
        ids = small.encode(text).ids
        assert small.decode(ids) == text
        assert large.decode([kept[each] for each in ids]) == text
