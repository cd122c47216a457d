"""Conversion of sequences to Arrow record batches and back (SPEC.md sections 4 and 5).

Heads are ragged. Their ids are stored as byte planes of ranks, their logprobs as differences on a
grid, and draws as gaps between sorted ranks. Arrow compresses these columns with zstd. All work is
numpy over whole batches; no Python code runs per token.

Shapes: P kept positions, K largest head, E = sum of head sizes, T sets of samples, S largest set,
C most chosen ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcask.cache_format.errors import DamagedCacheError, UserError
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.manifest import check_step as check_step
from logitcask.cache_format.schema import (
    MAX_BATCH_BYTES,
    MAX_DECODED_BYTES,
    MAX_DRAWS,
    NO_TAIL,
    POSITION_COLUMNS,
    UNKNOWN_RANK,
    UNKNOWN_TAIL,
    id_bytes,
    shard_schema,
)
from logitcask.cache_format.sequence import CachedSequence, ChosenIds, TailSamples
from logitcask.cache_format.shards.prior import TailPrior

ESCAPE = 255
_Array = NDArray[Any]
_NO_LOGPROB = "a {} logprob is above 0 or not finite"


class Codec:
    """Encodes and decodes the record batches of one cache.

    Raises UserError for a vocabulary the format cannot hold.
    """

    def __init__(self, store: StoreSettings, prior: TailPrior | None = None) -> None:
        self.store = store
        self.schema = shard_schema(
            store.vocab_size,
            entropy=store.entropy,
            samples=store.tail_samples > 0,
            sample_logprobs=store.sample_logprobs,
            writer_logprobs=store.writer_logprobs,
            chosen_ids=store.chosen_ids > 0,
        )
        # Without a prior an id is its own rank.
        self.rank_of = None if prior is None else prior.rank_of
        self.id_at = None if prior is None else prior.id_at

    def encode(self, sequences: Sequence[CachedSequence]) -> pa.RecordBatch:
        """Valid sequences (see ``validation.validate``) as one record batch, one row each."""
        tokens = np.array([len(sequence.input_ids) for sequence in sequences], np.int64)
        kept = np.array([len(sequence.positions) for sequence in sequences], np.int64)
        columns: dict[str, pa.Array] = {
            "sequence_id": pa.array([sequence.sequence_id for sequence in sequences], pa.string()),
            "input_ids": _lists(tokens, _concatenate([s.input_ids for s in sequences], np.int32)),
            "loss_mask": _lists(tokens, _concatenate([s.loss_mask for s in sequences], np.bool_)),
            "positions": _lists(kept, _concatenate([s.positions for s in sequences], np.int32)),
            "target_logprob": _lists(
                kept, self._rounded(_concatenate([s.target_logprob for s in sequences], np.float32))
            ),
            "target_rank": _lists(kept, _concatenate([s.target_rank for s in sequences], np.int32)),
            "tail_step": _lists(
                kept,
                self._scalar_steps(_concatenate([s.tail_logprob for s in sequences], np.float32)),
            ),
        }
        if self.store.entropy:
            entropy = _concatenate(
                [s.entropy for s in sequences if s.entropy is not None], np.float32
            )
            columns["entropy_step"] = _lists(kept, self._scalar_steps(-entropy))
        if self.store.writer_logprobs:
            written = _concatenate(
                [s.writer_logprob for s in sequences if s.writer_logprob is not None], np.float32
            )
            columns["writer_logprob"] = _lists(kept, self._rounded(written))
        last_steps = self._encode_heads(sequences, kept, columns)
        if self.store.tail_samples:
            self._encode_samples(sequences, kept, last_steps, columns)
        if self.store.chosen_ids:
            self._encode_chosen(sequences, kept, last_steps, columns)
        batch = pa.RecordBatch.from_arrays(
            [columns[name] for name in self.schema.names], schema=self.schema
        )
        if batch.nbytes > MAX_BATCH_BYTES:
            raise UserError(
                f"a record batch of {batch.nbytes:,} bytes cannot be stored; the format holds {MAX_BATCH_BYTES:,}: "
                "store shorter sequences or a smaller top_k"
            )
        return batch

    def open(self, batch: pa.RecordBatch, where: str) -> PackedBatch:
        """Opens a record batch for decoding. Raises DamagedCacheError, naming ``where``, if it is
        not a batch of this cache.
        """
        return PackedBatch(self, batch, where)

    def _encode_heads(
        self, sequences: Sequence[CachedSequence], kept: _Array, columns: dict[str, pa.Array]
    ) -> _Array:
        """Adds the head columns. Returns int32[sum of P]: the last grid point of every head, 0 for
        an empty head.
        """
        sizes, ids, steps, last = [], [], [], []
        for sequence in sequences:
            stored = sequence.ids >= 0
            size = stored.sum(axis=1, dtype=np.int32)
            # Grid points. min(0): an engine's fp32 log-softmax may round a probability of 1 to
            # +1e-7. The step is a power of two, so the product is exact in fp32.
            grid = np.rint(
                np.minimum(sequence.logprobs, 0) * np.float32(-1 / self.store.logprob_step)
            )
            full = bool(stored.all())
            if not full:
                grid[~stored] = 0
            if grid.size and grid.max() >= 2**31:
                raise UserError(
                    f"sequence {sequence.sequence_id!r} cannot be stored: a head logprob is below -2^31 steps"
                )
            # Differences between neighbouring entries of a head; the first stays absolute.
            whole = grid.astype(np.int32)
            difference = whole.copy()
            difference[:, 1:] -= whole[:, :-1]
            # Padding is dropped: the entries of all positions follow each other.
            sizes.append(size)
            ids.append(sequence.ids.reshape(-1) if full else sequence.ids[stored])
            steps.append(difference.reshape(-1) if full else difference[stored])
            last.append(whole.max(axis=1, initial=0))
        # Ids become ranks in the prior, ranks byte planes, differences a byte plane with escapes.
        entries = np.array([len(row) for row in ids], np.int64)
        columns["head_size"] = _lists(kept, _concatenate(sizes, np.int32))
        ranks = _concatenate(ids, np.int32)
        self._put_id_planes(
            "head_id", entries, ranks if self.rank_of is None else self.rank_of.take(ranks), columns
        )
        _put_steps("head_step", entries, _concatenate(steps, np.int32), columns)
        return _concatenate(last, np.int32)

    def _encode_samples(
        self,
        sequences: Sequence[CachedSequence],
        kept: _Array,
        last_steps: _Array,
        columns: dict[str, pa.Array],
    ) -> None:
        """Adds the sample columns: distinct ranks of each set as sorted gaps, and their counts."""
        sizes, gaps, counts, steps, entries = [], [], [], [], []
        nothing = np.int32(1 << 30)  # larger than every rank, so padding sorts to the end
        begin = 0
        for sequence, positions in zip(sequences, kept, strict=True):
            assert sequence.samples is not None
            # Ids become ranks, sorted inside each set.
            ids = sequence.samples.ids
            ranks = ids if self.rank_of is None else self.rank_of.take(ids, mode="clip")
            ranks = np.where(ids < 0, nothing, ranks)
            order = np.argsort(ranks, axis=2, kind="stable")
            ranks = np.take_along_axis(ranks, order, axis=2)
            # Gaps between neighbouring ranks. A gap of 0 is a repetition, and is not stored.
            gap = ranks.copy()
            gap[..., 1:] -= ranks[..., :-1]
            distinct = ranks < nothing
            drawn = int(distinct.sum())
            distinct[..., 1:] &= gap[..., 1:] > 0
            sizes.append(distinct.sum(axis=2, dtype=np.int32).reshape(-1))
            gaps.append(gap[distinct])
            # Counts. Padding is at the end of each set, so only repetitions of a rank come between
            # it and the next distinct rank.
            at = np.flatnonzero(distinct[ranks < nothing])
            counts.append(np.diff(at, append=drawn))
            entries.append(len(at))
            if sequence.samples.logprobs is not None:
                # Steps below the last entry of the position's head.
                logprobs = np.take_along_axis(sequence.samples.logprobs, order, axis=2)[distinct]
                grid = np.rint(
                    np.minimum(logprobs, 0) * np.float32(-1 / self.store.logprob_step)
                ).astype(np.int64)
                below = last_steps[begin : begin + positions]
                steps.append(grid - np.repeat(below, distinct.sum(axis=(1, 2))))
            begin += positions
        lengths = np.array(entries, np.int64)
        columns["sample_size"] = _lists(
            kept * self.store.sample_sets, _concatenate(sizes, np.int32)
        )
        self._put_id_planes("sample_gap", lengths, _concatenate(gaps, np.int32), columns)
        columns["sample_count_plane"] = _binary(lengths, _concatenate(counts, np.uint8))
        if self.store.sample_logprobs:
            # A draw is less probable than the head's last entry, except for ties and for the order
            # of rounding.
            _put_steps(
                "sample_step", lengths, np.maximum(_concatenate(steps, np.int64), 0), columns
            )

    def _encode_chosen(
        self,
        sequences: Sequence[CachedSequence],
        kept: _Array,
        last_steps: _Array,
        columns: dict[str, pa.Array],
    ) -> None:
        """Adds the columns of chosen ids: places in the head where they are in it, otherwise sorted
        gaps of ranks and steps below the head's last entry.
        """
        sizes, head_sizes, places, gaps, steps = [], [], [], [], []
        nothing = np.int32(1 << 30)  # larger than every rank and place, so it sorts to the end
        begin = 0
        for sequence, positions in zip(sequences, kept, strict=True):
            assert sequence.chosen is not None
            ids, place = sequence.chosen.ids, sequence.chosen.places_in(sequence.ids)
            in_head = place >= 0
            others = (ids >= 0) & ~in_head
            sizes.append((ids >= 0).sum(axis=1, dtype=np.int32))
            head_sizes.append(in_head.sum(axis=1, dtype=np.int32))
            # Places in the head, sorted at each position, as differences.
            place = np.sort(np.where(in_head, place, nothing), axis=1)
            difference = place.copy()
            difference[:, 1:] -= place[:, :-1]
            places.append(difference[place < nothing])
            # The others by rank, likewise.
            ranks = ids if self.rank_of is None else self.rank_of.take(ids, mode="clip")
            ranks = np.where(others, ranks, nothing)
            order = np.argsort(ranks, axis=1, kind="stable")
            ranks = np.take_along_axis(ranks, order, axis=1)
            gap = ranks.copy()
            gap[:, 1:] -= ranks[:, :-1]
            gaps.append(gap[ranks < nothing])
            # Steps below the last entry of the position's head.
            logprobs = np.take_along_axis(sequence.chosen.logprobs, order, axis=1)
            grid = np.rint(
                np.minimum(logprobs[ranks < nothing], 0) * np.float32(-1 / self.store.logprob_step)
            ).astype(np.int64)
            if grid.size and grid.max() >= 2**31:
                raise UserError(
                    f"sequence {sequence.sequence_id!r} cannot be stored: a logprob of a chosen id is below -2^31 steps"
                )
            below = last_steps[begin : begin + positions]
            steps.append(grid - np.repeat(below, others.sum(axis=1)))
            begin += positions
        columns["chosen_size"] = _lists(kept, _concatenate(sizes, np.int32))
        columns["chosen_head_size"] = _lists(kept, _concatenate(head_sizes, np.int32))
        lengths = np.array([len(each) for each in places], np.int64)
        _put_steps("chosen_head", lengths, _concatenate(places, np.int32), columns)
        lengths = np.array([len(each) for each in gaps], np.int64)
        self._put_id_planes("chosen_gap", lengths, _concatenate(gaps, np.int32), columns)
        # None is more probable than the head's last entry, except for ties and for the order of
        # rounding.
        _put_steps("chosen_step", lengths, np.maximum(_concatenate(steps, np.int64), 0), columns)

    def _put_id_planes(
        self, prefix: str, lengths: _Array, values: _Array, columns: dict[str, pa.Array]
    ) -> None:
        octets = np.ascontiguousarray(values, "<i4").view(np.uint8).reshape(-1, 4)
        for byte in range(id_bytes(self.store.vocab_size)):
            columns[f"{prefix}_plane_{byte}"] = _binary(
                lengths, np.ascontiguousarray(octets[:, byte])
            )

    def _rounded(self, values: _Array) -> NDArray[np.float32]:
        """Values rounded to multiples of the scalar step, if fp32 can represent these exactly."""
        step = np.float32(self.store.scalar_step)
        return np.where(np.abs(values) < 2**13, np.rint(values / step) * step, values).astype(
            np.float32
        )

    def _scalar_steps(self, logprobs: _Array) -> NDArray[np.uint16]:
        """-logprob on the scalar grid; NO_TAIL for -inf, UNKNOWN_TAIL for NaN."""
        none, unknown = np.isneginf(logprobs), np.isnan(logprobs)
        logprobs = np.where(unknown, 0, logprobs)
        steps = np.rint(-np.where(none, 0, np.minimum(logprobs, 0)) / self.store.scalar_step)
        steps = np.where(none, NO_TAIL, np.minimum(steps, NO_TAIL - 1))
        return np.where(unknown, UNKNOWN_TAIL, steps).astype(np.uint16)


class PackedBatch:
    """A record batch, opened for decoding its rows. It has the cache's schema, is valid and has no
    nulls, as ``BoundedFile`` returns it.

    Raises DamagedCacheError if its columns contradict each other.
    """

    def __init__(self, codec: Codec, batch: pa.RecordBatch, where: str) -> None:
        self.codec = codec
        self.where = where
        self.batch = batch
        # A flag takes a bit on disk and a byte in memory.
        if len(batch.column("loss_mask").values) > len(batch.column("input_ids").values):
            raise DamagedCacheError(f"{where} has more flags in its loss masks than tokens")
        self._ids = batch.column("sequence_id")
        self._offsets: dict[str, _Array] = {}
        self._values: dict[str, _Array] = {}
        for name in batch.schema.names[1:]:
            self._offsets[name], self._values[name] = _open_column(batch.column(name))

    def __len__(self) -> int:
        return len(self._ids)

    def decode(self, index: int) -> CachedSequence:
        """One sequence, decoded and checked."""
        store = self.codec.store
        # Views of the row's columns, and checks that they agree.
        input_ids, loss_mask = self._row("input_ids", index), self._row("loss_mask", index)
        positions, target_logprob, target_rank, tail_step, size = (
            self._row(n, index) for n in POSITION_COLUMNS
        )
        n, p = len(input_ids), len(positions)
        self._require(len(loss_mask) == n, index, "input_ids and loss_mask differ in length")
        self._require(
            len(target_logprob) == len(target_rank) == len(tail_step) == len(size) == p,
            index,
            "its position columns differ in length",
        )
        in_range = n > 0 and int(input_ids.min()) >= 0 and int(input_ids.max()) < store.vocab_size
        self._require(in_range, index, "its token ids leave the vocabulary, or there are none")
        self._require(
            not loss_mask[0] and np.array_equal(positions, np.flatnonzero(loss_mask[1:])),
            index,
            "its positions are not those of its loss mask",
        )
        of_targets, ranks = target_logprob, target_rank
        if {"targets", "ranks"} & set(store.unknown):
            ranks = ranks[ranks != UNKNOWN_RANK]
        if "targets" in store.unknown:
            agree = bool((target_rank[np.isnan(target_logprob)] == UNKNOWN_RANK).all())
            self._require(agree, index, "a target has a rank, but no logprob")
            of_targets = of_targets[~np.isnan(of_targets)]
        # A logprob slightly above 0 comes from rounding (see ``validation.validate``).
        self._require(_are_logprobs(of_targets), index, _NO_LOGPROB.format("target"))
        ranked = len(ranks) == 0 or (int(ranks.min()) >= 0 and int(ranks.max()) < store.vocab_size)
        self._require(ranked, index, "a target rank is outside the vocabulary")
        # The ragged head, padded; then the scalars, from steps to nats.
        ids, logprobs, last = self._decode_head(index, size)
        entropy = None
        if store.entropy:
            entropy = self._row("entropy_step", index)
            self._require(len(entropy) == p, index, "its position columns differ in length")
            entropy = entropy * np.float32(store.scalar_step)
        writer_logprob = None
        if store.writer_logprobs:
            writer_logprob = self._row("writer_logprob", index).copy()
            self._require(len(writer_logprob) == p, index, "its position columns differ in length")
            self._require(_are_logprobs(writer_logprob), index, _NO_LOGPROB.format("writer"))
        tail_logprob = np.float32(0) - tail_step * np.float32(store.scalar_step)
        tail_logprob[tail_step == NO_TAIL] = -np.inf
        if not store.tail_known:
            unknown = bool((tail_step == UNKNOWN_TAIL).all())
            self._require(unknown, index, "a tail has a mass, but the cache knows none")
            tail_logprob[:] = np.nan
        return CachedSequence(
            sequence_id=self._ids[index].as_py(),
            # Copies: the caller may write to them, and they keep no record batch in memory.
            input_ids=input_ids.copy(),
            loss_mask=loss_mask.copy(),
            positions=positions.copy(),
            ids=ids,
            logprobs=logprobs,
            tail_logprob=tail_logprob,
            target_logprob=target_logprob.copy(),
            target_rank=target_rank.copy(),
            entropy=entropy,
            samples=self._decode_samples(index, p, last) if store.tail_samples else None,
            writer_logprob=writer_logprob,
            chosen=self._decode_chosen(index, ids, logprobs, last) if store.chosen_ids else None,
        )

    def _decode_head(
        self, index: int, size: _Array
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], _Array]:
        """The padded head of one row, int32[P, K] and float32[P, K], and the last grid point of
        each head, int64[P].
        """
        # Sizes are checked before anything is allocated.
        store = self.codec.store
        p = len(size)
        width = int(size.max()) if p else 0
        entries = int(size.sum(dtype=np.int64))
        smallest = 0 if store.tail_samples else 1
        self._require(p == 0 or int(size.min()) >= smallest, index, "a head is empty")
        self._require(
            width <= store.vocab_size,
            index,
            f"a head has {width} entries, more than the vocabulary",
        )
        self._require_room(index, "heads", 8 * p * width)
        # Byte planes to ranks, ranks to ids; steps with their escapes.
        flat_ids = self._ranks("head_id", index, entries)
        flat_ids = self._ids_of(flat_ids, index)
        steps = self._steps("head_step", index, entries)
        # All heads have one size: reshape, and sum the differences along each row.
        if entries == p * width:
            narrow = steps.dtype == np.uint8 and width < 2**22
            grid = np.cumsum(
                steps.reshape(p, width), axis=1, dtype=np.int32 if narrow else np.int64
            )
            last = grid[:, -1] if width else np.zeros(p, np.int64)
            self._require(
                p == 0 or int(last.max()) < 2**31, index, "a logprob is below what the format holds"
            )
            return flat_ids.reshape(p, width), self._on_grid(grid), last
        # Ragged heads: running sums over all entries, then the difference to the head's start.
        starts = _starts(size)
        total = _sums(steps)
        last = total[starts + size] - total[starts]
        self._require(int(last.max()) < 2**31, index, "a logprob is below what the format holds")
        # Each entry goes to its place in the padded arrays.
        place = _places(size, width)
        ids = np.full(p * width, -1, np.int32)
        ids[place] = flat_ids
        logprobs = np.full(p * width, -np.inf, np.float32)
        logprobs[place] = self._on_grid(_within(total, starts, size))
        return ids.reshape(p, width), logprobs.reshape(p, width), last

    def _decode_samples(self, index: int, p: int, last: _Array) -> TailSamples:
        """The draws of one row by ascending rank; an id drawn n times occurs n times."""
        # Sizes and counts are checked before anything is allocated.
        store = self.codec.store
        size = self._row("sample_size", index)
        self._require(
            len(size) == p * store.sample_sets, index, "its sample sizes and positions disagree"
        )
        self._require(len(size) == 0 or int(size.min()) >= 0, index, "a sample size is negative")
        entries = int(size.sum(dtype=np.int64))
        self._require_room(index, "samples", store.bytes_per_draw * entries)
        counts = self._row("sample_count_plane", index)
        self._require(len(counts) == entries, index, "its samples and their counts disagree")
        self._require(entries == 0 or int(counts.min()) >= 1, index, "a sample was drawn 0 times")
        # Draws of each set, repetitions included.
        starts = _starts(size)
        drawn_before = _sums(counts)
        draws = drawn_before[starts + size] - drawn_before[starts]
        most = int(draws.max()) if len(draws) else 0
        self._require(most <= MAX_DRAWS, index, f"a set of samples has {most} draws")
        self._require_room(index, "samples", store.bytes_per_draw * len(draws) * most)
        # Gaps to ranks, inside each set; ranks to ids.
        ranks = _within(_sums(self._ranks("sample_gap", index, entries)), starts, size)
        self._require(
            entries == 0 or int(ranks.max()) < store.vocab_size,
            index,
            "sample ids leave the vocabulary",
        )
        drawn_ids = self._ids_of(ranks.astype(np.int32), index)
        del ranks  # 8 bytes an entry: freed here, because memory peaks below
        # Each id as often as it was drawn, in its place in the padded array.
        repeated = int(drawn_before[-1]) > entries
        shape = (p, store.sample_sets, most)
        place = _places(draws, most)
        ids = np.full(len(draws) * most, -1, np.int32)
        ids[place] = np.repeat(drawn_ids, counts) if repeated else drawn_ids
        logprobs = None
        # Logprobs: steps below the last entry of the head of the draw's position.
        if store.sample_logprobs:
            steps = self._steps("sample_step", index, entries) + np.repeat(
                np.repeat(last, store.sample_sets), size
            )
            of_draws = self._on_grid(steps)
            padded = np.full(len(draws) * most, -np.inf, np.float32)
            padded[place] = np.repeat(of_draws, counts) if repeated else of_draws
            logprobs = padded.reshape(shape)
        return TailSamples(ids.reshape(shape), logprobs)

    def _decode_chosen(
        self, index: int, head: NDArray[np.int32], logprobs: NDArray[np.float32], last: _Array
    ) -> ChosenIds:
        """The chosen ids of one row: those in the head by their place, then the others by rank."""
        # Sizes are checked before anything is allocated.
        store, p = self.codec.store, len(head)
        size, in_head = self._row("chosen_size", index), self._row("chosen_head_size", index)
        self._require(
            len(size) == len(in_head) == p, index, "its sizes of chosen ids and positions disagree"
        )
        fits = p == 0 or (
            int(in_head.min()) >= 0
            and bool((in_head <= size).all())
            and int(size.max()) <= store.chosen_ids
        )
        self._require(fits, index, "a position has another number of chosen ids than it may")
        width = int(size.max()) if p else 0
        self._require_room(index, "chosen ids", 8 * p * width)
        others = size - in_head
        ids = np.full(p * width, -1, np.int32)
        chosen = np.full(p * width, -np.inf, np.float32)
        # Those in the head: differences to places, places to entries.
        starts = _starts(in_head)
        entries = int(in_head.sum(dtype=np.int64))
        place = _within(_sums(self._steps("chosen_head", index, entries)), starts, in_head)
        row = np.repeat(np.arange(p), in_head)
        stored = (head >= 0).sum(axis=1)
        self._require(bool((place < stored[row]).all()), index, "a chosen id is not in its head")
        at = _places(in_head, width)
        ids[at], chosen[at] = head[row, place], logprobs[row, place]
        # The others behind them: gaps to ranks, ranks to ids; steps below the head's last entry.
        starts = _starts(others)
        entries = int(others.sum(dtype=np.int64))
        ranks = _within(_sums(self._ranks("chosen_gap", index, entries)), starts, others)
        self._require(
            entries == 0 or int(ranks.max()) < store.vocab_size,
            index,
            "chosen ids leave the vocabulary",
        )
        at = _places(others, width) + np.repeat(in_head, others)
        ids[at] = self._ids_of(ranks.astype(np.int32), index)
        steps = self._steps("chosen_step", index, entries) + np.repeat(last, others)
        chosen[at] = self._on_grid(steps)
        return ChosenIds(ids.reshape(p, width), chosen.reshape(p, width))

    def _row(self, name: str, index: int) -> _Array:
        """The values of one column in one row, as stored (a view)."""
        offsets = self._offsets[name]
        return self._values[name][offsets[index] : offsets[index + 1]]

    def _ranks(self, prefix: str, index: int, entries: int) -> NDArray[np.int32]:
        """int32[entries]: the values of one row, put together from its byte planes."""
        planes = [
            self._row(f"{prefix}_plane_{b}", index)
            for b in range(id_bytes(self.codec.store.vocab_size))
        ]
        self._require(
            all(len(plane) == entries for plane in planes),
            index,
            f"its planes of {prefix} disagree with its sizes",
        )
        if len(planes) == 1:
            return planes[0].astype(np.int32)
        # From the highest byte to the lowest.
        values = np.empty(entries, np.int32)
        np.left_shift(planes[-1], 8, out=values, dtype=np.int32)
        for plane in planes[-2:0:-1]:
            values |= plane
            values <<= 8
        values |= planes[0]
        return values

    def _ids_of(self, ranks: NDArray[np.int32], index: int) -> NDArray[np.int32]:
        self._require(
            len(ranks) == 0 or int(ranks.max()) < self.codec.store.vocab_size,
            index,
            "its ids leave the vocabulary",
        )
        return ranks if self.codec.id_at is None else self.codec.id_at.take(ranks)

    def _steps(self, prefix: str, index: int, entries: int) -> _Array:
        """int64[entries]: one row's steps with escapes; without escapes, the uint8 plane itself."""
        plane = self._row(f"{prefix}_plane", index)
        escapes = self._row(f"{prefix}_escape", index)
        self._require(len(plane) == entries, index, f"its {prefix} and sizes disagree")
        escaped = np.flatnonzero(plane == ESCAPE)
        self._require(
            len(escaped) == len(escapes) and (len(escapes) == 0 or int(escapes.min()) >= ESCAPE),
            index,
            "its escapes do not match its step plane",
        )
        if not len(escaped):
            return plane
        steps = plane.astype(np.int64)
        steps[escaped] = escapes
        return steps

    def _on_grid(self, grid: _Array) -> NDArray[np.float32]:
        logprobs = grid.astype(np.float32)
        logprobs *= np.float32(self.codec.store.logprob_step)
        # Subtracted from 0 so that a probability of 1 gives 0.0, not -0.0.
        return np.subtract(np.float32(0), logprobs, out=logprobs)

    def _require_room(self, index: int, what: str, size: int) -> None:
        fits = size <= MAX_DECODED_BYTES
        self._require(
            fits,
            index,
            f"its {what} would take {size:,} bytes; the format allows {MAX_DECODED_BYTES:,}",
        )

    def _require(self, holds: bool, index: int, what: str) -> None:
        if not holds:
            raise DamagedCacheError(f"{self.where}, row {index}: {what}")


