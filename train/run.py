"""``train-student``: from a cache to a student, from the first check to the report.

The output folder holds the state to resume a run after a crash: ``run.json`` (the identity of the
run, and the metrics before it) and the Trainer's checkpoints. ``metrics.json`` is written last and
marks the run as finished.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging as transformers_logging

from logitcask.cache_format import CacheReader, Manifest
from logitcask.cache_format.catalog.home import using
from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.redact import without_secrets
from logitcask.train.config import TrainConfig
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.mixture import Mixture, open_data
from logitcask.train.data.vocabulary import rows_of
from logitcask.train.distributed import is_main, on_main
from logitcask.train.evaluation.answers import Answer, answers, mean_rouge_l
from logitcask.train.evaluation.evaluate import evaluate, examples, teacher_reference
from logitcask.train.evaluation.kinds import KL_KIND, metric_kinds
from logitcask.train.evaluation.measured import Measured
from logitcask.train.exactness_words import IN_WORDS
from logitcask.train.identity import found, identity, open_caches
from logitcask.train.loop.arguments import (
    check_best,
    check_optimizer,
    check_schedule,
    training_arguments,
)
from logitcask.train.loop.callbacks import TellEvaluation
from logitcask.train.loop.checkpoints import (
    CacheStamp,
    last_checkpoint,
    named_checkpoint,
    warn_of_other_batches,
)
from logitcask.train.loop.objective import Objective
from logitcask.train.loop.part import Part, check_weights, part_of
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.loop.try_objective import try_objective
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.tails import Tail
from logitcask.train.model import compat
from logitcask.train.model.divergence import check_finite
from logitcask.train.model.precision import check_attention
from logitcask.train.model.student import build_student, load_student_tokenizer
from logitcask.train.output.disk import CheckpointSize, checkpoint_size, say_disk_space
from logitcask.train.output.held_out_file import HELD_OUT, HeldOutValues, held_out_values
from logitcask.train.output.metrics_file import CacheFacts, RunMetrics, TeacherMetrics
from logitcask.train.output.model_card import model_card
from logitcask.train.output.report import Running, write_report
from logitcask.train.output.run_folder import exclusive, remove_run
from logitcask.train.output.saving import (
    mend_generation_config,
    save_merged,
    save_student,
    try_saving,
)

log = logging.getLogger(__name__)

_MAY_MISLEAD: dict[Exactness, str] = {
    "exact": "",
    "unbiased": "",
    "lower": ": it may rank students otherwise than whole distributions do; a reference with draws from the tail "
    "(store.tail_samples) has an unbiased one",
}


def train(
    config: TrainConfig, *, restart: bool = False, watch: bool = False
) -> tuple[RunMetrics, bool]:
    """Trains the student that ``config`` describes, resumes its training, or finds it finished.

    watch: whether report.html is written at the start and at every evaluation, too.

    Returns the content of metrics.json, and whether the run was finished before. Raises UserError
    and its subclasses.
    """
    output = config.output_dir
    # From here on, the processes of a launcher can communicate.
    arguments = training_arguments(config)
    if watch and arguments.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            "--watch writes the report at every evaluation, and training.eval_strategy is no; set training.eval_strategy=steps "
            "training.eval_steps=50"
        )
    with exclusive(output) if is_main() else nullcontext():
        caches, reference = open_caches(config)
        run = identity(config, caches, reference)
        before, metrics = on_main(lambda: found(output, run, restart=restart))
        if metrics is not None:
            return metrics, True
        read = [*caches, *([] if reference is None else [reference])]
        with using(cache.path for cache in read):
            metrics = _train(
                config, arguments, caches, reference, run, before, restart=restart, watch=watch
            )
        return metrics, False


def _train(
    config: TrainConfig,
    arguments: TrainingArguments,
    caches: list[CacheReader],
    reference: CacheReader | None,
    run: dict[str, Any],
    before: dict[str, Any] | None,
    *,
    restart: bool,
    watch: bool,
) -> RunMetrics:
    output = config.output_dir
    parts = _prepare(config, arguments, caches, reference, restart=restart)
    if restart:  # only after all checks of the new run
        on_main(lambda: remove_run(output))
    trainer, examination = parts.trainer, _Examination(config, arguments, parts)
    fingerprints = tuple(cache.manifest.fingerprint for cache in caches)
    trainer.add_callback(CacheStamp(fingerprints))
    begins = before is None
    if before is None:
        if parts.part is not None and parts.part.start is not None:
            check_weights(parts.part.start, parts.student)
            trainer.start_from(parts.part.start)
        before = _measure_before(arguments, examination, run, output)

    def described(after: dict[str, float], answered: list[Answer]) -> RunMetrics:
        return _metrics(
            config, caches, reference, parts, run, before, after, answered, examination.teacher
        )

    if watch:
        watching = _Watching(examination, parts, before, described, output)
        if begins:  # a resumed run leaves the page of its last evaluation
            watching.write()
        trainer.add_callback(TellEvaluation(watching.write))
    checkpoint = _start_of(arguments, fingerprints, parts, output)
    # Again: the training must not depend on whether the evaluation above ran now or earlier.
    set_seed(arguments.seed)
    if parts.part is None or parts.part.until > parts.part.first:
        trainer.run(None if checkpoint is None else str(checkpoint))

    # Saved before anything else that can fail. Metrics are those before the adapters are merged.
    save_student(trainer, output)
    measured = examination.measure()
    after = measured.means()
    check_finite(after, "on held-out text after training")
    shown = _before_and_now(before["examples"], examination.show())
    answered = examination.answer()
    save_merged(trainer, output)
    metrics = described(after, answered)
    held_out = held_out_values(parts.held_out, measured, before.get("bins"))
    history = trainer.state.log_history
    on_main(lambda: _write(output, metrics, history, held_out, shown, answered))
    return metrics


@dataclass(frozen=True)
class _Parts:
    """The parts of a run that its first step needs, all checked.

    kl_tail: the part of the teacher's tail that the KL of the losses uses. exactness: of each loss.
    steps: of the whole training. parameters, trained: numbers of the student's parameters before
    its adapters are merged.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: Mixture
    held_out: HeldOut
    objective: Objective
    kl_tail: Tail
    exactness: dict[str, Exactness]
    trainer: DistillationTrainer
    steps: int
    checkpoint_size: CheckpointSize
    parameters: int
    trained: int
    part: Part | None


