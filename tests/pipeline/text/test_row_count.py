"""The number of rows, told from the beginning of a file, against the rows that are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.pipeline.text import row_count
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.row_count import count_rows
from logitcask.pipeline.text.sources import open_source


def write_table(path: Path, texts: list[str], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["text"], *([text] for text in texts)])


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": write_lines,
    "a.ndjson": write_lines,
    "a.json": write_lines,
    "a.csv": lambda path, texts: write_table(path, texts, ","),
    "a.tsv": lambda path, texts: write_table(path, texts, "\t"),
    "a.txt": lambda path, texts: path.write_text(
        "".join(t.replace("\n", " ") + "\n" for t in texts)
    ),
    "a.parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path),
}


def some_texts(rng: np.random.Generator, count: int) -> list[str]:
    """With what ends a line or a cell in some formats, and not in others."""
    words = np.array(["one", "two,three", 'four"five', "six\tseven", "eight\nnine", "ten;"])
    return ["x" + " ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_looked_at_whole_is_counted(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    WRITERS[name](tmp_path / name, some_texts(rng, 200))
    config = DataConfig(path=str(tmp_path / name))
    assert len(list(open_source(config))) == 200
    assert count_rows(config) == pytest.approx(200)


@pytest.mark.parametrize("name", WRITERS)
def test_of_a_large_one_the_beginning_tells(
    name: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_count, "_HEAD_BYTES", 100_000)
    WRITERS[name](tmp_path / name, some_texts(rng, 4000))
    found = count_rows(DataConfig(path=str(tmp_path / name)))
    assert found == pytest.approx(4000, rel=0.1)


def test_all_files_count_by_the_first_ones_density(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    texts = some_texts(rng, 1000)
    for number in range(4):
        write_lines(tmp_path / f"train-{number}.jsonl", texts[number::4])
    assert count_rows(DataConfig(path=str(tmp_path))) == pytest.approx(1000, rel=0.25)


def test_where_sizes_say_nothing_neither_does_it(tmp_path: Path) -> None:
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    stream = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(stream), pa.schema([("text", pa.string())])) as out:
        out.write_table(pa.table({"text": ["a", "b"]}))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for file in (array, stream, empty):
        assert count_rows(DataConfig(path=str(file))) is None


def test_built_in_and_saved_data_know(tmp_path: Path) -> None:
    from datasets import Dataset

    config = DataConfig(path="python-docs")
    assert count_rows(config) == len(list(open_source(config)))
    Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved")
    assert count_rows(DataConfig(path=str(tmp_path / "saved"))) == 3
