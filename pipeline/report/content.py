"""The content of a report's page: charts, tables and facts from the figures and the manifest."""

from __future__ import annotations

import math
import shlex
from typing import Any, NamedTuple

from logitcask.cache_format import CacheReader
from logitcask.cache_format.describe import describe_audit, describe_head, describe_tail
from logitcask.cache_format.manifest import Manifest
from logitcask.cache_format.pages.charts import (
    Bar,
    Bars,
    Chart,
    Histogram,
    LineChart,
    Series,
    number,
)
from logitcask.pipeline.report.figures import Figures, Mean

SOURCES = 20
"""Sources that are shown one by one."""

_PARTS = {
    "tokens, masks, names": ("sequence_id", "input_ids", "loss_mask"),
    "head ids": ("head_size", "head_id_"),
    "head logprobs": ("head_step_",),
    "draws": ("sample_",),
    "target, tail mass, entropy": (
        "positions",
        "target_logprob",
        "target_rank",
        "tail_step",
        "entropy_step",
    ),
    "writer's logprobs": ("writer_logprob",),
    "writer's most probable ids": ("chosen_",),
}
"""Part of a cache -> columns of a shard, by the beginnings of their names."""

_SHOWN_ELSEWHERE = ("sequences", "tokens", "kept_positions")

_WRITTEN = {
    "generated": "the teacher wrote the answers",
    "assistant": "the data set; the assistant's turns are learnt",
    "completion": "the data set; the completions are learnt",
    "all": "the data set",
    "mixed": "the data set, several kinds",
}
"""Mask policy -> who wrote the text."""


class Smaller(NamedTuple):
    """A row of the table of smaller caches: texts; ``command`` is empty for the cache itself."""

    k: str
    mass: str
    target: str
    entries: str
    size: str
    command: str


def content(reader: CacheReader, figures: Figures, smaller: dict[int, float]) -> dict[str, Any]:
    """The values of ``report.html.jinja``.

    smaller: bytes per token with at most k entries a head, by k.
    """
    manifest = reader.manifest
    totals = manifest.statistics
    return {
        "path": reader.path,
        "manifest": manifest,
        "figures": figures,
        "tokens": plural(totals.tokens, "token"),
        "whole": figures.sequences == totals.sequences,
        "cards": _cards(manifest, figures),
        "size": _size(reader),
        "distribution": [each for each in _distribution(manifest, figures) if each],
        "loss": [each for each in _loss(figures) if each],
        "coverage": _coverage_chart(figures),
        "smaller": _smaller_table(reader, figures, smaller),
        "lists": {
            "Hardest for the teacher": figures.hardest,
            "Easiest for the teacher": figures.easiest,
            "Longest": figures.longest,
        },
        "facts": {name: value for name, value in _facts(manifest).items() if value},
        "counters": {
            name.replace("_", " "): count
            for name, count in manifest.data.counters.items()
            if count and name not in _SHOWN_ELSEWHERE
        },
    }


def _cards(manifest: Manifest, figures: Figures) -> list[tuple[str, str, str]]:
    """Name, value and explanation."""
    totals = manifest.statistics
    return [
        ("tokens", f"{totals.tokens:,}", f"in {plural(totals.sequences, 'sequence')}"),
        ("predicted", f"{totals.positions:,}", "kept positions"),
        ("size", _bytes(totals.bytes), f"{totals.bytes_per_token:,.1f} bytes per token"),
        ("teacher's loss", _two_digits(totals.teacher_ce), "nats per token"),
        (
            "mass in the heads",
            number(_value(totals.head_mass), "%"),
            "–" if totals.mean_head_size is None else f"{totals.mean_head_size:.1f} ids each",
        ),
        ("draws", _two_digits(totals.mean_draws), "per position, from the other ids"),
    ]


