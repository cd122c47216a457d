"""Folders of many kinds: which of their files a split has, and what is said of the others."""

from __future__ import annotations

import functools
import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.row_count import count_rows
from logitcask.pipeline.text.sources import Row, open_source
from tests.pipeline.text.test_sources import (
    WRITERS,
    Records,
    json_lines,
    message_of,
    rows_of,
    write_table,
)


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


# --- wildcards


def test_wildcards_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b1", "a2", "a1", "sub/a3", "sub/deep/a4"):
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(json_lines([{"text": name}]))
    (tmp_path / "data" / "a5.txt").write_text("a5")
    (tmp_path / "data" / "a6.jsonl").mkdir()  # a folder is no file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {
        "a*.jsonl": ["a1", "a2"],
        "?1.jsonl": ["a1", "b1"],
        "[!b]?.jsonl": ["a1", "a2"],
        "a*": ["a1", "a2", "a5"],
        "**/a*.jsonl": ["a1", "a2", "sub/a3", "sub/deep/a4"],
        "sub/*/*": ["sub/deep/a4"],
    }
    for pattern, names in expected.items():
        for place in (tmp_path / "data" / pattern, f"data/{pattern}", f"~/data/{pattern}"):
            found = rows_of(place)
            assert sorted(row.text or "" for row in found) == names, pattern
            assert [row.row_id for row in found] == [f"train/{i}" for i in range(len(names))]
    assert [row.text for row in rows_of("data/a*.jsonl", split="all[1:]")] == ["a2"]
    assert count_rows(DataConfig(path="data/a*.jsonl")) == 2
    assert "no file matches 'data/x*'" in message_of("data/x*")
    assert "no split 'test'; expected all, train" in message_of("data/a*", split="test")
    (tmp_path / "data" / "a7.docx").write_bytes(b"PK")
    assert "a7.docx: expected a file of type" in message_of("data/a*")


def test_a_name_with_wildcards_that_exists_is_meant(tmp_path: Path) -> None:
    for name in ("a*.jsonl", "ab.jsonl", "a[b].jsonl", "a?.jsonl"):
        (tmp_path / name).write_bytes(json_lines([{"text": name}]))
        assert [row.text for row in rows_of(tmp_path / name)] == [name]


def test_the_stamp_of_wildcards_follows_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([{"text": name}]))
    config = DataConfig(path=str(tmp_path / "*.jsonl"))
    first = open_source(config).stamp()
    monkeypatch.chdir("/")
    assert open_source(config).stamp() == first
    (tmp_path / "c.jsonl").write_bytes(json_lines([{"text": "c"}]))
    assert open_source(config).stamp() != first


# --- URLs


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty folder in memory, and its removal."""
    url = f"memory://{request.node.name.split('[')[0]}"
    filesystem = fsspec.filesystem("memory")
    yield url
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)


def put(url: str, content: bytes | Records) -> None:
    content = content if isinstance(content, bytes) else json_lines(content)
    fsspec.filesystem("memory").pipe_file(url, content)


def test_a_file_at_a_url(store: str) -> None:
    put(f"{store}/a.jsonl", [{"text": "a"}, {"text": "b"}])
    assert [row.text for row in rows_of(f"{store}/a.jsonl")] == ["a", "b"]
    assert [row.text for row in rows_of(f"{store}/a.jsonl", split="train[50%:]")] == ["b"]
    assert "no split 'test'; expected train" in message_of(f"{store}/a.jsonl", split="test")
    assert f"no data at '{store}/b.jsonl'; expected a file, a folder, a URL" in message_of(
        f"{store}/b.jsonl"
    )
    first = open_source(DataConfig(path=f"{store}/a.jsonl")).stamp()
    assert open_source(DataConfig(path=f"{store}/a.jsonl")).stamp() == first
    put(f"{store}/a.jsonl", [{"text": "a"}])
    assert open_source(DataConfig(path=f"{store}/a.jsonl")).stamp() != first
    assert count_rows(DataConfig(path=f"{store}/a.jsonl")) == 1


def test_wildcards_in_a_url(store: str) -> None:
    for name in ("b", "a", "sub/c"):
        put(f"{store}/{name}.jsonl", [{"text": name}])
    assert [row.text for row in rows_of(f"{store}/*.jsonl")] == ["a", "b"]
    assert sorted(row.text or "" for row in rows_of(f"{store}/**/*.jsonl")) == ["a", "b", "sub/c"]
    assert "no file matches" in message_of(f"{store}/x*.jsonl")
    put(f"{store}/[a].jsonl", [{"text": "literal"}])
    assert [row.text for row in rows_of(f"{store}/[a].jsonl")] == ["literal"]


def test_a_folder_at_a_url_has_the_rules_of_a_folder_here(store: str, tmp_path: Path) -> None:
    files = {
        "train/a.jsonl": [{"text": "a"}],
        "train/b.jsonl": [{"text": "b"}],
        "test/[c].jsonl": [{"text": "c"}],
        "more/d.jsonl": [{"text": "d"}],
        ".hidden/e.jsonl": [{"text": "e"}],
    }
    for name, rows in files.items():
        put(f"{store}/{name}", rows)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines(rows))
    for split in ("train", "test", "all"):
        here, there = rows_of(tmp_path, split=split), rows_of(store, split=split)
        assert here == there
        assert len(here) == {"train": 2, "test": 1, "all": 4}[split]
    assert message_of(store, split="dev").replace(store, str(tmp_path)) == message_of(
        tmp_path, split="dev"
    )
    put(
        f"{store}/README.md",
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: more/d.jsonl\n---\n",
    )
    assert [row.text for row in rows_of(store)] == ["d"]


def test_a_web_address(tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a"}]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines([{"text": "b"}])))
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            assert [row.text for row in rows_of(f"{base}/a.jsonl")] == ["a"]
            assert [row.text for row in rows_of(f"{base}/b.jsonl.gz?token=a/b.c")] == ["b"]
            assert [row.text for row in rows_of(f"{base}/*.jsonl")] == ["a"]
            assert open_source(DataConfig(path=f"{base}/a.jsonl")).stamp().startswith("urls:")
            assert "nothing.jsonl" in message_of(f"{base}/nothing.jsonl")
        finally:
            server.shutdown()
            thread.join()
    assert "/a.jsonl" in message_of(f"{base}/a.jsonl")


def test_urls_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nosuch" in message_of("nosuch://a/b.jsonl")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert "pip install 'logitcask[s3]'" in message_of("s3://bucket/a.jsonl")


def test_a_bucket(s3: str, tmp_path: Path) -> None:
    filesystem, folder = fsspec.filesystem("s3"), f"{s3}/data set"
    for split, text in (("train", "a"), ("test", "b")):
        pq.write_table(pa.table({"text": [text]}), tmp_path / "x.parquet")
        filesystem.pipe_file(f"{folder}/{split}/x.parquet", (tmp_path / "x.parquet").read_bytes())
    for path in (folder, f"{folder}/train/x.parquet", f"{folder}/tr*/*.parquet"):
        assert rows_of(path) == [Row("train/0", "a", None)]
    first = open_source(DataConfig(path=folder)).stamp()
    assert open_source(DataConfig(path=folder)).stamp() == first
    filesystem.pipe_file(f"{folder}/train/x.parquet", b"x" * 900)
    filesystem.invalidate_cache()
    with pytest.raises(UserError, match=r"x\.parquet"):
        open_source(DataConfig(path=folder))
    assert f"no data at '{s3}/nothing'" in message_of(f"{s3}/nothing")
