"""``teacher-cache audit``: a sample of a finished cache, scored again by the dense reference, to see what each stage cost.

Three things stand between the teacher and what a cache says of it, and each has its own figures:

engine      what was captured is not bit for bit what transformers computes in float32 from the same weights;
truncation  only a head was kept, and the mass of the rest;
codec       both were rounded.

Rounding hides most of what an engine differs by, but not its mean. Let Q round to the grid, and let the reference say x
where the engine said x + d. Q(x + d) - Q(x) has the sign of d, and its mean is d where x lies anywhere between two grid
points alike (dithered quantisation). So the mean of |stored - Q(x)| estimates that of |d| without bias, however coarse the
grid. A cache that was rounded more than once does not have this property: there only what is beyond the bound of its
rounding is counted, which is a lower bound of |d|.

Shapes: R positions looked at together, K head entries, T sets of S draws, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_format import CachedSequence, CacheReader, DamagedCacheError, Manifest, TailSamples, UserError
from cache_format.manifest import StoreSettings, TeacherIdentity
from cache_format.prior import TailPrior
from pipeline.capture import Capture
from pipeline.config import TeacherConfig
from pipeline.draws import LEAST_LOGPROB, mix
from pipeline.estimator import tail_logprob
from pipeline.models import context_limit, resolve_model, vocab_size

SEQUENCES = 8
"""In a sample, unless another number is asked for."""

MAX_TOKENS = 2048
"""Of a sequence, from its start: what a causal teacher says of them does not depend on the rest."""

FULL_PRECISION_LIMIT = 1e-3
"""Mean absolute difference of engine and reference, nats, up to which a float32 teacher passes."""

HALF_PRECISION_LIMIT = 0.05
"""The same for teachers whose weights or arithmetic have 16 bits."""

# Whole distributions in memory: of one sequence, of the positions measured together, of those a diagnosis looks at.
_SEQUENCE_VALUES = 1 << 28
_PART_VALUES = 1 << 22
_EVIDENCE_VALUES = 1 << 23
_EVIDENCE_POSITIONS = 256

# Sequences without a kept position among their first tokens are passed over, this many at most for each one wanted.
_LOOKS = 16

# Ids closer to each other than this many limits may come in any order.
_NEAR_TIE = 4
# Head ids, or target ranks, that are wrong beyond near ties: up to this share, a few large differences explain them.
_WRONG_SHARE = 0.01
# An entropy sums over many ids, each of which differs.
_ENTROPY_FACTOR = 10
# Draws of a sound cache miss these once in a million audits.
_LEAST_P_VALUE = 1e-6
_LARGEST_Z = 5.0
# Draws expected in each class of the chi-square test, at least.
_LEAST_EXPECTED = 10

_Array = NDArray[Any]
Dense = Callable[[NDArray[np.int32]], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Stored values beside the reference's, in nats.

    values:          how many were compared.
    mean:            of |stored - reference|; most of it is rounding.
    rounding:        what ``mean`` would be if rounding were all: the mean of |rounded reference - reference|.
    largest:         of |stored - reference|.
    largest_allowed: what rounding alone may make of it.
    signed:          mean of stored - reference, in which rounding averages out.
    engine:          mean of |engine - reference|, rounding taken out: an estimate without bias, or a lower bound where the
                     cache was rounded more than once (see the module).
    """

    values: int
    mean: float
    rounding: float
    largest: float
    largest_allowed: float
    signed: float
    engine: float


@dataclass(frozen=True, slots=True)
class Distance:
    """Means over positions of the KL (nats) and of the total variation between two distributions."""

    kl: float
    tv: float


@dataclass(frozen=True, slots=True)
class DrawsAudit:
    """Draws from the tail beside the reference's tails.

    draws:     looked at.
    in_head:   of them, lie in the head, where none may.
    p_value:   of Pearson's chi-square for how many draws fall between 0 and 1 nat of surprise, 1 and 2, ... Systematic draws
              vary less than independent ones, so it is rarely small. None where there are too few draws.
    z_logprob: estimated less true sum over the tail of ``p f``, over all positions, in standard errors of independent draws;
              ``f`` is the reference's logprob. None without spread.
    z_id:      the same, ``f`` being the number of the id. (The cache's prior would not do: it was estimated from the draws.)
    """

    draws: int
    in_head: int
    p_value: float | None
    z_logprob: float | None
    z_id: float | None


