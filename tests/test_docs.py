"""The documents name files, tests and ``logitcask.*`` names that exist, and link to what is
there.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from logitcask.cache_format.runtime.extensions import LOSS, SOURCE, TEACHER

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache_format", "pipeline", "train", "rounds")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cache_format/SPEC.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PATH = re.compile(
    r"(?<![\w/.-])(?:cache_format|pipeline|train|rounds|tests|benchmarks|docs)(?:/[\w.-]+)+"
)
SUFFIXES = {".py", ".md", ".yaml", ".json", ".jinja", ".svg", ".png", ".txt"}
TEST = re.compile(r"(?<![\w/])(test_\w+)(\.py)?(?!\w)")
NAME = re.compile(r"(?<![\w.-])logitcask(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request) -> Path:
    return request.param


def test_links_lead_to_files(document):
    targets = [
        target.partition("#")[0]
        for target in LINK.findall(document.read_text())
        if "://" not in target
    ]
    assert [
        target for target in targets if target and not (document.parent / target).exists()
    ] == []


def test_paths_exist(document):
    named = {path.rstrip(".") for path in PATH.findall(document.read_text())}
    files = {
        path for path in named if Path(path).suffix in SUFFIXES and "results/gpu.json" not in path
    }  # a GPU's own
    assert sorted(path for path in files if not (ROOT / path).exists()) == []


def test_tests_exist(document):
    """Files of tests by their bare names, test functions, and beginnings of these followed by a
    star.
    """
    paths = list((ROOT / "tests").rglob("*.py"))
    files, source = {path.name for path in paths}, "\n".join(path.read_text() for path in paths)
    missing = [
        name + suffix
        for name, suffix in TEST.findall(document.read_text())
        if (f"{name}.py" not in files if suffix else f"def {name}" not in source)
    ]
    assert missing == []


def test_python_names_exist(document):
    groups = {kind.group for kind in (LOSS, TEACHER, SOURCE)}  # of entry points
    names = set(NAME.findall(document.read_text())) - groups
    assert sorted(name for name in names if not _exists(name)) == []


def _exists(name: str) -> bool:
    """Whether ``name`` is a module, or its last part a word of the module before it. Nothing is
    imported.
    """
    *parents, last = name.split(".")
    module = ROOT.joinpath(*parents)
    if (module / last).is_dir() or (module / f"{last}.py").exists():
        return True
    sources = [
        path for path in (module.with_suffix(".py"), module / "__init__.py") if path.exists()
    ]
    return any(re.search(rf"\b{last}\b", path.read_text()) for path in sources)


def test_the_map_names_every_module():
    """CONTRIBUTING.md's tree: a line for every folder, and under it one for every file."""
    tree = re.search(
        r"```\n(cache_format/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )[1]
    named, folder = set(), ""  # a file of a package is two columns in, one of a folder four
    for line in tree.splitlines():
        word = line.split()[0]
        if word.endswith("/"):
            folder = f"{folder.split('/')[0]}/{word}" if line.startswith(" ") else word
        else:
            named.add(folder + word)
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(files - named) == []


def test_troubleshooting_quotes_messages_that_exist():
    """Each heading of the page is a message of the code, with ``...`` for what is filled in."""
    messages = []
    for file in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                messages.append("\0".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(headings) > 20
    unknown = [
        heading
        for heading in headings
        if not any(
            re.search(".*".join(map(re.escape, heading.split("..."))), text, re.DOTALL)
            for text in messages
        )
    ]
    assert unknown == []
