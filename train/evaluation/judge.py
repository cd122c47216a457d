"""``train-student evaluate``: saved models on the sequences of one cache, with intervals."""

from __future__ import annotations

import json
import logging
import math
from contextlib import nullcontext
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.held_out import is_held_out
from logitcask.train.data.mixture import sequences_of
from logitcask.train.data.vocabulary import rows_of
from logitcask.train.evaluation.by_sequence import BySequence
from logitcask.train.evaluation.evaluate import evaluate, teacher_reference
from logitcask.train.evaluation.figures import Bootstrap, Figure, differences, figures_of
from logitcask.train.evaluation.kinds import metric_kinds
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.model import compat
from logitcask.train.model.saved import RUN, load_saved, run_of

log = logging.getLogger(__name__)


class Judgement(TypedDict):
    """The result of ``train-student evaluate``.

    teacher: its own metrics on the same positions. baseline: the metrics of the baseline.
    difference: of the model minus the baseline, paired by sequence.
    """

    model: str
    cache: str
    fingerprint: str
    held_out_of: str | None
    sequences: int
    positions: int
    k: int
    precision: str
    seed: int
    resamples: int
    teacher: dict[str, Any]
    metrics: dict[str, Figure]
    baseline_model: NotRequired[str]
    baseline: NotRequired[dict[str, Figure]]
    difference: NotRequired[dict[str, Figure]]


class Settings(NamedTuple):
    """Options of the command. max_sequences: the first ones; None: all. resamples: of the
    bootstrap.
    """

    held_out_of: str | None = None
    max_sequences: int | None = None
    k: int = 5
    batch_size: int = 8
    bf16: bool = False
    seed: int = 0
    resamples: int = 1000


def judge(model: str, cache: str, baseline: str | None, settings: Settings) -> Judgement:
    """Evaluates ``model``, and ``baseline`` on the same sequences. Raises UserError and its
    subclasses for models that do not fit the cache.
    """
    reader = CacheReader(cache)
    names = [model] if baseline is None else [model, baseline]
    chosen = _chosen(settings.held_out_of, names, reader)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    models = [_loaded(name, reader, settings.k) for name in names]
    # Both see the same ids, so that both are compared with the same distributions.
    rows = min(rows_of(each) for each in models)
    data = HeldOut([sequences_of(reader, rows, chosen).first(settings.max_sequences)])
    compat.check_vocabulary(data.parts[0])
    found = [
        _measured(name, each, data, settings) for name, each in zip(names, models, strict=True)
    ]
    kinds = metric_kinds(data, list(found[0].means()))
    bootstrap = Bootstrap(settings.seed, settings.resamples)
    if len(data) < 2:
        log.warning("one sequence has no spread, so there are no intervals")
    teacher = teacher_reference(data)
    positions = int(teacher.pop("positions") or 0)
    result: Judgement = {
        "model": model,
        "cache": reader.path,
        "fingerprint": reader.manifest.fingerprint,
        "held_out_of": settings.held_out_of,
        "sequences": len(data),
        "positions": positions,
        "k": settings.k,
        "precision": "bfloat16" if settings.bf16 else "float32",
        "seed": settings.seed,
        "resamples": settings.resamples,
        "teacher": {"model": reader.manifest.teacher.model, **teacher},
        "metrics": figures_of(found[0], kinds, bootstrap),
    }
    if baseline is not None:
        result["baseline_model"] = baseline
        result["baseline"] = figures_of(found[1], kinds, bootstrap)
        result["difference"] = differences(found[0], found[1], kinds, bootstrap)
    return result


def _loaded(name: str, cache: CacheReader, k: int) -> PreTrainedModel:
    model, tokenizer = load_saved(name)
    compat.check_evaluation(cache.path, cache.manifest, model, tokenizer, ("--k", k))
    return model


def _measured(name: str, model: PreTrainedModel, data: HeldOut, settings: Settings) -> BySequence:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # The check of the halves is in full precision, as before a training.
    head = LogitsHead(model)
    with torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext():
        found = evaluate(
            head, data, k=settings.k, batch_size=settings.batch_size, logits_chunk=None
        ).by_sequence()
    model.to("cpu")
    wrong = [metric for metric, value in found.means().items() if not math.isfinite(value)]
    if wrong:
        raise UserError(
            f"{name}: {wrong[0]} is {found.means()[wrong[0]]}, expected a number; its weights or its logits are not finite: "
            "use another checkpoint"
        )
    return found


def _chosen(run: str | None, names: list[str], cache: CacheReader) -> NDArray[np.bool_] | None:
    """bool[N], the sequences that a run held out; None: all. Warns of sequences that a model may
    have learnt from.
    """
    fingerprint = cache.manifest.fingerprint
    if run is None:
        for name in names:
            known = run_of(name)
            if known is not None and fingerprint in _learnt(known):
                log.warning(
                    "%s was trained on sequences of %s; --held-out-of leaves those out",
                    name,
                    cache.path,
                )
        return None
    found = run_of(run)
    if found is None:
        raise UserError(
            f"--held-out-of is {run}, which holds no run of train-student (no {RUN} of one); name the output_dir of a run"
        )
    if found.get("reference") == fingerprint:
        return None
    share = found["config"]["evaluation"]["held_out"]
    if share == 0:
        raise UserError(
            f"{run} held out the texts of the reference cache {found['reference'][:16]} and no rows of {cache.path} "
            f"({fingerprint[:16]}); evaluate on that reference, or leave --held-out-of away"
        )
    if fingerprint not in _learnt(found):
        log.warning(
            "%s was not trained on %s; the sequences of this cache are chosen by the names of the rows that it held out",
            run,
            cache.path,
        )
    data = cache.manifest.data
    ids = (each for column in cache.iter_column("sequence_id") for each in column.to_pylist())
    return np.fromiter((is_held_out(each, data, share) for each in ids), np.bool_, len(cache))


def _learnt(run: dict[str, Any]) -> list[str]:
    """Fingerprints of the caches of a run."""
    caches = run["cache"]
    return [caches] if isinstance(caches, str) else [each["fingerprint"] for each in caches]


def to_json(judgement: Judgement) -> str:
    """The judgement as text."""
    return json.dumps(judgement, indent=2) + "\n"
