"""Sources on real files of every format: the rows that come out, what is skipped, and what is
said when it goes wrong.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.file_formats import read_columns, read_rows
from logitcask.pipeline.text.sources import Row, open_source

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}

Records = list[dict[str, Any]]


def json_lines(records: Records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write_table(path: Path, records: Records, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def write_ipc(path: Path, records: Records, open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(records)
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path, Records], object]] = {
    "a.jsonl": lambda p, r: p.write_bytes(json_lines(r)),
    # A byte order mark, as Windows writes it.
    "a.ndjson": lambda p, r: p.write_bytes(b"\xef\xbb\xbf" + json_lines(r)),
    "a.json": lambda p, r: p.write_text(json.dumps(r, indent=1)),
    "lines.json": lambda p, r: p.write_bytes(json_lines(r)),
    "a.jsonl.gz": lambda p, r: p.write_bytes(gzip.compress(json_lines(r))),
    "a.jsonl.bz2": lambda p, r: p.write_bytes(bz2.compress(json_lines(r))),
    "a.jsonl.xz": lambda p, r: p.write_bytes(lzma.compress(json_lines(r))),
    "a.jsonl.zst": lambda p, r: p.write_bytes(zstandard.compress(json_lines(r))),
    "a.json.gz": lambda p, r: p.write_bytes(gzip.compress(json.dumps(r).encode())),
    "a.json.xz": lambda p, r: p.write_bytes(
        lzma.compress(b"\xef\xbb\xbf" + json.dumps(r, indent=1).encode())
    ),
    "a.json.zst": lambda p, r: p.write_bytes(zstandard.compress(json.dumps(r).encode())),
    "lines.json.zst": lambda p, r: p.write_bytes(
        zstandard.compress(b"\n \n" + json.dumps(r, indent=1).encode())
    ),
    "a.csv": lambda p, r: write_table(p, r, ","),
    "a.tsv": lambda p, r: write_table(p, r, "\t"),
    "a.parquet": lambda p, r: pq.write_table(pa.Table.from_pylist(r), p, row_group_size=3),
    "a.arrow": lambda p, r: write_ipc(p, r, pa.ipc.new_stream),
    "file.arrow": lambda p, r: write_ipc(p, r, pa.ipc.new_file),
}


def rows_of(path: object, **settings: Any) -> list[Row]:
    return list(open_source(DataConfig(path=str(path), **settings)))


def message_of(path: object, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def random_texts(rng: np.random.Generator, count: int) -> list[str]:
    alphabet = list('ab 1,;"\n\té日🙂👩‍👩‍👧 \u2028')
    return ["x" + "".join(rng.choice(alphabet, rng.integers(1, 40))) + "." for _ in range(count)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    texts = random_texts(rng, 11)
    records = [{"n": i, "text": text, "key": f"k{i}"} for i, text in enumerate(texts)]
    WRITERS[name](tmp_path / name, records)

    rows = rows_of(tmp_path / name)
    assert [row.text for row in rows] == texts
    assert [row.row_id for row in rows] == [f"train/{i}" for i in range(11)]
    assert all(row.messages is None for row in rows)
    assert [row.row_id for row in rows_of(tmp_path / name, id_field="key")] == [
        f"k{i}" for i in range(11)
    ]
    assert [row.row_id for row in rows_of(tmp_path / name, id_field="n")] == [
        str(i) for i in range(11)
    ]


def test_only_a_line_feed_ends_a_json_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\r\n{"text":\r"a"}\r\n\n{"text": "b\xe2\x80\xa8c"}')
    assert rows_of(tmp_path / "a.jsonl") == [
        Row("train/0", "a", None),
        Row("train/1", "b\u2028c", None),
    ]


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo 🙂\r\nthree", encoding="utf-8")
    source = open_source(DataConfig(path=str(tmp_path / "a.txt")))
    assert [(row.row_id, row.text) for row in source] == [
        ("train/0", "one"),
        ("train/2", "two 🙂"),
        ("train/3", "three"),
    ]
    assert source.counters == {"rows_read": 4, "rows_skipped_empty": 1}


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n007,1\nNA,2\n"",3\n"a ""quoted"", cell",4\nshort\n')
    assert [row.text for row in rows_of(tmp_path / "a.csv")] == [
        "007",
        "NA",
        'a "quoted", cell',
        "short",
    ]
    assert "row train/4" in message_of(tmp_path / "a.csv", id_field="id")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
def test_maps_are_objects(name: str, tmp_path: Path) -> None:
    """Spark writes a map where others write a struct."""

    def write(*messages: list[tuple[str, str]]) -> None:
        chats = pa.list_(pa.map_(pa.string(), pa.string()))
        table = pa.table({"messages": pa.array([list(messages)], chats)})
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
            return
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(
            str(tmp_path / name), table.schema
        ) as out:
            out.write_table(table)

    write(list(HI.items()), list(YO.items()))
    assert rows_of(tmp_path / name, messages_field="messages") == [Row("train/0", None, [HI, YO])]
    write([*HI.items(), ("content", "ho")], list(YO.items()))
    assert "content" in message_of(tmp_path / name, messages_field="messages")


def test_rows_without_text_are_counted_by_reason_and_keep_their_numbers(tmp_path: Path) -> None:
    lines = [
        '{"text": null}',
        '{"text": "a"}',
        '{"text": 5}',
        '{"text": ["x"]}',
        '{"text": ""}',
        '{"text": " \\n"}',
    ]
    lines += ['{"other": 1}', '{"text": "half \\ud83d"}', '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_source(DataConfig(path=str(tmp_path / "a.jsonl")))
    for _ in range(2):  # and once more from the start
        assert [(row.row_id, row.text) for row in source] == [("train/1", "a"), ("train/8", "b")]
        assert source.counters == {
            "rows_read": 9,
            "rows_skipped_null": 2,
            "rows_skipped_not_a_string": 2,
            "rows_skipped_empty": 2,
            "rows_skipped_broken_unicode": 1,
        }


def test_a_column_may_change_its_type_anywhere(tmp_path: Path) -> None:
    records = [
        {"text": f"t{i}", "meta": None if i < 50 else {"at": i} if i < 70 else i}
        for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    assert len(rows_of(tmp_path / "a.jsonl")) == 100


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "good"}] * 2000) + b'{"text": oops\n')
    rows = iter(open_source(DataConfig(path=str(tmp_path / "a.jsonl"))))
    assert next(rows).text == "good"
    with pytest.raises(UserError, match="line 2001"):
        list(rows)


# --- several files, saved data sets, the hub


def test_files_of_a_folder_need_the_same_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    assert "b.parquet has no column 'text'" in message_of(tmp_path)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "polars", "arrow"])
@pytest.mark.parametrize("columns", [None, ["n"], ["id"]])
def test_a_format_that_was_saved_with_the_data_changes_nothing(
    kind: str, columns: list[str] | None, tmp_path: Path
) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict(
        {"text": ["a", "b"], "id": [100, 101], "n": [[1, 2]] * 2, "chat": [[HI, YO]] * 2}
    )
    data.with_format(kind, columns=columns).save_to_disk(tmp_path / "one")
    DatasetDict(train=data.with_format(kind, columns=columns)).save_to_disk(tmp_path / "many")
    for folder in (tmp_path / "one", tmp_path / "many"):
        assert rows_of(folder, id_field="id") == [Row("100", "a", None), Row("101", "b", None)]
        assert [row.messages for row in rows_of(folder, messages_field="chat")] == [[HI, YO]] * 2


def test_a_saved_data_set_whose_path_is_a_chain_to_datasets(tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["a"]})
    data.save_to_disk(tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "a::b")
    assert "takes '::' in the path of a saved data set" in message_of(tmp_path / "a::b")
    (tmp_path / "a::b").rename(tmp_path / "[a]*?")
    assert rows_of(tmp_path / "[a]*?") == [Row("train/0", "a", None)]


def test_data_sets_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"text": ["a", None, "c"], "chat": [[HI, YO]] * 3})
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "many")
    assert rows_of(tmp_path / "one") == [Row("train/0", "a", None), Row("train/2", "c", None)]
    assert rows_of(tmp_path / "many", split="test", messages_field="chat") == [
        Row("test/0", None, [HI, YO])
    ]
    assert "no split 'dev'" in message_of(tmp_path / "many", split="dev")
    assert "no column 'txt'" in message_of(tmp_path / "one", text_field="txt")


def test_the_files_of_a_hub_data_set_are_read_at_the_commit_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is out of reach of a test: what `datasets` answers is played, on a local
    folder.
    """
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / f"name@{commit}"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["from the hub"]}), folder / "part.parquet")
    asked = []

    def builder(path: str, **settings: object) -> SimpleNamespace:
        asked.append((path, settings))
        files = {datasets.Split.TRAIN: [f"file://{folder}/part.parquet"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    source = open_source(DataConfig(path="user/name", name="small", revision="v1"))
    assert asked == [("user/name", {"name": "small", "revision": "v1", "cache_dir": None})]
    assert list(source) == [Row("train/0", "from the hub", None)]
    assert source.stamp() == f"hub:user/name@{commit}"


# --- ids and stamps


def test_an_id_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([{"text": "x", "id": key} for key in ("a", 7, "b", "7")])
    )
    assert "'7' occurs twice in column 'id'" in message_of(tmp_path / "a.jsonl", id_field="id")


def test_a_row_without_an_id_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([{"text": "x", "id": "a"}, {"text": "y"}, {"text": "z", "id": "c"}])
    )
    for policy in (None, "fail"):
        message = message_of(tmp_path / "a.jsonl", id_field="id", on_bad_rows=policy)
        assert "row train/1" in message
        assert "every row needs an id" in message
    config = DataConfig(path=str(tmp_path / "a.jsonl"), id_field="id", on_bad_rows="skip")
    source = open_source(config)
    assert [row.row_id for row in source] == ["a", "c"]
    assert source.counters == {"rows_read": 3, "rows_skipped_no_id": 1}


