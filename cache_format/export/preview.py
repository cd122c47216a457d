"""The preview of a cache: its first tokens as a small Parquet file that viewers show without code."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcask.cache_format.export.tables import Text
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence

POSITIONS = 10_000
"""Kept positions of a preview at most: some hundred kilobytes."""
SEQUENCE_POSITIONS = 200
"""Kept positions of one sequence at most, so that several sequences are seen."""
ROW_GROUP = 1000
"""Rows of a row group. Viewers refuse to scan large ones."""

_CONTEXT = 60
_TOP = 5

SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("position", pa.int32()),
        ("text_before", pa.string()),
        ("next_token", pa.string()),
        ("probability", pa.float32()),
        ("rank", pa.int32()),
        ("top_5", pa.string()),
        ("tail_mass", pa.float32()),
        ("entropy", pa.float32()),
    ]
)


def preview(
    reader: CacheReader,
    token: Callable[[int], str],
    exact: Text,
    *,
    positions: int = POSITIONS,
    of_each: int = SEQUENCE_POSITIONS,
) -> bytes:
    """The first kept positions as a Parquet file with a page index and row groups of
    ``ROW_GROUP`` rows.

    A row is a kept position: the end of the text before it, the token that follows, the teacher's
    probability and rank of this token, the five most probable tokens, the probability of all ids
    outside the head, and the entropy in nats (null if not stored). What an imported cache does not
    know is null.

    token:     from an id to its text in one line.
    exact:     from an id to its text as it is.
    positions: rows at most.
    of_each:   rows of one sequence at most.
    """
    rows = islice(_rows(reader, token, exact, of_each), positions)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd", write_page_index=True) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
    return buffer.getvalue()


def _rows(
    reader: CacheReader, token: Callable[[int], str], exact: Text, of_each: int
) -> Iterator[dict[str, Any]]:
    for sequence in reader:
        for row, position in enumerate(sequence.positions[:of_each].tolist()):
            before = "".join(map(exact, sequence.input_ids[: position + 1][-_CONTEXT:].tolist()))
            yield {
                "sequence_id": sequence.sequence_id,
                "position": position,
                "text_before": before[-_CONTEXT:],
                "next_token": token(int(sequence.input_ids[position + 1])),
                "probability": _known(np.exp(sequence.target_logprob[row])),
                "rank": None if sequence.target_rank[row] < 0 else int(sequence.target_rank[row]),
                "top_5": _top(sequence, row, token),
                "tail_mass": _known(np.exp(sequence.tail_logprob[row])),
                "entropy": None if sequence.entropy is None else float(sequence.entropy[row]),
            }


def _known(value: np.floating) -> float | None:
    """None for NaN, a value that an imported cache does not know."""
    return None if np.isnan(value) else float(value)


def _top(sequence: CachedSequence, row: int, token: Callable[[int], str]) -> str:
    """The most probable tokens with their probabilities, `` the 61 % |  a 20 %``."""
    ids, logprobs = sequence.ids[row, :_TOP].tolist(), sequence.logprobs[row, :_TOP]
    return " | ".join(
        f"{token(each)} {np.exp(logprob):.0%}"
        for each, logprob in zip(ids, logprobs, strict=True)
        if each >= 0
    )
