"""A cache as plain tables: every value is that of the reader's sequences, by Python's own lists."""

from __future__ import annotations

import math
import re
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import CacheReader, CacheWriter, UserError
from logitcask.cache_format.export.parquet import write_parquet
from logitcask.cache_format.export.tables import COLUMNS, SCHEMA

from ..conftest import KINDS, make_header, make_sequence


@pytest.fixture(params=KINDS)
def reader(request, tmp_path, rng):
    """A cache of a kind, of 3 shards; one sequence has no kept position, one a single token."""
    with CacheWriter(tmp_path / "cache") as writer:
        header = writer.begin(make_header(kind=request.param))
        for index in range(3):
            with writer.shard(index, sequences_per_batch=lambda _: 4) as shard:
                for i in range(6):
                    tokens, kept = (
                        (1, 0.8) if (index, i) == (1, 2) else (int(rng.integers(2, 40)), 0.8)
                    )
                    kept = 0.0 if (index, i) == (2, 3) else kept
                    shard.append(
                        make_sequence(
                            rng, f"{index}/{i}", tokens=tokens, kind=request.param, kept=kept
                        )
                    )
        writer.finish(header, 3)
    return CacheReader(tmp_path / "cache")


def text(token):
    return f"<{token}>"


def expected(reader):
    """The rows, one by one, from the definitions of the columns."""
    rows = []
    for sequence in reader:
        at = {int(position): row for row, position in enumerate(sequence.positions)}
        for position, token in enumerate(sequence.input_ids.tolist()):
            row = dict.fromkeys(COLUMNS)
            row |= {"sequence_id": sequence.sequence_id, "position": position}
            row |= {"token_id": token, "token_text": text(token)}
            p = at.get(position)
            if p is not None:
                head = [i for i in range(sequence.ids.shape[1]) if sequence.ids[p, i] >= 0]
                logprobs = [float(sequence.logprobs[p, i]) for i in head]
                row |= {
                    "target_id": int(sequence.input_ids[position + 1]),
                    "target_logprob": float(sequence.target_logprob[p]),
                    "target_rank": int(sequence.target_rank[p]),
                    "head_ids": [int(sequence.ids[p, i]) for i in head],
                    "head_logprobs": logprobs,
                    "head_mass": pytest.approx(sum(map(math.exp, logprobs)), rel=1e-6),
                    "tail_mass": pytest.approx(math.exp(sequence.tail_logprob[p]), rel=1e-6),
                }
                if sequence.entropy is not None:
                    row["entropy"] = float(sequence.entropy[p])
                if sequence.writer_logprob is not None:
                    row["writer_logprob"] = float(sequence.writer_logprob[p])
                if sequence.chosen is not None:
                    pairs = zip(sequence.chosen.ids[p], sequence.chosen.logprobs[p], strict=True)
                    chosen = [(int(i), float(logprob)) for i, logprob in pairs if i >= 0]
                    row["chosen_ids"] = [i for i, _ in chosen]
                    row["chosen_logprobs"] = [logprob for _, logprob in chosen]
                if sequence.samples is not None:
                    sets, draws = sequence.samples.ids.shape[1:]
                    real = [(t, s) for t in range(sets) for s in range(draws)]
                    real = [at for at in real if sequence.samples.ids[p][at] >= 0]
                    row["draws"] = [int(sequence.samples.ids[p][at]) for at in real]
                    if sequence.samples.logprobs is not None:
                        row["draw_logprobs"] = [
                            float(sequence.samples.logprobs[p][at]) for at in real
                        ]
            rows.append(row)
    return rows


def test_the_whole_table(reader):
    table = reader.to_table(text=text)
    assert table.schema == SCHEMA
    table.validate(full=True)
    assert table.to_pylist() == expected(reader)


def test_tables_are_pieces_of_it(reader):
    whole = reader.to_table()
    assert whole["token_text"].null_count == whole.num_rows
    tables = list(reader.iter_tables(rows=50))
    assert pa.concat_tables(tables) == whole
    assert all(50 <= table.num_rows < 50 + 40 for table in tables[:-1])
    assert len(tables) > 3
    some = reader.to_table([-1, 0])
    lengths = len(reader[-1]), len(reader[0])
    last, first = whole.slice(whole.num_rows - lengths[0]), whole.slice(0, lengths[1])
    assert some.combine_chunks() == pa.concat_tables([last, first]).combine_chunks()
    assert reader.to_table([]) == SCHEMA.empty_table()


def test_only_what_is_returned_is_read(reader, monkeypatch):
    opened = []
    monkeypatch.setattr(
        CacheReader,
        "_get_batch",
        lambda self, file, shard, batch, get=CacheReader._get_batch: (
            opened.append((shard, batch)) or get(self, file, shard, batch)
        ),
    )
    tables = reader.iter_tables(rows=1)
    assert opened == []
    next(tables)
    assert opened == [(0, 0)]


def test_parquet_read_by_others(reader, tmp_path):
    counted, out = [], tmp_path / "out.parquet"
    size = write_parquet(reader, out, rows=60, text=text, on_tokens=counted.append)
    assert size == out.stat().st_size
    rows = expected(reader)
    assert sum(counted) == len(rows)

    file = pq.ParquetFile(out)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == counted
    assert all(60 <= n < 100 for n in counted[:-1])
    assert {group.column(0).compression for group in groups} == {"ZSTD"}
    assert file.schema_arrow.metadata[b"cache_fingerprint"].decode() == reader.manifest.fingerprint
    assert file.read().to_pylist() == rows

    assert polars.read_parquet(out).to_dicts() == rows
    found = duckdb.sql(f"SELECT * FROM '{out}'")
    assert [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()] == rows
    frame = file.read().to_pandas()
    assert frame["token_id"].tolist() == [row["token_id"] for row in rows]
    ((nll,),) = duckdb.sql(f"SELECT avg(target_logprob) FROM '{out}'").fetchall()
    assert nll == pytest.approx(np.concatenate([s.target_logprob for s in reader]).mean(), rel=1e-5)


def test_a_file_that_exists_is_kept(reader, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out\.parquet exists; remove it, or choose another file"):
        write_parquet(reader, out)
    assert out.read_text() == "mine"


def test_nothing_is_left_of_an_export_that_fails(reader, tmp_path, monkeypatch):
    out = tmp_path / "folder" / "out.parquet"
    with pytest.raises(UserError, match=r"cannot write to .*out\.parquet: .*No such file"):
        write_parquet(reader, out)
    out.parent.mkdir()
    with pytest.raises(ZeroDivisionError):
        write_parquet(reader, out, on_tokens=lambda tokens: 1 // 0)
    assert list(out.parent.iterdir()) == []


def test_the_columns_in_the_docs():
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", page, re.MULTILINE)
    kinds = {name: str(kind).replace("item: ", "") for name, (kind, _) in COLUMNS.items()}
    documented = [(name, kind, said) for name, kind, said in rows if name in COLUMNS]
    assert documented == [(name, kinds[name], said) for name, (_, said) in COLUMNS.items()]


def test_two_exports_to_one_file(reader, tmp_path):
    """Each writes a file of its own; the one that ends last stays, whole."""
    out = tmp_path / "out.parquet"

    def in_between(tokens):
        if not out.exists():
            write_parquet(reader, out, rows=1)

    write_parquet(reader, out, rows=1, on_tokens=in_between)
    assert pq.read_table(out).num_rows == reader.manifest.statistics.tokens
    assert list(tmp_path.glob("*.tmp")) == []
