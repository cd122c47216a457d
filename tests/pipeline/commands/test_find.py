"""``teacher-cache find``: which caches hold a model on some documents, and what a build would do."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import yaml

from logitcask.cache_format import CacheReader, Manifest
from logitcask.cache_format.catalog.home import home as find_home
from logitcask.cache_format.catalog.remotes import config_file
from logitcask.cache_format.share.copy import push
from logitcask.pipeline.cli import main


@pytest.fixture
def run(monkeypatch, capfd):
    """``run(*arguments)``: (exit code, stdout, stderr) of ``teacher-cache``."""
    monkeypatch.setattr(logging.root, "handlers", [])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["teacher-cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        logging.root.handlers.clear()
        return int(stop.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def caches(tmp_path, monkeypatch, run):
    """Caches ``ten`` and ``five`` of ten and five documents, and ``small``, derived from ``ten``."""
    monkeypatch.chdir(tmp_path)
    for count in (5, 10, 12):
        rows = "".join(json.dumps({"text": f"document {n} is here"}) + "\n" for n in range(count))
        Path(f"{count}.jsonl").write_text(rows)
    settings = {
        "teacher": {"model": "synthetic", "vocab_size": 300},
        "data": {"path": "10.jsonl"},
        "audit": {"sequences": 0},
        "output": "ten",
    }
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    for words in (
        [],
        ["output=five", "data.path=5.jsonl", "--no-reuse"],
        ["output=small", "store.top_k=4"],
        ["output=other", "teacher.vocab_size=400"],
    ):
        assert run("build", "c.yaml", *words)[0] == 0


def found(run, *arguments):
    document = json.loads(run("find", *arguments, "--json")[1])
    return {Path(each["where"]).name: each for each in document["caches"]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"ten": (10, "a build reuses it"), "five": (5, "a build scores the others")}),
        (["data.path=5.jsonl"], {"ten": (5, "a build derives"), "five": (5, "a build reuses it")}),
        (["data.path=12.jsonl"], {"ten": (10, "a build scores"), "five": (5, "a build scores")}),
        (["store.top_k=5"], {"ten": (10, "a build derives"), "five": (5, "no use to a build")}),
        (["store.seed=1"], {"ten": (10, "no use to a build"), "five": (5, "no use to a build")}),
    ],
)
def test_by_config(run, caches, overrides, expected):
    lines = found(run, "c.yaml", *overrides)
    assert set(lines) == {*expected, "small"}
    for name, (shared, use) in expected.items():
        assert lines[name]["shared_sequences"] == shared
        assert lines[name]["use"].startswith(use)
    assert "it is derived" in lines["small"]["use"]
    asked = {12: "12.jsonl", 5: "5.jsonl"}
    rows = next((n for n, file in asked.items() if f"data.path={file}" in overrides), 10)
    assert {line["asked_sequences"] for line in lines.values()} == {rows}


def test_what_it_says_is_what_a_build_does(run, caches):
    build = json.loads(run("build", "c.yaml", "output=x", "data.path=12.jsonl", "--json")[1])
    assert build["taken"] is None  # all of these are among the first 16,384 positions
    build = json.loads(run("build", "c.yaml", "output=y", "data.path=5.jsonl", "--json")[1])
    assert (build["taken"]["how"], build["tokens_scored"]) == ("same", 0)


def test_nothing_is_written(run, caches, tmp_path):
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    run("find", "c.yaml", "output=new", "data.path=12.jsonl")
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_by_name(run, caches):
    assert set(found(run, "--data", "5.json*")) == {"five"}
    assert set(found(run, "--teacher", "synth")) == {"ten", "five", "small", "other"}
    tokenizer = CacheReader("ten").manifest.tokenizer.sha256
    assert set(found(run, "--tokenizer", tokenizer[:10])) == {"ten", "five", "small", "other"}
    assert run("find", "--teacher", "nobody")[:2] == (0, "no such cache\n")


def test_by_text(run, caches):
    lines = found(run, "--text", "document 7 is")
    assert {name: line["sequences_with_text"] for name, line in lines.items()} == dict.fromkeys(
        ("ten", "small", "other"), 1
    )
    assert found(run, "--text", "is here", "--data", "10.jsonl")["ten"]["sequences_with_text"] == 10
    assert "the text is in 1 sequences" in run("find", "--text", "document 7 is")[1]


def test_at_remotes(run, caches):
    push("ten", "memory://of-find/ten-there")
    config_file(find_home()).write_text("remotes: ['memory://of-find']\n")
    assert "ten-there" not in found(run, "c.yaml")
    assert found(run, "c.yaml", "--remotes")["ten-there"]["use"] == "a build reuses it"


def test_written_answers_cannot_be_known(run, caches):
    words = ["data.generate={samples: 1}", "data.text_field=text"]
    code, _, err = run("find", "c.yaml", *words)
    assert code == 2
    assert err.startswith("error: the teacher writes the texts of this config (data.generate)")


def test_a_cache_that_cannot_be_searched_is_left_out(run, caches, caplog):
    """One with a damaged shard, and one whose tokenizer has changed; the others are found."""
    shard = next(Path("five/data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    manifest = Path("small/manifest.json")
    text = manifest.read_text()
    sha = json.loads(text)["tokenizer"]["vocab_sha256"]
    document = json.loads(text.replace(sha, "0" * 64))
    found = Manifest.model_validate(document).with_fingerprint()
    document["fingerprint"] = found.fingerprint
    manifest.write_text(json.dumps(document))
    code, out, _ = run("find", "--text", "document 3 is", "--json")
    assert code == 0
    assert {Path(each["where"]).name for each in json.loads(out)["caches"]} == {"ten", "other"}
    assert "five is not searched: " in caplog.text
    assert "small is not searched: the tokenizer " in caplog.text