@dataclass(frozen=True, slots=True)
class Audit:
    """What ``audit`` found. Every figure is a mean over the sampled positions unless it says otherwise.

    reference:         model and arithmetic that the cache was compared with.
    limit:             nats, of ``target.engine`` and ``head.engine``.
    target, head:      logprobs of the targets and of the head's entries.
    entropy:           None where the cache does not store it.
    tail_mass:         mean |stored - reference| of the mass outside the head.
    ids_outside:       share of head entries that are not among the reference's most probable ids, beyond near ties.
    ranks_differ:      share of positions where the target's rank is not the reference's.
    ranks_wrong:       the same, where no near tie explains it.
    codec:             from the reference's own head and tail mass to the same after rounding, both with the tail spread alike.
    stored:            from the reference's own head and tail mass to the stored ones: codec and engine together.
    truncation_even:   from the reference's distribution to its own head and tail mass, the tail spread evenly.
    truncation_prior:  the same, the tail spread as the cache's prior says; None without one.
    draws:             None where the cache holds none.
    cached_loss, reference_loss: mean -logprob of the targets, nats.
    cause:             what explains an engine difference above the limit: "shift", "temperature", "ids" or "weights".
    problems:          one line each; empty where cache and reference agree.
    """

    cache: str
    reference: str
    sequences: int
    sequences_in_cache: int
    positions: int
    limit: float
    target: Difference
    head: Difference
    entropy: Difference | None
    tail_mass: float
    ids_outside: float
    ranks_differ: float
    ranks_wrong: float
    codec: Distance
    stored: Distance
    truncation_even: Distance
    truncation_prior: Distance | None
    draws: DrawsAudit | None
    cached_loss: float
    reference_loss: float
    cause: str | None
    problems: tuple[str, ...]


