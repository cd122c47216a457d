"""DistillKit's compressed rows: every part of the codec, written bit by bit, and wrong settings."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, V, imported, make_texts, mean_kl

_FORMAT = {"float16": "<e", "float32": "<f", "float64": "<d"}


def packed(numbers, bits):
    """Integers as bytes, the highest bit first."""
    text = "".join(format(int(number), f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def number(value, dtype):
    """(bytes, value as stored) of a float."""
    if dtype == "bfloat16":
        data = struct.pack("<f", value)[2:]
        return data, struct.unpack("<f", b"\0\0" + data)[0]
    data = struct.pack(_FORMAT[dtype], value)
    return data, struct.unpack(_FORMAT[dtype], data)[0]


def compressed(logprobs, *, exact_k, exact="float32", terms=(), bins=(), delta=True, unit=False):
    """(bytes, values as a reader gets them) of one row of falling logprobs."""
    row = np.diff(logprobs, prepend=0.0) if delta else np.array(logprobs)
    data, held = b"", []
    for value in row[:exact_k]:
        part, kept = number(value, exact)
        data, held = data + part, [*held, kept]
    rest = row[exact_k:].copy()
    t = np.linspace(0, 1, len(rest)) if unit else np.arange(len(rest), dtype=float)
    fit = np.zeros(len(rest))
    if terms:
        powers = np.stack([np.sqrt(t) if e == "sqrt" else t**e for e in terms], axis=1)
        coefficients = np.linalg.lstsq(powers, rest, rcond=None)[0]
        stored = []
        for value in coefficients:
            part, kept = number(value, "float32")
            data, stored = data + part, [*stored, kept]
        fit = powers @ np.array(stored)
    at = 0
    for entries, bits, dtype in bins:
        left = rest[at : at + entries] - fit[at : at + entries]
        part, scale = number(np.abs(left).max() / 2 ** (bits - 1) or 1.0, dtype)
        steps = np.clip(np.rint(left / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        data += part + packed(steps + 2 ** (bits - 1), bits)
        fit[at : at + entries] += steps * scale
        at += entries
    held = np.concatenate([held, fit])
    return data, held.cumsum() if delta else held


def write(path, texts, k, **codec):
    """The file, and what it holds: (ids, logprobs) of each text."""
    rows = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    held = []
    for text in texts:
        ids, logprobs = text.top(text.logprobs, k)
        both = [compressed(row, **codec) for row in logprobs]
        rows["input_ids"].append(text.tokens.tolist())
        rows["compressed_logprobs"].append([list(data) for data, _ in both])
        rows["bytepacked_indices"].append([list(packed(row, 9)) for row in ids])  # 300 < 2^9
        held.append((ids, np.array([values for _, values in both])))
    kinds = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    pq.write_table(pa.table(rows, schema=kinds), path)
    return held


CODECS = {
    "qwen3": (
        {"exact_k": 4, "terms": (0, 1, 2)},
        {"exact_k": 4, "polynomial_terms": "0,1,2"},
    ),
    "recommended": (
        {"exact_k": 3, "exact": "bfloat16", "terms": (0, 1, 2, "sqrt"), "delta": False},
        {
            "exact_k": 3,
            "exact_dtype": "bfloat16",
            "polynomial_terms": '[0, 1, 2, "sqrt"]',
            "delta_encoding": False,
        },
    ),
    "unit": (
        {"exact_k": 1, "exact": "float16", "terms": (0, 1), "unit": True, "delta": False},
        {
            "exact_k": 1,
            "exact_dtype": "float16",
            "polynomial_terms": "0,1",
            "normalize_t": True,
            "delta_encoding": False,
        },
    ),
    "bins": (
        {"exact_k": 2, "exact": "float64", "bins": ((6, 7, "float32"), (4, 5, "float16"))},
        {"exact_k": 2, "exact_dtype": "float64", "residual_bins": "6:7:float32,4:5:float16"},
    ),
    "terms and bins": (
        {"exact_k": 2, "terms": (0, 1), "bins": ((5, 6, "float16"),), "delta": False},
        {
            "exact_k": 2,
            "polynomial_terms": "0,1",
            "residual_bins": "5:6:float16",
            "delta_encoding": False,
        },
    ),
}


@pytest.mark.parametrize("name", CODECS)
def test_the_codec(name, texts, tmp_path):
    codec, options = CODECS[name]
    texts = texts if name == "qwen3" else texts[:100]
    held = write(tmp_path / "rows.parquet", texts, 12, **codec)
    reader = imported(
        "distillkit-packed", tmp_path / "rows.parquet", tmp_path / "cache", k=12, **options
    )
    # A fit may have more than all of the mass; an import scales such rows to 1.
    scaled = [
        (ids, logprobs - np.maximum(np.log(np.exp(logprobs).sum(axis=1)), 0)[:, None])
        for ids, logprobs in held
    ]
    # What the codec lost is not made good again: the cache says what the layout holds.
    assert mean_kl(scaled, reader) < 2 * KL_BY_ROUNDING
    assert [s.input_ids.tolist() for s in reader] == [t.tokens.tolist() for t in texts]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact_k": 5}, "has 28 bytes a row, but these settings of the codec make 32"),
        ({"exact_dtype": "bfloat16"}, "these settings of the codec make 20"),
        ({"polynomial_terms": "0,1"}, "these settings of the codec make 24"),
        (
            {"k": 13},
            "bytepacked_indices has 14 bytes a row, but these settings of the codec make 15",
        ),
        ({"vocab_size": 600}, "vocab_size"),
        ({"delta_encoding": False}, "logprobs"),
        ({"exact_k": 20}, "exact_k is 20, more than the 12 entries"),
        ({"polynomial_terms": "0,cube"}, "polynomial_terms has 'cube'"),
        ({"polynomial_terms": ""}, "others need polynomial_terms or residual_bins"),
        ({"residual_bins": "9"}, "residual_bins has '9'; expected ENTRIES:BITS:TYPE"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(change, said, rng, tmp_path):
    write(tmp_path / "rows.parquet", make_texts(rng, 50), 12, exact_k=4, terms=(0, 1, 2))
    options = {"k": 12, "exact_k": 4, "polynomial_terms": "0,1,2", "vocab_size": V} | change
    with pytest.raises((UserError, ValueError), match=said):
        imported("distillkit-packed", tmp_path / "rows.parquet", tmp_path / "cache", **options)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"polynomial_terms": "0,1,\N{SUPERSCRIPT TWO}"},
            "polynomial_terms has '\N{SUPERSCRIPT TWO}'",
        ),
        ({"polynomial_terms": "0,1,1000"}, "has '1000'; expected numbers below 100"),
        ({"residual_bins": "\N{SUPERSCRIPT TWO}:4:float16"}, "residual_bins has"),
        ({"residual_bins": "2:63:float16"}, "residual_bins has '2:63:float16'"),
    ],
    ids=["digit", "power", "entries", "bits"],
)
def test_settings_that_are_none(changes, said, rng, tmp_path):
    write(tmp_path / "rows.parquet", make_texts(rng, 5), 12, exact_k=4, terms=(0, 1, 2))
    options = {"k": 12, "exact_k": 4, "polynomial_terms": "0,1,2", **changes}
    with pytest.raises(UserError, match=said):
        imported("distillkit-packed", tmp_path / "rows.parquet", tmp_path / "cache", **options)


def test_a_fit_that_is_not_finite_is_no_padding(rng, tmp_path):
    """Coefficients of one type read as another: as many bytes, and no number."""
    file = tmp_path / "rows.parquet"
    write(file, make_texts(rng, 5), 12, exact_k=4, terms=(0, 1, 2))
    table = pq.read_table(file).to_pydict()
    for row in table["compressed_logprobs"]:
        for data in row:
            data[4 * 4 :] = np.full(3, np.inf, "<f4").view(np.uint8).tolist()
    pq.write_table(pa.table(table, schema=pq.read_schema(file)), file)
    options = {"k": 12, "exact_k": 4, "polynomial_terms": "0,1,2"}
    with pytest.raises(UserError, match="the polynomial of a row is not finite"):
        imported("distillkit-packed", file, tmp_path / "cache", **options)
