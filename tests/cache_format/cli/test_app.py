"""How a command ends where an optional package is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from logitcask.cache_format.cli import app as command

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
