"""Sequences to Arrow record batches and back: the numbers of SPEC.md sections 4 and 5.

Pure: nothing here opens a file. All work is numpy over whole batches (encoding) or whole sequences (decoding); no Python
runs per token.

Shapes: P kept positions, K largest head, E = sum of head sizes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.errors import DamagedCacheError, UserError
from cache_format.schema import MAX_VOCAB_SIZE, POSITION_COLUMNS, SCALAR_STEP, id_planes, shard_schema
from cache_format.sequence import CachedSequence

ESCAPE = 255
_Array = NDArray[Any]


def check_step(step: float) -> None:
    """Raises ValueError unless ``step`` (nats) is a power of two in [2^-16, 1]: then grid points are exact in fp32."""
    if not (2.0**-16 <= step <= 1 and math.frexp(step)[0] == 0.5):
        raise ValueError(f"logprob_step is {step}; expected a power of two from 2^-16 to 1, such as 0.015625 (1/64)")


def round_scalars(values: _Array) -> NDArray[np.float32]:
    """float32, rounded to multiples of SCALAR_STEP where fp32 can tell them apart; -inf stays."""
    values = values.astype(np.float32)
    return np.where(np.abs(values) < 2**13, np.rint(values / SCALAR_STEP) * np.float32(SCALAR_STEP), values).astype(
        np.float32
    )


def validate(sequence: CachedSequence, vocab_size: int, *, mass_slack: float = 1e-3) -> None:
    """Raises UserError, naming the sequence and what is wrong, unless it can be stored and read back as it is.

    ``mass_slack`` is how far above 1 the head mass may be: fp32 rounding, or the grid for logprobs that were stored.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"sequence {sequence.sequence_id!r} cannot be stored: {what}")

    n, p = len(sequence.input_ids), len(sequence.positions)
    ids, logprobs = sequence.ids, sequence.logprobs
    require(n >= 1, "it has no tokens")
    require(sequence.loss_mask.shape == (n,), f"loss_mask has shape {sequence.loss_mask.shape}, expected ({n},)")
    require(not sequence.loss_mask[0], "loss_mask[0] is set, but nothing predicts the first token")
    require(
        np.array_equal(sequence.positions, np.flatnonzero(sequence.loss_mask[1:])),
        "positions are not exactly those whose target is in the loss mask",
    )
    require(
        ids.ndim == 2 and ids.shape == logprobs.shape and len(ids) == p, f"head has shape {ids.shape}, {p} positions"
    )
    for name in ("tail_logprob", "target_logprob", "target_rank"):
        require(
            getattr(sequence, name).shape == (p,), f"{name} has shape {getattr(sequence, name).shape}, expected ({p},)"
        )
    in_range = int(sequence.input_ids.min()) >= 0 and int(sequence.input_ids.max()) < vocab_size
    require(in_range, f"token ids outside the vocabulary of {vocab_size}")
    if p == 0:
        return
    stored = ids >= 0
    size = stored.sum(axis=1)
    require(bool((size >= 1).all()), "a position has an empty head")
    require(bool((stored == (np.arange(ids.shape[1]) < size[:, None])).all()), "head padding is not at the end")
    require(int(ids.max()) < vocab_size, f"head ids outside the vocabulary of {vocab_size}")
    require(bool(np.isfinite(logprobs[stored]).all()), "a head logprob is not finite")
    require(bool((logprobs[stored] <= 1e-3).all()), "a head logprob is above 0")
    # Padding is -inf, so that a rise anywhere in a row is a rise between stored entries.
    padded = np.where(stored, logprobs, -np.inf)
    require(bool((padded[:, 1:] <= padded[:, :-1]).all()), "head logprobs do not fall")
    require(bool((np.exp(padded.astype(np.float64)).sum(axis=1) <= 1 + mass_slack).all()), "a head's mass is above 1")
    require(bool((sequence.tail_logprob <= 1e-3).all()), "a tail logprob is above 0 or not a number")
    require(bool((np.isneginf(sequence.tail_logprob) == (size == vocab_size)).all()), "tail mass 0 without a full head")
    require(bool(np.isfinite(sequence.target_logprob).all()), "a target logprob is not finite")
    require(bool((sequence.target_logprob <= 1e-3).all()), "a target logprob is above 0")
    ranks = sequence.target_rank
    require(bool(((ranks >= 0) & (ranks < vocab_size)).all()), "a target rank is outside the vocabulary")


