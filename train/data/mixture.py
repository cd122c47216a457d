"""The training data from one or several caches: units drawn by a plan, collated, with a separate
teacher for each cache.

Caches may store different data: heads of other sizes, draws or none, a prior or none. In a batch
the kept positions of one cache are therefore neighbours, and the objective gets them as a
SparseTeacher of that cache. A loss treats every position as in a training on its cache alone, and
never gets a padded field without content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.cache_format.storage.files import is_local, open_filesystem
from logitcask.cache_format.storage.shard_cache import ShardCache
from logitcask.train.config import DataConfig, SelectPositions, TrainConfig
from logitcask.train.data.batch import Place, collate
from logitcask.train.data.dataset import CachedDataset, HeldOut, check_shards
from logitcask.train.data.held_out import CacheIndex, Reference, read_index
from logitcask.train.data.order import PartPlan, Plan, Units, single_units
from logitcask.train.data.packing import collate_packed, packed_units
from logitcask.train.data.pairs import pair_units, same_ids
from logitcask.train.data.selection import highest_entropy, share_of
from logitcask.train.losses import SparseTeacher

if TYPE_CHECKING:
    # Imports transformers, which the workers of a loader do not need.
    from logitcask.train.head.chunked import PerChunk


log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """One unit: a sequence of a cache, or several packed into a row. A unit that is a pair of
    sequences of two caches is drawn as two of these.

    pair: None, or the pair's number in its batch, and whether the sequence is the preferred one.
    """

    source: int
    sequences: list[CachedSequence]
    pair: tuple[int, bool] | None = None


class OfCache(NamedTuple):
    """The part of a batch that is of one cache. rows: its part of the P positions. source: the
    cache's number. teacher: at these positions.
    """

    rows: slice
    source: int
    teacher: SparseTeacher


class Mixture(Dataset[Drawn]):
    """The training data: ``sources``, their names, and the plan that draws from them.

    units:   for each stream of the plan.
    streams: for each stream the numbers of its sources: of one cache, or of two that are read in
             pairs, the preferred one first. The members of a pair's unit are one of each. Default:
             a stream for each source.
    in_reference: number of sequences that are left out because a reference cache has their texts.
    """

    def __init__(
        self,
        sources: list[CachedDataset],
        names: list[str],
        units: list[Units],
        plan: Plan,
        *,
        streams: list[tuple[int, ...]] | None = None,
        in_reference: int = 0,
    ) -> None:
        self.sources, self.names, self.units, self.plan = sources, names, units, plan
        self.streams = [(each,) for each in range(len(sources))] if streams is None else streams
        self.in_reference = in_reference

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, unit: int) -> Drawn:
        """A unit by the plan's number; of a pair, the preferred sequence."""
        return self.__getitems__([unit])[0]

    def __getitems__(self, units: list[int]) -> list[Drawn]:
        """Units by the plan's numbers. A cache's sequences are read together, in stored order."""
        # (source, members, pair) of each Drawn to come.
        places: list[tuple[int, list[int], tuple[int, bool] | None]] = []
        for number, unit in enumerate(units):
            stream, inside = self.plan.locate(unit)
            of, members = self.streams[stream], self.units[stream][inside]
            if len(of) == 1:
                places.append((of[0], members, None))
            else:
                places.append((of[0], members[:1], (number, True)))
                places.append((of[1], members[1:], (number, False)))
        # The members of each source, read once.
        read: list[dict[int, CachedSequence]] = []
        for number, data in enumerate(self.sources):
            wanted = [member for source, each, _ in places if source == number for member in each]
            read.append(dict(zip(wanted, data.__getitems__(wanted), strict=True)))
        return [
            Drawn(source, [read[source][member] for member in each], pair)
            for source, each, pair in places
        ]

    def teachers(self, batch: dict[str, Any]) -> list[OfCache]:
        """For each cache in a batch: its part of the P positions, and their teacher, with the
        fields of its store.
        """
        found = []
        start = 0
        for source, places in groupby(batch["layout"], lambda place: place.source):
            stop = start + sum(place.kept for place in places)
            rows, data = slice(start, stop), self.sources[source]
            store, teacher = data.cache.manifest.store, data.teacher(batch)[rows]
            draws = teacher.draws if store.tail_samples else None
            if draws is not None and not store.sample_logprobs:
                draws = replace(draws, logprobs=None)
            entropy = teacher.entropy if store.entropy else None
            found.append(
                OfCache(
                    rows,
                    source,
                    replace(
                        teacher,
                        draws=draws,
                        entropy=entropy,
                        writer_logprob=teacher.writer_logprob if store.writer_logprobs else None,
                        chosen=teacher.chosen if store.chosen_ids else None,
                    ),
                )
            )
            start = stop
        return found


