"""``teacher-cache export``: the file, its texts, and what it refuses."""

from __future__ import annotations

import polars
import pytest

from logitcask.cache_format import CacheReader, UserError


def test_a_file(run, cache, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    run("export", "parquet", cache, out)
    reader = CacheReader(cache)
    frame = polars.read_parquet(out)
    tokens = sum(len(sequence) for sequence in reader)
    said = f"{out}: {tokens} tokens in 2 sequences, {out.stat().st_size:,} bytes\n"
    assert capsys.readouterr().out == said
    assert len(frame) == tokens
    texts = frame.filter(polars.col("sequence_id") == "train/0")["token_text"].to_list()
    # A token per byte: parts of characters are their bytes.
    parts = [f"\\x{byte:02x}" for byte in "漢字".encode()]
    assert texts == ["<|im_start|>", "n", "a", "\\xc3", "\\xaf", "v", "e", " ", *parts, "\n"]
    kept = frame.filter(polars.col("target_id").is_not_null())
    assert len(kept) == sum(len(sequence.positions) for sequence in reader)
    assert (kept["head_mass"] + kept["tail_mass"]).is_between(0.97, 1.03).all()


def test_without_a_tokenizer(run, cache, tmp_path, monkeypatch, caplog):
    def gone(config):
        raise UserError("no such model")

    monkeypatch.setattr("logitcask.pipeline.commands.sequence_table.open_tokenizer", gone)
    run("export", "parquet", cache, tmp_path / "out.parquet")
    assert "without texts, since the teacher's tokenizer is not here: no such model" in caplog.text
    frame = polars.read_parquet(tmp_path / "out.parquet")
    assert frame["token_text"].is_null().all()
    assert frame["token_id"].is_not_null().all()
    with pytest.raises(UserError, match="no such model"):
        run("export", "parquet", cache, tmp_path / "other.parquet", "--tokenizer", "mine")


def test_an_existing_file_is_refused_first(run, tmp_path):
    (tmp_path / "out.parquet").touch()
    with pytest.raises(UserError, match=r"out\.parquet exists; remove it"):
        run("export", "parquet", "no cache", tmp_path / "out.parquet")
