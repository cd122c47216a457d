"""What the cache format costs and how near to the teacher it stays, beside other layouts of the
same distributions.

    python benchmarks/format.py [PART ...]

fidelity bytes per token against KL and total variation to SmolLM2-135M's whole distributions over
`python-docs` choices the codec's decisions and their alternatives, one at a time speed tokens per
second and core, encoding and decoding; random access memory resident memory while writing and
reading 1 and 10 million tokens curves docs/format-size.svg and docs/format-speed.svg, from the
results

All parts by default. Results go to benchmarks/results/format.json, a part at a time. The teacher is
run once and what it said is kept in --work (1 GB).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from format_caches import BENCHMARK_DATA, cache_bytes, write_cache
from format_choices import choices
from format_curves import draw_size, draw_speed
from format_speed import kept_per_batch, memory, on_one_core, random_access, speed
from format_truth import Reconstruction, Truth, distances, load, of_cache, sampling_noise
from machine import machine
from peers_formats import QUOTED, Peer, peers

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.config import StoreConfig

RESULTS = Path(__file__).parent / "results" / "format.json"
DOCS = Path(__file__).parent.parent / "docs"
PARTS = ("fidelity", "choices", "speed", "memory", "curves")

STEPS = (1 / 64, 1 / 16, 1 / 8, 1 / 4)
FIXED_K = (4, 8, 16, 32, 64, 128)
MIN_PROBABILITIES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)


def head_only(
    *, top_k: int = 256, min_probability: float | None = None, step: float = 1 / 16
) -> StoreConfig:
    """Heads and no draws."""
    return StoreConfig(
        top_k=top_k,
        min_k=1,
        min_probability=min_probability,
        tail_samples=0,
        mass_per_sample=None,
        logprob_step=step,
    )


def fixed(head: int, draws: int) -> StoreConfig:
    """As many of each everywhere."""
    return StoreConfig(
        top_k=head, min_k=head, min_probability=None, tail_samples=draws, mass_per_sample=None
    )


def adaptive(bound: float, min_k: int, at_most: int) -> StoreConfig:
    """Entries of at least this probability, and a draw for as much of the tail."""
    return StoreConfig(
        top_k=at_most,
        min_k=min_k,
        min_probability=bound,
        tail_samples=at_most,
        mass_per_sample=bound,
    )


SAMPLED = {
    "default": StoreConfig(),
    "head 16 + 16 draws": fixed(16, 16),
    "head 8 + 8 draws": fixed(8, 8),
    "p >= 0.01 + draws of 0.01": adaptive(0.01, 5, 64),
    "p >= 0.02 + draws of 0.02, at least 5": adaptive(0.02, 5, 32),
    "p >= 0.05 + draws of 0.05, at least 5": adaptive(0.05, 5, 16),
    "0 + 50 draws, independent": fixed(0, 50).model_copy(update={"draws": "independent"}),
    "0 + 50 draws": fixed(0, 50),
    "0 + 16 draws": fixed(0, 16),
}
# What the smaller caches are derived from: everything captured, and draws enough for a good prior.
WIDE = fixed(256, 16).model_copy(update={"logprob_step": 1 / 64})
BUDGETS = (12, 16, 20, 26, 31.7, 45, 59.5, 90, 130)
RANDOM_SAMPLING = "0 + 50 draws, independent"


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tokens", type=int, default=30_000, help="of python-docs")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("caches/benchmark-format"),
        help="what may be kept or removed",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    wanted = arguments.parts or PARTS
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if "fidelity" in wanted:
        truth = ground_truth(arguments.work, arguments.tokens)
        save("data", describe_data(truth))
        save("fidelity", fidelity(truth, arguments.work))
    if "choices" in wanted:
        save("choices", on_one_core(measure_choices, arguments.work, arguments.tokens))
    if "speed" in wanted:
        for part, result in on_one_core(measure_speed, arguments.work, arguments.tokens).items():
            save(part, result)
    if "memory" in wanted:
        save("memory", memory(arguments.work))
    if "curves" in wanted:
        results = json.loads(RESULTS.read_text())
        draw_size(results, DOCS / "format-size.svg")
        draw_speed(results, DOCS / "format-speed.svg")


def ground_truth(work: Path, tokens: int) -> Truth:
    """What the teacher said; it is asked where it has not been."""
    return load(work / "truth", tokens, {**SAMPLED, "wide": WIDE})


def measure_speed(work: Path, tokens: int) -> dict[str, Any]:
    """The parts of the results that are times."""
    truth = ground_truth(work, tokens)
    stores = {f"Logitcask, k = {k}": (head_only(top_k=k), None) for k in (16, 32, 64)}
    kept = {
        name: (store, truth.kept(store.settings(truth.vocab_size), store.capture(), draws))
        for name, (store, draws) in {
            **stores,
            "Logitcask, default": (StoreConfig(), "default"),
        }.items()
    }
    given = [
        (peer, given_to(truth, peer))
        for peer in peers(64, kept_per_batch(truth, 64), truth.vocab_size)
    ]
    return {
        "speed": speed(
            kept, [pair for pair in given if pair[0].name != "NeMo-Aligner"], truth, work
        ),
        "random_access": random_access(*kept["Logitcask, k = 64"], truth, work),
    }


def measure_choices(work: Path, tokens: int) -> dict[str, Any]:
    """The codec's decisions."""
    return choices(ground_truth(work, tokens), work)


