"""Several processes on one home: two builders of one cache, and kills of builders and collectors."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache_format import CacheReader
from logitcask.cache_format.catalog import claims
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.catalog.listing import listing
from logitcask.cache_format.catalog.removal import garbage, remove, tidy
from logitcask.cache_format.verify import verify
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(claims, "POLL", 0.01)
    return Home(tmp_path / "home")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., BuildConfig]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} of a text"}) + "\n" for i in range(80)))

    def make(output: str, **store: Any) -> BuildConfig:
        return BuildConfig(
            teacher={"model": "synthetic", "vocab_size": 300},
            data={"path": str(rows)},
            store={"shard_tokens": 300, **store},
            audit={"sequences": 0},
            log=False,
            output=tmp_path / output,
        )

    return make


@pytest.fixture
def builder(home, tmp_path, fork, monkeypatch):
    """``builder(config)``: a process that builds, and its folder of notes: ``scoring`` once its
    teacher has scored a shard, ``waiting`` once it waits for another process, ``result`` at the
    end. A teacher goes on when ``tmp_path / "go"`` exists.
    """

    def start(config: BuildConfig, name: str) -> tuple[Any, Path]:
        notes = tmp_path / f"notes-{name}"
        notes.mkdir()
        real, count = SyntheticTeacher.score, 0

        def score(self: Any, sequences: Any) -> Any:
            nonlocal count
            for each in real(self, sequences):
                count += 1
                if count == 40:
                    wait_for(config.folder / ".build" / "commits" / "shard-00000.json")
                    (notes / "scoring").touch()
                    wait_for(tmp_path / "go")
                yield each

        class Notes(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "is being built by process" in record.getMessage():
                    (notes / "draft").write_text(record.getMessage())
                    (notes / "draft").rename(notes / "waiting")

        def work() -> None:
            monkeypatch.setattr(SyntheticTeacher, "score", score)
            logging.getLogger("logitcask").addHandler(Notes())
            logging.getLogger("logitcask").setLevel(logging.INFO)
            result = build(config, home=home)
            found = {"tokens": result.tokens_scored, "content": result.manifest.content_sha256}
            (notes / "result").write_text(json.dumps(found))

        return fork(work), notes

    return start


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def result_of(notes: Path) -> dict[str, Any]:
    return json.loads((notes / "result").read_text())


@pytest.mark.parametrize("outputs", [("one", "two"), ("one", "one")])
def test_one_builds_and_the_other_waits_and_reuses(builder, config, home, tmp_path, outputs):
    first, notes_of_first = builder(config(outputs[0]), "first")
    wait_for(notes_of_first / "scoring")
    second, notes = builder(config(outputs[1]), "second")
    wait_for(notes / "waiting")
    assert f"is being built by process {first.pid} on " in (notes / "waiting").read_text()
    (tmp_path / "go").touch()
    for child in (first, second):
        child.join()
        assert child.exitcode == 0
    assert result_of(notes_of_first)["tokens"] > 0
    assert result_of(notes)["tokens"] == 0
    assert result_of(notes)["content"] == result_of(notes_of_first)["content"]
    assert len(listing(home)) == len(set(outputs))
    for output in outputs:
        assert verify(str(tmp_path / output), deep=True) == []


@pytest.mark.parametrize("outputs", [("one", "two"), ("one", "one")])
def test_when_the_first_is_killed_the_other_takes_over(builder, config, home, tmp_path, outputs):
    expected = build(config("alone")).manifest
    first, notes_of_first = builder(config(outputs[0]), "first")
    wait_for(notes_of_first / "scoring")
    second, notes = builder(config(outputs[1]), "second")
    wait_for(notes / "waiting")
    first.kill()
    first.join()
    (tmp_path / "go").touch()
    second.join()
    assert second.exitcode == 0
    found = result_of(notes)
    assert found["content"] == expected.content_sha256
    same_output = outputs[0] == outputs[1]
    assert (found["tokens"] < expected.statistics.tokens) == same_output
    assert found["tokens"] > 0
    assert [line.entry.where for line in listing(home)] == [str(tmp_path / outputs[1])]


def test_other_requests_do_not_wait(builder, config, tmp_path):
    first, notes_of_first = builder(config("one"), "first")
    wait_for(notes_of_first / "scoring")
    assert build(config("two", top_k=4), home=Home(tmp_path / "home")).tokens_scored > 0
    first.kill()
    first.join()


def test_random_kills_lose_and_double_nothing(home, config, tmp_path, fork, rng):
    """Builders, a collector and removals on one home, each killed at a random moment."""
    stores: list[dict[str, Any]] = [{}, {"top_k": 4}, {"seed": 3}]
    truth = [build(config(f"truth-{i}", **store)).manifest for i, store in enumerate(stores)]
    derived = build(config("x", **stores[1]), home=seeded(tmp_path, config)).manifest
    allowed = {each.content_sha256 for each in truth} | {derived.content_sha256}
    names = ["a", "b", "c", "d"]

    def a_build(at: int) -> None:
        build(config(names[at % 4], **stores[at % 3]), home=home)

    def a_collection(at: int) -> None:
        lines = listing(home)
        for line in garbage(lines, max_bytes=20_000).lines:
            remove(home, line.entry)
        tidy(home, lines)

    kills = 0
    for at in range(8):
        work = a_collection if at % 3 == 2 else a_build
        child = fork(lambda at=at, work=work: work(at))  # type: ignore[misc]
        child.join(rng.uniform(0, 0.6))
        kills += child.is_alive()
        child.kill()
        child.join()
        assert_right(home, tmp_path, names, allowed)
    assert kills
    for at in range(4):  # undisturbed
        shutil.rmtree(tmp_path / names[at], ignore_errors=True)
        a_build(at)
    a_collection(0)
    assert_right(home, tmp_path, names, allowed)
    left = sum(file.stat().st_size for name in names for file in (tmp_path / name).rglob("*.arrow"))
    listed = sum(line.entry.bytes for line in listing(home))
    assert left <= listed  # nothing lies around; files may be shared


def seeded(tmp_path: Path, config: Callable[..., BuildConfig]) -> Home:
    """Another home, with the cache that others are derived from."""
    other = Home(tmp_path / "other")
    build(config("origin"), home=other)
    return other


def assert_right(home: Home, tmp_path: Path, names: list[str], allowed: set[str]) -> None:
    """Every listed cache is whole and one of the expected, each place is listed once, and nothing
    that is whole was lost from the list but by a kill between manifest and entry.
    """
    lines = listing(home)
    places = [line.entry.where for line in lines]
    assert len(places) == len(set(places))
    for line in lines:
        if not line.gone:
            manifest = CacheReader(line.entry.where).manifest
            assert manifest.fingerprint == line.entry.fingerprint
            assert manifest.content_sha256 in allowed
            assert verify(line.entry.where) == []
    for name in names:
        if (tmp_path / name / "manifest.json").exists():
            assert verify(str(tmp_path / name)) == []
