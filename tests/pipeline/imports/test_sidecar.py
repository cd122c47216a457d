"""Rows beside another data set, joined by their id."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, K, imported, make_texts, mean_kl


def write(folder, texts, leave_out=()):
    """Both tables, and what the sidecar holds; it is about the tokens from the third."""
    beside, data, held = [], [], []
    for number, text in enumerate(texts):
        data.append({"row_id": f"r{number}", "input_ids": text.tokens.tolist()})
        ids, logprobs = (part[1:] for part in text.top(text.logprobs))
        own = text.tokens[2:]
        outside = ~(ids == own[:, None]).any(axis=1)
        # The true token is forced in, k + 1 entries; where it was among them, it stands twice.
        ids = np.concatenate([ids, own[:, None]], axis=1)
        its = text.logprobs[1 + np.arange(len(own)), own]
        logprobs = np.concatenate([logprobs, its[:, None]], axis=1)
        if number not in leave_out:
            beside.append(
                {
                    "row_id": f"r{number}",
                    "teacher_topk_ids": ids.tolist(),
                    "teacher_topk_logprobs": logprobs.tolist(),
                }
            )
            held.append((np.where((np.arange(K + 1) < K) | outside[:, None], ids, -1), logprobs))
    pq.write_table(pa.Table.from_pylist(beside), folder / "beside.parquet")
    pq.write_table(pa.Table.from_pylist(data), folder / "data.parquet")
    return held


def test_rows_beside_others(texts, tmp_path):
    held = write(tmp_path, texts, leave_out={3, 150})
    tokens = str(tmp_path / "data.parquet")
    reader = imported("sidecar", tmp_path / "beside.parquet", tmp_path / "cache", tokens=tokens)
    assert reader.manifest.store.unknown == ("ranks",)
    assert mean_kl(held, reader) < KL_BY_ROUNDING
    assert reader[3].input_ids.tolist() == texts[4].tokens.tolist()
    assert all(s.positions[0] == 1 for s in reader)


def test_another_order_is_refused(rng, tmp_path):
    write(tmp_path, make_texts(rng, 4))
    table = pq.read_table(tmp_path / "data.parquet")
    pq.write_table(table.take([0, 2, 1, 3]), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"row_id 'r2' is not in .* behind the row before it"):
        imported(
            "sidecar",
            tmp_path / "beside.parquet",
            tmp_path / "cache",
            tokens=str(tmp_path / "data.parquet"),
        )


def test_ids_alone_are_no_distribution(rng, tmp_path):
    write(tmp_path, make_texts(rng, 2))
    table = pq.read_table(tmp_path / "beside.parquet").drop_columns("teacher_topk_logprobs")
    pq.write_table(table, tmp_path / "beside.parquet")
    with pytest.raises(UserError, match="it lacks teacher_topk_logprobs"):
        imported(
            "sidecar",
            tmp_path / "beside.parquet",
            tmp_path / "cache",
            tokens=str(tmp_path / "data.parquet"),
        )
