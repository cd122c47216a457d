"""``teacher-cache estimate``: a forecast of a build's tokens, bytes, engine hours and cost.

The head of the data is tokenised as in a build, and the rest is assumed to be similar. Bytes come
from ``size``, speed from ``speed``. No engine is started and no weights are read, unless the user
asks for a probe. The result includes the assumptions behind every number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from logitcask.cache_format import UserError
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate.size import Range, Size, size_from_probe, size_from_reference
from logitcask.pipeline.estimate.speed import Speed, given_speed, probe, speed_from_hardware
from logitcask.pipeline.teachers.open import open_tokenizer, vocab_size_of
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.mixed import open_rows
from logitcask.pipeline.text.rejects import CUT, LEFT_OUT, summary
from logitcask.pipeline.text.row_count import count_rows
from logitcask.pipeline.text.sources import Row, RowSource
from logitcask.pipeline.text.tokenize import Tokenization
from logitcask.pipeline.types import Sequence

# Limits of the head of the data that is tokenised; the first one reached counts. English has some 4
# characters per token.
_ROWS = 2_000
_CHARACTERS = 1_000_000
# Bytes per token of a build's plan, which exists until the cache is finished: an int32 id, a bit of
# the mask, the name.
_PLAN_BYTES_PER_TOKEN = 4.2
_TABLE = tuple(10**power for power in range(6, 13))


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Sample(_Model):
    """The head of the data, tokenised as in a build."""

    rows: int = Field(description="Rows read, those without usable text included.")
    whole: bool = Field(description="Whether these are all rows.")
    text_tokens: int = Field(description="Tokens of all usable rows, before max_length is applied.")
    tokens: int = Field(description="Tokens of the sequences that were made of them.")
    scored_tokens: int = Field(
        description="Those of sequences with something to learn; others never reach the teacher."
    )
    kept_positions: int
    sequences: int
    context: float = Field(description="Mean number of tokens before a token, within its sequence.")
    counters: dict[str, int] = Field(description="What was read, split, truncated, dropped.")


class Forecast(_Model):
    """Forecast of a build over ``text_tokens`` tokens of text. Sizes in bytes, times in seconds."""

    text_tokens: int = Field(description="Before max_length and data.overlong are applied.")
    tokens: int = Field(description="In the cache.")
    scored_tokens: int = Field(description="Read by the teacher.")
    kept_positions: int
    sequences: int
    shards: int
    bytes: Range
    engine_seconds: Range = Field(description="Prefill time, added up over all engines.")
    gpu_seconds: Range = Field(description="The same for every GPU of an engine.")
    wall_seconds: Range = Field(description="With all GPUs at work.")
    cost: Range | None = Field(
        description="GPU hours times the price of one; null without a price."
    )


class Estimate(_Model):
    """The result of ``teacher-cache estimate``."""

    sample: Sample
    total_text_tokens: int | None = Field(
        description="Of the whole data set, where that could be told."
    )
    size: Size
    speed: Speed
    gpus: int
    price_per_gpu_hour: float | None
    forecasts: tuple[Forecast, ...]
    assumptions: tuple[str, ...]


def estimate(
    config: BuildConfig,
    *,
    tokens: list[int] | None = None,
    price: float | None = None,
    gpus: int | None = None,
    gpu: str = "h100",
    tokens_per_second: float | None = None,
    measure: bool = False,
) -> Estimate:
    """The forecast for the build of ``config``.

    tokens:            of text, for the forecast; None: those of the data set up to
                       ``data.max_tokens``, or, if their number is unknown, powers of ten from 10^6
                       to 10^12.
    price:             of a GPU for an hour, in any currency.
    gpus:              number of GPUs in use; None: those of one engine.
    gpu:               the GPU whose peak figures are used (a key of ``speed.GPUS``).
    tokens_per_second: of one engine, if known; replaces the figures of ``gpu``.
    measure:           start the engine and measure speed and bytes on the head of the data; a given
                       speed takes precedence.

    Raises UserError for every problem with data or model that ``build`` finds before its engine
    starts, and for ``gpus`` that are not a multiple of one engine's.
    """
    vocab_size = vocab_size_of(config.teacher)
    if config.store.top_k > vocab_size:
        raise UserError(
            f"store.top_k is {config.store.top_k}, but {config.teacher.model} can predict {vocab_size} ids"
        )
    sample, sequences = _sample(config)
    total = _total_text_tokens(config.data, sample)
    if measure:
        kept, speed = probe(config, sequences)
        size = size_from_probe(config.store, vocab_size, kept)
    else:
        size = size_from_reference(config.store, vocab_size)
    if tokens_per_second is not None:
        speed = given_speed(config, tokens_per_second)
    elif not measure:
        speed = speed_from_hardware(config, gpu, sample.context, size.heads + size.draws)
    gpus = gpus or speed.gpus_per_engine
    if gpus % speed.gpus_per_engine:
        raise UserError(
            f"{gpus} GPUs do not make up engines of {speed.gpus_per_engine} (teacher.tensor_parallel_size times "
            "engine_args.pipeline_parallel_size); give --gpus a multiple of it"
        )

    limit = config.data.max_tokens if tokens is None else None
    if tokens is None:
        tokens = [total] if total is not None else list(_TABLE)
        if total is None and limit is not None:
            tokens = [math.ceil(limit * sample.text_tokens / sample.tokens)]
    forecasts = tuple(
        _forecast(count, limit, config, sample, size, speed, gpus=gpus, price=price)
        for count in tokens
    )
    return Estimate(
        sample=sample,
        total_text_tokens=total,
        size=size,
        speed=speed,
        gpus=gpus,
        price_per_gpu_hour=price,
        forecasts=forecasts,
        assumptions=tuple(
            _assumptions(
                config, sample, total, size, speed, gpus, forecasts, limited=limit is not None
            )
        ),
    )


# --- the head of the data -------------------------------------------------------------------------


def _sample(config: BuildConfig) -> tuple[Sample, list[Sequence]]:
    """The head of the data and its sequences."""
    if config.data.generate is not None:
        raise UserError(
            "how long the teacher's answers will be is not known before it writes them, so data.generate cannot be "
            "estimated; build a little of it (data.max_tokens=20000, another output) and look at its figures"
        )
    source = open_rows(config.data)
    rows, read, whole = _head(source)
    counters = {name: count for name, count in source.counters.items() if name != "rows_read"}
    data = config.data.model_copy(update={"max_tokens": None})
    tokenizer, vocab_size = open_tokenizer(config.teacher), vocab_size_of(config.teacher)
    tokenization = Tokenization(tokenizer, data, vocab_size)
    sequences = list(tokenization.sequences(rows))
    counters |= tokenization.counters
    lengths = np.array([len(sequence.input_ids) for sequence in sequences], np.int64)
    scored = np.array([sequence.loss_mask.any() for sequence in sequences], np.bool_)
    tokens = text_tokens = int(lengths.sum())
    # (Pieces of a document repeat its BOS.)
    if any(counters.get(name) for name in (*CUT, *LEFT_OUT, "split_documents")):
        whole_rows = data.model_copy(update={"max_length": 2**31 - 1})
        everything = Tokenization(tokenizer, whole_rows, vocab_size)
        text_tokens = sum(len(sequence.input_ids) for sequence in everything.sequences(rows))
    sample = Sample(
        rows=read,
        whole=whole,
        text_tokens=text_tokens,
        tokens=tokens,
        scored_tokens=int(lengths[scored].sum()),
        kept_positions=counters["kept_positions"],
        sequences=len(sequences),
        context=float((lengths * (lengths - 1)).sum() / 2 / tokens),
        counters={name: count for name, count in counters.items() if count},
    )
    return sample, sequences


def _head(source: RowSource) -> tuple[list[Row], int, bool]:
    """The first usable rows, the number of rows read for them, and whether they are all rows."""
    rows: list[Row] = []
    characters = 0
    stream = iter(source)
    for row in stream:
        rows.append(row)
        characters += row.characters
        if len(rows) == _ROWS or characters >= _CHARACTERS:
            break
    read = source.counters["rows_read"]
    return rows, read, next(stream, None) is None


# --- all of the data ------------------------------------------------------------------------------


def _total_text_tokens(config: DataConfig, sample: Sample) -> int | None:
    """Tokens of the data set: its rows, estimated from sizes, times the head's tokens per row."""
    if sample.whole:
        return sample.text_tokens
    rows = count_rows(config)
    return (
        None if rows is None else round(max(rows, sample.rows) * sample.text_tokens / sample.rows)
    )