def save(part: str, result: Any) -> None:
    """Puts one part into the results and says so."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": machine(), part: result}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{part}: {RESULTS.name}", flush=True)


def describe_data(truth: Truth) -> dict[str, Any]:
    """What was measured on."""
    return {
        **BENCHMARK_DATA,
        "teacher": truth.teacher.model,
        "engine": f"{truth.teacher.engine}, {truth.teacher.dtype}",
        "vocab_size": truth.vocab_size,
        "sequences": len(truth.sequences),
        "tokens": truth.tokens,
        "positions": len(truth.squares),
        "dense_positions": len(truth.rows),
    }


def fidelity(truth: Truth, work: Path) -> dict[str, Any]:
    """Every point of the curves: real caches on disk, read back by the reader; and the other
    layouts.
    """
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "sampled": [], "peers": []}
    found: dict[str, Reconstruction] = {}
    targets: list[tuple[dict[str, Any], str, str]] = []

    def measure(row: dict[str, Any], prefix: str, reconstruction: Reconstruction) -> None:
        name = f"{len(found)}"
        found[name] = reconstruction
        targets.append((row, prefix, name))

    calibrated = TailPrior.estimate(
        truth.kept(
            SAMPLED["head 16 + 16 draws"].settings(truth.vocab_size),
            SAMPLED["head 16 + 16 draws"].capture(),
            "head 16 + 16 draws",
        ),
        truth.vocab_size,
    )
    for step in STEPS:
        for heads, stores in (
            ("fixed", {k: head_only(top_k=k, step=step) for k in FIXED_K}),
            (
                "min_probability",
                {p: head_only(min_probability=p, step=step) for p in MIN_PROBABILITIES},
            ),
        ):
            for bound, store in stores.items():
                row, sequences, prior = _written(truth, store, None, work)
                row = {"heads": heads, "bound": bound, "step": step} | row
                measure(row, "prior_", of_cache(sequences, prior))
                measure(row, "even_", of_cache(sequences, None))
                if step == 1 / 16:
                    row["sampled_prior_bytes_per_token"] = _written(
                        truth, store, None, work, calibrated
                    )[0]["bytes_per_token"]
                    measure(row, "sampled_prior_", of_cache(sequences, calibrated))
                rows["ours"].append(row)
    for name, store in SAMPLED.items():
        row, sequences, prior = _written(truth, store, name, work)
        row = {"name": name} | row
        with_logprobs = store.model_copy(update={"sample_logprobs": True})
        row["with_sample_logprobs"] = _written(truth, with_logprobs, name, work)[0][
            "bytes_per_token"
        ]
        row["noise"] = sampling_noise(
            truth, truth.kept(with_logprobs.settings(truth.vocab_size), store.capture(), name)
        )
        if store.top_k:
            measure(row, "prior_", of_cache(sequences, prior))
            measure(row, "even_", of_cache(sequences, None))
        rows["sampled"].append(row)
    for peer in _all_peers(truth):
        sequences = given_to(truth, peer)
        data = peer.encode(sequences)
        row = {
            "name": peer.name,
            "layout": peer.layout,
            "k": peer.k,
            "whole": peer.whole,
            "bytes_per_token": len(data) / truth.tokens,
        }
        measure(row, "even_", _of_peer(peer, list(peer.decode(data))))
        rows["peers"].append(row)
    rows["derived"] = _derived(truth, work, measure)
    measured = distances(truth, found)
    for row, prefix, name in targets:
        row[f"{prefix}kl"], row[f"{prefix}tv"] = measured[name]["kl"], measured[name]["tv"]
    return {**rows, "quoted": [vars(quoted) for quoted in QUOTED]}


def _derived(
    truth: Truth, work: Path, measure: Callable[[dict[str, Any], str, Reconstruction], None]
) -> list[dict[str, Any]]:
    """Heads alone, cut to a budget by `teacher-cache derive` from a cache that also has draws,
    which make a better prior.
    """
    _written(truth, WIDE, "wide", work)
    source = (work / "cache").rename(work / "wide")
    rows = []
    for step in (1 / 16, 1 / 8, 1 / 4):
        for budget in BUDGETS:
            path = work / "derived"
            shutil.rmtree(path, ignore_errors=True)
            options = DeriveOptions(
                min_k=1, tail_samples=0, max_bytes_per_token=budget, logprob_step=step
            )
            derive(str(source), path, options)
            reader = CacheReader(path)
            store, statistics = reader.manifest.store, reader.manifest.statistics
            row = {
                "budget": budget,
                "step": step,
                "min_probability": store.min_probability,
                "bytes_per_token": cache_bytes(path) / truth.tokens,
                "mean_head": statistics.mean_head_size,
                "head_mass": statistics.head_mass,
            }
            sequences = list(reader)
            measure(row, "prior_", of_cache(sequences, reader.prior))
            measure(row, "even_", of_cache(sequences, None))
            rows.append(row)
    shutil.rmtree(source)
    return rows


def _all_peers(truth: Truth) -> list[Peer]:
    """At k = 64; the plain layouts at other k as well."""
    rest = peers(64, 8, truth.vocab_size)[2:]
    return [
        peer for k in (4, 8, 16, 32, 64, 128) for peer in peers(k, 8, truth.vocab_size)[:2]
    ] + rest


def given_to(truth: Truth, peer: Peer) -> list[CachedSequence]:
    """What a layout is asked to hold: heads of its size, or draws alone."""
    if peer.k:
        store = head_only(top_k=peer.k)
        return truth.kept(store.settings(truth.vocab_size), store.capture())
    store = SAMPLED[RANDOM_SAMPLING]
    return truth.kept(store.settings(truth.vocab_size), store.capture(), RANDOM_SAMPLING)


def _of_peer(peer: Peer, heads: Any) -> Reconstruction:
    width = max(ids.shape[1] for ids, _ in heads)

    def padded(part: int, filler: float) -> Any:
        return np.concatenate(
            [
                np.pad(h[part], ((0, 0), (0, width - h[part].shape[1])), constant_values=filler)
                for h in heads
            ]
        )

    logprobs = padded(1, -np.inf)
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    # Draws say nothing of what was not drawn; a head leaves what is missing to 1.
    tail = np.maximum(1 - mass, 2.0**-20) if peer.k else np.zeros(len(mass))
    return Reconstruction(padded(0, -1), logprobs, tail)


def _written(
    truth: Truth, store: StoreConfig, draws: str | None, work: Path, prior: TailPrior | None = None
) -> tuple[dict[str, Any], list[CachedSequence], TailPrior]:
    """A real cache: its size with everything in its folder, what is read back, and its prior."""
    path = work / "cache"
    shutil.rmtree(path, ignore_errors=True)
    sequences = truth.kept(store.settings(truth.vocab_size), store.capture(), draws)
    write_cache(path, sequences, store, truth.teacher, truth.tokenizer, prior=prior)
    reader = CacheReader(path)
    statistics = reader.manifest.statistics
    assert reader.prior is not None
    row = {
        "bytes_per_token": cache_bytes(path) / truth.tokens,
        "mean_head": statistics.mean_head_size,
        "mean_draws": statistics.mean_draws,
        "head_mass": statistics.head_mass,
    }
    return row, list(reader), reader.prior


if __name__ == "__main__":
    main()
