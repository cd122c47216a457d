"""``--json`` of every command: one document on stdout, with the keys of docs/scripts.md and the
values of the text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import fields
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml

from logitcask.cache_format import CacheReader, Manifest, UserError
from logitcask.pipeline.audit.result import Audit
from logitcask.pipeline.cli import app, main
from logitcask.pipeline.commands.json_lines import write_lines
from logitcask.pipeline.estimate.run import Estimate

DOCS = Path(__file__).parents[3] / "docs" / "scripts.md"
GOLDEN = Path(__file__).parents[2] / "golden"
STATISTICS = ["sequences", "tokens", "positions", "bytes", "bytes_per_token"]


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
def document(run):
    """``document(*arguments)``: the document, and the text without ``--json``."""

    def call(*arguments, text=True):
        code, stdout, _ = run(*arguments, "--json")
        assert code == 0
        return json.loads(stdout), run(*arguments)[1] if text else ""

    return call


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "build.yaml"
    settings = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 384},
        "data": {"path": "python-docs", "max_length": 64, "max_tokens": 2000},
        "store": {"top_k": 8, "shard_tokens": 700},
        "output": str(tmp_path / "cache"),
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def cache(run, config, tmp_path):
    assert run("build", config)[0] == 0
    return tmp_path / "cache"


def documented(command):
    """The keys of a command in the table of the docs, nested ones left out."""
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    (keys,) = [keys for names, keys in rows if f"`{command}`" in names]
    return re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|; with .*", "", keys))


def figures(text):
    """The numbers of a page, without thousands separators."""
    return {float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def test_every_command_is_in_the_table():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names <= set(re.findall(r"`(?:teacher-cache )?(\w+)`", DOCS.read_text()))


def test_build(document, config, tmp_path):
    """The second build reuses the cache."""
    built, text = document("build", config)
    assert list(built) == [
        *documented("teacher-cache derive"),
        *documented("teacher-cache build")[1:],
    ]
    manifest = CacheReader(tmp_path / "cache").manifest
    assert built["fingerprint"] == manifest.fingerprint
    assert {name: built[name] for name in STATISTICS} == {
        name: getattr(manifest.statistics, name) for name in STATISTICS
    }
    assert (built["reused"], built["tokens_scored"]) == (False, built["tokens"])
    assert {built["tokens"], built["bytes"]} <= figures(text)
    assert "is there already" in text


def test_info(document, cache):
    found, text = document("info", cache)
    manifest = Manifest.model_validate(found)
    assert manifest == CacheReader(cache).manifest
    assert {manifest.statistics.tokens, manifest.statistics.bytes} <= figures(text)


def test_verify(document, run, cache):
    found, text = document("verify", cache, "--deep")
    assert list(found) == documented("teacher-cache verify")
    assert found == {"cache": str(cache), "shards": 3, "deep": True, "problems": []}
    assert "3 shards" in text
    shard = cache / "data" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, stdout, stderr = run("verify", cache, "--json")
    (problem,) = json.loads(stdout)["problems"]
    assert (code, stderr) == (1, f"error: {problem}\n")
    assert "shard-00001" in problem


def test_derive_and_merge(document, run, cache, tmp_path):
    small, _ = document("derive", cache, tmp_path / "small", "--top-k", 4, text=False)
    text = run("derive", cache, tmp_path / "small again", "--top-k", 4)[1]
    assert list(small) == documented("teacher-cache derive")
    manifest = CacheReader(tmp_path / "small").manifest
    assert (small["tokens"], small["bytes"]) == (
        manifest.statistics.tokens,
        manifest.statistics.bytes,
    )
    assert {small["tokens"], small["bytes"]} <= figures(text)
    both, _ = document("merge", tmp_path / "both", cache, cache, "--number-ids", text=False)
    text = run("merge", tmp_path / "both again", cache, cache, "--number-ids")[1]
    assert list(both) == list(small)
    assert both["tokens"] == 2 * small["tokens"]
    assert both["tokens"] in figures(text)


def test_push_and_pull(document, cache, tmp_path):
    sent, _ = document("push", cache, tmp_path / "there", text=False)
    assert list(sent) == documented("teacher-cache push")
    shards = sum(file.stat().st_size for file in (cache / "data").iterdir())
    assert (sent["place"], sent["unchanged"]) == (str(tmp_path / "there"), False)
    assert sent["bytes_sent"] >= shards
    again, text = document("push", cache, tmp_path / "there")
    assert again["unchanged"]
    assert "nothing to copy" in text
    pulled, _ = document("pull", tmp_path / "there", tmp_path / "back", text=False)
    assert pulled == {**sent, "place": str(tmp_path / "back")}


def test_audit_and_estimate(document, cache, config):
    found, text = document("audit", cache, "--sequences", 2)
    assert list(found) == [each.name for each in fields(Audit)]
    assert found["positions"] in figures(text)
    forecast, text = document("estimate", config, "--tokens", "1e6", "--tokens-per-second", 10)
    assert list(forecast) == list(Estimate.model_fields)
    assert f"{forecast['forecasts'][0]['sequences']:,.0f}" in text


def test_inspect(document, cache):
    found, text = document("inspect", cache, "--sequence", 1, "--top", 3)
    assert list(found) == documented("teacher-cache inspect")
    sequence = CacheReader(cache)[1]
    assert found["sequence"] == sequence.sequence_id
    assert [each["id"] for each in found["tokens"]] == sequence.input_ids.tolist()
    kept = [each["teacher"] for each in found["tokens"] if each["teacher"] is not None]
    assert found["tokens"][0]["teacher"] is None
    assert len(kept) == found["kept_positions"] == len(sequence.positions)
    for row, teacher in enumerate(kept):
        assert teacher["logprob"] == sequence.target_logprob[row]
        assert teacher["rank"] == sequence.target_rank[row]
        assert teacher["tail_logprob"] == sequence.tail_logprob[row]
        assert [each["id"] for each in teacher["top"]] == sequence.ids[row, :3].tolist()
        assert [each["logprob"] for each in teacher["top"]] == sequence.logprobs[row, :3].tolist()
        drawn = sequence.samples.ids[row].ravel()
        assert [each["id"] for each in teacher["draws"]] == drawn[drawn >= 0].tolist()
    assert f"{np.exp(kept[0]['logprob']):.1%}" in text


def test_generations(run, document, tmp_path, monkeypatch):
    """Some answers or none; to stdout or a file."""
    rows = [{"id": "a", "prompt": "é", "answer": "b", "tokens": 1, "finish": "stop"}, {"id": "b"}]
    (cache,) = list(GOLDEN.glob("*generat*"))[:1] or [tmp_path]
    monkeypatch.setattr("logitcask.cache_format.CacheReader", lambda path: path)
    monkeypatch.setattr(
        "logitcask.pipeline.commands.sequence_table.generations", lambda cache, tokenizer: rows
    )
    found, text = document("generations", cache)
    assert found == rows == [json.loads(line) for line in text.splitlines()]
    out = tmp_path / "answers.jsonl"
    found, _ = document("generations", cache, "--out", out)
    assert found == {"out": str(out), "answers": 2}
    assert out.read_text(encoding="utf-8") == text
    rows.clear()
    assert document("generations", cache)[0] == []


def test_prompts(run, document, config, tmp_path):
    """The chosen prompts of a config; to stdout or a file."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"é {n}"}) + "\n" for n in range(3)))
    fields = [f"data={{path: '{rows}', prompt_field: q, generate: {{max_prompts: 2}}}}"]
    found, text = document("prompts", config, *fields)
    assert found == [json.loads(line) for line in text.splitlines()]
    assert [list(row) for row in found] == [["id", "messages"]] * 2
    assert found[1]["messages"] == [{"role": "user", "content": "é 1"}]
    out = tmp_path / "prompts.jsonl"
    assert document("prompts", config, *fields, "--out", out)[0] == {"out": str(out), "prompts": 2}
    assert out.read_text(encoding="utf-8") == text
    code, stdout, stderr = run("prompts", config)
    assert (code, stdout) == (2, "")
    assert "has no data.generate, so its build answers no prompts" in stderr


