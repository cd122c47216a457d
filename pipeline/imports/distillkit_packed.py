"""DistillKit's compressed rows: ``compressed_logprobs`` and ``bytepacked_indices``, bytes a row.

The data does not hold the codec's settings, so the user gives them: they are those of
``logprob_compressor`` in DistillKit's training config. They are checked by the number of bytes of
every row, and by what the rows then say (``logitcask.pipeline.imports.plausibility``).

The bytes of a row, little-endian: ``exact_k`` values, the coefficients of a polynomial of the other
entries' number, and bins of residuals, each a scale and signed integers. With ``delta_encoding``
each entry is the difference to the one before. Integers and ids are packed with the highest bit
first; an id has ceil(log2 V) bits.

Shapes: R rows, K entries of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, ImportOptions, Layout, Source
from logitcask.pipeline.imports.distillkit_raw import examples
from logitcask.pipeline.imports.tables import ragged, rows

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class _Bin:
    """A run of residuals: how many, their bits, and the type of their scale."""

    entries: int
    bits: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Of a row: the scale and the packed residuals."""
        return _BYTES[self.dtype] + (self.entries * self.bits + 7) // 8


@dataclass(frozen=True)
class Codec:
    """The settings of DistillKit's codec, as its config names them."""

    vocab_size: int
    k: int
    exact_k: int
    exact_dtype: str
    terms: tuple[int | str, ...]
    term_dtype: str
    bins: tuple[_Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def of(cls, options: ImportOptions, vocab_size: int) -> Codec:
        """The codec of the options. Raises UserError for settings that contradict each other."""
        k, exact_k = options.k or 0, options.exact_k or 0
        codec = cls(
            vocab_size=vocab_size,
            k=k,
            exact_k=exact_k,
            exact_dtype=options.exact_dtype,
            terms=_terms(options.polynomial_terms),
            term_dtype=options.term_dtype,
            bins=_bins(options.residual_bins),
            delta_encoding=options.delta_encoding,
            normalize_t=options.normalize_t,
        )
        if exact_k < k and not codec.terms and not codec.bins:
            raise UserError(
                f"exact_k is {exact_k} of {k} entries, so the others need polynomial_terms or residual_bins; give those of "
                "DistillKit's logprob_compressor"
            )
        if sum(each.entries for each in codec.bins) > k - exact_k:
            raise UserError(
                f"residual_bins have more entries than the {k - exact_k} not exact ones"
            )
        return codec

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values."""
        exact = self.exact_k * _BYTES[self.exact_dtype]
        terms = len(self.terms) * _BYTES[self.term_dtype]
        return exact + terms + sum(each.bytes for each in self.bins)

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return (self.vocab_size - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Bytes of a row's ids."""
        return (self.k * self.id_bits + 7) // 8

    def ids(self, rows: NDArray[np.uint8]) -> NDArray[np.int64]:
        """int64[R, K] from the bytes of rows, [R, id_bytes]."""
        return _unpacked(rows, self.id_bits, self.k)

    def values(self, rows: NDArray[np.uint8]) -> NDArray[np.float64]:
        """float64[R, K] from the bytes of rows, [R, value_bytes]."""
        at = 0

        def take(count: int, dtype: str) -> NDArray[np.float64]:
            nonlocal at
            end = at + count * _BYTES[dtype]
            part, at = np.ascontiguousarray(rows[:, at:end]), end
            return _floats(part, dtype, count)

        exact = take(self.exact_k, self.exact_dtype)
        others = np.zeros((len(rows), self.k - self.exact_k))
        if self.terms:
            coefficients = take(len(self.terms), self.term_dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                others = coefficients @ self._powers(others.shape[1]).T
            # The codec has no padding; what is not finite would be taken for it.
            if not np.isfinite(others).all():
                raise UserError(
                    "the polynomial of a row is not finite, so polynomial_terms, term_dtype or normalize_t are other than "
                    "those of the data (logprob_compressor in DistillKit's config), or the data is damaged"
                )
        begin = 0
        for each in self.bins:
            scale = take(1, each.dtype)
            end = at + (each.entries * each.bits + 7) // 8
            steps = _unpacked(np.ascontiguousarray(rows[:, at:end]), each.bits, each.entries)
            at = end
            lowest = 2 ** (each.bits - 1)
            signed = 2 * steps - 1 if each.bits == 1 else steps - lowest
            others[:, begin : begin + each.entries] += signed * scale
            begin += each.entries
        found = np.concatenate([exact, others], axis=1)
        return found.cumsum(axis=1) if self.delta_encoding else found

    def _powers(self, entries: int) -> NDArray[np.float64]:
        """float64[entries, terms]: the terms of the fit at each entry."""
        t = np.linspace(0, 1, entries) if self.normalize_t else np.arange(entries, dtype=np.float64)
        special = {"sqrt": np.sqrt, "exp": np.exp}
        with np.errstate(over="ignore"):  # an exp of 128 entries is beyond any use
            terms = [t**each if isinstance(each, int) else special[each](t) for each in self.terms]
        return np.stack(terms, axis=1)


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source, one for each example."""
    codec = Codec.of(source.options, source.vocab_size)
    for name, row in rows(source):
        values = _bytes(row["compressed_logprobs"], codec.value_bytes, name, "compressed_logprobs")
        ids = _bytes(row["bytepacked_indices"], codec.id_bytes, name, "bytepacked_indices")
        if len(ids) != len(values):
            raise UserError(f"{name} has {len(ids)} rows of ids and {len(values)} of values")
        yield from examples(name, row, codec.ids(ids), codec.values(values))


def _bytes(cell: Any, expected: int, name: str, column: str) -> NDArray[np.uint8]:
    """uint8[R, expected]: the bytes of all rows. Raises UserError for rows of another length."""
    lengths, values = ragged(cell, f"{name}: {column}")
    wrong = lengths[lengths != expected]
    if len(wrong):
        raise UserError(
            f"{name}: {column} has {wrong[0]} bytes a row, but these settings of the codec make {expected}; give those with "
            "which the data was made (logprob_compressor in DistillKit's config), vocab_size (its d) among them"
        )
    flat = values.to_numpy(zero_copy_only=False)
    return flat.astype(np.uint8).reshape(len(lengths), expected)


def _floats(part: NDArray[np.uint8], dtype: str, count: int) -> NDArray[np.float64]:
    """float64[R, count] from little-endian bytes."""
    if dtype == "bfloat16":  # the upper half of a float32
        upper = part.view("<u2").astype(np.uint32) << 16
        return upper.view(np.float32).astype(np.float64).reshape(len(part), count)
    kind = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]
    return part.view(kind).astype(np.float64).reshape(len(part), count)


def _unpacked(rows: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """int64[R, count]: integers of ``bits`` bits, the highest bit first."""
    flags = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    result = np.zeros((len(rows), count), np.int64)
    for bit in range(bits):
        result = (result << 1) | flags[:, :, bit]
    return result


def _terms(text: str) -> tuple[int | str, ...]:
    names = [each.strip() for each in text.strip("[] ").split(",") if each.strip()]
    names = [each.strip("'\"") for each in names]
    wrong = [each for each in names if not re.fullmatch(r"sqrt|exp|[0-9]{1,2}", each)]
    if wrong:
        raise UserError(
            f"polynomial_terms has {wrong[0][:40]!r}; expected numbers below 100, sqrt and exp, such as 0,1,2,sqrt"
        )
    return tuple(int(each) if each.isdigit() else each for each in names)


def _bins(text: str) -> tuple[_Bin, ...]:
    found = []
    for each in filter(None, text.replace(" ", "").split(",")):
        parts = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,2}):(\w+)", each)
        if parts is None or not 1 <= int(parts[2]) <= 62 or parts[3] not in _BYTES:
            raise UserError(
                f"residual_bins has {each[:40]!r}; expected ENTRIES:BITS:TYPE, such as 32:4:float16"
            )
        found.append(_Bin(int(parts[1]), int(parts[2]), parts[3]))
    return tuple(found)


LAYOUT = Layout(
    name="distillkit-packed",
    summary="DistillKit: compressed_logprobs and bytepacked_indices, with --k, --exact-k, ...",
    read=read,
    columns=("input_ids", "compressed_logprobs", "bytepacked_indices"),
    values="logprobs",
    needs=("k", "exact_k"),
)
