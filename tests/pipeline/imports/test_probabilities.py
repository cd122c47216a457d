"""Columns of probabilities, and of exponentials of logits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, imported, make_texts, mean_kl


def write(path, texts, values):
    rows = []
    for text in texts:
        ids, top = text.top(np.exp(values(text)))
        rows.append([text.tokens.tolist(), top.astype(np.float32).tolist(), ids.tolist()])
    columns = dict(
        zip(("input_ids", "exp_logits", "index"), map(list, zip(*rows, strict=True)), strict=True)
    )
    pq.write_table(pa.table(columns), path)


def test_probabilities(texts, tmp_path):
    write(tmp_path / "rows.parquet", texts, lambda text: text.logprobs)
    reader = imported("probabilities", tmp_path / "rows.parquet", tmp_path / "cache")
    assert reader.manifest.store.tail_known
    assert mean_kl([t.top(t.logprobs) for t in texts], reader) < KL_BY_ROUNDING


def test_exponentials_of_logits(texts, tmp_path):
    write(tmp_path / "rows.parquet", texts, lambda text: text.logits)
    reader = imported("probabilities", tmp_path / "rows.parquet", tmp_path / "cache")
    assert not reader.manifest.store.tail_known
    assert mean_kl([t.top(t.logits) for t in texts], reader, tail=False) < KL_BY_ROUNDING


def test_logits_are_refused(rng, tmp_path):
    (text,) = make_texts(rng, 1)
    ids, values = text.top(text.logprobs)
    columns = {
        "input_ids": [text.tokens.tolist()],
        "exp_logits": [values.tolist()],
        "index": [ids.tolist()],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="in exp_logits, expected probabilities"):
        imported("probabilities", tmp_path / "rows.parquet", tmp_path / "cache")


def test_exponentials_that_overflowed_are_refused(rng, tmp_path):
    """Of the most probable entry nothing is known, so it is no padding."""
    (text,) = make_texts(rng, 1)
    ids, values = text.top(text.logits)
    exponentials = np.exp(values)
    exponentials[1, 0] = np.inf
    columns = {
        "input_ids": [text.tokens.tolist()],
        "exp_logits": [exponentials.tolist()],
        "index": [ids.tolist()],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="has the value inf, expected logprobs or logits"):
        imported("probabilities", tmp_path / "rows.parquet", tmp_path / "cache")
