"""Forged numbers: valid Arrow columns, with every count and hash of the shard made to fit them."""

from __future__ import annotations

import numpy as np
from cases import Case
from shards import Columns, columns_of, put_columns


def forge_columns(case: Case) -> None:
    """Numbers in valid Arrow columns, with every count and hash of the shard made to fit them."""
    entry, data = case.shard()
    schema, names, columns = columns_of(data)
    for _ in range(case.pick([1, 1, 1, 2, 3])):
        edit = case.pick(
            [edit_numbers, edit_numbers, edit_lengths, edit_bytes, edit_rows, edit_mask, edit_names]
        )
        edit(case, names, columns)
    put_columns(case, entry, schema, names, columns, rows_per_batch=2)
    case.seal()


def edit_numbers(case: Case, names: list[str], columns: Columns) -> None:
    name = case.pick([name for name, (_, values) in columns.items() if values.dtype != np.uint8])
    _, values = columns[name]
    if not len(values):
        return
    at = case.rng.integers(0, len(values), case.pick([1, 1, 3, len(values)]))
    vocab_size = case.base.store.vocab_size
    if values.dtype == np.float32:
        values[at] = case.pick([np.nan, np.inf, -np.inf, 1.0, 1e-4, -0.0, -1e38, 3.4e38, -9000.123])
    elif values.dtype == np.bool_:
        values[at] ^= True
    else:
        limits = np.iinfo(values.dtype)
        near = [int(values[at[0]]) + each for each in (-1, 1, 7)]
        special = [
            0,
            1,
            254,
            255,
            256,
            vocab_size - 1,
            vocab_size,
            vocab_size + 1,
            2**16,
            2**24,
            2**30,
            -1,
        ]
        value = case.pick([*near, *special, limits.min, limits.max, limits.max - 1])
        values[at] = np.clip(value, limits.min, limits.max)


def edit_bytes(case: Case, names: list[str], columns: Columns) -> None:
    name = case.pick([name for name, (_, values) in columns.items() if values.dtype == np.uint8])
    _, values = columns[name]
    if len(values):
        at = case.rng.integers(0, len(values), case.pick([1, 1, 3, len(values)]))
        values[at] = case.pick([0, 1, 254, 255, int(case.rng.integers(256))])


def edit_lengths(case: Case, names: list[str], columns: Columns) -> None:
    """A value moves to the next row, disappears, or is added."""
    name = case.pick(sorted(columns))
    lengths, values = columns[name]
    row = int(case.rng.integers(len(lengths))) if len(lengths) else 0
    what = case.pick(["move", "drop", "add"])
    if what == "move" and len(lengths) > 1 and lengths[row]:
        lengths[row] -= 1
        lengths[row - 1] += 1
    elif what == "drop" and len(values) and lengths[row]:
        columns[name] = lengths, np.delete(values, int(lengths[: row + 1].sum()) - 1)
        lengths[row] -= 1
    elif what == "add" and len(lengths):
        value = case.pick([0, 1, 255])
        columns[name] = lengths, np.insert(values, int(lengths[: row + 1].sum()), value)
        lengths[row] += 1


def edit_rows(case: Case, names: list[str], columns: Columns) -> None:
    """Rows in another order, twice, or left out."""
    rows = len(names)
    order = case.pick(
        [case.rng.permutation(rows), case.rng.integers(0, max(rows, 1), rows), np.arange(rows)[1:]]
    )
    if not len(order):
        return
    names[:] = [names[row] for row in order]
    for name, (lengths, values) in columns.items():
        parts = np.split(values, np.cumsum(lengths)[:-1])
        columns[name] = lengths[order], np.concatenate([parts[row] for row in order])


def edit_mask(case: Case, names: list[str], columns: Columns) -> None:
    """Flags of the loss mask together with the positions that follow from them; all else stays."""
    lengths, mask = columns["loss_mask"]
    if not len(mask):
        return
    mask[int(case.rng.integers(len(mask)))] ^= True
    kept = [np.flatnonzero(part[1:]) for part in np.split(mask, np.cumsum(lengths)[:-1])]
    columns["positions"] = (
        np.array([len(each) for each in kept], np.int64),
        np.concatenate([*kept, np.empty(0, np.int64)]).astype(np.int32),
    )


def edit_names(case: Case, names: list[str], columns: Columns) -> None:
    if names:
        others = [
            "",
            names[0],
            "sequence 0",
            "x" * 100_000,
            "\0",
            "\x1b[2J",
            "\U0001f600" * 99,
            "a\nb",
        ]
        names[int(case.rng.integers(len(names)))] = case.pick(others)