def encode_batch(sequences: Sequence[CachedSequence], vocab_size: int, logprob_step: float) -> pa.RecordBatch:
    """Valid sequences (see ``validate``) as one record batch, one row each."""
    if not 2 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} ids cannot be stored; the format holds 2 to {MAX_VOCAB_SIZE}")
    sizes = [(sequence.ids >= 0).sum(axis=1).astype(np.int32) for sequence in sequences]
    ids, steps = [], []
    for sequence in sequences:
        stored = sequence.ids >= 0
        ids.append(sequence.ids[stored])
        # min(0): an engine's fp32 log-softmax may round a sure thing to +1e-7.
        grid = np.rint(np.minimum(sequence.logprobs, 0) / -logprob_step)
        if stored.size and grid[stored].max() >= 2**31:
            raise UserError(f"sequence {sequence.sequence_id!r} cannot be stored: a head logprob is below -2^31 steps")
        with np.errstate(invalid="ignore"):
            differences = np.diff(grid, axis=1, prepend=0)
        steps.append(differences[stored].astype(np.int64))
    entries = np.array([len(row) for row in ids], np.int64)
    all_ids = _concatenate(ids, np.int32)
    all_steps = _concatenate(steps, np.int64)
    escaped = all_steps >= ESCAPE
    escape_counts = np.add.reduceat(np.append(escaped, False).astype(np.int64), _starts(entries))
    escape_counts[entries == 0] = 0

    tokens = np.array([len(sequence.input_ids) for sequence in sequences], np.int64)
    kept = np.array([len(sequence.positions) for sequence in sequences], np.int64)
    columns: dict[str, pa.Array] = {
        "sequence_id": pa.array([sequence.sequence_id for sequence in sequences], pa.string()),
        "input_ids": _lists(tokens, _concatenate([s.input_ids for s in sequences], np.int32)),
        "loss_mask": _lists(tokens, _concatenate([s.loss_mask for s in sequences], np.bool_)),
        "positions": _lists(kept, _concatenate([s.positions for s in sequences], np.int32)),
        "target_logprob": _lists(kept, round_scalars(_concatenate([s.target_logprob for s in sequences], np.float32))),
        "target_rank": _lists(kept, _concatenate([s.target_rank for s in sequences], np.int32)),
        "tail_logprob": _lists(kept, round_scalars(_concatenate([s.tail_logprob for s in sequences], np.float32))),
        "head_size": _lists(kept, _concatenate(sizes, np.int32)),
        "head_step_plane": _binary(entries, np.minimum(all_steps, ESCAPE).astype(np.uint8)),
        "head_step_escape": _lists(escape_counts, all_steps[escaped].astype(np.int32)),
    }
    for byte, name in enumerate(id_planes(vocab_size)):
        columns[name] = _binary(entries, (all_ids >> (8 * byte)).astype(np.uint8))
    schema = shard_schema(vocab_size)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


