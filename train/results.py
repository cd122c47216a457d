"""The files of a finished run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from logitcask.cache_format import CacheReader, Manifest
from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.redact import without_secrets
from logitcask.train.config import TrainConfig
from logitcask.train.evaluation.answers import Answer, mean_rouge_l
from logitcask.train.evaluation.kinds import KL_KIND, metric_kinds
from logitcask.train.exactness_words import IN_WORDS
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.tails import Tail
from logitcask.train.output.held_out_file import HELD_OUT, HeldOutValues
from logitcask.train.output.metrics_file import CacheFacts, RunMetrics, TeacherMetrics
from logitcask.train.output.model_card import model_card
from logitcask.train.output.report import write_report
from logitcask.train.preparation import Parts


def metrics_of(
    config: TrainConfig,
    caches: list[CacheReader],
    judge: CacheReader | None,
    parts: Parts,
    run: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, float],
    answered: list[Answer],
    reference: dict[str, float | None],
) -> RunMetrics:
    """The content of metrics.json. ``reference``: the teacher's own metrics."""
    manifests, state = [cache.manifest for cache in caches], parts.trainer.state
    history = state.log_history
    teacher = {
        "model": _joined(manifest.teacher.model for manifest in manifests),
        "engine": _joined(manifest.teacher.engine for manifest in manifests),
        **reference,
    }
    kinds = metric_kinds(parts.held_out, list(after))
    found: RunMetrics = {
        "before": before["metrics"],
        "after": after,
        "teacher": cast(TeacherMetrics, teacher),
        "rouge_l": {
            "before": before["rouge_l"],
            "after": mean_rouge_l(answered),
            "answers": len(answered),
        },
        "k": config.evaluation.k,
        "kl_tail": parts.kl_tail if judge is None else _tail_of_kind(kinds["kl"]),
        "kl_kind": KL_KIND[kinds["kl"]],
        "kinds": dict(kinds),
        "steps": state.global_step,
        "final_loss": next(
            (record["loss"] for record in reversed(history) if "loss" in record), None
        ),
        "seconds": max((record.get("seconds", 0.0) for record in history), default=0.0),
        "positions_trained": int(
            max((record.get("positions", 0) for record in history), default=0)
        ),
        "train_sequences": sum(len(source) for source in parts.data.sources),
        "held_out_sequences": len(parts.held_out),
        "held_out_positions": int(reference["positions"] or 0),
        "losses": [list(term) for term in parts.objective.weights()],
        "exactness": {name: IN_WORDS[kind] for name, kind in parts.exactness.items()},
        "student": {
            "parameters": parts.parameters,
            "trained": parts.trained,
            "architecture": parts.trainer.head.architecture,
        },
        "cache": _caches_described(config, manifests),
        "run": config.output_dir.name,
        "seed": parts.trainer.args.seed,
        "created_by": f"logitcask {version('logitcask')}",
        "config": run["config"],
    }
    if parts.part is not None:
        found["first_step"] = parts.part.first
    if judge is not None:
        found["reference"] = {
            "path": judge.path,
            "fingerprint": judge.manifest.fingerprint,
            "teacher": judge.manifest.teacher.model,
            "not_learnt_from": parts.data.in_reference,
        }
    return found


def write_results(
    output: Path,
    metrics: RunMetrics,
    history: list[dict[str, float]],
    held_out: HeldOutValues,
    shown: list[dict[str, Any]],
    answered: list[Answer],
) -> None:
    """Writes the other files of a finished run, last ``metrics.json``, which marks its end."""
    told = [each._asdict() for each in answered]
    history = [in_json(record) for record in history]
    metrics = cast(RunMetrics, without_secrets(dict(metrics)))
    write_durably(output / "log.json", json.dumps(history, indent=1))
    write_durably(output / HELD_OUT, json.dumps(held_out))
    write_durably(output / "examples.json", json.dumps(shown, indent=1, ensure_ascii=False))
    write_durably(output / "answers.json", json.dumps(told, indent=1, ensure_ascii=False))
    write_durably(output / "README.md", model_card(metrics, output))
    write_report(output / "report.html", metrics, history, shown, told, held_out)
    write_durably(output / "metrics.json", json.dumps(metrics, indent=2))


def in_json(record: dict[str, float]) -> dict[str, Any]:
    """A record of the log in which a number that JSON does not have, such as the gradient norm of
    an overflow in float16, is null.
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _tail_of_kind(kind: Exactness) -> Tail:
    return {"unbiased": "samples", "biased": "renormalised"}.get(kind, "ghost")  # type: ignore[return-value]


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _caches_described(config: TrainConfig, manifests: list[Manifest]) -> CacheFacts:
    """The description of the cache, or of all caches together, for reports."""
    tokens = sum(manifest.statistics.tokens for manifest in manifests)
    size = sum(
        manifest.statistics.tokens * manifest.statistics.bytes_per_token for manifest in manifests
    )
    return {
        "path": _joined(entry.cache for entry in config.caches),
        "fingerprint": _joined(manifest.fingerprint for manifest in manifests),
        "source": _joined(manifest.data.source for manifest in manifests),
        "tokens": tokens,
        "bytes_per_token": size / tokens,
    }
