"""The plan of a build: the sequences of each shard, written to disk before the engine starts.

The tokenised data set is streamed to disk once, shard by shard. A resumed build reads the same
sequences in the same order, even if the source has changed, and no stage holds the data set in
memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from logitcask.cache_format.durable import load_state, sync, write_durably
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import (
    DataHash,
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.schema import BATCH_BYTES, MAX_SHARDS
from logitcask.cache_format.shards.shard_writer import uncompressed_bytes
from logitcask.pipeline.types import Sequence

_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("writer_logprob", pa.list_(pa.float32())),
        ("chosen_ids", pa.list_(pa.int32())),  # P x C, position by position
    ]
)
_ROWS_PER_BATCH = 64


class PlannedShard(BaseModel):
    """Size of one shard."""

    sequences: int
    tokens: int
    positions: int

    def sequences_per_batch(self, entries: float) -> int:
        """Rows per batch of about BATCH_BYTES, with ``entries`` entries and draws per position."""
        size = uncompressed_bytes(self.tokens, self.positions, round(entries * self.positions))
        return max(1, min(self.sequences, round(BATCH_BYTES * self.sequences / size)))


class Plan(BaseModel):
    """``.build/plan.json``; the sequences are beside it in ``.build/plan/``."""

    model_config = ConfigDict(frozen=True)

    request: dict[str, Any]
    tokenizer: TokenizerIdentity
    data: DataIdentity
    shards: tuple[PlannedShard, ...]

    @classmethod
    def load(cls, build_dir: Path) -> Plan | None:
        """The plan of an earlier start, or None."""
        file = build_dir / "plan.json"
        return load_state(cls, file) if file.exists() else None

    def header(self, teacher: TeacherIdentity, store: StoreSettings) -> Header:
        """The fixed part of the manifest of this plan's cache."""
        return Header(
            required_features=store.features,
            created_by=f"logitcask {version('logitcask')}",
            teacher=teacher,
            tokenizer=self.tokenizer,
            data=self.data,
            store=store,
            config=self.request,
        )

    def save(self, build_dir: Path) -> None:
        """Commits the plan: from here on a resumed build follows it."""
        write_durably(build_dir / "plan.json", self.model_dump_json(indent=2))


def write_sequences(
    build_dir: Path, sequences: Iterable[Sequence], shard_tokens: int
) -> tuple[tuple[PlannedShard, ...], str]:
    """Streams sequences to ``.build/plan/``; a shard ends before it exceeds ``shard_tokens``.

    Returns the shards and the data's sha256. Raises UserError for more shards than a manifest can
    list.
    """
    folder = build_dir / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    digest = DataHash()
    shards: list[PlannedShard] = []
    waiting: list[Sequence] = []
    file: pa.ipc.RecordBatchFileWriter | None = None
    tokens = positions = count = 0

    def shard_file(index: int) -> Path:
        return folder / f"shard-{index:05d}.arrow"

    def flush() -> None:
        if file is not None and waiting:
            columns = [
                [s.sequence_id for s in waiting],
                [s.input_ids for s in waiting],
                [s.loss_mask for s in waiting],
                [s.writer_logprob for s in waiting],
                [None if s.chosen_ids is None else s.chosen_ids.reshape(-1) for s in waiting],
            ]
            file.write_batch(
                pa.record_batch(
                    [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)],
                    schema=_SCHEMA,
                )
            )
            waiting.clear()

    def end_shard() -> None:
        flush()
        if file is not None:
            file.close()
            sync(shard_file(len(shards)))
            shards.append(PlannedShard(sequences=count, tokens=tokens, positions=positions))
        if len(shards) > MAX_SHARDS:
            raise UserError(
                f"shards of {shard_tokens:,} tokens would be more than {MAX_SHARDS:,}, which a manifest cannot list; "
                "set a larger store.shard_tokens"
            )

    for sequence in sequences:
        if file is None or tokens + len(sequence.input_ids) > shard_tokens:
            end_shard()
            file = pa.ipc.new_file(str(shard_file(len(shards))), _SCHEMA)
            tokens = positions = count = 0
        digest.update(sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
        waiting.append(sequence)
        tokens += len(sequence.input_ids)
        positions += int(sequence.loss_mask.sum())
        count += 1
        if len(waiting) == _ROWS_PER_BATCH:
            flush()
    end_shard()
    sync(folder)
    return tuple(shards), digest.hexdigest()


def read_sequences(build_dir: Path, shard: int) -> Iterator[Sequence]:
    """The planned sequences of one shard, in order."""
    with pa.ipc.open_file(
        pa.memory_map(str(build_dir / "plan" / f"shard-{shard:05d}.arrow"))
    ) as file:
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            # Plans of earlier versions have no columns for the writer.
            columns = [
                batch.column(field.name)
                if field.name in batch.schema.names
                else pa.nulls(len(batch), field.type)
                for field in _SCHEMA
            ]
            for sequence_id, input_ids, mask, logprobs, chosen in zip(*columns, strict=True):
                loss_mask = mask.values.to_numpy(zero_copy_only=False)
                positions = int(loss_mask[1:].sum())
                yield Sequence(
                    sequence_id=sequence_id.as_py(),
                    input_ids=input_ids.values.to_numpy().copy(),
                    loss_mask=loss_mask,
                    writer_logprob=logprobs.values.to_numpy().copy() if logprobs.is_valid else None,
                    chosen_ids=chosen.values.to_numpy().reshape(positions, -1).copy()
                    if chosen.is_valid and positions
                    else None,
                )
