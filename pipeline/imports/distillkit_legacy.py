"""DistillKit's first codec: ``packed_indices``, ``exact_values`` and ``coeffs``, lists of lists.

Ids fill words of 64 bits from the lowest bit, as many as fit into each. Entries after the exact
ones are a polynomial of their number, from 1. The values are logits without their mean, so that
the mass outside a head is unknown, unless the data was made of logprobs (``--values logprobs``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, ImportOptions, Layout, Source
from logitcask.pipeline.imports.distillkit_raw import examples
from logitcask.pipeline.imports.tables import matrix, ragged, rows


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source, one for each example."""
    options = source.options
    k, exact_k = options.k or 0, options.exact_k or 0
    terms = _powers(k - exact_k, options)
    bits = (source.vocab_size - 1).bit_length()
    words = -(-k // (64 // bits))
    for name, row in rows(source):
        exact = matrix(row["exact_values"], np.float64, np.nan, f"{name}: exact_values")
        coefficients = matrix(row["coeffs"], np.float64, np.nan, f"{name}: coeffs")
        lengths, packed = ragged(row["packed_indices"], f"{name}: packed_indices")
        if not len(exact) == len(coefficients) == len(lengths):
            raise UserError(
                f"{name} has {len(lengths)} rows of ids, {len(exact)} of exact values and {len(coefficients)} of coefficients"
            )
        others = lengths[lengths != words]
        found = {
            "exact_k": (exact.shape[1], exact_k),
            "terms (polynomial_degree + 1, and with_sqrt_term)": (
                coefficients.shape[1],
                terms.shape[1] if k > exact_k else 0,
            ),
            "words of ids (k, vocab_size)": (int(others[0]) if len(others) else words, words),
        }
        for setting, (there, expected) in found.items():
            if len(exact) and there != expected:
                raise UserError(
                    f"{name} has {there} {setting}, but these settings of the codec make {expected}; give those with which "
                    "the data was made (legacy_logit_compression in DistillKit's config)"
                )
        flat = packed.to_numpy(zero_copy_only=False).astype(np.uint64)
        ids = _unpacked(flat.reshape(len(lengths), words), bits, k)
        values = np.concatenate([exact, coefficients @ terms.T if k > exact_k else exact[:, :0]], 1)
        yield from examples(name, row, ids, values)


def _powers(entries: int, options: ImportOptions) -> NDArray[np.float64]:
    """float64[entries, terms]: the terms of the polynomial at each entry."""
    t = np.arange(1, entries + 1, dtype=np.float64)
    degree = options.polynomial_degree or 0
    powers = [t ** (-i if options.invert_polynomial else i) for i in range(degree + 1)]
    return np.stack([*powers, np.sqrt(t)] if options.with_sqrt_term else powers, axis=1)


def _unpacked(words: NDArray[np.uint64], bits: int, count: int) -> NDArray[np.int64]:
    """int64[R, count] from words, [R, W]."""
    each = 64 // bits
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(bits)
    parts = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    return parts.reshape(len(words), -1)[:, :count].astype(np.int64)


LAYOUT = Layout(
    name="distillkit-legacy",
    summary="DistillKit's first codec: packed_indices, exact_values, coeffs, with --k, --exact-k, ...",
    read=read,
    columns=("input_ids", "packed_indices", "exact_values", "coeffs"),
    needs=("k", "exact_k", "polynomial_degree"),
)
