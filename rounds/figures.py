"""The figures of a round, from the files that its commands leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader

_NGRAM = 4


def figures_of_cache(path: str | Path) -> dict[str, Any]:
    """What was written and how the teacher finds it. Reads one sequence at a time.

    reverse_kl:    mean over written tokens of the writer's logprob minus the teacher's, nats: with
                   temperature 1 and top_p 1 an unbiased estimate of KL(writer || teacher) on the
                   writer's own text. None if the teacher wrote.
    teacher_ce:    mean of the teacher's -logprob of the written tokens, nats.
    repetition:    share of repeated 4-grams in an answer, mean over answers.
    """
    cache = CacheReader(path)
    gap = forward = nll = repeated = 0.0
    tokens = answers = 0
    written = cache.manifest.store.writer_logprobs
    for sequence in cache if cache.manifest.data.generation is not None else ():
        tokens += len(sequence.positions)
        answers += 1
        nll -= float(sequence.target_logprob.sum(dtype=np.float64))
        if sequence.writer_logprob is not None:
            gap += float((sequence.writer_logprob - sequence.target_logprob).sum(dtype=np.float64))
            forward += float(_forward_kl(sequence.target_logprob, sequence.writer_logprob).sum())
        repeated += repetition(_answer(sequence))
    counters = cache.manifest.data.counters
    return {
        "sequences": cache.manifest.statistics.sequences,
        "tokens": cache.manifest.statistics.tokens,
        "bytes": cache.manifest.statistics.bytes,
        "prompts": counters.get("prompts"),
        "answers": counters.get("generations"),
        "written_tokens": counters.get("generated_tokens"),
        "mean_answer_tokens": tokens / answers if answers else None,
        "finished": {
            name: counters.get(f"finished_{name}", 0) for name in ("stop", "length", "empty")
        },
        "teacher_ce": nll / tokens if tokens else cache.manifest.statistics.teacher_ce,
        "reverse_kl": gap / tokens if written and tokens else None,
        "forward_kl": forward / tokens if written and tokens else None,
        "repetition": repeated / answers if answers else None,
    }


def _forward_kl(teacher: NDArray[np.float32], writer: NDArray[np.float32]) -> NDArray[np.float64]:
    """r log r - (r - 1) of each token, r = p/q, from its logprobs under the teacher and the writer."""
    log_ratio = teacher.astype(np.float64) - writer.astype(np.float64)
    return np.exp(log_ratio) * log_ratio - np.expm1(log_ratio)


def repetition(ids: NDArray[np.int32]) -> float:
    """Share of the 4-grams of ``ids``, int32[m], that have occurred before in it; 0 without any."""
    count = len(ids) - _NGRAM + 1
    if count < 1:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, _NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / count


def _answer(sequence: CachedSequence) -> NDArray[np.int32]:
    return sequence.target_ids


def figures_of_training(
    model: Path, before: Path | None, caches: dict[str, str], number: int
) -> dict[str, Any]:
    """What a round's training has done.

    before:  folder of the round before. Seconds and positions count over all rounds, so its own are
             subtracted.
    caches:  name of each cache, by fingerprint.
    passes:  how often what each cache has to learn from was read in this round.
    staleness: mean age, in rounds, of the students' sequences that were read; 0: all are new.
    """
    metrics = _json(model / "metrics.json")
    earlier = {} if before is None else _json(before / "metrics.json")
    drawn, units_of = _drawn(model)
    passes = {
        caches[name]: units / max(1, units_of[name])
        for name, units in drawn.items()
        if name in caches
    }
    ages = [
        (units, number - int(caches[name].removeprefix("round-")))
        for name, units in drawn.items()
        if name in caches and caches[name].startswith("round-")
    ]
    units = sum(count for count, _ in ages)
    return {
        "steps": metrics["steps"],
        "held_out": metrics["after"],
        "held_out_before": metrics["before"],
        "kl_kind": metrics["kl_kind"],
        "training_seconds": metrics["seconds"] - earlier.get("seconds", 0.0),
        "positions": metrics["positions_trained"] - earlier.get("positions_trained", 0),
        "passes": passes,
        "staleness": sum(count * age for count, age in ages) / units if units else None,
    }


def _drawn(model: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Sequences or packed rows that a part has read of each cache, and those that the cache has;
    none if it made no step.
    """
    steps = [int(each.name.rpartition("-")[2]) for each in model.glob("checkpoint-*")]
    if not steps:
        return {}, {}
    state = _json(model / f"checkpoint-{max(steps)}" / "trainer_state.json")
    found = state["stateful_callbacks"]["PartEnd"]["attributes"]
    return found["drawn"], found["units"]


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
