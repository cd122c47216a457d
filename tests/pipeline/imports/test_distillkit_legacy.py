"""DistillKit's first codec: words of ids, exact values and a polynomial of the others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, imported, make_texts, mean_kl

_OPTIONS = {"k": 12, "exact_k": 5, "polynomial_degree": 2}


def words(ids, bits):
    """Ids in 64-bit words, from the lowest bit, as many as fit into each."""
    each = 64 // bits
    return [
        sum(int(one) << (bits * at) for at, one in enumerate(ids[start : start + each]))
        for start in range(0, len(ids), each)
    ]


def write(path, texts, *, invert=True, sqrt=False):
    """The file, and what it holds: (ids, logits) of each text."""
    a = np.arange(12 - 5) + 1.0
    powers = [a ** (-i if invert else i) for i in range(3)] + ([np.sqrt(a)] if sqrt else [])
    matrix = np.stack(powers, axis=1)
    rows = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": []}
    held = []
    for text in texts:
        ids, values = text.top(text.logits - text.logits.mean(axis=1, keepdims=True), 12)
        exact = values[:, :5].astype(np.float16)
        coefficients = np.linalg.lstsq(matrix, values[:, 5:].T, rcond=None)[0].T.astype(np.float32)
        rows["input_ids"].append(text.tokens.tolist())
        rows["packed_indices"].append([words(row, 9) for row in ids])
        rows["exact_values"].append(exact.astype(np.float32).tolist())
        rows["coeffs"].append(coefficients.tolist())
        held.append((ids, np.concatenate([exact, coefficients @ matrix.T], axis=1)))
    kinds = [pa.uint64(), pa.float32(), pa.float32()]
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            *(
                (name, pa.list_(pa.list_(kind)))
                for name, kind in zip(list(rows)[1:], kinds, strict=True)
            ),
        ]
    )
    pq.write_table(pa.table(rows, schema=schema), path)
    return held


@pytest.mark.parametrize(("invert", "sqrt"), [(True, False), (False, True)])
def test_the_codec(invert, sqrt, texts, tmp_path):
    texts = texts if invert else texts[:100]
    held = write(tmp_path / "rows.parquet", texts, invert=invert, sqrt=sqrt)
    options = {"invert_polynomial": invert, "with_sqrt_term": sqrt}
    reader = imported(
        "distillkit-legacy", tmp_path / "rows.parquet", tmp_path / "cache", **_OPTIONS, **options
    )
    # Logits without their mean: nothing is known of the mass outside.
    assert "tail" in reader.manifest.store.unknown
    assert mean_kl(held, reader, tail=False) < KL_BY_ROUNDING


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact_k": 4}, "has 5 exact_k, but these settings of the codec make 4"),
        ({"polynomial_degree": 3}, "has 3 terms .* make 4"),
        ({"with_sqrt_term": True}, "has 3 terms .* make 4"),
        ({"k": 30}, "has 2 words of ids .* make 5"),
        ({"polynomial_degree": None}, "needs --polynomial-degree"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(change, said, rng, tmp_path):
    write(tmp_path / "rows.parquet", make_texts(rng, 20))
    with pytest.raises(UserError, match=said):
        imported(
            "distillkit-legacy", tmp_path / "rows.parquet", tmp_path / "cache", **_OPTIONS | change
        )


@pytest.mark.parametrize("column", ["packed_indices", "exact_values", "coeffs"])
def test_unequal_rows_are_refused(column, rng, tmp_path):
    file = tmp_path / "rows.parquet"
    write(file, make_texts(rng, 20))
    columns = pq.read_table(file).to_pydict()
    columns[column][3].pop()
    pq.write_table(pa.table(columns, schema=pq.read_schema(file)), file)
    with pytest.raises(UserError, match=r"row 3 has \d rows of ids, \d of exact values and \d of"):
        imported("distillkit-legacy", file, tmp_path / "cache", **_OPTIONS)


def test_rows_of_unequal_ids_are_refused(rng, tmp_path):
    file = tmp_path / "rows.parquet"
    write(file, make_texts(rng, 20))
    columns = pq.read_table(file).to_pydict()
    columns["packed_indices"][3][0].pop()
    pq.write_table(pa.table(columns, schema=pq.read_schema(file)), file)
    with pytest.raises(UserError, match=r"row 3 has 1 words of ids .* make 2"):
        imported("distillkit-legacy", file, tmp_path / "cache", **_OPTIONS)