def test_values_that_json_does_not_have(capsys):
    with pytest.raises(UserError, match="row a holds a value that JSON does not have"):
        write_lines([{"id": "a", "messages": [{"day": date(2024, 1, 2)}]}], None, "rows")


def test_model(document, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "logitcask.pipeline.teachers.model.prepare_model", lambda name, _: str(tmp_path / name)
    )
    found, text = document("model", "tiny")
    assert list(found) == documented("teacher-cache model")
    assert found == {"name": "tiny", "path": text.strip()}


def test_whatever_else_is_printed_goes_to_stderr(run, cache, monkeypatch):
    """From Python, from C code and from child processes."""

    def noisy(path, **_):
        print("python")
        os.write(1, b"descriptor\n")
        os.system("echo child")
        return []

    monkeypatch.setattr("logitcask.cache_format.cli.cache_commands.verify_cache", noisy)
    code, stdout, stderr = run("verify", cache, "--json")
    assert json.loads(stdout)["problems"] == []
    assert (code, sorted(stderr.split())) == (0, ["child", "descriptor", "python"])
    print("afterwards stdout is itself again")
    assert "afterwards" in run("verify", cache)[1]


@pytest.mark.parametrize("where", ["program", "command"])
def test_quiet(run, cache, config, where):
    def quiet(command, *arguments):
        before, after = (["--quiet"], []) if where == "program" else ([], ["--quiet"])
        return run(*before, command, *arguments, *after)

    assert quiet("verify", cache) == (0, "", "")
    assert quiet("build", config, "--restart") == (0, "", "")
    assert json.loads(quiet("verify", cache, "--json")[1])["problems"] == []
    assert "tokens" in quiet("info", cache)[1]
    code, stdout, stderr = quiet("verify", cache / "nowhere")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert "starting the teacher" in run("build", config, "--restart")[2]


def test_a_closed_pipe(run, cache, monkeypatch):
    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run("info", cache)[0] == 141