def _prepare(
    config: TrainConfig,
    arguments: TrainingArguments,
    caches: list[CacheReader],
    reference: CacheReader | None,
    *,
    restart: bool,
) -> _Parts:
    """Makes and checks the parts of a run. Raises UserError and its subclasses before any lasting
    file is written.
    """
    manifests = [cache.manifest for cache in caches]
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    set_seed(arguments.seed)
    student = build_student(config.student, arguments.seed)
    check_attention(student, arguments)
    mend_generation_config(student)
    tokenizer = load_student_tokenizer(config.student)
    compat.check_together([entry.cache for entry in config.caches], manifests)
    for entry, manifest in zip(config.caches, manifests, strict=True):
        compat.check(
            config, entry.cache, manifest, student, tokenizer, held_out=entry.held_out != 0
        )
    if reference is not None:
        _check_reference(config, manifests, reference, student, tokenizer)

    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    part = on_main(lambda: _part(config, restart=restart))
    read = None if part is None else (part.first, part.read)
    data, held_out = open_data(config, caches, data_seed, rows_of(student), reference, read)
    for source in (*data.sources, *(held_out.parts if reference is not None else ())):
        compat.check_vocabulary(source)
    if config.evaluation.answers:
        import logitcask.train.evaluation.rouge  # noqa: F401  a missing package is said now
    learnt = [
        source
        for source, entry in zip(data.sources, config.caches, strict=True)
        if entry.weight != 0
    ]
    objective, tail, exactness = try_objective(config, learnt)
    if reference is not None and is_main():
        kind = metric_kinds(held_out, ["kl"])["kl"]
        log.info(
            "evaluated on %s, where kl is %s%s", reference.path, IN_WORDS[kind], _MAY_MISLEAD[kind]
        )
    optimizer = check_optimizer(arguments, student)
    # Before the trainer tries the student, because flash attention needs its GPU.
    student.to(arguments.device)
    trainer = DistillationTrainer(
        student,
        arguments,
        objective,
        data,
        held_out,
        tokenizer,
        k=config.evaluation.k,
        logits_chunk=config.logits_chunk,
        data=config.data,
        selection=config.selection,
        exactness=exactness,
        part=part,
    )
    steps = trainer.total_steps()
    check_schedule(arguments, optimizer, steps)
    on_main(lambda: try_saving(student, tokenizer, config.output_dir))
    return _Parts(
        student,
        tokenizer,
        data,
        held_out,
        objective,
        tail,
        exactness,
        trainer,
        steps,
        checkpoint_size=checkpoint_size(student, optimizer, arguments),
        parameters=student.num_parameters(),
        trained=student.num_parameters(only_trainable=True),
        part=part,
    )


def _part(config: TrainConfig, *, restart: bool) -> Part | None:
    if config.part is None:
        return None
    return part_of(config.part, config.output_dir, restart=restart)


