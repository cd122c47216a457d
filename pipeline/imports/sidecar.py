"""Rows beside another data set: ``row_id``, ``teacher_topk_ids`` and ``teacher_topk_logprobs``.

A row is about the last tokens of the sequence with its id in ``--tokens``, the response. The true
token is forced into every list, so a list of k + 1 entries may have one that is not among the most
probable. Both tables must have the same order; ``--tokens`` may have more rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.tables import matrix, rows, token_rows, vector


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source, in its order."""
    key = source.column("row_id")
    sequences = token_rows(source)
    for name, row in rows(source):
        ids = matrix(row["teacher_topk_ids"], np.int64, -1, f"{name}: teacher_topk_ids")
        values = matrix(
            row["teacher_topk_logprobs"], np.float64, np.nan, f"{name}: teacher_topk_logprobs"
        )
        wanted = row["row_id"].as_py()
        for place, beside in sequences:
            if key not in beside:
                raise UserError(f"{place} of --tokens has no column {key}; --columns row_id=COLUMN")
            if beside[key].as_py() == wanted:
                break
        else:
            raise UserError(
                f"{name}: row_id {wanted!r} is not in {source.options.tokens} behind the row before it; both need the same "
                "order: sort them by row_id"
            )
        tokens = vector(beside["input_ids"], np.int64, f"{place}: input_ids")
        if ids.shape != values.shape or len(ids) >= len(tokens):
            raise UserError(
                f"{name} has ids {ids.shape} and logprobs {values.shape} for the {len(tokens)} tokens of {place}; expected "
                "equal shapes, and fewer rows than tokens"
            )
        yield Held(name, tokens, len(tokens) - 1 - len(ids), ids, values)


LAYOUT = Layout(
    name="sidecar",
    summary="row_id, teacher_topk_ids, teacher_topk_logprobs beside the data of --tokens",
    read=read,
    columns=("row_id", "teacher_topk_ids", "teacher_topk_logprobs"),
    needs=("tokens",),
    forced=True,
)