# --- what it comes to -----------------------------------------------------------------------------


def _forecast(
    text_tokens: int,
    limit: int | None,
    config: BuildConfig,
    sample: Sample,
    size: Size,
    speed: Speed,
    *,
    gpus: int,
    price: float | None,
) -> Forecast:
    """The head of the data, scaled to ``text_tokens`` and cut at ``limit`` sequence tokens."""
    factor = text_tokens / sample.text_tokens
    if limit is not None and factor * sample.tokens > limit:
        factor = limit / sample.tokens
    sequences, tokens = max(1, round(factor * sample.sequences)), round(factor * sample.tokens)
    positions, scored = round(factor * sample.kept_positions), round(factor * sample.scored_tokens)
    shards = _shards(tokens, sample.tokens / sample.sequences, config.store.shard_tokens)
    rate = speed.tokens_per_second
    engine = Range(low=scored / rate.high, likely=scored / rate.likely, high=scored / rate.low)
    on_gpus = engine.times(speed.gpus_per_engine)
    return Forecast(
        text_tokens=round(factor * sample.text_tokens),
        tokens=tokens,
        scored_tokens=scored,
        kept_positions=positions,
        sequences=sequences,
        shards=shards,
        bytes=size.of(sequences=sequences, tokens=tokens, positions=positions, shards=shards),
        engine_seconds=engine,
        gpu_seconds=on_gpus,
        wall_seconds=on_gpus.times(1 / gpus),
        cost=None if price is None else on_gpus.times(price / 3600),
    )


