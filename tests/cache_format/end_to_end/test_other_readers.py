"""Other people's tools open the shards: Arrow files with plain columns, packed ones as bytes."""

from __future__ import annotations

import duckdb
import polars
import pyarrow as pa
import pytest

from logitcask.cache_format import CacheReader, CacheWriter
from logitcask.cache_format.shards.prior import TailPrior


@pytest.fixture
def path(tmp_path, rng, header, sequence):
    sequences = [sequence(rng, f"s{i}", kind="samples") for i in range(10)]
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header(kind="samples"), TailPrior.estimate(sequences, 1000))
        for index in range(2):
            with writer.shard(index) as shard:
                for each in sequences[5 * index : 5 * index + 5]:
                    shard.append(each)
        writer.finish(started, 2)
    return tmp_path / "c"


def check(rows, path):
    """``rows``: (sequence_id, input_ids, target_logprob, tail_step) of every sequence."""
    cache = CacheReader(path)
    for (name, ids, target, tail), sequence in zip(rows, cache, strict=True):
        assert name == sequence.sequence_id
        assert list(ids) == sequence.input_ids.tolist()
        assert list(target) == sequence.target_logprob.tolist()
        assert [-step / 256 for step in tail] == sequence.tail_logprob.tolist()


def test_polars(path):
    table = polars.concat(
        [polars.read_ipc(file) for file in sorted((path / "data").glob("*.arrow"))]
    )
    check(table.select("sequence_id", "input_ids", "target_logprob", "tail_step").iter_rows(), path)
    assert table.select(polars.col("target_logprob").list.mean().mean()).item() < 0


def test_duckdb(path):
    shards = [pa.ipc.open_file(file).read_all() for file in sorted((path / "data").glob("*.arrow"))]
    cache = duckdb.from_arrow(pa.concat_tables(shards))
    check(cache.project("sequence_id, input_ids, target_logprob, tail_step").fetchall(), path)
    [(mean,)] = (
        cache.project("unnest(target_logprob) as logprob").aggregate("avg(logprob)").fetchall()
    )
    assert mean < 0
