"""Descriptions of a cache for people: its head, tail and audit, and a page on all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitcask.cache_format.export.token_text import printable
from logitcask.cache_format.manifest import AuditSummary, Manifest
from logitcask.cache_format.redact import redacted


def describe_head(manifest: Manifest) -> str:
    """One line: the size and the mass of heads."""
    store, totals = manifest.store, manifest.statistics
    if store.top_k == 0:
        return "none"
    rules = [f"entries above {store.min_probability:g}"] if store.min_probability else []
    rules += [f"until {store.top_p:g} of the mass"] if store.top_p else []
    size = f"top {store.top_k} of {store.vocab_size:,} ids"
    if rules:
        mean = totals.mean_head_size or 0.0
        size = f"{mean:.1f} of {store.vocab_size:,} ids on average ({' and '.join(rules)}, {store.min_k} to {store.top_k})"
    return (
        size
        if totals.head_mass is None
        else f"{size}, holding {totals.head_mass:.1%} of the mass on average"
    )


def describe_tail(manifest: Manifest) -> str:
    """One line: the stored data about the ids outside the head."""
    store, mean = manifest.store, manifest.statistics.mean_draws or 0.0
    if not store.tail_known:
        return "its mass is not known: the source held logits of the heads alone"
    chosen = ""
    if store.chosen_ids:
        chosen = f"; the ids that the text's writer finds most probable, up to {store.chosen_ids}"
    if not store.tail_samples:
        return f"its mass; no samples{chosen}"
    sets = "" if store.sample_sets == 1 else f" in {store.sample_sets} sets"
    return f"its mass, and {mean:.1f} {store.draws} draws on average{sets}, so that KL losses are unbiased{chosen}"


_SHOWN_ELSEWHERE = ("sequences", "tokens", "kept_positions")


def describe(manifest: Manifest, path: str | Path) -> str:
    """The page of ``teacher-cache info`` on the cache at ``path``: its content and size. Its names may
    be a stranger's, so control characters are shown as in Python's literals.
    """
    teacher, data, store, totals = (
        manifest.teacher,
        manifest.data,
        manifest.store,
        manifest.statistics,
    )
    loss = (
        f"{totals.teacher_ce:.4f} nats per token"
        if totals.teacher_ce is not None
        else "not known: the source did not hold every target's logprob"
        if manifest.store.unknown
        else "none: no position is kept"
    )
    shape = (
        f"{totals.tokens:,} in {totals.sequences:,} sequences, {totals.positions:,} kept positions"
    )
    counters = ", ".join(
        f"{name.replace('_', ' ')} {count:,}"
        for name, count in data.counters.items()
        if count and name not in _SHOWN_ELSEWHERE
    )
    rows = {
        "cache": redacted(str(path)),
        "teacher": f"{teacher.model} ({teacher.engine}, {teacher.dtype}, route {teacher.route})",
        "data": f"{data.source}, split {data.split}, {data.kind}, loss mask: {data.mask_policy}",
        "read": counters,
        "tokens": shape,
        "head": describe_head(manifest),
        "tail": describe_tail(manifest),
        "teacher's loss": loss,
        "audit": "" if manifest.derived_from else describe_audit(manifest.audit),
        "size": (
            f"{totals.bytes:,} bytes in {numbered(len(manifest.shards), 'shard')}, "
            f"{totals.bytes_per_token:.1f} bytes per token"
        ),
        "made of": _origin(manifest),
        "format": f"version {manifest.format_version}, logprobs within {store.rounding:g} nats",
        "fingerprint": manifest.fingerprint,
        "next": _next(manifest, path),
    }
    return "\n".join(f"{name:15} {printable(value)}" for name, value in rows.items() if value)


def numbered(count: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _next(manifest: Manifest, path: str | Path) -> str:
    """The command to run next: the audit if the cache has none, otherwise a training."""
    if manifest.audit is None and manifest.derived_from is None:
        return f"teacher-cache audit {path}   compares it with the teacher"
    return f"train-student CONFIG cache={path}   (teacher-cache inspect {path} shows its tokens)"


def facts(manifest: Manifest, path: str | Path) -> dict[str, Any]:
    """The main figures of ``describe`` as JSON values, for the ``--json`` of commands that make a
    cache.
    """
    return {
        "cache": redacted(str(path)),
        "fingerprint": manifest.fingerprint,
        "content_sha256": manifest.content_sha256,
        "teacher": manifest.teacher.model,
        "shards": len(manifest.shards),
        **manifest.statistics.model_dump(mode="json"),
    }


def describe_audit(audit: AuditSummary | None) -> str:
    """The result of the audit at the end of the build, in one line."""
    if audit is None:
        return "not audited: none was asked for"
    if audit.skipped is not None:
        return f"not audited: {audit.skipped}"
    engine = max(audit.engine_target or 0.0, audit.engine_head or 0.0)
    truncation = (
        audit.truncation_kl_even if audit.truncation_kl_prior is None else audit.truncation_kl_prior
    )
    return (
        f"{audit.sequences} sequences against {audit.reference}: engine {engine:.2g} nats off on average (limit "
        f"{audit.engine_limit or 0:g}), KL {audit.codec_kl or 0:.2g} by rounding, {truncation or 0:.2g} by truncation"
    )


def _origin(manifest: Manifest) -> str:
    if manifest.derived_from is None:
        return ""
    options = ", ".join(f"{name}={value}" for name, value in manifest.derived_from.options.items())
    names = ", ".join(each[:12] for each in manifest.derived_from.fingerprints)
    return " ".join(filter(None, (manifest.derived_from.command, names, options)))
