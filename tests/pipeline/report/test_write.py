"""The report: what it says, what it samples, and what it refuses."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.schema import shard_schema
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.report.content import _PARTS
from logitcask.pipeline.report.write import ReportOptions, write_report


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.html"


def page_text(out):
    """The text of the page without its data, scripts and style."""
    page = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", out.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_numbers_of_the_page(reader, tokenizer, out):
    """Each from the exported table."""
    report = write_report(reader, out, ReportOptions(), tokenizer)
    table = pl.from_arrow(reader.to_table())
    rows = table.filter(pl.col("target_id").is_not_null())
    loss = -rows["target_logprob"].cast(pl.Float64)
    heads = np.exp(np.array(rows["head_logprobs"].to_list(), np.float64))
    said = page_text(out)
    size = sum((Path(reader.path) / shard.path).stat().st_size for shard in reader.manifest.shards)
    assert report.bytes == out.stat().st_size
    assert (report.tokens, report.view_tokens) == (len(table), len(table))
    for name, value, more in (
        ("tokens", f"{len(table):,}", "in 40 sequences"),
        ("predicted", f"{len(rows):,}", "kept positions"),
        ("size", f"{size / 1000:.3g} kB", f"{size / len(table):.1f} bytes per token"),
        (
            "mass in the heads",
            f"{100 * (1 - rows['tail_mass'].cast(pl.Float64).mean()):.1f} %",
            "8.0 ids each",
        ),
        ("draws", "6.00", "per position"),
    ):
        assert f"{name} {value} {more}" in said
    card = re.search(r"teacher's loss ([\d.]+) nats per token", said)[1]
    assert float(card) == pytest.approx(loss.mean(), abs=0.01)
    for k in (1, 2, 4):
        mass, target = heads[:, :k].sum(axis=1).mean(), (rows["target_rank"] < k).mean()
        assert f"{k} {100 * mass:.1f} % {100 * target:.1f} % {k:.1f} " in said
    classes = {
        "digits": [4],
        "line end": [5],
        "other whitespace": [6],
        "part of a character": [8, 9, 10],
        "special token": [0],
    }
    for name, ids in classes.items():
        of_class = loss.filter(rows["target_id"].is_in(ids))
        assert f"{name} {of_class.mean():.2f} {len(of_class):,} tokens" in said
    first = rows["position"] == 0
    assert f" 1 {loss.filter(first).mean():.2f} {first.sum():,} tokens" in said
    book = rows["sequence_id"].str.starts_with("book")
    assert f"book {loss.filter(book).mean():.2f} {book.sum():,} tokens" in said
    hardest = rows.group_by("sequence_id").agg(
        pl.col("target_logprob").cast(pl.Float64).mean(), n=pl.len()
    )
    hardest = hardest.filter(pl.col("n") >= 16).sort("target_logprob").row(0)
    tokens = (table["sequence_id"] == hardest[0]).sum()
    assert (
        f"Hardest for the teacher sequence tokens nats per token {hardest[0]} {tokens} {-hardest[1]:.3f}"
        in said
    )
    assert "sample" not in said.partition("Smaller caches")[0]


def test_sizes_of_smaller_caches(reader, tokenizer, out, tmp_path):
    """Close to the sizes of the caches that the commands make."""
    write_report(reader, out, ReportOptions(), tokenizer)
    said = page_text(out)
    for k in (1, 4):
        (size, command) = re.search(
            rf" {k} [\d.]+ % [\d.]+ % {k:.1f} ([\d.]+) (teacher-cache derive \S+ \S+ --top-k {k}) ",
            said,
        ).groups()
        assert command == f"teacher-cache derive {reader.path} {reader.path}-top{k} --top-k {k}"
        derive(reader.path, tmp_path / f"cache-top{k}", DeriveOptions(top_k=k))
        small = CacheReader(str(tmp_path / f"cache-top{k}"))
        stored = sum(shard.bytes for shard in small.manifest.shards)
        assert float(size) == pytest.approx(stored / small.manifest.statistics.tokens, rel=0.1)
    assert " 8 " in said
    assert "this cache" in said


def test_sizes_by_part(reader, tokenizer, out):
    write_report(reader, out, ReportOptions(), tokenizer)
    said = page_text(out)
    total = reader.manifest.statistics.bytes
    parts = re.search(rf"Size by part of {total:,} bytes (.*?) Origin", said)[1]
    sizes = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+) bytes", parts)]
    assert sum(sizes) == total
    columns = sum(np.array(list(reader.column_bytes(i).values())) for i in range(2))
    by_name = dict(zip(reader.codec.schema.names, columns.tolist(), strict=True))
    draws = sum(size for name, size in by_name.items() if name.startswith("sample"))
    assert f"draws {draws / total:.1%} {draws:,} bytes" in said


def test_who_wrote_the_text_and_its_logprobs(tmp_path, out):
    """Of a writer that is not the teacher: it is named, and its column is a part of its own."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"q": "number {n}"}}\n' for n in range(40)))
    config = {
        "teacher": {"model": "synthetic", "vocab_size": 400},
        "data": {
            "path": str(tmp_path / "prompts.jsonl"),
            "prompt_field": "q",
            "max_length": 64,
            "generate": {"writer": "synthetic:7", "temperature": 0.5, "max_new_tokens": 20},
        },
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "log": False,
        "output": str(tmp_path / "cache"),
    }
    build(BuildConfig.model_validate(config))
    reader = CacheReader(tmp_path / "cache")
    write_report(reader, out, ReportOptions())
    said = page_text(out)
    writer = reader.manifest.data.generation.writer
    assert f"text by {writer.model}" in said
    assert "at temperature 0.5 and top_p 1 (loss mask: generated)" in said
    assert "the teacher wrote" not in said
    (size,) = [reader.column_bytes(0)["writer_logprob"]]
    assert f"writer's logprobs {size / reader.manifest.statistics.bytes:.1%} {size:,} bytes" in said