def audit(
    cache: str,
    *,
    sequences: int = SEQUENCES,
    teacher: str | None = None,
    max_engine_difference: float | None = None,
    on_sequence: Callable[[], object] = lambda: None,
) -> Audit:
    """Scores ``sequences`` sequences of the finished cache at ``cache`` (folder or URL) again and compares.

    teacher:               the model, where the one that the manifest names is not to be had under that name.
    max_engine_difference: nats, the mean above which cache and reference disagree; by default what the teacher's dtype allows.
    on_sequence:           called after each sequence.

    The sample depends on the cache's fingerprint alone. Raises what opening the cache raises, and UserError where there is
    nothing to compare: no such model, another vocabulary, no kept position.
    """
    reader = CacheReader(cache)
    manifest = reader.manifest
    limit = engine_limit(manifest.teacher) if max_engine_difference is None else max_engine_difference
    with open_reference(manifest, teacher) as reference:
        sums = _Sums(manifest.store, reader.prior, _NEAR_TIE * limit, derived=manifest.derived_from is not None)
        for sequence in _sample(reader, sequences, reference.max_tokens):
            dense = reference.dense(sequence.input_ids)
            for part in _parts(sequence, max(1, _PART_VALUES // manifest.store.vocab_size)):
                sums.add(part, np.maximum(dense[part.positions], LEAST_LOGPROB).astype(np.float32))
            del dense  # not two of them at a time
            sums.sequences += 1
            on_sequence()
        result = sums.result(cache, len(reader), reference.name, limit)
        cause, problems = None, list(reference.problems)
        if max(result.target.engine, result.head.engine) > limit:
            cause, why = _diagnose(reader, reference, result, sequences)
            problems.append(why)
        problems += _other_problems(result, manifest)
    return replace(result, cause=cause, problems=tuple(problems))


def engine_limit(teacher: TeacherIdentity) -> float:
    """Nats of mean absolute difference from the reference that the teacher's arithmetic explains."""
    half = any("16" in dtype for dtype in (teacher.dtype, teacher.head_dtype or ""))
    return HALF_PRECISION_LIMIT if half else FULL_PRECISION_LIMIT


def audit_summary(result: Audit) -> dict[str, float | int | str]:
    """The figures that matter, flat and small enough for a manifest. What a cache does not have is left out."""
    figures: dict[str, float | int | str | None] = {
        "reference": result.reference,
        "sequences": result.sequences,
        "positions": result.positions,
        "engine_limit": result.limit,
        "engine_target": result.target.engine,
        "engine_head": result.head.engine if result.head.values else None,
        "ids_outside": result.ids_outside,
        "codec_kl": result.codec.kl,
        "codec_tv": result.codec.tv,
        "truncation_kl_even": result.truncation_even.kl,
        "truncation_tv_even": result.truncation_even.tv,
        "truncation_kl_prior": result.truncation_prior.kl if result.truncation_prior else None,
        "truncation_tv_prior": result.truncation_prior.tv if result.truncation_prior else None,
        "draws_p_value": result.draws.p_value if result.draws else None,
        "draws_z_logprob": result.draws.z_logprob if result.draws else None,
        "draws_z_id": result.draws.z_id if result.draws else None,
        "cause": result.cause,
        "problems": "; ".join(result.problems),
    }
    return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Reference:
    """The dense reference of a cache, which is a teacher of its own.

    name:       for people.
    dense:      int32[n] ids to [n-1, V] logprobs at the cache's temperature, nats; row ``i`` predicts token ``i + 1``.
    max_tokens: longest sequence it is given.
    problems:   what its identity already says against the cache, a line each.
    """

    name: str
    dense: Dense
    max_tokens: int
    problems: tuple[str, ...]


@contextmanager
def open_reference(manifest: Manifest, name: str | None = None) -> Iterator[Reference]:
    """The teacher that ``manifest`` names, or the model ``name``, as a dense reference in float32.

    Nothing but the name and the revision is taken from the manifest: engine options of a stranger's cache, such as leave to
    run a model's own code, are never passed on. Raises UserError where the model is not to be had or predicts other ids,
    DamagedCacheError for a temperature that no distribution has.
    """
    temperature = manifest.teacher.temperature
    if temperature <= 0:
        raise DamagedCacheError(f"the manifest says teacher.temperature {temperature:g}; expected one above 0")
    bounded = min(MAX_TOKENS, max(2, _SEQUENCE_VALUES // manifest.store.vocab_size))
    opened = _synthetic(manifest) if name is None and manifest.teacher.backend == "synthetic" else None
    if opened is None:
        opened = _transformers(manifest, name, bounded)
    teacher, most = opened

    def dense(input_ids: NDArray[np.int32]) -> NDArray[np.floating]:
        logprobs: NDArray[np.floating] = teacher.dense_logprobs(input_ids)
        return logprobs if temperature == 1 else _at_temperature(logprobs, temperature)

    identity = teacher.identity()
    shown = f"{name or manifest.teacher.model} ({identity.engine}, {identity.dtype})"
    try:
        yield Reference(shown, dense, min(bounded, most), tuple(_other_identity(manifest.teacher, identity)))
    finally:
        teacher.close()


def _synthetic(manifest: Manifest) -> tuple[Any, int]:
    from pipeline.teachers.synthetic import SyntheticTeacher

    seed = (manifest.teacher.revision or "").removeprefix("seed-")
    try:
        config = TeacherConfig(
            model=manifest.teacher.model, backend="synthetic", vocab_size=manifest.store.vocab_size, seed=int(seed)
        )
    except ValueError as error:
        raise UserError(
            f"the manifest does not say which synthetic teacher this was: revision {manifest.teacher.revision!r}, "
            f"{manifest.store.vocab_size} ids; name a model with --teacher"
        ) from error
    return SyntheticTeacher(config, Capture(1)), MAX_TOKENS


def _transformers(manifest: Manifest, name: str | None, bounded: int) -> tuple[Any, int]:
    from pipeline.teachers.transformers import TransformersTeacher

    wanted = manifest.teacher
    model_name = name or wanted.model
    try:
        model = resolve_model(model_name, wanted.revision if model_name == wanted.model else None)
        found = vocab_size(model)
    except UserError as error:
        if name is not None:
            raise
        raise UserError(f"{error}; name the model that built the cache with --teacher") from error
    if found != manifest.store.vocab_size:
        raise UserError(
            f"{model_name} predicts {found} ids, the teacher of the cache {manifest.store.vocab_size}: it is another model; "
            "name the one that built the cache with --teacher"
        )
    most = min(bounded, context_limit(model) or bounded)
    config = TeacherConfig(model=model_name, backend="transformers", dtype="float32")
    return TransformersTeacher(config, model, max_length=most, capture=Capture(1)), most


def _other_identity(cache: TeacherIdentity, reference: TeacherIdentity) -> Iterator[str]:
    """How the reference is not the cache's teacher, as far as both say what they are."""
    if cache.weights_sha256 and reference.weights_sha256 and cache.weights_sha256 != reference.weights_sha256:
        yield (
            f"the cache was built with other weights: their sha256 is {cache.weights_sha256[:12]}..., "
            f"that of {reference.model} is {reference.weights_sha256[:12]}..."
        )
    if cache.revision and reference.revision and cache.revision != reference.revision:
        yield (
            f"the cache was built with other weights: revision {cache.revision} of {cache.model}, "
            f"compared with {reference.revision} of {reference.model}"
        )
    if cache.backend == reference.backend == "synthetic" and cache.engine != reference.engine:
        yield f"the cache was built with {cache.engine}, compared with {reference.engine}"


def _sample(reader: CacheReader, count: int, tokens: int) -> Iterator[CachedSequence]:
    """The beginnings, of at most ``tokens`` tokens, of ``count`` sequences with a kept position there, one at a time.

    In the order of a hash of the cache's fingerprint and their index. Raises UserError where there is none.
    """
    seed = np.array([int(reader.manifest.fingerprint[:16], 16)], np.uint64).view(np.int64)
    order = np.argsort(mix(mix(seed) + np.arange(len(reader))), kind="stable")
    found = 0
    for index in order[: _LOOKS * count].tolist():
        sequence = _beginning(reader[index], tokens)
        if not len(sequence.positions):
            continue
        found += 1
        yield sequence
        if found == count:
            return
    if not found:
        raise UserError(
            f"there is nothing to compare: none of {min(len(reader), _LOOKS * count):,} sequences of {reader.path} has "
            f"a kept position among its first {tokens:,} tokens; look at more with --sequences"
        )


def _beginning(sequence: CachedSequence, tokens: int) -> CachedSequence:
    kept = int(np.searchsorted(sequence.positions, tokens - 1))
    rows = _rows(sequence, slice(0, kept))
    return replace(rows, input_ids=sequence.input_ids[:tokens], loss_mask=sequence.loss_mask[:tokens])


def _parts(sequence: CachedSequence, positions: int) -> Iterator[CachedSequence]:
    for start in range(0, len(sequence.positions), positions):
        yield _rows(sequence, slice(start, start + positions))


def _rows(sequence: CachedSequence, rows: slice | _Array) -> CachedSequence:
    """Some positions of ``sequence``; tokens and loss mask are still those of all."""
    samples = sequence.samples
    if samples is not None:
        samples = TailSamples(samples.ids[rows], None if samples.logprobs is None else samples.logprobs[rows])
    return replace(
        sequence,
        positions=sequence.positions[rows],
        ids=sequence.ids[rows],
        logprobs=sequence.logprobs[rows],
        tail_logprob=sequence.tail_logprob[rows],
        target_logprob=sequence.target_logprob[rows],
        target_rank=sequence.target_rank[rows],
        entropy=None if sequence.entropy is None else sequence.entropy[rows],
        samples=samples,
    )


class _Tally:
    """Collects a ``Difference`` of values that a cache keeps on a grid."""

    def __init__(self, step: float, error: float | None = None) -> None:
        self._step = step
        self._error = step / 2 if error is None else error
        self._values = 0
        self._sums = np.zeros(4)
        self._largest = 0.0

    def add(self, stored: _Array, exact: _Array) -> None:
        """``exact``: the reference's values, in the float32 that the engine's had."""
        if not len(stored):
            return
        stored = np.maximum(stored.astype(np.float64), LEAST_LOGPROB)
        exact = exact.astype(np.float64)
        apart = np.abs(stored - exact)
        rounded = _on_grid(exact, self._step)
        engine = self.engine(stored, exact)
        self._values += len(stored)
        self._sums += np.array([apart.sum(), np.abs(rounded - exact).sum(), (stored - exact).sum(), engine.sum()])
        self._largest = max(self._largest, float(apart.max()))

    def engine(self, stored: _Array, exact: _Array) -> _Array:
        """|engine - exact|, of which single values mean nothing and only the mean counts (see the module)."""
        if self._error > self._step / 2:
            return np.maximum(np.abs(stored - exact) - self._error, 0)
        return np.abs(stored - _on_grid(exact, self._step))

    def result(self) -> Difference:
        mean, rounding, signed, engine = (self._sums / max(1, self._values)).tolist()
        return Difference(self._values, mean, rounding, self._largest, self._error, signed, engine)


class _Sums:
    """Adds up what ``Audit`` says, a few positions at a time."""

    def __init__(self, store: StoreSettings, prior: TailPrior | None, near_tie: float, *, derived: bool) -> None:
        self._store = store
        self._near_tie = near_tie
        self._prior = None if prior is None else prior.probabilities()
        self.sequences = self._positions = 0
        self._target = _Tally(store.scalar_step)
        self._head = _head_tally(store)
        self._entropy = _Tally(store.scalar_step)
        self._tail_mass = 0.0
        self._ids_outside = self._ranks_differ = self._ranks_wrong = 0
        self._loss = np.zeros(2)
        self._distances = {name: np.zeros(2) for name in ("codec", "stored", "even", "prior")}
        self._draws = _DrawSums(variance=2 if derived else 1) if store.tail_samples else None

    def add(self, part: CachedSequence, dense: NDArray[np.float32]) -> None:
        """Positions of a sequence, and the reference's distributions there: [R, V] logprobs, none below LEAST_LOGPROB."""
        in_head = part.ids >= 0
        ids = np.where(in_head, part.ids, 0).astype(np.int64)
        exact = np.take_along_axis(dense, ids, axis=1)
        target = dense[np.arange(len(dense)), part.target_ids]
        self._positions += len(dense)
        self._target.add(part.target_logprob, target)
        self._head.add(part.logprobs[in_head], np.minimum(exact[in_head], 0))
        self._loss -= [part.target_logprob.sum(dtype=np.float64), target.sum(dtype=np.float64)]
        self._compare_order(part, dense, exact, target)

        p = np.exp(dense, dtype=np.float64)
        if part.entropy is not None:
            self._entropy.add(part.entropy, -np.einsum("rv,rv->r", p, dense))
        tail = p
        rows, columns = np.nonzero(in_head)
        tail[rows, ids[rows, columns]] = 0
        mass = tail.sum(axis=1)
        self._tail_mass += float(np.abs(np.exp(part.tail_logprob.astype(np.float64)) - mass).sum())
        self._compare_cells(part, in_head, exact, mass)
        self._compare_tails(in_head, ids, dense, tail, mass)
        if self._draws is not None:
            self._draws.add(part, dense, tail, mass)

    def _compare_order(self, part: CachedSequence, dense: _Array, exact: _Array, target: _Array) -> None:
        """The head's ids and the target's rank, which near ties may change."""
        size = (part.ids >= 0).sum(axis=1)
        if part.ids.shape[1]:
            lowest = _most_probable(dense, part.ids.shape[1])[np.arange(len(dense)), size - 1]
            self._ids_outside += int(((exact < lowest[:, None] - self._near_tie) & (part.ids >= 0)).sum())
        above, near = target[:, None], np.float32(self._near_tie)
        self._ranks_differ += int(((dense > above).sum(axis=1) != part.target_rank).sum())
        surely = (dense > above + near).sum(axis=1)
        perhaps = (dense > above - near).sum(axis=1) - 1
        self._ranks_wrong += int(((part.target_rank < surely) | (part.target_rank > perhaps)).sum())

    def _compare_cells(self, part: CachedSequence, in_head: _Array, exact: _Array, mass: _Array) -> None:
        """Heads and tail masses. With the tail spread alike in both, its shape plays no part."""
        truth = np.concatenate([np.where(in_head, np.exp(exact, dtype=np.float64), 0), mass[:, None]], axis=1)
        size = in_head.sum(axis=1, dtype=np.int32)
        tail = _on_grid(tail_logprob(exact, size, self._store.vocab_size), self._store.scalar_step)
        head = _on_grid(np.minimum(exact, 0), self._store.logprob_step)
        self._distances["codec"] += _cells_apart(truth, np.where(in_head, head, -np.inf), tail)
        self._distances["stored"] += _cells_apart(truth, part.logprobs, part.tail_logprob)

    def _compare_tails(self, in_head: _Array, ids: _Array, dense: _Array, tail: _Array, mass: _Array) -> None:
        """The reference's tails beside the same mass spread evenly, or as the prior says."""
        log_mass = np.log(np.maximum(mass, 1e-300))
        p_log_p = np.einsum("rv,rv->r", tail, dense)
        outside = np.maximum(tail.shape[1] - in_head.sum(axis=1), 1)
        share = mass / outside
        apart = np.abs(tail - share[:, None]).sum(axis=1) - share * in_head.sum(axis=1)
        kl = p_log_p - mass * (log_mass - np.log(outside))
        self._distances["even"] += [kl.sum(), apart.sum() / 2]
        if self._prior is None:
            return
        of_head = np.where(in_head, self._prior[ids], 0).sum(axis=1)
        outside = np.maximum(1 - of_head, 1e-300)
        scale = mass / outside
        apart = np.abs(tail - scale[:, None] * self._prior).sum(axis=1) - scale * of_head
        kl = p_log_p - mass * (log_mass - np.log(outside)) - tail @ np.log(self._prior)
        self._distances["prior"] += [kl.sum(), apart.sum() / 2]

    def result(self, cache: str, sequences_in_cache: int, reference: str, limit: float) -> Audit:
        positions = max(1, self._positions)
        head = self._head.result()
        distances = {name: Distance(*(sums / positions).tolist()) for name, sums in self._distances.items()}
        cached_loss, reference_loss = (self._loss / positions).tolist()
        return Audit(
            cache=cache,
            reference=reference,
            sequences=self.sequences,
            sequences_in_cache=sequences_in_cache,
            positions=self._positions,
            limit=limit,
            target=self._target.result(),
            head=head,
            entropy=self._entropy.result() if self._store.entropy else None,
            tail_mass=self._tail_mass / positions,
            ids_outside=self._ids_outside / max(1, head.values),
            ranks_differ=self._ranks_differ / positions,
            ranks_wrong=self._ranks_wrong / positions,
            codec=distances["codec"],
            stored=distances["stored"],
            truncation_even=distances["even"],
            truncation_prior=None if self._prior is None else distances["prior"],
            draws=None if self._draws is None else self._draws.result(),
            cached_loss=cached_loss,
            reference_loss=reference_loss,
            cause=None,
            problems=(),
        )


class _DrawSums:
    """Collects a ``DrawsAudit``.

    ``variance``: of the draws, as a multiple of that of independent draws, at most. Draws that were drawn from draws, as in
    a derived cache, have up to twice as much.
    """

    def __init__(self, *, variance: float) -> None:
        self._factor = variance
        self._seen: set[bytes] = set()
        self._draws = self._in_head = 0
        self._classes = np.zeros((2, int(-LEAST_LOGPROB) + 1))
        self._deviation, self._variance = np.zeros(2), np.zeros(2)

    def add(self, part: CachedSequence, dense: _Array, tail: _Array, mass: _Array) -> None:
        """``tail``: float64[R, V], probabilities, 0 in the head; ``mass``: their sums."""
        assert part.samples is not None
        ids = part.samples.ids.reshape(len(dense), -1)
        at = np.flatnonzero(self._new(part) & (ids >= 0).any(axis=1) & (mass > 0))
        ids = ids[at]
        drawn = ids >= 0
        row, chosen = np.nonzero(drawn)[0], ids[drawn]
        self._draws += len(chosen)
        self._in_head += int((tail[at[row], chosen] == 0).sum())

        logprobs, weights = dense[at], tail[at] / mass[at, None]
        draws = drawn.sum(axis=1)
        surprise = np.minimum(-logprobs, -LEAST_LOGPROB).clip(0).astype(np.int64)
        width = self._classes.shape[1]
        self._classes[0] += np.bincount(surprise[row, chosen], minlength=width)
        self._classes[1] += np.bincount(surprise.reshape(-1), (weights * draws[:, None]).reshape(-1), minlength=width)

        numbers = np.broadcast_to(np.arange(logprobs.shape[1]) / logprobs.shape[1], logprobs.shape)
        for which, f in enumerate((logprobs, numbers)):
            mean = np.einsum("rv,rv->r", weights, f)
            spread = np.einsum("rv,rv,rv->r", weights, f, f) - mean**2
            estimate = np.bincount(row, f[row, chosen], minlength=len(at)) / draws
            self._deviation[which] += (mass[at] * (estimate - mean)).sum()
            self._variance[which] += (mass[at] ** 2 * np.maximum(spread, 0) / draws).sum()

    def _new(self, part: CachedSequence) -> NDArray[np.bool_]:
        """bool[R]: positions unlike all before. Those that look alike share their draws (``pipeline.draws``): they count once."""
        looks = zip(
            part.target_ids.tolist(),
            part.target_logprob.tolist(),
            part.ids[:, :4].tolist(),
            part.logprobs[:, :1].tolist(),
            strict=True,
        )
        new = np.zeros(len(part.positions), np.bool_)
        for at, look in enumerate(looks):
            key = repr(look).encode()
            new[at] = key not in self._seen
            self._seen.add(key)
        return new

    def result(self) -> DrawsAudit:
        z = [
            float(deviation / math.sqrt(self._factor * variance)) if variance > 0 else None
            for deviation, variance in zip(self._deviation, self._variance, strict=True)
        ]
        return DrawsAudit(self._draws, self._in_head, self._p_value(), *z)

    def _p_value(self) -> float | None:
        pooled: list[_Array] = []
        waiting = np.zeros(2)
        for each in self._classes.T:
            waiting = waiting + each
            if waiting[1] >= _LEAST_EXPECTED:
                pooled.append(waiting)
                waiting = np.zeros(2)
        if len(pooled) < 2:
            return None
        pooled[-1] = pooled[-1] + waiting
        seen, expected = np.array(pooled).T
        statistic = float(((seen - expected) ** 2 / expected).sum()) / self._factor
        return _chi_square_p(statistic, len(pooled) - 1)


def _chi_square_p(statistic: float, freedom: int) -> float:
    """Probability of at least ``statistic`` under chi-square, by Wilson and Hilferty's cube root (PNAS 17, 1931)."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2


def _on_grid(values: _Array, step: float) -> _Array:
    return np.rint(values / step) * step


def _head_tally(store: StoreSettings) -> _Tally:
    return _Tally(store.logprob_step, store.rounding)


def _most_probable(dense: _Array, count: int) -> _Array:
    """[R, count]: the largest values of each row, falling."""
    largest = np.partition(dense, dense.shape[1] - count, axis=1)[:, -count:]
    return -np.sort(-largest, axis=1)


def _cells_apart(truth: _Array, head: _Array, tail: _Array) -> _Array:
    """float64[2], sums over rows of the KL and the TV from ``truth`` [R, K + 1], the tail last, to head and tail logprobs.

    Rounded masses do not add up to 1; both sides are normalised, as a reader does.
    """
    p = truth / truth.sum(axis=1, keepdims=True)
    q = np.exp(np.concatenate([head, tail[:, None]], axis=1), dtype=np.float64)
    q /= q.sum(axis=1, keepdims=True)
    ratio = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))
    return np.array([(p * ratio).sum(), np.abs(p - q).sum() / 2])


def _at_temperature(logprobs: _Array, temperature: float) -> _Array:
    """[R, V] logprobs, sharpened or flattened and normalised again."""
    scaled = logprobs / logprobs.dtype.type(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Evidence:
    """Positions of one sequence that have a neighbour on either side, and float32[R, V] around them, by offset."""

    part: CachedSequence
    dense: dict[int, NDArray[np.float32]]


class _Suspects:
    """Explanations of a cache that is not what the reference says, each judged by the difference it leaves.

    By the heads where it is they that differ, else by the targets.
    """

    def __init__(self, evidence: list[_Evidence], store: StoreSettings, *, by_heads: bool) -> None:
        self._evidence = evidence
        self._by_heads = by_heads
        self._tally = _head_tally(store) if by_heads else _Tally(store.scalar_step)

    def shifted(self, by: int) -> float:
        """Row i holds what belongs in row i + ``by``."""
        return self._left(lambda one: self._values(one, one.dense[by], by))

    def at_temperature(self, temperature: float) -> float:
        return self._left(lambda one: self._values(one, _at_temperature(one.dense[0], temperature), 0))

    def by_rank(self) -> float:
        """The head's logprobs are right, its ids are not."""
        if not self._by_heads:
            return math.inf
        return self._left(lambda one: _most_probable(one.dense[0], one.part.ids.shape[1])[one.part.ids >= 0])

    def best_temperature(self) -> tuple[float, float]:
        """(difference left, temperature), over a grid that narrows around its best point."""
        best, width = 0.0, 0.25
        found = (math.inf, 1.0)
        points = np.arange(-6, 7) * width
        for _ in range(5):
            for point in points.tolist():
                found = min(found, (self.at_temperature(math.exp(best + point)), math.exp(best + point)))
            best = math.log(found[1])
            width /= 4
            points = np.arange(-4, 5) * width
        return found

    def _values(self, one: _Evidence, dense: _Array, offset: int) -> _Array:
        """What the reference has where the cache has head logprobs, or where it has targets."""
        if self._by_heads:
            stored = one.part.ids >= 0
            ids = np.where(stored, one.part.ids, 0).astype(np.int64)
            return np.minimum(np.take_along_axis(dense, ids, axis=1)[stored], 0)
        targets = one.part.input_ids[one.part.positions + 1 + offset]
        return dense[np.arange(len(dense)), targets]

    def _left(self, reference: Callable[[_Evidence], _Array]) -> float:
        total, values = 0.0, 0
        for one in self._evidence:
            stored = one.part.logprobs[one.part.ids >= 0] if self._by_heads else one.part.target_logprob
            total += float(self._tally.engine(stored, reference(one)).sum(dtype=np.float64))
            values += len(stored)
        return total / values if values else math.inf


def _diagnose(reader: CacheReader, reference: Reference, result: Audit, sequences: int) -> tuple[str, str]:
    """(cause, problem) of an engine difference above the limit."""
    store = reader.manifest.store
    by_heads = result.head.engine > result.limit
    differs = result.head.engine if by_heads else result.target.engine
    found = (
        f"the {'head' if by_heads else 'target'} logprobs are {differs:.2g} nats from those of {reference.name} on "
        f"average, rounding taken out; at most {result.limit:g} is expected"
    )
    suspects = _Suspects(_gather(reader, reference, sequences), store, by_heads=by_heads)
    unexplained = suspects.shifted(0)

    def explains(left: float) -> bool:
        return left <= max(result.limit, unexplained / 5) and left < unexplained / 2

    left, by = min((suspects.shifted(by), by) for by in (-1, 1))
    if explains(left):
        where = "after" if by > 0 else "before"
        return (
            "shift",
            f"{found}; the cache is shifted by one: its rows fit the position {where} theirs ({left:.2g} nats)",
        )
    left, temperature = suspects.best_temperature()
    if explains(left):
        stated = reader.manifest.teacher.temperature
        return "temperature", (
            f"{found}; the cache has another temperature: its rows fit {stated * temperature:.3g} ({left:.2g} nats), "
            f"its manifest says {stated:g}"
        )
    left = suspects.by_rank()
    if explains(left):
        return "ids", f"{found}; the cache has other ids: rank by rank its heads' logprobs fit ({left:.2g} nats)"
    return "weights", (
        f"{found}; neither a shift by one nor a temperature nor other ids explain it: the cache was built with other weights "
        f"or other arithmetic. Its token ids are in range; its teacher's loss on them is {result.cached_loss:.3f} nats, the "
        f"reference's {result.reference_loss:.3f}"
    )


def _gather(reader: CacheReader, reference: Reference, sequences: int) -> list[_Evidence]:
    """Some positions of the sample, spread over its first sequences."""
    wanted = min(_EVIDENCE_POSITIONS, max(16, _EVIDENCE_VALUES // reader.manifest.store.vocab_size))
    evidence: list[_Evidence] = []
    for sequence in _sample(reader, sequences, reference.max_tokens):
        dense = reference.dense(sequence.input_ids)
        at = np.flatnonzero((sequence.positions >= 1) & (sequence.positions + 1 < len(dense)))
        at = at[np.linspace(0, len(at) - 1, min(len(at), wanted)).astype(int)] if len(at) else at
        part = _rows(sequence, at)
        around = {by: np.maximum(dense[part.positions + by], LEAST_LOGPROB).astype(np.float32) for by in (-1, 0, 1)}
        evidence.append(_Evidence(part, around))
        wanted -= len(at)
        if wanted <= 0:
            break
    return evidence


def _other_problems(result: Audit, manifest: Manifest) -> Iterator[str]:
    """What else is not as it should be. Where the engine differs already, only what does not follow from that."""
    draws = result.draws
    if draws is not None and draws.in_head:
        yield f"{draws.in_head} of {draws.draws} draws from the tail lie in the head"
    if max(result.target.engine, result.head.engine) > result.limit:
        return
    store = manifest.store
    if result.ids_outside > _WRONG_SHARE:
        yield f"{result.ids_outside:.1%} of the head's ids are not among the reference's most probable ones"
    if result.ranks_wrong > _WRONG_SHARE:
        yield f"the target's rank is not the reference's at {result.ranks_wrong:.1%} of the positions"
    # The mass of a tail that a derived cache enlarged is a sum of rounded ones.
    room = result.limit + store.scalar_step / 2 + (store.rounding if manifest.derived_from else 0)
    if result.tail_mass > room:
        yield f"the mass outside the head is {result.tail_mass:.2g} from the reference's on average; at most {room:.2g} is expected"
    if result.entropy is not None and result.entropy.engine > _ENTROPY_FACTOR * result.limit:
        yield f"the entropies are {result.entropy.engine:.2g} nats from the reference's on average, rounding taken out"
    if draws is not None and draws.p_value is not None and draws.p_value < _LEAST_P_VALUE:
        yield f"the draws are not from the reference's tails: chi-square p-value {draws.p_value:.1g}"
    for z in () if draws is None else (draws.z_logprob, draws.z_id):
        if z is not None and abs(z) > _LARGEST_Z:
            yield f"what is estimated from the draws is biased: {z:+.1f} standard errors from the reference's tails"
