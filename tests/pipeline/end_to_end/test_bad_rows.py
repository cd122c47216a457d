"""A folder of files that are wrong in twelve ways, with each policy of ``data.on_bad_rows``, against
the table in docs/texts.md.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import main
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate.run import estimate
from tests.pipeline.text.test_sources import json_lines

DOCS = Path(__file__).parents[3] / "docs" / "texts.md"


def _parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _damaged() -> bytes:
    """A Parquet file with zeros in the second of two row groups of 256 rows."""
    sink = pa.BufferOutputStream()
    words = np.random.default_rng(0).integers(0, 10**9, (512, 20))  # nothing to compress
    texts = [" ".join(map(str, row)) for row in words.tolist()]
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=256)
    content = bytearray(sink.getvalue().to_pybytes())
    at = len(content) * 3 // 4
    content[at : at + 400] = bytes(400)
    return bytes(content)


GOOD = json_lines([{"text": "good"}])
FILES: dict[str, bytes] = {
    "broken-lines.jsonl": GOOD + b'{"text": "cut of\n' + b"text\n" + GOOD,
    "wrong-shapes.jsonl": GOOD + json_lines([{"text": None}, {"text": 5}, {"txt": "x"}]),
    "not-objects.jsonl": GOOD + b'["x"]\n"x"\n5\n' + GOOD,
    "latin-1.jsonl": GOOD + '{"text": "caf\xe9"}\n'.encode("latin-1") + GOOD,
    "utf-16.jsonl": GOOD.decode().encode("utf-16"),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "cut-array.json": b'[{"text": "good"}, {"text": "goo',
    "cut.jsonl.gz": gzip.compress(GOOD * 3)[:-6],
    "cells.csv": b'text,n\ngood,1\nhello, world,2,3\n"x" y,4\ngood,5\n',
    "damaged.parquet": _damaged(),
    "other-columns.parquet": _parquet(body=["x"]),
}
POLICIES = {"default": None, "fail": "fail", "skip": "skip"}


def settings(tmp_path: Path, path: Path, policy: str | None, split: str = "all") -> BuildConfig:
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {"path": str(path), "split": split, "on_bad_rows": policy},
        "store": {"top_k": 2, "min_k": 1, "tail_samples": 0},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }
    return BuildConfig.model_validate(fields)


def outcome(tmp_path: Path, name: str, policy: str | None) -> tuple[str, str]:
    """The rows that a build reads of the file behind a good one, or that it stops; and the rejects
    by reason.
    """
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    file = folder / name
    file.write_bytes(FILES[name])
    config = settings(tmp_path, folder, policy)
    try:
        read = str(build(config).manifest.data.counters["documents"] - 1)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert name in said
        read = "stops"
    lines = []
    if config.rejects_file().exists():
        lines = [json.loads(line) for line in config.rejects_file().read_text().splitlines()]
    assert all(line.get("file", str(file)) == str(file) for line in lines)
    reasons = Counter(line["reason"] for line in lines)
    return read, ", ".join(f"{count} `{reason}`" for reason, count in reasons.items()) or "-"


def table() -> dict[str, list[str]]:
    """The cells of the table in the docs, by file."""
    rows = re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows if name in FILES}


def test_the_table_has_every_file() -> None:
    assert list(table()) == list(FILES)
    assert len(FILES) == 12


@pytest.mark.parametrize("name", FILES)
def test_each_file_with_each_policy(name: str, tmp_path: Path) -> None:
    found = []
    for number, policy in enumerate(POLICIES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(outcome(folder, name, policy))
    (default, _), (fail, _), (skip, named) = found
    _, *expected = table()[name]
    assert [default, fail, skip, named] == expected


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["teacher-cache", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_whole_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build of all of it: every row that can be used is used, and the summary names the rest."""
    folder = folder_of(tmp_path)
    config = settings(tmp_path, folder, "skip")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"data": {"sources"}})))

    code, _, stderr = run_command(capsys, monkeypatch, "build", str(file), "data.on_bad_rows=null")
    assert code == 2
    assert "broken-lines.jsonl, line 2: not JSON" in stderr
    assert "data.on_bad_rows=skip leaves such rows out" in stderr

    code, stdout, stderr = run_command(capsys, monkeypatch, "build", str(file))
    assert code == 0, stderr
    cache = CacheReader(tmp_path / "cache")
    expected = [int(cells[3]) for cells in table().values()]
    assert cache.manifest.data.counters["documents"] == sum(expected)
    lines = [json.loads(line) for line in config.rejects_file().read_text().splitlines()]
    (summary,) = [line for line in stdout.splitlines() if line.startswith("rejects ")]
    reasons = Counter(line["reason"] for line in lines if "id" in line)
    assert f"{sum(reasons.values())} rows left out" in summary
    for reason, count in reasons.items():
        assert f"{count} {reason}" in summary
    unreadable = [Path(line["file"]).name for line in lines if "file" in line]
    assert f"{len(unreadable)} files not read to the end" in summary
    assert f"named in {config.rejects_file()}" in summary
    assert sorted(unreadable) == sorted(
        name for name, cells in table().items() if "files_unreadable" in cells[4]
    )
    # Each bad line is named with its file and its number there.
    details = [line["detail"] for line in lines if line["reason"] == "not_json"]
    place = folder / "broken-lines.jsonl"
    assert [detail.split(":")[0] for detail in details] == [
        f"{place}, line 2",
        f"{place}, line 3",
    ]
    # The ids count the rows that are left out, too.
    ids = [s.sequence_id for s in cache] + [line["id"] for line in lines if "id" in line]
    assert sorted(int(each.split("/")[1]) for each in ids) == list(range(len(ids)))
    # A forecast sees the same rows.
    before = config.rejects_file().stat()
    forecast = estimate(config)
    sample = forecast.sample
    assert config.rejects_file().stat() == before
    assert [line for line in forecast.assumptions if line.startswith("of these rows: ")] == [
        f"of these rows: {summary.split(maxsplit=1)[1].partition('; named')[0]}"
    ]
    assert sample.tokens == cache.manifest.statistics.tokens
    assert sample.counters["files_unreadable"] == len(unreadable)


def test_errors_of_the_disk_are_no_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or a network that fails would otherwise make a smaller cache."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 3)

    def failing(*_: object) -> Any:
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr("logitcask.pipeline.text.file_formats._json_objects", failing)
    with pytest.raises(UserError, match="Input/output error"):
        build(settings(tmp_path, file, "skip", "train"))


def test_chats_that_the_template_refuses_stop_a_build_that_fails(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": chat}, {"messages": chat * 2}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    (tmp_path / "t.jinja").write_text(
        "{% if messages | length > 2 %}{{ nothing.at_all }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for policy in POLICIES.values():
        config = settings(tmp_path, tmp_path / "a.jsonl", policy, "train")
        fields = config.model_dump(mode="json", exclude={"data": {"sources"}})
        fields["data"] |= {
            "messages_field": "messages",
            "chat_template": str(tmp_path / "t.jinja"),
        }
        fields["output"] = str(tmp_path / str(policy))
        config = BuildConfig.model_validate(fields)
        if policy == "fail":
            with pytest.raises(UserError, match="the chat template refuses row train/1 of"):
                build(config)
        else:
            assert build(config).manifest.data.counters["refused_by_template"] == 1
        (line,) = config.rejects_file().read_text().splitlines() if policy != "fail" else ("{}",)
        assert json.loads(line).get("reason", "refused_by_template") == "refused_by_template"
