"""``teacher-cache report``: its options, its text, and what it refuses."""

from __future__ import annotations

import pytest

from logitcask.cache_format import CacheReader, ConfigError, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import app
from logitcask.pipeline.config import BuildConfig


def run(*arguments):
    app([str(each) for each in arguments], standalone_mode=False)


@pytest.fixture
def cache(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("naïve 漢字\n" * 4)
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(file)},
        audit={"sequences": 0},
        output=tmp_path / "cache",
    )
    build(config)
    return config.output


def test_a_page(cache, tmp_path, capsys):
    out = tmp_path / "report.html"
    run("report", cache, "--out", out)
    totals = CacheReader(cache).manifest.statistics
    said = (
        f"{out}: figures of {totals.tokens:,} tokens in {totals.sequences} sequences, "
        f"token view of {totals.tokens:,}, {out.stat().st_size:,} bytes\n"
    )
    assert capsys.readouterr().out == said
    assert "part of a character" in out.read_text()
    run("report", cache, "--out", out, "--sequences", "-1:", "--tokens", 1000)
    one = len(CacheReader(cache)[-1])
    assert f"token view of {one}," in capsys.readouterr().out


def test_without_a_tokenizer(cache, tmp_path, monkeypatch, caplog):
    def gone(config):
        raise UserError("no such model")

    monkeypatch.setattr("logitcask.pipeline.commands.sequence_table.open_tokenizer", gone)
    run("report", cache, "--out", tmp_path / "report.html")
    assert "showing ids, since the teacher's tokenizer is not here: no such model" in caplog.text
    assert "part of a character" not in (tmp_path / "report.html").read_text()


def test_wrong_sequences(cache, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(ConfigError, match=r"^--sequences is '3'; expected START:STOP"):
        run("report", cache, "--out", out, "--sequences", "3")
    with pytest.raises(UserError, match="--sequences chooses none of them"):
        run("report", cache, "--out", out, "--sequences", "900:")
    assert not out.exists()


def test_an_existing_file_is_refused_first(tmp_path):
    (tmp_path / "notes.html").touch()
    with pytest.raises(UserError, match=r"notes\.html exists and is not a report"):
        run("report", "no cache", "--out", tmp_path / "notes.html")
