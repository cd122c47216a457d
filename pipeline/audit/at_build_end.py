"""The audit that ends a build: a few sequences compared with the dense reference before the
manifest completes the cache.

It finds faults of an engine, of its arguments or of this program before anybody trains from the
cache. The shards are on disk at this point, so a build that fails here loses nothing and can be
audited again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logitcask.cache_format import CacheReader, DamagedCacheError, Manifest, UserError
from logitcask.cache_format.errors import CacheError
from logitcask.cache_format.manifest import AuditSummary, Header, ShardEntry
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.pipeline.audit.result import Audit
from logitcask.pipeline.audit.run import audit, audit_summary
from logitcask.pipeline.config import AuditConfig, TeacherConfig
from logitcask.pipeline.teachers.own import has_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildAudit:
    """The inputs of the audit of a build."""

    path: str
    header: Header
    shards: tuple[ShardEntry, ...]
    settings: AuditConfig
    teacher: TeacherConfig


def audit_build(
    path: Path | str,
    header: Header,
    shards: tuple[ShardEntry, ...],
    settings: AuditConfig,
    teacher: TeacherConfig,
) -> AuditSummary | None:
    """The audit of a build whose shards are all committed, for its manifest; None if the config
    turns it off.

    If there is no reference (the model does not fit into memory or cannot be found), a log line and
    the summary give the reason. Raises DamagedCacheError if cache and reference differ by more than
    the limits, and if a shard is damaged; CacheError if one cannot be read.
    """
    if not settings.sequences or not any(shard.positions for shard in shards):
        return None
    if has_tokenizer(teacher):
        reason = f"its teacher {teacher.backend} is a model of its own, which nothing else can run"
        log.info("the cache is not audited: %s", reason)
        return AuditSummary(skipped=reason)
    asked = BuildAudit(
        path=str(path), header=header, shards=shards, settings=settings, teacher=teacher
    )
    total = min(settings.sequences, sum(shard.sequences for shard in shards))
    with ProgressBar(total=total, unit="seq", desc="audit", leave=False) as bar:
        # vLLM may have changed transformers in this process.
        if header.teacher.backend == "vllm" and "vllm" in sys.modules:
            from logitcask.pipeline.audit.worker import audit_apart

            found = audit_apart(asked, bar.update)
        else:
            found = audit_here(asked, bar.update)
    if found.skipped is not None:
        log.warning("the cache is not audited: %s", found.skipped)
    return found


def audit_here(asked: BuildAudit, on_sequence: Callable[[], object]) -> AuditSummary:
    """As ``audit_build``, in this process."""
    reader = CacheReader(
        asked.path, manifest=Manifest.complete(asked.header, asked.shards, created_at="")
    )
    try:
        result = audit(
            reader,
            sequences=asked.settings.sequences,
            max_engine_difference=asked.settings.max_engine_difference,
            trust_remote_code=asked.teacher.trust_remote_code,
            on_sequence=on_sequence,
        )
    except DamagedCacheError as error:
        raise DamagedCacheError(
            f"{asked.path}: {error}. The cache is not completed; mend the cause and start afresh with --restart"
        ) from error
    except CacheError:
        raise
    except UserError as error:  # about the reference
        return AuditSummary(skipped=str(error))
    if result.problems:
        raise DamagedCacheError(_failure(asked.path, result))
    return audit_summary(result)


def _failure(path: str, result: Audit) -> str:
    return (
        f"{path} does not hold what {result.reference} says of the same text: {'; '.join(result.problems)}. The cache is not "
        "completed and its shards are kept. Where this is as it should be, raise audit.max_engine_difference or set "
        "audit.sequences=0 and run the same command again; else mend the cause and start afresh with --restart"
    )
