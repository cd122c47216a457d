"""Columns of probabilities: ``input_ids``, ``exp_logits`` and ``index``, a row for each position.

``exp_logits`` are probabilities, or exponentials of logits: the mass outside a head is then
unknown. Row i is about token i + 1; a last row about a token that is not there is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.distillkit_raw import examples
from logitcask.pipeline.imports.tables import matrix, rows


def read(source: Source) -> Iterator[Held]:
    """The sequences of a source."""
    for name, row in rows(source):
        ids = matrix(row["index"], np.int64, -1, f"{name}: index")
        values = matrix(row["exp_logits"], np.float64, np.nan, f"{name}: exp_logits")
        if (values < 0).any():
            raise UserError(
                f"{name} has the value {np.nanmin(values):g} in exp_logits, expected probabilities; logits are imported as "
                "distillkit-raw with --columns top_values=exp_logits --columns token_ids=index"
            )
        with np.errstate(divide="ignore"):  # a probability of 0 is no entry
            yield from examples(name, row, ids, np.log(values))


LAYOUT = Layout(
    name="probabilities",
    summary="input_ids, exp_logits and index: probabilities, or exponentials of logits",
    read=read,
    columns=("input_ids", "exp_logits", "index"),
)
