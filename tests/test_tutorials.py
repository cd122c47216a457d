"""The tutorials and other pages with commands in docs/, as a newcomer follows them: every file and every command of a page, in
order, in an empty folder, with the output that the page shows.

Blocks: ```` ```sh ```` holds lines ``$ command`` (lines beginning with ``> `` continue it, and a
here document ends at its word) with the output below. Any other block that begins with a comment
``# NAME`` is the file NAME. A line ``...`` stands for any number of lines of output.

Comparison: words and whole numbers (counts of rows, sequences, tokens, shards; ranks; exit codes)
must be equal. Digits may differ in numbers with a decimal point, in percentages, in amounts of
bytes, in speeds and in hashes. So may the amount of space between words, because columns follow the
width of numbers. The empty folder is called /home/you/tutorial on the pages.

The commands run in Bash. Its ``teacher-cache``, ``train-student`` and ``python`` are forks of this
process, because a new interpreter needs 10 seconds to import torch and transformers. After a change
of messages, ``pytest tests/test_tutorials.py --write-transcripts`` writes the new output into the
pages; read the difference.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import logitcask.train.run  # noqa: F401  imported once, for all forks
from logitcask.cache_format.catalog import listing
from logitcask.cache_format.runtime import progress
from logitcask.pipeline.cli import main as teacher_cache
from logitcask.train.cli import main as train_student

ROOT = Path(__file__).parents[1]
CHATS, COMPARE, CLUSTERS = (
    ROOT / "docs" / f"tutorial-{name}.md" for name in ("chats", "compare", "clusters")
)
START = ROOT / "docs" / "start.md"
BY_THEMSELVES = ("own-teacher", "sparse-losses", "why-draws")
AFTER_START = ("choose-store", "own-loop", "record", "resume", "share")
"""Pages that begin in the folder of START, after its build."""
STORES = ("draws", "heads")
PROGRAMS: dict[str, Callable[[], object]] = {
    "teacher-cache": teacher_cache,
    "train-student": train_student,
    "python": lambda: _python(),
}

_FREE = re.compile(
    r"-?\d[\d,]*\.\d+(?:e[-+]?\d+)?%?"  # decimals
    r"|\d+e[-+]?\d+|\d[\d,]*%"
    r"|\d[\d,]*(?= bytes|-[\d,]+ bytes| tokens/s)"
    r"|(?<=\"bytes\": )\d+"
    r"|\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b"  # hashes
)
"""Digits that may differ from the page."""

_UNIT = re.compile(r"(?<=\d) ?[kMGT]B\b")
"""Units of bytes: another disk has free space of another size."""


@dataclass(frozen=True)
class Command:
    """A command of a page. ``output``: the lines below it. ``place``: the line behind the command,
    from 0, at which they begin.
    """

    text: str
    output: list[str]
    place: int


@dataclass(frozen=True)
class File:
    """A file of a page."""

    name: str
    text: str


def steps(page: str) -> Iterator[Command | File]:
    """The files and commands of a page, in order."""
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        kind = re.fullmatch(r"```(\w+)", lines[at])
        if not kind:
            at += 1
            continue
        end = lines.index("```", at + 1)
        name = re.fullmatch(r"# (\S+\.\w+)", lines[at + 1])
        if kind[1] == "sh":
            yield from _commands(lines, at + 1, end)
        elif name:
            yield File(name[1], "\n".join(lines[at + 1 : end]) + "\n")
        at = end + 1


def _commands(lines: list[str], at: int, end: int) -> Iterator[Command]:
    while at < end:
        assert lines[at].startswith("$ "), f"line {at + 1}: a block begins with a command"
        text, at = [lines[at][2:]], at + 1
        if here := re.search(r"<<'(\w+)'", text[0]):
            close = lines.index(here[1], at)
            text, at = [*text, *lines[at : close + 1]], close + 1
        while at < end and lines[at].startswith("> "):
            text, at = [*text, lines[at][2:]], at + 1
        place = at
        while at < end and not lines[at].startswith("$ "):
            at += 1
        yield Command("\n".join(text), lines[place:at], place)


def same(found: list[str], shown: list[str]) -> bool:
    """Whether a command's output is the one that a page shows."""
    found, shown = ([_comparable(line) for line in each] for each in (found, shown))
    patterns = [r"(?:.*\n)*?" if line == "..." else re.escape(f"{line}\n") for line in shown]
    return re.fullmatch("".join(patterns), "".join(f"{line}\n" for line in found)) is not None


def _comparable(line: str) -> str:
    return " ".join(_FREE.sub("NUMBER", _UNIT.sub(" bytes", line)).split())