class PackedBatch:
    """One record batch, opened for decoding single rows of it.

    Raises DamagedCacheError where the columns contradict each other; ``where`` names the place in messages.
    """

    def __init__(self, batch: pa.RecordBatch, vocab_size: int, logprob_step: float, where: str) -> None:
        self.where = where
        self.batch = batch
        self.vocab_size = vocab_size
        self.logprob_step = logprob_step
        self.planes = id_planes(vocab_size)
        if not batch.schema.equals(shard_schema(vocab_size)):
            raise DamagedCacheError(f"{where} has another Arrow schema than a vocabulary of {vocab_size} asks for")
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DamagedCacheError(f"{where} is not a valid record batch: {error}") from error
        if any(column.null_count for column in batch.columns):
            raise DamagedCacheError(f"{where} has nulls")
        self._ids = batch.column("sequence_id")
        self._offsets: dict[str, _Array] = {}
        self._values: dict[str, _Array] = {}
        for name in batch.schema.names[1:]:
            self._offsets[name], self._values[name] = _open_column(batch.column(name))

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, name: str, index: int) -> _Array:
        """The values of one column in one row, as stored (a view)."""
        offsets = self._offsets[name]
        return self._values[name][offsets[index] : offsets[index + 1]]

    def decode(self, index: int) -> CachedSequence:
        """One sequence, decoded and checked."""
        input_ids, loss_mask = self.row("input_ids", index), self.row("loss_mask", index)
        positions, target_logprob, target_rank, tail_logprob, size = (
            self.row(name, index) for name in POSITION_COLUMNS
        )
        n, p = len(input_ids), len(positions)
        self._require(len(loss_mask) == n, index, "input_ids and loss_mask differ in length")
        self._require(
            len(target_logprob) == len(target_rank) == len(tail_logprob) == len(size) == p,
            index,
            "its position columns differ in length",
        )
        in_range = n > 0 and int(input_ids.min()) >= 0 and int(input_ids.max()) < self.vocab_size
        self._require(in_range, index, "its token ids leave the vocabulary, or there are none")
        self._require(bool((positions[1:] > positions[:-1]).all()), index, "its positions do not rise")
        self._require(
            p == 0 or (positions[0] >= 0 and positions[-1] < n - 1), index, "its positions leave the sequence"
        )
        ids, logprobs = self._decode_head(index, size)
        return CachedSequence(
            sequence_id=self._ids[index].as_py(),
            # Copies: what a reader returns may be written to, and keeps no record batch alive.
            input_ids=input_ids.copy(),
            loss_mask=loss_mask.copy(),
            positions=positions.copy(),
            ids=ids,
            logprobs=logprobs,
            tail_logprob=tail_logprob.copy(),
            target_logprob=target_logprob.copy(),
            target_rank=target_rank.copy(),
        )

    def _decode_head(self, index: int, size: _Array) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """int32[P, K] and float32[P, K]: the padded head of one row."""
        steps_plane = self.row("head_step_plane", index)
        planes = [self.row(name, index) for name in self.planes]
        p = len(size)
        width = int(size.max()) if p else 0
        entries = int(size.sum(dtype=np.int64))
        self._require(p == 0 or int(size.min()) >= 1, index, "a head is empty")
        self._require(
            all(len(plane) == entries for plane in (*planes, steps_plane)), index, "its planes and head sizes disagree"
        )
        flat_ids = planes[0].astype(np.int32)
        for byte, plane in enumerate(planes[1:], start=1):
            flat_ids |= plane.astype(np.int32) << (8 * byte)
        self._require(entries == 0 or int(flat_ids.max()) < self.vocab_size, index, "head ids leave the vocabulary")

        steps = steps_plane.astype(np.int64)
        escapes = self.row("head_step_escape", index)
        escaped = np.flatnonzero(steps_plane == ESCAPE)
        self._require(
            len(escaped) == len(escapes) and (len(escapes) == 0 or int(escapes.min()) >= ESCAPE),
            index,
            "its escapes do not match its step plane",
        )
        steps[escaped] = escapes

        if entries == p * width:
            ids = flat_ids.reshape(p, width)
            grid = np.cumsum(steps.reshape(p, width), axis=1)
            return ids, _on_grid(grid, self.logprob_step)
        stored = np.arange(width) < size[:, None]
        ids = np.full((p, width), -1, np.int32)
        ids[stored] = flat_ids
        padded_steps = np.zeros((p, width), np.int64)
        padded_steps[stored] = steps
        logprobs = _on_grid(np.cumsum(padded_steps, axis=1), self.logprob_step)
        logprobs[~stored] = -np.inf
        return ids, logprobs

    def _require(self, holds: bool, index: int, what: str) -> None:
        if not holds:
            raise DamagedCacheError(f"{self.where}, row {index}: {what}")


class ContentHash:
    """sha256 over rows as SPEC.md section 8 defines it: equal for equal content, whatever the compression."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, batch: pa.RecordBatch) -> None:
        """Adds all rows of a batch."""
        opened = [_open_column(column) for column in batch.columns[1:]]
        for index, sequence_id in enumerate(batch.column(0).to_pylist()):
            self._add(sequence_id.encode())
            for offsets, values in opened:
                self._add(np.ascontiguousarray(values[offsets[index] : offsets[index + 1]]).tobytes())

    def _add(self, data: bytes) -> None:
        self._sha.update(len(data).to_bytes(8, "little"))
        self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def _on_grid(grid: _Array, step: float) -> NDArray[np.float32]:
    # Subtracted from 0 so that a sure thing reads 0.0, not -0.0.
    return np.float32(0) - grid.astype(np.float32) * np.float32(step)


def _concatenate(arrays: list[_Array], dtype: Any) -> _Array:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _starts(lengths: _Array) -> _Array:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def _offsets_of(lengths: _Array) -> _Array:
    ends = np.cumsum(lengths)
    if len(ends) and ends[-1] >= 2**31:
        raise UserError(
            "a record batch would hold over 2^31 values; store fewer sequences per batch or a smaller top_k"
        )
    return np.concatenate([[0], ends]).astype(np.int32)


def _lists(lengths: _Array, values: _Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(_offsets_of(lengths)), pa.array(values))


def _binary(lengths: _Array, values: NDArray[np.uint8]) -> pa.Array:
    buffers = [None, pa.py_buffer(_offsets_of(lengths)), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.binary(), len(lengths), buffers)


def _open_column(column: pa.Array) -> tuple[_Array, _Array]:
    """Offsets int32[rows + 1] and the flat values of a list or binary column, as numpy views where Arrow allows."""
    if pa.types.is_binary(column.type):
        _, offsets, data = column.buffers()
        values: _Array = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        opened = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        return opened, values
    flat = column.values
    return column.offsets.to_numpy(), flat.to_numpy(zero_copy_only=not pa.types.is_boolean(flat.type))
