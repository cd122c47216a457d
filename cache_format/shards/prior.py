"""The tail prior: one coarse distribution over the vocabulary per cache, a byte per id.

It has two uses. Ids are stored as their ranks in the prior, so frequent ids have small numbers,
which compress well. For reconstruction, a tail of known mass can be distributed over the ids in
proportion to the prior.

The prior is the teacher's mean distribution to the power 0.75, estimated from the stored data: the
probabilities of heads, and ``tail mass / draws`` for every draw.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format.errors import DamagedCacheError
from logitcask.cache_format.schema import PRIOR_STEP
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.bounded_file import BoundedFile

POWER = 0.75
# Added to every mean probability: ids that did not occur are unlikely, not impossible.
_UNSEEN = 1e-7
_SCHEMA = pa.schema([pa.field("step", pa.uint8(), nullable=False)])


class TailPrior:
    """``steps``: uint8[V]; the weight of id v is exp(-PRIOR_STEP * steps[v])."""

    def __init__(self, steps: NDArray[np.uint8]) -> None:
        self.steps = steps

    @classmethod
    def estimate(cls, sequences: Iterable[CachedSequence], vocab_size: int) -> TailPrior:
        """Estimate from some or all sequences of the new cache; without any, the uniform prior."""
        mass, positions = np.zeros(vocab_size), 0
        for sequence in sequences:
            stored = sequence.ids >= 0
            mass += np.bincount(sequence.ids[stored], np.exp(sequence.logprobs[stored]), vocab_size)
            if sequence.samples is not None:
                drawn = sequence.samples.ids >= 0
                draws = np.maximum(drawn.sum(axis=(1, 2), keepdims=True), 1)
                weight = np.exp(sequence.tail_logprob.astype(np.float64))[:, None, None] / draws
                mass += np.bincount(
                    sequence.samples.ids[drawn],
                    np.broadcast_to(weight, drawn.shape)[drawn],
                    vocab_size,
                )
            positions += len(sequence.positions)
        log_weight = POWER * np.log(mass / max(1, positions) + _UNSEEN)
        return cls(
            np.minimum(np.rint((log_weight.max() - log_weight) / PRIOR_STEP), 255).astype(np.uint8)
        )

    @cached_property
    def id_at(self) -> NDArray[np.int32]:
        """int32[V]: the id of each rank. Ids of equal weight are ranked by their number."""
        return np.argsort(self.steps, kind="stable").astype(np.int32)

    @cached_property
    def rank_of(self) -> NDArray[np.int32]:
        """int32[V]: the rank of each id."""
        ranks = np.empty(len(self.steps), np.int32)
        ranks[self.id_at] = np.arange(len(self.steps), dtype=np.int32)
        return ranks

    def probabilities(self) -> NDArray[np.float64]:
        """float64[V], adding up to 1."""
        weights = np.exp(-PRIOR_STEP * self.steps.astype(np.float64))
        total: NDArray[np.float64] = weights / weights.sum()
        return total

    def to_bytes(self) -> bytes:
        """An Arrow IPC file with one column, as SPEC.md section 6 says."""
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=9))
        with pa.ipc.new_file(sink, _SCHEMA, options=options) as file:
            file.write_batch(pa.record_batch([pa.array(self.steps)], schema=_SCHEMA))
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @classmethod
    def from_bytes(cls, data: bytes | mmap.mmap, vocab_size: int, where: str) -> TailPrior:
        """Inverse of ``to_bytes``. Raises DamagedCacheError, naming ``where``, for other bytes."""
        file = BoundedFile(data, where, _SCHEMA)
        batch = file.batch(0) if len(file) == 1 else None
        if batch is None or batch.num_rows != vocab_size:
            raise DamagedCacheError(f"{where} is not a prior over {vocab_size} ids")
        return cls(batch.column(0).to_numpy().copy())