class Shell:
    """Bash in the current folder, with the programs of a page as forks of this process."""

    def __init__(self, folder: Path) -> None:
        self._address = str(folder / "socket")
        client = [sys.executable, "-ISc", _CLIENT, self._address]
        for name in PROGRAMS:
            (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join([*client, name])} "$@"\n')
            (folder / name).chmod(0o755)
        self._path = f"{folder}{os.pathsep}{os.environ['PATH']}"

    def run(self, command: str) -> tuple[int, list[str]]:
        """Exit code, and the lines of stdout and stderr in their order."""
        with socket.socket(socket.AF_UNIX) as server, open(f"{self._address}.out", "w+") as out:
            server.bind(self._address)
            server.listen()
            server.settimeout(0.05)
            environment = {**os.environ, "PATH": self._path}
            bash = subprocess.Popen(
                ["bash", "-c", command], stdout=out, stderr=subprocess.STDOUT, env=environment
            )
            children = []
            while bash.poll() is None:
                try:
                    connection = server.accept()[0]
                except TimeoutError:
                    continue
                with connection:
                    children.append(_serve(connection))
            for child in children:
                os.waitpid(child, 0)
            os.remove(self._address)
            out.seek(0)
            text = out.read().replace(str(Path.cwd()), "/home/you/tutorial")
            return bash.returncode, text.splitlines()


_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(asked).encode()
    socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(message)
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""
"""The program that Bash starts: hands its arguments, folder and streams to the test, and waits for
an exit code."""


def _serve(connection: socket.socket) -> int:
    """Runs one program in a grandchild. The child waits for it, and sends its exit code. Returns
    the child's process id.
    """
    connection.setblocking(True)
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    message = b""
    while len(message) < int.from_bytes(size, "big"):
        message += connection.recv(1 << 16)
    if child := os.fork():
        for stream in streams:
            os.close(stream)
        return child
    try:
        program = os.fork()
        if not program:
            os._exit(_program(json.loads(message), streams))
        for stream in (*streams, 1, 2):
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    finally:
        os._exit(1)  # never back into the tests


def _program(asked: dict, streams: list[int]) -> int:
    """The exit code of a program, run in this process with these streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  lines, as on a terminal
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.getLogger().handlers.clear()
    os.chdir(asked["folder"])
    name, *options = asked["arguments"]
    if name == "teacher-cache" and "ray" in sys.modules:
        # gRPC waits for ever in a fork of a process that has used it: a program of its own.
        command = [sys.executable, "-c", _TEACHER_CACHE, *options]
        os.execve(sys.executable, command, asked["environment"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["arguments"]
    try:
        PROGRAMS[sys.argv[0]]()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


_TEACHER_CACHE = """
import sys
from logitcask.cache_format.runtime import progress
from logitcask.pipeline.cli import main
progress.EVERY_SECONDS = 1e9
sys.argv[0] = "teacher-cache"
main()
"""


def _python() -> None:
    """``python FILE``."""
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture
def follow(user_folder, tmp_path_factory, monkeypatch, request) -> Callable[[Path], None]:
    """``follow(page)``: runs a page and compares its output, or writes it into the page."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 1e9)  # no line that depends on the load
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path_factory.mktemp("shards")))
    shell = Shell(tmp_path_factory.mktemp("bin"))

    def run(page: Path) -> None:
        write = request.config.getoption("--write-transcripts") and page.parent == ROOT / "docs"
        lines, added = page.read_text().splitlines(), 0
        for step in steps(page.read_text()):
            if isinstance(step, File):
                (user_folder / step.name).write_text(step.text)
                continue
            code, found = shell.run(step.text)
            shown = "\n".join(["$ " + step.text, *found])
            assert code == 0, f"exit code {code}:\n{shown}"
            if write and not same(found, step.output):
                place = step.place + added
                lines[place : place + len(step.output)] = found
                added += len(found) - len(step.output)
                page.write_text("\n".join(lines) + "\n")
            else:
                assert same(found, step.output), (
                    f"{page.name} shows another output; found:\n{shown}"
                )

    return run


def test_the_comparison():
    shown = ["size 1,200 bytes in 2 shards, 3.5 bytes per token", "...", "exit code 2"]
    same_size = "size  900 bytes in 2 shards, 12.25 bytes per token"
    assert same([same_size, "exit code 2"], shown)
    assert same([same_size, "more", "and more", "exit code 2"], shown)
    assert not same([same_size.replace("2 shards", "3 shards"), "exit code 2"], shown)
    assert not same([same_size.replace("bytes per", "B per"), "exit code 2"], shown)
    assert not same([same_size, "exit code 1"], shown)
    assert not same([same_size], shown)
    assert not same([same_size, "exit code 2", "more"], shown)
    assert same(["56.9GB free", "0.5 1e-05 35.2%"], ["1.1TB free", "-1.5 2.5e-7 9%"])
    assert not same(["kl 0.5"], ["ce 0.5"])


