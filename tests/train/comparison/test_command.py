"""``train-student compare``: its tables, its document, and its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from logitcask.cache_format.errors import UserError
from logitcask.train.cli import app
from tests.train.comparison.conftest import ORDER


def command(*words):
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_the_tables_have_the_numbers_of_the_runs(make_run, tmp_path):
    folders = [make_run("a", seed=1), make_run("b", seed=2), make_run("c", level=0.3, config={"training.max_steps": 9})]  # fmt: skip
    out = tmp_path / "page.html"
    done = command(*folders, "--base", folders[1], "--out", out)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:3] == ["run 1   a", "run 2   b (base)", "run 3   c"]
    assert max(map(len, lines)) <= 90
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    for name in ORDER:
        row = next(line for line in lines if line.startswith(f"{name} "))
        values = [each["after"][name] for each in metrics]
        less = name in ("kl", "reverse_kl", "ce", "perplexity", "ece")
        best = (min if less else max)(values)
        assert row.split()[1:4] == [f"{v:.4f}" + "*" * (v == best) for v in values]
    assert re.search(r"^bytes +175,000 +175,000 +175,000$", done.stdout, re.MULTILINE)
    third = done.stdout.split("run 3 minus run 2, paired by sequence, 1,000 resamples")[1]
    row = next(line for line in third.splitlines() if line.startswith("kl "))
    assert row.split()[1] == f"{metrics[2]['after']['kl'] - metrics[1]['after']['kl']:.4f}"
    assert "of a, b" in done.stdout
    assert "  training.max_steps\n    6  (run 1, 2)\n    9  (run 3)\n" in done.stdout
    assert done.stdout.endswith(f"page: {out}\n")
    assert "<h1>3 runs compared</h1>" in out.read_text()


def test_the_document(make_run):
    folders = [make_run("a"), make_run("b", reference="q" * 64)]
    done = command(*folders, "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"base", "seed", "resamples", "judged_on", "runs", "seeds", "config", "notes", "page"}  # fmt: skip
    assert found["page"] is None
    assert found["runs"][1]["difference"] is None
    assert found["runs"][0]["metrics"]["kl"]["low"] < found["runs"][0]["metrics"]["kl"]["high"]
    assert "note: The runs were judged on 2 different held-out texts" in command(*folders).stdout


def test_control_characters_do_not_reach_the_terminal(make_run):
    done = command(make_run("a\x1b[31m\u202e"), make_run("b", config={"training.x": "\x07\x1b]0;t"}))  # fmt: skip
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", done.stdout)
    assert "a\\x1b[31m\\u202e" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "expected two or more"),
        (["{a}", "{b}", "--base", "{a}/.."], "which is none of the compared runs; name one of a, b"),
        (["{a}", "{b}", "--out", "{a}"], "is a folder"),
        (["{a}", "{b}", "--out", "{a}/metrics.json"], "is not a report of logitcask"),
        (["{a}", "{b}", "--out", "{a}/no/page.html"], "expected a file in a folder that exists"),
    ],
)  # fmt: skip
def test_errors(make_run, words, message):
    places = {"a": make_run("a"), "b": make_run("b")}
    done = command(*(word.format(**places) for word in words))
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_torch_is_not_imported(make_run):
    """So that the command starts at once."""
    program = (
        "import sys; from logitcask.train.cli import app\n"
        "try: app(['compare', *sys.argv[1:]], standalone_mode=False)\n"
        "finally: assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    folders = [str(make_run(name)) for name in "ab"]
    subprocess.run([sys.executable, "-c", program, *folders], check=True, capture_output=True)
