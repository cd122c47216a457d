"""The rejects file: every row that a build leaves out or cuts, also after kills."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.builder.planner import _GivenText
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import Generations
from logitcask.pipeline.text import rejects as rejects_module
from logitcask.pipeline.text.rejects import CUT, LEFT_OUT, Reject, Rejects, summary
from tests.pipeline.text.test_sources import json_lines

Lines = list[dict[str, Any]]


def read(file: Path) -> Lines:
    return [json.loads(line) for line in file.read_text().splitlines()]


def config(tmp_path: Path, **data: Any) -> BuildConfig:
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 40, **data},
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }
    return BuildConfig.model_validate(fields)


def chat(question: str, answer: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


CHATS: list[dict[str, Any]] = [
    chat("a", "b"),
    chat("a" * 99, "b"),
    chat("a", "b" * 99),
    chat("a", None),
    {"messages": None},
    {"messages": [{"role": "king", "content": "x"}]},
    chat("c", "d"),
]


def test_each_row_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json_lines(CHATS))
    settings = config(tmp_path, messages_field="messages")
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"max_length": 60})}
    )
    counters = build(settings).manifest.data.counters
    assert sorted(read(tmp_path / "cache.rejects.jsonl"), key=lambda line: line["id"]) == [
        {"id": "train/1", "reason": "prompt_too_long", "outcome": "skipped"},
        {"id": "train/2", "reason": "truncated", "outcome": "cut"},
        {"id": "train/3", "reason": "nothing_to_learn", "outcome": "skipped"},
        {"id": "train/4", "reason": "null", "outcome": "skipped"},
        {"id": "train/5", "reason": "unknown_role", "outcome": "skipped"},
    ]
    assert [s.sequence_id for s in CacheReader(tmp_path / "cache")] == [
        "train/0",
        "train/2",
        "train/6",
    ]
    assert summary(counters, settings.rejects_file()) == (
        "4 rows left out (1 null, 1 unknown_role, 1 nothing_to_learn, 1 prompt_too_long); 1 row cut (1 truncated); "
        f"named in {tmp_path / 'cache.rejects.jsonl'}"
    )
    assert not (tmp_path / "cache" / "cache.rejects.jsonl").exists()
    assert sorted(os.listdir(tmp_path)) == [
        "cache",
        "cache.log.jsonl",
        "cache.rejects.jsonl",
        "rows.jsonl",
    ]


@pytest.mark.parametrize("overlong", ["split", "truncate", "truncate_left", "drop"])
def test_the_lines_are_the_counters(
    tmp_path: Path, rng: np.random.Generator, overlong: str
) -> None:
    """Each row of the data is in the cache whole, or named."""
    texts: list[Any] = [None, "", 5, "x", "y" * 30, "z" * 90, "half \ud83d"]
    rows = [texts[i] for i in rng.integers(0, len(texts), 300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    manifest = build(config(tmp_path, overlong=overlong)).manifest
    lines = read(tmp_path / "cache.rejects.jsonl")
    expected = {
        None: "null",
        "": "empty",
        5: "not_a_string",
        "half \ud83d": "broken_unicode",
        "z" * 90: {"truncate": "truncated", "truncate_left": "truncated_left"}.get(
            overlong, "dropped_overlong"
        ),
    }
    if overlong == "split":
        del expected["z" * 90]
    assert {line["id"]: line["reason"] for line in lines} == {
        f"train/{number}": expected[row] for number, row in enumerate(rows) if row in expected
    }
    assert [line["outcome"] == "cut" for line in lines] == [line["reason"] in CUT for line in lines]
    counted = {
        name.removeprefix("rows_skipped_"): count
        for name, count in manifest.data.counters.items()
        if name.startswith("rows_skipped_") or name in (*CUT, *LEFT_OUT)
    }
    assert Counter(line["reason"] for line in lines) == counted


def test_a_finished_cache_keeps_its_file_and_a_restart_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "cache.rejects.jsonl"
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": "x"}, {"text": None}]))
    settings = config(tmp_path)
    build(settings)
    before = file.stat()
    assert build(settings).reused
    assert file.stat() == before
    # The policy changes no content.
    for policy in ("skip", "fail"):
        other = settings.model_copy(
            update={"data": settings.data.model_copy(update={"on_bad_rows": policy})}
        )
        assert build(other).reused
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": "y"}]))
    with pytest.raises(UserError, match="has changed"):
        build(settings)
    assert file.stat() == before
    build(settings, restart=True)
    assert not file.exists()
    assert summary(CacheReader(tmp_path / "cache").manifest.data.counters, file) == ""


def test_a_build_that_fails_names_the_rows_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": None}, {"text": 5}]))
    with pytest.raises(UserError, match="none of its 2 rows can be used"):
        build(config(tmp_path))
    reasons = [line["reason"] for line in read(tmp_path / "cache.rejects.jsonl")]
    assert reasons == ["null", "not_a_string"]
    assert f"are named in {tmp_path / 'cache.rejects.jsonl'}" in caplog.text


def _dying(function: Callable[..., object], calls: int) -> Callable[..., object]:
    """``function``, which kills this process with its last call of ``calls``."""
    left = iter(range(calls - 1))

    def call(*arguments: object, **named: object) -> object:
        result = function(*arguments, **named)
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "the first reject": (Rejects, "add", 1),
    "in the middle": (Rejects, "add", 70),
    "the file is there": (rejects_module.os, "replace", 1),
    "before the plan is committed": (_GivenText, "check_source", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_plan_is_made_again_with_the_same_file(
    moment: str,
    tmp_path: Path,
    rng: np.random.Generator,
    fork: Callable[[Callable[[], object]], BaseProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"text": "x" * int(n) if n % 3 else None} for n in rng.integers(0, 80, 200)]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows))
    settings = config(tmp_path, overlong="truncate")
    build(settings.model_copy(update={"output": tmp_path / "whole"}))
    owner, name, calls = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _dying(getattr(owner, name), calls))
        process = fork(lambda: build(settings))
        process.join()
    assert process.exitcode == -signal.SIGKILL
    file = tmp_path / "cache.rejects.jsonl"
    assert file.exists() == (moment in list(MOMENTS)[2:])
    assert not (tmp_path / "cache" / ".build" / "plan.json").exists()
    found = build(settings).manifest
    assert file.read_bytes() == (tmp_path / "whole.rejects.jsonl").read_bytes()
    assert len(read(file)) > 80
    assert not (tmp_path / "cache.rejects.jsonl.tmp").exists()
    whole = CacheReader(tmp_path / "whole").manifest
    assert found.content_sha256 == whole.content_sha256
    assert found.data.counters == whole.data.counters


def test_a_build_killed_after_its_plan_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": "x"}, {"text": None}]))
    settings = config(tmp_path)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("logitcask.pipeline.builder.run._write_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            build(settings)
    before = (tmp_path / "cache.rejects.jsonl").stat()
    (tmp_path / "rows.jsonl").unlink()  # the plan has all of it
    build(settings)
    assert (tmp_path / "cache.rejects.jsonl").stat() == before


def test_prompts_without_an_answer_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that is resumed while answers are written does not read the rows again."""
    rows = [{"q": "why?"}, {"q": "long " * 99}, {"q": None}, {"q": " "}]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows))
    settings = config(tmp_path, max_length=60, prompt_field="q", generate={"max_new_tokens": 5})

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Generations, "_answer", killed)
        with pytest.raises(KeyboardInterrupt):
            build(settings)
    before = (tmp_path / "cache.rejects.jsonl").stat()
    build(settings)
    assert (tmp_path / "cache.rejects.jsonl").stat() == before
    assert {line["id"]: line["reason"] for line in read(tmp_path / "cache.rejects.jsonl")} == {
        "train/1": "overlong_prompts",
        "train/2": "null",
        "train/3": "empty",
    }