class ContentHash:
    """sha256 over rows (SPEC.md section 8): equal for equal content, with any compression."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, batch: pa.RecordBatch) -> None:
        """Adds all rows of a batch."""
        opened = [_open_column(column) for column in batch.columns[1:]]
        for index, sequence_id in enumerate(batch.column(0).to_pylist()):
            self._add(memoryview(sequence_id.encode()))
            for offsets, values in opened:
                self._add(np.ascontiguousarray(values[offsets[index] : offsets[index + 1]]).data)

    def _add(self, data: memoryview) -> None:
        self._sha.update(data.nbytes.to_bytes(8, "little"))
        self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def _are_logprobs(values: _Array) -> bool:
    return bool(np.isfinite(values).all() and (values <= 1e-3).all())


def _concatenate(arrays: list[_Array], dtype: Any) -> _Array:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _sums(values: _Array) -> NDArray[np.int64]:
    """int64[len(values) + 1]: the sum of the values before each one, and the total."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, dtype=np.int64, out=sums[1:])
    return sums


def _within(
    sums: NDArray[np.int64], starts: NDArray[np.int64], lengths: _Array
) -> NDArray[np.int64]:
    """Running sums inside each run, from the ``_sums`` of all runs, which it overwrites."""
    before = np.repeat(sums[starts], lengths)
    within = sums[1:]
    within -= before
    return within