def plural(count: int, noun: str) -> str:
    """A number of things, such as ``1 token`` and ``1,234 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _two_digits(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.2f}"


def _value(mean: float | None) -> float:
    return math.nan if mean is None else mean


def _bytes(size: float) -> str:
    """A size in three digits."""
    power = min(4, max(0, (len(str(int(size))) - 1) // 3))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _size(reader: CacheReader) -> Bars:
    """Bytes of each part of the shards, as they are stored."""
    manifest = reader.manifest
    by_column: dict[str, int] = {}
    for shard in range(len(manifest.shards)):
        for name, size in reader.column_bytes(shard).items():
            by_column[name] = by_column.get(name, 0) + size
    parts = {
        part: sum(size for name, size in by_column.items() if name.startswith(names))
        for part, names in _PARTS.items()
    }
    if manifest.tail_prior is not None:
        parts["tail prior"] = manifest.tail_prior.bytes
    total = manifest.statistics.bytes
    parts["Arrow's headers and padding"] = total - sum(parts.values())
    return Bars(
        "Size by part",
        f"of {total:,} bytes",
        [
            Bar(part, size, f"{size / total:.1%}" if total else "–", f"{size:,} bytes")
            for part, size in parts.items()
            if size
        ],
    )


def _distribution(manifest: Manifest, figures: Figures) -> list[Chart | None]:
    mass = figures.mass_edges.tolist(), figures.mass_counts.tolist()
    entropy = figures.entropy_edges.tolist(), figures.entropy_counts.tolist()
    return [
        Histogram("Mass of the heads", "share of the probability", "positions", *mass, unit="%"),
        Histogram("Entropy of the teacher", "nats", "positions", *entropy)
        if manifest.store.entropy
        else None,
    ]


def _coverage_chart(figures: Figures) -> LineChart | None:
    """What the first k ids of each head hold."""
    found = figures.coverage()
    if not found:
        return None
    k = [float(each.k) for each in found]
    return LineChart(
        "Coverage by the first k ids of a head",
        "k (logarithmic)",
        "share, on average",
        [
            Series("mass of the first k stored ids", k, [each.mass for each in found]),
            Series("next token is among the teacher's first k", k, [each.target for each in found]),
        ],
        ticks=k,
        log=True,
        unit="%",
    )


def _smaller_table(
    reader: CacheReader, figures: Figures, smaller: dict[int, float]
) -> list[Smaller]:
    top_k = reader.manifest.store.top_k
    return [
        Smaller(
            f"{each.k:,}",
            number(each.mass, "%"),
            number(each.target, "%"),
            f"{each.entries:.1f}",
            f"{smaller[each.k]:.1f}" if each.k in smaller else "–",
            "" if each.k == top_k else _derive(reader.path, each.k),
        )
        for each in figures.coverage()
    ]


def _derive(path: str, k: int) -> str:
    """The command that makes a cache with heads of at most k ids, in a folder of its own."""
    folder = path.rstrip("/").rpartition("/")[2] if "://" in path else path.rstrip("/")
    return shlex.join(["teacher-cache", "derive", path, f"{folder}-top{k}", "--top-k", str(k)])


def _loss(figures: Figures) -> list[Chart | None]:
    """The teacher's loss by several properties of the predicted token."""
    sources = figures.sources(SOURCES)
    places = figures.places()
    counts = figures.loss_edges.tolist(), figures.loss_counts.tolist()
    return [
        Histogram(
            "Surprise of the teacher",
            "nats",
            "positions",
            *counts,
            note=f"{number(float(figures.loss_edges[-1]))} nats and more are in the last bar.",
        ),
        Bars(
            "Loss by place in the sequence",
            "nats per token; tokens counted from 0",
            [
                _bar(f"{low:,} to {high:,}" if high > low else f"{low:,}", mean)
                for low, high, mean in places
            ],
        ),
        Bars("Loss by source", "nats per token", [_bar(name, mean) for name, mean in sources]),
        Bars(
            "Loss by class of token",
            "nats per token",
            [
                _bar(name, mean)
                for name, mean in sorted(figures.by_class.items(), key=lambda item: -item[1].mean)
            ],
        )
        if figures.by_class
        else None,
    ]


def _bar(label: str, mean: Mean) -> Bar:
    shown = f"{mean.mean:.2f}" if mean.count else "–"
    return Bar(label, mean.mean if mean.count else 0.0, shown, f"{mean.count:,} tokens")


def _facts(manifest: Manifest) -> dict[str, str]:
    """Where the cache comes from."""
    teacher, data, store = manifest.teacher, manifest.data, manifest.store
    made_of = manifest.derived_from
    return {
        "teacher": f"{teacher.model}"
        + (f", revision {teacher.revision}" if teacher.revision else ""),
        "weights": f"sha256 {teacher.weights_sha256}" if teacher.weights_sha256 else "",
        "engine": f"{teacher.engine}, {teacher.dtype}, route {teacher.route}, temperature {teacher.temperature:g}",
        "tokenizer": f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids, sha256 {manifest.tokenizer.sha256}",
        "data": f"{data.source}, split {data.split}, {data.kind}, at most {data.max_length:,} tokens, longer ones: {data.overlong}",
        "text by": f"{_written_by(manifest)} (loss mask: {data.mask_policy})",
        "head": describe_head(manifest),
        "tail": describe_tail(manifest),
        "rounding": f"logprobs within {store.rounding:g} nats",
        "audit": "" if made_of else describe_audit(manifest.audit),
        "made of": f"{made_of.command} of {', '.join(each[:12] for each in made_of.fingerprints)}"
        if made_of
        else "",
        "options": ", ".join(f"{name}={value}" for name, value in made_of.options.items())
        if made_of
        else "",
        "made by": f"{manifest.created_by}, {manifest.created_at}",
        "format": f"version {manifest.format_version}",
        "fingerprint": manifest.fingerprint,
    }


def _written_by(manifest: Manifest) -> str:
    """Who wrote the text: the data set, the teacher, or another model and how it was sampled."""
    generation = manifest.data.generation
    if generation is None or generation.writer is None:
        return _WRITTEN.get(manifest.data.mask_policy, manifest.data.mask_policy)
    writer = generation.writer
    revision = f", revision {writer.revision}" if writer.revision else ""
    weights = f", weights sha256 {writer.weights_sha256}" if writer.weights_sha256 else ""
    splice = generation.splice
    spliced = (
        f"; in {splice.number - 1:,} further pass{'' if splice.number == 2 else 'es'} the first token of rank {splice.top_k} or more "
        f"was replaced by one of the teacher, at temperature {splice.temperature:g} and top_p {splice.top_p:g}"
        if splice is not None
        else ""
    )
    return (
        f"{writer.model}{revision}{weights} wrote the answers with {writer.engine}, {writer.dtype}, "
        f"at temperature {writer.temperature:g} and top_p {writer.top_p:g}{spliced}"
    )
