"""A sweep trains every combination once, as single trainings would, and goes on where it stopped."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml
from typer.testing import CliRunner

from logitcask.cache_format.errors import UserError
from logitcask.train.cli import app
from logitcask.train.commands.sweep import combinations, without_seeds
from logitcask.train.run import train

LOSSES = "losses=[[{name: forward_kl}], [{name: ranking, k: 3}]]"


@pytest.fixture
def file(config, tmp_path):
    settings = config(training={"max_steps": 2, "output_dir": str(tmp_path / "runs")})
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return path


def command(*words):
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


def test_every_combination_is_the_training_of_its_config(file, config, tmp_path):
    done = command(file, "--over", LOSSES, "--over", "training.seed=[1, 2]", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [run["name"] for run in found["runs"]] == [
        "losses=forward_kl-seed=1",
        "losses=forward_kl-seed=2",
        "losses=ranking+3-seed=1",
        "losses=ranking+3-seed=2",
    ]
    alone, _ = train(
        config(
            losses=[{"name": "ranking", "k": 3}],
            training={"max_steps": 2, "seed": 2, "output_dir": str(tmp_path / "alone")},
        )
    )
    assert found["runs"][3]["after"] == alone["after"]
    kl = [run["after"]["kl"] for run in found["runs"]]
    assert len(set(kl)) == 4
    assert found["groups"][1]["values"] == {"losses": [{"name": "ranking", "k": 3}]}
    assert found["groups"][1]["after"]["kl"] == {
        "mean": statistics.fmean(kl[2:]),
        "deviation": statistics.stdev(kl[2:]),
    }

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    again = command(file, "--over", LOSSES, "--over", "training.seed=[1, 2]")
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times, "finished runs are reused"
    (row,) = (
        line for line in again.stdout.splitlines() if line.startswith("losses=ranking+3-seed=2")
    )
    assert row.split()[1] == f"{kl[3]:.4f}"
    assert f"kl {statistics.fmean(kl[:2]):.4f} ±{statistics.stdev(kl[:2]):.4f}" in again.stdout


def test_a_run_that_fails_does_not_end_the_sweep(file, tmp_path):
    done = command(
        file, "--over", "training.learning_rate=[1.0e+30, 1.0e-3]", "training.max_grad_norm=0"
    )
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("1 of 2 runs failed: learning_rate=1e+30; ")
    assert "failed: the student has diverged" in done.stdout
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/metrics.json")] == [
        "learning_rate=0.001"
    ]


def test_the_list_trains_nothing(file, tmp_path):
    done = command(file, "--over", "training.seed=[1, 2]", "--list")
    assert done.stdout.split() == [str(tmp_path / "runs" / f"seed={seed}") for seed in (1, 2)]
    assert not (tmp_path / "runs").exists()


def test_a_wrong_value_is_found_before_the_first_run(file, tmp_path):
    done = command(file, "--over", "losses=[[{name: forward_kl}], [{name: forwardkl}]]")
    assert isinstance(done.exception, UserError)
    assert "forwardkl" in str(done.exception)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing varies"),
        (["training.seed"], "expected a field and a list of its values"),
        (["training.seed=1"], "expected a field and a list of its values"),
        (["training.seed=[]"], "expected a field and a list of its values"),
        (["training.seed=[1"], "is not YAML"),
        (["training.seed=[1, 1]"], "has a value twice"),
        (["training.seed=[1]", "training.seed=[2]"], "names training.seed twice"),
    ],
)
def test_what_is_no_field_with_values_is_refused(over, message):
    with pytest.raises(UserError, match=message):
        combinations(over)


def test_names_that_would_be_the_same_are_numbered():
    long = ["a" * 50 + end for end in "xy"]
    found = combinations([f"cache={[f'{name}/{name[:1]}' for name in long]}"])
    assert [run.name[-3:] for run in found] == ["x_a", "y_a"], "the end tells them apart"
    same = combinations(["student.dtype=[a b, a_b]"])
    assert [run.name for run in same] == ["0-dtype=a_b", "1-dtype=a_b"]


def test_one_run_has_no_deviation():
    run = {"values": {"training.seed": 0}, "after": {"kl": 1.5}}
    assert without_seeds([run, {"values": {"training.seed": 1}, "error": "x"}]) == [
        {"values": {}, "runs": 1, "after": {"kl": {"mean": 1.5, "deviation": None}}}
    ]
    assert without_seeds([{"values": {"k": 1}, "after": {"kl": 1.5}}]) == []