class Collator:
    """From units to a batch: the fields of ``collate`` or ``collate_packed``, and ``layout``, a
    Place for each sequence.

    The units of one cache are neighbours. ``flat``: one row without padding instead of one row per
    packed unit.
    """

    def __init__(
        self, *, packed: bool = False, flat: bool = False, positions: SelectPositions | None = None
    ) -> None:
        self.packed, self.flat, self.positions = packed, flat, positions

    def __call__(self, drawn: list[Drawn]) -> dict[str, Any]:
        drawn = sorted(drawn, key=lambda unit: unit.source)
        select = self.positions
        if select is not None and select.by == "entropy":
            share = select.share
            drawn = [
                unit._replace(sequences=[highest_entropy(s, share) for s in unit.sequences])
                for unit in drawn
            ]
        rows = [unit.sequences for unit in drawn]
        batch = (
            collate_packed(rows, flat=self.flat)
            if self.packed
            else collate([s for row in rows for s in row])
        )
        gaps = select.share if select is not None and select.by == "gap" else 1.0
        layout = (
            Place(
                unit.source, len(s), len(s.positions), share_of(len(s.positions), gaps), unit.pair
            )
            for unit in drawn
            for s in unit.sequences
        )
        return {**batch, "layout": tuple(layout)}


def by_source(
    per_chunk: Callable[[SparseTeacher, int], PerChunk], teachers: list[OfCache]
) -> PerChunk:
    """The losses of a batch of several caches, each position's with its own cache's teacher, from
    ``per_chunk(teacher, source)``.

    ``values`` also has ``objective``, the minimised value at each position.
    """
    parts = [(each.rows, per_chunk(each.teacher, each.source)) for each in teachers]

    def losses(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        objectives: list[Tensor] = []
        values: dict[str, list[Tensor]] = {}
        for own, function in parts:
            start, stop = max(own.start, rows.start), min(own.stop, rows.start + len(logits_CV))
            if start < stop:
                chunk = logits_CV[start - rows.start : stop - rows.start]
                if len(chunk) < len(logits_CV):
                    # The objective may write gradients over its logits, so it must not get a shared
                    # tensor.
                    chunk = chunk.clone()
                objective, reported = function(chunk, slice(start - own.start, stop - own.start))
                objectives.append(objective)
                for name, value in reported.items():
                    values.setdefault(name, []).append(value)
        total = torch.cat(objectives)
        return total, {
            "objective": total,
            **{name: torch.cat(parts) for name, parts in values.items()},
        }

    return losses


def open_data(
    config: TrainConfig,
    caches: list[CacheReader],
    seed: int,
    rows: int | None = None,
    reference: CacheReader | None = None,
    part: tuple[int, dict[str, int]] | None = None,
) -> tuple[Mixture, HeldOut]:
    """Training and held-out data for a student of ``rows`` ids; None: all ids of the teachers.

    part: of a part of a longer training, the steps made before it, and the units of each cache that
          were read before, by the fingerprint.

    With a ``reference``, the held-out data is its sequences, and no sequence whose text is in it
    is in the training data. Raises UserError for data that cannot be used.
    """
    entries = config.caches
    check_shards(caches if reference is None else [*caches, reference])
    texts = None if reference is None else Reference.read(reference)
    shares = [
        config.evaluation.held_out if entry.held_out is None else entry.held_out
        for entry in entries
    ]
    indexes = [read_index(cache, share, texts) for cache, share in zip(caches, shares, strict=True)]
    chosen: list[NDArray[np.int64]] = []
    held_out: list[CachedDataset] = []
    capacity = config.data.row_tokens or max(
        max(cache.manifest.data.max_length, int(index.tokens.max(initial=0)))
        for cache, index in zip(caches, indexes, strict=True)
    )
    for number, (entry, cache, index) in enumerate(zip(entries, caches, indexes, strict=True)):
        usable = (index.kept > 0) & _readable(entry.cache, index, rows)
        learnt = ~index.held_out & ~index.in_reference
        train, out = (np.flatnonzero(usable & each) for each in (learnt, index.held_out))
        if reference is not None:
            _say_what_is_in_the_reference(entry.cache, index, len(train), reference.path)
        elif (not len(train) and entry.weight != 0) or (not len(out) and shares[number]):
            raise UserError(
                f"{entry.cache} splits into {len(train)} sequences to train on and {len(out)} held out; "
                "both need some: change evaluation.held_out or use a larger cache"
            )
        if (
            (select := config.selection.positions)
            and select.by == "entropy"
            and not cache.manifest.store.entropy
        ):
            raise UserError(
                f"selection.positions.by is entropy, but {entry.cache} stores none; use gap, or a cache with draws from the "
                "tail (store.tail_samples), which has them"
            )
        _refuse_unknown_targets(config, cache)
        _warn_of_thrashing(cache, config.data.shuffle)
        chosen.append(train)
        held_out.append(CachedDataset(cache, out, rows))
    for one, other in config.pairs:
        chosen[one], chosen[other] = same_ids(
            (caches[one], caches[other]), (chosen[one], chosen[other])
        )
    of_caches = []
    for number, (cache, index) in enumerate(zip(caches, indexes, strict=True)):
        # In a later part of a training the same rows, wherever the cache is in the list.
        key = number if part is None else _key(cache)
        of_caches.append(
            _units(config.data, capacity, cache, index, chosen[number], (seed, 0, key))
        )
    streams = _streams(config)
    units = [
        of_caches[each[0]] if len(each) == 1 else pair_units(*(of_caches[n] for n in each))
        for each in streams
    ]
    weights = [entry.weight for entry in entries if entry.weight is not None]
    of_streams = [sum(weights[n] for n in each) for each in streams] if weights else None
    plan = (
        _plan(config, units, of_streams, seed)
        if part is None
        else _part_plan(
            config, [caches[each[-1]] for each in streams], units, of_streams, seed, *part
        )
    )
    limit = config.evaluation.max_sequences
    if reference is not None:
        held_out = [sequences_of(reference, rows).first(limit)]
    elif limit is not None:
        held_out = [
            CachedDataset(data.cache, data.indices[: max(1, round(limit * share))], rows)
            for data, share in zip(held_out, _shares(weights, held_out), strict=True)
        ]
    held_out = [data for data in held_out if len(data)]
    if not held_out:
        raise UserError(
            "no cache has held-out sequences to evaluate on; set held_out of one of the caches, or evaluation.cache"
        )
    data = Mixture(
        [CachedDataset(cache, each, rows) for cache, each in zip(caches, chosen, strict=True)],
        [entry.label for entry in entries],
        units,
        plan,
        streams=streams,
        in_reference=sum(int(index.in_reference.sum()) for index in indexes),
    )
    return data, HeldOut(held_out)


def _streams(config: TrainConfig) -> list[tuple[int, ...]]:
    """The numbers of the caches that the plan reads as one: each alone, or a pair in the place of
    its second one.
    """
    pairs = config.pairs
    preferred = [pair[0] for pair in pairs]
    of_pair = {pair[1]: pair for pair in pairs}
    return [
        of_pair.get(number, (number,))
        for number in range(len(config.caches))
        if number not in preferred
    ]


def _plan(config: TrainConfig, units: list[Units], weights: list[float] | None, seed: int) -> Plan:
    return Plan(
        units,
        weights,
        seed=seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
        epoch=config.data.epoch,
    )


def _key(cache: CacheReader) -> int:
    """A part of the seeds of a cache's order, the same in every part of a training."""
    return int(cache.manifest.fingerprint[:16], 16)


def _part_plan(
    config: TrainConfig,
    caches: list[CacheReader],
    units: list[Units],
    weights: list[float] | None,
    seed: int,
    first: int,
    read: dict[str, int],
) -> PartPlan:
    names = [cache.manifest.fingerprint for cache in caches]
    return PartPlan(
        units,
        weights,
        keys=[(_key(cache),) for cache in caches],
        read=[read.get(name, 0) for name in names],
        first=first,
        seed=seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
    )


def sequences_of(
    cache: CacheReader, rows: int | None, chosen: NDArray[np.bool_] | None = None
) -> CachedDataset:
    """The sequences of a cache on which a student of ``rows`` ids can be evaluated; ``chosen``,
    bool[N]: only some of them. Raises UserError if there are none.
    """
    index = read_index(cache, 0.0)
    usable = (index.kept > 0) & _readable(cache.path, index, rows)
    found = np.flatnonzero(usable if chosen is None else usable & chosen)
    if not len(found):
        raise UserError(
            f"{cache.path} has no sequence to evaluate on ({len(usable)} sequences, "
            f"{int(usable.sum())} of them with kept positions and ids that the student has"
            f"{'' if chosen is None else f', {int(chosen.sum())} held out'}); use another cache"
        )
    return CachedDataset(cache, found, rows)


def _say_what_is_in_the_reference(path: str, index: CacheIndex, left: int, reference: str) -> None:
    """Logs the number of sequences that are left out. Raises UserError if no sequence is left."""
    count, total = int(index.in_reference.sum()), len(index.in_reference)
    if not left:
        raise UserError(
            f"{path} has {total} sequences and none is left to train on: the texts of {count} are in the reference cache "
            f"{reference}, and {int(index.held_out.sum())} are held out; use a reference with other texts (evaluation.cache), "
            "or a larger cache"
        )
    log.info(
        "%s of %s sequences of %s are not learnt from: their texts are in the reference cache %s",
        f"{count:,}",
        f"{total:,}",
        path,
        reference,
    )


def _readable(path: str, index: CacheIndex, rows: int | None) -> NDArray[np.bool_]:
    """bool[N]: the sequences whose tokens the student has. Logs the number of the others.

    A teacher that writes the text itself may draw the id of a padding row.
    """
    readable = np.ones(len(index.largest), np.bool_) if rows is None else index.largest < rows
    if not readable.all():
        log.warning(
            "%s of %s sequences of %s are left out: they have tokens with ids from %s up, which the student lacks",
            f"{(~readable).sum():,}",
            f"{len(readable):,}",
            path,
            f"{rows:,}",
        )
    return readable


def _refuse_unknown_targets(config: TrainConfig, cache: CacheReader) -> None:
    """Raises UserError if the selection compares the student with the teacher on the next tokens,
    and ``cache`` does not know the teacher's logprobs of them.
    """
    chosen, positions = config.selection.sequences, config.selection.positions
    by_gap = positions is not None and positions.by == "gap"
    if (chosen or by_gap) and not cache.manifest.store.targets_known:
        raise UserError(
            f"selection.{'sequences' if chosen else 'positions'} needs the teacher's logprob of every next token, which "
            f"{cache.path} does not know; leave it out"
        )


def _warn_of_thrashing(cache: CacheReader, shuffle: str) -> None:
    """Warns if a shuffle over a whole remote cache would fetch shards again and again."""
    if shuffle != "all" or is_local(open_filesystem(cache.path)[0]):
        return
    size, room = sum(shard.bytes for shard in cache.manifest.shards), ShardCache().max_bytes
    if size > room:
        log.warning(
            "%s has %s bytes in shards and the local cache of shards room for %s: shuffled as a whole, shards are fetched "
            "over and over; set data.shuffle to shards, or LOGITCASK_CACHE_BYTES to more",
            cache.path,
            f"{size:,}",
            f"{room:,}",
        )


def _shares(weights: list[float], held_out: list[CachedDataset]) -> list[float]:
    """Number of held-out sequences per cache: by weight, or by size without weights. A cache of
    weight 0 counts by its size.
    """
    sizes = [float(len(data)) for data in held_out]
    if weights and all(weights) and all(sizes):
        sizes = weights
    return [size / sum(sizes) for size in sizes]


def _units(
    data: DataConfig,
    capacity: int,
    cache: CacheReader,
    index: CacheIndex,
    chosen: Any,
    seed: tuple[int, ...],
) -> Units:
    shards = cache.manifest.shards
    sizes = np.array([shard.sequences for shard in shards])
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)
    inside = np.arange(len(shard)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    run = inside // (
        np.repeat([each.sequences_per_batch for each in shards], sizes) * data.shuffle_window
    )
    block = np.cumsum(np.diff(shard, prepend=0).astype(bool) | np.diff(run, prepend=0).astype(bool))
    tokens, kept = (each[chosen].astype(np.int64) for each in (index.tokens, index.kept))
    single = single_units(tokens, kept, shard[chosen], block[chosen])
    if not data.packing:
        return single
    try:
        return packed_units(single, capacity, seed=seed, shuffle=data.shuffle)
    except ValueError:
        raise ConfigError(
            f"data.row_tokens is {data.row_tokens}, but {cache.path} has a sequence of {tokens.max()} tokens; set it to at "
            "least that"
        ) from None
