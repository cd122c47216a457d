"""DistillKit's raw rows: ``token_ids`` and ``top_values``, lists of lists, beside ``input_ids``.

Row i is about token i + 1, so n tokens have n - 1 rows. A prepacked set has as many rows as tokens:
each example's last token was cut off, and its row is about that token. ``attention_mask`` is then
the number of the example, from 1; in other sets 0 marks padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.tables import Row, matrix, rows, vector


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source, one for each example."""
    for name, row in rows(source):
        yield from examples(
            name,
            row,
            matrix(row["token_ids"], np.int64, -1, f"{name}: token_ids"),
            matrix(row["top_values"], np.float64, np.nan, f"{name}: top_values"),
        )


def examples(
    name: str, row: Row, ids: NDArray[np.int64], values: NDArray[np.float64]
) -> Iterator[Held]:
    """The examples of a row of DistillKit with these entries, [R, K]."""
    tokens = vector(row["input_ids"], np.int64, f"{name}: input_ids")
    n = len(tokens)
    if ids.shape != values.shape:
        raise UserError(f"{name} has ids {ids.shape} and values {values.shape}, of unequal shape")
    if len(ids) not in (n - 1, n):
        raise UserError(
            f"{name} has {len(ids)} rows of values for {n} tokens, expected {max(n - 1, 0)}, or {n} of a prepacked set"
        )
    mask = np.ones(n, np.int64)
    if "attention_mask" in row:
        mask = vector(row["attention_mask"], np.int64, f"{name}: attention_mask")
        if len(mask) != n:
            raise UserError(f"{name} has {len(mask)} marks in attention_mask for {n} tokens")
    learnt = None
    if "labels" in row:
        learnt = vector(row["labels"], np.int64, f"{name}: labels") != -100
        if len(learnt) != n:
            raise UserError(f"{name} has {len(learnt)} labels for {n} tokens")
    starts = np.flatnonzero(np.diff(mask, prepend=mask[:1] - 1))
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], n], strict=True)):
        if mask[start] == 0:  # padding
            continue
        part = Held(
            name=name if len(starts) == 1 else f"{name}, example {number}",
            input_ids=tokens[start:end],
            first=0,
            # The row at an example's last token is about a token that is not there.
            ids=ids[start : end - 1],
            values=values[start : end - 1],
        )
        yield part if learnt is None else replace(part, learnt=learnt[start:end])


LAYOUT = Layout(
    name="distillkit-raw",
    summary="DistillKit: input_ids, token_ids and top_values, not compressed",
    read=read,
    columns=("input_ids", "token_ids", "top_values"),
)
