"""The parts of a training, made and checked before its first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from logitcask.cache_format import CacheReader, Manifest
from logitcask.train.config import TrainConfig
from logitcask.train.data.dataset import HeldOut
from logitcask.train.data.mixture import Mixture, open_data
from logitcask.train.data.vocabulary import rows_of
from logitcask.train.distributed import is_main, on_main
from logitcask.train.evaluation.kinds import metric_kinds
from logitcask.train.exactness_words import IN_WORDS
from logitcask.train.loop.arguments import (
    check_optimizer,
    check_schedule,
)
from logitcask.train.loop.objective import Objective
from logitcask.train.loop.part import Part, part_of
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.loop.try_objective import try_objective
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.tails import Tail
from logitcask.train.model import compat
from logitcask.train.model.precision import check_attention
from logitcask.train.model.student import build_student, load_student_tokenizer
from logitcask.train.output.disk import CheckpointSize, checkpoint_size
from logitcask.train.output.saving import (
    mend_generation_config,
    try_saving,
)

log = logging.getLogger(__name__)

_MAY_MISLEAD: dict[Exactness, str] = {
    "exact": "",
    "unbiased": "",
    "lower": ": it may rank students otherwise than whole distributions do; a reference with draws from the tail "
    "(store.tail_samples) has an unbiased one",
}


@dataclass(frozen=True)
class Parts:
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


def prepare(
    config: TrainConfig,
    arguments: TrainingArguments,
    caches: list[CacheReader],
    reference: CacheReader | None,
    *,
    restart: bool,
) -> Parts:
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
    for number, (entry, manifest) in enumerate(zip(config.caches, manifests, strict=True)):
        compat.check(config, number, manifest, student, tokenizer, held_out=entry.held_out != 0)
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
    learnt = {number: data.sources[number] for number in config.learnt}
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
    return Parts(
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