def test_the_file_of_a_cache_in_a_store(tmp_path: Path) -> None:
    """Beside the folder of this machine in which the build works; never in the store."""
    url = "memory://test-rejects/cache"
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"text": "x"}, {"text": None}]))
    settings = config(tmp_path).model_copy(update={"output": url})
    try:
        build(settings)
        names = fsspec.filesystem("memory").find("memory://test-rejects")
        assert not any("rejects" in Path(name).name for name in names)
        assert settings.rejects_file().parent == settings.folder.parent
        assert [line["id"] for line in read(settings.rejects_file())] == ["train/1"]
    finally:
        fsspec.filesystem("memory").rm("memory://test-rejects", recursive=True)


def test_an_interrupted_pass_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.rejects.jsonl"
    file.write_text("of an earlier plan")
    with pytest.raises(KeyboardInterrupt), Rejects(file) as rejects:
        rejects.add(Reject("a", "null"))
        raise KeyboardInterrupt
    assert file.read_text() == "of an earlier plan"
    assert os.listdir(tmp_path) == ["x.rejects.jsonl"]


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejects_module, "_LINES", 3)
    file = tmp_path / "x.rejects.jsonl"
    with Rejects(file) as rejects:
        for number in range(5):
            rejects.add(Reject(f"train/{number}", "null"))
        rejects.add(Reject("train/9", "not_json", "d" * 9999))
    lines = read(file)
    assert [line.get("id") for line in lines[:4]] == ["train/0", "train/1", "train/2", "train/9"]
    assert lines[3]["detail"] == "d" * 500
    assert lines[4:] == [{"reason": "null", "unlisted": 2}]


@pytest.mark.parametrize("refuse", ["open", "replace"])
def test_a_file_that_cannot_be_written_stops_no_build(
    refuse: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise OSError(13, "Permission denied")

    file = tmp_path / "x.rejects.jsonl"
    with monkeypatch.context() as patch:
        target = (Path, "open") if refuse == "open" else (rejects_module.os, "replace")
        patch.setattr(*target, denied)
        with Rejects(file) as rejects:
            rejects.add(Reject("a", "null"))
            rejects.add(Reject("b", "null"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"cannot write {file}: Permission denied" in line
    assert not file.exists()
    assert summary({"rows_skipped_null": 2}, file) == "2 rows left out (2 null)"
