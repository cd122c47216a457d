"""Slices of splits, against ``datasets``, which reads the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.row_count import count_rows
from logitcask.pipeline.text.slices import Slice, parse_slice
from logitcask.pipeline.text.sources import open_source
from tests.pipeline.text.test_sources import json_lines, rows_of


def random_slice(rng: np.random.Generator) -> str:
    percent = "%" if rng.random() < 0.5 else ""
    numbers = [str(n) if rng.random() < 0.8 else "" for n in rng.integers(-100, 101, 2)]
    start, stop = (number and number + percent for number in numbers)
    return f"train[{start}:{stop}]"


def test_slices_are_those_of_datasets(tmp_path: Path, rng: np.random.Generator) -> None:
    from datasets import ReadInstruction

    for _ in range(400):
        total, split = int(rng.integers(1, 160)), random_slice(rng)
        (expected,) = ReadInstruction.from_spec(split).to_absolute({"train": total})
        found = parse_slice(split)
        start, stop = found.bounds(total)
        chosen = range(total)[start:stop]
        assert chosen == range(total)[expected.from_ : expected.to], (split, total)
        if not found.needs_total:
            assert range(total)[slice(*found.bounds(None))] == chosen


@pytest.mark.parametrize(
    "split", ["train[:10%]", "train[3:7]", "train[-4:]", "train[90%:]", "train"]
)
def test_the_rows_of_a_slice_keep_their_ids(split: str, tmp_path: Path) -> None:
    """In every kind of source, and as ``datasets`` reads the file."""
    from datasets import Dataset, load_dataset

    texts = [f"row {number}" for number in range(31)]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": text} for text in texts]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    Dataset.from_dict({"text": texts}, split="train").save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for number in range(2):  # a slice of both files
        rows = [{"text": text} for text in texts[number * 20 : number * 20 + 20]]
        (tmp_path / "folder" / f"{number}.jsonl").write_bytes(json_lines(rows))
    expected = load_dataset(
        "json",
        data_files=str(tmp_path / "a.jsonl"),
        split=split,
        cache_dir=str(tmp_path / "cache"),
    )["text"]
    for name in ("a.jsonl", "a.parquet", "saved", "folder"):
        found = rows_of(tmp_path / name, split=split)
        assert [row.text for row in found] == list(expected)
        assert [row.row_id for row in found] == [f"train/{texts.index(text)}" for text in expected]
        counted = count_rows(DataConfig(path=str(tmp_path / name), split=split))
        assert counted == pytest.approx(len(expected), abs=1)
    whole = [row.row_id for row in rows_of(tmp_path / "folder", split="all[:5]")]
    assert whole == [f"all/{number}" for number in range(5)]


def test_a_slice_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "good"}] * 2000) + b"not JSON\n")
    assert len(rows_of(tmp_path / "a.jsonl", split="train[1990:2000]")) == 10
    with pytest.raises(UserError, match="line 2001: not JSON"):
        rows_of(tmp_path / "a.jsonl", split="train[:50%]")


def test_bad_rows_count_in_a_slice_as_in_the_whole(tmp_path: Path) -> None:
    lines = [b'{"text": "0"}', b"broken", b'{"text": "2"}', b'{"text": 3}', b'{"text": "4"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(
        DataConfig(path=str(tmp_path / "a.jsonl"), split="train[40%:80%]", on_bad_rows="skip")
    )
    assert [(row.row_id, row.text) for row in source] == [("train/2", "2")]
    assert source.counters == {"rows_read": 2, "rows_skipped_not_a_string": 1}


def test_an_empty_slice_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a"}] * 3))
    with pytest.raises(UserError, match=r"split train\[5:\], has no rows"):
        rows_of(tmp_path / "a.jsonl", split="train[5:]")
    with pytest.raises(UserError, match=r"has no split 'tset'; expected train"):
        rows_of(tmp_path / "a.jsonl", split="tset[5:]")


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("train[", "'train[' is no split; expected a name such as train, or a part of it"),
        ("train[1]", "is no split"),
        ("train[a:b]", "is no split"),
        ("[1:2]", "is no split"),
        ("train[%:5]", "is no split"),
        ("train[:101%]", "names more than 100 %"),
        ("train[:1]+test[:1]", "is no split"),
        ("", "is no split"),
    ],
)
def test_what_is_no_split(split: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a name") as wrong:
        parse_slice(split)
    assert says in str(wrong.value)
    file = tmp_path / "c.yaml"
    file.write_text("teacher: {model: synthetic}\ndata: {path: x}\noutput: x\n")
    with pytest.raises(ConfigError, match=r"data\.split"):
        load_config(BuildConfig, file, [f"data.split='{split}'"])


def test_a_plain_name() -> None:
    assert parse_slice("train") == Slice("train")
    assert Slice("train").bounds(None) == (0, None)
