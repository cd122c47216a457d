"""The command ``student-rounds``: its table, its document, and one line for a user's mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitcask.cache_format.cli.config_file import load_config
from logitcask.rounds import cli
from logitcask.rounds.commands import overrides
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.run import Rounds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(rounds, tmp_path, monkeypatch, capsys):
    """``command(*arguments)``: the exit code, stdout and stderr of a run with one round."""
    config = rounds(count=1, steps_per_round=1)
    file = tmp_path / "rounds.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["student-rounds", str(file), *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run


def test_the_table_and_the_document(command, tmp_path):
    code, out, _ = command()
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["round", "written", "length"]
    assert lines[-1] == f"student: {tmp_path / 'run' / 'round-001' / 'student'}"
    code, out, _ = command("--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "rounds.json").read_text())


def test_the_report_alone(command, tmp_path):
    code, out, err = command("--report")
    assert (code, out) == (2, "")
    assert "holds no rounds (no state.json)" in err
    code, table, _ = command()
    page = (tmp_path / "run" / "rounds.html").read_text()
    (tmp_path / "run" / "rounds.html").unlink()
    assert command("--report")[:2] == (0, table)
    assert (tmp_path / "run" / "rounds.html").read_text() == page
    code, out, err = command("--report", "--restart")
    assert (code, out) == (2, "")
    assert "choose one of both" in err
    assert (tmp_path / "run" / "state.json").exists()


def test_mistakes_are_one_line(command):
    for arguments, said in [
        (("rounds.count=0",), "rounds.count"),
        (("rounds.conut=2",), "did you mean count?"),
        (("teacher_config=nowhere.yaml",), "there is no such file"),
        (("rounds.on_policy_fraction=-1",), "rounds.on_policy_fraction"),
        (("rounds.on_policy_fraction=0",), "rounds: on_policy_fraction is 0"),
    ]:
        code, out, err = command(*arguments)
        assert code == 2
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert err.startswith("error: ")
        assert said in err


@pytest.mark.parametrize(
    "name", ["quickstart", "policy-gradient", "skd", "distillm-2", "dpkd", "comd"]
)
def test_the_configs_that_come_along(name, monkeypatch):
    from logitcask.pipeline.config import BuildConfig
    from logitcask.train.config import TrainConfig

    monkeypatch.chdir(ROOT)
    config = load_config(RoundsConfig, Path(f"rounds/configs/{name}.yaml"), [])
    build = load_config(BuildConfig, config.teacher_config, [])
    assert build.data.generate is not None
    rounds = Rounds(config, [])
    of_round = {
        "cache": rounds.mixture(1),
        "cache_config": None,
        "part.until": 1,
        "training.max_steps": 1,
    }
    student = load_config(TrainConfig, config.student_config, overrides(of_round))
    assert {entry.label for entry in student.caches} >= {
        "text",
        "teacher-1" if name == "comd" else "round-1",
    }
    text = load_config(BuildConfig, Path(rounds.student["cache_config"]), [])
    assert str(text.output) == rounds.text
