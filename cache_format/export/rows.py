"""Rows of shards, as ``datasets.load_dataset`` opens them, decoded into plain columns.

A row is a sequence. Columns of the teacher have one value, or one list, for each kept position.
``datasets`` itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format.errors import DamagedCacheError, UserError, first_line
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence, ChosenIds, TailSamples
from logitcask.cache_format.shards.bounded_file import has_nulls

_COLUMNS = {
    "sequence_id": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.bool_()),
    "positions": pa.list_(pa.int32()),
    "head_ids": pa.list_(pa.list_(pa.int32())),
    "head_logprobs": pa.list_(pa.list_(pa.float32())),
    "tail_logprob": pa.list_(pa.float32()),
    "target_logprob": pa.list_(pa.float32()),
    "target_rank": pa.list_(pa.int32()),
}
_OPTIONAL = {
    "entropy": pa.list_(pa.float32()),
    "writer_logprob": pa.list_(pa.float32()),
    "draws": pa.list_(pa.list_(pa.int32())),
    "draw_logprobs": pa.list_(pa.list_(pa.float32())),
    "chosen_ids": pa.list_(pa.list_(pa.int32())),
    "chosen_logprobs": pa.list_(pa.list_(pa.float32())),
}


class RowDecoder:
    """A function from packed rows of a cache's shards to decoded ones, for ``map`` or
    ``set_transform`` of ``datasets``, with ``batched=True``.

    cache: folder or URL of the cache, for its manifest and its prior. No shard of it is read.

    It takes a table of Arrow, or columns as lists, and returns the same kind. The columns of a
    decoded row: ``sequence_id``; ``input_ids`` and ``loss_mask`` [n]; ``positions``,
    ``tail_logprob``, ``target_logprob``, ``target_rank`` [P]; ``head_ids`` and ``head_logprobs``,
    P lists; and if they are stored ``entropy``, ``writer_logprob`` [P], ``draws``,
    ``draw_logprobs``, ``chosen_ids`` and ``chosen_logprobs``, P lists. The content is that of ``CachedSequence``, without padding, and with
    all sets of draws after each other.

    Raises DamagedCacheError for rows that contradict themselves, and UserError for rows that are
    not of this cache. The sha256 of shards is not checked: ``teacher-cache pull`` and ``verify`` do.
    """

    def __init__(self, cache: str | Any) -> None:
        reader = CacheReader(cache)
        self._codec, self._where = reader.codec, f"rows of {reader.path}"
        store = reader.manifest.store
        stored = {
            "entropy": store.entropy,
            "writer_logprob": store.writer_logprobs,
            "draws": store.tail_samples > 0,
            "draw_logprobs": store.sample_logprobs,
            "chosen_ids": store.chosen_ids > 0,
            "chosen_logprobs": store.chosen_ids > 0,
        }
        self.schema = pa.schema(
            {**_COLUMNS, **{name: kind for name, kind in _OPTIONAL.items() if stored[name]}}
        )
        """Of decoded rows."""

    def __call__(self, rows: pa.Table | Mapping[str, list[Any]]) -> Any:
        """The decoded rows, in the same order."""
        table = self._table(rows)
        decoded = self._decoded(table)
        return decoded if isinstance(rows, pa.Table) else decoded.to_pydict()

    def _table(self, rows: pa.Table | Mapping[str, list[Any]]) -> pa.Table:
        """The packed rows with the schema of a shard."""
        schema = self._codec.schema
        found = rows.column_names if isinstance(rows, pa.Table) else list(rows)
        if missing := [name for name in schema.names if name not in found]:
            raise UserError(
                f"these rows have no column {missing[0]} (found {', '.join(found)}), so they are not packed {self._where}; "
                "open its files data/*.arrow with load_dataset('arrow', data_files=...)"
            )
        try:
            if isinstance(rows, pa.Table):
                return rows.select(schema.names).cast(schema)
            return pa.Table.from_pydict({name: rows[name] for name in schema.names}, schema)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UserError(
                f"these rows are not packed {self._where}: {first_line(error)}; open the data/*.arrow files of the same cache"
            ) from error

    def _decoded(self, table: pa.Table) -> pa.Table:
        batches = []
        # Copies of these rows alone: a slice would bring along all values of its chunk.
        for packed in table.take(np.arange(len(table))).combine_chunks().to_batches():
            try:
                packed.validate(full=True)
            except pa.ArrowInvalid as error:
                raise DamagedCacheError(f"{self._where}: {first_line(error)}") from error
            if any(has_nulls(column) for column in packed.columns):
                raise DamagedCacheError(f"{self._where} have nulls")
            opened = self._codec.open(packed, self._where)
            rows = [_columns(opened.decode(index)) for index in range(len(opened))]
            arrays = [
                pa.array([row[field.name] for row in rows], field.type) for field in self.schema
            ]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        return pa.Table.from_batches(batches, self.schema)


def _columns(sequence: CachedSequence) -> dict[str, Any]:
    head = (sequence.ids >= 0).sum(axis=1)
    columns = {
        "sequence_id": sequence.sequence_id,
        "input_ids": sequence.input_ids,
        "loss_mask": sequence.loss_mask,
        "positions": sequence.positions,
        "head_ids": _ragged(sequence.ids, head),
        "head_logprobs": _ragged(sequence.logprobs, head),
        "tail_logprob": sequence.tail_logprob,
        "target_logprob": sequence.target_logprob,
        "target_rank": sequence.target_rank,
        "entropy": sequence.entropy,
        "writer_logprob": sequence.writer_logprob,
    }
    if (samples := sequence.samples) is not None:
        drawn = samples.ids >= 0
        columns["draws"] = _chosen(samples.ids, drawn)
        if samples.logprobs is not None:
            columns["draw_logprobs"] = _chosen(samples.logprobs, drawn)
    if (chosen := sequence.chosen) is not None:
        size = (chosen.ids >= 0).sum(axis=1)
        columns["chosen_ids"] = _ragged(chosen.ids, size)
        columns["chosen_logprobs"] = _ragged(chosen.logprobs, size)
    return columns


def _ragged(padded: NDArray[Any], sizes: NDArray[np.integer]) -> list[NDArray[Any]]:
    """P lists, from [P, K] values padded at the end."""
    return [row[:size] for row, size in zip(padded, sizes.tolist(), strict=True)]


def _chosen(values: NDArray[Any], chosen: NDArray[np.bool_]) -> list[NDArray[Any]]:
    """P lists, from [P, T, S] values and which of them are chosen."""
    return [row[mask] for row, mask in zip(values, chosen, strict=True)]


def sequence_of(row: Mapping[str, Any]) -> CachedSequence:
    """The sequence of a decoded row, with lists, arrays or tensors as columns. All draws of a
    position are one set.

    Raises UserError for a row that ``RowDecoder`` has not made.
    """
    if missing := [name for name in _COLUMNS if name not in row]:
        raise UserError(
            f"this row has no column {missing[0]} (found {', '.join(row)}); decode rows of load_dataset with "
            "logitcask.RowDecoder before they are collated"
        )
    positions = np.asarray(row["positions"], np.int32)
    ids = _padded(row["head_ids"], -1, np.int32)
    samples = None
    if row.get("draws") is not None:
        draws = _padded(row["draws"], -1, np.int32)[:, None]
        logprobs = row.get("draw_logprobs")
        samples = TailSamples(
            draws,
            None if logprobs is None else _padded(logprobs, -np.inf, np.float32)[:, None],
        )
    chosen = None
    if row.get("chosen_ids") is not None:
        chosen = ChosenIds(
            _padded(row["chosen_ids"], -1, np.int32),
            _padded(row["chosen_logprobs"], -np.inf, np.float32),
        )

    def optional(name: str) -> NDArray[np.float32] | None:
        return None if row.get(name) is None else np.asarray(row[name], np.float32)

    return CachedSequence(
        sequence_id=str(row["sequence_id"]),
        input_ids=np.asarray(row["input_ids"], np.int32),
        loss_mask=np.asarray(row["loss_mask"], np.bool_),
        positions=positions,
        ids=ids,
        logprobs=_padded(row["head_logprobs"], -np.inf, np.float32),
        tail_logprob=np.asarray(row["tail_logprob"], np.float32),
        target_logprob=np.asarray(row["target_logprob"], np.float32),
        target_rank=np.asarray(row["target_rank"], np.int32),
        entropy=optional("entropy"),
        samples=samples,
        writer_logprob=optional("writer_logprob"),
        chosen=chosen,
    )


def _padded(lists: Any, filler: float, dtype: Any) -> NDArray[Any]:
    """[P, longest], padded at the end, from P lists."""
    rows = [np.asarray(row, dtype) for row in lists]
    padded = np.full((len(rows), max(map(len, rows), default=0)), filler, dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
