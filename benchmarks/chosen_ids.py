"""The writer's most probable ids in a cache: their bytes, and the share of the true reverse KL that
they bring back.

    python benchmarks/chosen_ids.py TEACHER WRITER PROMPTS.jsonl --later STUDENT

TEACHER and WRITER are models with one tokenizer. The writer answers the prompts in the column
``text``, and the teacher scores the answers, with several stores and values of
``data.generate.writer_top_k``. The truth is the KL of the two whole distributions in float64, at
every position that is stored. ``--later``: a student that was trained on since; its KL is bounded
from the ids of the writer. The committed figures are of the teacher of
``benchmarks/quality/on_policy.py`` and two of its students: after two rounds of GKD, and after
three.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.losses import reverse_kl

RESULTS = Path(__file__).parent / "results" / "chosen_ids.json"
STORES: dict[str, dict[str, Any]] = {
    "default, draws with logprobs": {"sample_logprobs": True},
    "top 64, no draws": {"tail_samples": 0, "top_k": 64, "min_k": 64, "min_probability": None},
}
DERIVED = {"default, draws with logprobs": "default, no draws"}
"""Stores of which another one is made without draws."""
COUNTS = (0, 8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("writer")
    parser.add_argument("prompts")
    parser.add_argument("--later")
    parser.add_argument("--answers", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--max-length", type=int, default=60, help="of prompt and answer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    students = {"the writer": arguments.writer}
    if arguments.later:
        students["a later student"] = arguments.later
    models = {name: AutoModelForCausalLM.from_pretrained(each) for name, each in students.items()}
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher)
    rows = []
    dense: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for store in STORES:
            for count in COUNTS:
                output = Path(folder) / f"{len(rows)}"
                caches = {store: written(arguments, output, store, count)}
                if (less := DERIVED.get(store)) is not None:
                    derive(str(output), output.with_suffix(".less"), DeriveOptions(tail_samples=0))
                    caches[less] = CacheReader(output.with_suffix(".less"))
                for name, cache in caches.items():
                    for sequence in () if dense else cache:
                        dense[sequence.sequence_id] = {
                            each: logits_at(model, sequence)
                            for each, model in {"teacher": teacher, **models}.items()
                        }
                    rows.append(row_of(cache, name, count, list(models), dense))
                    print(json.dumps(rows[-1]))
    found = {"machine": machine(), "answers": arguments.answers, "rows": rows}
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(rows))


def written(arguments: Any, output: Path, store: str, count: int) -> CacheReader:
    """The cache of the writer's answers, the same answers each time."""
    config = {
        "teacher": {"model": arguments.teacher, "backend": "transformers"},
        "data": {
            "path": arguments.prompts,
            "text_field": "text",
            "max_length": arguments.max_length,
            "generate": {
                "writer": arguments.writer,
                "writer_top_k": count or None,
                "max_prompts": arguments.answers,
                "max_new_tokens": arguments.tokens,
            },
        },
        "store": STORES[store],
        "audit": {"sequences": 0},
        "log": False,
        "output": str(output),
    }
    build(BuildConfig.model_validate(config))
    return CacheReader(output)


def row_of(
    cache: CacheReader, store: str, count: int, students: list[str], dense: dict[str, Any]
) -> dict[str, Any]:
    """Bytes per position, and the mean KL and its bound, for each student. ``dense``: the logits of
    all models at the positions of each sequence.
    """
    positions = cache.manifest.statistics.positions
    columns = [cache.column_bytes(shard) for shard in range(len(cache.manifest.shards))]
    of_ids = sum(
        size for each in columns for name, size in each.items() if name.startswith("chosen_")
    )
    row: dict[str, Any] = {
        "store": store,
        "writer_top_k": count,
        "bytes_per_token": cache.manifest.statistics.bytes / positions,
        "bytes_of_ids_per_token": of_ids / positions,
        "head_mass": cache.manifest.statistics.head_mass,
        "students": {},
    }
    data = CachedDataset(cache, np.arange(len(cache)))
    for name in students:
        truth = bound = mass = 0.0
        for sequence in cache:
            of_sequence = dense[sequence.sequence_id]
            log_p, z = (of_sequence[each].double() for each in ("teacher", name))
            log_p, log_q = log_p.log_softmax(1), z.log_softmax(1)
            of_cache = data.teacher(collate([sequence]))
            truth += float((log_q.exp() * (log_q - log_p)).sum())
            bound += float(reverse_kl(z, of_cache).sum())
            known = of_cache.ids
            if of_cache.chosen is not None:
                known = torch.cat([known, of_cache.chosen.ids], 1)
            there = log_q.gather(1, known.clamp_min(0)).exp().masked_fill(known < 0, 0)
            mass += float(there.sum())
        row["students"][name] = {
            "reverse_kl": truth / positions,
            "bound": bound / positions,
            "recovered": bound / truth,
            "mass_of_known_ids": mass / positions,
        }
    return row


@torch.inference_mode()
def logits_at(model: Any, sequence: CachedSequence) -> Tensor:
    """float32[P, V] at the kept positions."""
    logits = model(torch.from_numpy(sequence.input_ids)[None].long()).logits[0]
    found: Tensor = logits[torch.from_numpy(sequence.positions).long()]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/losses.md."""
    names = list(rows[0]["students"])
    lines = [
        "| store | `writer_top_k` | bytes per token | "
        + " | ".join(f"{name}: student's mass on known ids, bound / KL" for name in names)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row in sorted(rows, key=lambda row: row["store"]):
        students = [row["students"][name] for name in names]
        cells = [f"{each['mass_of_known_ids']:.1%}, {each['recovered']:.1%}" for each in students]
        count = row["writer_top_k"] or "-"
        bytes_ = f"{row['bytes_per_token']:.1f}"
        lines.append(f"| {row['store']} | {count} | {bytes_} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