def _check_reference(
    config: TrainConfig,
    manifests: list[Manifest],
    reference: CacheReader,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises UserError if the student cannot be evaluated on the reference cache. Warns if another
    teacher made it.
    """
    judge = reference.manifest
    paths = [entry.cache for entry in config.caches]
    compat.check_together([*paths, reference.path], [*manifests, judge])
    k = ("evaluation.k", config.evaluation.k)
    compat.check_evaluation(reference.path, judge, student, tokenizer, k)
    for path, manifest in zip(paths, manifests, strict=True):
        compat.warn_of_other_teacher(path, manifest, reference.path, judge)


class _Examination:
    """The current student on held-out text: its metrics, some positions, its answers."""

    def __init__(self, config: TrainConfig, arguments: TrainingArguments, parts: _Parts) -> None:
        self._config, self._arguments, self._parts = config, arguments, parts

    @cached_property
    def teacher(self) -> dict[str, float | None]:
        """The teacher's own metrics."""
        return teacher_reference(self._parts.held_out)

    def measure(self) -> Measured:
        with self._parts.trainer.precision():
            return evaluate(
                self._parts.trainer.head,
                self._parts.held_out,
                k=self._config.evaluation.k,
                batch_size=self._arguments.per_device_eval_batch_size,
                logits_chunk=self._config.logits_chunk,
            )

    def show(self) -> list[dict[str, Any]]:
        tokenizer, trainer = self._parts.tokenizer, self._parts.trainer
        with trainer.precision():
            return (
                examples(trainer.head, self._parts.held_out, tokenizer)
                if tokenizer is not None
                else []
            )

    def answer(self) -> list[Answer]:
        wanted, tokenizer = self._config.evaluation.answers, self._parts.tokenizer
        if wanted is None or tokenizer is None:
            return []
        with self._parts.trainer.precision():
            return answers(self._parts.student, tokenizer, self._parts.held_out, wanted)


class _Watching:
    """The report of a run that is going on.

    described: the content of metrics.json from metrics and answers.
    """

    def __init__(
        self,
        examination: _Examination,
        parts: _Parts,
        before: dict[str, Any],
        described: Callable[[dict[str, float], list[Answer]], RunMetrics],
        output: Path,
    ) -> None:
        self._examination, self._parts, self._before = examination, parts, before
        self._described, self._output = described, output

    def write(self) -> None:
        """Writes the page of the newest evaluation, or of the student before its first step."""
        measured, state = self._parts.trainer.measured, self._parts.trainer.state
        after = self._before["metrics"] if measured is None else measured.means()
        held_out = None
        if measured is not None:
            held_out = held_out_values(self._parts.held_out, measured, self._before.get("bins"))
        shown = _before_and_now(self._before["examples"], self._examination.show())
        metrics = cast(RunMetrics, without_secrets(dict(self._described(after, []))))
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        running = Running(state.global_step, self._parts.steps, now)
        page = self._output / "report.html"
        on_main(
            lambda: write_report(page, metrics, state.log_history, shown, [], held_out, running)
        )


def _before_and_now(
    before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The examples of the untrained student and of the current one as one list."""
    return [
        {**then, "before": then["student"], "after": each["student"]}
        for then, each in zip(before, now, strict=True)
    ]


def _measure_before(
    arguments: TrainingArguments, examination: _Examination, run: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Measures the untrained student, then writes ``run.json``, which marks the run as begun."""
    found = examination.measure()
    measured: dict[str, Any] = {
        "metrics": found.means(),
        "bins": found.bins(),
        "examples": examination.show(),
        "rouge_l": mean_rouge_l(examination.answer()),
    }
    check_best(arguments, measured["metrics"])
    on_main(
        lambda: write_durably(
            output / "run.json", json.dumps({**run, "before": measured}, indent=2)
        )
    )
    return measured


def _start_of(
    arguments: TrainingArguments, fingerprints: tuple[str, ...], parts: _Parts, output: Path
) -> Path | None:
    """The checkpoint from which the training resumes: the run's last one, else the named one."""
    checkpoint = on_main(lambda: last_checkpoint(output))
    if checkpoint is None and parts.part is not None:
        checkpoint = parts.part.start
    if checkpoint is None and isinstance(arguments.resume_from_checkpoint, str):
        checkpoint = named_checkpoint(arguments.resume_from_checkpoint, fingerprints, parts.steps)
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
        warn_of_other_batches(checkpoint)
    if is_main():
        say_disk_space(parts.checkpoint_size, parts.student, arguments, parts.steps, output)
    return checkpoint


def _metrics(
    config: TrainConfig,
    caches: list[CacheReader],
    judge: CacheReader | None,
    parts: _Parts,
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


def _write(
    output: Path,
    metrics: RunMetrics,
    history: list[dict[str, float]],
    held_out: HeldOutValues,
    shown: list[dict[str, Any]],
    answered: list[Answer],
) -> None:
    """Writes the other files of a finished run, last ``metrics.json``, which marks its end."""
    told = [each._asdict() for each in answered]
    history = [_in_json(record) for record in history]
    metrics = cast(RunMetrics, without_secrets(dict(metrics)))
    write_durably(output / "log.json", json.dumps(history, indent=1))
    write_durably(output / HELD_OUT, json.dumps(held_out))
    write_durably(output / "examples.json", json.dumps(shown, indent=1, ensure_ascii=False))
    write_durably(output / "answers.json", json.dumps(told, indent=1, ensure_ascii=False))
    write_durably(output / "README.md", model_card(metrics, output))
    write_report(output / "report.html", metrics, history, shown, told, held_out)
    write_durably(output / "metrics.json", json.dumps(metrics, indent=2))


def _in_json(record: dict[str, float]) -> dict[str, Any]:
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
