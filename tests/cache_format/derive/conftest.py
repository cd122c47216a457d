"""Caches that smaller and merged ones are made of."""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, CacheWriter
from logitcask.cache_format.shards.prior import TailPrior


@pytest.fixture
def write(tmp_path, rng, header, consistent_sequence):
    def make(name, kind="samples", count=8, start=0, empty=0, data=None, **changes):
        """The first ``empty`` sequences have no kept position; ``data`` and ``changes`` go into
        the header.
        """
        sequences = [
            consistent_sequence(rng, f"s{start + i}", kind=kind, tokens=60, kept=float(i >= empty))
            for i in range(count)
        ]
        made = header(1000, kind=kind)
        made = made.model_copy(
            update={
                "store": made.store.model_copy(update=changes),
                "data": made.data.model_copy(update=data or {}),
            }
        )
        with CacheWriter(tmp_path / name) as writer:
            started = writer.begin(made, TailPrior.estimate(sequences, 1000))
            with writer.shard(0) as shard:
                for each in sequences:
                    shard.append(each)
            writer.finish(started, 1)
        return str(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def sequence_of():
    """``sequence_of(ids, logprobs, tail, rows)``: the same head at every of ``rows`` positions."""

    def make(ids, logprobs, tail, rows):
        mask = np.ones(rows + 1, bool)
        mask[0] = False
        return CachedSequence(
            sequence_id="s",
            input_ids=np.zeros(rows + 1, np.int32),
            loss_mask=mask,
            positions=np.arange(rows, dtype=np.int32),
            ids=np.tile(ids, (rows, 1)).astype(np.int32),
            logprobs=np.tile(logprobs, (rows, 1)).astype(np.float32),
            tail_logprob=np.full(rows, tail, np.float32),
            target_logprob=np.full(rows, -1, np.float32),
            target_rank=np.zeros(rows, np.int32),
        )

    return make
