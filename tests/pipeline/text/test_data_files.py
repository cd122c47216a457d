"""Folders of many kinds: which of their files a split has, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.pipeline.config import DataConfig
from logitcask.pipeline.text.sources import Row, open_source
from tests.pipeline.text.test_sources import WRITERS, json_lines, message_of, rows_of, write_table


def test_a_local_folder_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often run as a user whose home cannot be written; nothing of a folder of files
    needs a copy.
    """
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    for name in ("plain", "with [brackets]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(json_lines([{"text": name}]))
        assert [row.text for row in rows_of(tmp_path / name)] == [name]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["train.jsonl"]


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"text": "third"}]))
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "first"}, {"text": "second"}]))
    (tmp_path / "README.md").write_text("# about it")
    assert [(row.row_id, row.text) for row in rows_of(tmp_path)] == [
        ("train/0", "first"),
        ("train/1", "second"),
        ("train/2", "third"),
    ]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"text": [f"of {split}"]}), tmp_path / split / "part.parquet")
    assert rows_of(tmp_path, split="test") == [Row("test/0", "of test", None)]
    assert "no split 'tset'; expected test, train; did you mean 'test'?" in message_of(
        tmp_path, split="tset"
    )


SPECIAL = ["[ab]", "a?", "a*", "a::b", "[!x]", "x.py", "json"]


@pytest.mark.parametrize("name", SPECIAL)
def test_paths_are_taken_literally(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder beside it that the name matches as a pattern must not be read; nor the module
    `json` of `datasets`.
    """
    for folder, text in ((name, "mine"), ("a", "other"), ("ab", "other"), ("y", "other")):
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / "train" / "x.jsonl").write_bytes(json_lines([{"text": text}]))
    (tmp_path / name / "test").mkdir()
    (tmp_path / name / "test" / f"{name}.jsonl").write_bytes(json_lines([{"text": "of test"}]))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        assert rows_of(path) == [Row("train/0", "mine", None)]
        assert rows_of(path, split="test") == [Row("test/0", "of test", None)]
        assert rows_of(path, split="all") == [
            Row("all/0", "of test", None),
            Row("all/1", "mine", None),
        ]
    assert [row.text for row in rows_of(tmp_path / name / "test" / f"{name}.jsonl")] == ["of test"]
    assert "no split 'dev'; expected test, train" in message_of(name, split="dev")


def test_names_that_are_one_without_their_special_characters(tmp_path: Path) -> None:
    for number, name in enumerate(["a[1", "a]1", "ax1", "a?1"]):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([{"text": str(number)}]))
    assert sorted(row.text or "" for row in rows_of(tmp_path)) == ["0", "1", "2", "3"]


def test_the_card_of_a_folder_with_a_special_name(tmp_path: Path) -> None:
    folder = tmp_path / "[a]"
    folder.mkdir()
    for name in ("one", "two", "three"):
        (folder / f"{name}.jsonl").write_bytes(json_lines([{"text": name}]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [one.jsonl, two.jsonl]\n---\n"
    )
    assert [row.text for row in rows_of(folder)] == ["one", "two"]
    assert [row.text for row in rows_of(folder, split="all")] == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("files", "read", "left_out"),
    [
        (
            ["train_part1.jsonl", "more.jsonl", "extra.jsonl"],
            ["train_part1.jsonl"],
            "extra.jsonl, more.jsonl",
        ),
        (["a.jsonl", "b.parquet", "c.parquet"], ["b.parquet", "c.parquet"], "a.jsonl"),
        (["train/a.jsonl", "test/b.jsonl", "books/c.jsonl"], ["train/a.jsonl"], "books/c.jsonl"),
    ],
)
def test_files_that_are_left_out_are_named_and_counted(
    files: list[str],
    read: list[str],
    left_out: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        WRITERS["a.parquet" if name.endswith("parquet") else "a.jsonl"](
            tmp_path / name, [{"text": name}]
        )
    source = open_source(DataConfig(path=str(tmp_path)))
    assert [row.text for row in source] == read
    missing = left_out.count(",") + 1
    assert source.counters == {"rows_read": len(read), "files_left_out": missing}
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"reading {len(read)} of 3 data files" in line
    assert f"into no split: {left_out}; data.split=all reads every file of the folder" in line
    caplog.clear()
    source = open_source(DataConfig(path=str(tmp_path), split="all"))
    assert [row.text for row in source] == sorted(files)
    assert source.counters == {"rows_read": 3}
    assert not caplog.records


def test_a_folder_of_which_datasets_makes_nothing_says_how_to_read_it(tmp_path: Path) -> None:
    for name in ("unit-test/a.jsonl", "books/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(json_lines([{"text": name}]))
    assert "no split 'train'; expected test; data.split=all reads all 2 data files" in message_of(
        tmp_path
    )
    (tmp_path / "train").mkdir()
    write_table(tmp_path / "train" / "c.csv", [{"text": "c"}], ",")  # another type in another split
    message = message_of(tmp_path)
    assert "cannot open data set" in message
    assert "data.split=all reads all 3 data files of the folder" in message
    assert [row.text for row in rows_of(tmp_path, split="all")] == [
        "books/b.jsonl",
        "c",
        "unit-test/a.jsonl",
    ]


def test_links_to_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``datasets`` does not enter them: they are said to be left out, and read with the rest,
    once.
    """
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.jsonl").write_bytes(json_lines([{"text": "b"}]))
    folder = tmp_path / "far-and-here"  # the start of its name is the name of the other
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines([{"text": "a"}]))
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "link-again").symlink_to(tmp_path / "far")
    (folder / "loop").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub" / "c.jsonl").write_bytes(json_lines([{"text": "c"}]))
    (folder / "alias").symlink_to(folder / "sub")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    assert [row.text for row in rows_of(folder)] == ["a", "c"]
    assert "into no split: link/b.jsonl; data.split=all" in caplog.text
    assert [row.text for row in rows_of(folder, split="all")] == ["a", "b", "c"]


def test_other_splits_are_no_files_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.jsonl").write_bytes(json_lines([{"text": split}]))
    source = open_source(DataConfig(path=str(tmp_path)))
    assert list(source) == [Row("train/0", "train", None)]
    assert source.counters == {"rows_read": 1}
    assert [
        record.levelname
        for record in caplog.records
        if record.name == "logitcask.pipeline.text.sources"
    ] == ["INFO"]
    assert "reading 1 of 2 data files, split 'train' (other splits: test)" in caplog.text


def test_a_file_that_matches_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "train-train.jsonl").write_bytes(json_lines([{"text": "once"}]))
    assert [row.text for row in rows_of(tmp_path)] == ["once"]


def test_what_datasets_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(path: str, **settings: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert message_of("user/name") == "cannot open data set 'user/name': no route (ConnectionError)"