def test_every_column_of_a_shard_has_a_part():
    schema = shard_schema(
        400,
        entropy=True,
        samples=True,
        sample_logprobs=True,
        writer_logprobs=True,
        chosen_ids=True,
    )
    beginnings = tuple(each for names in _PARTS.values() for each in names)
    assert [name for name in schema.names if not name.startswith(beginnings)] == []


def test_names_of_a_megabyte_and_of_hidden_characters(make_reader, out):
    names = {"n" * 1_000_000: [0, 1], "\u202egnirts/1": [1, 2]}
    reader, tokenizer = make_reader(["a", "b", "c"], names)
    report = write_report(reader, out, ReportOptions(), tokenizer)
    assert report.bytes < 200_000
    assert "\u202e" not in out.read_text()
    said = page_text(out)
    assert r"\u202egnirts" in said
    assert "(1,000,000 characters)" in said


def test_a_large_cache_is_sampled_and_the_page_says_so(reader, tokenizer, out):
    tokens = reader.manifest.statistics.tokens
    report = write_report(
        reader, out, ReportOptions(sample=tokens // 2, tokens=tokens // 4), tokenizer
    )
    assert report.sequences == 40 * (tokens // 2) // tokens  # 20, or 19 of an odd number of tokens
    said = page_text(out)
    assert (
        f"The figures are of a random sample: {report.sequences} of 40 sequences, "
        f"{report.tokens:,} tokens" in said
    )
    assert report.view_tokens <= tokens // 4
    assert (
        f"Here are {report.view_sequences} of 40 sequences ({report.view_tokens:,} tokens)" in said
    )
    first = out.read_bytes()
    write_report(reader, out, ReportOptions(sample=tokens // 2, tokens=tokens // 4), tokenizer)
    assert out.read_bytes() == first
    write_report(
        reader, out, ReportOptions(sample=tokens // 2, tokens=tokens // 4, seed=1), tokenizer
    )
    assert out.read_bytes() != first


def test_listed_sequences_are_in_the_view_if_there_is_room(reader, tokenizer, out):
    tokens = reader.manifest.statistics.tokens
    write_report(reader, out, ReportOptions(tokens=tokens * 3 // 4), tokenizer)
    linked = re.findall(r'href="#sequence-(\d+)"', out.read_text())
    assert len(linked) >= 3


def test_chosen_sequences(reader, tokenizer, out):
    report = write_report(reader, out, ReportOptions(sequences=range(3, 9, 2)), tokenizer)
    assert report.view_sequences == 3
    assert report.view_tokens == sum(len(reader[index]) for index in (3, 5, 7))
    assert report.sequences == 40
    said = page_text(out)
    assert f"Here are 3 of 40 sequences ({report.view_tokens:,} tokens), as chosen." in said
    assert "a random sample" not in said
    least = min(len(reader[index]) for index in (3, 5, 7))
    one = ReportOptions(sequences=range(3, 9, 2), tokens=least)
    report = write_report(reader, out, one, tokenizer)
    assert report.view_sequences == 1
    assert (
        f"Here are 1 of 40 sequences ({report.view_tokens:,} tokens), as chosen; "
        "2 more of the chosen ones would be more tokens than --tokens allows." in page_text(out)
    )
    with pytest.raises(UserError, match="has sequences 0 to 39; --sequences chooses none of them"):
        write_report(reader, out, ReportOptions(sequences=range(0)), tokenizer)


def test_no_token_view(reader, out):
    report = write_report(reader, out, ReportOptions(tokens=0))
    assert report.view_sequences == 0
    assert 'id="tokens"' not in out.read_text()
    assert "class of token" not in out.read_text()


def test_it_is_read_once_and_said(reader, tokenizer, out):
    read = []
    write_report(reader, out, ReportOptions(), tokenizer, on_tokens=read.append)
    assert sum(read) == reader.manifest.statistics.tokens
    assert len(read) == 40


def test_an_empty_cache(make_reader, out):
    reader, tokenizer = make_reader(["<s>"], {})
    report = write_report(reader, out, ReportOptions(), tokenizer)
    assert (report.sequences, report.tokens, report.view_sequences) == (0, 0, 0)
    assert "tokens 0 in 0 sequences" in page_text(out)


def test_a_cache_of_one_token(make_reader, out):
    """Nothing is predicted: means are dashes, and one is not plural."""
    reader, tokenizer = make_reader(["<s>"], {"a": [0]})
    write_report(reader, out, ReportOptions(), tokenizer)
    said = page_text(out)
    assert "for 1 token of texts" in said
    assert "tokens 1 in 1 sequence size" in said.replace("predicted 0 kept positions ", "")
    assert "mass in the heads – – draws –" in said
    assert not re.search(r"\bnan\b", said)


def test_no_file_of_somebody_else_is_replaced(reader, out):
    out.write_text(json.dumps({}))
    with pytest.raises(UserError, match="is not a report of logitcask"):
        write_report(reader, out, ReportOptions())


@pytest.mark.parametrize(
    "name",
    sorted(path.name for path in (Path(__file__).parents[2] / "golden").iterdir() if path.is_dir()),
)
def test_every_kind_of_cache(name, out):
    reader = CacheReader(str(Path(__file__).parents[2] / "golden" / name))
    if reader.manifest.store.unknown:
        with pytest.raises(UserError, match="there is no report on it"):
            write_report(reader, out, ReportOptions())
        return
    report = write_report(reader, out, ReportOptions())
    assert report.tokens == reader.manifest.statistics.tokens
    assert ("entropy</option>" in out.read_text()) == reader.manifest.store.entropy
    assert not re.search(r"\bnan\b", page_text(out))
