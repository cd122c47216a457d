"""A cache and its losses for a training loop that is not ``train-student``: a data set, a collator,
and a function from the model's outputs and a batch to the loss.

Shapes: B rows of a batch, T tokens of the longest row, P kept positions of all rows, V student
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache_format.cli.config_file import parse_options
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.cache_format.export.rows import sequence_of
from logitcask.train.config import TrainConfig, WeightSchedule
from logitcask.train.data.batch import Place
from logitcask.train.data.mixture import Collator, Drawn, by_source, open_data
from logitcask.train.data.vocabulary import restricted, rows_of
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.identity import open_caches
from logitcask.train.loop.batch_loss import MODEL_INPUTS
from logitcask.train.loop.try_objective import try_objective
from logitcask.train.model import compat
from logitcask.train.model.isolation import check_isolation, wants_flat

IGNORED = -100
"""The label of a token that is not learnt, for every trainer that counts labels."""

_FIELDS = ("cache", "trusted_keys", "losses", "ce_weight", "data", "evaluation")
_ELSEWHERE: dict[str, Any] = {"student": {"model": "-"}, "training": {"output_dir": "-"}}
"""Fields of the config that are the other trainer's."""


class Distillation:
    """The training data of caches, its batches, and the loss of a batch.

    train:    map-style data set of the sequences (with packing: of the rows) to learn from, in
              stored order. Its items are numbers, which the collator reads. held_out: the same of
              the held-out sequences.
    collate:  from items to a batch.
    loss:     from the model's outputs and a batch to a scalar.

    Args:
        student: the causal language model to train, before any wrapper. Its vocabulary and length
            are compared with the cache.
        tokenizer: the student's tokenizer, compared with the teacher's. None: it is not compared.
        rows: number of ids that the student predicts, in place of ``student``, where the model is
            not there yet; ``check`` compares the model later.
        seed: decides which sequences share a packed row.
        fields: the fields ``cache``, ``trusted_keys``, ``losses``, ``ce_weight``, ``data`` and
            ``evaluation`` of a ``train-student`` config, with the same defaults.

    Raises:
        UserError and its subclasses: a cache, losses or a student that do not go together.
    """

    def __init__(
        self,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        rows: int | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> None:
        self.config = config = _config(fields)
        self._caches, _ = open_caches(config)
        compat.check_together(
            [entry.cache for entry in config.caches], [cache.manifest for cache in self._caches]
        )
        self._rows = rows if student is None else rows_of(student)
        self._mixture, self._held_out = open_data(config, self._caches, seed, self._rows)
        plan = self._mixture.plan
        self.train = Numbered("unit", int(plan.first_unit[-1]), plan.tokens)
        self.held_out = Numbered("held_out", len(self._held_out))
        sources = dict(enumerate(self._mixture.sources))
        self.objective, _, self.exactness = try_objective(config, sources)
        if self.objective.stateful:
            raise UserError(
                f"losses: {', '.join(self.objective.stateful)} follows the student from step to step, which only "
                "train-student can tell it; use another loss, or train-student"
            )
        weights = [term.weight for term in config.losses] + [config.ce_weight]
        self._must_begin = any(isinstance(weight, WeightSchedule) for weight in weights)
        self._collator = Collator(packed=config.data.packing)
        if student is not None:
            self.check(student, tokenizer)

    def check(
        self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Raises UserError, in one line, if the student does not fit the caches. With packing, the
        student is tried on packed rows.
        """
        if self._rows is not None and rows_of(student) < self._rows:
            raise UserError(
                f"the student predicts {rows_of(student):,} ids, but the data was opened for {self._rows:,}; open it with "
                "the student, or with rows of the student's number"
            )
        for number, cache in enumerate(self._caches):
            compat.check(self.config, number, cache.manifest, student, tokenizer, held_out=False)
        for source in self._mixture.sources:
            compat.check_vocabulary(source)
        if self.config.data.packing:
            head = LogitsHead(student)
            check_isolation(head)
            self._collator.flat = wants_flat(head)

    def collate(self, items: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Items of ``train`` or ``held_out`` as a batch, or rows of ``datasets`` that
        ``logitcask.RowDecoder`` has decoded.

        input_ids, attention_mask: int64[B, T]; with packing position_ids in place of the mask.
        labels:  int64[B, T], the tokens to learn, each at its own place, others -100: the form that
                 causal language models of transformers shift themselves, and trainers count.
        kept:    int64[P], indices into the flattened [B * T] positions.
        teacher_*: the teacher at the kept positions, [P, ...]. layout: cache and number of kept
                 positions of each sequence.
        """
        batch = self._collator(self._read(items))
        batch["teacher_target_ids"] = targets = batch.pop("labels")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels.view(-1)[batch["kept"] + 1] = targets
        layout = [[place.source, place.kept] for place in batch.pop("layout")]
        return {**batch, "labels": labels, "layout": layout}

    def micro_batches(self, size: int) -> Callable[[list[Mapping[str, Any]]], list[dict[str, Any]]]:
        """A collator that makes a list of batches of ``size`` items each: for a loader whose batch
        is a whole optimizer step, so that the positions of the step are known at its beginning.
        """
        if size < 1:
            raise UserError(f"a micro-batch of {size} items; give at least 1")

        def split(items: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [self.collate(items[at : at + size]) for at in range(0, len(items), size)]

        return split

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        found = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        # A cache of keys and values would hide from transformers that rows are packed.
        return {**found, "use_cache": False}

    def loss(
        self,
        outputs: Any,
        batch: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective of a batch, summed over its kept positions and divided by
        ``num_items_in_batch``: a scalar, float32, in nats.

        Args:
            outputs: what the model returned, or its logits [B, T, V].
            num_items_in_batch: the number of kept positions of the whole optimizer step, with all
                its accumulated batches. None: that of this batch, so that the loss is its mean.

        Raises:
            UserError: a weight has a schedule and ``begin_step`` was never called.
        """
        if self._must_begin:
            raise UserError(
                "a weight of the losses has a schedule: call begin_step(step, steps) of the Distillation before each "
                "optimizer step"
            )
        logits = getattr(outputs, "logits", outputs)
        logits_PV = logits.flatten(0, 1)[batch["kept"]]
        places = [Place(source, 0, kept, kept) for source, kept in batch["layout"]]
        teachers = self._mixture.teachers(
            {**batch, "labels": batch["teacher_target_ids"], "layout": places}
        )
        per_chunk = (
            by_source(self.objective.per_chunk, teachers)
            if len(teachers) > 1
            else self.objective.per_chunk(teachers[0].teacher, teachers[0].source)
        )
        objective_P, _ = per_chunk(logits_PV, slice(0, len(logits_PV)))
        if num_items_in_batch is None:
            num_items_in_batch = max(1, len(logits_PV))
        return objective_P.sum() / num_items_in_batch

    def begin_step(self, step: int, steps: int) -> None:
        """Begins the optimizer step after ``step`` of all ``steps``: weights with a schedule get
        their values. Without schedules it need not be called.
        """
        self._must_begin = False
        self.objective.begin(step, steps)

    def _read(self, items: list[Mapping[str, Any]]) -> list[Drawn]:
        """The sequences of items, in their order; those of ``train`` in one pass."""
        units = [int(item["unit"]) for item in items if "unit" in item]
        read = iter(self._mixture.__getitems__(units))
        return [next(read) if "unit" in item else self._other(item) for item in items]

    def _other(self, item: Mapping[str, Any]) -> Drawn:
        """A held-out sequence, or the one of a decoded row."""
        if "held_out" in item:
            number = left = int(item["held_out"])
            for part in self._held_out.parts:
                if left < len(part):
                    break
                left -= len(part)
            return Drawn(self._caches.index(part.cache), [self._held_out[number]])
        if len(self._caches) > 1:
            raise UserError(
                f"a row of datasets does not say which of {len(self._caches)} caches it is of; use one cache, or "
                "the train data set of the Distillation"
            )
        sequence, source = sequence_of(item), self._mixture.sources[0]
        predicted = source.cache.manifest.store.vocab_size
        if source.vocab_size < predicted:
            sequence = restricted(sequence, source.vocab_size, predicted)
        return Drawn(0, [sequence])


def _config(fields: Mapping[str, Any]) -> TrainConfig:
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise ConfigError(
            f"a Distillation has no {', '.join(unknown)}; it has the fields {', '.join(_FIELDS)} of a train-student "
            "config, and the rest is the other trainer's"
        )
    config = parse_options(TrainConfig, {**fields, **_ELSEWHERE})
    if any(entry.weight is not None for entry in config.caches):
        raise ConfigError(
            "cache: caches with weights need the order of train-student; leave the weights out, so that an epoch is "
            "every sequence once"
        )
    if config.pairs:
        raise ConfigError(
            "cache: preferred reads the texts of two caches in pairs, which only train-student keeps in one batch; leave it "
            "out, or use train-student"
        )
    if config.data.group_by_length:
        raise ConfigError(
            "data.group_by_length is a matter of the other trainer's sampler; leave it out here"
        )
    if config.evaluation.cache is not None:
        raise ConfigError(
            "evaluation.cache is for train-student and train-student evaluate; leave it out here"
        )
    return config


class Numbered(Dataset[dict[str, int]]):
    """The units or the held-out sequences of caches by their numbers, for any sampler. The collator
    reads them.

    name:    the key of an item's number, ``unit`` or ``held_out``.
    lengths: int64[N], the number of tokens of each, as the item's ``length``; None: items have none.
    """

    def __init__(self, name: str, count: int, lengths: NDArray[np.integer] | None = None) -> None:
        self.name, self._count, self._lengths = name, count, lengths

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> dict[str, int]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of a data set with {len(self)}")
        number = int(item) % len(self)
        if self._lengths is None:
            return {self.name: number}
        return {self.name: number, "length": int(self._lengths[number])}

    def as_datasets(self) -> Any:
        """The same items as a ``datasets.Dataset``, which some trainers insist on."""
        from datasets import Dataset as DatasetOfHub

        columns = {self.name: np.arange(len(self))}
        if self._lengths is not None:
            columns["length"] = np.asarray(self._lengths)
        return DatasetOfHub.from_dict(columns)
