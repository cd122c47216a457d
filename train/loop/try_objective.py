"""A trial of the objective on a few positions of every cache, before a run writes anything."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from logitcask.cache_format.errors import ConfigError, first_line
from logitcask.train.config import TrainConfig
from logitcask.train.data.batch import Place, collate
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.pairs import pair_texts
from logitcask.train.exactness_words import IN_WORDS
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES, SPECS
from logitcask.train.losses.base import Exactness, is_own
from logitcask.train.losses.exactness import shortest_head, weakest
from logitcask.train.losses.others import check_gradient
from logitcask.train.losses.tails import Tail, tail_of

log = logging.getLogger(__name__)

_TAILS: dict[Tail, str] = {
    "samples": "tail samples (unbiased)",
    "ghost": "one cell of known mass (a lower bound; caches with tail samples are unbiased)",
    "renormalised": "nothing: both heads are scaled to 1, since the mass outside them is not known (an approximation, "
    "which teaches over-confidence)",
}


def try_objective(
    config: TrainConfig, data: dict[int, CachedDataset]
) -> tuple[Objective, Tail, dict[str, Exactness]]:
    """Makes the objective and tries it on a few positions of every cache of ``data``, by the caches'
    numbers in the config.

    Returns the objective, the available part of the teacher's tail, and the exactness of each loss;
    of several caches, the weakest one counts. Raises UserError or ConfigError for loss options that
    a cache cannot serve, before anything is written.
    """
    try:
        objective = Objective(config)
        tails, kinds = zip(*(_try_on(objective, *each) for each in data.items()), strict=True)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"losses: {first_line(error)}; see the options in docs/losses.md"
        ) from error
    exactness = {
        name: weakest(found[name] for found in kinds if name in found)
        for name, _ in objective.weights()
    }
    tail = min(tails, key=list(reversed(_TAILS)).index)
    return objective, tail, exactness


def _try_on(
    objective: Objective, source: int, data: CachedDataset
) -> tuple[Tail, dict[str, Exactness]]:
    teacher = data.teacher(collate([data[0]]))
    if objective.of_pairs:  # with the text as its own partner
        alone = [Place(source, len(data[0]), len(teacher), len(teacher))]
        log_p = teacher.target_logprob
        teacher = replace(teacher, pairs=pair_texts(alone, log_p, log_p, 1.0))
    rows = slice(0, min(4, len(teacher)))
    logits = torch.randn(rows.stop, teacher.vocab_size, generator=torch.Generator().manual_seed(0))
    per_chunk = objective.per_chunk(teacher, source)
    per_chunk(logits.clone(), rows)
    names = objective.applying(source)
    for name in (name for name in names if not is_own(LOSSES[name])):
        check_gradient(name, lambda z: per_chunk(z, rows)[1], logits.clone())
    _warn_of_the_sampling(names, data)
    tail = tail_of(teacher)
    log.info("beyond the heads stored in %s, KL uses %s", data.cache.path, _TAILS[tail])
    exactness = objective.exactness(teacher, shortest_head(data.cache.manifest.store), source)
    for name, kind in exactness.items():
        log.info("with this cache, %s is %s", name, IN_WORDS[kind])
    return tail, exactness


def _warn_of_the_sampling(names: list[str], data: CachedDataset) -> None:
    """Warns of a loss that takes the text for samples of a distribution from which it is not."""
    generation = data.cache.manifest.data.generation
    writer = None if generation is None else generation.writer
    if writer is None or (writer.temperature, writer.top_p) == (1, 1):
        return
    for name in (name for name in names if SPECS[name].own_samples):
        log.warning(
            "%s is for samples of the writer's whole distribution, but %s was sampled at temperature %g and top_p %g, so its "
            "mean is another one; sample at temperature 1 and top_p 1 (data.generate)",
            name,
            data.cache.path,
            writer.temperature,
            writer.top_p,
        )
