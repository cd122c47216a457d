"""``teacher-cache push`` with a card and a preview, and what ``datasets`` reads of the copy."""

from __future__ import annotations

import io
import math

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.export import preview


def test_the_preview_says_what_the_cache_says(run, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "ROW_GROUP", 8)
    copy = tmp_path / "copy"
    run("push", cache, copy, "--preview", "--license", "apache-2.0")
    file = pq.ParquetFile(copy / "preview/preview.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups - 1)] == [8] * (
        file.num_row_groups - 1
    )
    assert file.metadata.row_group(0).column(0).has_offset_index
    rows = file.read().to_pylist()
    reader = CacheReader(cache)
    assert len(rows) == sum(len(each.positions) for each in reader)
    at = 0
    for sequence in reader:
        for row, position in enumerate(sequence.positions):
            found = rows[at]
            at += 1
            assert (found["sequence_id"], found["position"]) == (sequence.sequence_id, position)
            assert found["probability"] == pytest.approx(
                math.exp(sequence.target_logprob[row]), rel=1e-6
            )
            assert found["rank"] == sequence.target_rank[row]
            shown = [float(each.rpartition(" ")[2][:-1]) for each in found["top_5"].split(" | ")]
            exact = 100 * np.exp(sequence.logprobs[row, :5])
            np.testing.assert_allclose(shown, exact, atol=0.5 + 1e-4)
    first = [row for row in rows if row["sequence_id"] == "train/0"]
    # The characters of the text, a token per byte; parts of characters are bytes.
    assert first[0]["text_before"].endswith("<|im_start|>")
    assert [row["next_token"] for row in first][:4] == ["n", "a", "\\xc3", "\\xaf"]
    assert first[-1]["text_before"].endswith("ve \\xe6\\xbc\\xa2\\xe5\\xad\\x97")
    assert 'license: "apache-2.0"' in (copy / "README.md").read_text()


def test_datasets_reads_the_preview_or_the_shards(run, cache, tmp_path):
    copy, options = tmp_path / "copy", {"cache_dir": str(tmp_path / "hf")}
    run("push", cache, copy, "--preview")
    shown = datasets.load_dataset(str(copy), **options)
    assert {name: split.num_rows for name, split in shown.items()} == {
        "preview": sum(len(each.positions) for each in CacheReader(cache))
    }
    shards = datasets.load_dataset("arrow", data_files=str(copy / "data/*.arrow"), **options)
    assert shards["train"].num_rows == 2
    # A pull leaves the preview behind, and its card does not name it.
    run("pull", tmp_path / "copy", tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "preview").exists()
    assert datasets.load_dataset(str(tmp_path / "pulled"), **options)["train"].num_rows == 2
    # It can be pushed again, with a preview.
    run("push", tmp_path / "pulled", tmp_path / "again", "--preview")
    assert "config_name: preview" in (tmp_path / "again" / "README.md").read_text()


def test_few_rows_of_each_sequence(cache):
    reader = CacheReader(cache)
    content = preview.preview(reader, str, str, positions=5, of_each=3)
    table = pq.read_table(io.BytesIO(content))
    assert table["sequence_id"].to_pylist() == ["train/0"] * 3 + ["train/1"] * 2


def test_an_edited_card_is_sent_as_it_is(run, cache, tmp_path, caplog):
    (cache / "README.md").write_text((cache / "README.md").read_text() + "My words.\n")
    run("push", cache, tmp_path / "copy", "--license", "mit")
    assert (tmp_path / "copy" / "README.md").read_text().endswith("My words.\n")
    assert "was edited, so it is sent as it is" in caplog.text


def test_without_a_tokenizer_there_is_no_preview(run, cache, tmp_path, monkeypatch, caplog):
    def gone(config):
        raise UserError("no such model")

    monkeypatch.setattr("logitcask.pipeline.commands.sequence_table.open_tokenizer", gone)
    run("push", cache, tmp_path / "copy", "--preview")
    assert "without texts, since the teacher's tokenizer is not here" in caplog.text
    assert not (tmp_path / "copy" / "preview").exists()
    assert "preview" not in (tmp_path / "copy" / "README.md").read_text()


def test_no_licence(run, cache, tmp_path):
    with pytest.raises(UserError, match="is no identifier of a licence"):
        run("push", cache, tmp_path / "copy", "--license", "do what\nyou want")
