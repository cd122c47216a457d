"""The Arrow schema of a shard and the constants of format version 1 (see SPEC.md)."""

from __future__ import annotations

import pyarrow as pa

FORMAT = "logitcask"
FORMAT_VERSION = 1
UNKNOWN_VALUES = "unknown_values"
"""The feature of caches that lack tail masses or values of targets (SPEC.md section 5)."""

WRITER_LOGPROBS = "writer_logprobs"
"""The feature of caches with the column ``writer_logprob``."""

CHOSEN_IDS = "chosen_ids"
"""The feature of caches with the columns ``chosen_*``."""

KNOWN_FEATURES: frozenset[str] = frozenset({UNKNOWN_VALUES, WRITER_LOGPROBS, CHOSEN_IDS})
"""Names in a manifest's ``required_features`` that this package can read."""

MAX_VOCAB_SIZE = 1 << 24
MAX_DRAWS = 255
"""Tail samples in one set of one position."""
MAX_CHOSEN = 255
"""Chosen ids of one position."""

SCALAR_STEP = 2.0**-8
"""Grid of target logprobs, tail logprobs and entropies, nats."""

NO_TAIL = 65535
"""In ``tail_step``: the tail has no mass."""

UNKNOWN_TAIL = 65534
"""In ``tail_step`` of a cache whose tail masses are not known."""

UNKNOWN_RANK = -1
"""In ``target_rank``: the target's logprob and rank are not known."""

TAIL_MASS_FLOOR = 2.0**-20
"""Smallest tail mass that 1 - (a sum of fp32 probabilities) can vouch for."""

PRIOR_STEP = 0.25
"""Grid of the tail prior's log weights, nats."""

MAX_SHARDS = 100_000
"""What a manifest of 64 MiB has room for."""

BATCH_BYTES = 1 << 20
"""Uncompressed size a record batch aims at, the unit of random access: smaller ones decode more
slowly (docs/format.md).
"""

MAX_BATCH_BYTES = 256 << 20
"""Uncompressed size of a record batch at most: readers refuse more before they allocate it."""

MAX_DECODED_BYTES = 256 << 20
"""Size of one sequence's padded head or samples in memory at most, ids and logprobs together."""

POSITION_COLUMNS = ("positions", "target_logprob", "target_rank", "tail_step", "head_size")
"""List columns with one value per kept position (``entropy_step`` is another, where there is
one).
"""


def id_bytes(vocab_size: int) -> int:
    """Bytes per id of the vocabulary, 1 to 3."""
    return max(1, ((vocab_size - 1).bit_length() + 7) // 8)


def shard_schema(
    vocab_size: int,
    *,
    entropy: bool = False,
    samples: bool = False,
    sample_logprobs: bool = False,
    writer_logprobs: bool = False,
    chosen_ids: bool = False,
) -> pa.Schema:
    """Arrow schema of every shard of a cache with ``vocab_size`` ids and these optional columns."""

    def lists(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(kind), nullable=False)

    def plane(name: str) -> pa.Field:
        return pa.field(name, pa.binary(), nullable=False)

    def id_planes(prefix: str) -> list[pa.Field]:
        return [plane(f"{prefix}_plane_{byte}") for byte in range(id_bytes(vocab_size))]

    def steps(prefix: str) -> list[pa.Field]:
        return [plane(f"{prefix}_plane"), lists(f"{prefix}_escape", pa.int32())]

    fields = [
        pa.field("sequence_id", pa.string(), nullable=False),
        lists("input_ids", pa.int32()),
        lists("loss_mask", pa.bool_()),
        lists("positions", pa.int32()),
        lists("target_logprob", pa.float32()),
        lists("target_rank", pa.int32()),
        lists("tail_step", pa.uint16()),
        lists("head_size", pa.int32()),
        *id_planes("head_id"),
        *steps("head_step"),
    ]
    if entropy:
        fields.append(lists("entropy_step", pa.uint16()))
    if samples:
        fields += [
            lists("sample_size", pa.int32()),
            *id_planes("sample_gap"),
            plane("sample_count_plane"),
        ]
    if sample_logprobs:
        fields += steps("sample_step")
    if writer_logprobs:
        fields.append(lists("writer_logprob", pa.float32()))
    if chosen_ids:
        fields += [
            lists("chosen_size", pa.int32()),
            lists("chosen_head_size", pa.int32()),
            *steps("chosen_head"),
            *id_planes("chosen_gap"),
            *steps("chosen_step"),
        ]
    return pa.schema(fields)
