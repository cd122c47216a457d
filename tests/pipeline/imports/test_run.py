"""An import as a whole: the command, its header, a killed import, and the second reading."""

from __future__ import annotations

import json
import logging

import numpy as np
import polars
import pytest

from logitcask.cache_format import CacheReader, IncompleteCacheError, UserError
from logitcask.cache_format.errors import ConfigError
from logitcask.pipeline.cli import app
from logitcask.pipeline.imports import run as imports
from logitcask.pipeline.imports.base import ImportOptions
from tests.pipeline.imports.conftest import K, V, imported, make_texts
from tests.pipeline.imports.test_distillkit_raw import write


@pytest.fixture
def source(rng, tmp_path):
    return write(tmp_path / "rows.parquet", make_texts(rng, 60), lambda text: text.logprobs)


def run(*arguments):
    app([str(each) for each in arguments], standalone_mode=False)


_GIVEN = ("--teacher", "org/teacher", "--tokenizer", "synthetic", "--vocab-size", V)


def test_the_command(source, tmp_path, capsys):
    run("import", "distillkit-raw", source, tmp_path / "cache", *_GIVEN, "--json")
    found = json.loads(capsys.readouterr().out)
    manifest = CacheReader(str(tmp_path / "cache")).manifest
    assert found["fingerprint"] == manifest.fingerprint
    assert manifest.teacher.model == "org/teacher"
    assert manifest.teacher.engine == "imported from distillkit-raw"
    assert manifest.tokenizer.name == "synthetic"
    assert len(manifest.tokenizer.vocab_sha256) == 64
    assert manifest.config["import"]["layout"] == "distillkit-raw"
    assert manifest.data.counters["kept_positions"] == manifest.statistics.positions
    run("info", tmp_path / "cache")
    assert "not known: the source did not hold every target's logprob" in capsys.readouterr().out


def test_inspect_derive_and_export_say_what_is_not_known(rng, tmp_path, capsys):
    texts = make_texts(rng, 30)
    source = write(tmp_path / "rows.parquet", texts, lambda text: text.logits)
    imported("distillkit-raw", source, tmp_path / "cache")
    run("inspect", tmp_path / "cache", "--sequence", 0)
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert shown.count("?") >= len(texts[0].tokens) - 1
    run("inspect", tmp_path / "cache", "--sequence", 0, "--json")
    (first, *rest) = json.loads(capsys.readouterr().out)["tokens"]
    assert first["teacher"] is None
    assert all(token["teacher"]["tail_logprob"] is None for token in rest)
    run("derive", tmp_path / "cache", tmp_path / "small", "--top-k", 3)
    assert "its mass is not known" in capsys.readouterr().out
    small = CacheReader(str(tmp_path / "small"))
    assert small.manifest.store.unknown == ("tail", "targets")
    assert all((s.ids >= 0).sum(axis=1).max() == 3 for s in small)
    with pytest.raises(UserError, match="tail masses are unknown"):
        run("derive", tmp_path / "cache", tmp_path / "other", "--min-probability", 0.1)
    run("export", "parquet", tmp_path / "small", tmp_path / "out.parquet")
    frame = polars.read_parquet(tmp_path / "out.parquet")
    assert frame["tail_mass"].is_null().all()
    assert frame["head_mass"].is_null().all()
    assert frame["target_rank"].is_null().sum() > frame["target_id"].is_null().sum()
    assert frame["head_ids"].is_not_null().any()
    run("push", tmp_path / "small", tmp_path / "copy", "--preview")
    shown = polars.read_parquet(tmp_path / "copy" / "preview" / "preview.parquet")
    assert len(shown)
    assert shown["tail_mass"].is_null().all()


