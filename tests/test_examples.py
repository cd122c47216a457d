"""The files in ``examples/`` are valid, and each command in them is one that exists."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from logitcask.pipeline.cli import app as teacher_cache
from logitcask.train.cli import app as train_student

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file())
PROGRAM = re.compile(r"(teacher-cache|train-student|logitcask\.train)[ ,]([^\n;&|\]]+)")


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.name)
def example(request) -> Path:
    return request.param


def text_of(path: Path) -> str:
    """The text of an example; of a notebook, that of its cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def parse(program: str, arguments: list[str]) -> None:
    """Raises an error if the program has no such command or option."""
    app = teacher_cache if program == "teacher-cache" else train_student
    commands = typer.main.get_command(app).commands
    if app is train_student and arguments[0] not in commands:
        arguments = ["train", *arguments]
    name, *arguments = arguments
    if name == "--help":
        return
    assert name in commands, f"{program} has no command {name}"
    commands[name].make_context(program, arguments)


def commands(text: str) -> list[tuple[str, list[str]]]:
    lines = [line for line in text.splitlines() if not re.match(r"\s*(- )?name:", line)]
    found = PROGRAM.findall("\n".join(lines).replace('"', " ").replace("[", " "))
    return [(program, shlex.split(rest.replace(",", " "))) for program, rest in found]


def test_every_command_exists(example):
    for program, arguments in commands(text_of(example)):
        if arguments and arguments[0] not in ("@", "&"):
            parse(program, [each for each in arguments if each not in ("&",)])


def test_commands_are_found_and_wrong_ones_refused():
    found = [each for path in EXAMPLES for each in commands(text_of(path))]
    assert len(found) >= 10
    with pytest.raises(AssertionError, match="no command biuld"):
        parse("teacher-cache", ["biuld", "teacher.yaml"])
    with pytest.raises(Exception, match="No such option: --dep"):
        parse("teacher-cache", ["verify", "cache", "--dep"])


def test_yaml_is_valid(example):
    if example.suffix == ".yaml":
        assert isinstance(yaml.safe_load(example.read_text()), dict)


def test_extras_exist(example):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"logitcask\[([\w,-]+)\]", example.read_text())
    assert {name for names in named for name in names.split(",")} <= set(extras)