def test_a_page_becomes_files_and_commands():
    page = "```yaml\n# a.yaml\nx: 1\n```\n\n```yaml\nno: file\n```\n```sh\n$ cat > b <<'END'\n$ x\n"
    page += "END\n$ for i in 1; do\n>   echo 1\n> done\n1\n```\n"
    file, here, loop = steps(page)
    assert file == File("a.yaml", "# a.yaml\nx: 1\n")
    assert (here.text, here.output) == ("cat > b <<'END'\n$ x\nEND", [])
    assert (loop.text, loop.output) == ("for i in 1; do\n  echo 1\ndone", ["1"])
    assert page.splitlines()[loop.place] == "1"


def test_a_changed_message_fails(follow, tmp_path):
    config = "teacher: {model: synthetic}\ndata: {path: none.txt}\noutput: cache\n"
    page = tmp_path / "page.md"
    command = "$ teacher-cache build a.yaml data.paht=b; echo $?\n"
    message = "error: a.yaml: unknown key data.paht; did you mean path?\n2\n"
    page.write_text(f"```yaml\n# a.yaml\n{config}```\n```sh\n{command}{message}```\n")
    follow(page)
    for old, new in (("did you mean", "perhaps"), ("\n2\n", "\n3\n")):
        page.write_text(page.read_text().replace(old, new))
        with pytest.raises(AssertionError, match=r"found:\n.*\n.*did you mean path\?\n +2"):
            follow(page)
        page.write_text(page.read_text().replace(new, old))
    page.write_text("```sh\n$ teacher-cache info nothing\n```\n")
    with pytest.raises(AssertionError, match=r"exit code 2:\n.*\n.*nothing holds no cache"):
        follow(page)


def test_chats(follow):
    follow(CHATS)


def test_compare(follow, user_folder):
    follow(COMPARE)
    # The prose of the page: the poorer store is worse by more than the seeds, and not by
    # chance.
    kl = {}
    for file in user_folder.glob("runs/*_kl-?/metrics.json"):
        kl[file.parent.name] = json.loads(file.read_text())["after"]["kl"]
    assert len(kl) == 8
    for loss in ("forward_kl", "reverse_kl"):
        draws, heads = ([kl[f"{store}-{loss}-{seed}"] for seed in (0, 1)] for store in STORES)
        assert max(draws) + 0.1 < min(heads)
        assert max(abs(first - second) for first, second in (draws, heads)) < 0.1
    document = json.loads((user_folder / "evaluation.json").read_text())
    assert document["difference"]["kl"]["high"] < -0.2


def test_catalog(follow, monkeypatch):
    monkeypatch.setattr(listing, "span", lambda seconds: "now")  # whatever the load
    follow(ROOT / "docs" / "catalog.md")


def test_clusters(follow, s3):
    pytest.importorskip("ray")
    follow(CLUSTERS)


def test_start(follow):
    follow(START)


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_a_page_by_itself(name, follow):
    follow(ROOT / "docs" / f"{name}.md")


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """The folder of START after its build, with all its files."""
    folder = tmp_path_factory.mktemp("started")
    commands = []
    for step in steps(START.read_text()):
        if isinstance(step, File):
            (folder / step.name).write_text(step.text)
        else:
            commands.append(step.text)
    text, build = commands[:2]
    assert (text, build) == ("python make_text.py", "teacher-cache build teacher.yaml")
    shell = Shell(tmp_path_factory.mktemp("bin"))
    for command in (text, f"{build} --quiet"):
        code, found = shell.run(f"cd {shlex.quote(str(folder))} && {command}")
        assert code == 0, found
    return folder


@pytest.mark.parametrize("name", AFTER_START)
def test_a_page_after_the_start(name, follow, started, user_folder):
    shutil.copytree(started, user_folder, dirs_exist_ok=True)
    follow(ROOT / "docs" / f"{name}.md")


@pytest.mark.parametrize("name", ["index", "api", "start", *BY_THEMSELVES, *AFTER_START])
def test_every_block_of_a_page_runs(name):
    """No block is only to be looked at: it is a file that has a name, or commands."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    idle = [text for kind, text in blocks if kind != "sh" and not re.match(r"# \S+\.\w+\n", text)]
    assert idle == []
