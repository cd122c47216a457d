"""How both commands start and end: options, messages, exit codes, missing packages."""

from __future__ import annotations

import logging
import os
import re
import signal
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from logitcask.cache_format.cli import app as command
from logitcask.cache_format.errors import DamagedCacheError, UserError
from logitcask.cache_format.runtime.interruption import Stopped

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("datasets", "the package datasets is not installed; pip install 'logitcask[text]'"),
        ("ray.data", "the package ray is not installed; pip install 'logitcask[scale]'"),
        ("torch", "the package torch is not installed; pip install 'logitcask[train]'"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(module, says, monkeypatch, capsys):
    app = command.new_app("A command.")

    @app.command()
    def start() -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        command.run(app, extra="train")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {says}\n"


def test_the_extras_bring_the_packages_that_are_said_of_them():
    for package, extra in command._EXTRAS.items():
        names = [
            re.match(r"[A-Za-z0-9_-]+", each)[0].replace("-", "_")
            for each in PYPROJECT["optional-dependencies"][extra]
        ]
        assert package in names, f"{extra} does not bring {package}"


@pytest.fixture
def end(monkeypatch, capsys):
    """``end(work, *arguments, group=...)``: exit code, stdout and stderr of a program that does
    ``work``.
    """

    def run(work, *arguments, group=False):
        app = command.new_app("A program.", group=command.Group if group else None)

        @app.command()
        def start() -> None:
            work()

        monkeypatch.setattr("sys.argv", ["program", *arguments])
        with pytest.raises(SystemExit) as stop:
            command.run(app, extra="train")
        return stop.value.code, *capsys.readouterr()

    return run


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (DamagedCacheError("shard 3 is damaged"), 1, "error: shard 3 is damaged"),
        (UserError("no such loss"), 2, "error: no such loss"),
        (IsADirectoryError(21, "Is a directory", "x"), 2, "error: x: Is a directory"),
        (ZeroDivisionError("mistaken"), 3, "error: this is an error of logitcask itself"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
        (Stopped(signal.SIGINT), 130, "interrupted; run the same command again to go on"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM; run the same command again to go on"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
@pytest.mark.parametrize("group", [True, False])
def test_exit_codes(end, error, code, last, group):
    """Those of the table, with or without ``--debug``, which shows the traceback of an error."""
    words = ["start"] * group
    found, stdout, stderr = end(raising(error), *words, group=group)
    assert (found, stdout) == (code, "")
    assert found in command.EXIT_CODES
    assert (stderr.splitlines() or [""])[-1].startswith(last)
    assert ("Traceback" in stderr) == (code == 3)
    again, _, stderr = end(raising(error), *words, "--debug", group=group)
    assert again == code
    assert ("Traceback" in stderr) == (code <= 3)


def test_success_and_wrong_options(end):
    assert end(lambda: None) == (0, "", "")
    assert end(lambda: None, "--unheard-of")[0] == 2
    code, _, stderr = end(lambda: None, "--quiet", "--debug")
    assert (code, stderr.splitlines()[-1]) == (
        2,
        "error: --quiet and --debug contradict each other; leave out one",
    )


def test_sigterm_takes_effect_at_once_and_its_handler_is_restored(end):
    before = signal.getsignal(signal.SIGTERM)
    assert end(lambda: os.kill(os.getpid(), signal.SIGTERM))[0] == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("group", [True, False])
def test_help_and_version(end, group, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, said, _ = end(lambda: None, "--help", group=group)
    assert code == 0
    for number, meaning in command.EXIT_CODES.items():
        assert f"{number:5}  {meaning}" in said
    for option in ("--version", "--quiet", "--debug"):
        assert option in said
    of_command = end(lambda: None, "start", "--help", group=True)[1] if group else said
    for option in ("--json", "--quiet", "--debug"):
        assert option in of_command
    assert end(lambda: None, "--version", group=group)[:2] == (
        0,
        f"logitcask {version('logitcask')}\n",
    )


def test_the_table_of_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "scripts.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == command.EXIT_CODES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ["ours", "our warning", "their error"]),
        (["--quiet"], ["our error", "their error"]),
        (["--debug"], ["our detail", "ours", "our warning", "their warning", "their error"]),
    ],
)
def test_messages_of_libraries(end, monkeypatch, options, said):
    """Their errors only, unless debugging; levels and environment are as before afterwards."""
    ours, theirs = logging.getLogger("logitcask.test"), logging.getLogger("somebody.test")
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    seen = []

    def work():
        seen.append(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
        seen.append(os.environ.get("TRANSFORMERS_VERBOSITY"))
        ours.debug("our detail")
        ours.info("ours")
        ours.warning("our warning")
        if options == ["--quiet"]:
            ours.error("our error")
        warnings.warn("a warning", stacklevel=1)
        theirs.warning("their warning")
        theirs.error("their error")

    level = logging.root.level
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        code, _, stderr = end(work, *options)
    lines = [line for line in stderr.splitlines() if line.startswith(("our", "their"))]
    assert (code, lines) == (0, said)
    assert [str(each.message) for each in shown] == ["a warning"] * (options == ["--debug"])
    assert seen == ([None, None] if options == ["--debug"] else ["1", "error"])
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    assert logging.getLogger("logitcask").level == logging.NOTSET
    logging.root.handlers.clear()
    logging.root.setLevel(level)
