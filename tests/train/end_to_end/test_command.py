"""``train-student`` in a script: its document, and what it says where nobody looks."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from logitcask.train.cli import main
from tests.train.conftest import scratch

DOCS = Path(__file__).parents[3] / "docs" / "scripts.md"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """``run(config, *options)``: (exit code, stdout, stderr) of ``train-student``."""
    monkeypatch.setattr(logging.root, "handlers", [])

    def call(config, *options):
        file = tmp_path / "student.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        monkeypatch.setattr(sys, "argv", ["train-student", str(file), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        logging.root.handlers.clear()
        return int(stop.value.code or 0), *capfd.readouterr()

    return call


def documented(command):
    (keys,) = re.findall(rf"^\| `{command}` \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    return re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", keys))


def test_json(write_cache, scratch_config, run):
    """One document, of a run that is trained now or was before, equal to its files and its table."""
    cache = str(write_cache("sound", shards=1, sequences=20).path)
    config = scratch_config(cache=cache, cache_config="teacher.yaml")
    code, stdout, _ = run(config, "--json")
    first = json.loads(stdout)
    assert code == 0
    assert list(first) == documented("train-student")
    output = Path(config.output_dir)
    assert first["metrics"] == json.loads((output / "metrics.json").read_text())
    assert (first["student"], first["report"]) == (str(output), str(output / "report.html"))
    assert not first["trained_before"]
    again = json.loads(run(config, "--json")[1])
    assert again == {**first, "trained_before": True}
    text = run(config)[1]
    for name, value in first["metrics"]["after"].items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert line.split()[2] == f"{value:,.4f}"
    assert run(config, "--quiet") == (0, "", "")
    found = json.loads(run(config, "--json", "--report")[1])
    assert found == {"report": first["report"]}
    assert list(found) == documented("train-student --report")
    found = json.loads(run(config, "--json", "--print-cache-config")[1])
    assert found == {"cache_config": "teacher.yaml"}
    assert list(found) == documented("train-student --print-cache-config")


COMMANDS = """
import sys
from logitcask.cache_format.runtime import progress
from logitcask.pipeline.cli import main as teacher_cache
from logitcask.train.cli import main as train_student
progress.EVERY_SECONDS = 0.0
build, student, *options = sys.argv[1:]
for main, words in ((teacher_cache, ["build", build]), (train_student, [student])):
    sys.argv = ["command", *words, *options]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
"""
OURS = r"""
starting the teacher: \S+ with transformers
(tokenise|teacher|audit|evaluate|train): [\d.]+k?( of [\d.]+k?)? (tok|seq|batch|step), .* so far.*
beyond the heads stored in \S+, KL uses tail samples \(unbiased\)
with this cache, forward_kl is unbiased over the draws
checkpoints: about .* free
"""


def test_what_is_said_without_a_terminal(tiny_llama, scratch_student, tmp_path, command):
    """Lines of our own, without carriage returns, although torch, transformers and the loader's
    processes are at work; with --quiet nothing.
    """
    build = {
        "teacher": {"model": str(tiny_llama), "backend": "transformers"},
        "data": {"path": "python-docs", "max_length": 64, "max_tokens": 3000},
        "store": {"top_k": 16},
        "output": str(tmp_path / "cache"),
    }
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 3, "use_cpu": True}
    training |= {"dataloader_num_workers": 1, "per_device_train_batch_size": 4}
    student = {
        "cache": build["output"],
        "student": {"init_from": str(scratch_student(tied=True)), "keep_layers": [0]},
        "losses": [{"name": "forward_kl"}],
        "evaluation": {"held_out": 0.2},
        "training": {**training, "logging_steps": 1},
    }
    files = [tmp_path / "build.yaml", tmp_path / "student.yaml"]
    for file, content in zip(files, (build, student), strict=True):
        file.write_text(yaml.safe_dump(content))
    done = subprocess.run([sys.executable, "-c", COMMANDS, *map(str, files)], capture_output=True)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert b"\r" not in done.stderr + done.stdout
    lines = said.splitlines()
    ours = [pattern for pattern in OURS.splitlines() if pattern]
    assert not [line for line in lines if not any(re.fullmatch(each, line) for each in ours)]
    for pattern in ours:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
    assert [line for line in lines if line.startswith("train: 3 of 3 step")]
    quiet = command(lambda: exec(COMMANDS, {}), *files, "--quiet", "--restart")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_an_error_of_the_program_is_exit_3_and_shown(run, scratch_config, monkeypatch, write_cache):
    config = scratch_config(cache=str(write_cache("sound", shards=1).path), student=scratch())

    def fail(*_, **__):
        raise ZeroDivisionError("mistaken")

    monkeypatch.setattr("logitcask.train.run.train", fail)
    code, stdout, stderr = run(config)
    assert (code, stdout) == (3, "")
    assert "Traceback" in stderr
    assert "ZeroDivisionError: mistaken" in stderr
    assert stderr.splitlines()[-1].startswith("error: this is an error of logitcask itself")
