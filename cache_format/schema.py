"""The Arrow schema of a shard and the constants of format version 1: the one home of both (see SPEC.md)."""

from __future__ import annotations

import pyarrow as pa

FORMAT = "logitcask"
FORMAT_VERSION = 1
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Names in a manifest's ``required_features`` that this package can read."""

MAX_VOCAB_SIZE = 1 << 24
SCALAR_STEP = 2.0**-10
"""Grid of target and tail logprobs, nats."""

TAIL_MASS_FLOOR = 2.0**-20
"""Smallest tail mass that 1 - (a sum of fp32 probabilities) can vouch for."""

BATCH_BYTES = 256 * 1024
"""Uncompressed size a record batch aims at: the unit of random access."""

POSITION_COLUMNS = ("positions", "target_logprob", "target_rank", "tail_logprob", "head_size")
"""List columns with one value per kept position."""


def id_planes(vocab_size: int) -> tuple[str, ...]:
    """Names of the byte-plane columns that hold head ids of a vocabulary (1 to 3 of them)."""
    count = max(1, ((vocab_size - 1).bit_length() + 7) // 8)
    return tuple(f"head_id_plane_{byte}" for byte in range(count))


def shard_schema(vocab_size: int) -> pa.Schema:
    """Arrow schema of every shard of a cache with ``vocab_size`` ids."""

    def ints(name: str) -> pa.Field:
        return pa.field(name, pa.list_(pa.int32()), nullable=False)

    def floats(name: str) -> pa.Field:
        return pa.field(name, pa.list_(pa.float32()), nullable=False)

    def plane(name: str) -> pa.Field:
        return pa.field(name, pa.binary(), nullable=False)

    return pa.schema(
        [
            pa.field("sequence_id", pa.string(), nullable=False),
            ints("input_ids"),
            pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
            ints("positions"),
            floats("target_logprob"),
            ints("target_rank"),
            floats("tail_logprob"),
            ints("head_size"),
            *(plane(name) for name in id_planes(vocab_size)),
            plane("head_step_plane"),
            ints("head_step_escape"),
        ]
    )