def test_an_id_that_is_no_unicode_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": "a"}\n{"text": "y", "id": "b\\ud83d"}\n')
    message = message_of(tmp_path / "a.jsonl", id_field="id")
    assert r"row train/1" in message
    assert r"'b\ud83d'" in message
    message.encode()


def test_the_stamp_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "d" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(json_lines([{"text": "one"}]))
    os.utime(file, ns=(1, 10**18))

    def stamp(path: Path) -> str:
        return open_source(DataConfig(path=str(path))).stamp()

    first, first_folder = stamp(file), stamp(file.parent)
    assert first == stamp(file)
    moved = file.parent.rename(tmp_path / "e")
    assert stamp(moved) == first_folder
    os.utime(moved / "a.jsonl", ns=(1, 10**18 + 1))
    assert stamp(moved / "a.jsonl") != first
    assert stamp(moved) != first_folder


# --- mistakes


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "no data at" in message_of(tmp_path / "nothing")
    assert "no data at 'not/here.jsonl'" in message_of("not/here.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    assert "a.parquet" in message_of(tmp_path / "a.parquet")
    (tmp_path / "a.docx").write_bytes(b"PK")
    assert "expected a file of type .arrow, .csv, .json" in message_of(tmp_path / "a.docx")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt, line 1: byte 1 of the line (0xe9) is not UTF-8" in message_of(
        tmp_path / "latin.txt"
    )
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    assert "line 2: found a list" in message_of(tmp_path / "list.jsonl")
    (tmp_path / "mixed.json").write_text('[{"text": "a"}, "b"]')
    assert "element 1: found a str" in message_of(tmp_path / "mixed.json")
    (tmp_path / "cut.json").write_text('\n[{"text": "a"},\n{"te')
    assert "not JSON" in message_of(tmp_path / "cut.json")
    assert "line 3 column 2" in message_of(tmp_path / "cut.json")
    (tmp_path / "none").mkdir()
    assert "cannot open data set" in message_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b'text\n"ok"\n"open\n', "a.csv, line 3: unexpected end of data"),
        ("a.csv", b'text\nok\n"x" y\n', "a.csv, line 3: ',' expected after '\"'"),
        ("a.csv", b"text\nok\nhello, world\n", "a.csv, line 3: found 2 cells, expected 1"),
        ("a.csv", b"text,id,text\na,1,b\n", "has 2 columns of the name 'text'"),
        ("a.csv", b"text\nok\ncaf\xe9\n", "a.csv, line 3: byte 4 of the line (0xe9) is not UTF-8"),
        ("a.tsv", b"text\nok\nhello\tworld\n", "a.tsv, line 3: found 2 cells, expected 1"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n\n{"text": "caf\xe9"}\n',
            "a.jsonl, line 3: byte 14 of the line (0xe9)",
        ),
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        (
            "a.json",
            b'[{"text": "ok"},\n {"text": "caf\xe9"}]\n',
            "a.json, line 2: byte 15 of the line (0xe9)",
        ),
        ("a.txt", b"ok\n" * 4999 + b"caf\xe9\n", "a.txt, line 5000: byte 4 of the line (0xe9)"),
        (
            "a.txt.gz",
            gzip.compress(b"ok\ncaf\xe9\n", mtime=0),
            "a.txt.gz, line 2: byte 4 of the line (0xe9)",
        ),
        *(
            (name, content.encode(encoding), "is UTF-16 or UTF-32 text, expected UTF-8; convert it")
            for name, content in (
                ("a.txt", "some text\n"),
                ("a.jsonl", '{"text": "a"}\n'),
                ("a.csv", "text\na\n"),
            )
            for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
        ),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "a.jsonl.gz"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 999)[:-20], "a.jsonl.bz2"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 999)[:-20], "a.jsonl.xz"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-20], "a.jsonl.zst"),
        *(
            (f"a.jsonl{suffix}", b'{"text": "a"}\n', f"a.jsonl{suffix}")
            for suffix in (".gz", ".bz2", ".xz", ".zst")
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in message_of(tmp_path / name)
    if "UTF-16" in says or "columns" in says:
        return
    # The same among others: which file it was is in the message all the same.
    (tmp_path / "good.txt").touch()
    assert says in message_of(tmp_path, split="all")


def test_a_quote_that_is_never_closed_takes_in_the_rest_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\nok\n"open\nlost\nlost\n')
    (tmp_path / "b.csv").write_text("text\nalso ok\n")
    assert "a.csv, line 3: unexpected end of data" in message_of(tmp_path / "a.csv")
    source = open_source(DataConfig(path=str(tmp_path), on_bad_rows="skip"))
    assert [(row.row_id, row.text) for row in source] == [
        ("train/0", "ok"),
        ("train/1", "also ok"),
    ]
    assert source.counters == {"rows_read": 2, "files_unreadable": 1}


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["c"]], names=["text", "text", "id"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert f"{name} has 2 columns of the name 'text'" in message_of(tmp_path / name)
        assert [row.text for row in rows_of(tmp_path / name, text_field="id")] == ["c"]
    (tmp_path / "a.csv").write_text(",,text,,\n1,2,a,,\n")  # cells without a name are nobody's
    assert [row.text for row in rows_of(tmp_path / "a.csv")] == ["a"]
    (tmp_path / "b.csv").write_text("text\n\na,,\n")
    assert [row.text for row in rows_of(tmp_path / "b.csv")] == ["a"]


def test_a_damaged_page_names_the_file(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": [f"row {i}" * 9 for i in range(2000)]}),
        tmp_path / "a.parquet",
        row_group_size=500,
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(content)
    message = message_of(tmp_path / "a.parquet")
    assert message.startswith(f"cannot read {tmp_path / 'a.parquet'} after row ")


def test_a_compressed_file_of_several_parts_is_read_whole(tmp_path: Path) -> None:
    lines = [json_lines([{"text": str(i)}]) for i in range(5)]
    packers = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
    }
    for suffix, pack in packers.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(map(pack, lines)))
        assert [row.text for row in rows_of(path)] == list("01234")
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28)
    )
    (tmp_path / "wide.jsonl.zst").write_bytes(
        wide.compressobj().compress(b"") + wide.compress(b"".join(lines))
    )
    assert [row.text for row in rows_of(tmp_path / "wide.jsonl.zst")] == list("01234")


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress]
)
def test_remote_files(pack: Callable[[bytes], bytes]) -> None:
    suffix = {
        gzip.compress: ".gz",
        bz2.compress: ".bz2",
        lzma.compress: ".xz",
        zstandard.compress: ".zst",
    }.get(pack, "")
    url = f"memory://test-remote-files/a.jsonl{suffix}"
    filesystem = fsspec.filesystem("memory")
    try:
        filesystem.pipe_file(url, pack(json_lines([{"text": "a"}, {"text": "b"}])))
        assert read_columns(url) == ["text"]
        assert list(read_rows(url, ["text"])) == [{"text": "a"}, {"text": "b"}]
        filesystem.pipe_file(url, pack(b'{"text": "a"}\n{"text": "\xe9"}\n'))
        with pytest.raises(UserError, match=r"line 2: byte 11 of the line \(0xe9\) is not UTF-8"):
            list(read_rows(url, ["text"]))
    finally:
        filesystem.rm("test-remote-files", recursive=True)