def _shards(tokens: int, length: float, shard_tokens: int) -> int:
    """Number of shards; a shard ends on average half a sequence before ``shard_tokens``."""
    if tokens <= shard_tokens:
        return 1
    return math.ceil(tokens / max(length, shard_tokens - length / 2))


def _assumptions(
    config: BuildConfig,
    sample: Sample,
    total: int | None,
    size: Size,
    speed: Speed,
    gpus: int,
    forecasts: tuple[Forecast, ...],
    *,
    limited: bool,
) -> Iterator[str]:
    """The assumptions behind the numbers, one line each."""
    data, store = config.data, config.store
    part = (
        "all of the data"
        if sample.whole
        else "the head of the data, and the rest is taken to be like it"
    )
    yield (
        f"tokens: {sample.rows:,} rows with {sample.text_tokens:,} tokens were tokenised ({part}); they give "
        f"{sample.sequences:,} sequences of {sample.tokens / sample.sequences:,.0f} tokens on average (max_length "
        f"{data.max_length}, overlong {data.overlong}), {sample.tokens / sample.text_tokens:.1%} of the tokens; "
        f"{sample.kept_positions / sample.tokens:.1%} of these are kept positions"
    )
    if rejected := summary(sample.counters):
        yield f"of these rows: {rejected}"
    if not sample.whole:
        yield (
            "how many tokens the whole data set has cannot be told from its files"
            if total is None
            else f"the whole data set has about {total:,} tokens, by the sizes of its files"
        )
    if limited:
        yield f"data.max_tokens={data.max_tokens} counts" + (
            ", taking the data to have that many" if total is None else ""
        )
    elif data.max_tokens is not None:
        yield "data.max_tokens is left aside, since token counts are given"
    yield _size_assumption(store.top_k, size)
    yield from speed.notes
    if gpus != speed.gpus_per_engine:
        yield (
            f"{gpus // speed.gpus_per_engine} engines of {speed.gpus_per_engine} GPU(s) side by side, each with its part of "
            "the data, nothing lost to sharing the work"
        )
    yield "time is prefill alone: not installing, starting engines, tokenising, fetching data"
    yield f"while a build runs, its tokenised text takes {_PLAN_BYTES_PER_TOKEN} bytes per token beside the cache"
    if (most := max(forecast.shards for forecast in forecasts)) > size.most_shards:
        least = math.ceil(store.shard_tokens * most / size.most_shards / 1e6) * 1_000_000
        yield (
            f"WARNING: a manifest holds about {size.most_shards:,} shards, so {most:,} are too many for one cache; set "
            f"store.shard_tokens to {least:,} or more, or build several caches"
        )


def _size_assumption(top_k: int, size: Size) -> str:
    kept = f"{size.heads:.1f} head entries and {size.draws:.1f} {{}} per kept position"
    if size.source == "probe":
        return f"bytes: what the codec made of the probe, {kept.format('draws')}; the range is 10 % either way, since texts differ along the data"
    return (
        f"bytes: {kept.format('distinct draws')}, as these settings keep of SmolLM2-135M over English documentation; the "
        "range is that of surer and less sure teachers and of other texts, of which rows of numbers take half; --probe "
        "measures to within 10 %"
    )
