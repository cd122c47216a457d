"""``teacher-cache audit``: a sample of a finished cache, scored again by the dense reference.

A cache differs from the teacher in three ways, and each has its own figures:

engine      the engine's values differ from those of transformers in float32 with the same weights;
truncation  the cache holds only a head, and the mass of the rest;
codec       both are rounded.

``sample`` chooses the positions, ``reference`` scores them again, ``figures`` compares, and
``diagnosis`` searches for the cause of an engine difference. The result is a ``result.Audit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from logitcask.cache_format import CacheReader, Manifest
from logitcask.cache_format.manifest import AuditSummary, TeacherIdentity
from logitcask.pipeline.audit.diagnosis import diagnose
from logitcask.pipeline.audit.figures import Sums
from logitcask.pipeline.audit.reference import MAX_TOKENS, Reference, open_reference
from logitcask.pipeline.audit.result import Audit, Difference, Distance, DrawsAudit
from logitcask.pipeline.audit.sample import parts, sample
from logitcask.pipeline.distribution.draws import LEAST_LOGPROB

__all__ = [
    "EIGHT_BIT_LIMIT",
    "EXPERTS_LIMIT",
    "FOUR_BIT_LIMIT",
    "FULL_PRECISION_LIMIT",
    "HALF_PRECISION_LIMIT",
    "MAX_TOKENS",
    "SEQUENCES",
    "Audit",
    "Difference",
    "Distance",
    "DrawsAudit",
    "Reference",
    "audit",
    "audit_summary",
    "engine_limit",
    "open_reference",
]

SEQUENCES = 8
"""In a sample, unless another number is asked for."""

FULL_PRECISION_LIMIT = 1e-3
"""Mean absolute difference of engine and reference, nats, up to which a float32 teacher passes."""

HALF_PRECISION_LIMIT = 0.05
"""The same for teachers whose weights or arithmetic have 16 bits."""

EIGHT_BIT_LIMIT = 0.3
"""The same where layers round what they are given to 8 bits, as FP8 checkpoints have it."""

FOUR_BIT_LIMIT = 0.7
"""The same for 4 bits (NVFP4)."""

EXPERTS_LIMIT = 0.15
"""Beyond the limits of fewer than 32 bits, where a router chooses experts: near ties fall to
another one by rounding.
"""

# Number of logprobs in memory, of the positions compared together.
_PART_VALUES = 1 << 22

# Ids whose logprobs differ by less than this many limits may be in any order.
_NEAR_TIE = 4
# Accepted share of head ids, or target ranks, that are wrong beyond near ties: a few large
# differences explain so many.
_WRONG_SHARE = 0.01
# An entropy is a sum over many ids, each with a difference.
_ENTROPY_FACTOR = 10
# A correct cache exceeds these once in a million audits.
_LEAST_P_VALUE = 1e-6
_LARGEST_Z = 5.0


def audit(
    cache: str | CacheReader,
    *,
    sequences: int = SEQUENCES,
    teacher: str | None = None,
    max_engine_difference: float | None = None,
    trust_remote_code: bool = False,
    on_sequence: Callable[[], object] = lambda: None,
) -> Audit:
    """Scores ``sequences`` sequences of ``cache`` (a folder, a URL or a reader) again and compares.

    teacher:               the model, if it cannot be found under the name in the manifest.
    max_engine_difference: nats, the mean above which cache and reference disagree; by default the
                           limit of the teacher's dtype.
    trust_remote_code:     whether code that comes with the model may run.
    on_sequence:           called after each sequence.

    The sample depends only on the cache's fingerprint. Raises the errors of opening the cache, and
    UserError if nothing can be compared: no such model, another vocabulary, no kept position.
    """
    reader = cache if isinstance(cache, CacheReader) else CacheReader(cache)
    manifest = reader.manifest
    reader.require_known("it cannot be compared with a reference")
    with open_reference(manifest, teacher, trust_remote_code=trust_remote_code) as reference:
        limit = max_engine_difference
        if limit is None:
            limit = engine_limit(manifest.teacher, bits=reference.bits, experts=reference.experts)
        sums = Sums(
            manifest.store,
            reader.prior,
            _NEAR_TIE * limit,
            derived=manifest.derived_from is not None,
        )
        for sequence in sample(reader, sequences, reference.max_tokens):
            dense = reference.dense(sequence.input_ids)
            for part in parts(sequence, max(1, _PART_VALUES // manifest.store.vocab_size)):
                sums.add(part, np.maximum(dense[part.positions], LEAST_LOGPROB).astype(np.float32))
            del dense  # frees it before the next one
            sums.sequences += 1
            on_sequence()
        result = sums.result(reader.path, len(reader), reference.name, limit)
        cause, problems = None, list(reference.problems)
        if max(result.target.engine, result.head.engine) > limit:
            cause, why = diagnose(reader, reference, result, sequences)
            problems.append(why)
        problems += _other_problems(result, manifest)
    return replace(result, cause=cause, problems=tuple(problems))


def engine_limit(
    teacher: TeacherIdentity, *, bits: int | None = None, experts: bool = False
) -> float:
    """Mean absolute difference in nats that the teacher's arithmetic explains (docs/capture.md).

    bits:    precision to which its layers round their inputs, if lower than that of its dtype.
    experts: whether a router chooses among experts.
    """
    half = any(
        "16" in dtype or dtype == "auto" for dtype in (teacher.dtype, teacher.head_dtype or "")
    )
    if bits is not None and bits < 16:
        limit = EIGHT_BIT_LIMIT if bits >= 8 else FOUR_BIT_LIMIT
    elif half:
        limit = HALF_PRECISION_LIMIT
    else:
        return FULL_PRECISION_LIMIT
    return limit + (EXPERTS_LIMIT if experts else 0)


def audit_summary(result: Audit) -> AuditSummary:
    """The summary for the manifest, of an audit without problems."""
    prior, draws = result.truncation_prior, result.draws
    return AuditSummary(
        reference=result.reference,
        sequences=result.sequences,
        positions=result.positions,
        engine_limit=result.limit,
        engine_target=result.target.engine,
        engine_head=result.head.engine if result.head.values else None,
        ids_outside=result.ids_outside,
        codec_kl=result.codec.kl,
        codec_tv=result.codec.tv,
        truncation_kl_even=result.truncation_even.kl,
        truncation_tv_even=result.truncation_even.tv,
        truncation_kl_prior=prior.kl if prior else None,
        truncation_tv_prior=prior.tv if prior else None,
        draws_p_value=draws.p_value if draws else None,
        draws_z_logprob=draws.z_logprob if draws else None,
        draws_z_id=draws.z_id if draws else None,
    )


def _other_problems(result: Audit, manifest: Manifest) -> Iterator[str]:
    """Other problems. If the engine differs, only problems that do not follow from that."""
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
    # The tail's mass in a derived cache is a sum of rounded values.
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