def test_what_needs_the_unknown_values_is_refused(rng, tmp_path):
    source = write(tmp_path / "rows.parquet", make_texts(rng, 4), lambda text: text.logits)
    imported("distillkit-raw", source, tmp_path / "cache")
    for refused in (
        lambda: run("audit", tmp_path / "cache"),
        lambda: run("report", tmp_path / "cache", "--out", tmp_path / "report.html"),
        lambda: run("serve", tmp_path / "cache", "--port", "0"),
    ):
        with pytest.raises(UserError, match=r"does not know all values .*tail, targets"):
            refused()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["distillkit", "x", "y", *_GIVEN],
            "no layout 'distillkit'; expected one of distillkit-raw",
        ),
        (["distillkit-raw", "x.parquet", "y", *_GIVEN[:2]], "tokenizer is missing"),
        (["distillkit-raw", "x.parquet", "y", *_GIVEN, "--logprob-step", "0.3"], "logprob_step"),
        (["distillkit-raw", "x.parquet", "y", *_GIVEN, "--columns", "a"], "expected NAME=COLUMN"),
        (["distillkit-raw", "x.parquet", "y", *_GIVEN, "--columns", "a=b"], "which no layout has"),
        (["distillkit-raw", "x.parquet", "y", *_GIVEN], r"no data at 'x\.parquet'"),
        (["sidecar", "x.parquet", "y", *_GIVEN], "sidecar needs --tokens"),
    ],
    ids=lambda value: "",
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises((ConfigError, UserError), match=said) as error:
        run("import", *arguments)
    assert "\n" not in str(error.value)


def test_other_names_of_columns(rng, tmp_path):
    import pyarrow.parquet as pq

    source = write(tmp_path / "rows.parquet", make_texts(rng, 30), lambda text: text.logprobs)
    table = pq.read_table(source).rename_columns(["ids", "token_ids", "tops"])
    pq.write_table(table, source)
    columns = {"input_ids": "ids", "top_values": "tops"}
    reader = imported("distillkit-raw", source, tmp_path / "cache", columns=columns)
    assert len(reader) == 30


def test_a_killed_import_goes_on(source, tmp_path, monkeypatch):
    whole = imported("distillkit-raw", source, tmp_path / "whole")
    out, options = tmp_path / "out", ImportOptions(teacher="m", tokenizer="synthetic", vocab_size=V)
    real, made = imports.as_sequence, []

    def killed(*arguments, **given):
        made.append(arguments[1])
        if len(made) == 60 + 25:  # the prior is made of the first 60
            raise KeyboardInterrupt
        return real(*arguments, **given)

    monkeypatch.setattr(imports, "as_sequence", killed)
    with pytest.raises(KeyboardInterrupt):
        imports.import_cache("distillkit-raw", str(source), out, options, shard_tokens=20)
    with pytest.raises(IncompleteCacheError):
        CacheReader(str(out))
    monkeypatch.setattr(imports, "as_sequence", real)
    imports.import_cache("distillkit-raw", str(source), out, options, shard_tokens=20)
    again = CacheReader(str(out))
    assert len(again.manifest.shards) > 5
    assert again.manifest.fingerprint == whole.manifest.fingerprint
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_another_source_does_not_go_on(source, rng, tmp_path, monkeypatch):
    out, options = tmp_path / "out", ImportOptions(teacher="m", tokenizer="synthetic", vocab_size=V)
    real = imports.as_sequence

    def killed(held, name, *arguments, **given):
        if name == "59":
            raise KeyboardInterrupt
        return real(held, name, *arguments, **given)

    monkeypatch.setattr(imports, "as_sequence", lambda *a, **k: real(*a, **k))
    monkeypatch.setattr(imports, "_first", lambda sequences: [])
    monkeypatch.setattr(imports, "as_sequence", killed)
    with pytest.raises(KeyboardInterrupt):
        imports.import_cache("distillkit-raw", str(source), out, options, shard_tokens=20)
    monkeypatch.setattr(imports, "as_sequence", real)
    write(source, make_texts(rng, 61), lambda text: text.logprobs)
    with pytest.raises(UserError, match=r"unfinished build of something else: data\.sha256"):
        imports.import_cache("distillkit-raw", str(source), out, options)


