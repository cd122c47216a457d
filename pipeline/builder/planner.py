"""The planner: rows become sequences, sequences become the shards of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from logitcask.cache_format import UserError
from logitcask.cache_format.durable import writing_to
from logitcask.cache_format.manifest import DataIdentity
from logitcask.pipeline.builder.inputs import check_top_k, prompts_from, tokenization
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import Plan, write_sequences
from logitcask.pipeline.builder.request import with_date
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate.answers import Generations
from logitcask.pipeline.identity import check_unchanged, tokenizer_of
from logitcask.pipeline.teachers.open import sampling_of
from logitcask.pipeline.text.sources import Source, open_source
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence


def make_plan(build_dir: Path, config: BuildConfig, request: dict[str, Any], engine: LazyTeacher) -> Plan:
    """Writes the plan of a new build, which ``request`` describes; ``engine`` writes answers first, if any are asked for.

    Raises UserError for data, a tokenizer or a model that gives no plan, and where the data changes while it is read.
    """
    check_top_k(config)
    source: Source = open_source(config.data)
    stamp = source.stamp()
    text: Tokenization | Generations
    if config.data.generate is None:
        text = tokenization(config)
        request = with_date(request, text)
    else:
        prompts = prompts_from(config)
        request = with_date(request, prompts)
        sampling = sampling_of(config.teacher, config.data.generate, prompts.tokenizer, prompts.template)
        text = Generations(prompts, config, sampling, build_dir, request)
        text.complete(source, engine.start)
    with tqdm(unit="tok", unit_scale=True, desc="tokenise", leave=False, total=config.data.max_tokens) as bar:

        def counted() -> Iterator[Sequence]:
            for sequence in text.sequences(source):
                bar.update(len(sequence.input_ids))
                yield sequence

        with writing_to(config.folder):
            shards, digest = write_sequences(build_dir, counted(), config.store.shard_tokens)
    if not isinstance(text, Generations):  # those have read it before, perhaps days ago
        check_unchanged(source, stamp, config)
    if not shards:
        raise UserError(f"{config.data.path} gives no sequence to score; check its fields and max_tokens")
    if not any(shard.positions for shard in shards):
        raise UserError(
            f"{config.data.path} gives no token to learn: every sequence is of one token, which nothing predicts; "
            f"raise data.max_length ({config.data.max_length})"
        )
    plan = Plan(
        request=request,
        tokenizer=tokenizer_of(text, config),
        data=DataIdentity.model_validate(
            {
                "source": config.data.path,
                "split": config.data.split,
                "kind": config.data.kind,
                "mask_policy": config.data.mask_policy,
                "max_length": config.data.max_length,
                "overlong": config.data.overlong,
                "sha256": digest,
                "counters": {**source.counters, **text.counters},
                "stamp": text.stamp if isinstance(text, Generations) else stamp,
                "generation": text.identity() if isinstance(text, Generations) else None,
            }
        ),
        shards=shards,
    )
    with writing_to(config.folder):
        plan.save(build_dir)
    return plan