def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert (
        "need the package zstandard, which is not installed; pip install 'logitcask[text]'"
        in message_of(tmp_path / "a.jsonl.zst")
    )


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"body": "x", "messages": [HI, YO]}]))
    path = tmp_path / "a.jsonl"
    assert "no column 'text' (data.text_field); it has body, messages" in message_of(path)
    assert "set data.messages_field=messages" in message_of(path)
    assert "did you mean 'body'?" in message_of(path, text_field="bdy")
    assert "no column 'id' (data.id_field)" in message_of(path, text_field="body", id_field="id")
    assert "no split 'test'; expected train" in message_of(path, text_field="body", split="test")


def test_a_field_may_first_appear_in_a_later_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"other": 1}, {"text": "x"}]))
    assert rows_of(tmp_path / "a.jsonl") == [Row("train/1", "x", None)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_an_empty_data_set_is_an_error(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"")
    assert message_of(tmp_path / name).startswith("empty data set")


def test_a_data_set_without_a_usable_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": 1}, {"text": None}, {"text": 2}]))
    assert "none of its 3 rows can be used (2 not_a_string, 1 null)" in message_of(
        tmp_path / "a.jsonl"
    )


def test_leaving_a_parquet_file_early_lets_the_process_end_well(tmp_path: Path) -> None:
    rows = 20_000
    table = pa.table({"text": ["some words " * 20] * rows, "wide": [bytes(500)] * rows})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    code = (
        "import sys; from logitcask.pipeline.text.config import DataConfig; from logitcask.pipeline.text.sources import open_source;"
        "rows = iter(open_source(DataConfig(path=sys.argv[1]))); next(rows); rows.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