def test_heads_scaled_to_1_are_no_logprobs(rng, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def scaled(text):
        mass = np.exp(text.top(text.logprobs)[1]).sum(axis=1, keepdims=True)
        return text.logprobs - np.log(mass)

    source = write(tmp_path / "rows.parquet", make_texts(rng, 60), scaled)
    reader = imported("distillkit-raw", source, tmp_path / "cache")
    assert "tail" in reader.manifest.store.unknown
    assert "the heads' masses are all 1, so they were scaled to 1" in caplog.text
    asked = imported("distillkit-raw", source, tmp_path / "asked", values="logprobs")
    assert asked.manifest.store.tail_known


def test_only_the_first_sequences(source, tmp_path):
    assert len(imported("distillkit-raw", source, tmp_path / "cache", max_sequences=7)) == 7


def test_other_options_do_not_go_on(rng, tmp_path, monkeypatch):
    """The shards of a killed import hold what its options made of the data."""
    source = write(tmp_path / "rows.parquet", make_texts(rng, 60), lambda text: text.logprobs)
    given = {"teacher": "m", "tokenizer": "synthetic", "vocab_size": V}
    out, real = tmp_path / "out", imports.as_sequence

    def killed(held, name, *arguments, **options):
        if name == "59":
            raise KeyboardInterrupt
        return real(held, name, *arguments, **options)

    monkeypatch.setattr(imports, "_first", lambda sequences: [])
    monkeypatch.setattr(imports, "as_sequence", killed)
    with pytest.raises(KeyboardInterrupt):
        imports.import_cache(
            "distillkit-raw", str(source), out, ImportOptions(**given), shard_tokens=20
        )
    monkeypatch.setattr(imports, "as_sequence", real)
    other = ImportOptions(**given, values="logprobs")
    with pytest.raises(UserError, match="unfinished import with other options: values"):
        imports.import_cache("distillkit-raw", str(source), out, other)
    moved = tmp_path / "moved.parquet"
    source.rename(moved)
    imports.import_cache("distillkit-raw", str(moved), out, ImportOptions(**given))
    assert len(CacheReader(str(out))) == 60


def test_columns_that_the_first_rows_lack(rng, tmp_path):
    """Labels of the third row count, although the first has none; a missing column is named."""
    texts = make_texts(rng, 40, 6)
    rows = []
    for text in texts:
        ids, top = text.top(text.logprobs)
        rows.append(
            {
                "input_ids": text.tokens.tolist(),
                "token_ids": ids.tolist(),
                "top_values": top.tolist(),
            }
        )
    labels = [*[-100] * 3, *texts[2].tokens[3:].tolist()]
    rows[2]["labels"] = labels

    def file(name):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    with pytest.raises(UserError, match="row 0: labels is null"):
        imported("distillkit-raw", file("some.jsonl"), tmp_path / "some")
    for text, row in zip(texts, rows, strict=True):
        row.setdefault("labels", text.tokens.tolist())
    reader = imported("distillkit-raw", file("all.jsonl"), tmp_path / "all")
    assert reader[2].positions.tolist() == [2, 3, 4]
    assert reader[3].positions.tolist() == [0, 1, 2, 3, 4]
    del rows[0]["top_values"]
    with pytest.raises(UserError, match="row 0: top_values is null"):
        imported("distillkit-raw", file("lacking.jsonl"), tmp_path / "lacking")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("labels", None, "labels has a null, expected numbers"),
        ("input_ids", 1.5, "input_ids has 1.5, expected integers"),
        ("input_ids", 10**30, "too large to convert"),
        ("input_ids", 1e300, r"input_ids has 1e\+300, expected integers"),
    ],
    ids=["null", "half", "huge", "far"],
)
def test_cells_that_are_no_tokens(column, value, said, rng, tmp_path):
    (text,) = make_texts(rng, 1, 6)
    ids, top = text.top(text.logprobs)
    row = {"token_ids": ids.tolist(), "top_values": top.tolist()}
    row |= {"input_ids": text.tokens.tolist(), "labels": text.tokens.tolist()}
    row[column][2] = value
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said):
        imported("distillkit-raw", tmp_path / "rows.jsonl", tmp_path / "cache")


def test_nulls_in_heads_are_padding(rng, tmp_path):
    texts = make_texts(rng, 20, 6)
    rows = []
    for text in texts:
        ids, top = (part.tolist() for part in text.top(text.logprobs))
        for row in range(len(ids)):
            ids[row][-1] = top[row][-1] = None
        rows.append({"input_ids": text.tokens.tolist(), "token_ids": ids, "top_values": top})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = imported("distillkit-raw", tmp_path / "rows.jsonl", tmp_path / "cache")
    assert reader.manifest.store.top_k == K - 1
    assert reader[0].ids.tolist() == texts[0].top(texts[0].logprobs)[0][:, :-1].tolist()
