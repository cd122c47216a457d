"""Secrets never reach error lines, logs, manifests and run files."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.cli import app as program
from logitcask.cache_format.describe import facts
from logitcask.cache_format.redact import redacted, without_secrets
from logitcask.cache_format.storage.files import open_filesystem
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import TrainConfig
from logitcask.train.identity import identity_of_config

SECRET = "s3cr3t-pa55word"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/path?x=1",
        f"sftp://user:{SECRET}@host:22/caches",
        f"ftp://:{SECRET}@host/",
        f"https://user:p@{SECRET}@host/",
        f"http://{SECRET}@host/repository",
        f"https://host/a?client_secret={SECRET}&x=1",
        f"https://host/a?private-token={SECRET}",
        f"https://{SECRET}@host/repository",
        f"https://bucket.host/a?X-Amz-Algorithm=A&X-Amz-Signature={SECRET}&x=1",
        f"https://host/a?token={SECRET}",
        f"https://host/a?b=1&api_key={SECRET}#f",
        f"https://account.host/a?sv=2024&sig={SECRET}",
        f"401 for url with Authorization: Bearer {SECRET}",
        "the token hf_abcdefghijklmnopqrst is wrong",
        "the key sk-abcdefghijklmnopqrstuv is wrong",
    ],
)
def test_what_looks_like_a_secret(text):
    found = redacted(text)
    assert SECRET not in found
    assert "abcdefgh" not in found
    assert "***" in found
    assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/path@v2/a:b/c",
        "hf://datasets/ORG/NAME@main",
        "https://host:8080/v1/completions?model=a&page=2",
        "max_tokens=3&tokens=4 user@host a:b@c",
        "memory://cache",
        "set data.tokens_field=false, or key=value",
    ],
)
def test_what_is_no_secret(text):
    assert redacted(text) == text


def test_values_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MY_API_KEY", "short")
    assert redacted(f"rejected: {SECRET}") == "rejected: ***"
    assert redacted("short words stay") == "short words stay"
    # Names that only look like secrets, whose values are in messages and manifests.
    monkeypatch.setenv("TOKENIZER", "org/a-model")
    monkeypatch.setenv("TOKENIZERS_FOLDER", "/models/tokenizers")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    text = "org/a-model of /models/tokenizers beside /home/me/token"
    assert redacted(text) == text
    monkeypatch.setenv("PGPASSWORD", SECRET[::-1])
    monkeypatch.setenv("SECRET_OF_MINE", "another secret")
    assert redacted(f"{SECRET[::-1]}, another secret") == "***, ***"


def test_keys_of_configs():
    found = without_secrets({"training": {"hub_token": "abc", "max_tokens": "9"}, "tokenizer": "t"})
    assert found == {"training": {"hub_token": "***", "max_tokens": "9"}, "tokenizer": "t"}


def test_errors_and_logs(monkeypatch, capsys, caplog):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in str(UserError(f"no access with {SECRET}"))
    url = f"nowhere://user:{SECRET}@host/cache"
    with pytest.raises(UserError) as error:
        open_filesystem(url)
    assert SECRET not in str(error.value)
    assert "nowhere://***@host/cache" in str(error.value)
    record = logging.LogRecord("x", logging.INFO, "", 0, "to %s", (url,), None)
    assert program._Redacted("%(message)s").format(record) == "to nowhere://***@host/cache"


@pytest.mark.parametrize("flag", [[], ["--debug"]])
def test_a_command(flag):
    """Also its traceback, and errors that are no UserError."""
    code = (
        "from logitcask.pipeline import cli; "
        "import logitcask.cache_format.cli.cache_commands as c\n"
        f"def broken(*a, **k): raise RuntimeError('https://u:{SECRET}@h')\n"
        "c.CacheReader = broken\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, "info", f"https://u:{SECRET}@h/x", *flag]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 3
    assert SECRET not in found.stdout + found.stderr.replace(f"'https://u:{SECRET}@h')\n\"", "")
    assert "RuntimeError" in found.stderr


def test_a_build(tmp_path, monkeypatch):
    """Its manifest, its state and its log, and the same build again reuses the cache."""
    import fsspec

    url = f"memory://user:{SECRET}@host/rows.jsonl"
    with fsspec.open(url, "w") as file:
        file.write(json.dumps({"text": "a few words"}) + "\n")
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": url},
        audit={"sequences": 0},
        output=tmp_path / "cache",
    )
    states = []
    remove = shutil.rmtree

    def seen(path, **options):
        states.extend(f.read_bytes() for f in Path(path).rglob("*") if f.is_file())
        remove(path, **options)

    monkeypatch.setattr("logitcask.cache_format.writer.shutil.rmtree", seen)
    build(config)
    monkeypatch.undo()
    assert any(b"plan" in state or b"request" in state for state in states)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"manifest.json", "README.md", "cache.log.jsonl"} <= {file.name for file in files}
    assert all(SECRET.encode() not in data for data in [*states, *(f.read_bytes() for f in files)])
    manifest = CacheReader(str(tmp_path / "cache")).manifest
    assert manifest.data.source == "memory://***@host/rows.jsonl"
    assert manifest.config["data"]["path"] == "memory://***@host/rows.jsonl"
    build(config)
    assert CacheReader(str(tmp_path / "cache")).manifest == manifest
    assert SECRET not in json.dumps(facts(manifest, url))


def test_a_run():
    config = TrainConfig(
        cache=f"https://u:{SECRET}@h/cache",
        student={"model": "m"},
        training={"output_dir": "o", "hub_token": SECRET},
    )
    assert SECRET in json.dumps(identity_of_config(config))
    assert SECRET not in json.dumps(without_secrets(identity_of_config(config)))