def _starts(lengths: _Array) -> NDArray[np.int64]:
    """Start of each run in the concatenation of runs of these lengths."""
    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    return starts


def _places(lengths: _Array, width: int) -> NDArray[np.int64]:
    """Indices of the elements of runs of these lengths in a flattened [len(lengths), width], one
    run per row.
    """
    shift = np.arange(len(lengths), dtype=np.int64) * width - _starts(lengths)
    places: NDArray[np.int64] = np.repeat(shift, lengths)
    places += np.arange(len(places))
    return places


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


def _put_steps(prefix: str, lengths: _Array, steps: _Array, columns: dict[str, pa.Array]) -> None:
    """Adds a step plane and its escapes; ``lengths`` are entries per row."""
    escaped = steps >= ESCAPE
    counts = (
        np.add.reduceat(np.append(escaped, False).astype(np.int64), _starts(lengths))
        if len(lengths)
        else lengths
    )
    counts[lengths == 0] = 0
    columns[f"{prefix}_plane"] = _binary(lengths, np.minimum(steps, ESCAPE).astype(np.uint8))
    columns[f"{prefix}_escape"] = _lists(counts, steps[escaped].astype(np.int32))


def _open_column(column: pa.Array) -> tuple[_Array, _Array]:
    """Offsets int32[rows + 1] and flat values of a list or binary column, as views if possible."""
    if pa.types.is_binary(column.type):
        _, offsets, data = column.buffers()
        values: _Array = (
            np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        )
        return np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset), values
    flat = column.values
    return column.offsets.to_numpy(), flat.to_numpy(
        zero_copy_only=not pa.types.is_boolean(flat.type)
    )
