"""``train-student``: from a cache to a student, from the first check to the report.

The output folder holds the state to resume a run after a crash: ``run.json`` (the identity of the
run, and the metrics before it) and the Trainer's checkpoints. ``metrics.json`` is written last and
marks the run as finished.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from logitcask.cache_format import CacheReader
from logitcask.cache_format.catalog.home import using
from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import UserError
from logitcask.train.config import TrainConfig
from logitcask.train.distributed import is_main, on_main
from logitcask.train.evaluation.answers import Answer, mean_rouge_l
from logitcask.train.examination import Examination, before_and_now
from logitcask.train.identity import found, identity, open_caches
from logitcask.train.loop.arguments import check_best, training_arguments
from logitcask.train.loop.callbacks import TellEvaluation
from logitcask.train.loop.checkpoints import (
    CacheStamp,
    last_checkpoint,
    named_checkpoint,
    warn_of_other_batches,
)
from logitcask.train.loop.part import check_weights
from logitcask.train.model.divergence import check_finite
from logitcask.train.output.disk import say_disk_space
from logitcask.train.output.held_out_file import held_out_values
from logitcask.train.output.metrics_file import RunMetrics
from logitcask.train.output.run_folder import exclusive, remove_run
from logitcask.train.output.saving import save_merged, save_student
from logitcask.train.preparation import Parts, prepare
from logitcask.train.results import metrics_of, write_results
from logitcask.train.watching import Watching

log = logging.getLogger(__name__)


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
    parts = prepare(config, arguments, caches, reference, restart=restart)
    if restart:  # only after all checks of the new run
        on_main(lambda: remove_run(output))
    trainer, examination = parts.trainer, Examination(config, arguments, parts)
    fingerprints = tuple(cache.manifest.fingerprint for cache in caches)
    trainer.add_callback(CacheStamp(fingerprints))
    begins = before is None
    if before is None:
        if parts.part is not None and parts.part.start is not None:
            check_weights(parts.part.start, parts.student)
            trainer.start_from(parts.part.start)
        before = _measure_before(arguments, examination, run, output)

    def described(after: dict[str, float], answered: list[Answer]) -> RunMetrics:
        return metrics_of(
            config, caches, reference, parts, run, before, after, answered, examination.teacher
        )

    if watch:
        watching = Watching(examination, parts, before, described, output)
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
    shown = before_and_now(before["examples"], examination.show())
    answered = examination.answer()
    save_merged(trainer, output)
    metrics = described(after, answered)
    held_out = held_out_values(parts.held_out, measured, before.get("bins"))
    history = trainer.state.log_history
    on_main(lambda: write_results(output, metrics, history, held_out, shown, answered))
    return metrics


def _measure_before(
    arguments: TrainingArguments, examination: Examination, run: dict[str, Any], output: Path
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
    arguments: TrainingArguments, fingerprints: tuple[str, ...], parts: Parts, output: Path
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
