"""A cache in the layouts of other trainers, as one Parquet file with a row for each sequence.

``distillkit-raw``: ``token_ids`` and ``top_values``, a row for every position. ``axolotl-prepared``:
``target_token_ids``, ``target_logprobs`` and ``target_mask``, a row for every token, row j about
token j + 1. Both have entries of equal number everywhere. Both hold heads alone: the mass outside
them and draws from it stay behind.

Shapes: P kept positions, R rows, K entries (padded).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.export.parquet import write_tables
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence

log = logging.getLogger(__name__)

NOTHING = -1000.0
"""The logprob of an entry that fills up a head: a probability of 0, without an infinity that a loss
would turn into NaN."""

_GROUP_TOKENS = 16_384
_IDS, _LISTS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
_FLOATS, _MARKS = pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.int8()))
_DISTILLKIT = pa.schema(
    {
        "input_ids": _IDS,
        "attention_mask": pa.list_(pa.int8()),
        "token_ids": _LISTS,
        "top_values": _FLOATS,
    }
)
_AXOLOTL = pa.schema(
    {
        "input_ids": _IDS,
        "attention_mask": pa.list_(pa.int8()),
        "labels": _IDS,
        "target_token_ids": _LISTS,
        "target_logprobs": _FLOATS,
        "target_mask": _MARKS,
    }
)
_Columns = dict[str, pa.Array]


def write_distillkit(
    reader: CacheReader, out: Path, *, on_tokens: Callable[[int], object] = lambda tokens: None
) -> int:
    """Writes ``distillkit-raw`` to ``out``. Returns its bytes.

    Raises UserError for a cache without heads, and for one with a loss mask: rows of DistillKit
    have none, and something would be learnt at its other positions.
    """
    totals, k = reader.manifest.statistics, _heads(reader)
    if totals.positions != totals.tokens - totals.sequences:
        raise UserError(
            f"{reader.path} keeps {totals.positions:,} of {totals.tokens - totals.sequences:,} positions, and DistillKit's raw "
            "rows have no place for a loss mask; export axolotl-prepared or parquet"
        )

    def row(sequence: CachedSequence) -> _Columns:
        ids, logprobs, _ = _filled(sequence, k, reader.manifest.store.vocab_size)
        return {"token_ids": _nested(ids), "top_values": _nested(logprobs)}

    return _write(reader, out, _DISTILLKIT, row, on_tokens)


def write_axolotl(
    reader: CacheReader, out: Path, *, on_tokens: Callable[[int], object] = lambda tokens: None
) -> int:
    """Writes ``axolotl-prepared`` to ``out``. Returns its bytes. Raises UserError for a cache
    without heads.
    """
    k, vocab_size = _heads(reader), reader.manifest.store.vocab_size

    def row(sequence: CachedSequence) -> _Columns:
        n = len(sequence)
        ids, logprobs, there = _filled(sequence, k, vocab_size)
        # Rows of positions that are not kept, and the last one, are padding.
        all_ids = np.tile(np.arange(k, dtype=np.int32), (n, 1))
        all_logprobs = np.full((n, k), NOTHING, np.float32)
        mask = np.zeros((n, k), np.int8)
        at = sequence.positions
        all_ids[at], all_logprobs[at], mask[at] = ids, logprobs, there
        labels = np.where(sequence.loss_mask, sequence.input_ids, -100).astype(np.int32)
        return {
            "labels": pa.array(labels),
            "target_token_ids": _nested(all_ids),
            "target_logprobs": _nested(all_logprobs),
            "target_mask": _nested(mask),
        }

    return _write(reader, out, _AXOLOTL, row, on_tokens)


def _heads(reader: CacheReader) -> int:
    """Entries of the largest head."""
    store = reader.manifest.store
    if not store.top_k:
        raise UserError(
            f"{reader.path} holds no heads (top_k is 0), which this layout is made of; export parquet"
        )
    if store.tail_samples:
        log.warning(
            "this layout holds heads alone: the draws from their tails, and the exact mass of these, stay behind"
        )
    return store.top_k


def _filled(
    sequence: CachedSequence, k: int, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_]]:
    """(ids, logprobs, which of them are entries), each [P, k]; other ids are distinct ones that the
    head lacks, of probability 0.
    """
    p, width = sequence.ids.shape
    ids = np.full((p, k), -1, np.int32)
    ids[:, :width] = sequence.ids
    logprobs = np.full((p, k), NOTHING, np.float32)
    logprobs[:, :width] = np.where(sequence.ids >= 0, sequence.logprobs, NOTHING)
    there = ids >= 0
    if not there.all():
        # Of the first 2 k ids, at least k are not in a head.
        candidates = np.arange(min(2 * k, vocab_size), dtype=np.int32)
        free = np.ones((p, len(candidates)), np.bool_)
        row, column = np.nonzero(there & (ids < len(candidates)))
        free[row, ids[row, column]] = False
        order = np.argsort(~free, axis=1, kind="stable")[:, :k]
        missing = ~there
        number = missing.cumsum(axis=1) - 1
        row, column = np.nonzero(missing)
        ids[row, column] = candidates[order[row, number[row, column]]]
    return ids, logprobs, there


def _nested(values: NDArray[np.generic]) -> pa.Array:
    """A list of rows, [R, K]."""
    rows, width = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def _write(
    reader: CacheReader,
    out: Path,
    schema: pa.Schema,
    row: Callable[[CachedSequence], _Columns],
    on_tokens: Callable[[int], object],
) -> int:
    def batch(sequence: CachedSequence) -> pa.RecordBatch:
        n = len(sequence)
        columns = {
            "input_ids": pa.array(sequence.input_ids),
            "attention_mask": pa.array(np.ones(n, np.int8)),
            **row(sequence),
        }
        cells = [
            pa.ListArray.from_arrays(pa.array([0, len(columns[name])], pa.int32()), columns[name])
            for name in schema.names
        ]
        return pa.RecordBatch.from_arrays(cells, schema=schema)

    def tables() -> Iterator[pa.Table]:
        waiting: list[pa.RecordBatch] = []
        tokens = 0
        for sequence in reader:
            waiting.append(batch(sequence))
            tokens += len(sequence)
            if tokens >= _GROUP_TOKENS:
                yield pa.Table.from_batches(waiting, schema)
                on_tokens(tokens)
                waiting, tokens = [], 0
        if waiting:
            yield pa.Table.from_batches(waiting, schema)
            on_tokens(tokens)

    marked = schema.with_metadata({"cache_fingerprint": reader.manifest.fingerprint})
    return write_tables(out, marked, (table.cast(marked) for table in tables()))
