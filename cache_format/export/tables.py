"""A cache as plain Arrow tables.

A row is a token. The columns of the teacher belong to the position of this token, at which the
teacher predicts the next one, and are null if the position is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format.schema import UNKNOWN_RANK
from logitcask.cache_format.sequence import CachedSequence

if TYPE_CHECKING:
    from logitcask.cache_format.reader import CacheReader

ROWS = 32_768
"""Tokens of a table: some megabytes."""

COLUMNS = {
    "sequence_id": (pa.string(), "the sequence's stable name"),
    "position": (pa.int32(), "the token's place in the sequence, from 0"),
    "token_id": (pa.int32(), "the token"),
    "token_text": (pa.string(), "its text; null without a tokenizer"),
    "target_id": (pa.int32(), "the next token, which the teacher predicts here"),
    "target_logprob": (pa.float32(), "the teacher's logprob of the next token, in nats"),
    "target_rank": (pa.int32(), "number of ids that the teacher finds more probable; 0: none"),
    "entropy": (pa.float32(), "entropy of the whole distribution, in nats; null if not stored"),
    "writer_logprob": (
        pa.float32(),
        "logprob of the target by the model that wrote the text, at temperature 1; null if not stored",
    ),
    "head_ids": (pa.list_(pa.int32()), "the most probable ids, by falling probability"),
    "head_logprobs": (pa.list_(pa.float32()), "their logprobs, in nats, as stored"),
    "head_mass": (pa.float32(), "the sum of their probabilities"),
    "tail_mass": (pa.float32(), "the probability of all other ids together, before rounding"),
    "draws": (
        pa.list_(pa.int32()),
        "ids drawn from the tail, all sets after each other; null if not stored",
    ),
    "draw_logprobs": (pa.list_(pa.float32()), "their logprobs, in nats; null if not stored"),
    "chosen_ids": (
        pa.list_(pa.int32()),
        "ids that the model that wrote the text finds most probable; null if not stored",
    ),
    "chosen_logprobs": (
        pa.list_(pa.float32()),
        "the teacher's logprobs of them, in nats; null if not stored",
    ),
}
"""The columns: name, type, content."""

SCHEMA = pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])

Text = Callable[[int], str]
"""From an id to the text of ``token_text``."""


def iter_tables(
    reader: CacheReader,
    sequences: Iterable[int] | None = None,
    *,
    rows: int = ROWS,
    text: Text | None = None,
) -> Iterator[pa.Table]:
    """The sequences as tables of whole sequences, each of at least ``rows`` tokens, but for the
    last one.

    sequences: indices; None for all, in order.
    text:      from ids to texts; None leaves ``token_text`` null.
    """
    batches: list[pa.RecordBatch] = []
    held = 0
    for sequence in reader if sequences is None else map(reader.__getitem__, sequences):
        batches.append(_batch(sequence, text))
        held += len(sequence)
        if held >= rows:
            yield pa.Table.from_batches(batches, SCHEMA)
            batches, held = [], 0
    if batches:
        yield pa.Table.from_batches(batches, SCHEMA)


def _batch(sequence: CachedSequence, text: Text | None) -> pa.RecordBatch:
    """The rows of one sequence."""
    n, samples = len(sequence), sequence.samples
    rows = _Rows(n, sequence.positions)
    draws, draw_logprobs, drawn = None, None, None
    if samples is not None:  # all sets of a position after each other
        p, sets, each = samples.ids.shape
        draws = samples.ids.reshape(p, sets * each)
        drawn = draws >= 0
        if samples.logprobs is not None:
            draw_logprobs = samples.logprobs.reshape(p, sets * each)
    head = sequence.ids >= 0
    unknown = np.isnan(sequence.tail_logprob)
    chosen = sequence.chosen
    chosen_ids = None if chosen is None else chosen.ids
    is_chosen = None if chosen_ids is None else chosen_ids >= 0
    columns = {
        "sequence_id": pa.repeat(sequence.sequence_id, n),
        "position": pa.array(np.arange(n, dtype=np.int32)),
        "token_id": pa.array(sequence.input_ids),
        "token_text": None if text is None else pa.array(map(text, sequence.input_ids.tolist())),
        "target_id": rows.values(sequence.target_ids),
        "target_logprob": rows.values(sequence.target_logprob, np.isnan(sequence.target_logprob)),
        "target_rank": rows.values(sequence.target_rank, sequence.target_rank == UNKNOWN_RANK),
        "entropy": rows.values(sequence.entropy),
        "writer_logprob": rows.values(sequence.writer_logprob),
        "head_ids": rows.lists(sequence.ids, head),
        "head_logprobs": rows.lists(sequence.logprobs, head),
        "head_mass": rows.values(_mass(sequence.logprobs), unknown),
        "tail_mass": rows.values(np.exp(sequence.tail_logprob), unknown),
        "draws": rows.lists(draws, drawn),
        "draw_logprobs": rows.lists(draw_logprobs, drawn),
        "chosen_ids": rows.lists(chosen_ids, is_chosen),
        "chosen_logprobs": rows.lists(None if chosen is None else chosen.logprobs, is_chosen),
    }
    arrays = [
        pa.nulls(n, field.type) if columns[field.name] is None else columns[field.name]
        for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _mass(logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[P]: the sum of exp over the head [P, K]."""
    mass: NDArray[np.float32]
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1).astype(np.float32)
    return mass


class _Rows:
    """Arrow columns of ``n`` tokens from values at kept positions; None gives None."""

    def __init__(self, n: int, positions: NDArray[np.int32]) -> None:
        self._n, self._positions = n, positions
        self._absent = np.ones(n, np.bool_)
        self._absent[positions] = False

    def values(
        self, at_positions: NDArray[Any] | None, unknown: NDArray[np.bool_] | None = None
    ) -> pa.Array | None:
        """A column of numbers, null where they are ``unknown``, bool[P]."""
        if at_positions is None:
            return None
        column = np.zeros(self._n, at_positions.dtype)
        column[self._positions] = at_positions
        absent = self._absent.copy()
        if unknown is not None:
            absent[self._positions] = unknown
        return pa.array(column, mask=absent)

    def lists(
        self, at_positions: NDArray[Any] | None, present: NDArray[np.bool_] | None
    ) -> pa.Array | None:
        """A column of lists, from [P, K] values and which of them are ``present``."""
        if at_positions is None or present is None:
            return None
        lengths = np.zeros(self._n, np.int64)
        lengths[self._positions] = present.sum(axis=1)
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(at_positions[present]), mask=pa.array(self._absent)
        )
