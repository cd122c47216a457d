"""``teacher-cache import``: a cache from data in another layout.

The source is read twice. The first reading checks everything and learns what the header says; the
second writes shards. A killed import goes on at the first missing shard, and until its last one the
folder is no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from logitcask.cache_format import CacheWriter
from logitcask.cache_format.derive.write import SHARD_TOKENS
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import (
    AuditSummary,
    DataIdentity,
    Header,
    Manifest,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.redact import redacted, without_secrets
from logitcask.cache_format.schema import MAX_SHARDS
from logitcask.cache_format.sequence import CachedSequence
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.storage.files import local_folder
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.imports.base import Held, ImportOptions, Source
from logitcask.pipeline.imports.distributions import as_sequence
from logitcask.pipeline.imports.layouts import LAYOUTS
from logitcask.pipeline.imports.plausibility import Survey
from logitcask.pipeline.teachers.open import open_tokenizer

_PRIOR_POSITIONS = 32_768
"""Positions from which the prior that orders ids is estimated."""

_PLACES = ("source", "tokens")
"""Options that say where the data is, not what it means."""

OnTokens = Callable[[int], object]


def import_cache(
    layout: str,
    path: str,
    output: Path,
    options: ImportOptions,
    *,
    shard_tokens: int = SHARD_TOKENS,
    on_checked: OnTokens = lambda _: None,
    on_written: OnTokens = lambda _: None,
) -> Manifest:
    """Writes the cache ``output`` with the sequences at ``path``; resumes an interrupted import.

    The callbacks get the tokens of every sequence of the two readings.

    Raises UserError for a source of another layout, numbers that cannot be right, and missing
    options. Also raises the errors of reading data and writing caches.
    """
    output = local_folder(output, "write to a folder, then copy that with `teacher-cache push`")
    source = _open(layout, path, options)
    survey = Survey(source.layout, source.vocab_size)
    for name, held in _sequences(source):
        survey.add(held, name)
        on_checked(len(held.input_ids))
    logits = survey.holds_logits(options.values)
    header = _header(source, survey, logits)

    def cached() -> Iterator[CachedSequence]:
        for name, held in _sequences(source):
            yield as_sequence(held, name, header.store, logits=logits, forced=source.layout.forced)

    with CacheWriter(output, afresh=f"remove {output} to start afresh") as writer:
        if writer.begun:
            _refuse_other_options(writer.header(), header, output)
        prior = None if writer.begun else TailPrior.estimate(_first(cached()), source.vocab_size)
        header = writer.begin(header, prior)
        # Shards are filled in order, so the committed ones are the first ones.
        done = sum(entry.sequences for entry in writer.entries())
        sequences = islice(cached(), done, None)
        shards = len(writer.committed)
        sequence = next(sequences, None)
        while sequence is not None:
            if shards >= MAX_SHARDS:
                raise UserError(f"more than {MAX_SHARDS:,} shards; set a larger --shard-tokens")
            with writer.shard(shards) as shard:
                while sequence is not None and (
                    shard.tokens == 0 or shard.tokens + len(sequence) <= shard_tokens
                ):
                    shard.append(sequence)
                    on_written(len(sequence))
                    sequence = next(sequences, None)
            shards += 1
        skipped = f"imported from {layout}"
        return writer.finish(header, shards, audit=AuditSummary(skipped=skipped))


def _refuse_other_options(begun: Header, header: Header, output: Path) -> None:
    """Raises UserError if an unfinished import was told something else about the data, such as
    other settings of a codec: its shards hold other numbers for the same tokens.
    """
    before, now = (
        {name: value for name, value in each.config["import"].items() if name not in _PLACES}
        for each in (begun, header)
    )
    if before != now:
        raise UserError(
            f"{output} holds an unfinished import with other options: {describe_difference(before, now)}; go on with the old "
            f"ones, or remove {output} to start afresh"
        )


def _open(name: str, path: str, options: ImportOptions) -> Source:
    layout = LAYOUTS[name]
    missing = [each for each in layout.needs if getattr(options, each) is None]
    if missing:
        flags = " and ".join("--" + each.replace("_", "-") for each in missing)
        raise UserError(f"the layout {name} needs {flags}, which its data does not hold")
    unknown = sorted(set(options.columns) - set(_COLUMNS))
    if unknown:
        raise UserError(
            f"--columns names {unknown[0]!r}, which no layout has; expected one of {', '.join(_COLUMNS)}"
        )
    config = TeacherConfig(model=options.tokenizer, backend="transformers")
    tokenizer = open_tokenizer(config)
    size = options.vocab_size or len(tokenizer)
    return Source(path, options, size, tokenizer, layout)


_COLUMNS = sorted(
    {
        *(column for layout in LAYOUTS.values() for column in layout.columns),
        "attention_mask",
        "labels",
        "messages_combined",
    }
)


def _sequences(source: Source) -> Iterator[tuple[str, Held]]:
    """(id in the cache, content) of every sequence."""
    held = source.layout.read(source)
    for number, each in enumerate(islice(held, source.options.max_sequences)):
        yield str(number), each


def _first(sequences: Iterator[CachedSequence]) -> list[CachedSequence]:
    """The first sequences, with about _PRIOR_POSITIONS positions."""
    found: list[CachedSequence] = []
    positions = 0
    for sequence in sequences:
        found.append(sequence)
        positions += len(sequence.positions)
        if positions >= _PRIOR_POSITIONS:
            break
    return found


def _header(source: Source, survey: Survey, logits: bool) -> Header:
    options, layout = source.options, source.layout
    store = StoreSettings(
        vocab_size=source.vocab_size,
        top_k=survey.largest,
        capture_k=survey.largest,
        min_k=survey.smallest,
        # Heads of unequal size: "until all of the mass" is the rule that fits any of them.
        top_p=1.0 if survey.smallest < survey.largest else None,
        logprob_step=options.logprob_step,
        unknown=survey.unknown(logits=logits),
    )
    chats = layout.name == "axolotl"
    policy = "assistant" if chats else "completion"
    given: dict[str, Any] = options.model_dump(mode="json", exclude_unset=True)
    return Header(
        required_features=store.features,
        created_by=f"logitcask {version('logitcask')}",
        teacher=TeacherIdentity(
            model=options.teacher,
            backend="import",
            engine=f"imported from {layout.name}",
            dtype=options.teacher_dtype,
            route="import",
            vocab_size=source.vocab_size,
        ),
        tokenizer=TokenizerIdentity(
            name=options.tokenizer, **tokenizer_identity(source.tokenizer, None)
        ),
        data=DataIdentity(
            source=redacted(source.path),
            split=options.split,
            kind="chats" if chats else "documents",
            mask_policy="all" if survey.all_learnt else policy,
            max_length=survey.longest,
            overlong="as imported",
            sha256=survey.data_sha256(),
            counters={name: count for name, count in survey.counters.items() if count},
        ),
        store=store,
        config={"import": without_secrets({"layout": layout.name, "source": source.path, **given})},
    )
