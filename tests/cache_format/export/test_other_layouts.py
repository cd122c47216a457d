"""Exports to the layouts of other trainers, read back by hand and by the imports."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import CacheReader, CacheWriter, UserError
from logitcask.cache_format.export.other_layouts import NOTHING, write_axolotl, write_distillkit
from logitcask.pipeline.imports.base import ImportOptions
from logitcask.pipeline.imports.run import import_cache
from tests.cache_format.conftest import make_header, make_sequence

V = 300
_OPTIONS = ImportOptions(teacher="m", tokenizer="synthetic", vocab_size=V, logprob_step=1 / 64)


def make_cache(folder, rng, *, kept, kind="ragged", count=40):
    header = make_header(V, 8, 1 / 64, kind)
    sequences = [
        make_sequence(rng, f"s{n}", tokens=10, vocab_size=V, kind=kind, kept=kept)
        for n in range(count)
    ]
    with CacheWriter(folder) as writer:
        header = writer.begin(header)
        with writer.shard(0) as shard:
            for sequence in sequences:
                shard.append(sequence)
        writer.finish(header, 1)
    return CacheReader(str(folder))


def test_distillkit(rng, tmp_path):
    reader = make_cache(tmp_path / "cache", rng, kept=1.1)
    size = write_distillkit(reader, tmp_path / "out.parquet")
    assert size == (tmp_path / "out.parquet").stat().st_size
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(table) == len(reader)
    for row, sequence in zip(table, reader, strict=True):
        assert row["input_ids"] == sequence.input_ids.tolist()
        assert row["attention_mask"] == [1] * 10
        assert len(row["token_ids"]) == len(row["top_values"]) == 9
        for ids, values, head, logprobs in zip(
            row["token_ids"], row["top_values"], sequence.ids, sequence.logprobs, strict=True
        ):
            size = int((head >= 0).sum())
            assert len(set(ids)) == len(ids) == 8
            assert all(0 <= each < V for each in ids)
            assert ids[:size] == head[:size].tolist()
            assert values == [*logprobs[:size].tolist(), *[NOTHING] * (8 - size)]


def test_axolotl(rng, tmp_path):
    reader = make_cache(tmp_path / "cache", rng, kept=0.6)
    write_axolotl(reader, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for row, sequence in zip(table, reader, strict=True):
        labels = [
            t if m else -100
            for t, m in zip(sequence.input_ids.tolist(), sequence.loss_mask, strict=True)
        ]
        assert row["labels"] == labels
        places = dict(zip(sequence.positions.tolist(), range(99), strict=False))
        for position in range(10):
            mask, ids = row["target_mask"][position], row["target_token_ids"][position]
            if position not in places:
                assert mask == [0] * 8
                continue
            head = sequence.ids[places[position]]
            assert [i for i, m in zip(ids, mask, strict=True) if m] == head[head >= 0].tolist()
            assert len(set(ids)) == 8


@pytest.mark.parametrize(
    ("write", "layout", "kept"),
    [(write_distillkit, "distillkit-raw", 1.1), (write_axolotl, "axolotl-prepared", 0.6)],
)
def test_round_trips(write, layout, kept, rng, tmp_path):
    reader = make_cache(tmp_path / "cache", rng, kept=kept)
    write(reader, tmp_path / "out.parquet")
    import_cache(layout, str(tmp_path / "out.parquet"), tmp_path / "back", _OPTIONS)
    back = CacheReader(str(tmp_path / "back"))
    assert len(back) == len(reader)
    sizes = np.concatenate([(s.ids >= 0).sum(axis=1) for s in reader])
    store = back.manifest.store
    assert (store.ragged, store.min_k, store.top_k) == (True, sizes.min(), sizes.max())
    for one, other in zip(reader, back, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        np.testing.assert_array_equal(one.ids >= 0, other.ids >= 0)
        # Equal logprobs may change places.
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        np.testing.assert_array_equal(np.sort(one.ids, axis=1), np.sort(other.ids, axis=1))
        known = one.logprobs.max(axis=1) < 0
        np.testing.assert_allclose(
            np.exp(other.tail_logprob)[known],
            np.maximum(1 - np.exp(one.logprobs).sum(axis=1), 0)[known],
            atol=2e-3,
        )


def test_what_a_layout_cannot_hold_is_refused(rng, tmp_path):
    masked = make_cache(tmp_path / "masked", rng, kept=0.6)
    with pytest.raises(UserError, match="have no place for a loss mask; export axolotl-prepared"):
        write_distillkit(masked, tmp_path / "out.parquet")
    drawn = make_cache(tmp_path / "drawn", rng, kept=1.1, kind="random sampling", count=2)
    with pytest.raises(UserError, match="holds no heads"):
        write_axolotl(drawn, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*"))


def test_draws_stay_behind(rng, tmp_path, caplog):
    reader = make_cache(tmp_path / "cache", rng, kept=1.1, kind="samples", count=2)
    write_axolotl(reader, tmp_path / "out.parquet")
    assert "the draws from their tails, and the exact mass of these, stay behind" in caplog.text
