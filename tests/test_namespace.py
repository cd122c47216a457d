"""One import name, ``logitcask``, which no folder of a user's own can shadow: installed for
development and from a wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import logitcask

ROOT = Path(__file__).parents[1]
SNIPPET = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
MODEL = """
from types import SimpleNamespace
import torch
weight = torch.zeros(3000, requires_grad=True)
model = lambda ids, attention_mask: SimpleNamespace(logits=weight.expand(*ids.shape, -1))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Folder into which a wheel of this tree is installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder,
            _copy_of_the_tree(folder),
        ],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", built], check=True)
    return folder / "site"


def _copy_of_the_tree(folder: Path) -> Path:
    """What git keeps of it: a build leaves files in the folder it builds."""
    keep = (
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "cache_format",
        "logitcask",
        "pipeline",
        "train",
        "rounds",
    )
    for name in keep:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source,
                target,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
            )
        else:
            shutil.copy(source, target)
    return folder / "source"


@pytest.fixture
def somebodys_folder(tmp_path) -> Path:
    """A repository as there are many, whose names are those of the packages here."""
    for name in ("train.py", "cache_format.py", "pipeline/__init__.py", "tests/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    return tmp_path


@pytest.fixture(params=["editable", "wheel"])
def run(request, somebodys_folder):
    """Runs Python there; with the tree at hand, or with what the wheel has installed."""
    place = request.getfixturevalue("wheel") if request.param == "wheel" else ROOT

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=somebodys_folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = Path(run("-c", "import logitcask.train; print(logitcask.__file__)").strip())
    assert found.is_relative_to(place)
    return run


def test_the_snippet_of_the_readme(run, somebodys_folder):
    build = [
        "teacher.model=synthetic",
        "teacher.backend=synthetic",
        "teacher.vocab_size=3000",
        "data.path=python-docs",
    ]
    build += [
        "data.max_tokens=2000",
        "data.max_length=128",
        "output=caches/quickstart",
        "audit.sequences=0",
    ]
    (somebodys_folder / "build.yaml").write_text("store: {top_k: 8}\n")
    run("-c", "from logitcask.pipeline.cli import main; main()", "build", "build.yaml", *build)
    assert run("-c", f"{MODEL}{SNIPPET}\nprint(loss.item())").strip()


@pytest.mark.parametrize(
    "module", ["logitcask.train", "logitcask.train.losses", "logitcask.pipeline.config"]
)
def test_modules_that_run(run, module):
    assert run("-m", module, *(["--help"] if module == "logitcask.train" else []))


def test_public_names():
    """What other people import; a name that goes is a breaking change."""
    assert set(logitcask._HOMES) < set(logitcask.__all__)
    assert {getattr(logitcask, name) is not None for name in logitcask.__all__} == {True}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = logitcask.nothing


def test_reading_loads_no_torch():
    code = "import sys; from logitcask import CacheReader; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "False\n"
    )


def test_one_name_for_every_module():
    """``import train`` works in this folder, and would be a second copy of ``logitcask.train``."""
    second = re.compile(r"^\s*(?:from|import) (?:cache_format|pipeline|train)\b", re.MULTILINE)
    found = [
        f"{file.relative_to(ROOT)}: {match[0].strip()}"
        for folder in ("cache_format", "pipeline", "train", "logitcask", "tests", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (match := second.search(file.read_text()))
    ]
    assert not found
